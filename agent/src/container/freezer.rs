//! Whether a container's processes are to stand still, and who waits for it (cgroup-v2, `cgroup.freeze`).

/// What was asked of the freezer last.
#[derive(Debug, Default)]
pub struct Freezer {
    frozen: bool,
    /// The requests that wait until it is so.
    waiting: Vec<u32>,
}

impl Freezer {
    /// Whether the processes are to stand still.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Takes a request; gives those that waited for the opposite.
    pub fn ask(&mut self, request: u32, frozen: bool) -> Vec<u32> {
        let contradicted = if self.frozen == frozen { Vec::new() } else { std::mem::take(&mut self.waiting) };
        self.frozen = frozen;
        self.waiting.push(request);
        contradicted
    }

    /// Whether a request waits.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes note of what the processes do; gives the requests for which that is it.
    pub fn observe(&mut self, frozen: bool) -> Vec<u32> {
        if self.frozen == frozen { std::mem::take(&mut self.waiting) } else { Vec::new() }
    }

    /// The requests that nothing will come of any more.
    pub fn give_up(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_waits_until_it_is_so_or_contradicted() {
        let mut freezer = Freezer::default();
        assert!(freezer.ask(1, true).is_empty() && freezer.ask(2, true).is_empty());
        assert!(freezer.observe(false).is_empty() && freezer.is_waiting());
        assert_eq!(freezer.ask(3, false), [1, 2]);
        assert_eq!(freezer.observe(false), [3]);
        assert!(!freezer.is_waiting() && !freezer.is_frozen());
    }
}

//! A further process of a running container, as the agent holds it until its end was told.

use protocol::{Answer, Failure, FailureKind, FromAgent};
use rustix::process::Pid;

use super::child::{Child, Stage};

/// A further process.
#[derive(Debug)]
pub struct Process {
    /// Its id.
    pub id: String,
    /// The request to execute it, until it was answered.
    request: Option<u32>,
    /// The child that it is.
    pub child: Child,
}

impl Process {
    /// A process whose execution is the answer to the request `request`.
    pub fn new(id: String, request: u32, child: Child) -> Self {
        Self { id, request: Some(request), child }
    }

    /// Takes note that it has ended, if it is `pid`; whether it was.
    pub fn reaped(&mut self, pid: Pid, exit_code: u8) -> bool {
        let ours = self.child.reaped(pid, exit_code);
        if ours {
            // What it started may go on, and write on: its own output ends here.
            self.child.finish_streams();
        }
        ours
    }

    /// Goes on, and says what the host is to hear; whether the process is still of interest. `container_ended` says that
    /// the container's first process has ended.
    pub fn settle(&mut self, container: &str, container_ended: bool, outbox: &mut Vec<FromAgent>) -> bool {
        match self.child.stage() {
            // There is no reason to wait between the two.
            Stage::Ready => self.child.go(),
            Stage::Executed => {
                let request = self.request.take();
                outbox.extend(request.map(|id| FromAgent::Reply { id, result: Ok(Answer::Done) }));
            }
            Stage::SettingUp | Stage::Told => {}
        }
        let Some(code) = self.child.exit_code() else { return true };
        outbox.push(match self.request.take().filter(|_| self.child.has_failed()) {
            Some(id) => FromAgent::Reply { id, result: Err(self.failure(container, container_ended)) },
            None => FromAgent::ProcessExited { container: container.to_owned(), process: self.id.clone(), code },
        });
        false
    }

    fn failure(&self, container: &str, container_ended: bool) -> Failure {
        let message = match self.child.reason() {
            Some(reason) if !container_ended => return reason,
            _ if container_ended => format!("container {container} has ended"),
            // Mostly since the container ends: its own processes are gone before its first one is.
            _ => format!("process {} of container {container} was killed before it was executed", self.id),
        };
        Failure { kind: FailureKind::WrongState, message }
    }
}

//! Which of the guest's CPUs are in use (Linux `Documentation/ABI/testing/sysfs-devices-system-cpu`).

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use protocol::{Failure, FailureKind};

/// Where the kernel shows its CPUs.
const FOLDER: &str = "/sys/devices/system/cpu";
/// The kernel's own limit is far below (`CONFIG_NR_CPUS`).
const CPUS_MAX: u32 = 1024;

/// Has the kernel use the first `count` CPUs and no others, as far as it does, and tells how many it uses then. The kernel moves
/// what runs elsewhere itself, within milliseconds.
///
/// # Errors
/// There are not as many, or the kernel does not say how many it uses.
pub fn set_online(count: u8) -> Result<u8, Failure> {
    set_online_in(Path::new(FOLDER), count)
}

fn set_online_in(folder: &Path, count: u8) -> Result<u8, Failure> {
    let failure = |kind, message| Failure { kind, message };
    let read = |name: &str| {
        let list = fs::read_to_string(folder.join(name)).and_then(|text| parse(&text));
        list.map_err(|error| failure(FailureKind::System, format!("cannot read {name} CPUs: {error}")))
    };
    let present = read("present")?;
    if count == 0 || usize::from(count) > present.len() {
        let message = format!("{count} CPUs asked for: the guest has {}", present.len());
        return Err(failure(FailureKind::InvalidRequest, message));
    }
    for (index, cpu) in present.iter().enumerate() {
        let (path, wanted) = (folder.join(format!("cpu{cpu}/online")), index < usize::from(count));
        let value = if wanted { b"1" } else { b"0" };
        // The first one has no such file, and one that stays as it is shows in the count.
        let _ = fs::OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(value));
    }
    u8::try_from(read("online")?.len()).map_err(|_| failure(FailureKind::System, "more CPUs than there can be".into()))
}

/// Reads a list such as `0-2,5`.
fn parse(text: &str) -> io::Result<Vec<u32>> {
    let mut cpus = Vec::new();
    for range in text.trim_end().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| text.parse::<u32>().ok().filter(|number| *number < CPUS_MAX);
        match (number(first), number(last)) {
            (Some(first), Some(last)) => cpus.extend(first..=last),
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("not a list of CPUs: {text:?}"))),
        }
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse("0\n").unwrap(), [0]);
        assert_eq!(parse("0-2,5\n").unwrap(), [0, 1, 2, 5]);
        assert_eq!(parse("\n").unwrap(), [0u32; 0]);
        for text in ["x", "0-", "0-99999999", "-1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_first_ones_are_used_and_the_answer_is_the_kernels() {
        let folder = std::env::temp_dir().join(format!("cofferdam-cpus-{}", std::process::id()));
        for cpu in 0..4 {
            fs::create_dir_all(folder.join(format!("cpu{cpu}"))).unwrap();
        }
        for cpu in 1..4 {
            fs::write(folder.join(format!("cpu{cpu}/online")), "1").unwrap();
        }
        fs::write(folder.join("present"), "0-3\n").unwrap();
        // A kernel that keeps one more than it was asked to.
        fs::write(folder.join("online"), "0-2\n").unwrap();
        let answer = set_online_in(&folder, 2);
        let written = [1, 2, 3].map(|cpu| fs::read_to_string(folder.join(format!("cpu{cpu}/online"))).unwrap());
        let first = folder.join("cpu0/online").exists();
        let refused = [0, 5].map(|count| set_online_in(&folder, count).unwrap_err().kind);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(answer, Ok(3));
        assert_eq!(written, ["1", "0", "0"]);
        assert_eq!(refused, [FailureKind::InvalidRequest; 2]);
        assert!(!first);
    }
}

//! Amounts: bytes and CPUs as people type them, and how large a VM they make.
//!
//! A number that the host cannot give is refused here, before anything is started, with the value and what the host has.

use std::str::FromStr;

use api::config::{MEMORY_MIB_MAX, VCPUS_MAX};
use api::model::{CPU_QUOTA_MIN_US, MEMORY_MIN};
use thiserror::Error;

/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;

/// What the guest's kernel and agent need beside the container, in MiB: the kernel's image and its boot-time tables, the
/// initramfs, slab and page tables that grow with the container's processes. It lies outside the container's limit, so
/// that the kernel ends the container's processes, never the agent, when memory runs out.
const RESERVE_MIB: u64 = 64;

/// The kernel keeps 64 bytes about each 4,096-byte page: one part in 64 of the memory.
const PAGES_PER_PAGE_TABLE_PAGE: u64 = 64;

/// The least memory of a VM in MiB: with less, the page cache is too small to run a program from an image smoothly.
const VM_MIB_MIN: u64 = 128;

/// The container's memory when none is asked for, in bytes: what a VM of 512 MiB has left.
pub const DEFAULT_MEMORY: u64 = 440 * MIB;

/// The length in microseconds of the period that a CPU quota is counted in.
pub const CPU_PERIOD_US: u64 = 100_000;

/// Why an amount was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SizeError {
    /// Not a number of bytes.
    #[error("{text:?} is not a size: give a number and a unit, for example 512m or 2g")]
    NotASize {
        /// What was given.
        text: String,
    },
    /// Not a number of CPUs.
    #[error("{text:?} is not a number of CPUs: give for example 2 or 0.5")]
    NotCpus {
        /// What was given.
        text: String,
    },
    /// Less CPU time than the kernel can limit to.
    #[error("--cpus {text} is too little: give at least 0.01")]
    TooFewCpus {
        /// What was given.
        text: String,
    },
    /// More CPUs than there are.
    #[error("--cpus asks for {asked} CPUs, and this host has {available}: give at most {available}")]
    TooManyCpus {
        /// Whole CPUs asked for.
        asked: u64,
        /// Whole CPUs that can be had.
        available: u64,
    },
    /// Less memory than a container needs.
    #[error("--memory is {bytes} bytes: give at least 6m")]
    TooLittleMemory {
        /// Bytes asked for.
        bytes: u64,
    },
    /// More memory than there is.
    #[error(
        "--memory asks for {asked_mib} MiB, and this host has {host_mib} MiB, of which a container can get {most_mib}: \
         give at most {most_mib}m"
    )]
    TooMuchMemory {
        /// MiB asked for.
        asked_mib: u64,
        /// The host's memory in MiB.
        host_mib: u64,
        /// The most that would have been accepted, in MiB.
        most_mib: u64,
    },
}

/// A number of bytes: `1024`, `64k`, `512m`, `1.5g`, `2GiB`; units are powers of 1024, as docker has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let refused = || SizeError::NotASize { text: text.to_owned() };
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let unit = unit.trim_start_matches(' ').to_ascii_lowercase();
        let shift = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit) {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            _ => return Err(refused()),
        };
        let billionths = decimal(number).ok_or_else(refused)?;
        let bytes = (u128::from(billionths) << shift) / 1_000_000_000;
        u64::try_from(bytes).map(Self).map_err(|_| refused())
    }
}

/// A number of CPUs as microseconds of CPU time in each [`CPU_PERIOD_US`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpus {
    quota_us: u64,
}

impl FromStr for Cpus {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let billionths = decimal(text).ok_or_else(|| SizeError::NotCpus { text: text.to_owned() })?;
        let quota_us = billionths / (1_000_000_000 / CPU_PERIOD_US);
        if quota_us < CPU_QUOTA_MIN_US {
            return Err(SizeError::TooFewCpus { text: text.to_owned() });
        }
        Ok(Self { quota_us })
    }
}

/// A decimal number in billionths: at most 9 digits on each side of the point.
fn decimal(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |part: &str| (1..=12).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let fraction: u64 = format!("{fraction:0<9}").parse().ok()?;
    whole.checked_mul(1_000_000_000)?.checked_add(fraction)
}

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// CPUs this process may run on.
    pub cpus: u64,
    /// Bytes of memory.
    pub memory: u64,
}

impl Host {
    /// Asks the kernel: two system calls.
    pub fn read() -> Self {
        let cpus = rustix::thread::sched_getaffinity(None).map_or(1, |set| u64::from(set.count()));
        let info = rustix::system::sysinfo();
        Self { cpus, memory: info.totalram.saturating_mul(u64::from(info.mem_unit)) }
    }
}

/// How large a VM is, and what its container may use of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// The number of vCPUs.
    pub vcpus: u8,
    /// The container's CPU time in microseconds per [`CPU_PERIOD_US`], where it is not all of the vCPUs'.
    pub cpu_quota_us: Option<u64>,
    /// The VM's memory in MiB.
    pub memory_mib: u32,
    /// The container's memory limit in bytes.
    pub memory_limit: u64,
}

impl Sizes {
    /// Sizes a VM for what was asked: one CPU and [`DEFAULT_MEMORY`] when nothing was.
    ///
    /// # Errors
    /// Less than a container needs, or more than the host has.
    pub fn new(cpus: Option<Cpus>, memory: Option<u64>, host: Host) -> Result<Self, SizeError> {
        let quota_us = cpus.map_or(CPU_PERIOD_US, |cpus| cpus.quota_us);
        let asked = quota_us.div_ceil(CPU_PERIOD_US);
        let available = host.cpus.clamp(1, u64::from(VCPUS_MAX));
        let vcpus = u8::try_from(asked).ok().filter(|vcpus| u64::from(*vcpus) <= available);
        let vcpus = vcpus.ok_or(SizeError::TooManyCpus { asked, available })?;
        let cpu_quota_us = (!quota_us.is_multiple_of(CPU_PERIOD_US)).then_some(quota_us);

        let memory_limit = memory.unwrap_or(DEFAULT_MEMORY);
        if memory_limit < MEMORY_MIN {
            return Err(SizeError::TooLittleMemory { bytes: memory_limit });
        }
        let asked_mib = memory_limit.div_ceil(MIB);
        let host_mib = (host.memory / MIB).min(u64::from(MEMORY_MIB_MAX));
        let memory_mib = u32::try_from(vm_mib(asked_mib)).ok().filter(|mib| u64::from(*mib) <= host_mib);
        let memory_mib =
            memory_mib.ok_or_else(|| SizeError::TooMuchMemory { asked_mib, host_mib, most_mib: most_mib(host_mib) })?;
        Ok(Self { vcpus, cpu_quota_us, memory_mib, memory_limit })
    }
}

/// The memory in MiB of the VM around a container of `container_mib`: even, so that it is whole 2 MiB pages.
fn vm_mib(container_mib: u64) -> u64 {
    let needed = container_mib + RESERVE_MIB + container_mib.div_ceil(PAGES_PER_PAGE_TABLE_PAGE);
    needed.max(VM_MIB_MIN).next_multiple_of(2)
}

/// The largest container in MiB whose VM fits into `host_mib`.
fn most_mib(host_mib: u64) -> u64 {
    let left = host_mib.saturating_sub(RESERVE_MIB);
    let mut most = left - left.div_ceil(PAGES_PER_PAGE_TABLE_PAGE + 1);
    while most > 0 && vm_mib(most) > host_mib {
        most -= 1;
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host { cpus: 4, memory: 8 << 30 };

    #[test]
    fn sizes_are_read_as_docker_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1024", 1024),
            ("64k", 64 << 10),
            ("512m", 512 << 20),
            ("512M", 512 << 20),
            ("512mb", 512 << 20),
            ("2GiB", 2 << 30),
            ("1.5g", 3 << 29),
            ("10b", 10),
            ("1 g", 1 << 30),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "m", "-1", "1.5.2g", "12x", "1e3", ".5g", "99999999t", "99999999999999999999", "1\u{663}"] {
            assert!(matches!(text.parse::<Bytes>(), Err(SizeError::NotASize { .. })), "{text}");
        }
    }

    #[test]
    fn cpus_round_up_to_vcpus_and_leave_a_quota() {
        let sizes = |text: &str| Sizes::new(Some(text.parse().unwrap()), None, HOST).unwrap();
        assert_eq!((sizes("2").vcpus, sizes("2").cpu_quota_us), (2, None));
        assert_eq!((sizes("1.5").vcpus, sizes("1.5").cpu_quota_us), (2, Some(150_000)));
        assert_eq!((sizes("0.01").vcpus, sizes("0.01").cpu_quota_us), (1, Some(1000)));
    }

    #[test]
    fn cpus_that_cannot_be_are_refused() {
        assert!(matches!("0".parse::<Cpus>(), Err(SizeError::TooFewCpus { .. })));
        assert!(matches!("two".parse::<Cpus>(), Err(SizeError::NotCpus { .. })));
        let five = Some("4.5".parse().unwrap());
        assert_eq!(Sizes::new(five, None, HOST), Err(SizeError::TooManyCpus { asked: 5, available: 4 }));
        let most = Some("999999999".parse().unwrap());
        assert!(matches!(Sizes::new(most, None, HOST), Err(SizeError::TooManyCpus { .. })));
    }

    #[test]
    fn the_vm_is_larger_than_its_container() {
        let default = Sizes::new(None, None, HOST).unwrap();
        assert_eq!((default.vcpus, default.memory_mib, default.memory_limit), (1, 512, DEFAULT_MEMORY));
        let gibibyte = Sizes::new(None, Some(1 << 30), HOST).unwrap();
        assert_eq!((gibibyte.memory_mib, gibibyte.memory_limit), (1024 + 64 + 16, 1 << 30));
        assert_eq!(Sizes::new(None, Some(6 * MIB), HOST).unwrap().memory_mib, 128);
    }

    #[test]
    fn memory_that_cannot_be_is_refused_with_what_can() {
        assert_eq!(Sizes::new(None, Some(1), HOST), Err(SizeError::TooLittleMemory { bytes: 1 }));
        let error = Sizes::new(None, Some(8 << 30), HOST).unwrap_err();
        let SizeError::TooMuchMemory { asked_mib: 8192, host_mib: 8192, most_mib } = error else { panic!("{error}") };
        assert!(Sizes::new(None, Some(most_mib * MIB), HOST).is_ok());
        assert!(Sizes::new(None, Some((most_mib + 2) * MIB), HOST).is_err());
        assert!(matches!(Sizes::new(None, Some(u64::MAX), HOST), Err(SizeError::TooMuchMemory { .. })));
    }
}

//! A hostile guest: a program without an operating system that plays every trick of a virtio driver against the monitor
//! that runs it, and sees after each that devices still serve who keeps to the rules.
//!
//! The monitor boots it like a kernel (`vm.kernel`). What it plays is on the kernel command line ([`command_line`]): a seed,
//! and how many cases of it. A case is the same each time it is played. It says how far it is on the serial port
//! ([`report`], `vm.serial`), one fault a line, and at last:
//!
//! ```text
//! hostile: 2000 cases, 2000 survived, 812 broke their device, 2718 answers, 31337 interrupts
//! ```
//!
//! Then it powers off. A case has survived when the device resets, reads as before, and serves an honest request
//! ([`devices::Kind::ask`]), and when no device has written where it was never pointed at ([`memory`]).
//!
//! # Layout
//! - Machine: [`cpu`], [`paging`], [`interrupt`], [`memory`], [`report`], [`command_line`], [`random`].
//! - Transport: [`mmio`] (registers), [`ring`] (queues), [`honest`] (a driver that keeps to the rules).
//! - Attack: [`case`] (what is done, and which sections of the specification it is against), [`aim`] (addresses and
//!   lengths), [`request`] (chains), [`devices`] (what each kind is sent), [`elsewhere`] (what is no device).

#![cfg_attr(not(test), no_std)]

pub mod aim;
pub mod case;
pub mod command_line;
pub mod cpu;
pub mod devices;
pub mod elsewhere;
pub mod honest;
pub mod interrupt;
pub mod memory;
pub mod mmio;
pub mod paging;
pub mod random;
pub mod report;
pub mod request;
pub mod ring;

use core::fmt::Display;

use case::{Case, QUEUES_MAX};
use command_line::{DEVICES_MAX, LENGTH_MAX, Plan};
use devices::Kind;
use honest::Fault;
use mmio::Device;
use random::Random;

/// How many faults are told before it is enough.
const FAULTS_MAX: u64 = 8;
/// After so many cases all devices are looked at, and how far it is is told.
const INTERVAL: u64 = 100;

/// A device, as it was found.
#[derive(Clone, Copy)]
struct Target {
    device: Device,
    kind: &'static Kind,
    offered: u64,
    sizes: [u32; QUEUES_MAX],
}

impl Target {
    fn find(device: Device) -> Self {
        let mut sizes = [0; QUEUES_MAX];
        for (index, size) in (0..).zip(&mut sizes) {
            *size = device.queue_size_max(index);
        }
        Self { device, kind: devices::kind(device.read(mmio::DEVICE_ID)), offered: device.offered(), sizes }
    }

    /// Whether it is as it was, and serves.
    fn check(&self) -> Result<(), Fault> {
        if !self.device.reset() {
            return Err("it does not reset");
        }
        let identity = [mmio::MAGIC, mmio::VERSION].map(|register| self.device.read(register));
        let found = Self::find(self.device);
        if identity != [u32::from_le_bytes(*b"virt"), 2]
            || (found.kind.id, found.offered, found.sizes) != (self.kind.id, self.offered, self.sizes)
        {
            return Err("its registers have changed");
        }
        (self.kind.ask)(self.device)?;
        if self.device.reset() { Ok(()) } else { Err("it does not reset") }
    }
}

/// All devices, and what came of them.
struct Play {
    plan: Plan,
    targets: [Option<Target>; DEVICES_MAX],
    count: u64,
    broken: u64,
    used: u64,
    faults: u64,
}

impl Play {
    /// Whether a device is in order after a case.
    fn check(&mut self, case: u64, index: u64) -> bool {
        let Some(target) = self.targets[index as usize] else { return true };
        let Err(fault) = target.check() else { return true };
        self.fault(format_args!("case {case}: device {index}, {}: {fault}", target.kind.name));
        false
    }

    fn fault(&mut self, what: impl Display) {
        report::say(format_args!("FAULT, seed {}: {what}", self.plan.seed));
        self.faults += 1;
    }

    /// Whether everything is in order after a case.
    fn check_all(&mut self, case: u64) -> bool {
        let mut good = (0..self.count).filter(|index| !self.check(case, *index)).count() == 0;
        if let Some(at) = memory::canary() {
            self.fault(format_args!("case {case}: a device has written to {at:#x}"));
            memory::lay_canary();
            good = false;
        }
        good
    }

    /// Plays a case; whether it has survived.
    fn case(&mut self, case: u64) -> bool {
        let mut random = Random::of(self.plan.seed, case);
        // One of a few is none of a device.
        let index = self.plan.only.unwrap_or_else(|| random.below(self.count + 1));
        let Some(Target { device, kind, sizes, .. }) = self.targets.get(index as usize).copied().flatten() else {
            elsewhere::wander(&mut random);
            return true;
        };
        let outcome = Case { device, kind, sizes, random: &mut random }.play();
        self.broken += u64::from(outcome.broken);
        self.used += outcome.used;
        self.check(case, index)
    }
}

/// Plays what the command line says, and powers off.
pub fn run(zero_page: u64) -> ! {
    report::say(format_args!("begins"));
    memory::learn(zero_page);
    let mut line = [0; LENGTH_MAX];
    let length = command_line::read(zero_page, &mut line);
    let (plan, places) = command_line::parse(core::str::from_utf8(&line[..length]).unwrap_or_default());
    paging::enable();
    interrupt::enable();
    memory::lay_canary();
    let mut play = Play { plan, targets: [None; DEVICES_MAX], count: 0, broken: 0, used: 0, faults: 0 };
    for (place, target) in places.into_iter().flatten().zip(&mut play.targets) {
        interrupt::connect(place.pin);
        *target = Some(Target::find(Device { place }));
        play.count += 1;
    }
    report::say(format_args!("{} devices, {plan:?}", play.count));
    play.check_all(plan.first);
    let (mut played, mut survived) = (0, 0);
    while played < plan.cases && play.faults < FAULTS_MAX {
        let case = plan.first + played;
        let mut good = play.case(case);
        played += 1;
        if played.is_multiple_of(INTERVAL) || played == plan.cases {
            good = play.check_all(case) && good;
            report::say(format_args!("{played} cases so far"));
        }
        survived += u64::from(good);
    }
    let (Play { broken, used, .. }, interrupts) = (play, interrupt::total());
    report::say(format_args!(
        "{played} cases, {survived} survived, {broken} broke their device, {used} answers, {interrupts} interrupts"
    ));
    cpu::power_off()
}

/// Says why it cannot go on, and powers off.
pub fn give_up(why: &dyn Display) -> ! {
    report::say(format_args!("gave up: {why}"));
    cpu::power_off()
}

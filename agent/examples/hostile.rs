//! An agent that means harm, for the tests of what the host makes of one.
//!
//! Its initial RAM file system holds a file `behaviour` with two words: the point of the conversation at which it
//! misbehaves, and the [`Trick`] it plays there. Everything else it answers as if it ran containers.
#![no_main]

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use agent::{boot, sys};
use protocol::container::Stdio;
use protocol::frame::{self, MAX_FROM_AGENT, MAX_FROM_HOST};
use protocol::report::{Health, HealthStatus, PathInfo, ProcessInfo, Stats};
use protocol::{
    Answer, CONTROL_PORT, Call, ExitStatus, Failure, FailureKind, FromAgent, Hello, MAGIC, Request, Target, VERSION,
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// The entry point that the C library calls: see the agent's own.
#[expect(unsafe_code, reason = "the name is the C library's")]
#[unsafe(no_mangle)]
pub extern "C" fn main() -> i32 {
    assert_eq!(std::process::id(), 1, "this is the first process of a micro-VM");
    let behaviour = std::fs::read_to_string("/behaviour").expect("there is a file /behaviour");
    let (point, trick) = behaviour.trim().split_once(' ').expect("/behaviour holds a point and a trick");
    let mut agent = Agent {
        control: dial(CONTROL_PORT).expect("the host listens"),
        point: point.to_owned(),
        trick: trick.to_owned(),
        outputs: HashMap::new(),
    };
    let ended = agent.serve();
    eprintln!("hostile agent: {ended:?}");
    boot::power_off()
}

fn dial(port: u32) -> io::Result<File> {
    let socket = sys::dial_host(port)?;
    sys::wait_connected(socket.as_fd())?;
    let flags = fcntl_getfl(&socket)?;
    fcntl_setfl(&socket, flags.difference(OFlags::NONBLOCK))?;
    Ok(File::from(socket))
}

struct Agent {
    control: File,
    point: String,
    trick: String,
    /// What the first process of a container writes to.
    outputs: HashMap<String, Vec<File>>,
}

impl Agent {
    fn serve(&mut self) -> io::Result<()> {
        if self.point == "hello" {
            self.misbehave(0, "nobody", Ok(Answer::Done))?;
        }
        self.say(&hello())?;
        loop {
            let Request { id, call } = frame::read(&mut self.control, MAX_FROM_HOST).map_err(io::Error::other)?;
            let (point, container) = subject(&call);
            let result = self.perform(&call)?;
            if point == self.point {
                self.misbehave(id, &container, result)?;
            } else {
                self.say(&FromAgent::Reply { id, result })?;
            }
            self.follow(call)?;
            if point == "start" && self.point == "running" {
                self.misbehave(0, &container, Ok(Answer::Done))?;
            }
        }
    }

    fn say(&mut self, message: &FromAgent) -> io::Result<()> {
        frame::write(&mut self.control, message, usize::MAX).map_err(io::Error::other)
    }

    fn streams(stdio: &Stdio) -> io::Result<Vec<File>> {
        [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().flatten().map(dial).collect()
    }

    /// What an agent does before it answers.
    fn perform(&mut self, call: &Call) -> io::Result<Result<Answer, Failure>> {
        Ok(Ok(match call {
            Call::Create(spec) => {
                let streams = Self::streams(&spec.process.stdio)?;
                self.outputs.insert(spec.id.clone(), streams);
                Answer::Done
            }
            Call::Exec { spec, .. } => {
                drop(Self::streams(&spec.stdio)?);
                Answer::Done
            }
            Call::Stats { .. } => Answer::Stats(Box::new(extreme_stats())),
            Call::Processes { .. } => Answer::Processes(vec![extreme_process()]),
            Call::SetCpus { .. } => Answer::Cpus(u8::MAX),
            Call::CopyOut { port, .. } => {
                let mut archive = dial(*port)?;
                // No tar at all, for ever, once the answer is read.
                thread::spawn(move || while archive.write_all(&[b'x'; 4096]).is_ok() {});
                Answer::Path(extreme_path())
            }
            Call::CopyIn { port, .. } => {
                drop(dial(*port)?);
                Answer::Done
            }
            _ => Answer::Done,
        }))
    }

    /// What an agent reports after it has answered.
    fn follow(&mut self, call: Call) -> io::Result<()> {
        match call {
            Call::Exec { container, process, .. } => {
                self.say(&FromAgent::ProcessExited { container, process, code: 0 })
            }
            Call::Signal { target: Target { container, process: None }, signal, .. } => {
                self.outputs.remove(&container);
                self.say(&exited(&container, 128 + signal))
            }
            _ => Ok(()),
        }
    }

    fn misbehave(&mut self, id: u32, container: &str, result: Result<Answer, Failure>) -> io::Result<()> {
        let honest = if id == 0 { hello() } else { FromAgent::Reply { id, result } };
        let out_of_memory = FromAgent::OutOfMemory { container: container.to_owned() };
        match self.trick.as_str() {
            "silence" => thread::sleep(Duration::MAX),
            "garbage" => self.control.write_all(&noise())?,
            "huge" => {
                self.control.write_all(&u32::MAX.to_le_bytes())?;
                loop {
                    self.control.write_all(&[0; 4096])?;
                }
            }
            "malformed" => self.control.write_all(&[&16u32.to_le_bytes()[..], &[0xff; 16]].concat())?,
            "trailing" => {
                let mut bytes = frame::encode(&honest, MAX_FROM_AGENT).map_err(io::Error::other)?;
                let longer = u32::try_from(bytes.len() - 3).expect("a short frame");
                bytes[..4].copy_from_slice(&longer.to_le_bytes());
                bytes.push(0);
                self.control.write_all(&bytes)?;
            }
            "slow" => {
                for byte in frame::encode(&honest, MAX_FROM_AGENT).map_err(io::Error::other)? {
                    self.control.write_all(&[byte])?;
                    thread::sleep(Duration::from_millis(20));
                }
            }
            "unasked" => self.say(&FromAgent::Reply { id: id.wrapping_add(1000), result: Ok(Answer::Done) })?,
            "twice" => (0..2).try_for_each(|_| self.say(&honest))?,
            "another" => {
                let result = Ok(Answer::Processes(vec![extreme_process(); 3]));
                self.say(&FromAgent::Reply { id, result })?;
            }
            "nobody" => self.say(&exited("nobody", 0))?,
            "early" => self.say(&exited(container, 0))?,
            "unfit" => self.say(&health(container))?,
            "loud" => {
                let message = "\u{1b}[2J\u{1b}]0;owned\u{7}\r\nerror: all is well\n".repeat(1000);
                self.say(&FromAgent::Reply { id, result: Err(Failure { kind: FailureKind::System, message }) })?;
            }
            "flood" => loop {
                self.say(&out_of_memory)?;
            },
            "streams" => {
                let outputs = self.outputs.remove(container).unwrap_or_default();
                for mut output in outputs {
                    thread::spawn(move || while output.write_all(&noise()).is_ok() {});
                }
                self.say(&honest)?;
            }
            "ports" => {
                // Whatever is listened to beside the control port is not for it.
                let reached: Vec<File> = (1..CONTROL_PORT + 200).filter_map(|port| dial(port).ok()).collect();
                for mut stream in reached {
                    let _ = stream.write_all(&noise());
                }
                self.say(&honest)?;
            }
            "deaf" => {
                self.say(&honest)?;
                thread::sleep(Duration::MAX);
            }
            "power-off" => boot::power_off(),
            "panic" => std::process::exit(1),
            other => panic!("there is no trick {other}"),
        }
        Ok(())
    }
}

/// The point of the conversation that a call is, and the container it is about.
fn subject(call: &Call) -> (&'static str, String) {
    let (point, container) = match call {
        Call::Create(spec) => ("create", &spec.id),
        Call::Start { container } => ("start", container),
        Call::Exec { container, .. } => ("exec", container),
        Call::Signal { target, .. } => ("signal", &target.container),
        Call::Resize { target, .. } => ("resize", &target.container),
        Call::Freeze { container, .. } => ("freeze", container),
        Call::Update { container, .. } => ("update", container),
        Call::Stats { container } => ("stats", container),
        Call::Processes { container } => ("processes", container),
        Call::CopyOut { container, .. } => ("copy-out", container),
        Call::CopyIn { container, .. } => ("copy-in", container),
        Call::SetCpus { .. } => return ("cpus", String::new()),
    };
    (point, container.clone())
}

/// 64 KiB without a pattern (xorshift).
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..8192).flat_map(|_| next()).collect()
}

fn hello() -> FromAgent {
    FromAgent::Hello(Hello { magic: MAGIC, version: VERSION, started_us: u64::MAX, ready_us: 0 })
}

fn exited(container: &str, code: u8) -> FromAgent {
    let status = ExitStatus { code, out_of_memory: true, executed_us: u64::MAX, agent_resident_kib: u32::MAX };
    FromAgent::Exited { container: container.to_owned(), status }
}

fn health(container: &str) -> FromAgent {
    let output = "\u{1b}[2J".repeat(8000);
    let health = Health { status: HealthStatus::Healthy, failing_streak: u32::MAX, exit_code: Some(255), output };
    FromAgent::Health { container: container.to_owned(), health }
}

fn extreme_stats() -> Stats {
    let most = u64::MAX;
    Stats {
        cpu_usage_us: most,
        cpu_user_us: most,
        cpu_system_us: most,
        cpu_throttled_periods: most,
        cpu_throttled_us: most,
        memory_bytes: 0,
        memory_peak_bytes: most,
        memory_limit_bytes: most,
        memory_inactive_file_bytes: most,
        memory_oom_kills: most,
        pids: most,
        pids_limit: 0,
        io_read_bytes: most,
        io_written_bytes: most,
    }
}

fn extreme_process() -> ProcessInfo {
    let command = "\u{1b}[2J\nroot 1 0".repeat(20);
    let (most, time) = (u32::MAX, u64::MAX);
    ProcessInfo { pid: most, parent_pid: most, uid: most, started_us: time, cpu_us: time, terminal: most, command }
}

fn extreme_path() -> PathInfo {
    let name = "../../../etc/passwd".to_owned();
    PathInfo { name, mode: u32::MAX, size: u64::MAX, modified: i64::MIN, link_target: "/etc/shadow".to_owned() }
}

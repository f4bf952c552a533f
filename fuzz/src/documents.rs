//! Texts, documents and messages: what a monitor is started with, what agent and host say to each other, what a container
//! leaves on disk, what the kernel, an image and a user write.

use std::fs;

use ::image::Reference;
use api::config::LaunchConfig;
use api::folder::Folder;
use api::log::{LogReader, Selection};
use protocol::frame::{Decoder, MAX_FROM_AGENT, MAX_FROM_HOST, encode, read};
use protocol::{FromAgent, Request};
use runtime::state::RunRoot;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::input::Input;
use crate::samples::ID;
use crate::scratch;

/// The document that a monitor is started with.
pub fn launch_config(bytes: &[u8]) {
    let Ok(config) = LaunchConfig::parse(bytes) else { return };
    let _ = (config.vm.most_memory_mib(), config.vm.descriptors(), config.jail.bounds(&config.vm));
    let again = serde_json::to_vec(&config).expect("a document that was read can be written");
    assert_eq!(LaunchConfig::parse(&again).ok(), Some(config), "a document is read as another one than was written");
}

/// Frames as they come in: whole, or cut as the first byte says. What decodes is the same both ways, and encodes.
fn frames<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8], limit: usize) {
    let mut input = Input::new(bytes);
    let piece = usize::from(input.u8()) + 1;
    let bytes = input.rest();
    let mut decoder = Decoder::new(limit);
    let mut decoded: Vec<T> = Vec::new();
    'all: for piece in bytes.chunks(piece) {
        decoder.push(piece);
        loop {
            match decoder.take() {
                Ok(Some(message)) => decoded.push(message),
                Ok(None) => break,
                Err(_) => break 'all,
            }
        }
    }
    let mut reader = bytes;
    for message in decoded {
        let other: T = read(&mut reader, limit).expect("a frame that one reader takes, the other takes");
        assert_eq!(message, other, "two readers read two messages");
        encode(&message, MAX_FROM_HOST).expect("a message that was read can be sent");
    }
}

/// What a host hears of an agent.
pub fn agent_message(bytes: &[u8]) {
    frames::<FromAgent>(bytes, MAX_FROM_AGENT);
}

/// What an agent hears of a host.
pub fn host_message(bytes: &[u8]) {
    frames::<Request>(bytes, MAX_FROM_HOST);
}

/// Users and groups of an image, and who is wanted of them.
pub fn agent_user(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (user, passwd) = (text(input.chunk()), text(input.chunk()));
    let _ = agent::fuzzing::resolve_user(&passwd, &text(input.rest()), &user);
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The kernel's texts that a jail is made and told by.
pub fn proc_text(bytes: &[u8]) {
    jailer::fuzzing::proc_text(&text(bytes));
}

thread_local! {
    static FOLDER: TempDir = scratch::folder();
}

/// A container's files: what it was made from, what its monitor was started with, and how it ended.
///
/// # Panics
/// The files of one container are taken for another's.
pub fn container_record(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    FOLDER.with(|root| {
        let folder = root.path().join(ID);
        let monitor = folder.join(api::folder::NAME);
        let mut write = || {
            fs::create_dir_all(&monitor)?;
            fs::write(folder.join(api::lock::NAME), [])?;
            fs::write(folder.join("config.json"), input.chunk())?;
            fs::write(monitor.join(api::record::NAME), input.chunk())?;
            fs::write(folder.join(runtime::record::NAME), input.rest())
        };
        write().expect("files in memory can be written");
        let root = RunRoot::open_at(root.path()).expect("the folder is ours");
        for found in root.list().expect("a folder can be listed") {
            assert_eq!(found.record.id, ID, "a record is another container's");
            let _ = (found.record.shown_name(), found.record.short_id(), api::record::read(&found.monitor_folder()));
            let _ = root.find(&ID[..4]);
            let _ = found.record.usable();
        }
        root.sweep();
    });
}

/// A container's log, in two files, as it was left.
pub fn log(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let shape = input.u8();
    let selection = Selection {
        since_ns: if shape & 1 == 0 { 0 } else { input.u64() },
        tail: (shape & 2 != 0).then(|| input.u8().into()),
    };
    FOLDER.with(|folder| {
        let (before, now) = (input.chunk(), input.rest());
        let written = fs::write(folder.path().join("container.log.1"), before)
            .and_then(|()| fs::write(folder.path().join("container.log"), now));
        written.expect("files in memory can be written");
        let folder = Folder::open(folder.path()).expect("a folder can be opened");
        let mut reader = LogReader::open(&folder, selection).expect("a log can be opened");
        let mut shown = 0;
        while let Some(entry) = reader.next().expect("a log can be read") {
            shown += entry.shown(false).len();
            let _ = entry.shown(true);
        }
        assert!(shown <= bytes.len(), "more is shown than was written");
    });
}

/// A file of environment variables.
pub fn env_file(bytes: &[u8]) {
    FOLDER.with(|folder| {
        let path = folder.path().join("env");
        fs::write(&path, bytes).expect("a file in memory can be written");
        let _ = runtime::env_file::read(&path);
    });
}

/// Words of a command line: what a user, or a program for somebody else, says of sizes, times, images and limits.
pub fn words(bytes: &[u8]) {
    let text = text(bytes);
    if let Ok(reference) = text.parse::<Reference>() {
        let again = reference.to_string().parse::<Reference>();
        assert_eq!(again.ok(), Some(reference), "an image's name is read as another one than was written");
    }
    let _ = text.parse::<runtime::size::Bytes>().is_ok();
    let _ = text.parse::<runtime::size::Cpus>().is_ok();
    let _ = text.parse::<runtime::health::Period>().is_ok();
    let _ = text.parse::<runtime::capability::Capability>().is_ok();
    let _ = text.parse::<runtime::request::EnvEntry>().is_ok();
    let _ = text.parse::<runtime::request::Tmpfs>().is_ok();
    let _ = text.parse::<runtime::request::Ulimit>().is_ok();
    let _ = text.parse::<runtime::request::PidsLimit>().is_ok();
    let _ = text.parse::<runtime::request::SecurityOption>().is_ok();
    let _ = text.parse::<runtime::request::Restart>().is_ok();
    let _ = text.parse::<runtime::request::SignalName>().is_ok();
    let _ = text.parse::<api::config::MacAddress>().is_ok();
    let _ = (runtime::spec::check_name(&text), runtime::spec::check_hostname(&text));
    let _ = (api::session::shown(&text), api::session::shown_lines(&text));
}

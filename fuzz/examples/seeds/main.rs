//! Writes the seeds of all targets into `fuzz/seeds/`: inputs that are in order, from which a fuzzer has not far to go. To be
//! run again when a document, a message or the language of a target changes (`cargo run --package fuzz --example seeds`).

#![forbid(unsafe_code)]

mod files;

use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use fuzz::samples;
use protocol::frame::encode;
use protocol::{Answer, Call, ExitStatus, FromAgent, Request};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

const LIMIT: usize = 1 << 20;

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    _ = fs::remove_dir_all(&root);
    let groups =
        [devices(), states(), files::seeds(), texts(), messages()?, documents()?, archives()?, answers(), sessions()?];
    for (target, name, bytes) in groups.into_iter().flatten() {
        assert!(fuzz::target(target).is_some(), "there is no target {target}");
        let folder = root.join(target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(name), bytes)?;
    }
    Ok(())
}

type Seed = (&'static str, &'static str, Vec<u8>);

/// Begins the language of the devices: started with all features.
const START: [u8; 5] = [0, 0xff, 0xff, 0xff, 0xff];
/// A buffer to write to, as long as a page, at a place of the guest's memory.
const PAGE: [u8; 4] = [1, 0, 16, 4];
/// A buffer of 512 bytes, and one of one byte.
const SECTOR: [u8; 5] = [1, 0, 32, 2, 1];
const STATUS: [u8; 5] = [1, 0, 64, 0, 1];

/// Bytes with their number before them.
fn chunk(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    [&length.to_le_bytes()[..], bytes].concat()
}

fn devices() -> Vec<Seed> {
    let start = |before: &[u8]| [before, &START].concat();
    let offer = |queue: u8, shape: u8, rest: &[&[u8]]| [&[0, queue, shape][..], &rest.concat()].concat();
    let room = |queue: u8| offer(queue, 1 | 1 << 2, &[&PAGE]);
    let all = |parts: &[Vec<u8>]| parts.concat();
    // Type, sector, and the field between them.
    let disk = |kind: u8| [0, kind, 0, 3, 0, 0, 0, 0, 0].to_vec();
    let packet = |op: u8, rest: &[u8]| offer(1, 0, &[&[0, 0, 0, op], rest, &[0, 0, 0]]);
    let frame = [&[0; 12][..], &chunk(&[2; 60])].concat();
    let unpack = |queue: u8, bytes: &[u8]| offer(queue, 0, &[&[0], &chunk(bytes)]);
    vec![
        ("rng", "bytes", all(&[start(&[0]), room(0), room(0)])),
        ("rng", "limited", all(&[start(&[3]), room(0), room(0), room(0), vec![10, 10]])),
        ("console", "text", all(&[start(&[0]), offer(1, 0, &[&chunk(b"hello\n")]), room(0)])),
        ("serial", "text", b"\0a\0b\x43\0\x41\x05".to_vec()),
        ("blk", "read", all(&[start(&[0, 0]), offer(0, 2 << 2, &[&disk(0), &SECTOR, &STATUS])])),
        ("blk", "write", all(&[start(&[2, 0]), offer(0, 1 << 2, &[&disk(2), &[1], &STATUS])])),
        (
            "blk",
            "discard",
            all(&[start(&[4, 3]), offer(0, 1 << 2, &[&disk(6), &[0, 1, 0, 8, 0, 0, 0, 0, 0, 0, 0], &STATUS])]),
        ),
        (
            "blk",
            "flush",
            all(&[
                start(&[0, 0]),
                offer(0, 1 << 2, &[&disk(4), &STATUS]),
                offer(0, 2 << 2, &[&disk(5), &SECTOR, &STATUS]),
            ]),
        ),
        (
            "net",
            "both",
            all(&[start(&[0, 0, 0]), room(0), offer(1, 0, &[&frame]), [&[8, 0][..], &chunk(&[0; 72])].concat()]),
        ),
        (
            "net",
            "pairs",
            all(&[
                start(&[7, 3, 0]),
                offer(4, 1 << 2, &[&[4, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0], &chunk(&[]), &STATUS]),
                room(2),
            ]),
        ),
        ("vsock", "refused", all(&[start(&[0, 0]), room(0), packet(1, &[])])),
        (
            "vsock",
            "asked",
            all(&[
                start(&[1, 0]),
                room(0),
                room(0),
                vec![8, 1, 0],
                packet(2, &[]),
                [&[8, 6][..], &chunk(b"hi")].concat(),
            ]),
        ),
        ("vsock", "handed", all(&[start(&[1, 0]), room(0), room(0), vec![8, 1, 8], packet(2, &[]), vec![8, 5]])),
        ("vsock", "offered", all(&[start(&[1, 0]), room(0), room(0), vec![8, 1, 10], packet(1, &[]), vec![8, 3]])),
        (
            "vsock",
            "talk",
            all(&[
                start(&[0, 0]),
                vec![8, 0],
                room(0),
                room(0),
                packet(1, &[]),
                packet(5, &chunk(b"hello")),
                [&[8, 6][..], &chunk(b"answer")].concat(),
                vec![8, 5],
                packet(7, &[]),
                packet(4, &[]),
            ]),
        ),
        (
            "balloon",
            "inflate",
            all(&[
                START.to_vec(),
                vec![8, 0, 9, 0, 0, 0],
                unpack(0, &[0; 8]),
                unpack(1, &[0; 8]),
                offer(3, 1 | 1 << 2, &[&PAGE]),
                vec![8, 1],
            ]),
        ),
        (
            "mem",
            "plug",
            all(&[
                START.to_vec(),
                vec![8, 4],
                offer(0, 1 << 2, &[&[0, 1, 0, 1, 1], &STATUS]),
                offer(0, 1 << 2, &[&[1, 1, 0, 1, 1], &PAGE]),
            ]),
        ),
        ("pmem", "flush", all(&[start(&[0]), offer(0, 1 << 2, &[&chunk(&[0; 4]), &PAGE])])),
        ("limits", "some", [&[0][..], &[1; 28], &[1], &[0; 12], &[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 2, 0]].concat()),
    ]
}

/// Devices that are saved with something behind them, and go on; and a state that is none. The numbers are those of
/// `devices::DEVICES`.
fn states() -> Vec<Seed> {
    let seed = |kind: u8, shape: &[u8], life: &[&[u8]], more: &[&[u8]]| {
        let life = [&START[..], &life.concat()].concat();
        [&[kind][..], &chunk(shape), &[0], &chunk(&life), &[0, 1], &more.concat()].concat()
    };
    let room: &[u8] = &[&[0, 0, 1 | 1 << 2][..], &PAGE].concat();
    let target = "device_state";
    vec![
        (target, "balloon", seed(0, &[], &[&[8, 0, 9, 0, 0, 0]], &[&[8, 1]])),
        (target, "blk", seed(1, &[0, 0], &[&[0, 0, 2 << 2, 0, 0, 0, 3, 0, 0, 0, 0, 0], &SECTOR, &STATUS], &[&[5, 0]])),
        (target, "console", seed(2, &[0], &[room], &[room])),
        (target, "fs", seed(3, &[0, 0], &[], &[room])),
        (target, "mem", seed(4, &[], &[&[8, 4]], &[room])),
        (target, "net", seed(5, &[0, 0, 0], &[room], &[&[8, 0], &chunk(&[0; 72])])),
        (target, "pmem", seed(6, &[0, 0], &[], &[room])),
        (target, "rng", seed(7, &[3], &[room, room], &[room, &[10, 10]])),
        (target, "vsock", seed(8, &[0, 0], &[room], &[room])),
        (target, "made_up", [&[7][..], &chunk(&[0]), &[1], &chunk(&[1, 0, 4, 0, 0, 0, 0, 0]), &[0, 1], room].concat()),
    ]
}

fn texts() -> Vec<Seed> {
    let mounts = "36 24 0:31 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
        30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
    let status = "Name:\ta b\nUid:\t0\t0\t0\t0\nSeccomp:\t2\nSeccomp_filters:\t1\n0::/a/b\n3:cpu,cpuacct:/c\n\
        Max open files            1024                 524288               files     \n";
    let users = |user: &str| {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\na:x:1000:1000::/home/a:/bin/sh\n";
        [chunk(user.as_bytes()), chunk(passwd), b"root:x:0:a\nwheel:x:10:a,b\n".to_vec()].concat()
    };
    let log = "2026-01-01T00:00:00.000000001Z stdout F one\n2026-01-01T00:00:01Z stderr P two";
    vec![
        ("proc_text", "mounts", mounts.into()),
        ("proc_text", "status", status.into()),
        ("agent_user", "name", users("a:wheel")),
        ("agent_user", "number", users("1000:10")),
        ("env_file", "some", b"# one\nA=b c\nPATH\n\nB=\n".to_vec()),
        ("log", "whole", [&[0][..], &chunk(log.as_bytes()), log.as_bytes(), b"\n"].concat()),
        ("log", "tail", [&[2, 1][..], &chunk(b""), log.as_bytes(), b"\n", log.as_bytes()].concat()),
        (
            "words",
            "image",
            b"registry.example:5000/a/b:tag@sha256:0000000000000000000000000000000000000000000000000000000000000000"
                .to_vec(),
        ),
        ("words", "archive", b"docker-archive:/a/b.tar:c:1".to_vec()),
        ("words", "size", b"1.5g".to_vec()),
        ("words", "tmpfs", b"/run:rw,size=64k,mode=1777,exec".to_vec()),
        ("words", "limit", b"nofile=1024:2048".to_vec()),
        ("words", "restart", b"on-failure:3".to_vec()),
        ("words", "time", b"1m30s".to_vec()),
        ("words", "mac", b"02:00:00:00:00:01".to_vec()),
    ]
}

fn from_agent() -> Vec<FromAgent> {
    let status = ExitStatus { code: 137, out_of_memory: true, executed_us: 42, agent_resident_kib: 900 };
    vec![
        FromAgent::Hello(samples::hello()),
        FromAgent::Reply { id: 1, result: Ok(Answer::Done) },
        FromAgent::Reply { id: 2, result: Ok(Answer::Stats(Box::default())) },
        FromAgent::OutOfMemory { container: "c".to_owned() },
        FromAgent::Exited { container: "c".to_owned(), status },
    ]
}

fn messages() -> Result<Vec<Seed>> {
    let spec = samples::container("c");
    let calls = [
        Call::Create(Box::new(spec)),
        Call::Start { container: "c".to_owned() },
        Call::Exec { container: "c".to_owned(), process: "p".to_owned(), spec: Box::new(samples::process()) },
        Call::CopyOut { container: "c".to_owned(), path: "/etc".to_owned(), port: 1025 },
    ];
    let mut requests = vec![255];
    for (id, call) in (1..).zip(calls) {
        requests.extend(encode(&Request { id, call }, LIMIT)?);
    }
    let mut messages = vec![7];
    for message in from_agent() {
        messages.extend(encode(&message, LIMIT)?);
    }
    Ok(vec![("agent_message", "all", messages), ("host_message", "all", requests)])
}

/// An index, a manifest and a configuration, with `@N` for digests.
fn image() -> [Value; 3] {
    let size = 1;
    let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ["@0"]},
        "config": {"Env": ["A=b"], "Cmd": ["sh"], "User": "a", "Volumes": {"/v": {}}}});
    let manifest = json!({"schemaVersion": 2,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": "@1", "size": size},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "@0", "size": size}]});
    let index = json!({"schemaVersion": 2, "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": "@2", "size": size, "platform": {"os": "linux", "architecture": "amd64"},
        "annotations": {"org.opencontainers.image.ref.name": "1"}}]});
    [config, manifest, index]
}

fn documents() -> Result<Vec<Seed>> {
    let digest = format!("sha256:{}", "0".repeat(64));
    let [config, manifest, index] = image().map(|value| value.to_string());
    let named =
        |text: &str| ["@0", "@1", "@2"].iter().fold(text.to_owned(), |text, at| text.replace(at, &digest)).into_bytes();
    // Each blob has its real length in what leads to it.
    let layer = layer(b"content")?;
    let config_length = named(&config).len();
    let manifest = sized(&manifest, &[("@1", config_length), ("@0", layer.len())]);
    let index = sized(&index, &[("@2", named(&manifest).len())]);
    let layout =
        [&[3][..], &chunk(&layer), &chunk(config.as_bytes()), &chunk(manifest.as_bytes()), index.as_bytes()].concat();
    let record = serde_json::to_vec(&samples::record())?;
    let launch = serde_json::to_vec(&samples::launch_config())?;
    let end = json!({"status": "exited", "started_ns": 1, "finished_ns": 2, "exit_code": 3, "out_of_memory": false,
        "error": null, "boot": {}, "stopped": false});
    let least = json!({"vm": {"kernel": "/k", "memory_mib": 128, "memory_max_mib": 256, "balloon": true,
        "networks": [{"tap": {"name": "tap0"}, "mac": "02:00:00:00:00:01"}],
        "drives": [{"file": {"path": "/d"}, "limits": {"bytes": {"size": 1, "refill_ms": 1}}}],
        "vsock": [{"port": 5, "socket": "/s"}]}});
    Ok(vec![
        ("image_document", "index", named(&index)),
        ("image_document", "manifest", named(&manifest)),
        ("image_document", "config", named(&config)),
        ("image_layout", "whole", layout),
        ("launch_config", "container", launch.clone()),
        ("launch_config", "machine", least.to_string().into_bytes()),
        ("container_record", "whole", [chunk(&launch), chunk(end.to_string().as_bytes()), record].concat()),
    ])
}

/// A document with the lengths of what it leads to.
fn sized(text: &str, lengths: &[(&str, usize)]) -> String {
    let mut value: Value = serde_json::from_str(text).unwrap_or_default();
    set_sizes(&mut value, lengths);
    value.to_string()
}

fn set_sizes(value: &mut Value, lengths: &[(&str, usize)]) {
    match value {
        Value::Object(object) => {
            let digest = object.get("digest").and_then(Value::as_str).unwrap_or_default().to_owned();
            if let Some((_, length)) = lengths.iter().find(|(at, _)| *at == digest) {
                object.insert("size".to_owned(), (*length).into());
            }
            object.values_mut().for_each(|value| set_sizes(value, lengths));
        }
        Value::Array(values) => values.iter_mut().for_each(|value| set_sizes(value, lengths)),
        _ => {}
    }
}

/// Adds an entry without checking its name, as those who mean harm do.
fn add(builder: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, link: &str, content: &[u8]) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(content.len() as u64);
    if let Some(old) = header.as_gnu_mut() {
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
    }
    header.set_cksum();
    Ok(builder.append(&header, content)?)
}

/// A layer with an entry of each kind.
fn layer(content: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    add(&mut builder, EntryType::Directory, "a/", "", b"")?;
    add(&mut builder, EntryType::XHeader, "x", "", b"20 atime=1234567890\n30 SCHILY.xattr.user.a=abcdef\n")?;
    add(&mut builder, EntryType::Regular, "a/file", "", content)?;
    add(&mut builder, EntryType::Link, "a/hard", "a/file", b"")?;
    add(&mut builder, EntryType::Symlink, "a/soft", "../b", b"")?;
    add(&mut builder, EntryType::Fifo, "a/fifo", "", b"")?;
    Ok(builder.into_inner()?)
}

fn archives() -> Result<Vec<Seed>> {
    let one = layer(b"one")?;
    let mut over = Builder::new(Vec::new());
    add(&mut over, EntryType::Regular, "a/.wh.file", "", b"")?;
    add(&mut over, EntryType::Regular, "a/.wh..wh..opq", "", b"")?;
    add(&mut over, EntryType::GNULongName, "././@LongLink", "", &[b'n'; 200])?;
    add(&mut over, EntryType::Regular, "n", "", b"two")?;
    let over = over.into_inner()?;
    let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    zipped.write_all(&one)?;
    let [config, ..] = image().map(|value| value.to_string());
    let config = config.replace("@0", &format!("sha256:{}", "0".repeat(64)));
    let manifest = json!([{"Config": "config.json", "RepoTags": ["web:1"], "Layers": ["l/layer.tar"]}]);
    let mut saved = Builder::new(Vec::new());
    add(&mut saved, EntryType::Regular, "manifest.json", "", manifest.to_string().as_bytes())?;
    add(&mut saved, EntryType::Regular, "config.json", "", config.as_bytes())?;
    add(&mut saved, EntryType::Regular, "l/layer.tar", "", &one)?;
    let mut out = Builder::new(Vec::new());
    for (kind, name, link, content) in [
        (EntryType::Directory, "a", "", &b""[..]),
        (EntryType::Regular, "a/file", "", b"content"),
        (EntryType::Symlink, "a/soft", "../outside", b""),
        (EntryType::Regular, "a/soft/canary", "", b"changed"),
    ] {
        add(&mut out, kind, name, link, content)?;
    }
    let mut links = Builder::new(Vec::new());
    add(&mut links, EntryType::Directory, "a/there", "", b"")?;
    add(&mut links, EntryType::Regular, "a/there/file", "", b"content")?;
    add(&mut links, EntryType::Link, "a/hard", "a/there/file", b"")?;
    add(&mut links, EntryType::Regular, "a/away/canary", "", b"changed")?;
    Ok(vec![
        ("image_layer", "one", one.clone()),
        ("image_layer", "two", [&one, fuzz::image::MARK, &over].concat()),
        ("image_layer", "gzip", zipped.finish()?),
        ("image_layer", "zstd", zstd::encode_all(&one[..], 1)?),
        ("image_archive", "saved", saved.into_inner()?),
        ("agent_archive", "entries", one),
        ("agent_archive", "long", over),
        ("cli_archive", "out", out.into_inner()?),
        ("cli_archive", "links", links.into_inner()?),
    ])
}

fn answers() -> Vec<Seed> {
    let answer = |question: u8, status: &str, body: &str| {
        let head =
            format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Type: application/json\r\n\r\n", body.len());
        [&[question][..], head.as_bytes(), body.as_bytes()].concat()
    };
    let state =
        r#"{"status":"exited","started_ns":1,"finished_ns":2,"exit_code":3,"out_of_memory":false,"error":null}"#;
    let problem = r#"{"type":"no-such-container","status":404,"title":"t","detail":"there is no c"}"#;
    let frames = b"\x01\0\0\0\0\0\0\x05hello\x02\0\0\0\0\0\0\x01x\x03\0\0\0\0\0\0\x04slow";
    vec![
        ("client_answer", "state", answer(1, "200 OK", state)),
        ("client_answer", "problem", answer(0, "404 Not Found", problem)),
        ("client_answer", "nothing", answer(9, "204 No Content", "")),
        ("client_answer", "top", answer(4, "200 OK", r#"{"processes":[]}"#)),
        (
            "client_answer",
            "pieces",
            b"\x01HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n".to_vec(),
        ),
        (
            "client_answer",
            "upgrade",
            b"\x0aHTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: cofferdam-stream\r\n\r\nx"
                .to_vec(),
        ),
        ("client_output", "frames", [&[3][..], frames].concat()),
    ]
}

fn sessions() -> Result<Vec<Seed>> {
    // Steps of the server's language: a request of its table with a document of its own.
    let ask = |request: u8, rest: &[u8]| [&[0, 0, 1, request][..], rest].concat();
    let of = |container: u8, body: &[u8]| [&[container, 0][..], body].concat();
    let done = || vec![6, 0];
    let dial = |port: u8| vec![12, port << 2];
    let write = |port: u8, bytes: &[u8]| [&[12, port << 2 | 3][..], &chunk(bytes)].concat();
    let exited = |container: u8| vec![11, container, 2, 0];
    let plain = [&[4, 1][..], &chunk(b"GET /v1/vm HTTP/1.1\r\nHost: h\r\n\r\n")].concat();
    let mut life = vec![3];
    for step in [done(), done(), dial(0), dial(1), write(0, b"hello\n"), plain.clone(), exited(0)] {
        life.extend(step);
    }
    let mut made = vec![2];
    for step in [
        ask(0, &of(0, &[0, 1])),
        done(),
        ask(1, &of(1, &[5, 0, 0])),
        done(),
        ask(4, &of(1, &[2])),
        done(),
        ask(14, &of(1, &[5])),
        vec![14, 70, 0],
        vec![5, 0],
    ] {
        made.extend(step);
    }
    let mut raw = vec![16];
    for message in from_agent() {
        raw.push(10);
        raw.extend(chunk(&encode(&message, LIMIT)?));
    }
    Ok(vec![
        ("server", "life", life),
        ("server", "made", made),
        ("server", "agent", raw),
        ("server", "waits", [vec![0x0f], done(), ask(2, &of(0, &[5])), plain, vec![15]].concat()),
    ])
}

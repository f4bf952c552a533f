//! Copies out of and into a running container.

use std::io::{Cursor, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use protocol::report::PathInfo;
use protocol::{Answer, Call, Failure, FailureKind};
use tar::{EntryType, Header};

use crate::host::{Host, PATIENCE, Streams};
use crate::image::{Image, script};

/// A container `c` that has done what a script says and waits to be killed.
fn prepared(image: &Image, host: &mut Host, what: &str) -> Streams {
    let mut streams = host.launch(&image.shell(&format!("{what}\necho ready; exec sleep 1000"))).unwrap();
    streams.expect("ready\n");
    streams
}

/// Begins to copy out: the answer and the connection.
fn open_out(host: &mut Host, path: &str) -> Result<(PathInfo, UnixStream), Failure> {
    let port = host.port();
    let listener = host.listen(port);
    let answer = host.call(Call::CopyOut { container: "c".into(), path: path.into(), port })?;
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    match answer {
        Answer::Path(info) => Ok((info, stream)),
        other => panic!("unexpected answer {other:?}"),
    }
}

fn copy_out(host: &mut Host, path: &str) -> (PathInfo, Vec<u8>) {
    let (info, mut stream) = open_out(host, path).unwrap();
    let mut archive = Vec::new();
    stream.read_to_end(&mut archive).unwrap();
    assert!(archive.len() >= 1024 && archive[archive.len() - 1024..].iter().all(|byte| *byte == 0));
    (info, archive)
}

fn copy_in(host: &mut Host, path: &str, archive: &[u8]) -> Result<Answer, Failure> {
    let port = host.port();
    let listener = host.listen(port);
    let request = host.send(Call::CopyIn { container: "c".into(), path: path.into(), port });
    let (mut stream, _) = listener.accept().unwrap();
    // One that is refused is not read to its end.
    let _ = stream.write_all(archive);
    let _ = stream.shutdown(Shutdown::Write);
    host.reply(request)
}

/// The failure of a copy into `/target`.
fn refused(host: &mut Host, archive: &[u8]) -> String {
    let failure = copy_in(host, "/target", archive).unwrap_err();
    assert_eq!(failure.kind, FailureKind::InvalidRequest, "{failure:?}");
    failure.message
}

/// Name, type, link and content of each entry.
fn entries(archive: &[u8]) -> Vec<(String, EntryType, String, String)> {
    let mut archive = tar::Archive::new(Cursor::new(archive));
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (name, kind) = (text(&entry.path_bytes()), entry.header().entry_type());
        let link = entry.link_name_bytes().map(|link| text(&link)).unwrap_or_default();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        (name, kind, link, text(&content))
    });
    let mut entries: Vec<_> = entries.collect();
    entries.sort_by(|one, other| one.0.cmp(&other.0));
    entries
}

/// An archive of entries: name, type, link, content.
fn archive(entries: &[(&str, EntryType, &str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, kind, link, content) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o640);
        header.set_uid(1000);
        header.set_gid(1001);
        header.set_mtime(1_234_567_890);
        header.set_size(content.len() as u64);
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

const TREE: &str = "mkdir -p /tree/sub/empty; echo one > /tree/one; echo two > /tree/sub/two; ln -s ../../etc/passwd /tree/link; \
                    ln /tree/one /tree/sub/hard; mkfifo /tree/fifo; chown 1000:1001 /tree/sub/two; chmod 4750 /tree/sub/two; \
                    mknod /tree/null c 1 3; touch -d @1000000000 /tree/sub/two /tree/sub";

#[test]
fn a_tree_comes_out_whole() {
    let image = Image::new();
    let mut host = Host::new();
    let _streams = prepared(&image, &mut host, TREE);
    let (info, archive) = copy_out(&mut host, "/tree");
    assert_eq!((info.name.as_str(), info.mode, info.link_target.as_str()), ("tree", 0o40755, ""));
    let list = entries(&archive);
    let names: Vec<&str> = list.iter().map(|entry| entry.0.as_str()).collect();
    assert_eq!(
        names,
        [
            "tree/",
            "tree/fifo",
            "tree/link",
            "tree/null",
            "tree/one",
            "tree/sub/",
            "tree/sub/empty/",
            "tree/sub/hard",
            "tree/sub/two"
        ]
    );
    let kinds: Vec<EntryType> = list.iter().map(|entry| entry.1).collect();
    assert_eq!(kinds[1..4], [EntryType::Fifo, EntryType::Symlink, EntryType::Char]);
    assert_eq!(list[2].2, "../../etc/passwd");
    // Which of the two names comes first is the directory's.
    let (first, second) = if kinds[4] == EntryType::Link { (7, 4) } else { (4, 7) };
    assert_eq!(
        (list[first].3.as_str(), kinds[second], list[second].2.as_str()),
        ("one\n", EntryType::Link, names[first])
    );
    let mut archive = tar::Archive::new(Cursor::new(archive));
    let two =
        archive.entries().unwrap().map(Result::unwrap).find(|entry| entry.path_bytes().ends_with(b"two")).unwrap();
    let header = two.header();
    assert_eq!((header.mode().unwrap(), header.uid().unwrap(), header.gid().unwrap()), (0o4750, 1000, 1001));
    assert_eq!((header.mtime().unwrap(), header.size().unwrap()), (1_000_000_000, 4));
    host.wait_for_children(1);
    host.kill("c");
}

#[test]
fn what_a_path_means_is_what_docker_means() {
    let image = Image::new();
    let mut host = Host::new();
    let _streams =
        prepared(&image, &mut host, "mkdir -p /a/b; echo x > /a/b/x; ln -s b /a/l; ln -s /nowhere /a/broken");
    let mut names = |path: &str| {
        let (info, archive) = copy_out(&mut host, path);
        (info.name, entries(&archive).into_iter().map(|entry| entry.0).collect::<Vec<_>>())
    };
    let of =
        |name: &str, names: &[&str]| (name.to_owned(), names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    assert_eq!(names("/a/b"), of("b", &["b/", "b/x"]));
    assert_eq!(names("/a/b/"), of("b", &["b/", "b/x"]));
    assert_eq!(names("/a/b/."), of(".", &["./", "./x"]));
    assert_eq!(names("/a/b/x"), of("x", &["x"]));
    assert_eq!(names("/../a/./b/../b/x"), of("x", &["x"]));
    // A link is itself, unless the path says that a directory is meant.
    assert_eq!(names("/a/l"), of("l", &["l"]));
    assert_eq!(names("/a/l/"), of("l", &["l/", "l/x"]));
    assert_eq!(names("/a/l/x"), of("x", &["x"]));
    let info = open_out(&mut host, "/a/broken").unwrap().0;
    assert_eq!((info.link_target.as_str(), info.mode & 0o170_000), ("/nowhere", 0o120_000));
    for (path, message) in [
        ("/nope", "cannot find /nope in the container: no such file or directory"),
        ("/a/b/x/", "cannot find /a/b/x/ in the container: not a directory"),
        ("/a/broken/", "cannot find /a/broken/ in the container: no such file or directory"),
        ("/proc/self/root/etc", "cannot find /proc/self/root/etc in the container: no such file or directory"),
    ] {
        let failure = open_out(&mut host, path).unwrap_err();
        assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::InvalidRequest, message));
    }
    host.kill("c");
}

#[test]
fn the_root_comes_out_without_the_kernels_file_systems() {
    let image = Image::new();
    let mut host = Host::new();
    let _streams = prepared(&image, &mut host, "echo x > /x; ln -s /../../../../etc /escape; echo y > /dev/shm/y");
    let (info, archive) = copy_out(&mut host, "/");
    assert_eq!(info.name, "/");
    let names: Vec<String> = entries(&archive).into_iter().map(|entry| entry.0).collect();
    for name in
        ["./", "./x", "./etc/passwd", "./escape", "./proc/", "./sys/", "./dev/null", "./dev/shm/y", "./etc/hostname"]
    {
        assert!(names.iter().any(|other| other == name), "{name} is missing: {names:?}");
    }
    assert!(!names.iter().any(|name| name.starts_with("./proc/") && name.len() > 7), "{names:?}");
    // The link leads to the container's own /etc, not to this machine's.
    let (_, archive) = copy_out(&mut host, "/escape/passwd");
    assert!(entries(&archive)[0].3.contains("app:x:1000"));
    host.kill("c");
}

#[test]
fn what_comes_out_goes_in_again() {
    let image = Image::new();
    let mut host = Host::new();
    let _streams = prepared(&image, &mut host, &format!("{TREE}; mkdir /target"));
    let (_, archive) = copy_out(&mut host, "/tree");
    assert_eq!(copy_in(&mut host, "/target", &archive).unwrap(), Answer::Done);
    // A second time over what is there.
    assert_eq!(copy_in(&mut host, "/target/.", &archive).unwrap(), Answer::Done);
    let compare = "for d in /tree /target/tree; do cd $d; find . | while read f; do stat -c '%n %f %u %g %s %h %t %T' $f; done | \
                   grep -v ^./sub.*empty.size; readlink link; cat one sub/two; stat -c %Y sub sub/two; cd /; done";
    let output = host.run_further("c", "p", &script(compare));
    assert_eq!(output.stderr, "");
    let (before, after) = output.stdout.split_at(output.stdout.len() / 2);
    let sorted = |text: &str| {
        // The sizes of directories are the file system's.
        let mut lines: Vec<String> = text.lines().map(str::to_owned).filter(|line| !line.contains(" 41")).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(before), sorted(after));
    assert!(after.contains("1000000000\n1000000000\n"), "{after}");
    host.wait_for_children(1);
    host.kill("c");
}

#[test]
fn nothing_leaves_the_directory() {
    let image = Image::new();
    let mut host = Host::new();
    let _streams = prepared(
        &image,
        &mut host,
        "mkdir -p /target/real /outside; ln -s /outside /target/absolute; ln -s ../outside /target/relative; \
         ln -s real /target/inner; echo old > /target/file; ln -s ../outside/hit /target/pointer",
    );
    let (file, link, hard, dir) = (EntryType::Regular, EntryType::Symlink, EntryType::Link, EntryType::Directory);
    let message = refused(&mut host, &archive(&[("../evil", file, "", b"x")]));
    assert_eq!(message, "\"../evil\" in the archive leads out of the directory");
    for name in ["a/../../evil", "/../evil", ".."] {
        assert!(refused(&mut host, &archive(&[(name, file, "", b"x")])).contains("leads out of the directory"));
    }
    for name in ["absolute/evil", "relative/evil", "relative/deep/evil"] {
        let message = refused(&mut host, &archive(&[(name, file, "", b"x")]));
        assert!(message.ends_with("leads out of the directory through a symbolic link"), "{message}");
    }
    // Links that come along are no better.
    let along = [("new", link, "/outside", &b""[..]), ("new/evil", file, "", b"x")];
    assert!(refused(&mut host, &archive(&along)).contains("symbolic link"));
    let along = [("dir", link, "..", &b""[..]), ("dir", dir, "", b"")];
    assert!(refused(&mut host, &archive(&along)).contains("would replace what is none"));
    for target in ["../outside/x", "/../etc/passwd", "absolute/x", "new/x"] {
        let message = refused(&mut host, &archive(&[("hard", hard, target, b"")]));
        assert!(message.contains("is a link that leads out of the directory"), "{message}");
    }
    // An absolute name is one below the directory, and what is in the way of a file is replaced, not followed.
    let fine = [
        ("/abs/x", file, "", &b"1"[..]),
        ("pointer", file, "", b"2"),
        ("file", file, "", b"3"),
        ("inner/y", file, "", b"4"),
    ];
    copy_in(&mut host, "/target", &archive(&fine)).unwrap();
    let output = host.run_further(
        "c",
        "p",
        &script("ls -A /outside; cd /target; cat abs/x pointer file real/y; stat -c ' %a %u %g %Y' file; ls -l /evil"),
    );
    assert_eq!(output.stdout, "1234 640 1000 1001 1234567890\n", "{output:?}");
    host.kill("c");
}

#[test]
fn what_does_not_fit_is_refused_in_one_line() {
    let image = Image::new();
    let mut host = Host::new();
    let _streams = prepared(&image, &mut host, "mkdir -p /target/dir; echo x > /target/file");
    let (file, dir) = (EntryType::Regular, EntryType::Directory);
    let cases: [(Vec<u8>, &str); 6] = [
        (archive(&[("dir", file, "", b"x")]), "\"dir\" in the archive would replace a directory"),
        (archive(&[("file", dir, "", b"")]), "\"file\" in the archive is a directory and would replace what is none"),
        (
            archive(&[("file/x", file, "", b"x")]),
            "cannot find the directory of \"file/x\" of the archive: not a directory",
        ),
        (b"this is no archive".repeat(100), "the archive is none, or is damaged"),
        (archive(&[("a", file, "", b"x")])[..600].to_vec(), "the archive is not whole"),
        (Vec::new(), "the archive is not whole"),
    ];
    for (archive, message) in cases {
        assert_eq!(refused(&mut host, &archive), message);
    }
    let failure = copy_in(&mut host, "/nope", &archive(&[])).unwrap_err();
    assert_eq!(failure.message, "cannot find the directory /nope in the container: no such file or directory");
    let failure = copy_in(&mut host, "/target/file", &archive(&[])).unwrap_err();
    assert_eq!(failure.message, "cannot find the directory /target/file in the container: not a directory");
    // Padding behind the end, as tar writes it to fill a record, is nobody's error.
    let mut padded = archive(&[("./", dir, "", b""), ("ok", file, "", b"x")]);
    padded.resize(1 << 20, 0);
    copy_in(&mut host, "/target", &padded).unwrap();
    // A file that is mounted is written in place.
    copy_in(&mut host, "/etc", &archive(&[("hostname", file, "", b"new\n")])).unwrap();
    assert_eq!(host.run_further("c", "p", &script("cat /etc/hostname /target/ok")).stdout, "new\nx");
    host.kill("c");
}

/// The resident memory of a process and its children in KiB.
fn memory(host: &Host) -> u64 {
    let of = |pid: &str| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or("0 kB").to_owned();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0)
    };
    host.children_ids().iter().map(|pid| of(pid)).max().unwrap_or(0).max(of(&host.agent().to_string()))
}

#[test]
fn a_huge_file_takes_no_memory_and_no_time_of_others() {
    let image = Image::new();
    let mut host = Host::new();
    let _streams =
        prepared(&image, &mut host, "mkdir /target; dd if=/dev/zero of=/huge bs=1 seek=400M count=0 2> /dev/null");
    let before = memory(&host);
    let (info, mut stream) = open_out(&mut host, "/huge").unwrap();
    assert_eq!(info.size, 400 << 20);
    // Nobody reads yet, and others are served.
    assert_eq!(host.run_further("c", "p", &script("echo meanwhile")).stdout, "meanwhile\n");
    let port = host.port();
    let listener = host.listen(port);
    let request = host.send(Call::CopyIn { container: "c".into(), path: "/target".into(), port });
    let (mut into, _) = listener.accept().unwrap();
    let (mut buffer, mut copied) = (vec![0; 1 << 20], 0);
    loop {
        let length = stream.read(&mut buffer).unwrap();
        if length == 0 {
            break;
        }
        into.write_all(&buffer[..length]).unwrap();
        copied += length;
        if copied % (64 << 20) < length {
            assert!(memory(&host) < before + 4096, "{before} KiB became {}", memory(&host));
        }
    }
    assert_eq!(host.reply(request).unwrap(), Answer::Done);
    drop(into);
    let output = host.run_further("c", "p", &script("stat -c %s /target/huge"));
    assert_eq!(output.stdout, format!("{}\n", 400 << 20));
    host.wait_for_children(1);
    host.kill("c");
}

#[test]
fn a_copy_ends_with_its_container_or_its_connection() {
    let image = Image::new();
    let mut host = Host::new();
    let _streams =
        prepared(&image, &mut host, "mkdir /target; dd if=/dev/zero of=/huge bs=1 seek=100M count=0 2> /dev/null");
    let (_, stream) = open_out(&mut host, "/huge").unwrap();
    drop(stream);
    host.wait_for_children(1);
    // One that waits for the host in each direction.
    let (_, _out) = open_out(&mut host, "/huge").unwrap();
    let port = host.port();
    let listener = host.listen(port);
    let request = host.send(Call::CopyIn { container: "c".into(), path: "/target".into(), port });
    let (_into, _) = listener.accept().unwrap();
    thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();
    host.signal("c", 9, true).unwrap();
    assert_eq!(host.reply(request).unwrap_err().message, "the copy was ended with its container or for want of memory");
    assert_eq!(host.exited("c").code, 137);
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(host.children(), 0);
    let failure = copy_in_nowhere(&mut host);
    assert_eq!(failure.kind, FailureKind::NoSuchContainer);
    // A port that nobody listens on.
    let _streams = prepared(&image, &mut host, "");
    let failure = copy_in_nowhere(&mut host);
    assert!(failure.message.starts_with("cannot connect to port 9 of the host: "), "{failure:?}");
    host.kill("c");
}

fn copy_in_nowhere(host: &mut Host) -> Failure {
    host.call(Call::CopyIn { container: "c".into(), path: "/target".into(), port: 9 }).unwrap_err()
}

/// CVE-2018-15664 (docker cp): a directory was a link by the time it was written to.
#[test]
fn a_tree_that_changes_under_a_copy_leads_nowhere() {
    let image = Image::new();
    let mut host = Host::new();
    let _streams = prepared(
        &image,
        &mut host,
        "mkdir -p /target/a /outside; (while :; do mv /target/a /target/b; ln -s /outside /target/a; rm /target/a; \
         mv /target/b /target/a; done) 2> /dev/null &",
    );
    let (file, dir) = (EntryType::Regular, EntryType::Directory);
    for _ in 0..30 {
        // It succeeds or is refused, as it comes.
        let _ = copy_in(
            &mut host,
            "/target",
            &archive(&[("a", dir, "", b""), ("a/x", file, "", b"x"), ("a/y/z", file, "", b"x")]),
        );
        let _ = open_out(&mut host, "/target").map(|(_, mut stream)| stream.read_to_end(&mut Vec::new()));
    }
    assert_eq!(host.run_further("c", "p", &script("ls -A /outside")).stdout, "");
    host.kill("c");
}

#[test]
fn what_is_removed_meanwhile_is_left_out() {
    let image = Image::new();
    let mut host = Host::new();
    let script = "mkdir -p /tree/kept; (while :; do for i in 1 2 3 4; do echo x > /tree/$i; mkdir /tree/d$i; \
                  ln -s x /tree/l$i; done; rm -rf /tree/[1-4] /tree/[dl]*; done) 2> /dev/null &";
    let _streams = prepared(&image, &mut host, script);
    for _ in 0..50 {
        // Whole, whatever it has.
        let (_, archive) = copy_out(&mut host, "/tree");
        assert!(entries(&archive).iter().any(|entry| entry.0 == "tree/kept/"));
    }
    host.kill("c");
}

#[test]
fn a_deep_tree_is_refused_and_a_frozen_container_is_copied_from() {
    let image = Image::new();
    let mut host = Host::new();
    let script =
        "mkdir /deep; cd /deep; i=0; while [ $i -lt 600 ]; do mkdir d; cd d; i=$((i+1)); done; cd /; echo x > /x";
    let _streams = prepared(&image, &mut host, script);
    let (_, mut stream) = open_out(&mut host, "/deep").unwrap();
    let mut archive = Vec::new();
    stream.read_to_end(&mut archive).unwrap();
    assert!(archive[archive.len() - 1024..].iter().any(|byte| *byte != 0), "it is not whole");
    host.call(Call::Freeze { container: "c".into(), frozen: true }).unwrap();
    assert_eq!(entries(&copy_out(&mut host, "/x").1)[0].3, "x\n");
    host.kill("c");
}

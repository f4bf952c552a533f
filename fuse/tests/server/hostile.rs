//! Whatever a guest sends: the server neither panics, nor waits, nor leaves the export.

use std::fs;
use std::os::unix::fs::symlink;

use fuse::testing::Bytes;
use fuse::{Limits, Options, Quota, Served};
use proptest::prelude::*;

use crate::client::{Host, request};

/// A name that a hostile guest would like.
fn names() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(b"file\0".to_vec()),
        Just(b"folder\0".to_vec()),
        Just(b"link\0".to_vec()),
        Just(b"new\0".to_vec()),
        Just(b"../secret\0".to_vec()),
        Just(b"..\0".to_vec()),
        Just(b"/\0".to_vec()),
        proptest::collection::vec(any::<u8>(), 0..20),
    ]
}

/// Numbers that mean something here, among others.
fn words() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![0u64..6, Just(u64::MAX), Just(1 << 63), 0u64..1 << 16, any::<u64>()];
    proptest::collection::vec(word, 0..12).prop_map(|words| words.iter().flat_map(|word| word.to_le_bytes()).collect())
}

fn bodies() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        (words(), names(), names()).prop_map(|parts| [parts.0, parts.1, parts.2].concat()),
        proptest::collection::vec(any::<u8>(), 0..200),
    ]
}

#[derive(Debug, Clone)]
enum Step {
    Request { opcode: u32, nodeid: u64, body: Vec<u8>, room: usize },
    Raw(Vec<u8>),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Not those by which it waits for what never comes, and each step shall find a session.
    let opcode = prop_oneof![20 => 1u32..60, 1 => any::<u32>()];
    let nodeid = prop_oneof![0u64..8, any::<u64>()];
    let step = prop_oneof![
        30 => (opcode, nodeid, bodies(), 0usize..5000)
            .prop_map(|(opcode, nodeid, body, room)| Step::Request { opcode, nodeid, body, room }),
        2 => proptest::collection::vec(any::<u8>(), 0..120).prop_map(Step::Raw),
        1 => Just(Step::Reset),
    ];
    proptest::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_hostile_guest_does_no_harm(steps in steps(), read_only in any::<bool>(), quota in any::<bool>()) {
        let host = Host::new();
        fs::create_dir(host.path("folder")).unwrap();
        fs::write(host.path("file"), "content").unwrap();
        symlink("../secret", host.path("link")).unwrap();
        let limits = Limits { inodes: 8, handles: 8, lock_owners: 4, lock_ranges: 8, lock_waiters: 2 };
        let bytes = quota.then_some(1 << 20);
        let quota = Quota { bytes, inodes: None };
        let mut client = host.client(Options { read_only, quota, limits, xattrs: true, ..Options::default() });
        for name in ["file", "folder", "link"] {
            client.walk(name).unwrap();
        }
        for step in steps {
            let (bytes, room) = match step {
                Step::Request { opcode, nodeid, body, room } => (request(opcode, 1, nodeid, &body), room),
                Step::Raw(bytes) => (bytes, 4096),
                Step::Reset => {
                    client.server.reset();
    client.server.let_go();
                    client.init();
                    continue;
                }
            };
            let mut message = Bytes::new(&bytes, room);
            if let Served::Reply { reply, data } = client.server.serve(&mut message) {
                prop_assert!(reply.len() + data <= room.max(16));
                prop_assert_eq!(data, message.data.len());
            }
        }
        prop_assert!(client.metric("inodes") <= 8 && client.metric("handles") <= 8);
        prop_assert!(host.is_intact());
    }
}

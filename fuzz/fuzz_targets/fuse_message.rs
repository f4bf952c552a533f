//! The target `fuse_message`.

#![no_main]
#![forbid(unsafe_code)]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::run("fuse_message", bytes));

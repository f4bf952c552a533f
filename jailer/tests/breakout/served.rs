//! Files of the host that are shown to a guest: what a server has to do it can do in the jail, with the owners that the host has;
//! and who takes it over has those files and nothing else.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown, symlink};
use std::path::Path;
use std::process::{Command, Output};

use super::{CALLERS, Caller, Host, REFUSED, SOMEBODY};

/// Whose the files are, where that can be chosen.
const OWNER: u32 = 2000;

/// A directory to be shown, with a file in it that is somebody's.
fn export(host: &Host) -> u32 {
    let owner = if host.caller == Caller::Root { OWNER } else { SOMEBODY };
    let place = host.path("export");
    fs::create_dir(&place).unwrap();
    fs::write(place.join("given"), "given").unwrap();
    symlink("../secret", place.join("link")).unwrap();
    fs::write(host.path("secret"), "secret").unwrap();
    fs::write(host.path("held"), "held").unwrap();
    for path in [place.clone(), place.join("given"), host.path("held")] {
        chown(path, Some(owner), Some(owner)).unwrap();
    }
    owner
}

fn serve(host: &Host, what: &str, how: &[&str]) -> (Option<i32>, String) {
    let path = host.path(what);
    let words = [&["serve", path.to_str().unwrap()][..], how].concat();
    host.attempt("serving", &words)
}

/// The outcome of each request that failed.
fn failed(told: &str) -> Vec<&str> {
    told.trim().split(", ").map(|one| one.trim_end_matches(',')).filter(|one| !one.ends_with(" 0")).collect()
}

fn owner(host: &Host, path: &str) -> u32 {
    fs::symlink_metadata(host.path("export").join(path)).unwrap().uid()
}

#[test]
fn a_squashing_server_acts_as_the_owner_of_what_it_shows() {
    for caller in CALLERS {
        let host = Host::new(caller);
        let expected = export(&host);
        let (code, told) = serve(&host, "export", &[]);
        assert_eq!(code, Some(0), "{caller:?}: {told}");
        // To give files away is refused.
        assert_eq!(failed(&told), ["chown 1"], "{caller:?}");
        assert_eq!(fs::read(host.path("export/given")).unwrap(), b"datan");
        for path in ["folder", "folder/made", "folder/link", "moved"] {
            assert_eq!(owner(&host, path), expected, "{caller:?}: {path}");
        }
    }
}

#[test]
fn a_squashing_server_of_root_may_not_do_more_than_the_owner() {
    let host = Host::new(Caller::Root);
    export(&host);
    chown(host.path("export/given"), Some(OWNER + 1), Some(OWNER + 1)).unwrap();
    let (_, told) = serve(&host, "export", &[]);
    assert_eq!(failed(&told)[..2], ["open 13", "write 9"], "{told}");
}

#[test]
fn a_mapping_server_of_root_makes_files_of_the_guests_users() {
    let host = Host::new(Caller::Root);
    export(&host);
    let (code, told) = serve(&host, "export", &["mapped"]);
    assert_eq!((code, failed(&told)), (Some(0), vec![]), "{told}");
    assert_eq!(
        ["folder", "folder/link", "folder/made", "given"].map(|path| owner(&host, path)),
        [1234, 1234, 4321, OWNER]
    );
}

#[test]
fn who_is_not_root_cannot_map_users() {
    let host = Host::new(Caller::Somebody);
    export(&host);
    let (code, told) = serve(&host, "export", &["mapped"]);
    assert!(code == Some(REFUSED) && told.contains("Operation not permitted"), "{told}");
}

#[test]
fn what_is_read_only_is_so_without_the_servers_help() {
    for (caller, how) in [(Caller::Root, &["ro", "mapped"][..]), (Caller::Root, &["ro"]), (Caller::Somebody, &["ro"])] {
        let host = Host::new(caller);
        export(&host);
        let (_, told) = serve(&host, "export", how);
        let allowed = ["init 0", "lookup 0", "open 0", "read 0"];
        let done: Vec<_> = told.trim().split(", ").filter(|one| one.trim_end_matches(',').ends_with(" 0")).collect();
        assert_eq!(done, allowed, "{caller:?}: {told}");
        assert_eq!(fs::read(host.path("export/given")).unwrap(), b"given");
        assert_eq!(fs::read_dir(host.path("export")).unwrap().count(), 2);
    }
}

#[test]
fn a_single_file_can_be_written() {
    for caller in CALLERS {
        let host = Host::new(caller);
        export(&host);
        let (_, told) = serve(&host, "export/given", &[]);
        assert!(failed(&told)[0].starts_with("mkdir"), "{caller:?}: {told}");
        assert_eq!(fs::read(host.path("export/given")).unwrap(), b"datan");
    }
}

#[test]
fn who_takes_a_server_over_gets_at_nothing_else() {
    for caller in CALLERS {
        for how in [&[][..], &["mapped"]] {
            let host = Host::new(caller);
            export(&host);
            if (caller, how) == (Caller::Somebody, &["mapped"]) {
                continue;
            }
            let path = host.path("export");
            let words = [&["break_out", path.to_str().unwrap()][..], how].concat();
            let (code, told) = host.attempt("serving", &words);
            assert_eq!((code, told.trim()), (Some(REFUSED), "nothing else was found"), "{caller:?} {how:?}");
            assert_eq!(fs::read(host.path("held")).unwrap(), b"held");
        }
    }
}

/// In a mount namespace of its own, with an overlay in place of the export.
fn on_overlay(host: &Host, attempt: &str, how: &[&str]) -> Output {
    let export = host.path("export");
    let words = [&[attempt, export.to_str().unwrap()][..], how].concat();
    let inmate = host.command("serving", &words);
    let place = host.path("");
    let script = "cd \"$1\" && mkdir layers && mount -t tmpfs layers layers && mkdir layers/upper layers/work && chown 2000:2000 layers/upper && shift && \
                  mount -t overlay -o lowerdir=export,upperdir=layers/upper,workdir=layers/work overlay export && \
                  \"$@\"; code=$?; stat -c %u export/folder export/folder/made >&2; exit $code";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script, "sh"]).arg(place).arg(inmate.get_program()).args(inmate.get_args());
    command.output().unwrap()
}

#[test]
fn a_file_system_that_maps_no_owners_is_served_as_well() {
    for (how, owners, failures) in [(&[][..], "2000\n2000\n", &["chown 1"][..]), (&["mapped"], "1234\n4321\n", &[])] {
        let host = Host::new(Caller::Root);
        export(&host);
        let output = on_overlay(&host, "serve", how);
        let said = String::from_utf8_lossy(&output.stderr);
        let (told, made) = said.split_once('\n').unwrap();
        assert_eq!((output.status.code(), failed(told), made), (Some(0), failures.to_vec(), owners), "{said}");
    }
}

#[test]
fn who_takes_such_a_server_over_gets_at_nothing_else() {
    for how in [&[][..], &["mapped"]] {
        let host = Host::new(Caller::Root);
        export(&host);
        let output = on_overlay(&host, "break_out", how);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.starts_with("nothing else was found"), "{how:?}: {said}");
        assert!(fs::read(host.path("held")).unwrap() == b"held" && Path::new("/etc/passwd").exists());
    }
}

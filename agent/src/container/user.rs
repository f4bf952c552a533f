//! Who a container's process runs as: `USER[:GROUP]` looked up in the image's own `/etc/passwd` and `/etc/group`, by
//! the rules that docker and podman share (a number is a number even when some user has it as a name; a user who is
//! not in the files may be given by number; an explicit group replaces the user's own and its memberships).
//!
//! Both files belong to the image: they are read once, up to a limit, and a line that is not understood is skipped.

use std::fs::File;
use std::io::{self, Read};

use super::error::SetupError;
use super::root::Root;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// The most that is read of either file: the largest in use by distributions are a few kilobytes.
const DATABASE_MAX: u64 = 1 << 20;

/// The largest id: the kernel has room for more, but docker and podman refuse them and -1 has a meaning of its own.
const ID_MAX: u32 = i32::MAX as u32;

/// The most supplementary groups a process can have (`NGROUPS_MAX`).
const GROUPS_MAX: usize = 65536;

/// Who a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The user id.
    pub uid: u32,
    /// The primary group id.
    pub gid: u32,
    /// All supplementary group ids, the primary one first.
    pub groups: Vec<u32>,
    /// The home directory; `/` when the image does not know the user.
    pub home: String,
}

/// Looks a user up in the image.
///
/// # Errors
/// When there is no such user or group, or the image's files are not fit to be read.
pub fn look_up(root: &Root, user: &str, additional_groups: &[String]) -> Result<User, SetupError> {
    resolve(&read(root, PASSWD)?, &read(root, GROUP)?, user, additional_groups)
}

fn read(root: &Root, path: &'static str) -> Result<String, SetupError> {
    let unreadable = |source| SetupError::Database { path, source };
    let file = match root.open_file(path) {
        Ok(fd) => File::from(fd),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(String::new());
        }
        Err(error) => return Err(unreadable(error)),
    };
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() || metadata.len() > DATABASE_MAX {
        return Err(SetupError::DatabaseShape { path, limit: DATABASE_MAX });
    }
    let mut bytes = Vec::new();
    file.take(DATABASE_MAX).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// `name:password:uid:gid:comment:home:shell`
fn passwd_entry(line: &str) -> Option<PasswdEntry<'_>> {
    let mut fields = line.split(':');
    let (name, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let home = fields.nth(1).unwrap_or_default();
    Some(PasswdEntry { name, uid: id(uid)?, gid: id(gid)?, home })
}

/// `name:password:gid:member,member`
fn group_entry(line: &str) -> Option<GroupEntry<'_>> {
    let mut fields = line.split(':');
    let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
    Some(GroupEntry { name, gid: id(gid)?, members: fields.next().unwrap_or_default() })
}

fn lines(database: &str) -> impl Iterator<Item = &str> {
    database.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= ID_MAX)
}

/// A number as the request names it, or `None` when it is a name.
fn requested_number(text: &str) -> Result<Option<u32>, SetupError> {
    if text.is_empty()
        || !text.bytes().enumerate().all(|(i, b)| b.is_ascii_digit() || (i == 0 && b == b'-'))
        || text == "-"
    {
        return Ok(None);
    }
    id(text).map(Some).ok_or_else(|| SetupError::IdOutOfRange { number: text.to_owned() })
}

/// Looks a user up in the texts of an image's files; gives the user's and the group's number and the home directory.
#[cfg(feature = "fuzzing")]
pub fn resolve_user(passwd: &str, group: &str, user: &str) -> Option<(u32, u32, String)> {
    let found = resolve(passwd, group, user, &[user.to_owned()]).ok()?;
    assert!(found.groups.len() <= GROUPS_MAX, "more groups than a process can have");
    Some((found.uid, found.gid, found.home))
}

fn resolve(passwd: &str, group: &str, wanted: &str, additional_groups: &[String]) -> Result<User, SetupError> {
    let (user, explicit_group) = wanted.split_once(':').unwrap_or((wanted, ""));
    let number = if user.is_empty() { Some(0) } else { requested_number(user)? };
    let entry = lines(passwd).filter_map(passwd_entry).find(|entry| match number {
        Some(uid) => entry.uid == uid,
        None => entry.name == user,
    });
    let (uid, mut gid, home) = match (&entry, number) {
        (Some(entry), _) => (entry.uid, entry.gid, entry.home),
        (None, Some(uid)) => (uid, 0, ""),
        (None, None) => return Err(SetupError::UnknownUser { user: user.to_owned() }),
    };
    let mut memberships = Vec::new();
    if !explicit_group.is_empty() {
        gid = group_number(group, explicit_group)?;
    } else if let Some(entry) = &entry {
        let of_user = |group: &GroupEntry<'_>| group.members.split(',').any(|member| member == entry.name);
        memberships.extend(lines(group).filter_map(group_entry).filter(of_user).map(|group| group.gid));
    }
    let mut groups = vec![gid];
    for name in additional_groups {
        memberships.push(group_number(group, name)?);
    }
    for membership in memberships {
        if !groups.contains(&membership) && groups.len() < GROUPS_MAX {
            groups.push(membership);
        }
    }
    let home = if home.is_empty() { "/" } else { home }.to_owned();
    Ok(User { uid, gid, groups, home })
}

fn group_number(group: &str, wanted: &str) -> Result<u32, SetupError> {
    match requested_number(wanted)? {
        Some(gid) => Ok(gid),
        None => lines(group)
            .filter_map(group_entry)
            .find(|entry| entry.name == wanted)
            .map(|entry| entry.gid)
            .ok_or_else(|| SetupError::UnknownGroup { group: wanted.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "# comment\nroot:x:0:0:root:/root:/bin/sh\n\nredis:x:999:1000::/var/lib/redis:/bin/false\n\
                          42:x:7:8::/digits:/bin/sh\nbroken:x:one:two\nshort:x\nbare:x:5:6\n";
    const GROUP: &str =
        "root:x:0:\ndisk:x:6:root,adm\nredis:x:1000:\naudio:x:29:redis,root\nstaff:x:50:redis\nbad:x:y:root\n";

    fn resolved(wanted: &str) -> User {
        resolve(PASSWD, GROUP, wanted, &[]).unwrap()
    }

    fn user(uid: u32, gid: u32, groups: &[u32], home: &str) -> User {
        User { uid, gid, groups: groups.to_vec(), home: home.to_owned() }
    }

    #[test]
    fn an_empty_user_is_root_with_its_groups() {
        assert_eq!(resolved(""), user(0, 0, &[0, 6, 29], "/root"));
        assert_eq!(resolved("root"), resolved("0"));
    }

    #[test]
    fn a_name_brings_group_home_and_memberships() {
        assert_eq!(resolved("redis"), user(999, 1000, &[1000, 29, 50], "/var/lib/redis"));
        assert_eq!(resolved("999"), resolved("redis"));
        assert_eq!(resolved("bare"), user(5, 6, &[6], "/"));
    }

    #[test]
    fn an_explicit_group_replaces_the_memberships() {
        assert_eq!(resolved("redis:disk"), user(999, 6, &[6], "/var/lib/redis"));
        assert_eq!(resolved("redis:123"), user(999, 123, &[123], "/var/lib/redis"));
        assert_eq!(resolved(":staff"), user(0, 50, &[50], "/root"));
    }

    #[test]
    fn digits_are_a_number_even_when_a_user_is_named_so() {
        assert_eq!(resolved("42"), user(42, 0, &[0], "/"));
    }

    #[test]
    fn additional_groups_are_added_once() {
        let groups = ["audio".to_owned(), "77".to_owned(), "77".to_owned()];
        assert_eq!(resolve(PASSWD, GROUP, "redis", &groups).unwrap().groups, [1000, 29, 50, 77]);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let message = |wanted| resolve(PASSWD, GROUP, wanted, &[]).unwrap_err().to_string();
        assert_eq!(message("nobody"), "unable to find user nobody: no matching entries in passwd file");
        assert_eq!(message("0:nogroup"), "unable to find group nogroup: no matching entries in group file");
        assert_eq!(message("broken"), "unable to find user broken: no matching entries in passwd file");
        assert!(message("4294967295").contains("out of range"));
        assert!(message("-1").contains("out of range"));
        assert_eq!(resolve("", "", "", &[]).unwrap(), user(0, 0, &[0], "/"));
    }
}

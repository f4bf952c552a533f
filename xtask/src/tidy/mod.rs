//! `cargo xtask tidy`: promises about the tree's structure that no compiler checks.
//!
//! - who may depend on whom ([`RULES`]), from `cargo metadata`;
//! - crates forbid unsafe code unless [`UNSAFE_ALLOWED`] names them, and take the workspace's lints over;
//! - what the documentation says of unsafe code, system calls and tests is so ([`security`]);
//! - every Rust file opens with module documentation, and none grows past [`LINES_MAX`];
//! - paths that the documentation names exist;
//! - no notes to self and no words that do not belong in the tree ([`banned`]).

mod security;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::build::cargo;
use crate::command::output;
use crate::paths;

/// A file may not have more lines than this,
const LINES_MAX: usize = 1200;
/// and is mentioned when it has more than this.
const LINES_MANY: usize = 800;

/// Crates, what must not be among their direct or indirect dependencies, and why.
const RULES: [(&str, &[&str], &str); 9] = [
    ("devices", &["vmm", "runtime", "api", "tokio"], "devices know nothing of the machine that they are in"),
    ("fuse", &["devices", "vm-memory", "tokio"], "the file server knows messages, not who brings them"),
    ("vmm", &["runtime", "image"], "the monitor runs what it is given"),
    ("jailer", &["vmm", "devices", "tokio"], "the jailer stays small enough to be read at once"),
    ("runtime", &["vmm", "devices", "kvm-ioctls"], "the monitor is another process"),
    ("cli", &["vmm", "devices", "kvm-ioctls"], "the monitor is another process"),
    ("image", &["vmm", "devices", "runtime", "kvm-ioctls"], "images are files"),
    ("agent", &["vmm", "devices", "runtime", "image", "api", "jailer"], "host and guest share only the protocol"),
    ("protocol", &["vmm", "devices", "runtime", "image", "api", "jailer", "agent"], "the protocol depends on nobody"),
];

/// Crates that may hold unsafe code, and why.
const UNSAFE_ALLOWED: [(&str, &str); 5] = [
    ("vmm", "KVM's memory slots and run structures"),
    ("devices", "descriptors and memory shared with the guest"),
    ("agent", "forking and setting up processes"),
    ("jailer", "a child that shares memory until it executes"),
    ("hostile-guest", "a kernel of its own: instructions, interrupts, memory by address"),
];

/// Words that may not occur: notes to self, and hosts that a mirror or an offline build replaces.
fn banned() -> [String; 5] {
    // Put together here, so that this file passes its own check.
    [["TO", "DO"], ["FIX", "ME"], ["XX", "X"], ["crates", ".io"], ["static.rust", "-lang.org"]]
        .map(|parts| parts.concat())
}

/// Checks everything and tells every finding at once.
pub fn tidy() -> Result<()> {
    let root = paths::root();
    let mut findings = dependencies()?;
    findings.extend(security::documents(&root, &UNSAFE_ALLOWED.map(|(name, _)| name))?);
    let files = files(&root)?;
    let top: BTreeSet<String> =
        files.iter().filter_map(|file| Some(file.iter().next()?.to_str()?.to_owned())).collect();
    for file in &files {
        let Ok(text) = fs::read_to_string(root.join(file)) else { continue };
        let name = file.display().to_string();
        findings.extend(words(&name, &text));
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("rs") => findings.extend(rust(&name, &text)),
            Some("md") if ["ARCHITECTURE.md", "SECURITY.md"].contains(&&*name) || name.starts_with("docs/") => {
                let exists = |path: &str| root.join(path).exists() || root.join(file).with_file_name(path).exists();
                findings.extend(named_paths(&text, &top, exists).map(|path| format!("{name}: {path} does not exist")));
                let tests = security::missing_tests(&text, |path| fs::read_to_string(root.join(path)).ok());
                findings.extend(tests.iter().map(|test| format!("{name}: there is no test {test}")));
            }
            _ => {}
        }
    }
    if findings.is_empty() {
        return Ok(());
    }
    for finding in &findings {
        eprintln!("tidy: {finding}");
    }
    bail!("{} findings", findings.len())
}

/// Checks [`RULES`] and [`UNSAFE_ALLOWED`].
fn dependencies() -> Result<Vec<String>> {
    let text = output(cargo().args(["metadata", "--format-version=1", "--locked", "--offline"]))
        .or_else(|_| output(cargo().args(["metadata", "--format-version=1", "--locked"])))?;
    let metadata: Value = serde_json::from_str(&text).context("cargo metadata did not write JSON")?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let string = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut names = BTreeMap::new();
    let mut findings = Vec::new();
    let members: BTreeSet<String> = list(&metadata["workspace_members"]).iter().map(string).collect();
    for package in list(&metadata["packages"]) {
        let (id, name) = (string(&package["id"]), string(&package["name"]));
        if members.contains(&id) {
            let manifest = string(&package["manifest_path"]);
            findings.extend(security::inherits_lints(&name, Path::new(&manifest)));
        }
        if members.contains(&id) && !UNSAFE_ALLOWED.iter().any(|(allowed, _)| *allowed == name) {
            for target in list(&package["targets"]) {
                findings.extend(forbids_unsafe(&name, &target));
            }
        }
        names.insert(id, name);
    }
    let mut graph: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for node in list(&metadata["resolve"]["nodes"]) {
        // Development dependencies are not part of what is shipped.
        let linked = list(&node["deps"]).into_iter().filter(|dependency| {
            list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"].as_str() != Some("dev"))
        });
        graph.insert(string(&node["id"]), linked.map(|dependency| string(&dependency["pkg"])).collect());
    }
    for (krate, forbidden, why) in RULES {
        let Some(start) = members.iter().find(|id| names.get(*id).is_some_and(|name| name == krate)) else {
            findings.push(format!("there is no crate {krate}, which a rule names"));
            continue;
        };
        for path in reachable(start, &graph) {
            let reached: Vec<&str> = path.iter().filter_map(|id| names.get(id)).map(String::as_str).collect();
            if reached.last().is_some_and(|last| forbidden.contains(last)) {
                findings.push(format!("{} is forbidden: {why}", reached.join(" -> ")));
            }
        }
    }
    Ok(findings)
}

/// One shortest path to every package that `start` links.
fn reachable(start: &str, graph: &BTreeMap<String, Vec<String>>) -> Vec<Vec<String>> {
    let mut paths = vec![vec![start.to_owned()]];
    let mut seen = BTreeSet::from([start.to_owned()]);
    let mut next = 0;
    while let Some(path) = paths.get(next).cloned() {
        next += 1;
        let edges = path.last().and_then(|last| graph.get(last)).map(Vec::as_slice).unwrap_or_default();
        for edge in edges {
            if seen.insert(edge.clone()) {
                paths.push(path.iter().chain([edge]).cloned().collect());
            }
        }
    }
    paths.remove(0);
    paths
}

/// A library or program root without `#![forbid(unsafe_code)]`.
fn forbids_unsafe(package: &str, target: &Value) -> Option<String> {
    let kind = target["kind"][0].as_str()?;
    let path = target["src_path"].as_str()?;
    let text = fs::read_to_string(path).ok()?;
    let missing = matches!(kind, "lib" | "bin") && !text.contains("#![forbid(unsafe_code)]");
    missing.then(|| format!("{package}: {path} lacks #![forbid(unsafe_code)]"))
}

/// Every file of the tree, relative to its root, without build output.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().with_context(|| format!("cannot list {}", folder.display()))? {
            let entry = entry?;
            let path = entry.path();
            let kind = entry.file_type()?;
            if kind.is_dir() && entry.file_name() != ".git" && entry.file_name() != "target" {
                folders.push(path);
            } else if kind.is_file() && entry.file_name() != "Cargo.lock" {
                found.push(path.strip_prefix(root)?.to_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Lines with a banned word.
fn words(name: &str, text: &str) -> Vec<String> {
    let banned = banned();
    let mut findings = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for word in &banned {
            let found = line.match_indices(word.as_str()).any(|(at, _)| {
                let letter = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
                !letter(line[..at].chars().next_back()) && !letter(line[at + word.len()..].chars().next())
            });
            if found {
                findings.push(format!("{name}:{}: \"{word}\" does not belong in the tree", number + 1));
            }
        }
    }
    findings
}

/// A Rust file's documentation and length.
fn rust(name: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    if !text.starts_with("//!") {
        findings.push(format!("{name}: opens without module documentation (//!)"));
    }
    let lines = text.lines().count();
    if lines > LINES_MAX {
        findings.push(format!("{name}: {lines} lines: split it (the limit is {LINES_MAX})"));
    } else if lines > LINES_MANY {
        eprintln!("tidy: note: {name} has {lines} lines: think of splitting it");
    }
    findings
}

/// Paths in code spans and links that should exist and do not. A code span counts as a path of ours when it starts
/// with something that the root holds.
fn named_paths<'a>(
    text: &'a str,
    top: &'a BTreeSet<String>,
    exists: impl Fn(&str) -> bool + 'a,
) -> impl Iterator<Item = &'a str> {
    let spans = text.split('`').skip(1).step_by(2).filter(move |span| {
        let plain = span.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
        plain && span.split_once('/').is_some_and(|(first, _)| top.contains(first))
    });
    let links = text.split("](").skip(1).filter_map(|rest| {
        let target = rest.split([')', '#']).next()?;
        (!target.is_empty() && !target.contains("://") && !target.contains(' ')).then_some(target)
    });
    spans.chain(links).filter(move |path| !exists(path.trim_end_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banned_words_are_whole_words() {
        let word = &banned()[0];
        assert_eq!(words("a", &format!("x {word}: y")).len(), 1);
        assert_eq!(words("a", &format!("x {word}LIST y")).len(), 0);
    }

    #[test]
    fn missing_paths_are_named() {
        let top = BTreeSet::from(["vmm".to_owned()]);
        let text = "`vmm/src` `vmm/none.rs` `a/b` [x](gone.md#part) [y](https://a/b)";
        let missing: Vec<&str> = named_paths(text, &top, |path| path == "vmm/src").collect();
        assert_eq!(missing, ["vmm/none.rs", "gone.md"]);
    }

    #[test]
    fn indirect_dependencies_are_reached_by_a_shortest_path() {
        let edge = |from: &str, to: &[&str]| (from.to_owned(), to.iter().map(|to| (*to).to_owned()).collect());
        let graph = BTreeMap::from([edge("a", &["b", "c"]), edge("b", &["d"]), edge("d", &["a"])]);
        let paths = reachable("a", &graph);
        assert!(paths.contains(&vec!["a".into(), "b".into(), "d".into()]));
        assert_eq!(paths.len(), 3);
    }
}

//! What the documentation says of security, held against the tree: which crates hold unsafe code, how many system calls each
//! thread has, and that the tests exist which it calls as witnesses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// The policy of the monitor's threads.
const POLICY: &str = "resources/seccomp/monitor.json";
/// Where its system calls are counted.
pub const THREAT_MODEL: &str = "docs/security/threat-model.md";

/// Checks the table of crates in `ARCHITECTURE.md` and the count of system calls in the threat model.
pub fn documents(root: &Path, may_be_unsafe: &[&str]) -> Result<Vec<String>> {
    let read = |name: &str| fs::read_to_string(root.join(name)).with_context(|| format!("cannot read {name}"));
    let mut findings = unsafe_table(&read("ARCHITECTURE.md")?, may_be_unsafe);
    if !read("Cargo.toml")?.contains("undocumented_unsafe_blocks = \"deny\"") {
        findings.push("Cargo.toml: clippy's undocumented_unsafe_blocks is not denied".to_owned());
    }
    let policy: Value = serde_json::from_str(&read(POLICY)?).with_context(|| format!("{POLICY} is no JSON"))?;
    findings.extend(counts(&system_calls(&policy), &read(THREAT_MODEL)?));
    Ok(findings)
}

/// A crate whose manifest does not take the workspace's lints over, among which is that unsafe blocks say why they are sound.
pub fn inherits_lints(package: &str, manifest: &Path) -> Option<String> {
    let text = fs::read_to_string(manifest).ok()?;
    let inherits =
        text.lines().skip_while(|line| line.trim() != "[lints]").any(|line| line.trim() == "workspace = true");
    (!inherits).then(|| format!("{package}: {} lacks `workspace = true` in [lints]", manifest.display()))
}

/// Rows of the code map that allow unsafe code where it is forbidden, or the other way round.
fn unsafe_table(architecture: &str, may_be_unsafe: &[&str]) -> Vec<String> {
    let rows = architecture.lines().filter_map(|line| {
        let mut cells = line.trim().strip_prefix("| `")?.strip_suffix('|')?.split('|');
        let name = cells.next()?.trim().strip_suffix("/`")?;
        // Folders without code say nothing.
        let last = cells.next_back()?.trim();
        (!last.is_empty()).then_some((name, last != "no"))
    });
    // A crate is called as its folder is.
    let checked = |path: &str| may_be_unsafe.contains(&path.rsplit('/').next().unwrap_or(path));
    let differing = rows.filter(|(name, told)| checked(name) != *told);
    differing
        .map(|(name, told)| format!("ARCHITECTURE.md: unsafe code in {name}/: told {told}, checked {}", !told))
        .collect()
}

/// How many different system calls each thread's filter allows.
fn system_calls(policy: &Value) -> BTreeMap<String, usize> {
    let calls = |thread: &Value| -> usize {
        let rules = thread["filter"].as_array().map(Vec::as_slice).unwrap_or_default();
        rules.iter().filter_map(|rule| rule["syscall"].as_str()).collect::<BTreeSet<_>>().len()
    };
    let threads = policy.as_object().into_iter().flatten().filter(|(_, thread)| thread["match_action"] == "allow");
    threads.map(|(name, thread)| (name.clone(), calls(thread))).collect()
}

/// Threads whose row in the document, ``| `NAME` | COUNT |``, says something else, or is not there.
fn counts(calls: &BTreeMap<String, usize>, document: &str) -> Vec<String> {
    let told = |name: &str| {
        let row = document.lines().find_map(|line| line.strip_prefix(&format!("| `{name}` |")))?;
        row.split('|').next()?.trim().parse::<usize>().ok()
    };
    let wrong = calls.iter().filter(|(name, count)| told(name) != Some(**count));
    wrong.map(|(name, count)| format!("{THREAT_MODEL}: {POLICY} allows {count} system calls to {name}")).collect()
}

/// Tests named in code spans, `PATH.rs::NAME`, that are not in their files. `read` gives a file of the tree.
pub fn missing_tests(text: &str, read: impl Fn(&str) -> Option<String>) -> Vec<&str> {
    let spans = text.split('`').skip(1).step_by(2).filter(|span| !span.contains(char::is_whitespace));
    let missing = |span: &&str| {
        let Some((path, name)) = span.rsplit_once("::").filter(|(path, _)| path.ends_with(".rs")) else { return false };
        !read(path).is_some_and(|code| code.contains(&format!("fn {name}(")))
    };
    spans.filter(missing).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_differs_is_told_either_way() {
        let table = "| folder | what | unsafe |\n|---|---|---|\n| `a/` | x | no |\n| `b/` | y | two modules |\n| `c/` | z | |\n";
        assert_eq!(unsafe_table(table, &["b"]), Vec::<String>::new());
        assert_eq!(unsafe_table(table, &["a", "b"]).len(), 1);
        assert_eq!(unsafe_table(table, &[]), ["ARCHITECTURE.md: unsafe code in b/: told true, checked false"]);
    }

    #[test]
    fn system_calls_are_counted_once_each_and_held_against_the_document() {
        let calls = serde_json::json!([{ "syscall": "ioctl" }, { "syscall": "read" }, { "syscall": "ioctl" }]);
        let policy = serde_json::json!({
            "one": { "match_action": "allow", "filter": calls },
            "one_absent": { "match_action": { "errno": 38 }, "filter": calls },
        });
        let calls = system_calls(&policy);
        assert_eq!((calls.len(), calls["one"]), (1, 2));
        assert!(counts(&calls, "x\n| `one` | 2 | 50 |\n").is_empty());
        assert_eq!(counts(&calls, "| `one` | 3 | 50 |\n").len(), 1);
        assert_eq!(counts(&calls, "").len(), 1);
    }

    #[test]
    fn tests_that_do_not_exist_are_named() {
        let read = |path: &str| (path == "a/b.rs").then(|| "#[test]\nfn holds() {}".to_owned());
        let text = "`a/b.rs::holds` `a/b.rs::hold` `a/c.rs::holds` `fs::later` `std::fs` words `a b.rs::c`";
        assert_eq!(missing_tests(text, read), ["a/b.rs::hold", "a/c.rs::holds"]);
    }
}

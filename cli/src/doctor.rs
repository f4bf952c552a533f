//! `doctor`: the host's checks, a line each.

use anyhow::Context as _;
use runtime::doctor::{Check, Verdict, examine};

use crate::args::Doctor;
use crate::report;
use crate::show::Format;

/// Makes the checks. Exit code 1 when one fails: no container runs then.
pub fn doctor(args: &Doctor) -> anyhow::Result<u8> {
    let mut written = Ok(());
    let checks = examine(&args.checks, |check| {
        if args.format == Format::Table && written.is_ok() {
            written = report::print(&line(check));
        }
    });
    written.context("cannot write to standard output")?;
    if args.format != Format::Table {
        report::print(&args.format.show(&checks, |_| String::new())?)?;
    }
    Ok(u8::from(checks.iter().any(|check| check.verdict == Verdict::Failure)))
}

fn line(check: &Check) -> String {
    let verdict = match check.verdict {
        Verdict::Ok => "ok",
        Verdict::Warning => "warn",
        Verdict::Failure => "fail",
    };
    let remedy = check.remedy.as_ref().map_or(String::new(), |remedy| format!("; to do: {remedy}"));
    format!("{verdict:4}  {:9}  {}{remedy}\n", check.name, check.finding)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_one_line_with_its_remedy() {
        let check = Check {
            name: "kvm",
            verdict: Verdict::Failure,
            finding: "/dev/kvm does not exist".into(),
            remedy: Some("load kvm_amd".into()),
        };
        assert_eq!(line(&check), "fail  kvm        /dev/kvm does not exist; to do: load kvm_amd\n");
    }
}

//! Shell completions and manual pages, made from the definition of the command line.

use std::fs;

use anyhow::Context as _;
use clap::CommandFactory as _;

use crate::args::{Cli, Completions, Man};
use crate::report;

fn definition() -> clap::Command {
    let mut command = Cli::command();
    // The flags of the verbs are only defined when somebody asks.
    command.build();
    command
}

/// Writes the completions of a shell to standard output.
pub fn completions(args: &Completions) -> anyhow::Result<u8> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut definition(), "cofferdam", &mut text);
    report::print(&String::from_utf8(text)?)?;
    Ok(0)
}

/// Writes a manual page for the command and one for each verb.
pub fn manual(args: &Man) -> anyhow::Result<u8> {
    let folder = &args.directory;
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    clap_mangen::generate_to(definition(), folder)
        .with_context(|| format!("cannot write the manual pages into {}", folder.display()))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page_and_completions() {
        let folder = tempfile::tempdir().unwrap();
        manual(&Man { directory: folder.path().to_owned() }).unwrap();
        let mut completed = Vec::new();
        clap_complete::generate(clap_complete::Shell::Bash, &mut definition(), "cofferdam", &mut completed);
        let completed = String::from_utf8(completed).unwrap();
        for verb in Cli::command().get_subcommands().map(|verb| verb.get_name().to_owned()) {
            assert!(folder.path().join(format!("cofferdam-{verb}.1")).is_file(), "{verb}");
            assert!(completed.contains(&verb), "{verb}");
        }
    }
}

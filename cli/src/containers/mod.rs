//! The verbs that work on containers that were made, each a thin client of the VM's API.

pub mod copy;
pub mod events;
pub mod exec;
pub mod inspect;
pub mod life;
mod lines;
pub mod list;
pub mod logs;
pub mod stats;
mod watch;

use runtime::control::{Control, ControlError};
use runtime::state::{RunRoot, StateError};

use crate::report;

/// The exit code where one of several containers failed.
const FAILED: u8 = 1;

/// Does something with each container of these names. All are tried: what fails is told, and is exit code 1.
fn each<F>(names: &[String], act: F) -> anyhow::Result<u8>
where
    F: AsyncFnMut(&str, Control<'_>) -> anyhow::Result<()>,
{
    each_with(names, false, act)
}

/// As [`each`]; `gone` says that one that is not there is no failure.
fn each_with<F>(names: &[String], gone: bool, mut act: F) -> anyhow::Result<u8>
where
    F: AsyncFnMut(&str, Control<'_>) -> anyhow::Result<()>,
{
    let root = RunRoot::open()?;
    runtime::run::runtime()?.block_on(async {
        let mut code = 0;
        for name in names {
            let done = match Control::find(&root, name) {
                Ok(control) => act(name, control).await,
                Err(error) => Err(error.into()),
            };
            match done {
                Err(error) if gone && is_gone(&error) => {}
                Err(error) => {
                    report::error(&format!("{error:#}"));
                    code = FAILED;
                }
                Ok(()) => {}
            }
        }
        Ok(code)
    })
}

/// Whether an error says that there is no such container.
fn is_gone(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ControlError::State(StateError::NoSuchContainer { .. })))
}

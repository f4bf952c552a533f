//! The verbs that work on containers that were made, each a thin client of the VM's API.

pub mod copy;
pub mod events;
pub mod exec;
pub mod inspect;
pub mod life;
pub mod list;
pub mod logs;
pub mod stats;

use runtime::control::Control;
use runtime::state::RunRoot;

use crate::report;

/// The exit code where one of several containers failed.
const FAILED: u8 = 1;

/// Does something with each container of these names. All are tried: what fails is told, and is exit code 1.
fn each<F>(names: &[String], mut act: F) -> anyhow::Result<u8>
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
            if let Err(error) = done {
                report::error(&format!("{error:#}"));
                code = FAILED;
            }
        }
        Ok(code)
    })
}

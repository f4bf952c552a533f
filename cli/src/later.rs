//! Flags of docker's that do not work yet. They are refused by name: a container that runs without the volume or the
//! port that was asked for would be worse than none.

use anyhow::bail;
use clap::Args;

/// What is recognised in order to be refused.
#[derive(Debug, Args)]
pub struct Later {
    #[arg(short, long, hide = true)]
    volume: Vec<String>,
    #[arg(long, hide = true)]
    mount: Vec<String>,
    #[arg(long, hide = true)]
    volumes_from: Vec<String>,
    #[arg(short, long, hide = true)]
    publish: Vec<String>,
    #[arg(short = 'P', long, hide = true)]
    publish_all: bool,
    #[arg(long, hide = true)]
    device: Vec<String>,
    #[arg(long, hide = true)]
    add_host: Vec<String>,
    #[arg(long, hide = true)]
    dns: Vec<String>,
    #[arg(long, hide = true)]
    init: bool,
    #[arg(long, hide = true)]
    privileged: bool,
}

impl Later {
    /// Refuses what was given of them, and networks.
    ///
    /// # Errors
    /// Names the flag.
    pub fn refuse(&self, network: Option<&str>) -> anyhow::Result<()> {
        if self.privileged {
            bail!(
                "--privileged is not supported: the micro-VM has no host devices to give; add capabilities with --cap-add"
            );
        }
        if let Some(network) = network.filter(|network| *network != "none") {
            bail!("--network {network} does not work yet: containers have no network, leave it out or give none");
        }
        let given = [
            ("-v/--volume", !self.volume.is_empty()),
            ("--mount", !self.mount.is_empty()),
            ("--volumes-from", !self.volumes_from.is_empty()),
            ("-p/--publish", !self.publish.is_empty()),
            ("-P/--publish-all", self.publish_all),
            ("--device", !self.device.is_empty()),
            ("--add-host", !self.add_host.is_empty()),
            ("--dns", !self.dns.is_empty()),
            ("--init", self.init),
        ];
        if let Some((flag, _)) = given.iter().find(|(_, given)| *given) {
            bail!("{flag} does not work yet: leave it out");
        }
        Ok(())
    }
}

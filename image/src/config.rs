//! The image configuration (OCI Image Specification, "Image Configuration"), and docker's additions to it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::Error;
use crate::limits::LAYERS_MAX;

/// How the image wants to be run. Absent lists and strings are empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// `USER[:GROUP]`, each a name or a number; empty for root.
    pub user: String,
    /// `NAME=VALUE` each.
    pub env: Vec<String>,
    /// What comes before the command.
    pub entrypoint: Vec<String>,
    /// The command, or the entrypoint's default arguments.
    pub cmd: Vec<String>,
    /// Where to start; empty for `/`.
    pub working_dir: String,
    /// Name or number of the signal that asks the process to end.
    pub stop_signal: Option<String>,
    /// `PORT/PROTOCOL` each.
    pub exposed_ports: Vec<String>,
    /// Paths that should outlive the container.
    pub volumes: Vec<String>,
    /// The image's labels.
    pub labels: BTreeMap<String, String>,
    /// Docker's health check, as written.
    pub healthcheck: Option<serde_json::Value>,
}

/// What the store itself needs to know of a configuration.
#[derive(Clone, Debug)]
pub(crate) struct ParsedConfig {
    pub(crate) config: ImageConfig,
    /// RFC 3339, as written.
    pub(crate) created: Option<String>,
    /// `linux/amd64`, or what it is instead.
    pub(crate) platform: String,
    pub(crate) diff_ids: Vec<Digest>,
}

/// The only platform that can run here.
pub(crate) const PLATFORM: &str = "linux/amd64";

#[derive(Deserialize)]
struct RawImage {
    architecture: Option<String>,
    os: Option<String>,
    created: Option<String>,
    config: Option<RawConfig>,
    rootfs: Option<RawRootfs>,
}

#[derive(Deserialize)]
struct RawRootfs {
    diff_ids: Option<Vec<Digest>>,
}

// Docker writes null for what is not set, so every field is optional twice.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawConfig {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    labels: Option<BTreeMap<String, String>>,
    healthcheck: Option<serde_json::Value>,
}

impl ParsedConfig {
    /// Reads a configuration of `layers` layers; `what` names it in errors.
    ///
    /// # Errors
    /// It is no JSON, or not one of an image with that many layers.
    pub(crate) fn parse(bytes: &[u8], layers: usize, what: &str) -> Result<ParsedConfig, Error> {
        let image: RawImage =
            serde_json::from_slice(bytes).map_err(|source| Error::Json { what: what.to_owned(), source })?;
        let malformed = |reason: String| Error::Malformed { what: what.to_owned(), reason };
        let diff_ids = image.rootfs.and_then(|rootfs| rootfs.diff_ids).unwrap_or_default();
        if diff_ids.len() != layers {
            return Err(malformed(format!("it lists {} diff_ids for {layers} layers", diff_ids.len())));
        }
        if layers > LAYERS_MAX {
            return Err(malformed(format!("it has {layers} layers, at most {LAYERS_MAX} are possible")));
        }
        let raw = image.config.unwrap_or_default();
        let config = ImageConfig {
            user: raw.user.unwrap_or_default(),
            env: raw.env.unwrap_or_default(),
            entrypoint: raw.entrypoint.unwrap_or_default(),
            cmd: raw.cmd.unwrap_or_default(),
            working_dir: raw.working_dir.unwrap_or_default(),
            stop_signal: raw.stop_signal,
            exposed_ports: raw.exposed_ports.unwrap_or_default().into_keys().collect(),
            volumes: raw.volumes.unwrap_or_default().into_keys().collect(),
            labels: raw.labels.unwrap_or_default(),
            healthcheck: raw.healthcheck,
        };
        // These become arguments of execve(2) and the like, where a NUL would cut them short.
        let mut strings = config.env.iter().chain(&config.entrypoint).chain(&config.cmd);
        if strings.any(|text| text.contains('\0')) || config.user.contains('\0') || config.working_dir.contains('\0') {
            return Err(malformed("a command, variable, user or directory holds a NUL character".to_owned()));
        }
        let part = |part: Option<String>| part.unwrap_or_else(|| "unknown".to_owned());
        let platform = format!("{}/{}", part(image.os), part(image.architecture));
        Ok(ParsedConfig { config, created: image.created, platform, diff_ids })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_means_absent() {
        let json = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},
            "config":{"Env":null,"Cmd":["sh"],"Entrypoint":null,"Volumes":{"/data":{}},"Labels":null,
            "ExposedPorts":{"80/tcp":{}},"Healthcheck":{"Test":["NONE"]},"OnBuild":null,"ArgsEscaped":true}}"#;
        let parsed = ParsedConfig::parse(json, 0, "the configuration").unwrap();
        assert_eq!(parsed.platform, PLATFORM);
        assert_eq!(parsed.config.cmd, ["sh"]);
        assert_eq!(parsed.config.volumes, ["/data"]);
        assert_eq!(parsed.config.exposed_ports, ["80/tcp"]);
        assert!(parsed.config.healthcheck.is_some());
        assert!(ParsedConfig::parse(b"{}", 0, "c").unwrap().config.cmd.is_empty());
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(ParsedConfig::parse(b"{}", 1, "c").is_err());
        assert!(ParsedConfig::parse(br#"{"config":{"Env":["A=\u0000"]}}"#, 0, "c").is_err());
        assert!(ParsedConfig::parse(br#"{"rootfs":{"diff_ids":["sha256:12"]}}"#, 1, "c").is_err());
        assert!(ParsedConfig::parse(b"[", 0, "c").is_err());
    }
}

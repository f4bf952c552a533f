//! Logins for registries, from docker's `config.json` (`auths`; credential helpers are not asked).

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::files::open_regular;
use crate::error::{Error, IoContext};
use crate::limits::DOCUMENT_BYTES_MAX;

#[derive(Deserialize)]
struct DockerConfig {
    auths: Option<BTreeMap<String, Entry>>,
}

/// Who to be for a registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Login {
    pub(super) user: String,
    pub(super) password: String,
}

#[derive(Deserialize)]
struct Entry {
    /// Base64 of `USER:PASSWORD`.
    auth: Option<String>,
}

/// Where docker keeps logins: `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`.
pub(super) fn default_file() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let directory = variable("DOCKER_CONFIG").or_else(|| variable("HOME").map(|home| home.join(".docker")))?;
    Some(directory.join("config.json"))
}

/// The login for a registry; none if the file has none or is not there.
///
/// # Errors
/// The file can't be read, or the login in it is malformed.
pub(super) fn load(file: &Path, registry: &str) -> Result<Option<Login>, Error> {
    let (file_handle, bytes) = match open_regular(file) {
        Ok(opened) => opened,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).during("open", file),
    };
    let what = || format!("the login file {}", file.display());
    if bytes > DOCUMENT_BYTES_MAX {
        return Err(Error::TooLarge { what: what(), bytes, limit: DOCUMENT_BYTES_MAX });
    }
    let mut content = Vec::new();
    file_handle.take(DOCUMENT_BYTES_MAX).read_to_end(&mut content).during("read", file)?;
    let config: DockerConfig =
        serde_json::from_slice(&content).map_err(|source| Error::Json { what: what(), source })?;
    let names = match registry {
        "docker.io" => vec!["https://index.docker.io/v1/".to_owned(), "docker.io".to_owned()],
        other => vec![other.to_owned(), format!("https://{other}"), format!("https://{other}/")],
    };
    let auths = config.auths.unwrap_or_default();
    let login = names.iter().find_map(|name| auths.get(name)?.auth.as_deref());
    let Some(login) = login.filter(|login| !login.is_empty()) else { return Ok(None) };
    let decoded = STANDARD.decode(login).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let pair = decoded.as_deref().and_then(|text| text.split_once(':'));
    let (user, password) = pair.ok_or_else(|| Error::Malformed {
        what: what(),
        reason: format!("the login for {registry} is not base64 of USER:PASSWORD"),
    })?;
    Ok(Some(Login { user: user.to_owned(), password: password.to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_are_found_by_registry() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.json");
        assert!(load(&file, "a:1").unwrap().is_none());
        let json = r#"{"auths":{"a:1":{"auth":"dXNlcjpwYTpzcw=="},"https://index.docker.io/v1/":{"auth":"dTpw"},
            "bad":{"auth":"!"},"helper":{}},"credsStore":"x"}"#;
        std::fs::write(&file, json).unwrap();
        let basic = |registry| {
            let Login { user, password } = load(&file, registry).unwrap().unwrap();
            (user, password)
        };
        assert_eq!(basic("a:1"), ("user".to_owned(), "pa:ss".to_owned()));
        assert_eq!(basic("docker.io"), ("u".to_owned(), "p".to_owned()));
        assert!(load(&file, "helper").unwrap().is_none());
        assert!(load(&file, "bad").is_err());
    }
}

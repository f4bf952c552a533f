//! How an image is named: in a registry, in a directory, or in a file.
//!
//! The grammar of registry references is that of `github.com/distribution/reference`, and the defaults are docker's.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::digest::Digest;

const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_NAMESPACE: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// Bytes of registry and repository together, as in the grammar's reference implementation.
const NAME_BYTES_MAX: usize = 255;
/// Bytes of a tag.
const TAG_BYTES_MAX: usize = 128;

/// What the user called an image. Parse it from a string.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reference {
    /// `[HOST[:PORT]/]NAME[:TAG][@DIGEST]`
    Registry(RegistryReference),
    /// `oci:DIR[:TAG]`: an OCI image layout in a directory.
    OciLayout {
        /// The directory with `index.json`.
        dir: PathBuf,
        /// Which image of it; without, the only one or the one tagged `latest`.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:REF]`: what `docker save` writes, compressed or not.
    DockerArchive {
        /// The archive.
        file: PathBuf,
        /// Which image of it; without, the only one.
        name: Option<String>,
    },
}

/// An image in a registry, defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RegistryReference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl RegistryReference {
    /// Host name or address, with the port if one was given.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The image's name in the registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; without digest there always is one.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest of the manifest or index, if one was given: it wins over the tag.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Registry and repository the way people write them: docker's defaults left out.
    #[must_use]
    pub fn familiar_name(&self) -> String {
        if self.registry != DEFAULT_REGISTRY {
            return format!("{}/{}", self.registry, self.repository);
        }
        self.repository.strip_prefix(DEFAULT_NAMESPACE).unwrap_or(&self.repository).to_owned()
    }

    /// Whether the registry is this machine, to which plain HTTP is spoken.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        let host = match self.registry.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => self.registry.split(':').next().unwrap_or_default(),
        };
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path, rest) = match self {
            Reference::Registry(reference) => return reference.fmt(f),
            Reference::OciLayout { dir, tag } => ("oci", dir, tag),
            Reference::DockerArchive { file, name } => ("docker-archive", file, name),
        };
        write!(f, "{kind}:{}", path.display())?;
        rest.as_ref().map_or(Ok(()), |rest| write!(f, ":{rest}"))
    }
}

/// Why a text names no image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an image reference: {reason}")]
pub struct ReferenceParseError {
    text: String,
    reason: &'static str,
}

impl FromStr for Reference {
    type Err = ReferenceParseError;

    fn from_str(text: &str) -> Result<Reference, ReferenceParseError> {
        parse(text).map_err(|reason| ReferenceParseError {
            text: text.chars().take(300).collect::<String>().escape_debug().to_string(),
            reason,
        })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.contains('\0') {
        return Err("it holds a NUL byte");
    }
    if let Some(rest) = text.strip_prefix("oci:") {
        let (dir, tag) = split_path(rest)?;
        return Ok(Reference::OciLayout { dir, tag });
    }
    if let Some(rest) = text.strip_prefix("docker-archive:") {
        let (file, name) = split_path(rest)?;
        return Ok(Reference::DockerArchive { file, name });
    }
    if let Some((transport, _)) = text.split_once("://") {
        return Err(match transport {
            "http" | "https" | "docker" => "leave the `://` part away",
            _ => "it looks like a URL, but only registries, oci:DIR and docker-archive:FILE are known",
        });
    }
    parse_registry(text).map(Reference::Registry)
}

/// `PATH[:REST]`; the path can't hold a colon.
fn split_path(text: &str) -> Result<(PathBuf, Option<String>), &'static str> {
    let (path, rest) = match text.split_once(':') {
        Some((path, rest)) => (path, Some(rest)),
        None => (text, None),
    };
    match (path, rest) {
        ("", _) => Err("the path is missing"),
        (_, Some("")) => Err("nothing follows the last colon"),
        (path, rest) => Ok((path.into(), rest.map(str::to_owned))),
    }
}

fn parse_registry(text: &str) -> Result<RegistryReference, &'static str> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            (rest, Some(digest.parse().map_err(|_| "the digest must be sha256: and 64 hexadecimal digits")?))
        }
        None => (text, None),
    };
    // A colon behind the last slash begins the tag; others belong to the port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, repository) = match name.split_once('/') {
        Some((first, rest)) if is_domain(first) => (first, rest.to_owned()),
        _ => (DEFAULT_REGISTRY, name.to_owned()),
    };
    let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
    check_registry(registry)?;
    let repository = if registry == DEFAULT_REGISTRY && !repository.contains('/') {
        format!("{DEFAULT_NAMESPACE}{repository}")
    } else {
        repository
    };
    if registry.len() + repository.len() + 1 > NAME_BYTES_MAX {
        return Err("the name is longer than 255 bytes");
    }
    repository.split('/').try_for_each(check_component)?;
    let tag = tag.or(if digest.is_none() { Some(DEFAULT_TAG) } else { None }).map(str::to_owned);
    Ok(RegistryReference { registry: registry.to_owned(), repository, tag, digest })
}

/// Whether what stands before the first slash is a host and not part of the repository.
fn is_domain(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    const BAD: &str = "the registry must be a host name or address, with a port if need be";
    let (host, port) = if let Some(rest) = registry.strip_prefix('[') {
        let (address, rest) = rest.split_once(']').ok_or(BAD)?;
        address.parse::<std::net::Ipv6Addr>().map_err(|_| BAD)?;
        match rest.strip_prefix(':') {
            Some(port) => (None, Some(port)),
            None if rest.is_empty() => (None, None),
            None => return Err(BAD),
        }
    } else {
        match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), None),
        }
    };
    if let Some(host) = host {
        let label_ok = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if !host.split('.').all(label_ok) {
            return Err(BAD);
        }
    }
    match port {
        Some(port) if !port.bytes().all(|byte| byte.is_ascii_digit()) || port.parse::<u16>().is_err() => Err(BAD),
        _ => Ok(()),
    }
}

fn check_component(component: &str) -> Result<(), &'static str> {
    const BAD: &str = "each part of the name must be lower-case letters and digits, with single separators inside";
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().is_some_and(alphanumeric) || !bytes.last().is_some_and(alphanumeric) {
        return Err(if component.bytes().any(|byte| byte.is_ascii_uppercase()) {
            "the name must be lower-case"
        } else {
            BAD
        });
    }
    // Between letters and digits: one dot, one or two underscores, or any number of dashes.
    for separator in bytes.split(alphanumeric).filter(|separator| !separator.is_empty()) {
        let dashes = separator.iter().all(|byte| *byte == b'-');
        if !dashes && !matches!(separator, b"." | b"_" | b"__") {
            return Err(BAD);
        }
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = tag.as_bytes();
    if bytes.first().is_some_and(|first| word(*first))
        && bytes.len() <= TAG_BYTES_MAX
        && bytes.iter().all(|byte| word(*byte) || matches!(byte, b'.' | b'-'))
    {
        return Ok(());
    }
    Err("the tag must be 1 to 128 letters, digits, `_`, `.` or `-`, and not begin with `.` or `-`")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn registry(text: &str) -> RegistryReference {
        match text.parse() {
            Ok(Reference::Registry(reference)) => reference,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn docker_defaults_are_filled_in() {
        for (text, full, familiar) in [
            ("busybox", "docker.io/library/busybox:latest", "busybox"),
            ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox"),
            ("org/tool", "docker.io/org/tool:latest", "org/tool"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest", "busybox"),
            ("localhost/a", "localhost/a:latest", "localhost/a"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c", "localhost:5000/a/b"),
            ("ghcr.io/x/y", "ghcr.io/x/y:latest", "ghcr.io/x/y"),
            ("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a"),
            ("Host/a", "Host/a:latest", "Host/a"),
            ("a_b__c---d.e", "docker.io/library/a_b__c---d.e:latest", "a_b__c---d.e"),
        ] {
            assert_eq!(registry(text).to_string(), full);
            assert_eq!(registry(text).familiar_name(), familiar);
        }
        assert_eq!(registry(&format!("a@{DIGEST}")).to_string(), format!("docker.io/library/a@{DIGEST}"));
        let both = registry(&format!("a:b@{DIGEST}"));
        assert_eq!((both.tag(), both.digest()), (Some("b"), DIGEST.parse().ok()));
    }

    #[test]
    fn what_names_no_image_is_refused() {
        for text in [
            "",
            ":",
            "@",
            "a:",
            "a@sha256:12",
            "a@md5:00",
            "A",
            "a//b",
            "/a",
            "a/",
            "a b",
            "a:b:c",
            "a...b",
            "a___b",
            "-a",
            "a-",
            "a:.x",
            "host:99999/a",
            "host:/a",
            "ho_st.x/a",
            "-host.x/a",
            "[::1/a",
            "[zz]:1/a",
            "https://a.b/c",
            "oci:",
            "oci:dir:",
            "docker-archive:",
            "docker-archive::x",
            "a\0b",
            "a.b.c/",
            "ä",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?} was accepted");
        }
        assert!(format!("a:{}", "x".repeat(129)).parse::<Reference>().is_err());
        assert!("x".repeat(250).parse::<Reference>().is_err());
    }

    #[test]
    fn layouts_and_archives_have_a_path_and_an_optional_name() {
        assert_eq!(
            "oci:/a/b:1.0".parse(),
            Ok(Reference::OciLayout { dir: "/a/b".into(), tag: Some("1.0".to_owned()) })
        );
        assert_eq!("oci:rel".parse(), Ok(Reference::OciLayout { dir: "rel".into(), tag: None }));
        assert_eq!(
            "docker-archive:/a.tar:host:1/x:y".parse(),
            Ok(Reference::DockerArchive { file: "/a.tar".into(), name: Some("host:1/x:y".to_owned()) })
        );
    }

    #[test]
    fn loopback_is_recognised() {
        for text in ["localhost/a", "localhost:5/a", "127.0.0.1:5/a", "127.8.8.8:1/a", "[::1]:5/a"] {
            assert!(registry(text).is_loopback(), "{text}");
        }
        for text in ["busybox", "10.0.0.1:5000/a", "localhost.evil.com/a", "127.0.0.1.evil.com/a", "[::2]:5/a"] {
            assert!(!registry(text).is_loopback(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_the_parser_panic(text in "\\PC*") {
            let _ = text.parse::<Reference>();
        }

        #[test]
        fn a_reference_survives_being_written(
            host in "([a-z0-9]{1,8}(\\.[a-z0-9]{1,8}){1,2}|localhost)(:[1-9][0-9]{0,3})?/",
            name in "[a-z0-9]{1,8}((\\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}(/[a-z0-9]{1,8}){0,3}",
            tag in prop::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
            with_host: bool,
        ) {
            // Without a host, a first part with a dot would be taken for one.
            let mut text = if with_host { format!("{host}{name}") } else { format!("x/{name}") };
            if let Some(tag) = &tag {
                text = format!("{text}:{tag}");
            }
            let once: Reference = text.parse().unwrap();
            prop_assert_eq!(&once, &once.to_string().parse().unwrap());
        }
    }
}

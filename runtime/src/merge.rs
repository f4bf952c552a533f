//! Where an image's configuration and a request say different things, who wins: docker's rules, word for word.
//!
//! - `--entrypoint` replaces the image's ENTRYPOINT and drops its CMD; an empty one leaves no entrypoint at all.
//! - Words after the image replace the image's CMD.
//! - The environment is `PATH` and `HOSTNAME`, then the image's, then the request's; a name without a value takes the
//!   value it has for the caller, or is removed.

use image::ImageConfig;
use thiserror::Error;

use crate::request::{EnvEntry, RunRequest};

/// `PATH` for images that set none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The most bytes that arguments and environment may have together: what Linux gives a program whose stack limit is the
/// default of 8 MiB, a quarter of it.
const WORDS_MAX: usize = 2 << 20;

/// Why image and request make no process.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MergeError {
    /// Neither says what to run.
    #[error("no command: the image names none, so give one after the image")]
    NoCommand,
    /// A working directory that depends on where one is.
    #[error("the working directory {path:?} is not an absolute path")]
    WorkingDirectory {
        /// What was given.
        path: String,
    },
    /// A text that no program can be given.
    #[error("{field} of the image's configuration has a NUL byte")]
    Nul {
        /// Where it is.
        field: &'static str,
    },
    /// An environment entry of the image without a name.
    #[error("the image's configuration has the environment entry {entry:?}, which has no name")]
    ImageEnvironment {
        /// The entry.
        entry: String,
    },
    /// The image's health check.
    #[error("the image's health check cannot be read: {reason}; leave it out with --no-healthcheck")]
    HealthCheck {
        /// What is wrong with it.
        reason: String,
    },
    /// More than fits into a process.
    #[error("arguments and environment have {bytes} bytes: at most {WORDS_MAX} fit")]
    TooLong {
        /// Their size, with the NUL after each.
        bytes: usize,
    },
}

/// What the container's first process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// The program and its arguments.
    pub args: Vec<String>,
    /// `NAME=value`, each name once.
    pub env: Vec<String>,
    /// The working directory: absolute, without `.` and `..`.
    pub working_directory: String,
    /// `USER[:GROUP]`, empty for root.
    pub user: String,
}

/// Merges a request into an image's configuration. `lookup` is the caller's environment.
///
/// # Errors
/// Nothing to run, or something that no process can have.
pub fn merge(
    request: &RunRequest,
    image: &ImageConfig,
    hostname: &str,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Process, MergeError> {
    let args = arguments(request, image)?;
    let env = environment(request, image, hostname, lookup)?;
    let bytes = args.iter().chain(&env).map(|word| word.len() + 1).sum();
    if bytes > WORDS_MAX {
        return Err(MergeError::TooLong { bytes });
    }
    let working_directory = working_directory(request, image)?;
    let user = request.user.clone().unwrap_or_else(|| image.user.clone());
    if user.contains('\0') {
        return Err(MergeError::Nul { field: "the user" });
    }
    Ok(Process { args, env, working_directory, user })
}

fn arguments(request: &RunRequest, image: &ImageConfig) -> Result<Vec<String>, MergeError> {
    let (entrypoint, image_cmd): (&[String], &[String]) = match &request.entrypoint {
        Some(program) if program.is_empty() => (&[], &[]),
        Some(program) => (std::slice::from_ref(program), &[]),
        None => (&image.entrypoint, &image.cmd),
    };
    let cmd = if request.command.is_empty() { image_cmd } else { &request.command };
    let args: Vec<String> = entrypoint.iter().chain(cmd).cloned().collect();
    if args.is_empty() {
        return Err(MergeError::NoCommand);
    }
    if args.iter().any(|word| word.contains('\0')) {
        return Err(MergeError::Nul { field: "the command" });
    }
    Ok(args)
}

fn environment(
    request: &RunRequest,
    image: &ImageConfig,
    hostname: &str,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Vec<String>, MergeError> {
    let mut env = vec![format!("PATH={DEFAULT_PATH}"), format!("HOSTNAME={hostname}")];
    for entry in &image.env {
        // An entry without `=` is legal in an image and sets nothing.
        let Some((name, value)) = entry.split_once('=') else { continue };
        if entry.contains('\0') {
            return Err(MergeError::Nul { field: "the environment" });
        }
        if name.is_empty() {
            return Err(MergeError::ImageEnvironment { entry: entry.clone() });
        }
        set(&mut env, name, Some(value));
    }
    for entry in &request.environment {
        match entry {
            EnvEntry::Set(name, value) => set(&mut env, name, Some(value)),
            EnvEntry::Inherit(name) => set(&mut env, name, lookup(name).as_deref()),
        }
    }
    Ok(env)
}

/// Sets, replaces in place, or removes a variable.
fn set(env: &mut Vec<String>, name: &str, value: Option<&str>) {
    let place = env.iter().position(|entry| entry.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')));
    match (place, value) {
        (Some(place), Some(value)) => env[place] = format!("{name}={value}"),
        (None, Some(value)) => env.push(format!("{name}={value}")),
        (Some(place), None) => drop(env.remove(place)),
        (None, None) => {}
    }
}

fn working_directory(request: &RunRequest, image: &ImageConfig) -> Result<String, MergeError> {
    let path = match &request.working_directory {
        Some(path) if path.starts_with('/') => path,
        Some(path) => return Err(MergeError::WorkingDirectory { path: path.clone() }),
        // An image's relative directory is meant from the root, as its builder took it.
        None => &image.working_dir,
    };
    if path.contains('\0') {
        return Err(MergeError::Nul { field: "the working directory" });
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    Ok(format!("/{}", parts.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn image(entrypoint: &str, cmd: &str) -> ImageConfig {
        ImageConfig { entrypoint: words(entrypoint), cmd: words(cmd), ..ImageConfig::default() }
    }

    fn args(entrypoint: Option<&str>, command: &str, image: &ImageConfig) -> Result<Vec<String>, MergeError> {
        let request =
            RunRequest { entrypoint: entrypoint.map(str::to_owned), command: words(command), ..RunRequest::default() };
        arguments(&request, image)
    }

    #[test]
    fn command_and_entrypoint_combine_as_in_docker() {
        let both = image("/entry -x", "serve now");
        let cmd_only = image("", "sh");
        for (entrypoint, command, image, expected) in [
            (None, "", &both, "/entry -x serve now"),
            (None, "ls -l", &both, "/entry -x ls -l"),
            (Some("/other"), "", &both, "/other"),
            (Some("/other"), "ls -l", &both, "/other ls -l"),
            (Some(""), "ls -l", &both, "ls -l"),
            (None, "", &cmd_only, "sh"),
            (None, "ls", &cmd_only, "ls"),
            (Some("echo"), "", &cmd_only, "echo"),
        ] {
            assert_eq!(args(entrypoint, command, image).unwrap(), words(expected), "{entrypoint:?} {command:?}");
        }
    }

    #[test]
    fn nothing_to_run_is_an_error() {
        assert_eq!(args(None, "", &image("", "")), Err(MergeError::NoCommand));
        assert_eq!(args(Some(""), "", &image("/entry", "sh")), Err(MergeError::NoCommand));
    }

    #[test]
    fn an_empty_word_stays_a_word() {
        let request = RunRequest { command: vec!["printf".into(), String::new()], ..RunRequest::default() };
        assert_eq!(arguments(&request, &image("", "")).unwrap(), ["printf", ""]);
    }

    #[test]
    fn the_environment_is_layered_and_each_name_is_there_once() {
        let image = ImageConfig { env: words("PATH=/img LANG=C NOVALUE LANG=C.UTF-8"), ..ImageConfig::default() };
        let request = RunRequest {
            environment: ["A=1", "LANG=de", "HOST_HAS", "HOST_LACKS", "A=2"].map(|text| text.parse().unwrap()).into(),
            ..RunRequest::default()
        };
        let lookup = |name: &str| (name == "HOST_HAS").then(|| "yes".to_owned());
        let env = environment(&request, &image, "box", lookup).unwrap();
        assert_eq!(env, ["PATH=/img", "HOSTNAME=box", "LANG=de", "A=2", "HOST_HAS=yes"]);
    }

    #[test]
    fn a_name_without_a_value_removes_what_the_image_set() {
        let image = ImageConfig { env: words("TOKEN=x"), ..ImageConfig::default() };
        let request = RunRequest { environment: vec![EnvEntry::Inherit("TOKEN".into())], ..RunRequest::default() };
        let env = environment(&request, &image, "h", |_| None).unwrap();
        assert_eq!(env, [format!("PATH={DEFAULT_PATH}"), "HOSTNAME=h".to_owned()]);
    }

    #[test]
    fn a_name_that_begins_another_is_not_that_name() {
        let mut env = words("PATHS=x");
        set(&mut env, "PATH", Some("y"));
        assert_eq!(env, ["PATHS=x", "PATH=y"]);
    }

    #[test]
    fn working_directories() {
        let of = |asked: Option<&str>, in_image: &str| {
            let request = RunRequest { working_directory: asked.map(str::to_owned), ..RunRequest::default() };
            working_directory(&request, &ImageConfig { working_dir: in_image.into(), ..ImageConfig::default() })
        };
        assert_eq!(of(None, "").unwrap(), "/");
        assert_eq!(of(None, "app").unwrap(), "/app");
        assert_eq!(of(Some("/a/./b/../c/"), "/img").unwrap(), "/a/c");
        assert!(of(Some("a"), "/img").is_err());
    }

    #[test]
    fn what_no_process_can_have_is_refused() {
        let request = RunRequest { command: vec!["x".repeat(WORDS_MAX)], ..RunRequest::default() };
        let error = merge(&request, &ImageConfig::default(), "h", |_| None).unwrap_err();
        assert!(matches!(error, MergeError::TooLong { .. }));
        let nul = ImageConfig { cmd: vec!["a\0b".into()], ..ImageConfig::default() };
        assert!(matches!(arguments(&RunRequest::default(), &nul), Err(MergeError::Nul { .. })));
    }
}

//! A place for one test: directories of its own for everything that `cofferdam` writes, and the check that nothing is
//! left of it.
//!
//! Every process that runs here has the place's path in its environment, or among its arguments where its environment is
//! empty, by which it is found wherever it is in the tree of processes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;

use serde_json::Value;
use tempfile::TempDir;

use crate::images::TAG;
use crate::process::Invocation;
use crate::registry::Registry;
use crate::{FOLDER_VARIABLE, PROGRAMS_VARIABLE, REFERENCES, STORAGE, STORE};

/// What `cargo xtask e2e` has prepared.
#[derive(Debug)]
struct Prepared {
    folder: PathBuf,
    programs: PathBuf,
    references: BTreeMap<String, String>,
}

/// The prepared things.
///
/// # Panics
/// There are none, or this machine cannot run guests: then no test can say anything.
fn prepared() -> &'static Prepared {
    static PREPARED: OnceLock<Prepared> = OnceLock::new();
    PREPARED.get_or_init(|| {
        let named = |variable: &str| {
            let path = std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
            path.unwrap_or_else(|| panic!("{variable} is not set: run the end-to-end tests with `cargo xtask e2e`"))
        };
        let (folder, programs) = (named(FOLDER_VARIABLE), named(PROGRAMS_VARIABLE));
        let monitor = programs.join("cofferdam-vmm");
        let probe = Command::new(&monitor).arg("--probe").output();
        let probe = probe.unwrap_or_else(|error| panic!("cannot start {}: {error}", monitor.display()));
        assert!(
            probe.status.success(),
            "/dev/kvm cannot run guests here: {}",
            String::from_utf8_lossy(&probe.stderr).trim_end()
        );
        let path = folder.join(REFERENCES);
        let text = fs::read(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
        let object: BTreeMap<String, Value> = serde_json::from_slice(&text).expect("the references are no JSON object");
        let references = object.into_iter().filter_map(|(name, value)| Some((name, value.as_str()?.to_owned())));
        Prepared { folder, programs, references: references.collect() }
    })
}

/// The folder of the programs that are tested, as `cargo xtask build` leaves them.
#[must_use]
pub fn programs() -> &'static Path {
    &prepared().programs
}

/// A registry that serves all images.
///
/// The large ones are in the shared store already, since unpacking them takes minutes in an emulated machine: pull only
/// the small ones from here.
///
/// # Panics
/// It does not start.
#[must_use]
pub fn registry() -> Registry {
    Registry::start(&prepared().folder.join(STORAGE)).unwrap_or_else(|error| panic!("{error:#}"))
}

/// The digest of a repository's image, from where the registry keeps it (its `PathSpec` names the places).
///
/// # Panics
/// The registry does not have it.
#[must_use]
pub fn manifest_digest(repository: &str) -> String {
    let tag = format!("docker/registry/v2/repositories/{repository}/_manifests/tags/{TAG}/current/link");
    let path = prepared().folder.join(STORAGE).join(tag);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

/// A place for one test. Dropping it checks that nothing is left in it, unless the test has failed already.
pub struct Sandbox {
    folder: TempDir,
    store: PathBuf,
    own_store: bool,
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Sandbox {
    /// A place whose containers come from the shared store, which holds every image.
    ///
    /// # Panics
    /// There is nowhere to put it.
    #[must_use]
    pub fn new() -> Self {
        Self::make(Some(prepared().folder.join(STORE)))
    }

    /// A place with an empty store of its own.
    ///
    /// # Panics
    /// There is nowhere to put it.
    #[must_use]
    pub fn with_empty_store() -> Self {
        Self::make(None)
    }

    fn make(store: Option<PathBuf>) -> Self {
        let folder = tempfile::Builder::new().prefix("cofferdam-e2e-").tempdir().expect("cannot make a folder");
        for name in ["tmp", "home", "files"] {
            fs::create_dir(folder.path().join(name)).expect("cannot make a folder");
        }
        let own_store = store.is_none();
        let store = store.unwrap_or_else(|| folder.path().join("store"));
        Self { folder, store, own_store }
    }

    /// A folder in which the test itself may put files, which it need not remove.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        self.folder.path().join("files")
    }

    /// Gives the place to another user, who is named by his number, so that he can run containers in it.
    ///
    /// # Panics
    /// This process is not root.
    pub fn give(&self, user: u32) {
        let folders = ["", "tmp", "home", "files"].map(|name| self.folder.path().join(name));
        for folder in folders {
            std::os::unix::fs::chown(&folder, Some(user), Some(user)).expect("only root can give folders away");
        }
    }

    /// `cofferdam` with these arguments, as another user without any group.
    #[must_use]
    pub fn cofferdam_as(&self, user: u32, arguments: &[&str]) -> Invocation {
        let script = format!("exec setpriv --reuid {user} --regid {user} --clear-groups -- \"$COFFERDAM\" \"$@\"");
        self.program("sh", ["-c", &script, "sh"].iter().chain(arguments))
    }

    /// The folder for state while containers run.
    #[must_use]
    pub fn run_folder(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// The folder of images.
    #[must_use]
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// `cofferdam` with these arguments.
    #[must_use]
    pub fn cofferdam<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Invocation {
        let mut command = Command::new(prepared().programs.join("cofferdam"));
        command.args(arguments);
        self.invocation(command)
    }

    /// Another program in this place, which has the path of `cofferdam` as `$COFFERDAM`.
    #[must_use]
    pub fn program<S: AsRef<OsStr>>(&self, program: &str, arguments: impl IntoIterator<Item = S>) -> Invocation {
        let mut command = Command::new(program);
        command.args(arguments).env("COFFERDAM", prepared().programs.join("cofferdam"));
        self.invocation(command)
    }

    /// `cofferdam run FLAGS IMAGE WORDS`; `image` is one of our repositories, or a reference with a colon in it.
    #[must_use]
    pub fn run(&self, flags: &[&str], image: &str, words: &[&str]) -> Invocation {
        let reference = if image.contains(':') { image.to_owned() } else { Self::reference(image) };
        self.cofferdam(
            ["run", "--rm"].iter().chain(flags).copied().chain([reference.as_str()]).chain(words.iter().copied()),
        )
    }

    /// Starts a container that is left running, and gives it by its name; dropping that removes it.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn detached<'a>(&'a self, name: &'a str, flags: &[&str], image: &str, words: &[&str]) -> Detached<'a> {
        self.detached_by(&prepared().programs.join("cofferdam-vmm"), name, flags, image, words)
    }

    /// The same with a monitor of the test's own, such as a script that changes the configuration first.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn detached_by<'a>(
        &'a self,
        monitor: &Path,
        name: &'a str,
        flags: &[&str],
        image: &str,
        words: &[&str],
    ) -> Detached<'a> {
        let reference = Self::reference(image);
        let given = ["run", "-d", "--name", name];
        let words = given.iter().chain(flags).copied().chain([reference.as_str()]).chain(words.iter().copied());
        let started = self.cofferdam(words).env("COFFERDAM_VMM", monitor).end();
        assert_eq!(started.succeeded().trim().len(), 32, "{started:?}");
        Detached { sandbox: self, name }
    }

    /// The name under which the shared store has an image.
    ///
    /// # Panics
    /// It has none.
    #[must_use]
    pub fn reference(repository: &str) -> String {
        prepared().references.get(repository).unwrap_or_else(|| panic!("there is no image {repository}")).clone()
    }

    fn invocation(&self, mut command: Command) -> Invocation {
        let at = |name: &str| self.folder.path().join(name);
        // What is left of the caller's environment names parts of the build, if it does.
        let kept = ["PATH", "COFFERDAM_KERNEL", "COFFERDAM_INITRAMFS", "COFFERDAM_VMM"];
        let kept = kept.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
        let program_environment: Vec<_> =
            command.get_envs().filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned()))).collect();
        command
            .env_clear()
            .envs(kept)
            .envs(program_environment)
            .env("HOME", at("home"))
            .env("TMPDIR", at("tmp"))
            .env("COFFERDAM_RUN", self.run_folder())
            .env("COFFERDAM_DATA", &self.store)
            .current_dir(at("files"));
        Invocation::new(command)
    }

    /// Ends the test: nothing may be left.
    ///
    /// # Panics
    /// Something is, and the message lists it.
    pub fn check(&self) {
        let left = self.leftovers();
        assert!(left.is_empty(), "left behind: {}", left.join(", "));
    }

    /// Everything that should not be there once no container runs.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let here = self.folder.path().to_str().expect("the path of a temporary folder is UTF-8");
        let mut left: Vec<String> = self.processes().into_iter().map(|pid| format!("process {pid}")).collect();
        let run = self.run_folder();
        let mut folders = vec![run.clone(), run.join("names"), self.folder.path().join("tmp")];
        if self.own_store {
            folders.push(self.store.join("tmp"));
        }
        for folder in folders {
            // A folder that was never made has nothing in it.
            let entries = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
            left.extend(entries.filter(|path| *path != run.join("names")).map(|path| path.display().to_string()));
        }
        for (kind, table) in [("mount", "/proc/self/mountinfo"), ("socket", "/proc/net/unix")] {
            let text = fs::read_to_string(table).unwrap_or_default();
            left.extend(text.lines().filter(|line| line.contains(here)).map(|line| format!("{kind} {line}")));
        }
        left
    }

    /// The one monitor that runs here.
    ///
    /// # Panics
    /// There is none, or more than one.
    #[must_use]
    pub fn monitor(&self) -> u32 {
        let found = self.monitors();
        assert_eq!(found.len(), 1, "{found:?}, {}", self.states());
        found[0]
    }

    /// What is known of the containers here, for whoever misses one.
    fn states(&self) -> String {
        let all = self.cofferdam(["ps", "-aq"]).end();
        let states = all.text().lines().map(|id| {
            let told = self.cofferdam(["inspect", "--format", "state", id]).end();
            format!("{id} is {}", told.text().trim_end())
        });
        states.collect::<Vec<_>>().join(", ")
    }

    /// The monitors that run here, and what is above them.
    #[must_use]
    pub fn monitors(&self) -> Vec<u32> {
        let comm = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        self.processes().into_iter().filter(|pid| comm(pid).trim() == "cofferdam-vmm").collect()
    }

    /// The processes that were started here, wherever they are now.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let here = self.folder.path().to_str().expect("the path of a temporary folder is UTF-8");
        let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                // Processes that end while we look have nothing any more.
                let read = |what| fs::read(format!("/proc/{pid}/{what}")).unwrap_or_default();
                let names_it = |text: Vec<u8>| text.windows(here.len()).any(|window| window == here.as_bytes());
                ["environ", "cmdline"].into_iter().map(read).any(names_it)
            })
            .collect()
    }
}

/// A container that is left running. Dropping it removes it.
pub struct Detached<'a> {
    sandbox: &'a Sandbox,
    name: &'a str,
}

impl Detached<'_> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name
    }

    /// `cofferdam VERB FLAGS NAME WORDS`.
    #[must_use]
    pub fn verb(&self, verb: &str, flags: &[&str], words: &[&str]) -> Invocation {
        let words = std::iter::once(verb).chain(flags.iter().copied()).chain([self.name]).chain(words.iter().copied());
        self.sandbox.cofferdam(words)
    }

    /// What `inspect` says of these fields, tabs between them.
    ///
    /// # Panics
    /// It fails.
    #[must_use]
    pub fn inspect(&self, fields: &str) -> String {
        self.verb("inspect", &["--format", fields], &[]).end().succeeded().trim_end().to_owned()
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        let removed = self.verb("rm", &["-f"], &[]).end();
        if !thread::panicking() {
            assert_eq!(removed.code(), 0, "{removed:?}");
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.check();
        }
    }
}

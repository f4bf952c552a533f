//! `ps`: the containers there are.

use std::collections::BTreeMap;
use std::mem::discriminant;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use api::model::{ContainerStatus, HealthState};
use clap::ValueEnum;
use image::Reference;
use runtime::control::{Control, Status};
use runtime::record::short_id;
use runtime::state::{Found, RunRoot};
use runtime::timeline::wall_clock_ns;
use serde::Serialize;

use crate::args::Ps;
use crate::report;
use crate::table;
use crate::when::rfc3339;

/// How much of a command is shown.
const COMMAND_MAX: usize = 20;

/// A container, for programs.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    name: Option<String>,
    image: String,
    image_id: String,
    command: String,
    created: String,
    state: State,
    status: String,
    exit_code: Option<u8>,
    health: Option<HealthState>,
    ports: Vec<String>,
    labels: BTreeMap<String, String>,
    #[serde(skip)]
    created_ns: u64,
}

/// Where a container is in its life: what its monitor says, and what that cannot say itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum State {
    Creating,
    Created,
    Starting,
    Running,
    Paused,
    Restarting,
    Exited,
    /// Its monitor lives and does not answer.
    Unresponsive,
}

/// A container that was asked how it is.
struct Asked {
    status: Status,
    state: State,
}

impl Asked {
    /// Whether there is a VM, whatever its monitor says of it.
    fn has_vm(&self) -> bool {
        let Status { lingering, live, .. } = &self.status;
        match self.state {
            State::Exited => *lingering,
            State::Created => *lingering || live.is_some(),
            _ => true,
        }
    }
}

/// Lists containers, newest first.
pub fn ps(args: &Ps) -> anyhow::Result<u8> {
    let filters = args.filter.iter().map(|filter| Filter::parse(filter)).collect::<anyhow::Result<Vec<_>>>()?;
    let root = Arc::new(RunRoot::open()?);
    let by_status = filters.iter().any(|filter| matches!(filter, Filter::Status(_)));
    // Also those that nobody holds: a monitor that let go of its lock is to be seen.
    let listed = root.list()?.into_iter().rev();
    // All at the same time: one that does not answer holds up nobody else.
    let rows: Vec<Row> = runtime::run::runtime()?.block_on(async {
        let asked: Vec<_> = listed.map(|found| tokio::spawn(ask(Arc::clone(&root), found))).collect();
        let mut rows = Vec::new();
        for asked in asked {
            let asked = asked.await?;
            if (asked.has_vm() || args.all || by_status) && take(&filters, |filter| filter.takes(&asked)) {
                rows.push(row(&asked));
            }
        }
        anyhow::Ok(rows)
    })?;
    let id = |row: &Row| if args.no_trunc { row.id.clone() } else { short_id(&row.id).to_owned() };
    let text = if args.quiet {
        rows.iter().map(|row| id(row) + "\n").collect()
    } else {
        args.format.show(&rows, |rows| shown(rows, args.no_trunc, id))?
    };
    report::print(&text)?;
    Ok(0)
}

async fn ask(root: Arc<RunRoot>, found: Found) -> Asked {
    let status = Control::new(&root, found).status().await;
    let state = match status.state.status {
        _ if status.unresponsive => State::Unresponsive,
        ContainerStatus::Creating => State::Creating,
        ContainerStatus::Created => State::Created,
        ContainerStatus::Starting => State::Starting,
        ContainerStatus::Running => State::Running,
        ContainerStatus::Paused => State::Paused,
        ContainerStatus::Exited if status.restarting => State::Restarting,
        ContainerStatus::Exited => State::Exited,
    };
    Asked { status, state }
}

fn shown(rows: &[Row], whole: bool, id: impl Fn(&Row) -> String) -> String {
    let now = wall_clock_ns();
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let command = if whole { row.command.clone() } else { shorten(&row.command) };
            let name = row.name.clone().unwrap_or_else(|| short_id(&row.id).to_owned());
            let created = table::ago(now.saturating_sub(row.created_ns) / 1_000_000_000);
            [
                id(row),
                row.image.clone(),
                format!("\"{command}\""),
                created,
                row.status.clone(),
                row.ports.join(", "),
                name,
            ]
        })
        .collect();
    table::table(["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"], &rows)
}

fn shorten(text: &str) -> String {
    if text.chars().count() <= COMMAND_MAX {
        return text.to_owned();
    }
    text.chars().take(COMMAND_MAX - 1).chain(['…']).collect()
}

fn row(asked: &Asked) -> Row {
    let Asked { status, state } = asked;
    let record = &status.record;
    Row {
        id: record.id.clone(),
        name: record.name.clone(),
        image: record.image.clone(),
        image_id: record.image_id.clone(),
        // The user's own words, but a control character in them is still none for a terminal.
        command: api::session::shown(&record.container.spec.process.args.join(" ")),
        created: rfc3339(record.created_ns),
        created_ns: record.created_ns,
        state: *state,
        status: words(asked),
        exit_code: status.state.exit_code,
        health: status.health.as_ref().map(|health| health.status),
        ports: Vec::new(),
        labels: record.labels.iter().cloned().collect(),
    }
}

/// Where a container is in its life, in docker's words.
fn words(asked: &Asked) -> String {
    let status = &asked.status;
    let now = wall_clock_ns();
    let since = |time: Option<u64>| now.saturating_sub(time.unwrap_or(now)) / 1_000_000_000;
    let code = status.state.exit_code.unwrap_or_default();
    match asked.state {
        State::Creating => "Creating".to_owned(),
        State::Created => "Created".to_owned(),
        State::Starting => "Starting".to_owned(),
        State::Unresponsive => "Not responding".to_owned(),
        State::Restarting => format!("Restarting ({code}) {}", table::ago(since(status.state.finished_ns))),
        State::Exited => {
            let ago = status.state.finished_ns.map(|time| format!(" {}", table::ago(since(Some(time)))));
            // Something runs, whatever became of the container.
            let lingering = if status.lingering { ", monitor alive" } else { "" };
            format!("Exited ({code}){}{lingering}", ago.unwrap_or_default())
        }
        State::Running | State::Paused => {
            let up = table::ago(since(status.state.started_ns));
            let up = up.strip_suffix(" ago").unwrap_or(&up);
            let health = match status.health.as_ref().map(|health| health.status) {
                Some(HealthState::Starting) => " (health: starting)",
                Some(HealthState::Healthy) => " (healthy)",
                Some(HealthState::Unhealthy) => " (unhealthy)",
                None => "",
            };
            format!("Up {up}{}", if asked.state == State::Paused { " (Paused)" } else { health })
        }
    }
}

/// A condition on containers.
#[derive(Debug, PartialEq, Eq)]
enum Filter {
    Id(String),
    Name(String),
    Status(State),
    Ancestor(String),
    Label(String, Option<String>),
}

/// Whether filters take a container, of which `holds` says which are true: as in docker, one of each kind is enough, but all
/// labels must be there.
fn take(filters: &[Filter], holds: impl Fn(&Filter) -> bool) -> bool {
    filters.iter().all(|filter| {
        let mut like_it = filters.iter().filter(|other| discriminant(*other) == discriminant(filter));
        holds(filter) || !matches!(filter, Filter::Label(..)) && like_it.any(&holds)
    })
}

impl Filter {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let (key, value) = text.split_once('=').with_context(|| format!("the filter {text:?} is not KEY=VALUE"))?;
        let value = value.to_owned();
        Ok(match key {
            "id" => Self::Id(value),
            "name" => Self::Name(value),
            "status" => Self::Status(status(&value)?),
            "ancestor" => Self::Ancestor(value),
            "label" => match value.split_once('=') {
                Some((name, value)) => Self::Label(name.to_owned(), Some(value.to_owned())),
                None => Self::Label(value, None),
            },
            _ => bail!("there is no filter {key:?}: give id=, name=, status=, ancestor= or label="),
        })
    }

    fn takes(&self, asked: &Asked) -> bool {
        let record = &asked.status.record;
        match self {
            Self::Id(id) => record.id.starts_with(id.as_str()),
            Self::Name(name) => record.name.as_ref().is_some_and(|own| own.contains(name.as_str())),
            Self::Status(state) => asked.state == *state,
            Self::Ancestor(image) => is_of(image, &record.image, &record.image_id),
            Self::Label(name, value) => {
                let mut labels = record.labels.iter();
                labels.any(|(own, set)| own == name && value.as_ref().is_none_or(|value| value == set))
            }
        }
    }
}

fn status(word: &str) -> anyhow::Result<State> {
    State::from_str(word, false).ok().with_context(|| {
        let names = State::value_variants().iter().filter_map(ValueEnum::to_possible_value);
        let names: Vec<String> = names.map(|value| value.get_name().to_owned()).collect();
        format!("there is no status {word:?}: give {}", names.join(", "))
    })
}

/// Whether a word names an image: by its reference, however much of it is left to defaults, or by the beginning of its id.
fn is_of(word: &str, image: &str, id: &str) -> bool {
    let digits = |id: &str| id.strip_prefix("sha256:").unwrap_or(id).to_owned();
    let reference = |text: &str| text.parse::<Reference>().ok();
    let prefix = digits(word);
    word == image
        || (!prefix.is_empty() && digits(id).starts_with(&prefix))
        || reference(word).is_some_and(|named| reference(image) == Some(named))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read_or_refused() {
        assert_eq!(Filter::parse("status=exited").unwrap(), Filter::Status(State::Exited));
        assert_eq!(Filter::parse("status=restarting").unwrap(), Filter::Status(State::Restarting));
        assert_eq!(Filter::parse("label=a=b").unwrap(), Filter::Label("a".into(), Some("b".into())));
        assert_eq!(Filter::parse("label=a").unwrap(), Filter::Label("a".into(), None));
        assert!(Filter::parse("colour=red").is_err() && Filter::parse("name").is_err());
        let error = Filter::parse("status=runing").unwrap_err().to_string();
        assert!(error.contains("runing") && error.contains("creating, created, starting, running, paused"), "{error}");
    }

    #[test]
    fn one_filter_of_each_kind_is_enough_and_all_labels_must_be_there() {
        let true_ones = ["name=web", "status=running", "label=a=1", "label=b"];
        let true_ones = true_ones.map(|word| Filter::parse(word).unwrap());
        let taken = |words: &[&str]| {
            let filters: Vec<_> = words.iter().map(|word| Filter::parse(word).unwrap()).collect();
            take(&filters, |filter| true_ones.contains(filter))
        };
        assert!(taken(&[]) && taken(&["name=web", "name=other"]) && taken(&["status=exited", "status=running"]));
        assert!(!taken(&["name=web", "status=exited"]) && !taken(&["name=x", "name=y"]));
        assert!(taken(&["label=a=1", "label=b", "name=web"]) && !taken(&["label=a=1", "label=c"]));
    }

    #[test]
    fn an_image_is_named_by_its_reference_or_the_beginning_of_its_id() {
        let of = |word| is_of(word, "127.0.0.1:5000/busybox", "sha256:beef01");
        for word in ["127.0.0.1:5000/busybox", "127.0.0.1:5000/busybox:latest", "beef", "sha256:beef01"] {
            assert!(of(word), "{word}");
        }
        for word in ["sha256", "sha256:", "", "ef01", "busybox", "127.0.0.1:5000/busybox:1"] {
            assert!(!of(word), "{word}");
        }
        assert!(is_of("docker.io/library/busybox", "busybox", "sha256:00"));
    }

    #[test]
    fn long_commands_are_cut() {
        assert_eq!(shorten("sleep 1"), "sleep 1");
        assert_eq!(shorten(&"x".repeat(30)), "x".repeat(19) + "…");
    }
}

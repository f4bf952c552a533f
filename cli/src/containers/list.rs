//! `ps`: the containers there are.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use api::model::{ContainerStatus, HealthState};
use runtime::control::{Control, Status};
use runtime::state::RunRoot;
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
    state: ContainerStatus,
    status: String,
    exit_code: Option<u8>,
    health: Option<HealthState>,
    ports: Vec<String>,
    labels: BTreeMap<String, String>,
    #[serde(skip)]
    created_ns: u64,
}

/// Lists containers, newest first.
pub fn ps(args: &Ps) -> anyhow::Result<u8> {
    let filters = args.filter.iter().map(|filter| Filter::parse(filter)).collect::<anyhow::Result<Vec<_>>>()?;
    let root = RunRoot::open()?;
    let found = root.list()?;
    let by_status = filters.iter().any(|filter| matches!(filter, Filter::Status(_)));
    let rows: Vec<Row> = runtime::run::runtime()?.block_on(async {
        let mut rows = Vec::new();
        for found in found.into_iter().rev().filter(|found| found.alive || args.all || by_status) {
            let status = Control::new(&root, found).status().await;
            let runs =
                status.restarting || !matches!(status.state.status, ContainerStatus::Exited | ContainerStatus::Created);
            if (runs || args.all || by_status) && filters.iter().all(|filter| filter.takes(&status)) {
                rows.push(row(&status));
            }
        }
        anyhow::Ok(rows)
    })?;
    let id = |row: &Row| if args.no_trunc { row.id.clone() } else { row.id.chars().take(12).collect() };
    let text = if args.quiet {
        rows.iter().map(|row| id(row) + "\n").collect()
    } else {
        args.format.show(&rows, |rows| shown(rows, args.no_trunc, id))?
    };
    report::print(&text)?;
    Ok(0)
}

fn shown(rows: &[Row], whole: bool, id: impl Fn(&Row) -> String) -> String {
    let now = wall_clock_ns();
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let command = if whole { row.command.clone() } else { shorten(&row.command) };
            let name = row.name.clone().unwrap_or_else(|| row.id.chars().take(12).collect());
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

fn row(status: &Status) -> Row {
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
        state: status.state.status,
        status: words(status),
        exit_code: status.state.exit_code,
        health: status.health.as_ref().map(|health| health.status),
        ports: Vec::new(),
        labels: record.labels.iter().cloned().collect(),
    }
}

/// Where a container is in its life, in docker's words.
fn words(status: &Status) -> String {
    let now = wall_clock_ns();
    let since = |time: Option<u64>| now.saturating_sub(time.unwrap_or(now)) / 1_000_000_000;
    let state = &status.state;
    match state.status {
        ContainerStatus::Creating => "Creating".to_owned(),
        ContainerStatus::Created => "Created".to_owned(),
        ContainerStatus::Starting => "Starting".to_owned(),
        ContainerStatus::Exited if status.restarting => {
            let code = state.exit_code.unwrap_or_default();
            format!("Restarting ({code}) {}", table::ago(since(state.finished_ns)))
        }
        ContainerStatus::Exited => {
            let code = state.exit_code.unwrap_or_default();
            match state.finished_ns {
                Some(time) => format!("Exited ({code}) {}", table::ago(since(Some(time)))),
                None => format!("Exited ({code})"),
            }
        }
        ContainerStatus::Running | ContainerStatus::Paused => {
            let up = table::ago(since(state.started_ns));
            let up = up.strip_suffix(" ago").unwrap_or(&up);
            let health = match status.health.as_ref().map(|health| health.status) {
                Some(HealthState::Starting) => " (health: starting)",
                Some(HealthState::Healthy) => " (healthy)",
                Some(HealthState::Unhealthy) => " (unhealthy)",
                None => "",
            };
            let paused = if state.status == ContainerStatus::Paused { " (Paused)" } else { health };
            format!("Up {up}{paused}")
        }
    }
}

/// A condition on containers.
#[derive(Debug, PartialEq, Eq)]
enum Filter {
    Id(String),
    Name(String),
    Status(String),
    Ancestor(String),
    Label(String, Option<String>),
}

impl Filter {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let (key, value) = text.split_once('=').with_context(|| format!("the filter {text:?} is not KEY=VALUE"))?;
        let value = value.to_owned();
        Ok(match key {
            "id" => Self::Id(value),
            "name" => Self::Name(value),
            "status" => Self::Status(value),
            "ancestor" => Self::Ancestor(value),
            "label" => match value.split_once('=') {
                Some((name, value)) => Self::Label(name.to_owned(), Some(value.to_owned())),
                None => Self::Label(value, None),
            },
            _ => bail!("there is no filter {key:?}: give id=, name=, status=, ancestor= or label="),
        })
    }

    fn takes(&self, status: &Status) -> bool {
        let record = &status.record;
        match self {
            Self::Id(id) => record.id.starts_with(id.as_str()),
            Self::Name(name) => record.name.as_ref().is_some_and(|own| own.contains(name.as_str())),
            Self::Status(word) => serde_json::to_value(status.state.status).is_ok_and(|own| own == word.as_str()),
            Self::Ancestor(image) => record.image == *image || record.image_id.contains(image.as_str()),
            Self::Label(name, value) => {
                let mut labels = record.labels.iter();
                labels.any(|(own, set)| own == name && value.as_ref().is_none_or(|value| value == set))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read_or_refused() {
        assert_eq!(Filter::parse("status=exited").unwrap(), Filter::Status("exited".into()));
        assert_eq!(Filter::parse("label=a=b").unwrap(), Filter::Label("a".into(), Some("b".into())));
        assert_eq!(Filter::parse("label=a").unwrap(), Filter::Label("a".into(), None));
        assert!(Filter::parse("colour=red").is_err() && Filter::parse("name").is_err());
    }

    #[test]
    fn long_commands_are_cut() {
        assert_eq!(shorten("sleep 1"), "sleep 1");
        assert_eq!(shorten(&"x".repeat(30)), "x".repeat(19) + "…");
    }
}

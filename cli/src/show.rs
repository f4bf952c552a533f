//! The forms in which lists are shown: a table for people, JSON for programs, or some of the fields of the latter for scripts.
//!
//! All of them may end on a terminal, and some of what they hold are words of a monitor's, which its guest may have taken over.

use std::convert::Infallible;
use std::str::FromStr;

use anyhow::{Context as _, bail};
use serde::Serialize;
use serde_json::Value;

/// A form of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Table,
    /// For programs: one array of objects.
    Json,
    /// For scripts: these fields of the objects, a line for each object and tabs between them.
    Fields(Vec<String>),
}

impl FromStr for Format {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "table" => Self::Table,
            "json" => Self::Json,
            fields => Self::Fields(fields.split(',').map(|field| field.trim().to_owned()).collect()),
        })
    }
}

impl Format {
    /// Shows rows: `table` makes the one for people.
    ///
    /// # Errors
    /// There is no field of a name that was given.
    pub fn show<T: Serialize>(&self, rows: &[T], table: impl FnOnce(&[T]) -> String) -> anyhow::Result<String> {
        match self {
            Self::Table => Ok(table(rows)),
            Self::Json => Ok(json(rows)?),
            Self::Fields(fields) => rows.iter().map(|row| line(&serde_json::to_value(row)?, fields)).collect(),
        }
    }
}

/// JSON for programs, which does nothing to a terminal either.
///
/// # Errors
/// It does not encode.
pub fn json<T: Serialize + ?Sized>(value: &T) -> serde_json::Result<String> {
    Ok(escaped(&serde_json::to_string_pretty(value)?) + "\n")
}

/// JSON with those control characters escaped that JSON itself lets be: DEL, and those that begin a sequence for a terminal
/// where it reads 8-bit ones. They can only be in strings.
pub fn escaped(json: &str) -> String {
    json.chars().fold(String::with_capacity(json.len()), |mut text, c| {
        match c {
            '\u{7f}'..='\u{9f}' => text.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => text.push(c),
        }
        text
    })
}

fn line(row: &Value, fields: &[String]) -> anyhow::Result<String> {
    let cells: Vec<String> = fields.iter().map(|field| cell(row, field)).collect::<anyhow::Result<_>>()?;
    Ok(cells.join("\t") + "\n")
}

/// The field of a row; dots lead into objects.
fn cell(row: &Value, path: &str) -> anyhow::Result<String> {
    let mut value = row;
    for field in path.split('.') {
        if field.contains("{{") {
            bail!("--format takes table, json, or names of fields with commas between them, no templates");
        }
        let object =
            value.as_object().with_context(|| format!("there is no field {path:?}: nothing is below {field:?}"))?;
        value = object.get(field).with_context(|| {
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            format!("there is no field {field:?}: there are {}", names.join(", "))
        })?;
    }
    Ok(match value {
        // Output has lines, and whoever asks for it wants them.
        Value::String(text) => api::session::shown_whole(text),
        Value::Null => String::new(),
        other => escaped(&other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn show(format: &str, rows: &[Value]) -> anyhow::Result<String> {
        format.parse::<Format>().unwrap().show(rows, |rows| format!("{} rows", rows.len()))
    }

    #[test]
    fn rows_have_three_forms() {
        let rows = [json!({"id": "a", "n": 1, "in": {"side": true}}), json!({"id": "b", "n": null, "in": {"side": 2}})];
        assert_eq!(show("table", &rows).unwrap(), "2 rows");
        assert_eq!(serde_json::from_str::<Value>(&show("json", &rows).unwrap()).unwrap(), json!(rows));
        assert_eq!(show("id, n,in.side", &rows).unwrap(), "a\t1\ttrue\nb\t\t2\n");
    }

    #[test]
    fn no_form_drives_a_terminal() {
        let hostile = "\u{1b}]0;x\u{7}\u{9b}2J\u{7f}\n\tend";
        let rows = [json!({"text": hostile, "list": [hostile]})];
        for format in ["json", "text", "list", "text,list"] {
            let shown = show(format, &rows).unwrap();
            assert!(!shown.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\t')), "{format}: {shown:?}");
        }
        assert_eq!(serde_json::from_str::<Value>(&show("json", &rows).unwrap()).unwrap(), json!(rows));
    }

    #[test]
    fn a_field_that_is_not_there_is_an_error_with_those_that_are() {
        let rows = [json!({"id": "a", "name": "x"})];
        assert!(show("ids", &rows).unwrap_err().to_string().contains("id, name"));
        assert!(show("id.x", &rows).is_err());
        assert!(show("{{.Id}}", &rows).unwrap_err().to_string().contains("templates"));
    }
}

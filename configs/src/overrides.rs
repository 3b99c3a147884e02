//! Single keys from `--set section.key=value` and from `SPANWISE__SECTION__KEY=value`.
//!
//! A value is read as TOML (`4`, `true`, `[[0, 14], [14, 30]]`); what is no TOML value is a text, so that
//! paths and words need no quotes. A date is a text too: no key takes one, and folders are named so.

use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::{Table, Value};

use crate::error::Error;
use crate::keys::{self, Key};
use crate::schema::JobFile;

/// Environment variables that begin so are ours; one that names no key is refused.
pub const ENVIRONMENT_PREFIX: &str = "SPANWISE__";

/// A key that was given outside of the job file, and counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Override {
    /// Who gave it.
    pub source: OverrideSource,
    /// `section.key`.
    pub key: String,
    /// The value as it was given.
    pub value: String,
}

/// Where an override comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverrideSource {
    /// A variable `SPANWISE__SECTION__KEY`.
    Environment,
    /// A `--set section.key=value`, which counts for more.
    Set,
}

impl fmt::Display for OverrideSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Environment => "environment",
            Self::Set => "--set",
        })
    }
}

impl Serialize for OverrideSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for OverrideSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = String::deserialize(deserializer)?;
        let known = [Self::Environment, Self::Set].into_iter().find(|source| source.to_string() == word);
        known.ok_or_else(|| D::Error::custom(format_args!("expected environment or --set, found {word:?}")))
    }
}

/// An override that is right by itself.
#[derive(Debug, Clone)]
pub(crate) struct Checked {
    /// As it was given, for messages.
    pub(crate) label: String,
    pub(crate) key: Key,
    pub(crate) value: Value,
    pub(crate) shown: Override,
}

/// Reads the variables of our prefix, by name, so that the order of the environment does not matter.
pub(crate) fn from_environment(env: impl Iterator<Item = (String, String)>) -> Result<Vec<Checked>, Error> {
    let mut ours: Vec<_> = env.filter(|(name, _)| name.starts_with(ENVIRONMENT_PREFIX)).collect();
    ours.sort();
    ours.into_iter()
        .map(|(name, value)| {
            let label = label(&format!("{name}={value}"));
            let key = keys::all().find(|key| variable(*key) == name).ok_or_else(|| {
                let near = keys::nearest(&name, keys::all().map(variable));
                let hint = match near {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => list_sections(&format!("{ENVIRONMENT_PREFIX}SECTION__KEY")),
                };
                Error::new("no such key").hint(hint).in_override(&label)
            })?;
            check(OverrideSource::Environment, label, key, &value)
        })
        .collect()
}

/// Reads the values of `--set`, in their order.
pub(crate) fn from_sets(sets: &[String]) -> Result<Vec<Checked>, Error> {
    sets.iter()
        .map(|set| {
            let label = label(&format!("--set {set}"));
            let (name, value) = set
                .split_once('=')
                .ok_or_else(|| Error::new("expected section.key=value").in_override(&label))?;
            let key = find(name.trim()).map_err(|error| error.in_override(&label))?;
            check(OverrideSource::Set, label, key, value)
        })
        .collect()
}

/// Those that no later one overrides.
pub(crate) fn effective(overrides: Vec<Checked>) -> Vec<Override> {
    let is_last = |idx: usize| overrides[idx + 1..].iter().all(|later| later.key != overrides[idx].key);
    (0..overrides.len()).filter(|&idx| is_last(idx)).map(|idx| overrides[idx].shown.clone()).collect()
}

/// Longest label in a message; a whole prompt may stand in an override.
const MAX_LABEL: usize = 100;

fn label(text: &str) -> String {
    if text.chars().count() <= MAX_LABEL {
        return text.escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'");
    }
    label(&text.chars().take(MAX_LABEL - 1).chain(['…']).collect::<String>())
}

fn variable(key: Key) -> String {
    format!("{ENVIRONMENT_PREFIX}{}__{}", key.section.to_uppercase(), key.name.to_uppercase())
}

fn find(name: &str) -> Result<Key, Error> {
    if let Some(key) = keys::all().find(|key| key.to_string() == name) {
        return Ok(key);
    }
    if keys::sections().contains(&name) {
        let message = format!("[{name}] can't be set as a whole, only its keys one by one");
        return Err(Error::new(message).hint(format!("the keys are {}", keys::keys_of(name).join(", "))));
    }
    // `threads` alone, or in the wrong section, is likely to mean the keys of that name.
    let last = name.rsplit('.').next().unwrap_or(name);
    let namesakes: Vec<_> =
        keys::all().filter(|key| key.name == last).map(|key| format!("`{key}`")).collect();
    let hint = match (&namesakes[..], keys::nearest(name, keys::all().map(|key| key.to_string()))) {
        ([], Some(near)) => format!("did you mean `{near}`?"),
        ([], None) => list_sections("section.key"),
        (namesakes, _) => format!("did you mean {}?", namesakes.join(" or ")),
    };
    Err(Error::new(format!("unknown key `{name}`")).hint(hint))
}

fn list_sections(form: &str) -> String {
    format!("keys are named {form}, the sections are {}", keys::sections().join(", "))
}

fn check(source: OverrideSource, label: String, key: Key, text: &str) -> Result<Checked, Error> {
    let text = text.trim();
    let value = match text.parse() {
        Err(_) | Ok(Value::Datetime(_)) => Value::String(text.to_owned()),
        Ok(value) => value,
    };
    if let Err((path, message)) = check_alone(key, value.clone()) {
        // The label names the key already; an element of its list is worth a word.
        let message = if path == key.to_string() { message } else { format!("{path}: {message}") };
        return Err(Error::new(message).hint(quoting_hint(source, key, text, &value)).in_override(&label));
    }
    let shown = Override { source, key: key.to_string(), value: text.to_owned() };
    Ok(Checked { label, key, value, shown })
}

/// Deserialises a job file of this one key. The error is a path and what is wrong there.
fn check_alone(key: Key, value: Value) -> Result<(), (String, String)> {
    let section = Table::from_iter([(key.name.to_owned(), value)]);
    let table = Table::from_iter([(key.section.to_owned(), Value::Table(section))]);
    match serde_path_to_error::deserialize::<_, JobFile>(table) {
        Ok(_) => Ok(()),
        Err(error) => Err((error.path().to_string(), error.inner().message().to_owned())),
    }
}

/// The usual mistake is about quotes: those that TOML wants and a shell takes away, or the missing ones
/// around a text that looks like a number.
fn quoting_hint(source: OverrideSource, key: Key, text: &str, value: &Value) -> Option<String> {
    if value.is_str() {
        let hint = "this is no TOML value and was taken as text; a list of texts is written '[\"a\", \"b\"]', \
                    with the outer quotes for the shell";
        return text.starts_with(['[', '{']).then(|| hint.to_owned());
    }
    let quoted = Value::String(text.to_owned());
    check_alone(key, quoted.clone()).is_ok().then(|| match source {
        OverrideSource::Set => format!("to give it as text, write --set '{key}={quoted}'"),
        OverrideSource::Environment => format!("to give it as text, write {}='{quoted}'", variable(key)),
    })
}

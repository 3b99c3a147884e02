//! File < environment < `--set`, joined key by key, with the origin of each key kept.
//!
//! The `config` crate joins and remembers; it never converts, as it would turn 4.7 into 5.

use std::collections::HashMap;

use config::{Config, ConfigError, Map, Source, ValueKind};
use toml::{Table, Value};

use crate::overrides::Checked;

/// All layers as one.
pub(crate) struct Joined {
    sections: Map<String, config::Value>,
}

/// Where a key's value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin<'a> {
    /// Nowhere: it has its default.
    Default,
    File,
    /// An override, by its label.
    Override(&'a str),
}

/// The origin that the `config` crate keeps with each value of the file. No override has an empty label.
const FILE: &str = "";

impl Joined {
    pub(crate) fn join(file: &Table, overrides: &[Checked]) -> Result<Self, ConfigError> {
        let file = file.iter().map(|(name, value)| (name.clone(), to_config(value, FILE))).collect();
        let overrides = overrides.iter().map(|given| {
            let value = to_config(&given.value, &given.label);
            let section = HashMap::from([(given.key.name.to_owned(), value)]);
            HashMap::from([(given.key.section.to_owned(), config::Value::from(section))])
        });
        let layers = std::iter::once(file).chain(overrides);
        let builder = layers.fold(Config::builder(), |builder, layer| builder.add_source(Layer(layer)));
        Ok(Self { sections: builder.build()?.collect()? })
    }

    pub(crate) fn has_section(&self, section: &str) -> bool {
        self.sections.contains_key(section)
    }

    pub(crate) fn origin(&self, section: &str, name: &str) -> Origin<'_> {
        let value = match self.sections.get(section).map(|section| &section.kind) {
            Some(ValueKind::Table(section)) => section.get(name),
            _ => None,
        };
        match value.map(|value| value.origin()) {
            None => Origin::Default,
            Some(None | Some(FILE)) => Origin::File,
            Some(Some(label)) => Origin::Override(label),
        }
    }

    /// The same as TOML values, to be read strictly.
    pub(crate) fn to_toml(&self) -> Table {
        self.sections.iter().map(|(name, value)| (name.clone(), from_config(value))).collect()
    }
}

#[derive(Debug, Clone)]
struct Layer(Map<String, config::Value>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, config::Value>, ConfigError> {
        Ok(self.0.clone())
    }
}

fn to_config(value: &Value, origin: &str) -> config::Value {
    let kind = match value {
        Value::String(text) => ValueKind::String(text.clone()),
        Value::Integer(n) => ValueKind::I64(*n),
        Value::Float(x) => ValueKind::Float(*x),
        Value::Boolean(flag) => ValueKind::Boolean(*flag),
        Value::Array(list) => ValueKind::Array(list.iter().map(|value| to_config(value, origin)).collect()),
        Value::Table(table) => ValueKind::Table(
            table.iter().map(|(key, value)| (key.clone(), to_config(value, origin))).collect(),
        ),
        Value::Datetime(date) => unreachable!("no key takes a date, and {date} passed the check"),
    };
    config::Value::new(Some(&origin.to_owned()), kind)
}

fn from_config(value: &config::Value) -> Value {
    match &value.kind {
        ValueKind::String(text) => Value::String(text.clone()),
        ValueKind::I64(n) => Value::Integer(*n),
        ValueKind::Float(x) => Value::Float(*x),
        ValueKind::Boolean(flag) => Value::Boolean(*flag),
        ValueKind::Array(list) => Value::Array(list.iter().map(from_config).collect()),
        ValueKind::Table(table) => {
            Value::Table(table.iter().map(|(key, value)| (key.clone(), from_config(value))).collect())
        }
        other => unreachable!("no layer holds {other:?}"),
    }
}

//! Reading a JSON object key by key, with errors that name the key, what was found and what was expected.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Bounds far beyond any model, below which no product of sizes in this project overflows 64 bits: twice
/// three matrices of width · hidden in each of 4,096 blocks are 2^60.6 operations.
pub(crate) const MAX_COUNT: usize = 1 << 26;

/// A JSON object and where it stands, for errors that name the key.
pub(crate) struct Fields<'a> {
    pub(crate) path: &'a Path,
    /// Keys on the way here, each with a dot.
    pub(crate) prefix: String,
    pub(crate) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The value of a key; null is absent.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn object(&self, key: &str, value: &'a Value) -> Result<Fields<'a>> {
        let Value::Object(map) = value else { return Err(self.error(key, value, "an object")) };
        Ok(Fields { path: self.path, prefix: format!("{}{key}.", self.prefix), map })
    }

    pub(crate) fn half(&self, key: &str) -> Result<Fields<'a>> {
        match self.value(key) {
            Some(value) => self.object(key, value),
            None => Err(self.error(key, "nothing", "an object")),
        }
    }

    pub(crate) fn count(&self, key: &str) -> Result<usize> {
        self.count_up_to(key, MAX_COUNT)
    }

    pub(crate) fn count_up_to(&self, key: &str, most: usize) -> Result<usize> {
        let expected = format!("a whole number from 1 to {most}");
        match self.value(key) {
            Some(value) => {
                as_count(value).filter(|&n| n <= most).ok_or_else(|| self.error(key, value, expected))
            }
            None => Err(self.error(key, "nothing", expected)),
        }
    }

    pub(crate) fn positive(&self, key: &str) -> Result<f64> {
        match self.value(key).map(|value| (value, value.as_f64())) {
            Some((_, Some(number))) if number > 0.0 && number.is_finite() => Ok(number),
            Some((value, _)) => Err(self.error(key, value, "a number above 0")),
            None => Err(self.error(key, "nothing", "a number above 0")),
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<bool> {
        match self.value(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.error(key, other, "true or false")),
        }
    }

    /// An error if the key asks for something: false, null and 0 ask for nothing.
    pub(crate) fn refuse(&self, key: &str) -> Result<()> {
        match self.value(key) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(Value::Number(number)) if number.as_f64() == Some(0.0) => Ok(()),
            Some(Value::Array(list)) if list.is_empty() => Ok(()),
            Some(other) => Err(self.error(key, other, "nothing: it is not implemented")),
        }
    }

    pub(crate) fn error(&self, key: &str, found: impl ToString, expected: impl ToString) -> Error {
        Error::Config {
            path: PathBuf::from(self.path),
            key: format!("{}{key}", self.prefix),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}

pub(crate) fn as_count(value: &Value) -> Option<usize> {
    value.as_u64().filter(|&n| n > 0).and_then(|n| usize::try_from(n).ok())
}

//! How one value is read: what a key expects, said in the same words wherever it meets something else.
//!
//! No value is coerced: `4.7` is no integer, `"5"` is no number, and only an integer may stand where a
//! real number is expected.

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::devices::DeviceList;
use crate::types::Device;

/// A TOML value that is neither list nor table.
#[derive(Clone, Copy)]
pub(crate) enum Scalar<'a> {
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(&'a str),
}

impl<'a> Scalar<'a> {
    /// The text, and not an empty one.
    pub(crate) fn text(self) -> Option<&'a str> {
        match self {
            Self::Text(text) if !text.is_empty() => Some(text),
            _ => None,
        }
    }

    pub(crate) fn integer<T: TryFrom<i64>>(self, least: i64) -> Option<T> {
        match self {
            Self::Integer(n) if n >= least => T::try_from(n).ok(),
            _ => None,
        }
    }

    fn number(self) -> Option<f64> {
        match self {
            Self::Integer(n) => Some(n as f64),
            Self::Float(x) => Some(x),
            _ => None,
        }
    }
}

impl fmt::Display for Scalar<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Integer(value) => write!(f, "{value}"),
            Self::Float(value) if value.is_nan() => f.write_str("nan"),
            Self::Float(value) => write!(f, "{value:?}"),
            Self::Text(value) => write!(f, "{value:?}"),
        }
    }
}

/// Reads a key that takes a scalar. `read` says `None` to what is not `expected`.
pub(crate) fn scalar<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    expected: &str,
    read: impl Fn(Scalar<'_>) -> Option<T>,
) -> Result<T, D::Error> {
    let list = None::<fn(Vec<IgnoredAny>) -> Result<T, String>>;
    deserializer.deserialize_any(Reader { expected, scalar: read, list, types: PhantomData })
}

/// Reads a key that takes a list, or a scalar in its place.
pub(crate) fn scalar_or_list<'de, D: Deserializer<'de>, T, E: Deserialize<'de>>(
    deserializer: D,
    expected: &str,
    read: impl Fn(Scalar<'_>) -> Option<T>,
    list: impl Fn(Vec<E>) -> Result<T, String>,
) -> Result<T, D::Error> {
    deserializer.deserialize_any(Reader { expected, scalar: read, list: Some(list), types: PhantomData })
}

struct Reader<'a, S, L, T, E> {
    expected: &'a str,
    scalar: S,
    list: Option<L>,
    types: PhantomData<(T, E)>,
}

impl<S: Fn(Scalar<'_>) -> Option<T>, L, T, E> Reader<'_, S, L, T, E> {
    fn read<F: Error>(&self, found: Scalar<'_>) -> Result<T, F> {
        (self.scalar)(found).ok_or_else(|| self.unexpected(found))
    }

    fn unexpected<F: Error>(&self, found: impl fmt::Display) -> F {
        F::custom(format_args!("expected {}, found {found}", self.expected))
    }
}

impl<'de, S, L, T, E> Visitor<'de> for Reader<'_, S, L, T, E>
where
    S: Fn(Scalar<'_>) -> Option<T>,
    L: Fn(Vec<E>) -> Result<T, String>,
    E: Deserialize<'de>,
{
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_bool<F: Error>(self, value: bool) -> Result<T, F> {
        self.read(Scalar::Bool(value))
    }

    fn visit_i64<F: Error>(self, value: i64) -> Result<T, F> {
        self.read(Scalar::Integer(value))
    }

    // TOML's integers are i64; other formats (a manifest in JSON) hand over small ones as u64.
    fn visit_u64<F: Error>(self, value: u64) -> Result<T, F> {
        self.visit_i128(value.into())
    }

    fn visit_i128<F: Error>(self, value: i128) -> Result<T, F> {
        match i64::try_from(value) {
            Ok(value) => self.read(Scalar::Integer(value)),
            Err(_) => Err(self.unexpected(value)),
        }
    }

    fn visit_u128<F: Error>(self, value: u128) -> Result<T, F> {
        Err(self.unexpected(value))
    }

    fn visit_f64<F: Error>(self, value: f64) -> Result<T, F> {
        self.read(Scalar::Float(value))
    }

    fn visit_str<F: Error>(self, value: &str) -> Result<T, F> {
        self.read(Scalar::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<T, A::Error> {
        let Some(list) = &self.list else { return Err(self.unexpected("a list")) };
        let mut elements = Vec::new();
        while let Some(element) = seq.next_element()? {
            elements.push(element);
        }
        list(elements).map_err(A::Error::custom)
    }

    // The toml crate hands dates over as a table with one private key.
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<T, A::Error> {
        let key: Option<String> = map.next_key()?;
        let is_date = key.is_some_and(|key| key.starts_with("$__toml_private"));
        Err(self.unexpected(if is_date { "a date" } else { "a table" }))
    }
}

pub(crate) fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    scalar(deserializer, "a path", |found| found.text().map(PathBuf::from))
}

pub(crate) fn devices<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Device>, D::Error> {
    let expected = "a list of devices such as [\"cpu:0\", \"cpu:1\"]";
    scalar_or_list(
        deserializer,
        expected,
        |_| None,
        |devices: Vec<Device>| match devices[..] {
            [] => Err(format!("expected {expected}, found an empty list")),
            _ => Ok(devices),
        },
    )
}

/// A text that is not empty.
pub(crate) fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    scalar(deserializer, "a text that is not empty", |found| found.text().map(str::to_owned))
}

pub(crate) fn any_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    scalar(deserializer, "a text", |found| match found {
        Scalar::Text(text) => Some(Some(text.to_owned())),
        _ => None,
    })
}

pub(crate) fn flag<'de, D: Deserializer<'de>, T: From<bool>>(deserializer: D) -> Result<T, D::Error> {
    scalar(deserializer, "true or false", |found| match found {
        Scalar::Bool(value) => Some(value.into()),
        _ => None,
    })
}

/// An integer of at least 1.
pub(crate) fn positive<'de, D: Deserializer<'de>, T: From<usize>>(deserializer: D) -> Result<T, D::Error> {
    scalar(deserializer, "an integer of at least 1", |found| found.integer::<usize>(1).map(T::from))
}

/// What an hour costs.
pub(crate) fn price<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    scalar(deserializer, "a number of at least 0", |found| {
        found.number().filter(|x| *x >= 0.0 && x.is_finite()).map(Some)
    })
}

pub(crate) fn device_list<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<DeviceList>, D::Error> {
    let expected = "devices such as \"8xh200\" or \"4xh100-80gb,2xh200\"";
    scalar(deserializer, expected, |found| found.text().and_then(|text| text.parse().ok()).map(Some))
}

/// As many runs as the model cards of reasoning models take the mean of.
pub(crate) fn runs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    scalar(deserializer, "an integer from 1 to 16", |found| found.integer(1).filter(|&runs: &u32| runs <= 16))
}

pub(crate) fn seed<'de, D: Deserializer<'de>, T: From<u64>>(deserializer: D) -> Result<T, D::Error> {
    scalar(deserializer, "an integer from 0 to 2^63 - 1", |found| found.integer::<u64>(0).map(T::from))
}

/// An integer that the engine keeps as u32: token counts of one row, token ids.
pub(crate) fn small<'de, D: Deserializer<'de>, T: From<u32>>(deserializer: D) -> Result<T, D::Error> {
    scalar(deserializer, "an integer from 0 to 2^32 - 1", |found| found.integer::<u32>(0).map(T::from))
}

pub(crate) fn top_k<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    scalar(deserializer, "an integer of at least 0 (0 keeps all tokens)", |found| found.integer(0).map(Some))
}

/// OpenAI's range of temperatures.
pub(crate) fn temperature<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    scalar(deserializer, "a number from 0 to 2", |found| {
        found.number().filter(|x| (0.0..=2.0).contains(x)).map(Some)
    })
}

/// A factor between logits.
pub(crate) fn repetition_penalty<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<f64>, D::Error> {
    scalar(deserializer, "a number from 0.01 to 100", |found| {
        found.number().filter(|x| (0.01..=100.0).contains(x)).map(Some)
    })
}

/// OpenAI's range of penalties.
pub(crate) fn penalty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    scalar(deserializer, "a number from -2 to 2", |found| {
        found.number().filter(|x| (-2.0..=2.0).contains(x)).map(Some)
    })
}

/// A share that may be nothing at all.
pub(crate) fn share<'de, D: Deserializer<'de>, T: From<f64>>(deserializer: D) -> Result<T, D::Error> {
    scalar(deserializer, "a number from 0 to 1", |found| {
        found.number().filter(|x| (0.0..=1.0).contains(x)).map(T::from)
    })
}

/// A share of the probability that must be something.
pub(crate) fn positive_share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    scalar(deserializer, "a number above 0 and up to 1", |found| {
        found.number().filter(|x| *x > 0.0 && *x <= 1.0).map(Some)
    })
}

/// One text or a list of them.
pub(crate) fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    scalar_or_list(
        deserializer,
        "a text that is not empty, or a list of such",
        |found| found.text().map(|text| Some(vec![text.to_owned()])),
        |texts: Vec<Text>| Ok(Some(texts.into_iter().map(|Text(text)| text).collect())),
    )
}

pub(crate) fn token_ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<u32>>, D::Error> {
    scalar_or_list(
        deserializer,
        "a list of token ids such as [2, 7]",
        |_| None,
        |ids: Vec<TokenId>| Ok(Some(ids.into_iter().map(|TokenId(id)| id).collect())),
    )
}

struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text(deserializer).map(Self)
    }
}

struct TokenId(u32);

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        small(deserializer).map(Self)
    }
}

//! The names that a job file may use, taken from the structs themselves, and the nearest of them to a
//! name that is none.

use serde::de::value::Error;
use serde::de::{Deserialize, Deserializer, Error as _, Visitor};
use serde::forward_to_deserialize_any;

use crate::schema::{Grade, Job, JobFile, Model, Pipeline, Plan, Prompt, Sampling};

/// `section.key`, both known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) section: &'static str,
    pub(crate) name: &'static str,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.section, self.name)
    }
}

/// The sections in the order of [`JobFile`].
pub(crate) fn sections() -> &'static [&'static str] {
    fields_of::<JobFile>()
}

/// The keys of a section that [`sections`] names.
pub(crate) fn keys_of(section: &str) -> &'static [&'static str] {
    match section {
        "model" => fields_of::<Model>(),
        "pipeline" => fields_of::<Pipeline>(),
        "job" => fields_of::<Job>(),
        "prompt" => fields_of::<Prompt>(),
        "sampling" => fields_of::<Sampling>(),
        "grade" => fields_of::<Grade>(),
        "plan" => fields_of::<Plan>(),
        _ => unreachable!("section {section} has no struct"),
    }
}

/// Every key, section by section.
pub(crate) fn all() -> impl Iterator<Item = Key> {
    sections().iter().flat_map(|&section| keys_of(section).iter().map(move |&name| Key { section, name }))
}

/// How alike two names must be for one to be taken for a misspelling of the other. `thread` is 0.86 like
/// `threads` and `device` 0.86 like `devices`; below two thirds the guesses read like noise.
const LEAST_SIMILARITY: f64 = 0.66;

/// The known name that `name` is probably meant to be.
pub(crate) fn nearest<T: AsRef<str>>(name: &str, known: impl IntoIterator<Item = T>) -> Option<T> {
    let name = name.to_lowercase().replace('-', "_");
    known
        .into_iter()
        .map(|known| (strsim::normalized_damerau_levenshtein(&name, &known.as_ref().to_lowercase()), known))
        .filter(|(similarity, _)| *similarity >= LEAST_SIMILARITY)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, known)| known)
}

/// The names of a struct's fields, as serde's derive knows them.
fn fields_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    // It ends in an error as soon as the fields are known: there is nothing to fill them with.
    let _ = T::deserialize(Fields(&mut fields));
    fields
}

struct Fields<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Fields<'_> {
    type Error = Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Error> {
        *self.0 = fields;
        Err(Error::custom("only the names were asked for"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Error> {
        Err(Error::custom("not a struct"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_section_has_its_keys() {
        assert_eq!(sections(), ["model", "pipeline", "job", "prompt", "sampling", "grade", "plan"]);
        for section in sections() {
            assert!(!keys_of(section).is_empty(), "{section}");
        }
        assert_eq!(keys_of("prompt"), ["system", "user"]);
    }

    #[test]
    fn the_nearest_name_is_found_through_case_dashes_and_swapped_letters() {
        let known = keys_of("pipeline");
        assert_eq!(nearest("micro_batch_token", known), Some(&"micro_batch_tokens"));
        assert_eq!(nearest("Max-Sequences", known), Some(&"max_sequences"));
        assert_eq!(nearest("smid", known), Some(&"simd"));
        assert_eq!(nearest("thraeds", known), Some(&"threads"));
        assert_eq!(nearest("batch", known), None);
    }
}

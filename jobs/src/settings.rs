//! What decides a job's answers, by the names its user knows, so that a later run can tell whether it
//! would give the same ones.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::manifest::NumericProfile;

/// Settings by name, each as JSON.
pub type Named = BTreeMap<String, Value>;

/// All that an answer depends on beside its row.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Settings {
    /// What other answers would come from: model, prompt, sampling, seed, number types.
    pub answers: Named,
    /// What may change an answer's last bits, and with them a token here and there.
    pub numerics: Named,
    /// What the keys of rows are made of beside the rows, word for word: who has only this and the input
    /// knows every row again. It follows from `answers`, and is not compared.
    #[serde(default)]
    pub identity: Vec<String>,
    /// The stages of the job's first run, in the order of the pipeline. Later runs keep what of it decides an answer's last bits,
    /// and that stands in `numerics`; so it is not compared.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layout: Vec<StageShape>,
}

/// A stage as far as it may decide an answer's last bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageShape {
    /// Its blocks, `[start, end)`.
    pub blocks: [usize; 2],
    /// Its first column of the first block's FFN; 0 where it has the whole block.
    pub first_column: usize,
    /// The end of its columns of the last block's FFN, where it has not all.
    pub end_column: Option<usize>,
    /// Devices that share it.
    pub ranks: usize,
    /// Blocks whose attention these share by sequences, which journals call by a shorter name.
    #[serde(rename = "by_sequences", default, skip_serializing_if = "Vec::is_empty")]
    pub attention_by_sequences: Vec<usize>,
    /// Blocks whose attention the first of them has alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attention_on_first_rank: Vec<usize>,
    /// The same of their FFNs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ffn_on_first_rank: Vec<usize>,
}

/// The setting that [`NumericProfile::backend`] is.
const BACKEND: &str = "backend";

impl Settings {
    /// What numbers are computed on, as [`NumericProfile::backend`] calls it, where that was said.
    pub fn backend(&self) -> Option<&str> {
        self.numerics.get(BACKEND)?.as_str()
    }

    /// Adds a setting that answers depend on.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.answers.insert(name.to_owned(), value.into());
        self
    }

    /// Adds the stages that the job has from now on.
    pub fn with_layout(self, layout: Vec<StageShape>) -> Self {
        Settings { layout, ..self }
    }

    /// Adds how numbers are computed. Number types are settings of their own, which nobody changes
    /// without meaning to.
    pub fn with_numerics(self, profile: &NumericProfile) -> Self {
        let NumericProfile {
            backend,
            simd,
            dtype,
            kv_cache_dtype,
            tensor_parallel,
            tensor_parallel_stages,
            deterministic,
        } = profile;
        let mut settings =
            self.with("model.dtype", dtype.as_str()).with("pipeline.kv_cache_dtype", kv_cache_dtype.as_str());
        let numerics: [(&str, Value); 3] = [
            (BACKEND, backend.as_str().into()),
            ("pipeline.simd", simd.as_str().into()),
            ("tensor parallel width", (*tensor_parallel).into()),
        ];
        settings.numerics.extend(numerics.map(|(name, value)| (name.to_owned(), value)));
        if let Some(stages) = tensor_parallel_stages {
            settings.numerics.insert("tensor parallel stages".to_owned(), stages.as_str().into());
        }
        if !deterministic {
            settings.numerics.insert("pipeline.deterministic".to_owned(), false.into());
        }
        settings
    }
}

/// What is different, a line each; nothing where all is the same.
pub(crate) fn changes(before: &Named, now: &Named) -> Option<String> {
    let mut changes = String::new();
    let names = before.keys().chain(now.keys().filter(|name| !before.contains_key(*name)));
    for name in names {
        let (was, is) = (show(before.get(name)), show(now.get(name)));
        if was != is {
            write!(changes, "\n  {name}: was {was}, is {is}").expect("a String takes all");
        }
    }
    (!changes.is_empty()).then_some(changes)
}

fn show(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "not set".to_owned(),
        Some(value) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_of_earlier_journals_share_all_that_they_do_not_name() {
        let read = |text: &str| serde_json::from_str::<StageShape>(text).unwrap();
        let earlier =
            read(r#"{"blocks":[0,9],"first_column":0,"end_column":null,"ranks":2,"by_sequences":[4]}"#);
        assert_eq!(earlier.attention_by_sequences, [4]);
        assert!(earlier.attention_on_first_rank.is_empty() && earlier.ffn_on_first_rank.is_empty());
        let now = StageShape { attention_on_first_rank: vec![1], ffn_on_first_rank: vec![2, 3], ..earlier };
        let written = serde_json::to_string(&now).unwrap();
        assert_eq!(read(&written), now);
        assert!(written.contains(r#""by_sequences":[4]"#), "an earlier program reads {written}");
    }

    #[test]
    fn a_change_is_named_with_both_values() {
        let before = Settings::default().with("job.seed", 1).with("prompt.user", "a").with("gone", true);
        let now = Settings::default().with("job.seed", 2).with("prompt.user", "a").with("new", 0.5);
        assert_eq!(
            changes(&before.answers, &now.answers).unwrap(),
            "\n  gone: was true, is not set\n  job.seed: was 1, is 2\n  new: was not set, is 0.5"
        );
        assert_eq!(changes(&now.answers, &now.answers), None);
    }
}

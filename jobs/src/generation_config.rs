//! `generation_config.json`: how a model's authors would have tokens chosen.
//!
//! What this engine can honour becomes a default; what it cannot is named in a warning, because the
//! model may well answer worse without it.

use std::path::Path;

use scheduler::TokenId;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::json::{show, sorted};
use crate::sampling::SamplingOptions;

/// What the file says; nothing, where there is none.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct GenerationConfig {
    pub(crate) sampling: SamplingOptions,
    pub(crate) eos_token_ids: Vec<TokenId>,
    /// Fields that would change the answers and are not honoured, with their values.
    pub(crate) not_honoured: Vec<String>,
}

impl GenerationConfig {
    pub(crate) fn open(dir: &Path) -> Result<GenerationConfig> {
        let path = dir.join("generation_config.json");
        let Some(json) = read_object(&path)? else { return Ok(GenerationConfig::default()) };
        GenerationConfig::from_json(&json).map_err(|message| Error::malformed(&path, message))
    }

    fn from_json(json: &Map<String, Value>) -> Result<GenerationConfig, String> {
        let mut sampling = SamplingOptions {
            temperature: number(json, "temperature")?,
            top_p: number(json, "top_p")?,
            top_k: json
                .get("top_k")
                .filter(|value| !value.is_null())
                .map(|value| integer("top_k", value))
                .transpose()?,
            min_p: number(json, "min_p")?,
            repetition_penalty: number(json, "repetition_penalty")?,
            ..SamplingOptions::default()
        };
        // Only when it is stated: files that say nothing mean a sampling that suits the model.
        match json.get("do_sample") {
            None | Some(Value::Null | Value::Bool(true)) => {}
            Some(Value::Bool(false)) => sampling.temperature = Some(0.0),
            Some(other) => return Err(format!("do_sample: expected true or false, found {}", show(other))),
        }
        sampling.check().map_err(|(name, message)| format!("{name}: {message}"))?;
        let not_honoured = sorted(json)
            .into_iter()
            .filter(|(name, value)| changes_answers(name, value))
            .map(|(name, value)| format!("{name} {}", show(value)))
            .collect();
        let eos_token_ids = json.get("eos_token_id").map_or(Ok(Vec::new()), token_ids)?;
        Ok(GenerationConfig { sampling, eos_token_ids, not_honoured })
    }
}

/// A JSON object from a file; `None` where there is no file.
pub(crate) fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::read(path, error)),
    };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(other) => Err(Error::malformed(path, format!("expected an object, found {}", show(&other)))),
        Err(error) => Err(Error::malformed(path, error)),
    }
}

/// Whether a field makes transformers generate otherwise than its absence would.
fn changes_answers(name: &str, value: &Value) -> bool {
    let differs = |neutral: f64| value.as_f64().is_some_and(|number| number != neutral);
    match name {
        "encoder_repetition_penalty" | "typical_p" | "num_beams" | "num_beam_groups" | "guidance_scale" => {
            differs(1.0)
        }
        "no_repeat_ngram_size"
        | "encoder_no_repeat_ngram_size"
        | "epsilon_cutoff"
        | "eta_cutoff"
        | "diversity_penalty"
        | "penalty_alpha"
        | "min_length"
        | "min_new_tokens"
        | "frequency_penalty"
        | "presence_penalty"
        | "top_h" => differs(0.0),
        "bad_words_ids"
        | "force_words_ids"
        | "suppress_tokens"
        | "begin_suppress_tokens"
        | "sequence_bias"
        | "forced_bos_token_id"
        | "forced_eos_token_id"
        | "forced_decoder_ids"
        | "constraints"
        | "exponential_decay_length_penalty"
        | "stop_strings"
        | "dola_layers" => !is_empty(value),
        _ => false,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn number(json: &Map<String, Value>, name: &str) -> Result<Option<f64>, String> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) => Ok(number.as_f64()),
        Some(other) => Err(format!("{name}: expected a number, found {}", show(other))),
    }
}

/// An integer, also one that a tool wrote as `50.0`.
fn integer(name: &str, value: &Value) -> Result<i64, String> {
    // From 2^53 on a float no longer tells which integer was meant.
    let is_whole = |float: &f64| float.fract() == 0.0 && float.abs() < (1u64 << 53) as f64;
    let whole = || value.as_f64().filter(is_whole).map(|float| float as i64);
    let integer = value.as_i64().or_else(whole);
    integer.ok_or_else(|| format!("{name}: expected an integer, found {}", show(value)))
}

/// Token ids written as one or as a list.
fn token_ids(value: &Value) -> Result<Vec<TokenId>, String> {
    let one = |value: &Value| {
        value
            .as_u64()
            .and_then(|id| TokenId::try_from(id).ok())
            .ok_or_else(|| format!("eos_token_id: expected a token id, found {}", show(value)))
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(items) => items.iter().map(one).collect(),
        value => one(value).map(|id| vec![id]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<GenerationConfig, String> {
        GenerationConfig::from_json(serde_json::from_str::<Value>(json).unwrap().as_object().unwrap())
    }

    #[test]
    fn its_sampling_becomes_the_default() {
        let config = read(
            r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": null, "repetition_penalty": 1.05,
            "eos_token_id": [7, 8], "max_length": 4096, "pad_token_id": 7}"#,
        );
        let config = config.unwrap();
        assert_eq!(
            config.sampling,
            SamplingOptions {
                temperature: Some(0.6),
                top_p: Some(0.95),
                top_k: Some(20),
                repetition_penalty: Some(1.05),
                ..SamplingOptions::default()
            }
        );
        assert_eq!(config.eos_token_ids, [7, 8]);
        assert!(config.not_honoured.is_empty());
    }

    #[test]
    fn do_sample_false_means_greedy_only_when_it_is_stated() {
        let greedy = read(r#"{"do_sample": false, "temperature": 0.7}"#).unwrap();
        assert_eq!(greedy.sampling.temperature, Some(0.0));
        assert_eq!(read(r#"{"temperature": 0.7}"#).unwrap().sampling.temperature, Some(0.7));
    }

    #[test]
    fn what_is_not_honoured_is_named_with_its_value() {
        let config =
            read(r#"{"num_beams": 4, "typical_p": 1.0, "bad_words_ids": [[3]], "suppress_tokens": []}"#);
        assert_eq!(config.unwrap().not_honoured, ["bad_words_ids [[3]]", "num_beams 4"]);
    }

    #[test]
    fn values_that_cannot_be_are_errors() {
        assert_eq!(read(r#"{"top_p": "high"}"#).unwrap_err(), r#"top_p: expected a number, found "high""#);
        assert_eq!(read(r#"{"top_p": 1.5}"#).unwrap_err(), "top_p: expected a number from 0 to 1, found 1.5");
        assert_eq!(
            read(r#"{"repetition_penalty": 0}"#).unwrap_err(),
            "repetition_penalty: expected a number from 0.01 to 100, found 0"
        );
        assert_eq!(
            read(r#"{"eos_token_id": -1}"#).unwrap_err(),
            "eos_token_id: expected a token id, found -1"
        );
    }
}

//! How tokens are chosen, as far as someone has said so.
//!
//! Four voices may speak: the row's body, the job's `[sampling]`, the model's `generation_config.json`
//! and OpenAI's defaults, in falling order. Each says some things and leaves others open; what one
//! leaves open is the next one's to say.

use std::collections::BTreeMap;

use scheduler::TokenId;
use serde::{Deserialize, Serialize};

/// Sampling parameters of one voice; `None` where it says nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingOptions {
    /// Divides the logits, 0 to 2; 0 is greedy.
    pub temperature: Option<f64>,
    /// Keep the smallest set of most likely tokens with at least this probability, 0 to 1.
    pub top_p: Option<f64>,
    /// Keep this many most likely tokens; 0 and -1 keep all.
    pub top_k: Option<i64>,
    /// Drop tokens less likely than this share of the most likely one's probability, 0 to 1.
    pub min_p: Option<f64>,
    /// Divides the logits above 0 of tokens that stand in the prompt or were generated, and multiplies the others, 0.01 to 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f64>,
    /// Taken off a token's logit for each time that it was generated, -2 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f64>,
    /// Taken off the logit of each token that was generated, -2 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    /// Added to the logits of these tokens, -100 to 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit_bias: Option<BTreeMap<TokenId, f64>>,
    /// First key of the random stream; a job's own stands in `[job] seed`.
    pub seed: Option<u64>,
    /// Most tokens to generate.
    pub max_tokens: Option<u32>,
    /// Fewest tokens to generate.
    pub min_tokens: Option<u32>,
    /// Texts that end a sequence.
    pub stop: Option<Vec<String>>,
    /// Tokens that end a sequence, beside the model's own.
    pub stop_token_ids: Option<Vec<TokenId>>,
    /// Go on past the model's end-of-sequence tokens.
    pub ignore_eos: Option<bool>,
    /// How many continuations a row has.
    pub n: Option<u32>,
}

/// Most stop strings a request may have. OpenAI allows 4; each costs a little per token.
pub const MAX_STOPS: usize = 16;

/// Most continuations a row may have: as many runs as evaluations of reasoning models take the mean of.
pub const MAX_CHOICES: u32 = 16;

impl SamplingOptions {
    /// These parameters, with what they leave open as `other` says.
    pub fn or(self, other: &SamplingOptions) -> SamplingOptions {
        SamplingOptions {
            temperature: self.temperature.or(other.temperature),
            top_p: self.top_p.or(other.top_p),
            top_k: self.top_k.or(other.top_k),
            min_p: self.min_p.or(other.min_p),
            repetition_penalty: self.repetition_penalty.or(other.repetition_penalty),
            frequency_penalty: self.frequency_penalty.or(other.frequency_penalty),
            presence_penalty: self.presence_penalty.or(other.presence_penalty),
            logit_bias: self.logit_bias.or_else(|| other.logit_bias.clone()),
            seed: self.seed.or(other.seed),
            max_tokens: self.max_tokens.or(other.max_tokens),
            min_tokens: self.min_tokens.or(other.min_tokens),
            stop: self.stop.or_else(|| other.stop.clone()),
            stop_token_ids: self.stop_token_ids.or_else(|| other.stop_token_ids.clone()),
            ignore_eos: self.ignore_eos.or(other.ignore_eos),
            n: self.n.or(other.n),
        }
    }

    /// Checks every value against its range; the error names the parameter and says what was expected.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        number("temperature", self.temperature, 0.0, 2.0)?;
        number("top_p", self.top_p, 0.0, 1.0)?;
        number("min_p", self.min_p, 0.0, 1.0)?;
        number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?;
        number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        number("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        let mut biases = self.logit_bias.iter().flatten();
        biases.try_for_each(|(_, &bias)| number("logit_bias", Some(bias), -100.0, 100.0))?;
        if let Some(top_k) = self.top_k.filter(|&top_k| top_k < -1) {
            return Err(("top_k", format!("expected an integer of at least -1, found {top_k}")));
        }
        if let (Some(min), Some(max)) = (self.min_tokens, self.max_tokens)
            && min > max
        {
            return Err(("min_tokens", format!("expected at most max_tokens {max}, found {min}")));
        }
        if let Some(n) = self.n.filter(|n| !(1..=MAX_CHOICES).contains(n)) {
            return Err(("n", format!("expected an integer from 1 to {MAX_CHOICES}, found {n}")));
        }
        let stop = self.stop.as_deref().unwrap_or_default();
        if stop.len() > MAX_STOPS {
            return Err(("stop", format!("expected at most {MAX_STOPS} strings, found {}", stop.len())));
        }
        if stop.iter().any(String::is_empty) {
            return Err(("stop", "expected strings that are not empty, found \"\"".to_owned()));
        }
        Ok(())
    }
}

fn number(
    name: &'static str,
    value: Option<f64>,
    least: f64,
    most: f64,
) -> Result<(), (&'static str, String)> {
    match value {
        Some(value) if !(least..=most).contains(&value) => {
            Err((name, format!("expected a number from {least} to {most}, found {value}")))
        }
        _ => Ok(()),
    }
}

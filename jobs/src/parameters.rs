//! Which parameters a body may carry, and what becomes of each.
//!
//! A parameter that would change the answer is either honoured or refused: a typing error or a
//! feature that is not there must not pass in silence. One that says what is the case anyway, such as
//! `best_of: 1` or any `null`, equals its absence.

use serde_json::{Map, Value};

use crate::error::RowError;
use crate::json::{show, sorted};
use crate::prepared::Endpoint;

/// Honoured on both routes.
const HONOURED: [&str; 22] = [
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "n",
    "return_token_ids",
    "user",
    "metadata",
    "store",
];

/// Honoured on both routes: those by which an answer is held to a form.
pub(crate) const GUIDES: [&str; 6] = [
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
];

/// Honoured on one route only.
const CHAT: [&str; 2] = ["messages", "top_logprobs"];
const COMPLETIONS: [&str; 2] = ["prompt", "echo"];

/// Known from OpenAI's interface and vLLM's, and not honoured.
const NOT_HONOURED: [&str; 42] = [
    "add_generation_prompt",
    "add_special_tokens",
    "allowed_token_ids",
    "audio",
    "bad_words",
    "best_of",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "function_call",
    "functions",
    "guided_decoding_backend",
    "include_reasoning",
    "include_stop_str_in_output",
    "length_penalty",
    "logits_processors",
    "modalities",
    "parallel_tool_calls",
    "prediction",
    "priority",
    "prompt_cache_key",
    "prompt_logprobs",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stream",
    "stream_options",
    "suffix",
    "tool_choice",
    "tools",
    "top_a",
    "truncate_prompt_tokens",
    "typical_p",
    "use_beam_search",
    "verbosity",
    "web_search_options",
    "xtc_probability",
    "xtc_threshold",
    "early_stopping",
];

/// Refuses what a body must not carry.
pub(crate) fn check(body: &Map<String, Value>, endpoint: Endpoint) -> Result<(), RowError> {
    sorted(body).into_iter().try_for_each(|(name, value)| check_one(name, value, endpoint))
}

fn check_one(name: &str, value: &Value, endpoint: Endpoint) -> Result<(), RowError> {
    let (here, elsewhere) = match endpoint {
        Endpoint::ChatCompletions => (CHAT, COMPLETIONS),
        Endpoint::Completions => (COMPLETIONS, CHAT),
    };
    if HONOURED.contains(&name) || GUIDES.contains(&name) || here.contains(&name) {
        return Ok(());
    }
    if elsewhere.contains(&name) {
        return match value {
            Value::Null | Value::Bool(false) => Ok(()),
            _ => Err(RowError::of(
                name,
                "unsupported_parameter",
                format!("not a parameter of {}", endpoint.url()),
            )),
        };
    }
    if NOT_HONOURED.contains(&name) {
        return check_neutral(name, value);
    }
    let known = HONOURED.into_iter().chain(GUIDES).chain(here).chain(NOT_HONOURED);
    Err(unknown(name, "unknown parameter", known))
}

fn check_neutral(name: &str, value: &Value) -> Result<(), RowError> {
    let found = show(value);
    let message = match neutral(name) {
        _ if value.is_null() => return Ok(()),
        Some(neutral) if neutral.is_said_by(value) => return Ok(()),
        Some(neutral) => format!("expected {neutral}, found {found}, which is not supported"),
        None => format!("not supported, found {found}"),
    };
    Err(RowError::of(name, "unsupported_parameter", message))
}

/// A value of a parameter that is not honoured, by which it says what happens anyway.
enum Neutral {
    Number(f64),
    Flag(bool),
    Empty,
    Either([&'static str; 2]),
    Json(Value),
}

impl Neutral {
    fn is_said_by(&self, value: &Value) -> bool {
        match self {
            Neutral::Number(number) => value.as_f64() == Some(*number),
            Neutral::Flag(flag) => value == flag,
            Neutral::Empty => is_empty(value),
            Neutral::Either(words) => words.iter().any(|word| value == word),
            Neutral::Json(json) => value == json,
        }
    }
}

impl std::fmt::Display for Neutral {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Neutral::Number(number) => write!(f, "{number}"),
            Neutral::Flag(flag) => write!(f, "{flag}"),
            Neutral::Empty => f.write_str("an empty value"),
            Neutral::Either([one, other]) => write!(f, "{one:?} or {other:?}"),
            Neutral::Json(json) => f.write_str(&show(json)),
        }
    }
}

fn neutral(name: &str) -> Option<Neutral> {
    Some(match name {
        "best_of" | "length_penalty" | "typical_p" => Neutral::Number(1.0),
        "priority" | "top_a" | "xtc_probability" => Neutral::Number(0.0),
        "stream"
        | "use_beam_search"
        | "include_stop_str_in_output"
        | "continue_final_message"
        | "early_stopping" => Neutral::Flag(false),
        "skip_special_tokens"
        | "spaces_between_special_tokens"
        | "add_generation_prompt"
        | "parallel_tool_calls" => Neutral::Flag(true),
        "chat_template_kwargs" | "tools" | "functions" | "documents" | "bad_words" | "suffix" => {
            Neutral::Empty
        }
        "tool_choice" | "function_call" => Neutral::Either(["none", "auto"]),
        "guided_decoding_backend" => Neutral::Either(["auto", "guidance"]),
        "service_tier" => Neutral::Either(["auto", "default"]),
        "modalities" => Neutral::Json(serde_json::json!(["text"])),
        _ => return None,
    })
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// An error for a name that nothing goes by, with the one that was probably meant.
pub(crate) fn unknown<'a>(name: &str, what: &str, known: impl IntoIterator<Item = &'a str>) -> RowError {
    // A third of the letters wrong is a typing error; more is another word.
    let most = (name.chars().count() / 3).max(1);
    let distance = |known: &&str| strsim::damerau_levenshtein(name, known);
    let nearest =
        known.into_iter().map(|known| (distance(&known), known)).min().filter(|(far, _)| *far <= most);
    let hint = nearest.map(|(_, known)| format!("; the nearest known one is {known}")).unwrap_or_default();
    RowError::of(name, "unknown_parameter", format!("{what}{hint}"))
}

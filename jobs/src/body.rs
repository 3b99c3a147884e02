//! The body of a batch line: what is asked, in OpenAI's words and a few of vLLM's.

use std::collections::BTreeMap;

use scheduler::{Guide, TokenId};
use serde_json::{Map, Value};

use crate::error::RowError;
use crate::json::{show, sorted};
use crate::parameters::{self, GUIDES};
use crate::prepared::{Endpoint, Message, Prompt};
use crate::sampling::SamplingOptions;

/// Most alternatives a request may ask for at each token. OpenAI's bound for chats.
const MAX_TOP_LOGPROBS: u32 = 20;

/// Roles that chat templates know.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// What a body asks for.
#[derive(Debug, PartialEq)]
pub(crate) struct Body {
    pub(crate) endpoint: Endpoint,
    pub(crate) prompt: Prompt,
    pub(crate) model: Option<String>,
    pub(crate) sampling: SamplingOptions,
    /// What the answer must be, and the parameter that says so.
    pub(crate) guide: Option<(&'static str, Guide)>,
    /// Log-probabilities, with this many alternatives at each token.
    pub(crate) logprobs: Option<u32>,
    pub(crate) echo: bool,
    pub(crate) token_ids: bool,
}

impl Body {
    /// A body that says nothing but its prompt and how to choose tokens.
    pub(crate) fn of(prompt: Prompt, sampling: SamplingOptions) -> Body {
        let endpoint = match prompt {
            Prompt::Chat(_) => Endpoint::ChatCompletions,
            Prompt::Text(_) | Prompt::Tokens(_) => Endpoint::Completions,
        };
        let (model, guide, logprobs) = (None, None, None);
        Body { endpoint, prompt, model, sampling, guide, logprobs, echo: false, token_ids: false }
    }

    pub(crate) fn parse(body: &Map<String, Value>, endpoint: Endpoint) -> Result<Body, RowError> {
        parameters::check(body, endpoint)?;
        let fields = Fields(body);
        let sampling = sampling(&fields)?;
        let is_chat = endpoint == Endpoint::ChatCompletions;
        if is_chat && sampling.max_tokens == Some(0) {
            let message = "expected an integer of at least 1, found 0; only /v1/completions scores a prompt";
            let names = ["max_tokens", "max_completion_tokens"];
            let name = names.into_iter().find(|name| fields.get(name).is_some());
            return Err(RowError::of(name.unwrap_or(names[0]), "invalid_value", message));
        }
        Ok(Body {
            endpoint,
            prompt: if is_chat { chat(&fields)? } else { prompt(&fields)? },
            model: fields.string("model")?.map(str::to_owned),
            sampling,
            guide: guide(body)?,
            logprobs: if is_chat { chat_logprobs(&fields)? } else { fields.top_logprobs("logprobs")? },
            // A null or a false is allowed in a chat too.
            echo: fields.boolean("echo")?.unwrap_or(false),
            token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
        })
    }
}

fn sampling(fields: &Fields<'_>) -> Result<SamplingOptions, RowError> {
    Ok(SamplingOptions {
        temperature: fields.number("temperature")?,
        top_p: fields.number("top_p")?,
        // As good as all: a vocabulary has fewer tokens.
        top_k: fields.integer("top_k", -1)?.map(|top_k| top_k.min(i64::MAX.into()) as i64),
        min_p: fields.number("min_p")?,
        repetition_penalty: fields.number("repetition_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        logit_bias: fields.get("logit_bias").map(logit_bias).transpose()?,
        // Any 64 bits are a seed; OpenAI's are signed.
        seed: fields.integer("seed", i64::MIN)?.map(|seed| seed as u64),
        max_tokens: max_tokens(fields)?,
        min_tokens: fields.count("min_tokens")?,
        stop: stop(fields)?,
        stop_token_ids: fields
            .get("stop_token_ids")
            .map(|value| token_ids("stop_token_ids", value))
            .transpose()?,
        ignore_eos: fields.boolean("ignore_eos")?,
        n: fields.count("n")?,
    })
}

/// OpenAI's form: an object whose keys are token ids.
fn logit_bias(value: &Value) -> Result<BTreeMap<TokenId, f64>, RowError> {
    const NAME: &str = "logit_bias";
    let Some(biases) = value.as_object() else {
        return Err(invalid_type(NAME, "an object of token ids and numbers", value));
    };
    let bias = |(id, value): (&String, &Value)| {
        let wrong_id =
            || RowError::of(NAME, "invalid_type", format!("expected token ids as keys, found {id:?}"));
        // One spelling for each id, so that none is named twice.
        let token =
            id.parse().ok().filter(|token: &TokenId| token.to_string() == *id).ok_or_else(wrong_id)?;
        let bias = value.as_f64().ok_or_else(|| invalid_type(&format!("{NAME}.{id}"), "a number", value))?;
        Ok((token, bias))
    };
    sorted(biases).into_iter().map(bias).collect()
}

/// What the answer must be, by whichever parameter says so.
fn guide(body: &Map<String, Value>) -> Result<Option<(&'static str, Guide)>, RowError> {
    let mut guides = Vec::new();
    for name in GUIDES {
        let Some(value) = Fields(body).get(name) else { continue };
        let guide = match name {
            "response_format" => response_format(value)?,
            "structured_outputs" => structured_outputs(value)?,
            "guided_json" => Some(json_guide(name, value, true)?),
            "guided_regex" => Some(Guide::Regex(guide_text(name, value)?)),
            "guided_choice" => Some(Guide::Choice(guide_choices(name, value)?)),
            "guided_grammar" => Some(Guide::Grammar(guide_text(name, value)?)),
            _ => unreachable!("{name} is among the guides"),
        };
        guides.extend(guide.map(|guide| (name, guide)));
    }
    match guides.as_slice() {
        [(first, _), (second, _), ..] => {
            let message = format!("expected one guide, found {first} too");
            Err(RowError::of(*second, "invalid_value", message))
        }
        _ => Ok(guides.pop()),
    }
}

/// OpenAI's form.
fn response_format(value: &Value) -> Result<Option<Guide>, RowError> {
    const NAME: &str = "response_format";
    let fields = known_fields(NAME, value, &["type", "json_schema"])?;
    match fields.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(any_object(true))),
        Some("json_schema") => {
            let (name, schema) =
                (format!("{NAME}.json_schema"), fields.get("json_schema").unwrap_or(&Value::Null));
            let fields = known_fields(&name, schema, &["name", "description", "schema", "strict"])?;
            let schema = fields.get("schema").unwrap_or(&Value::Null);
            json_guide(&format!("{name}.schema"), schema, true).map(Some)
        }
        _ => {
            let message = format!(
                "expected text, json_object or json_schema, found {}",
                show(fields.get("type").unwrap_or(&Value::Null))
            );
            Err(RowError::of(format!("{NAME}.type"), "invalid_value", message))
        }
    }
}

/// vLLM's form.
fn structured_outputs(value: &Value) -> Result<Option<Guide>, RowError> {
    const NAME: &str = "structured_outputs";
    const KINDS: [&str; 5] = ["json", "json_object", "regex", "choice", "grammar"];
    let known = [&KINDS[..], &["disable_any_whitespace"]].concat();
    let fields = Fields(known_fields(NAME, value, &known)?);
    let of = |name: &str| format!("{NAME}.{name}");
    let any_space = match fields.get("disable_any_whitespace") {
        None => true,
        Some(Value::Bool(disabled)) => !disabled,
        Some(other) => return Err(invalid_type(&of("disable_any_whitespace"), "true or false", other)),
    };
    let said = |name: &&str| fields.get(name).is_some_and(|value| value != &Value::Bool(false));
    let kinds: Vec<&str> = KINDS.into_iter().filter(said).collect();
    let [kind] = kinds[..] else {
        let message = format!("expected one of {}, found {}", KINDS.join(", "), show(value));
        return Err(RowError::of(NAME, "invalid_value", message));
    };
    let value = fields.get(kind).expect("it was found");
    Ok(Some(match kind {
        "json" => json_guide(&of(kind), value, any_space)?,
        "json_object" if value == &Value::Bool(true) => any_object(any_space),
        "json_object" => return Err(invalid_type(&of(kind), "true or false", value)),
        "regex" => Guide::Regex(guide_text(&of(kind), value)?),
        "choice" => Guide::Choice(guide_choices(&of(kind), value)?),
        _ => Guide::Grammar(guide_text(&of(kind), value)?),
    }))
}

fn known_fields<'a>(
    name: &str,
    value: &'a Value,
    known: &[&str],
) -> Result<&'a Map<String, Value>, RowError> {
    let fields = value.as_object().ok_or_else(|| invalid_type(name, "an object", value))?;
    let is_unknown =
        |(field, value): &(&String, &Value)| !known.contains(&field.as_str()) && !value.is_null();
    match sorted(fields).into_iter().find(is_unknown) {
        Some((field, value)) => {
            let message = format!("not supported, found {}", show(value));
            Err(RowError::of(format!("{name}.{field}"), "unsupported_parameter", message))
        }
        None => Ok(fields),
    }
}

fn any_object(any_space: bool) -> Guide {
    Guide::Json { schema: r#"{"type":"object"}"#.to_owned(), any_space }
}

/// A schema, or a text that is one. Its properties stay in their order.
fn json_guide(name: &str, value: &Value, any_space: bool) -> Result<Guide, RowError> {
    match value {
        Value::String(schema) => Ok(Guide::Json { schema: schema.clone(), any_space }),
        Value::Object(_) => Ok(Guide::Json { schema: value.to_string(), any_space }),
        _ => Err(invalid_type(name, "a schema", value)),
    }
}

fn guide_text(name: &str, value: &Value) -> Result<String, RowError> {
    match value.as_str() {
        Some("") => Err(RowError::of(name, "invalid_value", "expected a text that is not empty, found \"\"")),
        Some(text) => Ok(text.to_owned()),
        None => Err(invalid_type(name, "a string", value)),
    }
}

fn guide_choices(name: &str, value: &Value) -> Result<Vec<String>, RowError> {
    let texts = |items: &Vec<Value>| items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
    match value.as_array().and_then(texts) {
        Some::<Vec<String>>(texts) if !texts.is_empty() && !texts.iter().any(String::is_empty) => Ok(texts),
        _ => Err(invalid_type(name, "an array of strings, none of them empty", value)),
    }
}

fn max_tokens(fields: &Fields<'_>) -> Result<Option<u32>, RowError> {
    let old = fields.count("max_tokens")?;
    let new = fields.count("max_completion_tokens")?;
    if let (Some(old), Some(new)) = (old, new)
        && old != new
    {
        let message = format!("expected the same as max_completion_tokens {new}, found {old}");
        return Err(RowError::of("max_tokens", "invalid_value", message));
    }
    Ok(old.or(new))
}

fn stop(fields: &Fields<'_>) -> Result<Option<Vec<String>>, RowError> {
    let Some(value) = fields.get("stop") else { return Ok(None) };
    let wrong = || invalid_type("stop", "a string or an array of strings", value);
    match value {
        Value::String(text) => Ok(Some(vec![text.clone()])),
        Value::Array(items) => {
            let texts = items.iter().map(|item| item.as_str().map(str::to_owned).ok_or_else(wrong));
            texts.collect::<Result<Vec<_>, _>>().map(Some)
        }
        _ => Err(wrong()),
    }
}

fn chat_logprobs(fields: &Fields<'_>) -> Result<Option<u32>, RowError> {
    let wants = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.top_logprobs("top_logprobs")?;
    match (wants, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(top)) => {
            Err(RowError::of("top_logprobs", "invalid_value", format!("expected logprobs true beside {top}")))
        }
    }
}

fn chat(fields: &Fields<'_>) -> Result<Prompt, RowError> {
    let value = fields.get("messages").ok_or_else(|| missing("messages"))?;
    match value.as_array().map(Vec::as_slice) {
        Some([]) => Err(RowError::of("messages", "invalid_value", "expected at least one message, found []")),
        Some(messages) => {
            messages.iter().enumerate().map(message).collect::<Result<Vec<_>, _>>().map(Prompt::Chat)
        }
        None => Err(invalid_type("messages", "an array of messages", value)),
    }
}

fn message((idx, value): (usize, &Value)) -> Result<Message, RowError> {
    let param = format!("messages[{idx}]");
    let Some(map) = value.as_object() else { return Err(invalid_type(&param, "an object", value)) };
    if let Some((name, value)) = sorted(map).into_iter().find(|(name, value)| !is_message_field(name, value))
    {
        let message = format!("not supported, found {}", show(value));
        return Err(RowError::of(format!("{param}.{name}"), "unsupported_parameter", message));
    }
    let field = |name: &str| map.get(name).filter(|value| !value.is_null()).ok_or(format!("{param}.{name}"));
    let role = field("role").map_err(|param| missing(&param))?;
    let role = role.as_str().filter(|role| ROLES.contains(role)).ok_or_else(|| {
        let message = format!("expected one of {}, found {}", ROLES.join(", "), show(role));
        RowError::of(format!("{param}.role"), "invalid_value", message)
    })?;
    let content = field("content").map_err(|param| missing(&param))?;
    Ok(Message::new(role, text_of_content(&format!("{param}.content"), content)?))
}

fn is_message_field(name: &str, value: &Value) -> bool {
    name == "role" || name == "content" || value.is_null()
}

/// The text of a message: a string, or parts of text, each on lines of its own.
fn text_of_content(param: &str, content: &Value) -> Result<String, RowError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let texts =
                parts.iter().enumerate().map(|(idx, part)| text_of_part(&format!("{param}[{idx}]"), part));
            Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        _ => Err(invalid_type(param, "a string or an array of text parts", content)),
    }
}

fn text_of_part<'a>(param: &str, part: &'a Value) -> Result<&'a str, RowError> {
    match (part["type"].as_str(), part["text"].as_str(), part.as_object().map_or(0, Map::len)) {
        (Some("text"), Some(text), 2) => Ok(text),
        _ => Err(invalid_type(param, r#"{"type":"text","text":…}"#, part)),
    }
}

fn prompt(fields: &Fields<'_>) -> Result<Prompt, RowError> {
    let value = fields.get("prompt").ok_or_else(|| missing("prompt"))?;
    match value {
        Value::String(text) => Ok(Prompt::Text(text.clone())),
        Value::Array(items) if items.iter().any(|item| item.is_string() || item.is_array()) => {
            let message =
                format!("expected one prompt, found an array of {}; write a line for each", items.len());
            Err(RowError::of("prompt", "unsupported_value", message))
        }
        Value::Array(_) => token_ids("prompt", value).map(Prompt::Tokens),
        _ => Err(invalid_type("prompt", "a string or an array of token ids", value)),
    }
}

fn token_ids(name: &str, value: &Value) -> Result<Vec<TokenId>, RowError> {
    let Some(items) = value.as_array() else {
        return Err(invalid_type(name, "an array of token ids", value));
    };
    let id = |(idx, item): (usize, &Value)| {
        let id = item.as_u64().and_then(|id| TokenId::try_from(id).ok());
        id.ok_or_else(|| invalid_type(&format!("{name}[{idx}]"), "a token id", item))
    };
    items.iter().enumerate().map(id).collect()
}

fn missing(param: &str) -> RowError {
    RowError::of(param, "missing_required_parameter", "missing")
}

pub(crate) fn invalid_type(param: &str, expected: &str, found: &Value) -> RowError {
    RowError::of(param, "invalid_type", format!("expected {expected}, found {}", show(found)))
}

/// The fields of a body; one that is null counts as absent.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn number(&self, name: &str) -> Result<Option<f64>, RowError> {
        let number = |value: &Value| value.as_f64().ok_or_else(|| invalid_type(name, "a number", value));
        self.get(name).map(number).transpose()
    }

    /// An integer of 64 bits, signed or not. Of `least` only the message speaks that refuses one beyond
    /// them, which JSON's reader hands over as a float.
    fn integer(&self, name: &str, least: i64) -> Result<Option<i128>, RowError> {
        let integer = |value: &Value| {
            let number = value.as_i64().map(i128::from).or(value.as_u64().map(i128::from));
            number.ok_or_else(|| match value.as_f64() {
                Some(float) if float < i64::MIN as f64 || float >= u64::MAX as f64 => {
                    let message =
                        format!("expected an integer from {least} to {}, found {}", u64::MAX, show(value));
                    RowError::of(name, "invalid_value", message)
                }
                _ => invalid_type(name, "an integer", value),
            })
        };
        self.get(name).map(integer).transpose()
    }

    /// A number of tokens. One of more than 32 bits counts as the highest of 32, which no context holds.
    fn count(&self, name: &str) -> Result<Option<u32>, RowError> {
        match self.integer(name, 0)? {
            Some(number) if number < 0 => {
                let message = format!("expected an integer of at least 0, found {number}");
                Err(RowError::of(name, "invalid_value", message))
            }
            number => Ok(number.map(|number| number.min(u32::MAX.into()) as u32)),
        }
    }

    fn top_logprobs(&self, name: &str) -> Result<Option<u32>, RowError> {
        match self.integer(name, 0)? {
            Some(top) if !(0..=i128::from(MAX_TOP_LOGPROBS)).contains(&top) => {
                let message = format!("expected an integer from 0 to {MAX_TOP_LOGPROBS}, found {top}");
                Err(RowError::of(name, "invalid_value", message))
            }
            top => Ok(top.map(|top| top as u32)),
        }
    }

    fn boolean(&self, name: &str) -> Result<Option<bool>, RowError> {
        let boolean =
            |value: &Value| value.as_bool().ok_or_else(|| invalid_type(name, "true or false", value));
        self.get(name).map(boolean).transpose()
    }

    fn string(&self, name: &str) -> Result<Option<&'a str>, RowError> {
        let string = |value: &'a Value| value.as_str().ok_or_else(|| invalid_type(name, "a string", value));
        self.get(name).map(string).transpose()
    }
}

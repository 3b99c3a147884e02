//! The envelope of a batch line: who asks, on which route, and the body.

use serde_json::{Map, Value};

use crate::body::{Body, invalid_type};
use crate::error::RowError;
use crate::json::{show, sorted};
use crate::parameters;
use crate::prepared::Endpoint;

/// What a batch line has, all of it and nothing else.
pub(crate) const FIELDS: [&str; 4] = ["custom_id", "method", "url", "body"];

/// Reads a line's envelope and body.
pub(crate) fn parse(line: &Map<String, Value>) -> Result<Body, RowError> {
    if FIELDS.iter().all(|name| !line.contains_key(*name)) {
        let message = "not a batch line: custom_id, method, url and body are missing; \
                       a plain row needs [prompt] user in the job file";
        return Err(RowError::new("missing_required_parameter", message));
    }
    if let Some((name, _)) = sorted(line).into_iter().find(|(name, _)| !FIELDS.contains(&name.as_str())) {
        return Err(parameters::unknown(name, "unknown field of a batch line", FIELDS));
    }
    string(line, "custom_id")?;
    let method = string(line, "method")?;
    if method != "POST" {
        return Err(RowError::of(
            "method",
            "invalid_method",
            format!("expected POST, found {}", show(&line["method"])),
        ));
    }
    let url = string(line, "url")?;
    let endpoints = [Endpoint::ChatCompletions, Endpoint::Completions];
    let endpoint = endpoints.into_iter().find(|endpoint| endpoint.url() == url).ok_or_else(|| {
        let [chat, completions] = endpoints.map(Endpoint::url);
        RowError::of(
            "url",
            "invalid_url",
            format!("expected {chat} or {completions}, found {}", show(&line["url"])),
        )
    })?;
    let body = field(line, "body")?;
    let body = body.as_object().ok_or_else(|| invalid_type("body", "an object", body))?;
    Body::parse(body, endpoint)
}

fn string<'a>(line: &'a Map<String, Value>, name: &str) -> Result<&'a str, RowError> {
    let value = field(line, name)?;
    value.as_str().ok_or_else(|| invalid_type(name, "a string", value))
}

fn field<'a>(line: &'a Map<String, Value>, name: &str) -> Result<&'a Value, RowError> {
    line.get(name).ok_or_else(|| {
        let message = "missing; a batch line has custom_id, method, url and body";
        RowError::of(name, "missing_required_parameter", message)
    })
}

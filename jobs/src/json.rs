//! JSON values: shown in messages, made canonical for hashing, handed to templates.
//!
//! Wherever the content of an object matters its keys are sorted here, so that two spellings of the
//! same row have the same key and render the same prompt.

use serde_json::{Map, Value};

/// Characters of a value that a message shows at most.
const SHOWN_CHARS: usize = 60;

/// A value as a message shows it: its JSON, shortened.
pub(crate) fn show(value: &Value) -> String {
    let json = canonical(value);
    if json.chars().count() <= SHOWN_CHARS {
        return json;
    }
    format!("{}…", json.chars().take(SHOWN_CHARS).collect::<String>())
}

/// The JSON of a value without spaces and with sorted keys.
pub(crate) fn canonical(value: &Value) -> String {
    let mut out = Vec::with_capacity(256);
    write_canonical(value, &mut out);
    String::from_utf8(out).expect("JSON is UTF-8")
}

fn write_canonical(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Array(items) => {
            out.push(b'[');
            for (idx, item) in items.iter().enumerate() {
                if idx > 0 {
                    out.push(b',');
                }
                write_canonical(item, out);
            }
            out.push(b']');
        }
        Value::Object(map) => {
            out.push(b'{');
            for (idx, (key, item)) in sorted(map).into_iter().enumerate() {
                if idx > 0 {
                    out.push(b',');
                }
                write_plain(key, out);
                out.push(b':');
                write_canonical(item, out);
            }
            out.push(b'}');
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => write_plain(value, out),
    }
}

fn write_plain(value: &impl serde::Serialize, out: &mut Vec<u8>) {
    serde_json::to_writer(out, value).expect("a text or a number is JSON");
}

/// A text as a JSON string.
pub(crate) fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string is JSON")
}

/// A value for a template.
pub(crate) fn to_template(value: &Value) -> minijinja::Value {
    match value {
        Value::Null => minijinja::Value::from(()),
        Value::Bool(flag) => minijinja::Value::from(*flag),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => minijinja::Value::from(integer),
            (None, Some(integer)) => minijinja::Value::from(integer),
            (None, None) => minijinja::Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => minijinja::Value::from(text.as_str()),
        Value::Array(items) => items.iter().map(to_template).collect::<Vec<_>>().into(),
        Value::Object(map) => minijinja::Value::from_pairs(
            sorted(map).into_iter().map(|(key, item)| (key.as_str(), to_template(item))),
        ),
    }
}

/// The entries of an object by their keys: what follows from it must not depend on how it was spelled.
pub(crate) fn sorted(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_unstable_by_key(|(key, _)| *key);
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_json_forgets_spacing_key_order_and_escapes() {
        let one: Value =
            serde_json::from_str(r#"{"b": [1, 2.5, null], "a": {"y": "A", "x": true}}"#).unwrap();
        let two: Value = serde_json::from_str(r#"{"a":{"x":true,"y":"\u0041"},"b":[1,2.5,null]}"#).unwrap();
        assert_eq!(canonical(&one), r#"{"a":{"x":true,"y":"A"},"b":[1,2.5,null]}"#);
        assert_eq!(canonical(&one), canonical(&two));
    }

    #[test]
    fn a_long_value_is_shown_shortened() {
        let shown = show(&Value::from("é".repeat(100)));
        assert_eq!(shown.chars().count(), SHOWN_CHARS + 1);
        assert!(shown.ends_with('…'));
    }
}

//! Messages to a prompt, as the model's own chat template says.

use std::path::{Path, PathBuf};

use minijinja::{Environment, Value};
use serde_json::Value as Json;

use crate::error::{Error, Result};
use crate::prepared::Message;
use crate::template;

/// A model's chat template.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(&'static str, String)>,
}

/// The name under which the template is kept; messages show it.
const NAME: &str = "chat_template";

/// Special tokens that a template may name, as transformers hands them over.
pub(crate) const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl ChatTemplate {
    /// Compiles a template; the error tells what is wrong in it.
    pub(crate) fn new(
        source: &str,
        special_tokens: Vec<(&'static str, String)>,
        unix_seconds: u64,
    ) -> Result<Self, String> {
        let mut environment = template::chat_environment(unix_seconds);
        template::add(&mut environment, NAME, without_generation_marks(source))
            .map_err(|error| template::describe(&error))?;
        Ok(ChatTemplate { environment, special_tokens })
    }

    /// The prompt that asks for the answer to these messages; the error is for the row.
    pub(crate) fn render(&self, messages: &[Message]) -> Result<String, String> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| {
                Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())])
            })
            .collect();
        let mut context = vec![
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(true)),
            // Templates ask whether these are none, and not whether they are defined.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        context.extend(self.special_tokens.iter().map(|(name, token)| (*name, Value::from(token.as_str()))));
        let template = self.environment.get_template(NAME).expect("added when this was made");
        template::render(&template, Value::from_pairs(context)).map_err(|error| template::describe(&error))
    }
}

/// Turns `{% generation %}`, which marks what training counts, into blocks that change nothing.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // Of `{%}` no byte belongs to both ends.
        let inside = start + "{%".len();
        let end = rest[inside..].find("%}").map_or(rest.len(), |end| inside + end);
        let tag = &rest[inside..end];
        let word = match tag.trim_matches(['-', '+']).trim() {
            "generation" => Some(tag.replace("generation", "if true")),
            "endgeneration" => Some(tag.replace("endgeneration", "endif")),
            _ => None,
        };
        out.push_str(&rest[..inside]);
        out.push_str(word.as_deref().unwrap_or(tag));
        rest = &rest[end..];
    }
    out + rest
}

/// The text of a model directory's template and the file it stands in: `chat_template.jinja`, or else
/// `tokenizer_config.json`.
pub(crate) fn find_source(dir: &Path, tokenizer_config: &Json) -> Result<Option<(PathBuf, String)>> {
    let path = dir.join("chat_template.jinja");
    match std::fs::read_to_string(&path) {
        Ok(source) => return Ok(Some((path, source))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::read(&path, error)),
    }
    let path = dir.join("tokenizer_config.json");
    match &tokenizer_config["chat_template"] {
        Json::Null => Ok(None),
        Json::String(source) => Ok(Some((path, source.clone()))),
        Json::Array(entries) => default_of(&path, entries).map(|source| Some((path, source))),
        other => {
            let shown = crate::json::show(other);
            Err(Error::malformed(
                &path,
                format!("chat_template: expected a string or a named list, found {shown}"),
            ))
        }
    }
}

fn default_of(path: &Path, entries: &[Json]) -> Result<String> {
    let mut names = Vec::new();
    for (idx, entry) in entries.iter().enumerate() {
        let (Json::String(name), Json::String(source)) = (&entry["name"], &entry["template"]) else {
            let message = format!(
                "chat_template[{idx}]: expected name and template, found {}",
                crate::json::show(entry)
            );
            return Err(Error::malformed(path, message));
        };
        if name == "default" {
            return Ok(source.clone());
        }
        names.push(name.clone());
    }
    Err(Error::NoDefaultTemplate { path: path.to_owned(), names })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_marks_go_and_all_else_stays() {
        let marked = "{%- generation -%}{{ x }}{% endgeneration %}";
        assert_eq!(without_generation_marks(marked), "{%- if true -%}{{ x }}{% endif %}");
        for other in ["{% set generation = 1 %}", "{%", "{%}", "{%}%}", "{% generation", "%}{%%}"] {
            assert_eq!(without_generation_marks(other), other.replace("{% generation", "{% if true"));
        }
    }
}

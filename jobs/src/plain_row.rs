//! Plain rows: any JSON object, made into messages by the job's own templates.

use std::collections::BTreeMap;

use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

use crate::batch_line;
use crate::error::{Error, Result, RowError};
use crate::json::to_template;
use crate::prepared::{Message, Prompt};
use crate::template;

/// `[prompt]` of a job: templates over the fields of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptOptions {
    /// What the system message says, if there is to be one.
    pub system: Option<String>,
    /// What the user says.
    pub user: String,
}

/// The compiled templates.
pub(crate) struct PromptTemplates {
    environment: Environment<'static>,
    /// What each template asks for, by its name.
    asked: BTreeMap<&'static str, Vec<String>>,
}

/// Names of the templates, which are the keys they come from.
const SYSTEM: &str = "[prompt] system";
const USER: &str = "[prompt] user";

impl PromptTemplates {
    pub(crate) fn new(options: &PromptOptions) -> Result<Self> {
        let mut environment = template::strict_environment();
        let mut asked = BTreeMap::new();
        for (name, source) in [(SYSTEM, options.system.as_ref()), (USER, Some(&options.user))] {
            let Some(source) = source else { continue };
            let names = template::add(&mut environment, name, source.clone())
                .map_err(|error| Error::Setting { key: name.to_owned(), message: describe(&error) })?;
            asked.insert(name, names);
        }
        Ok(PromptTemplates { environment, asked })
    }

    /// The messages that a row asks.
    pub(crate) fn render(&self, row: &Map<String, Value>) -> Result<Prompt, RowError> {
        let context = to_template(&Value::Object(row.clone()));
        let mut messages = Vec::new();
        if self.asked.contains_key(SYSTEM) {
            messages.push(Message::new("system", self.render_one(SYSTEM, row, &context)?));
        }
        messages.push(Message::new("user", self.render_one(USER, row, &context)?));
        Ok(Prompt::Chat(messages))
    }

    fn render_one(
        &self,
        name: &str,
        row: &Map<String, Value>,
        context: &minijinja::Value,
    ) -> Result<String, RowError> {
        let template = self.environment.get_template(name).expect("added when this was made");
        template::render(&template, context).map_err(|error| {
            match self.asked[name]
                .iter()
                .find(|path| error.kind() == ErrorKind::UndefinedError && self.is_missing(path, row))
            {
                Some(path) => missing_field(name, path, row),
                None => RowError::new("template_error", format!("{name}: {}", describe(&error))),
            }
        })
    }

    fn is_missing(&self, path: &str, row: &Map<String, Value>) -> bool {
        let first = path.split('.').next().unwrap_or(path);
        if !row.contains_key(first) && self.environment.globals().any(|(name, _)| name == first) {
            return false;
        }
        let mut parts = path.split('.');
        let start = parts.next().and_then(|part| row.get(part));
        parts.fold(start, |value, part| value.and_then(|value| value.get(part))).is_none()
    }
}

fn missing_field(template: &str, path: &str, row: &Map<String, Value>) -> RowError {
    let mut fields: Vec<&str> = row.keys().map(String::as_str).collect();
    fields.sort_unstable();
    let mut message =
        format!("{template} asks for {path}, which the row lacks; it has {}", fields.join(", "));
    if batch_line::FIELDS.iter().all(|field| row.contains_key(*field)) {
        message.push_str("; this is a batch line, which a job without [prompt] takes");
    }
    RowError { code: "missing_field", param: Some(path.to_owned()), message }
}

/// The error without the template's name, which the message begins with.
fn describe(error: &minijinja::Error) -> String {
    let line = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
    if let Some(message) = template::out_of_fuel(error) {
        return format!("{message}{line}");
    }
    match error.detail() {
        Some(detail) => format!("{}: {detail}{line}", error.kind()),
        None => format!("{}{line}", error.kind()),
    }
}

/// The row's own name: its `custom_id` or its `id`, where that is a string or a number.
pub(crate) fn own_id(row: &Map<String, Value>) -> Option<String> {
    ["custom_id", "id"].into_iter().find_map(|name| match row.get(name) {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Number(number)) => Some(number.to_string()),
        _ => None,
    })
}

//! Which row a line of the input is. The reader of a job asks, and so does an audit, which has no model.

use std::path::Path;

use scheduler::RequestKey;
use serde_json::{Map, Value};

use crate::error::{Result, RowError};
use crate::json::{canonical, show};
use crate::key::{CustomIds, KeyMaker, LineKind};
use crate::parameters::GUIDES;
use crate::raw_lines::RawLine;
use crate::reader::MAX_LINE_BYTES;

/// Knows the rows of one input, one after the other.
pub(crate) struct RowKeys {
    keys: KeyMaker,
    custom_ids: CustomIds,
    is_plain: bool,
}

/// A line of the input, with what its key is made of.
pub(crate) enum KeyedLine {
    /// No row at all.
    Broken(RowError),
    /// A row for the job's templates.
    Plain(Map<String, Value>),
    /// A batch line without a name.
    Nameless(Map<String, Value>),
    /// A batch line.
    Batch { custom_id: String, line: Map<String, Value> },
    /// A batch line whose name was used before, on this line.
    Repeated { custom_id: String, first: u64 },
}

impl RowKeys {
    pub(crate) fn new(keys: KeyMaker, is_plain: bool) -> RowKeys {
        RowKeys { keys, custom_ids: CustomIds::default(), is_plain }
    }

    /// What memory does not hold is kept in this folder.
    pub(crate) fn keep_files_in(&mut self, folder: &Path) {
        self.keys.keep_files_in(folder);
        self.custom_ids.keep_files_in(folder);
    }

    /// The key of the next line, which has this number.
    pub(crate) fn next(&mut self, number: u64, raw: &RawLine) -> Result<(RequestKey, KeyedLine)> {
        match object(raw) {
            Err(error) => {
                let content = match raw {
                    RawLine::Whole(bytes) => bytes.as_slice(),
                    RawLine::TooLong { hash, .. } => hash.as_bytes(),
                };
                Ok((self.keys.next(LineKind::Broken, "", content, 0)?, KeyedLine::Broken(error)))
            }
            Ok(row) if self.is_plain => {
                let row = Value::Object(row);
                let key = self.keys.next(LineKind::Plain, "", canonical(&row).as_bytes(), 0)?;
                let Value::Object(row) = row else { unreachable!("made an object above") };
                Ok((key, KeyedLine::Plain(row)))
            }
            Ok(line) => self.batch_line(number, line),
        }
    }

    fn batch_line(&mut self, number: u64, line: Map<String, Value>) -> Result<(RequestKey, KeyedLine)> {
        let Some(custom_id) = line.get("custom_id").and_then(Value::as_str).map(str::to_owned) else {
            let line = Value::Object(line);
            let key = self.keys.next(LineKind::Broken, "", canonical(&line).as_bytes(), 0)?;
            let Value::Object(line) = line else { unreachable!("made an object above") };
            return Ok((key, KeyedLine::Nameless(line)));
        };
        let content = body_content(line.get("body").unwrap_or(&Value::Null));
        match self.custom_ids.note(&custom_id, number)? {
            None => {
                let key = self.keys.only(LineKind::Batch, &custom_id, content.as_bytes());
                Ok((key, KeyedLine::Batch { custom_id, line }))
            }
            Some(first) => {
                let key = self.keys.next(LineKind::Batch, &custom_id, content.as_bytes(), 1)?;
                Ok((key, KeyedLine::Repeated { custom_id, first }))
            }
        }
    }
}

/// What the key of a batch line is made of. Of a guide the order of its keys counts too, where it is not the alphabet's: answers
/// have properties in the order of their schema.
fn body_content(body: &Value) -> String {
    let mut content = canonical(body);
    for name in GUIDES {
        let Some(guide) = body.get(name) else { continue };
        let plain = guide.to_string();
        if plain != canonical(guide) {
            content.push('\n');
            content.push_str(&plain);
        }
    }
    content
}

fn object(raw: &RawLine) -> Result<Map<String, Value>, RowError> {
    let bytes = match raw {
        RawLine::Whole(bytes) => bytes,
        RawLine::TooLong { bytes, .. } => {
            let message =
                format!("a line of {bytes} bytes exceeds the most a row may have, {MAX_LINE_BYTES}");
            return Err(RowError::new("line_too_long", message));
        }
    };
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        RowError::new("invalid_utf8", format!("not UTF-8: byte {} is 0x{:02x}", at + 1, bytes[at]))
    })?;
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => {
            Err(RowError::new("invalid_json_line", format!("expected an object, found {}", show(&other))))
        }
        Err(error) => Err(RowError::new("invalid_json_line", not_json(&error))),
    }
}

/// What the parser says, without its line number: it has seen one line only.
fn not_json(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let message = message.strip_suffix(&place).unwrap_or(&message);
    format!("not JSON: {message} at column {}", error.column())
}

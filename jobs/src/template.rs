//! The template language as chat templates expect it: Jinja with Python's methods on values.
//!
//! What transformers offers a chat template is offered here too: `tojson` that writes what Python's
//! `json.dumps` writes, `raise_exception`, `strftime_now`, and `None`, `True`, `False` as Python
//! prints them. Nothing is escaped for HTML. A template that does not come to an end is stopped, for
//! it would hold up every row behind it.

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Template, UndefinedBehavior, Value};

use crate::{calendar, format_width};

/// Fuel of one rendering: a step of the template, or 64 bytes that it handles, costs about one. All of
/// it lasts about a second.
const FUEL: u64 = {
    let mut sum = 0;
    // 10,000 messages: Nemotron's template takes 43 steps for each, and wordier ones a few times that.
    sum += 10_000 * 300;
    // The largest row there may be: Nemotron's template handles each of its bytes six times.
    sum += 12 * (crate::MAX_LINE_BYTES as u64 / 64);
    // A template that looks through all messages at every one, in a chat of 2,000.
    sum += 2_000 * 2_000;
    sum
};

/// Most spaces by which `tojson` indents, or characters of a text it indents with. Templates use 2 or
/// 4, and each is repeated for every line and level.
const MAX_INDENT: usize = 16;

/// Longest template that is read, about ten times the longest that is known.
const MAX_SOURCE_BYTES: usize = 1 << 17;

/// Stack for reading a byte of a template: the library reads and forgets `not not not …`, `a.b.c.…` and
/// chains of `elif` by recursion. That is at most a level for each byte, and a level takes less than a
/// kilobyte, or less than four in a build with sanitizers. Only what is used is taken.
const READING_STACK_BYTES: usize = 1 << 12;

/// Deepest nesting of a value that is written out. A row's JSON is read to a depth of 128.
const MAX_DEPTH: usize = 200;

/// Most values, or 64 bytes of text, in a value that is written out: four times what the largest row holds.
const MAX_EXTENT: usize = 4 * crate::MAX_LINE_BYTES / 64;

/// An environment for templates that come with a model, which Jinja's own leniency suits.
///
/// `strftime_now` speaks of `unix_seconds`, whatever the time is when a prompt is rendered: one job
/// has one date, and a row's answer does not depend on when its turn came.
pub(crate) fn chat_environment(unix_seconds: u64) -> Environment<'static> {
    let mut environment = plain_environment();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are Jinja's own"));
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: &str| {
        calendar::strftime(unix_seconds, format).map_err(|directive| {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know {directive}"))
        })
    });
    environment
}

/// An environment for a job's own templates, where a field that is not there is a mistake.
pub(crate) fn strict_environment() -> Environment<'static> {
    let mut environment = plain_environment();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment
}

/// Adds a template to an environment; the names that it asks for, each with its path, sorted.
///
/// # Errors
/// What is wrong in it, or that it is too long to be read.
pub(crate) fn add(
    environment: &mut Environment<'static>,
    name: &'static str,
    source: String,
) -> Result<Vec<String>, Error> {
    if source.len() > MAX_SOURCE_BYTES {
        let found = source.len();
        let message = format!("a template of {found} bytes, expected at most {MAX_SOURCE_BYTES}");
        return Err(Error::new(ErrorKind::SyntaxError, message));
    }
    let stack_bytes = (1 << 20) + source.len() * READING_STACK_BYTES;
    std::thread::scope(|scope| {
        let add = || {
            without_panic(|| {
                environment.add_template_owned(name, source)?;
                let asked = environment.get_template(name)?.undeclared_variables(true);
                let mut asked: Vec<String> = asked.into_iter().collect();
                asked.sort();
                Ok(asked)
            })
        };
        let thread = std::thread::Builder::new().stack_size(stack_bytes).spawn_scoped(scope, add);
        thread.expect("the system starts threads").join().expect("a panic is caught before")
    })
}

/// Renders a template of an environment.
///
/// # Errors
/// What went wrong, mistakes of the library among it: they are the row's trouble, and not the job's.
pub(crate) fn render(template: &Template<'_, '_>, context: impl Into<Value>) -> Result<String, Error> {
    without_panic(|| template.render(context))
}

fn without_panic<T>(run: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(refusal("the template library failed")))
}

fn refusal(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn plain_environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(|state, value, method, arguments| {
        if method == "format" {
            format_width::check(value.as_str().unwrap_or_default()).map_err(refusal)?;
        }
        minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments)
    });
    environment.set_formatter(|out, state, value| match python_word(value) {
        Some(word) => Ok(out.write_str(word)?),
        None => {
            check_extent(value)?;
            minijinja::escape_formatter(out, state, value)
        }
    });
    environment.add_filter("tojson", tojson);
    environment
}

fn python_word(value: &Value) -> Option<&'static str> {
    match value.kind() {
        ValueKind::None => Some("None"),
        ValueKind::Bool => Some(if value.is_true() { "True" } else { "False" }),
        _ => None,
    }
}

/// Refuses to write out what holds itself, or doubles at each of its levels: it would overflow the stack or
/// never end, and costs no fuel.
fn check_extent(value: &Value) -> Result<(), Error> {
    fn spend(value: &Value, depth: usize, left: &mut usize) -> Result<(), Error> {
        let cost = 1 + value.as_str().map_or(0, |text| text.len() / 64);
        *left = left.checked_sub(cost).ok_or_else(|| refusal("a value too large to be written out"))?;
        let is_map = match value.kind() {
            ValueKind::Map => true,
            ValueKind::Seq | ValueKind::Iterable => false,
            _ => return Ok(()),
        };
        if depth == MAX_DEPTH {
            return Err(refusal(format!("a value more than {MAX_DEPTH} levels deep")));
        }
        for item in value.try_iter()? {
            spend(&item, depth + 1, left)?;
            if is_map {
                spend(&value.get_item(&item)?, depth + 1, left)?;
            }
        }
        Ok(())
    }
    spend(value, 0, &mut { MAX_EXTENT })
}

/// What a template says about messages it does not take.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// What to say of a template that ran out of fuel, which the library's words leave open.
pub(crate) fn out_of_fuel(error: &Error) -> Option<String> {
    let is_out = error.kind() == ErrorKind::OutOfFuel;
    is_out.then(|| format!("stopped after {FUEL} steps without an end; does it loop over too much?"))
}

/// A template's error as one line: what it raised itself, or what went wrong in it.
pub(crate) fn describe(error: &Error) -> String {
    if let Some(message) = out_of_fuel(error) {
        return message;
    }
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return message.clone();
        }
        source = cause.source();
    }
    error.to_string()
}

/// `tojson` of transformers: `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`.
fn tojson(_: &State<'_, '_>, value: &Value, indent: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<Value>>("indent")?,
    };
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let mut writer = JsonWriter {
        out: String::new(),
        indent: indent.filter(|indent| !indent.is_none()).map(indent_unit).transpose()?,
        item_separator: ", ".to_owned(),
        key_separator: ": ".to_owned(),
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    if writer.indent.is_some() {
        writer.item_separator = ",".to_owned();
    }
    if let Some(separators) = separators {
        [writer.item_separator, writer.key_separator] = separators
            .try_into()
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, "separators are two strings"))?;
    }
    check_extent(value)?;
    writer.write(value, 0)?;
    Ok(Value::from(writer.out))
}

fn indent_unit(indent: Value) -> Result<String, Error> {
    let refuse = |found: &dyn std::fmt::Display| {
        let message = format!("tojson: expected an indent from 0 to {MAX_INDENT}, found {found}");
        Error::new(ErrorKind::InvalidOperation, message)
    };
    if let Some(unit) = indent.as_str() {
        let chars = unit.chars().count();
        return if chars <= MAX_INDENT {
            Ok(unit.to_owned())
        } else {
            Err(refuse(&format!("a text of {chars}")))
        };
    }
    match usize::try_from(indent.clone()) {
        Ok(spaces) if spaces <= MAX_INDENT => Ok(" ".repeat(spaces)),
        _ => Err(refuse(&indent)),
    }
}

struct JsonWriter {
    out: String,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ascii: bool,
    sort_keys: bool,
}

impl JsonWriter {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.out.push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_all(['[', ']'], &items, depth, |writer, item| writer.write(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_all(['{', '}'], &keys, depth, |writer, key| {
                    writer.write_text(&key.to_string());
                    let separator = writer.key_separator.clone();
                    writer.out.push_str(&separator);
                    writer.write(&value.get_item(key)?, depth + 1)
                })?;
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::BadSerialization,
                    format!("tojson of a value that is {kind}"),
                ));
            }
        }
        Ok(())
    }

    fn write_all(
        &mut self,
        [open, close]: [char; 2],
        items: &[Value],
        depth: usize,
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (idx, item) in items.iter().enumerate() {
            if idx > 0 {
                let separator = self.item_separator.clone();
                self.out.push_str(&separator);
            }
            self.break_line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.break_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn break_line(&mut self, depth: usize) {
        if let Some(unit) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&unit.repeat(depth));
        }
    }

    fn write_text(&mut self, text: &str) {
        let quoted = crate::json::quoted(text);
        if !self.ascii {
            self.out.push_str(&quoted);
            return;
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                self.out.push(c);
            } else {
                let mut units = [0; 2];
                c.encode_utf16(&mut units)
                    .iter()
                    .for_each(|unit| self.out.push_str(&format!("\\u{unit:04x}")));
            }
        }
    }
}

/// A float as Python's `repr` writes it: with an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "NaN"
        } else if value > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').expect("scientific notation has an exponent");
    let exponent: i32 = exponent.parse().expect("an exponent is an integer");
    if value == 0.0 || (-4..16).contains(&exponent) {
        return format!("{value:?}");
    }
    format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, value: &str) -> String {
        let value: serde_json::Value = serde_json::from_str(value).unwrap();
        let context = Value::from_pairs([("x", crate::json::to_template(&value))]);
        chat_environment(0).render_str(template, context).unwrap_or_else(|error| describe(&error))
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        let value = r#"{"b": [1, 2.0, 1e16, 1.5e-7, null, true], "a": "<é> & 'q' \"d\" \n\u0001"}"#;
        assert_eq!(
            render("{{ x | tojson }}", value),
            r#"{"a": "<é> & 'q' \"d\" \n\u0001", "b": [1, 2.0, 1e+16, 1.5e-07, null, true]}"#
        );
        assert_eq!(render("{{ x | tojson(ensure_ascii=true) }}", r#""é😀""#), r#""\u00e9\ud83d\ude00""#);
        assert_eq!(
            render("{{ x | tojson(indent=2) }}", r#"{"a": [1, {}], "b": []}"#),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}"
        );
        assert_eq!(render("{{ x | tojson(separators=(',', ':')) }}", r#"[1, {"a": 2}]"#), r#"[1,{"a":2}]"#);
    }

    #[test]
    fn values_print_and_behave_as_in_python() {
        assert_eq!(render("{{ x }} {{ none }} {{ x == true }}", "true"), "True None True");
        assert_eq!(render("{{ x.split(',')[-1].lstrip() }}", r#""a, b""#), "b");
        assert_eq!(render("{{ '<' ~ x ~ '>' }}", r#""&""#), "<&>");
    }

    #[test]
    fn blocks_take_their_line_with_them() {
        assert_eq!(render("a\n  {% if x %}\nb\n  {% endif %}\nc\n", "true"), "a\nb\nc");
    }

    #[test]
    fn a_raised_exception_is_told_in_its_own_words() {
        assert_eq!(render("{{ raise_exception('roles must alternate') }}", "1"), "roles must alternate");
    }

    #[test]
    fn values_without_an_end_are_not_written_out() {
        let own = "{% set ns = namespace() %}{% set ns.x = ns %}";
        let deep =
            "{% set ns = namespace(x=1) %}{% for i in range(1000) %}{% set ns.x = [ns.x] %}{% endfor %}";
        for (template, written) in
            [(own, "ns"), (own, "ns | tojson"), (deep, "ns.x"), (deep, "ns.x | tojson")]
        {
            let message = render(&format!("{template}{{{{ {written} }}}}"), "1");
            assert!(message.contains("a value more than 200 levels deep"), "{message}");
        }
        let twice =
            "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
        for written in ["ns.x", "ns.x | tojson"] {
            let message = render(&format!("{twice}{{{{ {written} }}}}"), "1");
            assert!(message.contains("a value too large to be written out"), "{message}");
        }
    }

    #[test]
    fn fields_of_a_format_are_not_filled_up_without_an_end() {
        let wide =
            ["{:>10000000000}", "20000 {:}>20000}", "{{ {:20000}", "{x[}]}{y[:]:é^20000}", "{x[}:]:.20000}"];
        for format in wide {
            let message = render(&format!("{{{{ '{format}'.format('a', x={{'}}': 1}}, y={{}}) }}}}"), "1");
            assert!(
                message.contains("format: expected numbers of at most 4 digits in its fields"),
                "{format}: {message}"
            );
        }
        assert_eq!(render("{{ '{:>5}'.format('a') }}", "1"), "    a");
        let texts = "{{ '{} of 20000, {{10000}} {:}<3}: 30000'.format(x, 'a') }}";
        assert_eq!(render(texts, "7"), "7 of 20000, {10000} a}}: 30000");
    }

    #[test]
    fn the_date_is_the_one_the_caller_gave() {
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}", "1"), "01 Jan 1970");
        assert_eq!(
            render("{{ strftime_now('%Q') }}", "1"),
            "invalid operation: strftime_now does not know %Q (in <string>:1)"
        );
    }
}

//! What is wrong with a job file, where, and what may help: one message of a few lines, such as
//!
//! ```text
//! unknown key `micro_batch_token` in [pipeline]
//!  --> configs/summaries.toml:5:1
//!   |
//! 5 | micro_batch_token = 256
//!   | ^^^^^^^^^^^^^^^^^
//! hint: did you mean `micro_batch_tokens`?
//! ```

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Why no job can be made of a file and its overrides. Its text stands on its own: what was found, what
/// was expected, the place, and a hint where there is a cure.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(Box<Refusal>);

impl Error {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(Box::new(Refusal { message: message.into(), place: Place::Nowhere, hint: None }))
    }

    pub(crate) fn in_file(mut self, path: &Path) -> Self {
        self.0.place = Place::File(path.to_owned());
        self
    }

    /// `span` counts bytes in `text`.
    pub(crate) fn at(mut self, path: &Path, text: &str, span: Range<usize>) -> Self {
        self.0.place = Place::Line(path.to_owned(), Snippet::cut(text, span));
        self
    }

    /// `label` is the override as it was given, such as `--set a.b=value`.
    pub(crate) fn in_override(mut self, label: &str) -> Self {
        self.0.message = format!("in {label}: {}", self.0.message);
        self
    }

    pub(crate) fn hint(mut self, hint: impl Into<Option<String>>) -> Self {
        self.0.hint = hint.into().or(self.0.hint);
        self
    }
}

#[derive(Debug)]
struct Refusal {
    message: String,
    place: Place,
    hint: Option<String>,
}

#[derive(Debug)]
enum Place {
    Nowhere,
    File(PathBuf),
    Line(PathBuf, Snippet),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        match &self.place {
            Place::Nowhere => {}
            Place::File(path) => write!(f, "\n --> {}", path.display())?,
            Place::Line(path, snippet) => {
                let Snippet { line, column, text, before, width } = snippet;
                let gutter = line.to_string().len();
                write!(f, "\n{:gutter$}--> {}:{line}:{column}", "", path.display())?;
                write!(f, "\n{:gutter$} |", "")?;
                write!(f, "\n{line} | {text}")?;
                write!(f, "\n{:gutter$} | {before}{}", "", "^".repeat(*width))?;
            }
        }
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

/// A line of the file with the part that is meant.
#[derive(Debug)]
struct Snippet {
    /// From 1.
    line: usize,
    /// In characters, from 1.
    column: usize,
    /// The line, or the part of a long one around the column.
    text: String,
    /// White space up to the part, tabs kept, so that the carets stand under it.
    before: String,
    /// Characters to underline, at least 1.
    width: usize,
}

/// Characters of a line that are shown; what is longer is cut around the place.
const MAX_SHOWN: usize = 100;
/// Of these, how many stand before the place in a line that is cut.
const SHOWN_BEFORE: usize = 40;

impl Snippet {
    fn cut(text: &str, span: Range<usize>) -> Self {
        // The parser may point one past the end, and a span may cover many lines: its first counts.
        let start = text.floor_char_boundary(span.start.min(text.len()));
        let end = text.floor_char_boundary(span.end.clamp(start, text.len()));
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |newline| start + newline);
        let line_text = text[line_start..line_end].trim_end_matches('\r');
        let column = text[line_start..start].chars().count();
        let width = text[start..end.min(line_start + line_text.len()).max(start)].chars().count();

        let is_cut = line_text.chars().count() > MAX_SHOWN;
        let skipped = if is_cut { column.saturating_sub(SHOWN_BEFORE) } else { 0 };
        let shown: String = line_text.chars().skip(skipped).take(MAX_SHOWN).collect();
        let ends_early = line_text.chars().count() > skipped + MAX_SHOWN;
        let (head, tail) = (if skipped > 0 { "…" } else { "" }, if ends_early { "…" } else { "" });
        let before = shown.chars().take(column - skipped).map(|c| if c == '\t' { c } else { ' ' });
        Self {
            line: text[..line_start].matches('\n').count() + 1,
            column: column + 1,
            before: head.chars().map(|_| ' ').chain(before).collect(),
            text: format!("{head}{shown}{tail}"),
            width: width.min(MAX_SHOWN - (column - skipped).min(MAX_SHOWN)).max(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str, span: Range<usize>) -> String {
        Error::new("wrong").at(Path::new("job.toml"), text, span).to_string()
    }

    #[test]
    fn carets_stand_under_the_part_that_is_meant() {
        assert_eq!(
            shown("a = 1\nbc = 22\n", 11..13),
            "wrong\n --> job.toml:2:6\n  |\n2 | bc = 22\n  |      ^^"
        );
        assert_eq!(shown("\tä = 1\r\n", 6..7), "wrong\n --> job.toml:1:6\n  |\n1 | \tä = 1\n  | \t    ^");
    }

    #[test]
    fn a_place_past_the_end_and_one_over_many_lines_are_shown() {
        assert_eq!(shown("a =", 3..3), "wrong\n --> job.toml:1:4\n  |\n1 | a =\n  |    ^");
        assert_eq!(shown("a =\n", 4..9), "wrong\n --> job.toml:2:1\n  |\n2 | \n  | ^");
        assert_eq!(shown("a = [1,\n2]\n", 4..10), "wrong\n --> job.toml:1:5\n  |\n1 | a = [1,\n  |     ^^^");
    }

    #[test]
    fn a_long_line_is_cut_around_the_place() {
        let text = format!("{}X{}", "a".repeat(300), "b".repeat(300));
        let lines: Vec<_> = shown(&text, 300..301).lines().map(str::to_owned).collect();
        assert_eq!(lines[1], " --> job.toml:1:301");
        assert_eq!(lines[3], format!("1 | …{}X{}…", "a".repeat(40), "b".repeat(59)));
        assert_eq!(lines[4], format!("  | {}^", " ".repeat(41)));
    }
}

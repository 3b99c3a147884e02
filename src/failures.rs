//! Why rows of a job have failed, in one line.

use std::path::Path;

use jobs::{Failures, FirstFailure, LineFile};

use crate::text::grouped;

/// Codes that are named; what failed with others is counted together.
const MOST_CODES: usize = 5;

/// Characters of the first message that are shown.
const MOST_CHARACTERS: usize = 300;

/// Why rows of the job in an output folder have failed, and where to read on.
pub(crate) fn line(folder: &Path) -> String {
    let file = folder.join(LineFile::Errors.name());
    match Failures::of(folder) {
        Ok(failures) => format!("{}all of them in {}", reasons(&failures), file.display()),
        // What stopped a job may keep its lines from being read, too.
        Err(error) => format!("see {} ({:#})", file.display(), anyhow::Error::from(error)),
    }
}

/// Such as `6 missing_field, 1 invalid_type; the first, line 1: [prompt] user asks for promt; `.
fn reasons(failures: &Failures) -> String {
    let mut codes: Vec<(&str, u64)> =
        failures.by_code.iter().map(|(code, rows)| (code.as_str(), *rows)).collect();
    codes.sort_by_key(|(_, rows)| std::cmp::Reverse(*rows));
    let others: u64 = codes.split_off(codes.len().min(MOST_CODES)).iter().map(|(_, rows)| rows).sum();
    if others > 0 {
        codes.push(("others", others));
    }
    let codes: Vec<String> = codes.iter().map(|(code, rows)| format!("{} {code}", grouped(*rows))).collect();
    let first = failures.first.as_ref().map(first).unwrap_or_default();
    format!("{}; {first}", codes.join(", "))
}

fn first(FirstFailure { line, custom_id, message }: &FirstFailure) -> String {
    let place = match (line, custom_id) {
        (Some(line), _) => format!(", line {} of the input", grouped(*line)),
        (None, Some(custom_id)) => format!(", {custom_id}"),
        (None, None) => String::new(),
    };
    // A message may quote the row's own text.
    let mut shown: String = message.replace(char::is_control, " ");
    if let Some((end, _)) = shown.char_indices().nth(MOST_CHARACTERS) {
        shown.replace_range(end.., "…");
    }
    format!("the first{place}: {shown}; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(codes: &[(&str, u64)], message: &str) -> Failures {
        let by_code = codes.iter().map(|(code, rows)| ((*code).to_owned(), *rows)).collect();
        let first =
            FirstFailure { line: None, custom_id: Some("row".to_owned()), message: message.to_owned() };
        Failures { by_code, first: Some(first) }
    }

    #[test]
    fn the_most_frequent_codes_are_named_and_the_others_counted() {
        let codes = [("a", 1), ("b", 2_000), ("c", 3), ("d", 4), ("e", 5), ("f", 6), ("g", 1)];
        let said = reasons(&failures(&codes, "no\nnumber"));
        assert_eq!(said, "2,000 b, 6 f, 5 e, 4 d, 3 c, 2 others; the first, row: no number; ");
    }

    #[test]
    fn a_long_message_is_cut() {
        let said = reasons(&failures(&[("a", 1)], &"ä".repeat(1_000)));
        assert_eq!(said, format!("1 a; the first, row: {}…; ", "ä".repeat(MOST_CHARACTERS)));
    }
}

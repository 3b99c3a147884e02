//! Grading answers against the truth that rows bring along.
//!
//! A graded row has an `answer`, and perhaps a `kind`. Its line says which of its choices were right, so
//! that lines can be picked by it, and so that the scores of a job are those of its lines, in whichever
//! runs and whatever order they were written.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result, RowError};
use crate::json::show;
use crate::line::LineFile;

/// How an answer is found in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grader {
    /// What stands in the last `\boxed{…}`.
    Boxed,
}

/// What a row says about its right answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Truth {
    grader: Grader,
    answer: String,
    kind: Option<String>,
}

/// What a line says about its choices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Grade {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    /// By choice; none for a row that has failed.
    correct: Vec<bool>,
}

impl Grader {
    /// Its name in a job file.
    pub fn name(self) -> &'static str {
        match self {
            Grader::Boxed => "boxed",
        }
    }

    /// The truth of a plain row.
    pub(crate) fn truth(self, row: &Map<String, Value>) -> Result<Truth, RowError> {
        let answer = match row.get("answer") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Number(number)) => number.to_string(),
            Some(other) => {
                let message = format!("expected a string or a number, found {}", show(other));
                return Err(RowError::of("answer", "invalid_type", message));
            }
            None => {
                return Err(RowError::of("answer", "missing_field", "[grade] needs an answer in each row"));
            }
        };
        let kind = row.get("kind").and_then(Value::as_str).map(str::to_owned);
        Ok(Truth { grader: self, answer, kind })
    }
}

impl Truth {
    pub(crate) fn grade<'a>(&self, texts: impl Iterator<Item = &'a str>) -> Grade {
        Grade { kind: self.kind.clone(), correct: texts.map(|text| self.is_met_by(text)).collect() }
    }

    fn is_met_by(&self, text: &str) -> bool {
        let found = match self.grader {
            Grader::Boxed => last_boxed(text),
        };
        found.is_some_and(|found| is_same(found, &self.answer))
    }
}

/// What stands in the last `\boxed{…}` that is closed; braces inside it are in pairs.
fn last_boxed(text: &str) -> Option<&str> {
    const OPEN: &str = "\\boxed{";
    text.rmatch_indices(OPEN).find_map(|(at, _)| {
        let inside = &text[at + OPEN.len()..];
        let mut depth = 1;
        let end = inside.find(|character| {
            depth += match character {
                '{' => 1,
                '}' => -1,
                _ => 0,
            };
            depth == 0
        })?;
        Some(&inside[..end])
    })
}

/// Whether two answers are the same but for spaces, or are the same integer.
fn is_same(found: &str, answer: &str) -> bool {
    let [found, answer] =
        [found, answer].map(|text| text.chars().filter(|c| !c.is_whitespace()).collect::<String>());
    found == answer || found.parse::<i128>().is_ok_and(|found| answer.parse() == Ok(found))
}

/// How well a job's rows were answered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Of all rows.
    pub all: Score,
    /// By the rows' `kind`, where they have one.
    pub kinds: BTreeMap<String, Score>,
}

/// How well some rows were answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// How many there are. One that has failed counts, as wrong.
    pub rows: u64,
    /// The mean over rows of the share of right choices: pass@1, the mean over as many runs as there are
    /// choices.
    pub pass_at_1: f64,
}

impl Score {
    fn add(&mut self, grade: &Grade) {
        let right = grade.correct.iter().filter(|&&is_right| is_right).count();
        let share = right as f64 / grade.correct.len().max(1) as f64;
        self.rows += 1;
        self.pass_at_1 += (share - self.pass_at_1) / self.rows as f64;
    }
}

impl Scores {
    /// The scores of the lines in an output folder.
    ///
    /// # Errors
    /// A file that cannot be read, or a line that is none of ours.
    pub fn read(folder: &Path) -> Result<Scores> {
        #[derive(Deserialize)]
        struct Graded {
            grade: Option<Grade>,
        }
        let mut scores = Scores::default();
        for file in [LineFile::Output, LineFile::Errors] {
            let path = folder.join(file.name());
            let lines = match File::open(&path) {
                Ok(file) => BufReader::new(file).lines(),
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(source) => return Err(Error::read(&path, source)),
            };
            for line in lines {
                let line = line.map_err(|source| Error::read(&path, source))?;
                let line: Graded =
                    serde_json::from_str(&line).map_err(|error| Error::malformed(&path, error))?;
                // A row that was refused before anybody looked for its answer.
                let grade = line.grade.unwrap_or(Grade { kind: None, correct: vec![] });
                scores.all.add(&grade);
                if let Some(kind) = &grade.kind {
                    scores.kinds.entry(kind.clone()).or_default().add(&grade);
                }
            }
        }
        Ok(scores)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn truth(row: Value) -> Truth {
        Grader::Boxed.truth(row.as_object().unwrap()).unwrap()
    }

    #[test]
    fn the_last_closed_box_counts() {
        let truth = truth(json!({"answer": "3, 17"}));
        let right = [r"\boxed{3, 17}", r"\boxed{1} or \boxed{3,17}.", r"\boxed{ 3,  17 } and \boxed{4"];
        let wrong = ["3, 17", r"\boxed{17, 3}", r"\boxed{3, 17} no, \boxed{2}", r"\boxed{}", ""];
        assert_eq!(truth.grade(right.into_iter()).correct, [true; 3]);
        assert_eq!(truth.grade(wrong.into_iter()).correct, [false; 5]);
    }

    #[test]
    fn integers_are_the_same_by_value_and_braces_come_in_pairs() {
        assert_eq!(
            truth(json!({"answer": 42})).grade([r"\boxed{042}", r"\boxed{+42}"].into_iter()).correct,
            [true, true]
        );
        let truth = truth(json!({"answer": r"\frac{1}{2}"}));
        assert_eq!(truth.grade([r"\boxed{\frac{1}{2}}"].into_iter()).correct, [true]);
    }

    #[test]
    fn a_row_without_an_answer_cannot_be_graded() {
        for row in [json!({"q": 1}), json!({"answer": null}), json!({"answer": [1]})] {
            let error = Grader::Boxed.truth(row.as_object().unwrap()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("answer"));
        }
    }

    #[test]
    fn scores_are_means_over_rows_and_failed_ones_count_as_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let output =
            "{\"grade\":{\"kind\":\"a\",\"correct\":[true,false]}}\n{\"grade\":{\"correct\":[true,true]}}\n";
        std::fs::write(folder.path().join("output.jsonl"), output).unwrap();
        std::fs::write(
            folder.path().join("errors.jsonl"),
            "{\"grade\":{\"kind\":\"a\",\"correct\":[]}}\n{}\n",
        )
        .unwrap();
        let scores = Scores::read(folder.path()).unwrap();
        assert_eq!(scores.all, Score { rows: 4, pass_at_1: 0.375 });
        assert_eq!(scores.kinds["a"], Score { rows: 2, pass_at_1: 0.25 });
    }
}

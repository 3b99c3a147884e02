//! Which bars were met: said plainly, and nothing more. A figure of speed is never an error.

use std::fmt::Write;

use anyhow::{Result, ensure};

use crate::items::{Item, Setting};
use crate::suite::Outcome;

const MET: &str = "bar met";
const NOT_MET: &str = "bar **not met**";

/// What a line of results ends with that a bar was held against.
pub(crate) fn verdict(is_met: bool) -> &'static str {
    if is_met { MET } else { NOT_MET }
}

/// The verdict on an item, by what its lines say; of one without a bar only that it failed. A bar that no line speaks of was held against
/// nothing, and is not met by that.
fn of_item(item: &Item, outcome: &Outcome) -> Option<&'static str> {
    let has = |lines: &[String], word: &str| lines.iter().any(|line| line.contains(word));
    match outcome {
        Outcome::Failed(_) => Some("**failed**"),
        _ if item.bar.starts_with("none") => None,
        Outcome::NotRun(_) => Some("not run"),
        Outcome::Lines(lines) if has(lines, NOT_MET) => Some("**not met**"),
        Outcome::Lines(lines) if item.is_check || has(lines, MET) => Some("met"),
        Outcome::Lines(_) => Some("held against nothing"),
    }
}

/// A table of all bars, of those that were met by each check a line for their section alone.
#[derive(Debug, Default)]
pub(crate) struct Bars {
    rows: Vec<String>,
    /// Sections with checks that were right, and how many.
    right: Vec<(&'static str, usize)>,
}

impl Bars {
    pub(crate) fn add(&mut self, item: &Item, outcome: &Outcome) {
        let Some(verdict) = of_item(item, outcome) else { return };
        if !item.is_check || verdict != "met" {
            self.rows.push(format!("| {}: {} | {} | {verdict} |\n", item.section, item.name, item.bar));
            return;
        }
        match self.right.iter_mut().find(|(section, _)| *section == item.section) {
            Some((_, count)) => *count += 1,
            None => self.right.push((item.section, 1)),
        }
    }

    /// The table; nothing where no bar was held against anything.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        if self.rows.is_empty() && self.right.is_empty() {
            return text;
        }
        text += "\n| question | bar | verdict |\n|---|---|---|\n";
        for (section, count) in &self.right {
            writeln!(text, "| {section}: {count} checks | each within its bound | met |")
                .expect("a text takes it");
        }
        self.rows.iter().for_each(|row| text += row);
        text
    }
}

/// That verdicts are what lines say: a part of the test of this program, which has no runner of its own.
pub(crate) fn check() -> Result<()> {
    let told = |words: &[&str]| Outcome::Lines(words.iter().map(|word| format!("12 ms; {word}")).collect());
    let silent = || told(&["", ""]);
    let (bar, none) = ("85 % of the best", "none, see the bulk job");
    let cases = [
        (bar, false, silent(), Some("held against nothing")),
        (bar, false, told(&[MET, ""]), Some("met")),
        (bar, false, told(&[NOT_MET]), Some("**not met**")),
        (bar, false, told(&[MET, NOT_MET]), Some("**not met**")),
        (bar, false, Outcome::NotRun(String::new()), Some("not run")),
        (bar, false, Outcome::Failed(String::new()), Some("**failed**")),
        (bar, true, silent(), Some("met")),
        (none, false, silent(), None),
        (none, false, Outcome::NotRun(String::new()), None),
        (none, true, Outcome::Failed(String::new()), Some("**failed**")),
    ];
    let item = |bar, is_check| {
        let make = if is_check { Item::check } else { Item::new };
        make("Models", "Super", bar, [1, 1], |_: &Setting| Ok(Vec::new()))
    };
    for (index, (bar, is_check, outcome, expected)) in cases.into_iter().enumerate() {
        let found = of_item(&item(bar, is_check), &outcome);
        ensure!(found == expected, "case {index}, bar {bar}: {found:?}, expected {expected:?}");
    }
    let mut bars = Bars::default();
    bars.add(&item(none, false), &silent());
    ensure!(bars.text().is_empty(), "a model without a bar is in the table: {}", bars.text());
    Ok(())
}

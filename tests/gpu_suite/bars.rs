//! Which bars were met: said plainly, and nothing more. A figure of speed is never an error.

use std::fmt::Write;

use crate::items::Item;
use crate::suite::Outcome;

const MET: &str = "bar met";
const NOT_MET: &str = "bar **not met**";

/// What a line of results ends with that a bar was held against.
pub(crate) fn verdict(is_met: bool) -> &'static str {
    if is_met { MET } else { NOT_MET }
}

/// The verdict on an item, by what its lines say; nothing of one without a bar.
fn of_item(item: &Item, outcome: &Outcome) -> Option<&'static str> {
    let has = |lines: &[String], word: &str| lines.iter().any(|line| line.contains(word));
    match outcome {
        _ if item.bar == "none" => None,
        Outcome::Failed(_) => Some("**failed**"),
        Outcome::NotRun(_) => Some("not run"),
        Outcome::Lines(lines) if has(lines, NOT_MET) => Some("**not met**"),
        Outcome::Lines(_) => Some("met"),
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

//! What a test runner asks of this program, in libtest's words: which tests there are, and to run those that filters leave.

use anyhow::{Result, ensure};

/// Words that are this program's own: one that has any of them was not started by a test runner.
const OWN: [&str; 8] =
    ["--out", "--seconds", "--libraries", "--small", "--only", "--cache", "--pack", "--item"];

/// libtest's options that are followed by a value.
const WITH_VALUE: [&str; 7] =
    ["--skip", "--test-threads", "--format", "--color", "--logfile", "--shuffle-seed", "-Z"];

/// What a test runner may ask.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// The names of tests, or of those that are ignored, of which there are none.
    List { ignored: bool },
    /// To run the one test, or not: filters leave it out.
    Test { is_meant: bool },
}

impl Asked {
    /// What is asked with these words of a program whose one test has this name; nothing where they are the suite's own.
    pub(crate) fn of(words: &[&str], test: &str) -> Option<Asked> {
        if words.iter().any(|word| OWN.contains(word)) {
            return None;
        }
        let has = |flag: &str| words.contains(&flag);
        if has("--list") {
            return Some(Asked::List { ignored: has("--ignored") });
        }
        let is_like = |filter: &str| if has("--exact") { test == filter } else { test.contains(filter) };
        let (mut filters, mut is_skipped) = (vec![], false);
        let mut words_left = words.iter();
        while let Some(word) = words_left.next() {
            let (key, value) = match word.split_once('=') {
                Some((key, value)) if key.starts_with('-') => (key, Some(value)),
                _ if WITH_VALUE.contains(word) => (*word, words_left.next().copied()),
                _ => (*word, None),
            };
            is_skipped |= key == "--skip" && value.is_some_and(is_like);
            if !key.starts_with('-') {
                filters.push(*word);
            }
        }
        let is_meant = filters.is_empty() || filters.into_iter().any(is_like);
        Some(Asked::Test { is_meant: is_meant && !is_skipped && !has("--ignored") })
    }
}

/// That words are understood as libtest understands them: a part of the test of this program, which has no runner of its own.
pub(crate) fn check() -> Result<()> {
    let is_run = |words: &[&str]| match Asked::of(words, "it_works_whole") {
        Some(Asked::Test { is_meant }) => Some(is_meant),
        _ => None,
    };
    let cases: [(&[&str], Option<bool>); 14] = [
        (&[], Some(true)),
        (&["works"], Some(true)),
        (&["another", "whole"], Some(true)),
        (&["another"], Some(false)),
        (&["--exact", "it_works_whole", "--nocapture"], Some(true)),
        (&["it_works", "--exact"], Some(false)),
        (&["--test-threads", "2"], Some(true)),
        (&["--test-threads=2", "another"], Some(false)),
        (&["--skip", "works"], Some(false)),
        (&["--skip=another"], Some(true)),
        (&["--ignored"], Some(false)),
        (&["--include-ignored"], Some(true)),
        (&["pack"], Some(false)),
        (&["--small", "--out", "here"], None),
    ];
    for (words, expected) in cases {
        let found = is_run(words);
        ensure!(found == expected, "{words:?} is taken for {found:?}, expected {expected:?}");
    }
    let list = Asked::of(&["--list", "--format", "terse", "--ignored"], "it_works_whole");
    ensure!(list == Some(Asked::List { ignored: true }), "a list is taken for {list:?}");
    Ok(())
}

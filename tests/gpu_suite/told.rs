//! What a process says of the items that it was asked, one after the other, and what is known of them when it has ended.

use anyhow::{Result, ensure};

use crate::suite::Outcome;

/// What lines begin with: anything else was not said by an item, as libraries speak too.
const LINE: &str = "line: ";
const NOTHING_ASKED: &str = "nothing asked: ";
/// Of an item that was answered, behind its lines.
const END: &str = "end";

/// How a process came to its end.
#[derive(Debug)]
pub(crate) enum End {
    /// With an answer to all.
    Well,
    /// By itself, and why.
    Died(String),
    /// When its time was over, and what it had said.
    NotDone(String),
}

/// An item's answer.
pub(crate) fn answer(lines: &[String]) -> String {
    let mut text: String = lines.iter().map(|line| format!("{LINE}{}\n", line.replace('\n', " "))).collect();
    text += END;
    text
}

/// Of one that has asked nothing, and why.
pub(crate) fn nothing_asked(why: &str) -> String {
    format!("{NOTHING_ASKED}{}", why.replace('\n', " "))
}

/// The answers in what a process has said so far.
pub(crate) fn answers(said: &str) -> Vec<Outcome> {
    let (mut answers, mut lines) = (Vec::new(), Vec::new());
    for said in said.lines() {
        if let Some(line) = said.strip_prefix(LINE) {
            lines.push(line.to_owned());
        } else if let Some(why) = said.strip_prefix(NOTHING_ASKED) {
            answers.push(Outcome::NotRun(why.to_owned()));
        } else if said == END {
            answers.push(Outcome::Lines(std::mem::take(&mut lines)));
        }
    }
    answers
}

/// What is known of so many items when their process has ended: of the first ones, which may be all. One at which a process ended that
/// had answered others is asked again, as the first of another process, for what it met may be what they left behind; why it ended is
/// told then.
pub(crate) fn settle(mut answers: Vec<Outcome>, asked: usize, end: End) -> (Vec<Outcome>, Option<String>) {
    let failed = match end {
        End::Well => return (answers, None),
        End::Died(why) if (1..asked).contains(&answers.len()) => return (answers, Some(why)),
        End::Died(why) | End::NotDone(why) => Outcome::Failed(why),
    };
    answers.truncate(asked - 1); // It has failed also where all were answered.
    answers.push(failed);
    (answers, None)
}

/// That what is said is understood: a part of the test of this program, which has no runner of its own.
pub(crate) fn check() -> Result<()> {
    let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    let said = |parts: &[String]| parts.iter().map(|part| format!("{part}\n")).collect::<String>();
    let both = said(&[answer(&lines(&["end", "line: 2"])), "NCCL version 2.30".to_owned(), answer(&[])]);
    let three = both.clone() + &said(&[nothing_asked("no group of 2\nhere")]);
    let (ended, died) = (|| End::Well, || End::Died("aborted".to_owned()));
    let not_done = || End::NotDone("not done".to_owned());
    let (first, second) = ("[end|line: 2]", "[]");
    let cases: [(&str, usize, End, &[&str], bool); 7] = [
        (&three, 3, ended(), &[first, second, "not run: no group of 2 here"], false),
        (&both, 4, died(), &[first, second], true),
        (&both, 2, died(), &[first, "failed: aborted"], false),
        (&both, 4, not_done(), &[first, second, "failed: not done"], false),
        ("", 3, died(), &["failed: aborted"], false),
        ("line: begun\n", 1, died(), &["failed: aborted"], false),
        ("line: begun\n", 3, not_done(), &["failed: not done"], false),
    ];
    for (index, (said, asked, end, expected, is_asked_again)) in cases.into_iter().enumerate() {
        let (found, behind_others) = settle(answers(said), asked, end);
        let found: Vec<String> = found.iter().map(in_short).collect();
        ensure!(found == expected, "case {index}: {found:?}, expected {expected:?}");
        ensure!(behind_others.is_some() == is_asked_again, "case {index}: {behind_others:?}");
    }
    Ok(())
}

fn in_short(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Lines(lines) => format!("[{}]", lines.join("|")),
        Outcome::Failed(why) => format!("failed: {why}"),
        Outcome::NotRun(why) => format!("not run: {why}"),
    }
}

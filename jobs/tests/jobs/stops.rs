//! Stop strings end a sequence by its text, wherever the borders of tokens lie.

use jobs::{StopMatcher, Transcript};
use proptest::prelude::*;
use scheduler::Sampling;

use crate::model::{self, HELLO, WORLD};

fn sampling(stop: &[&str], min_tokens: u32) -> Sampling {
    Sampling {
        min_tokens,
        stop: stop.iter().map(|stop| (*stop).to_owned()).collect(),
        ..Sampling::greedy(100)
    }
}

/// After how many tokens a sequence ends, and the text that is left of it.
fn run(tokens: &[u32], sampling: &Sampling) -> (Option<usize>, String) {
    let mut matcher = StopMatcher::new(model::tokenizer(), sampling);
    let mut transcript = Transcript::new(model::tokenizer(), sampling);
    for (idx, &token) in tokens.iter().enumerate() {
        let has_ended = matcher.push(token);
        assert_eq!(transcript.push(token), has_ended);
        if has_ended {
            return (Some(idx + 1), transcript.finish());
        }
    }
    (None, transcript.finish())
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn a_stop_string_is_found_across_token_borders_and_inside_tokens() {
    let tokens = [HELLO, WORLD, u32::from(b'!')];
    assert_eq!(run(&tokens, &sampling(&["lo w"], 0)), (Some(2), "hel".to_owned()));
    assert_eq!(run(&tokens, &sampling(&["ell"], 0)), (Some(1), "h".to_owned()));
    assert_eq!(run(&tokens, &sampling(&["d!"], 0)), (Some(3), "hello worl".to_owned()));
    assert_eq!(run(&tokens, &sampling(&["d!!"], 0)), (None, "hello world!".to_owned()));
}

#[test]
fn the_match_that_ends_first_counts_then_the_longest() {
    let tokens = [HELLO, WORLD];
    assert_eq!(run(&tokens, &sampling(&["world", "o w"], 0)), (Some(2), "hell".to_owned()));
    assert_eq!(run(&tokens, &sampling(&["o", "llo"], 0)), (Some(1), "he".to_owned()));
}

#[test]
fn a_stop_string_that_begins_twice_is_found_the_second_time() {
    assert_eq!(run(&bytes("aaab"), &sampling(&["aab"], 0)), (Some(4), "a".to_owned()));
}

#[test]
fn characters_of_several_tokens_match_when_they_are_whole() {
    assert_eq!(run(&bytes("a€b"), &sampling(&["€"], 0)), (Some(4), "a".to_owned()));
}

#[test]
fn only_text_after_the_least_number_of_tokens_completes_a_match() {
    let tokens = bytes("ab.c.d");
    assert_eq!(run(&tokens, &sampling(&["."], 0)), (Some(3), "ab".to_owned()));
    assert_eq!(run(&tokens, &sampling(&["."], 3)), (Some(5), "ab.c".to_owned()));
    assert_eq!(run(&tokens, &sampling(&["b."], 2)), (Some(3), "a".to_owned()));
    assert_eq!(run(&tokens, &sampling(&["."], 5)), (None, "ab.c.d".to_owned()));
}

#[test]
fn a_reader_who_watches_sees_nothing_that_is_taken_back() {
    let mut transcript = Transcript::new(model::tokenizer(), &sampling(&["END"], 0));
    let shown: Vec<String> = bytes("aEN E END")
        .into_iter()
        .map(|token| {
            transcript.push(token);
            transcript.take_settled().to_owned()
        })
        .collect();
    assert_eq!(shown, ["a", "", "", "EN ", "", "E ", "", "", ""]);
    assert_eq!(transcript.finish_settled(), "");

    let mut transcript = Transcript::new(model::tokenizer(), &sampling(&["END"], 0));
    transcript.push(HELLO);
    transcript.push(u32::from(b'E'));
    assert_eq!(transcript.take_settled(), "hello");
    assert_eq!(transcript.finish_settled(), "E");
}

proptest! {
    #[test]
    fn the_outcome_is_that_of_reading_character_by_character(
        words in prop::collection::vec("[ab]{1,3}", 1..12),
        stop in prop::collection::vec("[ab]{1,4}", 1..3),
    ) {
        let text = words.concat();
        let stops: Vec<&str> = stop.iter().map(String::as_str).collect();
        // Bytes as tokens: the text is cut everywhere.
        let (_, cut) = run(&bytes(&text), &sampling(&stops, 0));
        let first = (1..=text.len()).find_map(|end| {
            stops.iter().filter(|stop| text[..end].ends_with(**stop)).map(|stop| end - stop.len()).min()
        });
        prop_assert_eq!(cut, &text[..first.unwrap_or(text.len())]);
    }
}

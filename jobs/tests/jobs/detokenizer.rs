//! Text comes out of tokens as if they had been decoded at once.

use std::sync::Arc;

use jobs::{Detokenizer, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::model::{self, BOS, EOT, HELLO, VOCAB, WORLD};

fn deltas(tokenizer: &Arc<Tokenizer>, tokens: &[u32]) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(tokenizer.clone());
    let mut deltas: Vec<String> = tokens.iter().map(|&token| detokenizer.push(token)).collect();
    deltas.push(detokenizer.finish());
    deltas
}

#[test]
fn a_character_comes_out_when_its_last_byte_is_there() {
    let tokenizer = model::tokenizer();
    assert_eq!(deltas(&tokenizer, &[0xF0, 0x9F, 0x98, 0x80, u32::from(b'!')]), ["", "", "", "😀", "!", ""]);
}

#[test]
fn broken_characters_become_replacement_characters_as_soon_as_they_are_known_to_be() {
    let tokenizer = model::tokenizer();
    assert_eq!(
        deltas(&tokenizer, &[0xE2, 0x82, HELLO, 0xFF, 0xC3]),
        ["", "", "\u{fffd}hello", "\u{fffd}", "", "\u{fffd}"]
    );
}

#[test]
fn special_tokens_and_ids_without_a_token_are_left_out() {
    let tokenizer = model::tokenizer();
    assert_eq!(deltas(&tokenizer, &[BOS, HELLO, EOT, WORLD, 5000]), ["", "hello", "", " world", "", ""]);
}

#[test]
fn sentence_pieces_keep_the_space_in_front_and_join_their_bytes() {
    let tokenizer = sentence_pieces();
    let euro = [5, 6, 7].map(|byte| byte + 1);
    let tokens: Vec<u32> = [4, 3].into_iter().chain(euro).chain([4]).collect();
    assert_eq!(deltas(&tokenizer, &tokens), [" the", "n", "", "", "€", " the", ""]);
    assert_eq!(tokenizer.decode(&tokens).unwrap(), "then€ the");
    assert_eq!(tokenizer.token_bytes(4).unwrap(), b" the");
    assert_eq!(tokenizer.token_bytes(6).unwrap(), [0xE2]);
}

#[test]
fn a_vocabulary_of_words_joins_them_as_its_decoder_does() {
    let tokenizer = words();
    let tokens = [1, 2, 3, 1, 4];
    assert_eq!(deltas(&tokenizer, &tokens).concat(), tokenizer.decode(&tokens).unwrap());
    assert_eq!(deltas(&tokenizer, &tokens), ["run", "ning", " dog", " run", " far", ""]);
}

#[test]
fn the_text_of_a_long_sequence_costs_no_more_per_token_than_that_of_a_short_one() {
    // Quadratic work on this many tokens would take minutes.
    let tokenizer = model::tokenizer();
    let tokens = vec![0xE2; 300_000];
    assert_eq!(deltas(&tokenizer, &tokens).concat().chars().count(), tokens.len());
}

proptest! {
    #[test]
    fn any_tokens_give_the_text_of_all_at_once(tokens in prop::collection::vec(0..VOCAB as u32, 0..40)) {
        let tokenizer = model::tokenizer();
        prop_assert_eq!(deltas(&tokenizer, &tokens).concat(), tokenizer.decode(&tokens).unwrap());
    }

    #[test]
    fn any_text_comes_back_from_its_tokens(text in "\\PC{0,40}") {
        let tokenizer = model::tokenizer();
        let tokens = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(deltas(&tokenizer, &tokens).concat(), text);
    }
}

fn tokenizer_of(model: Value, decoder: Value) -> Arc<Tokenizer> {
    let json = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": decoder, "model": model});
    Arc::new(Tokenizer::from_json(json.to_string().as_bytes()).unwrap())
}

/// Llama 2's kind.
fn sentence_pieces() -> Arc<Tokenizer> {
    let vocab =
        json!({"<unk>": 0, "t": 1, "h": 2, "n": 3, "▁the": 4, "▁": 5, "<0xE2>": 6, "<0x82>": 7, "<0xAC>": 8});
    tokenizer_of(
        json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": []}),
        json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
    )
}

/// BERT's kind.
fn words() -> Arc<Tokenizer> {
    let vocab = json!({"[UNK]": 0, "run": 1, "##ning": 2, "dog": 3, "far": 4});
    tokenizer_of(
        json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab}),
        json!({"type": "WordPiece", "prefix": "##", "cleanup": false}),
    )
}

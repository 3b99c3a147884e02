//! Guides: whatever is drawn from their masks matches.

use std::sync::Arc;

use jobs::{Follower, Guides};
use scheduler::Guide;
use serde_json::{Value, json};

use crate::model::{EOS, EOT, VOCAB, World, completion_line, tokenizer};

fn guides() -> Arc<Guides> {
    Arc::clone(World::new().text().guides().expect("the model has a tokenizer"))
}

fn allowed(mask: &[u32]) -> Vec<u32> {
    assert_eq!(mask.len(), VOCAB.div_ceil(32));
    (0..mask.len() as u32 * 32).filter(|token| mask[*token as usize / 32] >> (token % 32) & 1 == 1).collect()
}

/// Tokens drawn from the masks with even chances, until one ends the answer or there are many.
fn walk(follower: &mut Follower, seed: u64) -> (Vec<u32>, bool) {
    let (mut tokens, mut state) = (Vec::new(), seed * 2 + 1);
    while tokens.len() < 400 {
        let allowed = allowed(&follower.mask().unwrap());
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let token = allowed[(state >> 33) as usize % allowed.len()];
        if [EOS, EOT].contains(&token) {
            return (tokens, true);
        }
        tokens.push(token);
        follower.take(&[token]).unwrap();
    }
    (tokens, false)
}

#[track_caller]
fn check(guide: &Guide, matches: impl Fn(&str) -> bool) {
    let (guides, tokenizer) = (guides(), tokenizer());
    let mut num_ended = 0;
    for seed in 0..40 {
        let (tokens, has_ended) = walk(&mut guides.follow(guide).unwrap(), seed);
        if has_ended {
            let text = tokenizer.decode(&tokens).unwrap();
            assert!(matches(&text), "{text:?} of {guide:?}");
            num_ended += 1;
        }
        // Who goes on from tokens has the mask of who came by them one by one.
        let (mut one, mut other) = (guides.follow(guide).unwrap(), guides.follow(guide).unwrap());
        for token in &tokens {
            one.mask().unwrap();
            one.take(&[*token]).unwrap();
        }
        other.take(&tokens).unwrap();
        assert_eq!(one.mask().unwrap(), other.mask().unwrap(), "{guide:?} after {tokens:?}");
    }
    assert!(num_ended >= 10, "{num_ended} of 40 answers ended: {guide:?}");
}

fn json_guide(schema: &str, any_space: bool) -> Guide {
    Guide::Json { schema: schema.to_owned(), any_space }
}

#[test]
fn a_choice_is_one_of_its_texts() {
    let texts = ["hello world", "hello", "say \"no\"\n", "grün", "start: /x/ | y"].map(str::to_owned);
    check(&Guide::Choice(texts.to_vec()), |text| texts.contains(&text.to_owned()));
}

#[test]
fn a_regular_expression_matches_the_whole_answer() {
    check(&Guide::Regex("[0-9]{2,4}(-[a-c])?".to_owned()), |text| {
        let (digits, rest) = text.split_at(text.find('-').unwrap_or(text.len()));
        let are_digits = (2..=4).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
        are_digits && ["", "-a", "-b", "-c"].contains(&rest)
    });
}

#[test]
fn json_has_the_properties_of_its_schema_in_their_order() {
    let schema = r#"{"type": "object", "properties": {"z": {"type": "integer", "minimum": 0, "maximum": 99},
        "a": {"enum": ["x", null]}, "m": {"type": "string", "maxLength": 3}},
        "required": ["z", "a", "m"], "additionalProperties": false}"#;
    let matches = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap();
        let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["z", "a", "m"], "{text}");
        value["z"].as_u64().is_some_and(|z| z < 100)
            && [json!("x"), json!(null)].contains(&value["a"])
            && value["m"].as_str().is_some_and(|m| m.chars().count() <= 3)
    };
    check(&json_guide(schema, false), |text| matches(text) && text.starts_with(r#"{"z":"#));
    check(&json_guide(schema, true), matches);
}

#[test]
fn a_grammar_is_derived() {
    let grammar = "start: pair | \"(\" start \")\"\npair: \"a\" \"b\"*";
    check(&Guide::Grammar(grammar.to_owned()), |text| {
        let inner = text.trim_matches(|c| c == '(' || c == ')');
        let depth = text.chars().filter(|&c| c == '(').count();
        inner.starts_with('a')
            && inner[1..].bytes().all(|byte| byte == b'b')
            && text == format!("{}{inner}{}", "(".repeat(depth), ")".repeat(depth))
    });
}

#[test]
fn no_token_that_is_left_out_of_texts_is_ever_allowed_but_to_end() {
    let guides = guides();
    let mut follower = guides.follow(&Guide::Regex("(?s:.*)".to_owned())).unwrap();
    let found = allowed(&follower.mask().unwrap());
    assert!(found.contains(&EOS) && found.contains(&EOT), "any text may end");
    assert!(found.iter().all(|&token| token < 265 || [EOS, EOT].contains(&token)), "{found:?}");
    let mut follower = guides.follow(&Guide::Choice(vec!["a".to_owned()])).unwrap();
    assert_eq!(allowed(&follower.mask().unwrap()), [u32::from(b'a')]);
    follower.take(&[u32::from(b'a')]).unwrap();
    assert_eq!(allowed(&follower.mask().unwrap()), [EOS, EOT], "nothing may follow");
}

#[test]
fn what_no_answer_can_match_is_refused_with_the_compiler_s_words() {
    let world = World::new();
    let cases = [
        json!({"guided_regex": "a(b"}),
        json!({"guided_grammar": "start: missing_rule"}),
        json!({"guided_json": {"type": "objet"}}),
        json!({"guided_json": {"type": "string", "minLength": 3, "maxLength": 2}}),
        json!({"guided_json": {"$ref": "#/$defs/nowhere"}}),
    ];
    for fields in cases {
        let found = world.refusal(&completion_line("a", fields.clone()));
        let name = fields.as_object().unwrap().keys().next().unwrap();
        assert!(found.starts_with(&format!("invalid_guide {name} | {name}: ")), "{fields}: {found}");
        assert!(!found.contains('\n') && found.len() < 600, "{found}");
    }
}

#[test]
fn every_way_to_name_a_guide_means_the_same() {
    let world = World::new();
    let guide = |fields: Value| world.completion(fields).request.sampling.guide.clone();
    let schema = json!({"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}});
    let expected = Some(json_guide(&schema.to_string(), true));
    assert_eq!(guide(json!({"guided_json": schema})), expected);
    assert_eq!(guide(json!({"guided_json": schema.to_string()})), expected);
    assert_eq!(guide(json!({"structured_outputs": {"json": schema}})), expected);
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}});
    assert_eq!(guide(json!({"response_format": format})), expected);
    let tight = json!({"json": schema, "disable_any_whitespace": true, "regex": null});
    assert_eq!(guide(json!({"structured_outputs": tight})), Some(json_guide(&schema.to_string(), false)));
    let object = Some(json_guide(r#"{"type":"object"}"#, true));
    assert_eq!(guide(json!({"response_format": {"type": "json_object"}})), object);
    assert_eq!(guide(json!({"structured_outputs": {"json_object": true}})), object);
    assert_eq!(
        guide(json!({"guided_choice": ["a"]})),
        guide(json!({"structured_outputs": {"choice": ["a"]}}))
    );
    assert_eq!(guide(json!({"guided_regex": "a"})), guide(json!({"structured_outputs": {"regex": "a"}})));
    let grammar = "start: \"a\"";
    assert_eq!(
        guide(json!({"guided_grammar": grammar})),
        guide(json!({"structured_outputs": {"grammar": grammar}}))
    );
    assert_eq!(guide(json!({"response_format": {"type": "text"}, "guided_json": null})), None);
}

#[test]
fn a_schema_in_another_order_is_another_row_and_other_spellings_are_not() {
    let world = World::new();
    let key = |body: &str| {
        let line =
            format!(r#"{{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {body}}}"#);
        world.request(&line).request.key
    };
    let one = key(r#"{"prompt": "x", "guided_json": {"properties": {"a": {}, "b": {}}}}"#);
    assert_eq!(one, key(r#"{"guided_json":{"properties":{"a":{},"b":{}}},  "prompt": "x"}"#));
    assert_ne!(one, key(r#"{"prompt": "x", "guided_json": {"properties": {"b": {}, "a": {}}}}"#));
}

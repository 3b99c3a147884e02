//! What a row that is taken becomes.

use std::collections::HashMap;

use jobs::{Endpoint, Row, SamplingOptions};
use scheduler::RequestKey;
use serde_json::{Value, json};

use crate::model::{BOS, HELLO, NOW, WORLD, World, chat_line, completion_line};

#[test]
fn openais_defaults_hold_where_nobody_says_otherwise() {
    let sampling = World::new().completion(json!({})).request.sampling.clone();
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (1.0, 1.0, 0, 0.0));
    assert_eq!(
        (sampling.seed, sampling.min_tokens, sampling.logprobs, sampling.prompt_logprobs),
        (7, 0, None, false)
    );
    // What the context of 64 leaves beside the prompt's two tokens.
    assert_eq!(sampling.max_tokens, 62);
    assert!(sampling.stop.is_empty());
}

#[test]
fn the_body_comes_before_the_job_and_the_job_before_the_model() {
    let mut world = World::new();
    world.file(
        "generation_config.json",
        r#"{"do_sample": false, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5}"#,
    );
    world.options.sampling = SamplingOptions {
        top_p: Some(0.6),
        top_k: Some(6),
        stop: Some(vec!["x".into()]),
        ..Default::default()
    };
    let sampling = world.completion(json!({"top_k": -1})).request.sampling.clone();
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.0, 0.6, 0, 0.1));
    assert_eq!((sampling.repetition_penalty, sampling.frequency_penalty), (1.5, 0.0));
    assert_eq!(sampling.stop, ["x"]);
    assert!(world.completion(json!({"stop": []})).request.sampling.stop.is_empty());
}

#[test]
fn every_parameter_reaches_the_sampling() {
    let row = World::new().completion(json!({
        "temperature": 0.5, "top_p": 0.25, "top_k": 9, "min_p": 0.125, "seed": -1, "max_completion_tokens": 8,
        "min_tokens": 2, "stop": "a", "stop_token_ids": [3, 1], "ignore_eos": true, "logprobs": 4, "echo": true,
        "repetition_penalty": 1.25, "frequency_penalty": -0.5, "presence_penalty": 2, "logit_bias": {"10": -100, "9": 0.5},
        "model": "m", "return_token_ids": true, "user": 3, "metadata": {"a": "b"}, "store": true,
    }));
    let sampling = &row.request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.5, 0.25, 9, 0.125));
    let penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty);
    assert_eq!(penalties, (1.25, -0.5, 2.0));
    assert_eq!(sampling.logit_bias, [(9, 0.5), (10, -100.0)]);
    assert_eq!((sampling.seed, sampling.max_tokens, sampling.min_tokens), (u64::MAX, 8, 2));
    assert_eq!(
        (sampling.stop.as_slice(), sampling.stop_token_ids.as_slice()),
        (&["a".to_owned()][..], &[1, 3][..])
    );
    assert_eq!((sampling.logprobs, sampling.prompt_logprobs), (Some(4), true));
    assert_eq!(row.reply.model, "m");
    assert_eq!(row.reply.echo.as_deref(), Some("hello"));
    assert!(row.reply.token_ids);
    assert_eq!(row.reply.endpoint, Endpoint::Completions);
}

#[test]
fn what_says_that_all_is_as_usual_is_no_parameter() {
    let usual = json!({
        "n": 1, "stream": false, "stream_options": null, "frequency_penalty": 0, "presence_penalty": 0.0,
        "logit_bias": {}, "repetition_penalty": 1.0, "temperature": null, "stop": null, "seed": null,
        "service_tier": "auto", "max_tokens": null, "echo": false, "top_logprobs": null,
    });
    let world = World::new();
    assert_eq!(world.completion(usual.clone()).request.prompt, world.completion(json!({})).request.prompt);
    assert_eq!(
        world.completion(usual.clone()).request.sampling,
        world.completion(json!({})).request.sampling
    );
    let chat =
        json!({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": false});
    assert_eq!(world.chat(chat).request.sampling, world.chat(json!({})).request.sampling);
    world.chat(usual);
}

#[test]
fn more_tokens_than_the_context_leaves_are_clipped_and_a_full_context_can_be_scored() {
    let world = World::new();
    assert_eq!(world.completion(json!({"max_tokens": 1_000_000_000_000u64})).request.sampling.max_tokens, 62);
    let scored =
        world.completion(json!({"prompt": vec![1; 64], "max_tokens": 0, "echo": true, "logprobs": 0}));
    assert_eq!(scored.request.sampling.max_tokens, 0);
    assert_eq!(world.completion(json!({"prompt": vec![1; 63]})).request.sampling.max_tokens, 1);
}

#[test]
fn prompts_are_whole_and_begin_once() {
    let world = World::new();
    let prompt = |value: Value| world.completion(json!({"prompt": value})).request.prompt.clone();
    assert_eq!(prompt("hello world".into()), [BOS, HELLO, WORLD]);
    assert_eq!(prompt("<|begin_of_text|>hello".into()), [BOS, HELLO]);
    // Longer than the file's truncation, shorter than its padding.
    assert_eq!(prompt("hello".repeat(10).into()).len(), 11);
    assert_eq!(prompt(json!([3, 2, 1])), [3, 2, 1]);
}

#[test]
fn parts_of_a_message_stand_on_lines_of_their_own() {
    let world = World::new();
    let content = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let parts = world.chat(json!({"messages": [{"role": "user", "content": content, "name": null}]}));
    let whole = world.chat(json!({"messages": [{"role": "user", "content": "a\nb"}]}));
    assert_eq!(parts.request.prompt, whole.request.prompt);
}

#[test]
fn a_model_without_a_tokenizer_takes_token_ids() {
    let row = World::without_tokenizer().completion(json!({"prompt": [5, 6], "echo": true}));
    assert_eq!(row.request.prompt, [5, 6]);
    assert_eq!(row.reply.echo.as_deref(), Some(""));
}

#[test]
fn plain_rows_are_named_by_themselves_or_by_their_key() {
    let world = World::new().user("{{ q }}");
    let rows = world.rows(
        r#"{"q": 1, "id": "x", "custom_id": 5}
{"q": 1, "id": "x"}
{"q": 1, "id": null}
{"q": 1, "id": null}"#,
    );
    let rows: Vec<_> = rows
        .into_iter()
        .map(|row| match row {
            Row::Request(row) => (row.custom_id, row.request.key),
            row => panic!("{row:?}"),
        })
        .collect();
    assert_eq!(rows[0].0, "5");
    assert_eq!(rows[1].0, "x");
    for (custom_id, RequestKey(key)) in &rows[2..] {
        assert_eq!(*custom_id, format!("row-{key:032x}"));
    }
    assert_ne!(rows[2].1, rows[3].1);
}

/// The key of each row by its name.
fn keys(world: &World, lines: &[String]) -> HashMap<String, RequestKey> {
    let key = |row| match row {
        Row::Request(row) => (row.custom_id.clone(), row.request.key),
        Row::Rejected(row) => (row.custom_id.unwrap_or_default(), row.key),
        Row::Finished(row) => panic!("{row:?}"),
    };
    world.rows(lines.join("\n")).into_iter().map(key).collect()
}

#[test]
fn keys_do_not_depend_on_order_spacing_or_spelling() {
    let world = World::new();
    let mut lines: Vec<String> = (0..20)
        .map(|row| {
            chat_line(&format!("row {row}"), json!({"seed": row % 3, "stop": "é", "temperature": 0.5}))
        })
        .collect();
    let straight = keys(&world, &lines);
    lines.reverse();
    lines.push(completion_line("one more", json!({})));
    let mut reversed = keys(&world, &lines);
    reversed.remove("one more");
    assert_eq!(straight, reversed);

    let spelled = r#"{ "body": {"prompt": "h\u0065llo", "seed": 1}, "url": "/v1/completions", "method": "POST", "custom_id": "a" }"#;
    let other = completion_line("a", json!({"seed": 1}));
    assert_eq!(keys(&world, &[spelled.to_owned()]), keys(&world, &[other]));
}

#[test]
fn keys_depend_on_all_that_an_answer_depends_on() {
    let plain = || World::new().user("{{ q }}");
    let mut keys: Vec<RequestKey> = Vec::new();
    let mut add = |change: fn(&mut World)| {
        let mut world = plain();
        change(&mut world);
        keys.push(world.request(r#"{"q": "x", "id": 1}"#).request.key);
    };
    add(|_| {});
    add(|world| world.options.seed = 8);
    add(|world| world.options.model_identity.push('2'));
    add(|world| world.options.sampling.top_p = Some(0.5));
    add(|world| world.options.prompt.as_mut().unwrap().user.push('!'));
    add(|world| world.options.prompt.as_mut().unwrap().system = Some(String::new()));
    add(|world| world.file("generation_config.json", r#"{"temperature": 0.5}"#));
    keys.push(plain().request(r#"{"q": "y", "id": 1}"#).request.key);
    keys.push(plain().request(r#"{"q": "x", "id": 2}"#).request.key);
    keys.push(plain().request(r#"{"q": "x", "id": 1, "more": 1}"#).request.key);
    let all = keys.len();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), all);
}

#[test]
fn rows_and_lines_are_counted_and_the_input_is_hashed() {
    let mut world = World::new();
    let input =
        format!("\u{feff}{}\r\n\n{}\r\nnot json\n", chat_line("a", json!({})), chat_line("b", json!({})));
    let mut reader = world.reader(&input);
    let places: Vec<(u64, u64)> = reader
        .by_ref()
        .map(|row| match row.unwrap() {
            Row::Request(row) => (row.index, row.line),
            Row::Rejected(row) => (row.index, row.line),
            Row::Finished(row) => panic!("{row:?}"),
        })
        .collect();
    assert_eq!(places, [(0, 1), (1, 3), (2, 4)]);
    let record = reader.record();
    assert_eq!((record.rows, record.bytes), (3, input.len() as u64));
    assert_eq!(record.blake3, blake3::hash(input.as_bytes()).to_hex().as_str());

    world.limit = Some(2);
    let mut reader = world.reader(&input);
    assert_eq!(reader.by_ref().count(), 2);
    let read = input.split_inclusive('\n').take(3).collect::<String>();
    assert_eq!(reader.record().blake3, blake3::hash(read.as_bytes()).to_hex().as_str());
}

#[test]
fn a_sample_counts_the_rows_that_it_passes_over() {
    let world = World::new();
    let input: String = (0..10).map(|idx| format!("{}\n", chat_line(&idx.to_string(), json!({})))).collect();
    let mut reader = world.reader(&input).sampled(4.try_into().unwrap());
    let ids: Vec<String> = (reader.by_ref())
        .map(|row| match row.unwrap() {
            Row::Request(row) => row.custom_id,
            row => panic!("{row:?}"),
        })
        .collect();
    assert_eq!(ids, ["0", "4", "8"]);
    assert_eq!(reader.position(), (10, input.len() as u64));
}

#[test]
fn an_input_that_is_not_there_ends_the_job() {
    let world = World::new();
    let path = world.path().join("none.jsonl");
    let error = jobs::Reader::open(&path, world.preparer(), None).err().unwrap();
    assert_eq!(error.to_string(), format!("read {}", path.display()));
    // A folder opens, and cannot be read.
    let error = jobs::Reader::open(world.path(), world.preparer(), None).err().unwrap();
    assert_eq!(error.to_string(), format!("{}: is a directory, expected a file", world.path().display()));
}

#[test]
fn the_day_a_template_speaks_of_is_the_jobs() {
    assert_eq!(NOW / 86_400 * 86_400 + 43_200, NOW);
    let world = World::new();
    world.file("chat_template.jinja", "{{ strftime_now('%d') }}");
    assert_eq!(world.chat(json!({})).request.prompt, [48, 49]);
}

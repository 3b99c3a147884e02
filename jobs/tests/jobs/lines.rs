//! Lines of output, to the byte.

use std::sync::Arc;

use jobs::{Line, LineFile, PreparedRow, Row, RowError};
use scheduler::{
    Completion, Failure, FinishReason, Generated, RequestKey, SequenceId, TokenId, TokenLogprobs,
};
use serde_json::{Value, json};

use crate::model::{self, BOS, EOT, HELLO, WORLD, World};

/// The row under a key that can be read.
fn named(mut row: Box<PreparedRow>) -> Box<PreparedRow> {
    Arc::make_mut(&mut row.request).key = RequestKey(0xab);
    row.index = 3;
    row
}

fn complete(row: &PreparedRow, tokens: &[TokenId], reason: FinishReason) -> Completion {
    Completion {
        sequence: SequenceId(1),
        request: row.request.clone(),
        generated: Generated { tokens: tokens.to_vec(), ..Generated::default() },
        outcome: Ok(reason),
    }
}

fn line(row: &PreparedRow, completion: &Completion) -> String {
    let line =
        Line::completed(row, std::slice::from_ref(completion), Some(&model::tokenizer()), 1_700_000_000);
    assert_eq!((line.row, line.file), (3, LineFile::Output));
    line.json
}

/// `choices[0]` of the answer to `hello` that consists of these tokens.
fn choice(fields: Value, tokens: &[TokenId], reason: FinishReason) -> Value {
    let row = named(World::new().completion(fields));
    let line: Value = serde_json::from_str(&line(&row, &complete(&row, tokens, reason))).unwrap();
    line["response"]["body"]["choices"][0].clone()
}

#[test]
fn a_chats_answer() {
    let row = named(World::new().chat(json!({"model": "gpt-5", "return_token_ids": true})));
    assert_eq!(
        line(&row, &complete(&row, &[HELLO, WORLD, EOT], FinishReason::Stop)),
        r#"{"id":"batch_req_000000000000000000000000000000ab","custom_id":"a","response":{"status_code":200,"request_id":"req_000000000000000000000000000000ab","body":{"id":"chatcmpl-000000000000000000000000000000ab","object":"chat.completion","created":1700000000,"model":"gpt-5","choices":[{"index":0,"message":{"role":"assistant","content":"hello world","refusal":null},"logprobs":null,"finish_reason":"stop","token_ids":[259,264,269]}],"usage":{"prompt_tokens":20,"completion_tokens":3,"total_tokens":23}}},"error":null}"#
    );
}

#[test]
fn a_completions_answer() {
    let world = World::new();
    let row = named(world.completion(json!({"max_tokens": 1})));
    let expected = r#"{"id":"batch_req_000000000000000000000000000000ab","custom_id":"a","response":{"status_code":200,"request_id":"req_000000000000000000000000000000ab","body":{"id":"cmpl-000000000000000000000000000000ab","object":"text_completion","created":1700000000,"model":"MODEL","choices":[{"index":0,"text":" world","logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":2,"completion_tokens":1,"total_tokens":3}}},"error":null}"#;
    assert_eq!(
        line(&row, &complete(&row, &[WORLD], FinishReason::Length)),
        expected.replace("MODEL", world.text().name())
    );
}

#[test]
fn a_stop_string_is_cut_off_and_counted() {
    let answer = choice(json!({"stop": "o w"}), &[HELLO, WORLD], FinishReason::Stop);
    assert_eq!(answer["text"], "hell");
    let row = named(World::new().completion(json!({"stop": "o w"})));
    let line: Value =
        serde_json::from_str(&line(&row, &complete(&row, &[HELLO, WORLD], FinishReason::Stop))).unwrap();
    assert_eq!(line["response"]["body"]["usage"]["completion_tokens"], 2);
}

#[test]
fn the_token_that_ends_a_sequence_is_no_text_and_any_other_is() {
    let stop_at_world = json!({"stop_token_ids": [WORLD]});
    assert_eq!(choice(stop_at_world.clone(), &[HELLO, WORLD], FinishReason::Stop)["text"], "hello");
    assert_eq!(choice(stop_at_world.clone(), &[WORLD, HELLO], FinishReason::Length)["text"], " worldhello");
    // An end that is ignored is special all the same.
    assert_eq!(
        choice(json!({"ignore_eos": true}), &[HELLO, EOT, WORLD], FinishReason::Length)["text"],
        "hello world"
    );
    assert_eq!(choice(json!({}), &[HELLO, 0xE2], FinishReason::Length)["text"], "hello\u{fffd}");
}

fn logprobs(token: TokenId, logprob: f32, top: &[(TokenId, f32)]) -> TokenLogprobs {
    TokenLogprobs { token, logprob, top: top.to_vec() }
}

#[test]
fn a_chats_log_probabilities() {
    let row = named(World::new().chat(json!({"logprobs": true, "top_logprobs": 2})));
    let mut completion = complete(&row, &[WORLD, 0xE2], FinishReason::Length);
    completion.generated.logprobs = vec![
        logprobs(WORLD, -0.5, &[(WORLD, -0.5), (HELLO, -1.25)]),
        logprobs(0xE2, f32::NEG_INFINITY, &[(EOT, -0.25), (999, -2.0)]),
    ];
    let line: Value = serde_json::from_str(&line(&row, &completion)).unwrap();
    assert_eq!(
        line["response"]["body"]["choices"][0]["logprobs"],
        json!({"content": [
            {"token": " world", "bytes": b" world", "logprob": -0.5, "top_logprobs": [
                {"token": " world", "bytes": b" world", "logprob": -0.5},
                {"token": "hello", "bytes": b"hello", "logprob": -1.25}]},
            {"token": "\\xe2", "bytes": [0xE2], "logprob": -9999.0, "top_logprobs": [
                {"token": "<|eot_id|>", "bytes": b"<|eot_id|>", "logprob": -0.25},
                {"token": "token_id:999", "bytes": null, "logprob": -2.0}]},
        ], "refusal": null})
    );
}

#[test]
fn a_completions_log_probabilities_with_the_prompt_in_front() {
    let row = named(
        World::new().completion(json!({"prompt": "€ world", "logprobs": 1, "echo": true, "stop": "x"})),
    );
    assert_eq!(row.request.prompt, [BOS, 0xE2, 0x82, 0xAC, WORLD]);
    let mut completion = complete(&row, &[HELLO, 0xC3, 0xA9, u32::from(b'x')], FinishReason::Stop);
    completion.generated.prompt_logprobs =
        row.request.prompt[1..].iter().map(|&token| logprobs(token, -1.0, &[(HELLO, -0.5)])).collect();
    completion.generated.logprobs =
        completion.generated.tokens.iter().map(|&token| logprobs(token, -2.0, &[(token, -2.0)])).collect();
    let line = line(&row, &completion);
    let start = line.find(r#""choices":"#).unwrap();
    let end = line.find(r#","usage""#).unwrap();
    assert_eq!(
        &line[start..end],
        r#""choices":[{"index":0,"text":"€ worldhelloé","logprobs":{"tokens":["<|begin_of_text|>","bytes:\\xe2","bytes:\\x82","bytes:\\xac"," world","hello","bytes:\\xc3","bytes:\\xa9","x"],"token_logprobs":[null,-1.0,-1.0,-1.0,-1.0,-2.0,-2.0,-2.0,-2.0],"top_logprobs":[null,{"hello":-0.5,"bytes:\\xe2":-1.0},{"hello":-0.5,"bytes:\\x82":-1.0},{"hello":-0.5,"bytes:\\xac":-1.0},{"hello":-0.5," world":-1.0},{"hello":-2.0},{"bytes:\\xc3":-2.0},{"bytes:\\xa9":-2.0},{"x":-2.0}],"text_offset":[0,0,1,1,1,7,12,12,13]},"finish_reason":"stop"}]"#
    );
}

#[test]
fn offsets_of_tokens_behind_the_cut_lie_at_the_end() {
    let row = named(World::new().completion(json!({"logprobs": 0, "stop": "lo wo"})));
    let mut completion = complete(&row, &[HELLO, WORLD], FinishReason::Stop);
    completion.generated.logprobs =
        completion.generated.tokens.iter().map(|&token| logprobs(token, -2.0, &[])).collect();
    let line: Value = serde_json::from_str(&line(&row, &completion)).unwrap();
    let choice = &line["response"]["body"]["choices"][0];
    assert_eq!(choice["text"], "hel");
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 3]));
}

#[test]
fn a_scored_text_is_its_prompt_alone() {
    let row = named(World::new().completion(json!({"logprobs": 0, "echo": true, "max_tokens": 0})));
    let mut completion = complete(&row, &[], FinishReason::Length);
    completion.generated.prompt_logprobs = vec![logprobs(HELLO, -3.0, &[])];
    let line: Value = serde_json::from_str(&line(&row, &completion)).unwrap();
    let choice = &line["response"]["body"]["choices"][0];
    assert_eq!(choice["text"], "hello");
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -3.0]));
    assert_eq!(choice["logprobs"]["top_logprobs"], json!([null, {"hello": -3.0}]));
}

#[test]
fn a_model_without_a_tokenizer_answers_with_token_ids() {
    let row =
        named(World::without_tokenizer().completion(json!({"prompt": [1, 2], "logprobs": 1, "echo": true})));
    let mut completion = complete(&row, &[4, 5], FinishReason::Length);
    completion.generated.prompt_logprobs = vec![logprobs(2, -1.0, &[(3, -0.5)])];
    completion.generated.logprobs = vec![logprobs(4, -1.0, &[(4, -1.0)]), logprobs(5, -1.0, &[(5, -1.0)])];
    let line = Line::completed(&row, &[completion], None, 0);
    let line: Value = serde_json::from_str(&line.json).unwrap();
    let choice = &line["response"]["body"]["choices"][0];
    assert_eq!(choice["text"], "");
    assert_eq!(choice["token_ids"], json!([4, 5]));
    assert_eq!(choice["logprobs"]["tokens"], json!(["token_id:1", "token_id:2", "token_id:4", "token_id:5"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 0, 0, 0]));
}

#[test]
fn errors_have_their_own_file_and_shapes() {
    let world = World::new();
    let Row::Rejected(mut row) = world.rows("\n{]\n").remove(0) else { panic!("a request") };
    row.key = RequestKey(0xab);
    let rejected = Line::rejected(&row);
    assert_eq!((rejected.row, rejected.file, rejected.is_refusal), (0, LineFile::Errors, true));
    assert_eq!(
        rejected.json,
        r#"{"id":"batch_req_000000000000000000000000000000ab","custom_id":null,"response":{"status_code":400,"request_id":"req_000000000000000000000000000000ab","body":{"error":{"message":"not JSON: key must be a string at column 2","type":"invalid_request_error","param":null,"code":"invalid_json_line","line":2}}},"error":null}"#
    );

    let row = named(world.completion(json!({})));
    let refused = Line::refused(&row, &RowError::of("prompt", "context_length_exceeded", "too long"));
    assert_eq!((refused.row, refused.file, refused.is_refusal), (3, LineFile::Errors, true));
    assert_eq!(
        refused.json,
        r#"{"id":"batch_req_000000000000000000000000000000ab","custom_id":"a","response":{"status_code":400,"request_id":"req_000000000000000000000000000000ab","body":{"error":{"message":"prompt: too long","type":"invalid_request_error","param":"prompt","code":"context_length_exceeded","line":1}}},"error":null}"#
    );

    let mut completion = complete(&row, &[HELLO], FinishReason::Length);
    completion.outcome = Err(Failure::NonFiniteLogits { position: 3 });
    let failed = Line::completed(&row, &[completion], Some(&model::tokenizer()), 0);
    assert_eq!((failed.file, failed.is_refusal), (LineFile::Errors, false));
    assert_eq!(
        failed.json,
        r#"{"id":"batch_req_000000000000000000000000000000ab","custom_id":"a","response":null,"error":{"code":"non_finite_logits","message":"the logits at position 3 are not finite"}}"#
    );
}

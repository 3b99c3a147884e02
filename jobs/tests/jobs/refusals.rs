//! Every way a line can be refused, with the words its author reads.

use serde_json::{Value, json};

use crate::model::{World, chat_line, completion_line};

/// Each body's fields beside what they are told.
fn check(line: impl Fn(Value) -> String, cases: &[(Value, &str)]) {
    let world = World::new();
    for (fields, expected) in cases {
        assert_eq!(world.refusal(&line(fields.clone())), *expected, "{fields}");
    }
}

#[test]
fn lines_that_are_no_rows() {
    let world = World::new();
    let cases: &[(&[u8], &str)] = &[
        (b"{\"a\": 1,}", "invalid_json_line - | not JSON: trailing comma at column 9"),
        (b"hello", "invalid_json_line - | not JSON: expected value at column 1"),
        (b"{\"a\": 1} x", "invalid_json_line - | not JSON: trailing characters at column 10"),
        (
            b"{\"a\": \"\\ud800\"}",
            "invalid_json_line - | not JSON: unexpected end of hex escape at column 14",
        ),
        (b"[1, 2]", "invalid_json_line - | expected an object, found [1,2]"),
        (b"{\"a\": \"\xff\"}", "invalid_utf8 - | not UTF-8: byte 8 is 0xff"),
    ];
    for (line, expected) in cases {
        let line = [line, &b"\n"[..]].concat();
        let row = world.rows(&line).remove(0);
        let jobs::Row::Rejected(row) = row else { panic!("{line:?} is a request") };
        let param = row.error.param.as_deref().unwrap_or("-");
        assert_eq!(format!("{} {param} | {}", row.error.code, row.error.message), *expected);
        assert_eq!((row.line, row.custom_id), (1, None));
    }
}

#[test]
fn a_line_beyond_any_row() {
    let good = completion_line("a", json!({}));
    let rows = World::new().rows(format!("{}\n{good}\n", "x".repeat(jobs::MAX_LINE_BYTES + 1)));
    let [jobs::Row::Rejected(row), jobs::Row::Request(_)] = rows.as_slice() else { panic!("{rows:?}") };
    assert_eq!(row.error.code, "line_too_long");
    assert_eq!(row.error.message, "a line of 67108865 bytes exceeds the most a row may have, 67108864");
}

#[test]
fn envelopes() {
    let world = World::new();
    let line = |fields: Value| {
        let mut line =
            json!({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}});
        for (name, value) in fields.as_object().unwrap() {
            match value {
                Value::Null => line.as_object_mut().unwrap().remove(name),
                value => line.as_object_mut().unwrap().insert(name.clone(), value.clone()),
            };
        }
        line.to_string()
    };
    let missing = |name: &str| {
        format!(
            "missing_required_parameter {name} | {name}: missing; a batch line has custom_id, method, url and body"
        )
    };
    let cases = [
        (json!({"custom_id": null}), missing("custom_id")),
        (json!({"method": null}), missing("method")),
        (json!({"url": null}), missing("url")),
        (json!({"body": null}), missing("body")),
        (json!({"custom_id": 7}), "invalid_type custom_id | custom_id: expected a string, found 7".to_owned()),
        (json!({"method": "GET"}), "invalid_method method | method: expected POST, found \"GET\"".to_owned()),
        (
            json!({"url": "/v1/embeddings"}),
            "invalid_url url | url: expected /v1/chat/completions or /v1/completions, found \"/v1/embeddings\"".to_owned(),
        ),
        (json!({"body": "{}"}), "invalid_type body | body: expected an object, found \"{}\"".to_owned()),
        (
            json!({"custom-id": "b"}),
            "unknown_parameter custom-id | custom-id: unknown field of a batch line; the nearest known one is custom_id"
                .to_owned(),
        ),
        (json!({"priority": 1}), "unknown_parameter priority | priority: unknown field of a batch line".to_owned()),
    ];
    for (fields, expected) in cases {
        assert_eq!(world.refusal(&line(fields.clone())), expected, "{fields}");
    }
    assert_eq!(
        world.refusal(r#"{"question": "why?"}"#),
        "missing_required_parameter - | not a batch line: custom_id, method, url and body are missing; \
         a plain row needs [prompt] user in the job file"
    );
}

#[test]
fn a_repeated_custom_id_names_the_line_that_had_it_first() {
    let world = World::new();
    let line = completion_line("a", json!({}));
    let rows = world.rows(format!(
        "\n{line}\n{line}\n{}\n{}\n",
        completion_line("b", json!({})),
        completion_line("a", json!({"n": 1}))
    ));
    let refused: Vec<(u64, String, &str)> = rows
        .iter()
        .filter_map(|row| match row {
            jobs::Row::Rejected(row) => Some((row.line, row.error.message.clone(), row.error.code)),
            _ => None,
        })
        .collect();
    let message = "custom_id: \"a\" was used on line 2 already".to_owned();
    assert_eq!(refused, [(3, message.clone(), "duplicate_custom_id"), (5, message, "duplicate_custom_id")]);
}

#[test]
fn parameters_of_both_routes() {
    let cases = [
        (
            json!({"temperature": 2.5}),
            "invalid_value temperature | temperature: expected a number from 0 to 2, found 2.5",
        ),
        (
            json!({"temperature": -1}),
            "invalid_value temperature | temperature: expected a number from 0 to 2, found -1",
        ),
        (
            json!({"temperature": "hot"}),
            "invalid_type temperature | temperature: expected a number, found \"hot\"",
        ),
        (json!({"top_p": 1.1}), "invalid_value top_p | top_p: expected a number from 0 to 1, found 1.1"),
        (json!({"min_p": true}), "invalid_type min_p | min_p: expected a number, found true"),
        (json!({"min_p": 2}), "invalid_value min_p | min_p: expected a number from 0 to 1, found 2"),
        (json!({"top_k": -2}), "invalid_value top_k | top_k: expected an integer of at least -1, found -2"),
        (json!({"top_k": 1.5}), "invalid_type top_k | top_k: expected an integer, found 1.5"),
        (
            json!({"top_k": 1e23}),
            "invalid_value top_k | top_k: expected an integer from -1 to 18446744073709551615, found 1e+23",
        ),
        (
            json!({"seed": 1e21}),
            "invalid_value seed | seed: expected an integer from -9223372036854775808 to 18446744073709551615, \
             found 1e+21",
        ),
        (
            json!({"max_tokens": 1e23}),
            "invalid_value max_tokens | max_tokens: expected an integer from 0 to 18446744073709551615, found 1e+23",
        ),
        (json!({"seed": "x"}), "invalid_type seed | seed: expected an integer, found \"x\""),
        (
            json!({"max_tokens": -1}),
            "invalid_value max_tokens | max_tokens: expected an integer of at least 0, found -1",
        ),
        (
            json!({"max_tokens": 16.0}),
            "invalid_type max_tokens | max_tokens: expected an integer, found 16.0",
        ),
        (
            json!({"max_tokens": 5, "max_completion_tokens": 6}),
            "invalid_value max_tokens | max_tokens: expected the same as max_completion_tokens 6, found 5",
        ),
        (
            json!({"max_tokens": 5, "min_tokens": 6}),
            "invalid_value min_tokens | min_tokens: expected at most max_tokens 5, found 6",
        ),
        (json!({"stop": 3}), "invalid_type stop | stop: expected a string or an array of strings, found 3"),
        (
            json!({"stop": ["a", 3]}),
            "invalid_type stop | stop: expected a string or an array of strings, found [\"a\",3]",
        ),
        (json!({"stop": ""}), "invalid_value stop | stop: expected strings that are not empty, found \"\""),
        (json!({"stop": vec!["x"; 17]}), "invalid_value stop | stop: expected at most 16 strings, found 17"),
        (
            json!({"stop_token_ids": 3}),
            "invalid_type stop_token_ids | stop_token_ids: expected an array of token ids, found 3",
        ),
        (
            json!({"stop_token_ids": [1, -3]}),
            "invalid_type stop_token_ids[1] | stop_token_ids[1]: expected a token id, found -3",
        ),
        (
            json!({"stop_token_ids": [270]}),
            "invalid_token_id stop_token_ids | stop_token_ids: expected token ids below 270, found 270",
        ),
        (json!({"ignore_eos": 1}), "invalid_type ignore_eos | ignore_eos: expected true or false, found 1"),
        (
            json!({"return_token_ids": "yes"}),
            "invalid_type return_token_ids | return_token_ids: expected true or false, found \"yes\"",
        ),
        (json!({"model": 3}), "invalid_type model | model: expected a string, found 3"),
        (
            json!({"best_of": 2}),
            "unsupported_parameter best_of | best_of: expected 1, found 2, which is not supported",
        ),
        (json!({"n": 17}), "invalid_value n | n: expected an integer from 1 to 16, found 17"),
        (json!({"n": 0}), "invalid_value n | n: expected an integer from 1 to 16, found 0"),
        (
            json!({"stream": true}),
            "unsupported_parameter stream | stream: expected false, found true, which is not supported",
        ),
        (
            json!({"frequency_penalty": 2.5}),
            "invalid_value frequency_penalty | frequency_penalty: expected a number from -2 to 2, found 2.5",
        ),
        (
            json!({"frequency_penalty": "1"}),
            "invalid_type frequency_penalty | frequency_penalty: expected a number, found \"1\"",
        ),
        (
            json!({"presence_penalty": -3}),
            "invalid_value presence_penalty | presence_penalty: expected a number from -2 to 2, found -3",
        ),
        (
            json!({"repetition_penalty": 0}),
            "invalid_value repetition_penalty | repetition_penalty: expected a number from 0.01 to 100, found 0",
        ),
        (
            json!({"repetition_penalty": [1.1]}),
            "invalid_type repetition_penalty | repetition_penalty: expected a number, found [1.1]",
        ),
        (
            json!({"logit_bias": {"50256": -100}}),
            "invalid_token_id logit_bias | logit_bias: expected token ids below 270, found 50256",
        ),
        (
            json!({"logit_bias": {"7": -101}}),
            "invalid_value logit_bias | logit_bias: expected a number from -100 to 100, found -101",
        ),
        (
            json!({"logit_bias": {"7": "low"}}),
            "invalid_type logit_bias.7 | logit_bias.7: expected a number, found \"low\"",
        ),
        (
            json!({"logit_bias": {"the": 1}}),
            "invalid_type logit_bias | logit_bias: expected token ids as keys, found \"the\"",
        ),
        (
            json!({"logit_bias": {"07": 1}}),
            "invalid_type logit_bias | logit_bias: expected token ids as keys, found \"07\"",
        ),
        (
            json!({"logit_bias": [[7, 1]]}),
            "invalid_type logit_bias | logit_bias: expected an object of token ids and numbers, found [[7,1]]",
        ),
        (
            json!({"response_format": {"type": "yaml"}}),
            "invalid_value response_format.type | response_format.type: expected text, json_object or json_schema, \
             found \"yaml\"",
        ),
        (
            json!({"response_format": {"type": "json_schema"}}),
            "invalid_type response_format.json_schema | response_format.json_schema: expected an object, found null",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}}),
            "invalid_type response_format.json_schema.schema | response_format.json_schema.schema: expected a schema, \
             found [1]",
        ),
        (json!({"guided_json": 3}), "invalid_type guided_json | guided_json: expected a schema, found 3"),
        (
            json!({"guided_json": "{"}),
            "invalid_guide guided_json | guided_json: not JSON: EOF while parsing an object at line 1 column 1",
        ),
        (
            json!({"guided_choice": []}),
            "invalid_type guided_choice | guided_choice: expected an array of strings, none of them empty, found []",
        ),
        (json!({"guided_regex": 7}), "invalid_type guided_regex | guided_regex: expected a string, found 7"),
        (
            json!({"guided_choice": ["a"], "guided_regex": "b"}),
            "invalid_value guided_choice | guided_choice: expected one guide, found guided_regex too",
        ),
        (
            json!({"guided_regex": "a", "min_tokens": 2}),
            "invalid_value min_tokens | min_tokens: expected 0 beside guided_regex, found 2",
        ),
        (
            json!({"guided_regex": "a", "ignore_eos": true}),
            "invalid_value ignore_eos | ignore_eos: expected false beside guided_regex, found true",
        ),
        (
            json!({"guided_regex": "(".repeat(300) + &")".repeat(300)}),
            "invalid_guide guided_regex | guided_regex: expected at most 256 brackets open at once, found 300",
        ),
        (
            json!({"structured_outputs": {"structural_tag": "x"}}),
            "unsupported_parameter structured_outputs.structural_tag | structured_outputs.structural_tag: \
             not supported, found \"x\"",
        ),
        (
            json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}),
            "invalid_value structured_outputs | structured_outputs: expected one of json, json_object, regex, choice, \
             grammar, found {\"choice\":[\"a\"],\"regex\":\"a\"}",
        ),
        (
            json!({"guided_decoding_backend": "outlines"}),
            "unsupported_parameter guided_decoding_backend | guided_decoding_backend: expected \"auto\" or \
             \"guidance\", found \"outlines\", which is not supported",
        ),
        (
            json!({"service_tier": "flex"}),
            "unsupported_parameter service_tier | service_tier: expected \"auto\" or \"default\", \
             found \"flex\", which is not supported",
        ),
        (
            json!({"reasoning_effort": "high"}),
            "unsupported_parameter reasoning_effort | reasoning_effort: not supported, found \"high\"",
        ),
        (
            json!({"temprature": 1}),
            "unknown_parameter temprature | temprature: unknown parameter; the nearest known one is temperature",
        ),
        (json!({"sunshine": 1}), "unknown_parameter sunshine | sunshine: unknown parameter"),
        (json!({"sunshine": null}), "unknown_parameter sunshine | sunshine: unknown parameter"),
    ];
    check(|fields| chat_line("a", fields), &cases);
    check(|fields| completion_line("a", fields), &cases);
}

#[test]
fn parameters_of_chats() {
    let cases = [
        (json!({"messages": null}), "missing_required_parameter messages | messages: missing"),
        (
            json!({"messages": "hi"}),
            "invalid_type messages | messages: expected an array of messages, found \"hi\"",
        ),
        (
            json!({"messages": []}),
            "invalid_value messages | messages: expected at least one message, found []",
        ),
        (
            json!({"messages": ["hi"]}),
            "invalid_type messages[0] | messages[0]: expected an object, found \"hi\"",
        ),
        (
            json!({"messages": [{"content": "x"}]}),
            "missing_required_parameter messages[0].role | messages[0].role: missing",
        ),
        (
            json!({"messages": [{"role": "usr", "content": "x"}]}),
            "invalid_value messages[0].role | messages[0].role: expected one of system, developer, user, assistant, tool, found \"usr\"",
        ),
        (
            json!({"messages": [{"role": "user"}]}),
            "missing_required_parameter messages[0].content | messages[0].content: missing",
        ),
        (
            json!({"messages": [{"role": "user", "content": 3}]}),
            "invalid_type messages[0].content | messages[0].content: expected a string or an array of text parts, found 3",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            "invalid_type messages[0].content[0] | messages[0].content[0]: expected {\"type\":\"text\",\"text\":…}, \
             found {\"image_url\":{},\"type\":\"image_url\"}",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]}),
            "unsupported_parameter messages[0].tool_calls | messages[0].tool_calls: not supported, found []",
        ),
        (
            json!({"prompt": "x"}),
            "unsupported_parameter prompt | prompt: not a parameter of /v1/chat/completions",
        ),
        (json!({"echo": true}), "unsupported_parameter echo | echo: not a parameter of /v1/chat/completions"),
        (
            json!({"tools": [{"type": "function"}]}),
            "unsupported_parameter tools | tools: expected an empty value, found [{\"type\":\"function\"}], which is not supported",
        ),
        (json!({"logprobs": 3}), "invalid_type logprobs | logprobs: expected true or false, found 3"),
        (
            json!({"logprobs": true, "top_logprobs": 21}),
            "invalid_value top_logprobs | top_logprobs: expected an integer from 0 to 20, found 21",
        ),
        (
            json!({"top_logprobs": 2}),
            "invalid_value top_logprobs | top_logprobs: expected logprobs true beside 2",
        ),
        (
            json!({"max_tokens": 0}),
            "invalid_value max_tokens | max_tokens: expected an integer of at least 1, found 0; only /v1/completions scores a prompt",
        ),
        (
            json!({"max_completion_tokens": 0}),
            "invalid_value max_completion_tokens | max_completion_tokens: expected an integer of at least 1, \
             found 0; only /v1/completions scores a prompt",
        ),
        (
            json!({"messages": [{"role": "user", "content": "x".repeat(64)}]}),
            "context_length_exceeded messages | messages: 83 tokens leave no room in the context of 64",
        ),
    ];
    check(|fields| chat_line("a", fields), &cases);
}

#[test]
fn parameters_of_completions() {
    let cases = [
        (json!({"prompt": null}), "missing_required_parameter prompt | prompt: missing"),
        (
            json!({"prompt": 3}),
            "invalid_type prompt | prompt: expected a string or an array of token ids, found 3",
        ),
        (
            json!({"prompt": ["a", "b"]}),
            "unsupported_value prompt | prompt: expected one prompt, found an array of 2; write a line for each",
        ),
        (
            json!({"prompt": [[1, 2]]}),
            "unsupported_value prompt | prompt: expected one prompt, found an array of 1; write a line for each",
        ),
        (json!({"prompt": [1, 2.5]}), "invalid_type prompt[1] | prompt[1]: expected a token id, found 2.5"),
        (
            json!({"prompt": [1, 270]}),
            "invalid_token_id prompt | prompt: expected token ids below 270, found 270",
        ),
        (json!({"prompt": []}), "invalid_value prompt | prompt: expected at least one token, found none"),
        (
            json!({"prompt": vec![1; 64]}),
            "context_length_exceeded prompt | prompt: 64 tokens leave no room in the context of 64",
        ),
        (
            json!({"prompt": vec![1; 65], "max_tokens": 0}),
            "context_length_exceeded prompt | prompt: 65 tokens leave no room in the context of 64",
        ),
        (
            json!({"messages": []}),
            "unsupported_parameter messages | messages: not a parameter of /v1/completions",
        ),
        (
            json!({"top_logprobs": 2}),
            "unsupported_parameter top_logprobs | top_logprobs: not a parameter of /v1/completions",
        ),
        (json!({"logprobs": true}), "invalid_type logprobs | logprobs: expected an integer, found true"),
        (
            json!({"logprobs": 21}),
            "invalid_value logprobs | logprobs: expected an integer from 0 to 20, found 21",
        ),
        (
            json!({"suffix": "x"}),
            "unsupported_parameter suffix | suffix: expected an empty value, found \"x\", which is not supported",
        ),
        (
            json!({"best_of": 2}),
            "unsupported_parameter best_of | best_of: expected 1, found 2, which is not supported",
        ),
    ];
    check(|fields| completion_line("a", fields), &cases);
}

#[test]
fn what_a_model_without_a_tokenizer_cannot_take() {
    let world = World::without_tokenizer();
    let name = world.text().name().to_owned();
    let why = format!("the model {name} has no tokenizer.json and takes token ids only");
    assert_eq!(
        world.refusal(&completion_line("a", json!({}))),
        format!("no_tokenizer prompt | prompt: {why}")
    );
    assert_eq!(
        world.refusal(&completion_line("a", json!({"prompt": [1], "stop": "x"}))),
        format!("unsupported_parameter stop | stop: {why}")
    );
    assert_eq!(
        world.refusal(&completion_line("a", json!({"prompt": [1], "guided_regex": "x"}))),
        format!("unsupported_parameter guided_regex | guided_regex: {why}")
    );
}

#[test]
fn plain_rows_that_lack_what_their_template_asks_for() {
    let world = World::new().user("{{ question }} {{ meta.topic }} {{ range(2) | length }}");
    let cases = [
        (
            r#"{"answer": 1, "meta": {"topic": "x"}}"#,
            "missing_field question | [prompt] user asks for question, which the row lacks; it has answer, meta",
        ),
        (
            r#"{"question": 1, "meta": {}}"#,
            "missing_field meta.topic | [prompt] user asks for meta.topic, which the row lacks; it has meta, question",
        ),
        (
            r#"{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}"#,
            "missing_field meta.topic | [prompt] user asks for meta.topic, which the row lacks; \
             it has body, custom_id, method, url; this is a batch line, which a job without [prompt] takes",
        ),
    ];
    for (line, expected) in cases {
        assert_eq!(world.refusal(line), expected, "{line}");
    }
    let world = World::new().user("{{ a[b] }}");
    assert_eq!(
        world.refusal(r#"{"a": {}, "b": "x"}"#),
        "template_error - | [prompt] user: undefined value: `a[...]` is undefined, line 1"
    );
    let world = World::new().user("{{ a + b }}");
    assert_eq!(
        world.refusal(r#"{"a": 1, "b": "x"}"#),
        "template_error - | [prompt] user: invalid operation: tried to use + operator on unsupported types number and string, line 1"
    );
}

#[test]
fn settings_that_cannot_be_end_the_job_before_it_starts() {
    let message = |set: fn(&mut jobs::RowOptions)| {
        let mut world = World::new();
        set(&mut world.options);
        jobs::Preparer::new(world.text(), world.options.clone()).err().unwrap().to_string()
    };
    assert_eq!(
        message(|options| options.sampling.temperature = Some(3.0)),
        "[sampling] temperature: expected a number from 0 to 2, found 3"
    );
    assert_eq!(
        message(|options| options.sampling.stop_token_ids = Some(vec![999])),
        "[sampling] stop_token_ids: expected token ids below 270, found 999"
    );
    assert_eq!(
        message(|options| {
            options.prompt = Some(jobs::PromptOptions { system: None, user: "a\n{{ b".to_owned() });
        }),
        "[prompt] user: syntax error: unexpected end of input, expected end of variable block, line 2"
    );
}

#[test]
fn a_prompt_template_without_an_end_is_the_rows_error_and_the_next_row_is_read() {
    let world = World::new().user(
        "{% if loops %}{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}{% endif %}x",
    );
    let rows = world.rows("{\"loops\": true}\n{\"loops\": false}\n");
    let [jobs::Row::Rejected(row), jobs::Row::Request(_)] = rows.as_slice() else { panic!("{rows:?}") };
    assert_eq!(row.error.code, "template_error");
    let (before, after) = row.error.message.split_once(" after ").unwrap();
    assert_eq!(before, "[prompt] user: stopped");
    assert!(after.ends_with(" steps without an end; does it loop over too much?, line 1"), "{after}");
}

//! Inputs that cannot be: as files, and line by line.

use serde_json::{Value, json};

use super::table::{Case, World, case, check, completion};

const FILES: &[Case] = &[
    case(
        "an input that is not there",
        |w| w.remove("rows.jsonl"),
        "error: read FOLDER/rows.jsonl: No such file or directory (os error 2)",
    ),
    case(
        "an input that is a folder",
        |w| w.folder("rows.jsonl"),
        "error: FOLDER/rows.jsonl: is a directory, expected a file",
    ),
    case(
        "an input that links to itself",
        |w| w.link("rows.jsonl", "rows.jsonl"),
        "error: read FOLDER/rows.jsonl: Too many levels of symbolic links (os error 40)",
    ),
    case(
        "an input that links to nothing",
        |w| w.link("rows.jsonl", "questions.jsonl"),
        "error: read FOLDER/rows.jsonl: No such file or directory (os error 2)",
    ),
    case(
        "an input below a file",
        |w| w.set("job.input=job.toml/rows.jsonl"),
        "error: read FOLDER/job.toml/rows.jsonl: Not a directory (os error 20)",
    ),
    case(
        "an input whose name holds a NUL",
        |w| w.set("job.input=\"rows\\u0000.jsonl\""),
        "error: read FOLDER/rows\0.jsonl: file name contained an unexpected NUL byte",
    ),
    case("an input without rows", |w| w.file("rows.jsonl", ""), "").exits(0),
    case("an input of blank lines", |w| w.file("rows.jsonl", "\n\r\n  \n"), "").exits(0),
    case(
        "an input that is the job's own output",
        |w| w.set("job.input=out/output.jsonl"),
        "error: read FOLDER/out/output.jsonl: No such file or directory (os error 2)",
    ),
    case(
        "an input that a fresh start would throw away",
        |w| {
            w.done();
            w.set("job.input=out/errors.jsonl");
            w.arg("--fresh")
        },
        "error: [job] input: FOLDER/out/errors.jsonl is FOLDER/out/errors.jsonl, which the job writes; copy it to another place first",
    ),
    case(
        "an input that links to the job's own output",
        |w| {
            w.done();
            w.link("own.jsonl", "out/output.jsonl");
            w.set("job.input=own.jsonl");
            w.arg("--fresh")
        },
        "error: [job] input: FOLDER/own.jsonl is FOLDER/out/output.jsonl, which the job writes; copy it to another place first",
    ),
    case(
        "an input that is the job's lock",
        |w| {
            w.done();
            w.set("job.input=out/job.lock")
        },
        "error: [job] input: FOLDER/out/job.lock is FOLDER/out/job.lock, which the job writes; copy it to another place first",
    ),
];

/// A line that has no answer, and what its error line says: the code, the parameter and the message.
struct BadLine {
    name: &'static str,
    line: fn() -> Vec<u8>,
    says: &'static str,
}

const fn bad(name: &'static str, line: fn() -> Vec<u8>, says: &'static str) -> BadLine {
    BadLine { name, line, says }
}

/// A completion with these fields, which are wrong.
fn body(fields: Value) -> Vec<u8> {
    // Each has a name of its own.
    completion(&fields.to_string(), &fields).into_bytes()
}

/// A chat of these messages.
fn chat(messages: Value) -> Vec<u8> {
    let custom_id = messages.to_string();
    json!({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages}})
        .to_string()
        .into_bytes()
}

const LINES: &[BadLine] = &[
    bad("no JSON", || b"hello".to_vec(), "invalid_json_line - | not JSON: expected value at column 1"),
    bad(
        "half an object",
        || b"{\"custom_id\": ".to_vec(),
        "invalid_json_line - | not JSON: EOF while parsing a value at column 14",
    ),
    bad(
        "two objects",
        || b"{} {}".to_vec(),
        "invalid_json_line - | not JSON: trailing characters at column 4",
    ),
    bad("a list", || b"[1, 2]".to_vec(), "invalid_json_line - | expected an object, found [1,2]"),
    bad("a number", || b"7".to_vec(), "invalid_json_line - | expected an object, found 7"),
    bad(
        "an object of nothing",
        || b"{}".to_vec(),
        "missing_required_parameter - | not a batch line: custom_id, method, url and body are missing; a plain row needs [prompt] user in the job file",
    ),
    bad("a NUL", || b"\0".to_vec(), "invalid_json_line - | not JSON: expected value at column 1"),
    bad(
        "a NUL in a text",
        || b"{\"custom_id\": \"a\0b\"}".to_vec(),
        "invalid_json_line - | not JSON: control character (\\u0000-\\u001F) found while parsing a string at column 17",
    ),
    bad(
        "a byte order mark in the middle of the file",
        || "\u{feff}{}".as_bytes().to_vec(),
        "invalid_json_line - | not JSON: expected value at column 1",
    ),
    bad(
        "no UTF-8",
        || b"{\"custom_id\": \"caf\xe9\"}".to_vec(),
        "invalid_utf8 - | not UTF-8: byte 19 is 0xe9",
    ),
    bad(
        "UTF-16",
        || "{}".encode_utf16().flat_map(u16::to_le_bytes).collect(),
        "invalid_json_line - | not JSON: key must be a string at column 2",
    ),
    bad(
        "half of a surrogate pair",
        || b"{\"custom_id\": \"\\ud83d\"}".to_vec(),
        "invalid_json_line - | not JSON: unexpected end of hex escape at column 22",
    ),
    bad(
        "the other half of one",
        || b"{\"custom_id\": \"\\ude00\"}".to_vec(),
        "invalid_json_line - | not JSON: lone leading surrogate in hex escape at column 21",
    ),
    bad(
        "100,000 open brackets",
        || "[".repeat(100_000).into_bytes(),
        "invalid_json_line - | not JSON: recursion limit exceeded at column 128",
    ),
    bad(
        "100,000 open braces",
        || "{\"a\":".repeat(100_000).into_bytes(),
        "invalid_json_line - | not JSON: recursion limit exceeded at column 636",
    ),
    bad(
        "a line of 65 MB",
        || vec![b'x'; 65_000_000 + (3 << 20)],
        "line_too_long - | a line of 68145729 bytes exceeds the most a row may have, 67108864",
    ),
    bad(
        "Python's NaN",
        || b"{\"custom_id\": NaN}".to_vec(),
        "invalid_json_line - | not JSON: expected value at column 15",
    ),
    bad(
        "Python's infinity",
        || b"{\"custom_id\": -Infinity}".to_vec(),
        "invalid_json_line - | not JSON: invalid number at column 16",
    ),
    bad(
        "a number beyond all floats",
        || b"{\"custom_id\": 1e999}".to_vec(),
        "invalid_json_line - | not JSON: number out of range at column 19",
    ),
    bad(
        "no custom_id",
        || {
            json!({"method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}})
                .to_string()
                .into_bytes()
        },
        "missing_required_parameter custom_id | custom_id: missing; a batch line has custom_id, method, url and body",
    ),
    bad(
        "a custom_id that is a number",
        || {
            json!({"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}})
                .to_string()
                .into_bytes()
        },
        "invalid_type custom_id | custom_id: expected a string, found 7",
    ),
    bad(
        "no method",
        || {
            json!({"custom_id": "no method", "url": "/v1/completions", "body": {"prompt": "a"}})
                .to_string()
                .into_bytes()
        },
        "missing_required_parameter method | method: missing; a batch line has custom_id, method, url and body",
    ),
    bad(
        "another method",
        || {
            json!({"custom_id": "GET", "method": "GET", "url": "/v1/completions", "body": {"prompt": "a"}})
                .to_string()
                .into_bytes()
        },
        "invalid_method method | method: expected POST, found \"GET\"",
    ),
    bad(
        "another route",
        || {
            json!({"custom_id": "embed", "method": "POST", "url": "/v1/embeddings", "body": {"input": "a"}})
                .to_string()
                .into_bytes()
        },
        "invalid_url url | url: expected /v1/chat/completions or /v1/completions, found \"/v1/embeddings\"",
    ),
    bad(
        "no body",
        || {
            json!({"custom_id": "no body", "method": "POST", "url": "/v1/completions"})
                .to_string()
                .into_bytes()
        },
        "missing_required_parameter body | body: missing; a batch line has custom_id, method, url and body",
    ),
    bad(
        "a body that is a text",
        || {
            json!({"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": "a"})
                .to_string()
                .into_bytes()
        },
        "invalid_type body | body: expected an object, found \"a\"",
    ),
    bad(
        "a field too many",
        || {
            json!({"custom_id": "field", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}, "priority": 1}).to_string().into_bytes()
        },
        "unknown_parameter priority | priority: unknown field of a batch line",
    ),
    bad(
        "a plain row",
        || json!({"text": "hello"}).to_string().into_bytes(),
        "missing_required_parameter - | not a batch line: custom_id, method, url and body are missing; a plain row needs [prompt] user in the job file",
    ),
    bad(
        "a name that was used before",
        || completion("good", &json!({"prompt": "again"})).into_bytes(),
        "duplicate_custom_id custom_id | custom_id: \"good\" was used on line 1 already",
    ),
    bad("no prompt", || body(json!({"prompt": null})), "missing_required_parameter prompt | prompt: missing"),
    bad(
        "an empty prompt",
        || body(json!({"prompt": []})),
        "invalid_value prompt | prompt: expected at least one token, found none",
    ),
    bad(
        "a prompt of several",
        || body(json!({"prompt": ["a", "b"]})),
        "unsupported_value prompt | prompt: expected one prompt, found an array of 2; write a line for each",
    ),
    bad(
        "a prompt that is an object",
        || body(json!({"prompt": {}})),
        "invalid_type prompt | prompt: expected a string or an array of token ids, found {}",
    ),
    bad(
        "a token id below 0",
        || body(json!({"prompt": [-1]})),
        "invalid_type prompt[0] | prompt[0]: expected a token id, found -1",
    ),
    bad(
        "a token id beyond the vocabulary",
        || body(json!({"prompt": [768]})),
        "invalid_token_id prompt | prompt: expected token ids below 768, found 768",
    ),
    bad(
        "a token id beyond u64",
        || body(json!({"prompt": [1e30]})),
        "invalid_type prompt[0] | prompt[0]: expected a token id, found 1e+30",
    ),
    bad(
        "a prompt beyond the context",
        || body(json!({"prompt": vec![5; 5000]})),
        "context_length_exceeded prompt | prompt: 5000 tokens leave no room in the context of 4096",
    ),
    bad(
        "an unknown parameter",
        || body(json!({"temprature": 1})),
        "unknown_parameter temprature | temprature: unknown parameter; the nearest known one is temperature",
    ),
    bad(
        "more answers than there can be",
        || body(json!({"n": 17})),
        "invalid_value n | n: expected an integer from 1 to 16, found 17",
    ),
    bad(
        "a penalty beyond OpenAI's",
        || body(json!({"presence_penalty": 2.5})),
        "invalid_value presence_penalty | presence_penalty: expected a number from -2 to 2, found 2.5",
    ),
    bad(
        "a stream",
        || body(json!({"stream": true})),
        "unsupported_parameter stream | stream: expected false, found true, which is not supported",
    ),
    bad(
        "tools",
        || body(json!({"tools": [{"type": "function"}]})),
        "unsupported_parameter tools | tools: expected an empty value, found [{\"type\":\"function\"}], which is not supported",
    ),
    bad(
        "a temperature below 0",
        || body(json!({"temperature": -0.1})),
        "invalid_value temperature | temperature: expected a number from 0 to 2, found -0.1",
    ),
    bad(
        "a temperature that is a text",
        || body(json!({"temperature": "hot"})),
        "invalid_type temperature | temperature: expected a number, found \"hot\"",
    ),
    bad(
        "a top_p above 1",
        || body(json!({"top_p": 7})),
        "invalid_value top_p | top_p: expected a number from 0 to 1, found 7",
    ),
    bad(
        "a top_k of -2",
        || body(json!({"top_k": -2})),
        "invalid_value top_k | top_k: expected an integer of at least -1, found -2",
    ),
    bad(
        "a seed that is no integer",
        || body(json!({"seed": 0.5})),
        "invalid_type seed | seed: expected an integer, found 0.5",
    ),
    bad(
        "a seed beyond i64",
        || body(json!({"seed": 1e30})),
        "invalid_value seed | seed: expected an integer from -9223372036854775808 to 18446744073709551615, found 1e+30",
    ),
    bad(
        "a max_tokens below 0",
        || body(json!({"max_tokens": -1})),
        "invalid_value max_tokens | max_tokens: expected an integer of at least 0, found -1",
    ),
    bad(
        "two lengths",
        || body(json!({"max_completion_tokens": 2})),
        "invalid_value max_tokens | max_tokens: expected the same as max_completion_tokens 2, found 1",
    ),
    bad(
        "more tokens at least than at most",
        || body(json!({"min_tokens": 2})),
        "invalid_value min_tokens | min_tokens: expected at most max_tokens 1, found 2",
    ),
    bad(
        "an empty stop",
        || body(json!({"stop": ""})),
        "invalid_value stop | stop: expected strings that are not empty, found \"\"",
    ),
    bad(
        "seventeen stops",
        || body(json!({"stop": vec!["x"; 17]})),
        "invalid_value stop | stop: expected at most 16 strings, found 17",
    ),
    bad(
        "a stop that is a number",
        || body(json!({"stop": [1]})),
        "invalid_type stop | stop: expected a string or an array of strings, found [1]",
    ),
    bad(
        "a stop token beyond the vocabulary",
        || body(json!({"stop_token_ids": [768]})),
        "invalid_token_id stop_token_ids | stop_token_ids: expected token ids below 768, found 768",
    ),
    bad(
        "log-probabilities of a thousand",
        || body(json!({"logprobs": 1000})),
        "invalid_value logprobs | logprobs: expected an integer from 0 to 20, found 1000",
    ),
    bad(
        "no messages",
        || chat(json!([])),
        "invalid_value messages | messages: expected at least one message, found []",
    ),
    bad(
        "messages that are a text",
        || chat(json!("hello")),
        "invalid_type messages | messages: expected an array of messages, found \"hello\"",
    ),
    bad(
        "a message that is a text",
        || chat(json!(["hello"])),
        "invalid_type messages[0] | messages[0]: expected an object, found \"hello\"",
    ),
    bad(
        "a message of nobody",
        || chat(json!([{"content": "hello"}])),
        "missing_required_parameter messages[0].role | messages[0].role: missing",
    ),
    bad(
        "a message of a stranger",
        || chat(json!([{"role": "oracle", "content": "hello"}])),
        "invalid_value messages[0].role | messages[0].role: expected one of system, developer, user, assistant, tool, found \"oracle\"",
    ),
    bad(
        "a message without content",
        || chat(json!([{"role": "user", "content": null}])),
        "missing_required_parameter messages[0].content | messages[0].content: missing",
    ),
    bad(
        "a message with a picture",
        || chat(json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])),
        "invalid_type messages[0].content[0] | messages[0].content[0]: expected {\"type\":\"text\",\"text\":…}, found {\"image_url\":{\"url\":\"x\"},\"type\":\"image_url\"}",
    ),
    bad(
        "a message with a name",
        || chat(json!([{"role": "user", "content": "a", "name": "Ann"}])),
        "unsupported_parameter messages[0].name | messages[0].name: not supported, found \"Ann\"",
    ),
];

#[test]
fn an_input_that_cannot_be_read_is_refused() {
    check(FILES);
}

#[test]
fn lines_that_cannot_be_rows_are_error_lines_and_the_job_goes_on() {
    let world = World::new();
    let good = completion("good", &json!({"max_tokens": 2, "ignore_eos": true})).into_bytes();
    let last = completion("last", &json!({"max_tokens": 2, "ignore_eos": true})).into_bytes();
    let lines: Vec<Vec<u8>> = LINES.iter().map(|bad| (bad.line)()).collect();
    let lines: Vec<&[u8]> = [good.as_slice()]
        .into_iter()
        .chain(lines.iter().map(Vec::as_slice))
        .chain([last.as_slice()])
        .collect();
    world.file("rows.jsonl", lines.join(&b"\r\n"[..]));
    let output = world.command().output().expect("start spanwise");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert_eq!(stderr, "");

    let read = |file: &str| -> Vec<Value> {
        let text = std::fs::read_to_string(world.path("out").join(file)).expect("a file of lines");
        text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    };
    let answered: Vec<Value> = read("output.jsonl").iter().map(|line| line["custom_id"].clone()).collect();
    assert_eq!(answered, ["good", "last"]);
    let errors = read("errors.jsonl");
    let numbers: Vec<u64> = errors
        .iter()
        .map(|line| line["response"]["body"]["error"]["line"].as_u64().expect("a number"))
        .collect();
    assert_eq!(numbers, (2..LINES.len() as u64 + 2).collect::<Vec<_>>());
    let complaints: Vec<String> = (LINES.iter().zip(&errors))
        .filter_map(|(bad, line)| {
            let error = &line["response"]["body"]["error"];
            let param = error["param"].as_str().unwrap_or("-");
            let found = format!("{} {param} | {}", error["code"].as_str()?, error["message"].as_str()?);
            (found != bad.says).then(|| format!("{}: says\n{found}\nand should say\n{}", bad.name, bad.says))
        })
        .collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n\n"));
}

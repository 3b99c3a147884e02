//! Rows that follow a guide: their answers match it, at any temperature and however the job is run.

use std::time::Duration;

use serde_json::{Value, json};

use crate::disturbed::{MODEL, assert_as_run_of, assert_done, stdout, stop_after};
use crate::harness::{Done, Job, batch_line, devices};

const COLOURS: [&str; 4] = ["red", "green", "deep blue", "grün"];

/// A row with a guide of each kind in turn, greedy or drawn; one in six has none.
fn row(i: usize) -> String {
    let schema = json!({"type": "object", "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colour": {"enum": COLOURS},
    }, "required": ["name", "age", "colour"], "additionalProperties": false});
    let mut body = match i % 6 {
        0 => json!({"guided_choice": COLOURS}),
        1 => json!({"guided_regex": "[A-Z]{3}-[0-9]{4}( [a-z]{1,9})?"}),
        2 => json!({"structured_outputs": {"json": schema, "disable_any_whitespace": true}}),
        3 => {
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}})
        }
        4 => json!({"guided_grammar": "start: \"f(\" (arg (\", \" arg)?)? \")\"\narg: /[a-z]{1,3}/ | start"}),
        _ => json!({}),
    };
    // Of one page almost, so that answers grow into the next.
    body["prompt"] = json!((0..50).map(|k| 5 + (k * 7 + i * 31) % 200).collect::<Vec<_>>());
    body["max_tokens"] = json!(120);
    body["temperature"] = json!([0.0, 0.7, 2.0][i / 6 % 3]);
    body["seed"] = json!(i);
    if i.is_multiple_of(4) {
        body["repetition_penalty"] = json!(1.3);
    }
    if i.is_multiple_of(5) {
        body["logprobs"] = json!(2);
    }
    batch_line(&format!("row-{i:03}"), "/v1/completions", &body)
}

fn matches(i: usize, text: &str) -> bool {
    let is = |chars: &str, least: usize, most: usize, is: fn(char) -> bool| {
        (least..=most).contains(&chars.chars().count()) && chars.chars().all(is)
    };
    match i % 6 {
        0 => COLOURS.contains(&text),
        1 => {
            let (code, word) = text.split_once(' ').unwrap_or((text, "x"));
            let (letters, digits) = code.split_once('-').expect("a code");
            is(letters, 3, 3, |c| c.is_ascii_uppercase())
                && is(digits, 4, 4, |c| c.is_ascii_digit())
                && is(word, 1, 9, |c| c.is_ascii_lowercase())
        }
        2 | 3 => {
            let value: Value = serde_json::from_str(text).expect("JSON");
            let keys: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
            keys == ["name", "age", "colour"]
                && value["name"].as_str().is_some_and(|name| name.chars().count() <= 6)
                && value["age"].as_u64().is_some_and(|age| age <= 150)
                && value["colour"].as_str().is_some_and(|colour| COLOURS.contains(&colour))
        }
        4 => text.starts_with("f(") && text.matches('(').count() == text.matches(')').count(),
        _ => true,
    }
}

#[track_caller]
fn assert_all_match(done: &Done) {
    let mut num_stopped = [0; 6];
    for (id, body) in done.bodies() {
        let i: usize = id["row-".len()..].parse().unwrap();
        let choice = &body["choices"][0];
        // One that was cut matches only as far as it came.
        if choice["finish_reason"] == "stop" {
            let text = choice["text"].as_str().unwrap();
            assert!(matches(i, text), "{id}: {text:?}");
            num_stopped[i % 6] += 1;
        }
    }
    assert!(
        num_stopped[..3].iter().all(|&count| count == 10),
        "answers that came to an end: {num_stopped:?}"
    );
    assert!(num_stopped[3] > 0 && num_stopped[4] > 0, "answers that came to an end: {num_stopped:?}");
}

#[test]
fn guided_answers_match_and_do_not_depend_on_how_the_job_is_run() {
    let run = |sets: &[&str]| {
        let job = Job::on(MODEL).lines((0..60).map(row)).set("pipeline.max_sequences=16");
        sets.iter().fold(job, |job, set| job.set(*set)).run().ok()
    };
    let plain = run(&["pipeline.threads=1"]);
    assert_eq!(plain.lines("output.jsonl").len(), 60, "{}", plain.text("errors.jsonl"));
    assert_all_match(&plain);
    let two = devices(2);
    let variants: [&[&str]; 3] = [
        &[&two, "pipeline.micro_batch_tokens=16"],
        &[&two, "pipeline.replicas=2", "pipeline.max_sequences=3"],
        &[&two, "pipeline.stages_run_in=processes"],
    ];
    for sets in variants {
        let done = run(sets);
        assert_eq!(done.sorted_lines(), plain.sorted_lines(), "{sets:?}");
    }
}

#[test]
fn guided_answers_do_not_depend_on_preemption() {
    // Of one page each at first, and of three in the end.
    let row = |i: usize| {
        let body = json!({"prompt": [5 + i, 9, 17], "max_tokens": 140, "seed": i, "guided_regex": "([a-z]{1,4} ){400}"});
        batch_line(&format!("row-{i:02}"), "/v1/completions", &body)
    };
    let run = |pages: &str| {
        Job::on(MODEL).lines((0..15).map(row)).set("pipeline.max_sequences=12").set(pages).run().ok()
    };
    let (roomy, tight) = (run("pipeline.kv_cache_tokens=16384"), run("pipeline.kv_cache_tokens=512"));
    assert!(!roomy.stdout.contains("preempted"), "{}", roomy.stdout);
    assert!(tight.stdout.contains("preempted"), "nothing was preempted:\n{}", tight.stdout);
    assert_eq!(tight.sorted_lines(), roomy.sorted_lines());
    for line in roomy.lines("output.jsonl") {
        let text = line["response"]["body"]["choices"][0]["text"].as_str().unwrap();
        let mut words = text.trim_end().split(' ');
        assert!(
            words.all(|word| (1..=4).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_lowercase()))
        );
    }
}

#[test]
fn guided_answers_go_on_where_a_killed_job_left_them() {
    let job = Job::on(MODEL)
        .lines((0..300).map(row))
        .set("pipeline.max_sequences=8")
        .set("job.checkpoint_tokens=2");
    for _ in 0..3 {
        stop_after(&job, "-KILL", Duration::from_millis(60));
    }
    let last = job.run_once(&[]);
    assert_done(&last);
    assert!(stdout(&last).contains("by earlier runs"), "{}", stdout(&last));
    assert_as_run_of(&job.out(), &job.anew());
}

#[test]
fn guided_answers_survive_a_stage_that_ends() {
    let job = Job::on(MODEL).lines((0..60).map(row)).set(devices(2));
    let output = job.command_with_faults("stage1@20:panic").output().expect("start spanwise");
    assert_done(&output);
    assert_as_run_of(&job.out(), &job.anew());
}

#[test]
fn a_gpu_keeps_to_guides_too() {
    let done = Job::on(MODEL)
        .lines([0, 1, 6, 7].map(row))
        .set("pipeline.devices=[\"cuda:0\"]")
        .set("sampling.max_tokens=30")
        .emulated()
        .run()
        .ok();
    let bodies = done.bodies();
    assert_eq!(bodies.len(), 4, "{}", done.text("errors.jsonl"));
    for (id, body) in bodies {
        let text = body["choices"][0]["text"].as_str().unwrap();
        assert!(matches(id["row-".len()..].parse().unwrap(), text), "{id}: {text:?}");
    }
}

#[test]
fn a_guide_that_means_nothing_is_its_rows_error_line() {
    let body = |guide: Value| {
        let mut body = json!({"prompt": "hello", "max_tokens": 20});
        body["guided_json"] = guide;
        body
    };
    let done = Job::on(MODEL)
        .completion("good", body(json!({"type": "boolean"})))
        .completion("bad", body(json!({"type": "objet"})))
        .run()
        .ok();
    assert!(["true", "false"].contains(&done.choice("good")["text"].as_str().unwrap()));
    let error = &done.lines("errors.jsonl")[0]["response"]["body"]["error"];
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("invalid_guide"), &json!("guided_json")),
        "{error}"
    );
}

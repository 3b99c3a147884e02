//! The same answer however a job is run: stages, threads, micro-batches, order of rows, preemption.

use serde_json::{Value, json};

use crate::harness::{Done, Job, batch_line, devices};

const WORDS: [&str; 12] = [
    "the", "number", "system", "write", "water", "people", "answer", "short", "story", "long", "find", "day",
];

/// A text of so many words, different for each seed.
fn text(seed: usize, words: usize) -> String {
    let word = |i: usize| WORDS[(seed * 31 + i * i * 7 + i * seed) % WORDS.len()];
    (0..words).map(word).collect::<Vec<_>>().join(" ")
}

/// Rows of every kind: greedy and drawn, short and long, scored, stopped by text, and two that fail.
fn rows() -> Vec<String> {
    let chat = |i: usize, mut body: Value| {
        body["messages"] = json!([{"role": "user", "content": text(i, 3 + 17 * (i % 7))}]);
        batch_line(&format!("row-{i:02}"), "/v1/chat/completions", &body)
    };
    let mut rows: Vec<String> = (0..26usize)
        .map(|i| match i % 5 {
            0 if i.is_multiple_of(2) => chat(
                i,
                json!({"max_tokens": 40, "temperature": 0, "repetition_penalty": 1.3, "logit_bias": {"30": 2, "301": -100}}),
            ),
            0 => chat(i, json!({"max_tokens": 40, "temperature": 0})),
            1 => chat(i, json!({"max_tokens": 33, "temperature": 1.0, "seed": i})),
            2 => chat(
                i,
                json!({"max_tokens": 50, "temperature": 0.7, "top_p": 0.9, "logprobs": true, "top_logprobs": 3,
                                "frequency_penalty": 0.4, "presence_penalty": -0.2}),
            ),
            3 => chat(
                i,
                json!({"max_tokens": 60, "temperature": 0.9, "top_k": 20, "min_tokens": 20,
                                "stop": ["e", "an"]}),
            ),
            _ => {
                let body = json!({"prompt": text(i, 60), "max_tokens": 5, "echo": true, "logprobs": 2,
                                  "temperature": 0});
                batch_line(&format!("row-{i:02}"), "/v1/completions", &body)
            }
        })
        .collect();
    rows.push(batch_line("too-long", "/v1/completions", &json!({"prompt": text(1, 5000)})));
    rows.push(batch_line("bad-value", "/v1/completions", &json!({"prompt": "a", "temperature": "hot"})));
    rows
}

fn run(sets: &[&str], rows: Vec<String>) -> Done {
    let mut job = Job::on("hetero-0-bf16").lines(rows).set("pipeline.max_sequences=12");
    for set in sets {
        job = job.set(*set);
    }
    job.run().ok()
}

/// Lines with the numbers of input lines cut out, which move when the input is shuffled.
fn without_line_numbers(done: &Done) -> Vec<String> {
    let cut = |line: String| match (line.find("\"line\":"), line.find("\"error\":{")) {
        (Some(at), Some(_)) => line[..at].to_owned(),
        _ => line,
    };
    done.sorted_lines().into_iter().map(cut).collect()
}

#[test]
fn rows_do_not_depend_on_how_the_job_is_run() {
    let plain = run(&["pipeline.devices=[\"cpu:0\"]", "pipeline.threads=1"], rows());
    assert_eq!(plain.lines("output.jsonl").len(), 26, "errors: {}", plain.text("errors.jsonl"));
    assert_eq!(plain.lines("errors.jsonl").len(), 2);
    let expected = plain.sorted_lines();
    let one = devices(1);
    let two = devices(2);
    let four = devices(4);
    let variants: [&[&str]; 13] = [
        &[&two, "pipeline.replicas=2"],
        &[&four, "pipeline.replicas=2", "pipeline.micro_batch_tokens=64"],
        &[&four, "pipeline.replicas=4", "pipeline.threads=1", "job.order=completion"],
        &[&four, "pipeline.replicas=2", "pipeline.stages=[[0, 3], [3, 11]]", "pipeline.max_sequences=1"],
        &[&one, "pipeline.threads=2"],
        &[&two, "pipeline.threads=1"],
        &[&two, "pipeline.threads=2", "pipeline.micro_batch_tokens=128"],
        &[&four, "pipeline.threads=1"],
        &[&four, "pipeline.threads=2", "pipeline.micro_batch_tokens=16"],
        &[&one, "pipeline.micro_batch_tokens=16"],
        &[&one, "pipeline.micro_batch_tokens=1024", "pipeline.max_sequences=64"],
        &[&two, "pipeline.micro_batch_tokens=1024", "pipeline.max_sequences=1"],
        &[&two, "pipeline.stages=[[0, 3], [3, 11]]", "job.order=completion"],
    ];
    for sets in variants {
        assert_eq!(run(sets, rows()).sorted_lines(), expected, "{sets:?}");
    }
}

#[test]
fn rows_do_not_depend_on_preemption() {
    // Twelve rows of one page each that grow to three: a pool of eight pages admits more than it can hold.
    let growing = || -> Vec<String> {
        let body = |i: usize| {
            let messages = json!([{"role": "user", "content": text(i, 4)}]);
            json!({"messages": messages, "max_tokens": 140, "seed": i, "ignore_eos": true, "logprobs": i.is_multiple_of(2),
                   "presence_penalty": 0.3, "repetition_penalty": 1.0 + i as f64 / 20.0})
        };
        let scored = json!({"prompt": text(3, 70), "max_tokens": 120, "echo": true, "logprobs": 2, "ignore_eos": true});
        (0..12)
            .map(|i| batch_line(&format!("row-{i:02}"), "/v1/chat/completions", &body(i)))
            .chain((0..3).map(|i| batch_line(&format!("scored-{i}"), "/v1/completions", &scored)))
            .collect()
    };
    let roomy = run(&["pipeline.kv_cache_tokens=16384"], growing());
    assert!(!roomy.stdout.contains("preempted"), "{}", roomy.stdout);
    for devices in [devices(1), devices(2)] {
        let tight = run(&["pipeline.kv_cache_tokens=512", &devices], growing());
        assert!(tight.stdout.contains("preempted"), "nothing was preempted:\n{}", tight.stdout);
        assert_eq!(tight.sorted_lines(), roomy.sorted_lines());
    }
}

#[test]
fn rows_do_not_depend_on_the_order_of_the_input() {
    let forward = run(&[], rows());
    let mut shuffled = rows();
    for i in 0..shuffled.len() {
        shuffled.swap(i, (i * 7 + 3) % 28);
    }
    let shuffled = run(&[], shuffled);
    assert_eq!(without_line_numbers(&shuffled), without_line_numbers(&forward));
}

#[test]
fn every_simd_level_keeps_the_bits_of_its_own_layouts() {
    for level in crate::harness::levels().into_iter().filter(|level| *level != "reference") {
        let simd = format!("pipeline.simd={level}");
        let one = run(&[&simd, "pipeline.threads=1"], rows());
        let two = run(&[&simd, &devices(2), "pipeline.micro_batch_tokens=48"], rows());
        assert_eq!(two.sorted_lines(), one.sorted_lines(), "{level}");
    }
}

#[test]
fn every_number_type_keeps_its_bits_too() {
    let weights = ["f32", "int8", "int8-weight", "int4-weight"].map(|dtype| format!("model.dtype={dtype}"));
    for dtype in weights.into_iter().chain(["pipeline.kv_cache_dtype=fp8".to_owned()]) {
        let one = run(&[&dtype, "pipeline.threads=1"], rows());
        assert_eq!(one.lines("output.jsonl").len(), 26, "{dtype}: {}", one.text("errors.jsonl"));
        let two = run(&[&dtype, &devices(2), "pipeline.micro_batch_tokens=48"], rows());
        assert_eq!(two.sorted_lines(), one.sorted_lines(), "{dtype}");
    }
}

#[test]
fn output_stands_in_the_order_of_the_input() {
    let done = run(&[], rows());
    let ids: Vec<String> = done
        .lines("output.jsonl")
        .iter()
        .map(|line| line["custom_id"].as_str().unwrap().to_owned())
        .collect();
    assert!(ids.is_sorted(), "{ids:?}");
}

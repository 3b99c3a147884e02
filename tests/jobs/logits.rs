//! The numbers are right: prompt log-probabilities through `echo`, against the independent reference.

use serde_json::{Value, json};

use crate::harness::{Done, Job, devices, fixture, levels, read_json, root};

/// f32 against f64. A logit is a sum of some hundred products of numbers near 1, each rounded to 2^-24, a
/// dozen blocks deep: measured up to 5e-6, and this is what users are promised. It is also
/// the bound of docs/run.md, "How far ranks are from one device".
pub(crate) const F32_BOUND: f64 = 1e-4;

/// bf16 against f64 on models of at most 12 blocks whose logits have a standard deviation of 1: a rounding
/// to 8 bits is off by up to 2^-8, and by 0.17 % as the root of the mean square; 60 of them (five operands a
/// block) add up like a random walk to 1.3 % of a deviation, and the largest of 10^5 such errors is four and a
/// half times that, 0.06. The bound is a third more.
pub(crate) const BF16_BOUND: f64 = 0.08;

/// Narrow weights against f64 on models with random weights, which forgive less than trained ones. Measured up to
/// 0.10 with weights of 8 bits, 0.20 where inputs have 8 bits too and 1.47 with 4 bits; levels differ by 0.02 from
/// each other and from the plain twins. Bounds are half as much again.
const INT8_WEIGHT_BOUND: f64 = 0.15;
const INT8_BOUND: f64 = 0.3;
const INT4_WEIGHT_BOUND: f64 = 2.2;
const NARROW: [(&str, f64); 3] =
    [("int8", INT8_BOUND), ("int8-weight", INT8_WEIGHT_BOUND), ("int4-weight", INT4_WEIGHT_BOUND)];

/// How far two ranks are from one device there, of logits that have a deviation of 1: each quantises its own columns of `down` and `o`, by
/// scales of their own, but for groups of 4 bits that are whole on a rank. Measured up to 0.12, 0.06 and, where a rank's columns
/// begin within a group, 0.27; bounds are about twice that.
const NARROW_APART: [(&str, f64); 3] = [("int8", 0.3), ("int8-weight", 0.15), ("int4-weight", 0.5)];

/// All models of `cargo fixtures` with a reference beside them.
pub(crate) const MODELS: [&str; 22] = [
    "attention-only-last",
    "deci-7b",
    "deci-7b-as-blocks",
    "dynamic-rope",
    "empty-first",
    "hetero-0-bf16",
    "hetero-0-f32",
    "hetero-1-bf16",
    "hetero-2-f32",
    "linear-first",
    "linear-last",
    "linear-rope",
    "llama",
    "llama-f16",
    "llama-tied",
    "no-attention-anywhere",
    "no-attention-first-empty-last",
    "odd-shapes",
    "rope-none",
    "sharded",
    "small",
    "tied",
];

/// Largest difference of a prompt token's log-probability, and of those of the most likely tokens, from a
/// reference file's.
pub(crate) fn largest_difference(model: &str, reference: &Value, sets: &[&str]) -> f64 {
    let job = sets.iter().fold(Job::on(model), |job, set| job.set(*set));
    largest_difference_of(job, reference)
}

/// The same of a job without rows.
pub(crate) fn largest_difference_of(job: Job, reference: &Value) -> f64 {
    Scores::of_job(job, reference).difference(&Scores::of_reference(reference))
}

/// What is said of each position of a reference file's prompts but the first: log-probabilities of the token that is there and, where
/// it is said, of the most likely one. Which one that is may differ where two are close.
#[derive(Debug, PartialEq)]
pub(crate) struct Scores(Vec<(f64, Option<f64>)>);

impl Scores {
    pub(crate) fn of_reference(reference: &Value) -> Scores {
        let of_prompt = |prompt: &Value| {
            let top = |position: usize| prompt["top_logprobs"][position][0][1].as_f64();
            aligned(&prompt["token_logprobs"], prompt, top)
        };
        Scores(prompts(reference).iter().flat_map(of_prompt).collect())
    }

    /// By a job without rows.
    pub(crate) fn of_job(job: Job, reference: &Value) -> Scores {
        Scores::of_done(&asking(job, reference).run().ok(), reference)
    }

    /// By a job that was [`asking`].
    pub(crate) fn of_done(done: &Done, reference: &Value) -> Scores {
        let of_prompt = |(i, prompt): (usize, &Value)| {
            let logprobs = &done.choice(&format!("prompt-{i}"))["logprobs"];
            let top = |position: usize| {
                let map = logprobs["top_logprobs"][position].as_object().expect("top_logprobs");
                Some(map.values().map(number).fold(f64::NEG_INFINITY, f64::max))
            };
            aligned(&logprobs["token_logprobs"], prompt, top)
        };
        Scores(prompts(reference).iter().enumerate().flat_map(of_prompt).collect())
    }

    /// The largest of a log-probability.
    pub(crate) fn difference(&self, other: &Scores) -> f64 {
        assert_eq!(self.0.len(), other.0.len());
        let pairs = self.0.iter().zip(&other.0);
        let both = pairs.flat_map(|(own, other)| [Some((own.0, other.0)), own.1.zip(other.1)]);
        both.flatten().map(|(own, other)| (own - other).abs()).fold(0.0, f64::max)
    }
}

/// A job without rows with those that ask for what is said of a reference file's prompts.
pub(crate) fn asking(job: Job, reference: &Value) -> Job {
    prompts(reference).iter().enumerate().fold(job, |job, (i, prompt)| {
        let body = json!({"prompt": prompt["ids"], "max_tokens": 0, "echo": true, "logprobs": 1});
        job.completion(&format!("prompt-{i}"), body)
    })
}

fn prompts(reference: &Value) -> &[Value] {
    reference["prompts"].as_array().expect("prompts")
}

/// A prompt's log-probabilities with those of the most likely tokens beside them.
fn aligned(logprobs: &Value, prompt: &Value, top: impl Fn(usize) -> Option<f64>) -> Vec<(f64, Option<f64>)> {
    let logprobs = logprobs.as_array().expect("token_logprobs");
    assert_eq!(logprobs.len(), prompt["ids"].as_array().expect("ids").len());
    assert!(logprobs[0].is_null());
    (1..logprobs.len()).map(|position| (number(&logprobs[position]), top(position))).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[track_caller]
fn assert_agrees(model: &str, level: &str, dtype: &str, stages: usize, bound: f64) {
    let reference = read_json(&fixture(model).join("reference.json"));
    let simd = format!("pipeline.simd={level}");
    let dtype_set = format!("model.dtype={dtype}");
    let difference = largest_difference(model, &reference, &[&simd, &dtype_set, &devices(stages)]);
    assert!(difference <= bound, "{model} on {level} in {dtype}, {stages} stages: off by {difference:.2e}");
}

#[test]
fn every_model_agrees_with_the_reference_in_f32_on_every_level() {
    for model in MODELS {
        for level in levels() {
            assert_agrees(model, level, "f32", 1, F32_BOUND);
        }
    }
}

#[test]
fn every_model_agrees_with_the_reference_in_f32_over_two_stages() {
    for model in MODELS {
        assert_agrees(model, "auto", "f32", 2, F32_BOUND);
        assert_agrees(model, "reference", "f32", 2, F32_BOUND);
    }
}

#[test]
fn every_model_stays_within_the_bf16_bound_on_every_level() {
    for model in MODELS {
        for level in levels() {
            assert_agrees(model, level, "bf16", 1, BF16_BOUND);
        }
        assert_agrees(model, "auto", "bf16", 2, BF16_BOUND);
    }
}

/// Narrow weights on one model of every kind of block: how far they are off is theirs, and the same on every
/// level, the plain twins among them, up to the rounding of bf16.
#[test]
fn narrow_weights_stay_within_their_bounds_on_every_level() {
    for (dtype, bound) in NARROW {
        for model in ["hetero-0-bf16", "hetero-2-f32", "odd-shapes", "llama-f16"] {
            for level in levels() {
                assert_agrees(model, level, dtype, 1, bound);
            }
            assert_agrees(model, "auto", dtype, 2, bound);
        }
    }
}

#[test]
fn narrow_weights_that_ranks_share_stay_within_the_same_bounds() {
    for ((dtype, bound), (_, most_apart)) in NARROW.into_iter().zip(NARROW_APART) {
        for model in ["hetero-0-bf16", "odd-shapes"] {
            let reference = read_json(&fixture(model).join("reference.json"));
            let job = Job::on(model).set(format!("model.dtype={dtype}")).set(devices(1));
            let alone = Scores::of_job(job.anew(), &reference);
            let shared = job
                .set("pipeline.devices=[\"cpu:0\",\"cpu:1\"]")
                .set("pipeline.tensor_parallel=[2]")
                .set("pipeline.split_blocks=all");
            let shared = Scores::of_job(shared, &reference);
            let off = shared.difference(&Scores::of_reference(&reference));
            assert!(off <= bound, "{model} in {dtype}: off by {off:.2e} from the reference");
            let apart = shared.difference(&alone);
            assert!(apart <= most_apart, "{model} in {dtype}: off by {apart:.2e} from one device");
        }
    }
}

#[test]
fn scaled_ropes_agree_with_transformers() {
    for golden in ["linear_rope", "llama3_rope"] {
        let golden = read_json(&root().join(format!("tests/golden/{golden}.json")));
        let model = golden["fixture"].as_str().expect("fixture");
        let difference = largest_difference(model, &golden, &["model.dtype=f32"]);
        assert!(difference <= F32_BOUND, "{model}: off by {difference:.2e}");
    }
}

#[test]
fn the_form_of_decilm_7b_is_the_same_model_as_its_block_configs() {
    let answer = |model: &str| {
        let body = json!({"prompt": [5, 17, 300, 42, 9], "max_tokens": 24, "temperature": 0, "ignore_eos": true,
                          "return_token_ids": true, "echo": true, "logprobs": 3});
        Job::on(model).completion("row", body).run().ok().choice("row").clone()
    };
    assert_eq!(answer("deci-7b"), answer("deci-7b-as-blocks"));
}

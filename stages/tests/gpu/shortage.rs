//! Steps for which a GPU has no room.

use stages::{Model, Stage, WeightType, load};

use crate::ahead::{When, play};
use crate::small_model::small;
use crate::{Asks, device, dtypes, free_bytes, micro_batch, micro_batches, options, part_on, parts, step};

/// Stages to which nobody says how large steps will be. Their weights are made by 32 launches.
fn two_stages(model: &Model) -> Vec<Box<dyn Stage>> {
    let load =
        |part| load(model, &device(true, true), dtypes(WeightType::Bf16), options(part, None)).unwrap();
    parts(model, 2).into_iter().map(load).collect()
}

/// Answers where memory is short, which the child of another test is asked for.
#[test]
#[ignore = "a part of a_step_without_room_goes_in_halves_to_the_same_answers"]
#[allow(clippy::print_stdout, reason = "what it prints is what the other test compares")]
fn answers() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let mut stages = two_stages(&model);
    let free = free_bytes();
    for batch in micro_batches(&model) {
        println!("answer: {:?}", step(&mut stages, &batch));
    }
    println!("grown by {}", free - free_bytes());
}

/// The same of rows whose tokens are fed back.
#[test]
#[ignore = "a part of a_step_without_room_that_is_fed_back_does_too"]
#[allow(clippy::print_stdout, reason = "what it prints is what the other test compares")]
fn answers_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let options = options(parts(&model, 1)[0], None);
    let mut stage = load(&model, &device(true, true), dtypes(WeightType::Bf16), options).unwrap();
    let free = free_bytes();
    for completion in play(&model, &mut *stage, When::Ahead).completions {
        println!("answer: {completion}");
    }
    println!("grown by {}", free - free_bytes());
}

/// A step of one token where memory is short, which the child of another test is asked for.
#[test]
#[ignore = "a part of a_token_without_room_is_an_error_of_its_own"]
#[allow(clippy::print_stdout, reason = "what it prints is what the other test reads")]
fn one_token() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path(), false);
    let mut stages = two_stages(&model);
    let done = stages[0].step(&micro_batch(&model, &[(0, 0..1, Asks::Greedy)]), None);
    println!("{}", done.err().map_or("it has room".to_owned(), |error| error.to_string()));
}

/// What larger steps had has been given back by then.
#[test]
fn a_token_without_room_is_an_error_of_its_own() {
    assert!(part_on(&[], "shortage::one_token").contains("it has room"));
    // The 33rd launch is the first of a step, which has none of its other arrays yet.
    let told = part_on(&[("EMULATED_LEFT", "0@33")], "shortage::one_token");
    assert!(told.contains("a step of one token: cuda:0: ") && told.contains(" are free"), "{told}");
}

/// Where nobody said how large steps would be: another program takes what they would need.
#[test]
fn a_step_without_room_goes_in_halves_to_the_same_answers() {
    assert_same_without_room("shortage::answers", 10);
}

/// Each half is waited for, and so are the tokens that it begins with.
#[test]
fn a_step_without_room_that_is_fed_back_does_too() {
    assert_same_without_room("shortage::answers_ahead", 10);
}

/// The same of so many lines of another test, with memory enough and with little of it.
fn assert_same_without_room(test: &str, count: usize) {
    let answers = |machine: &[(&str, &str)]| part_on(machine, test);
    let outputs = |text: &str| {
        text.lines().filter(|line| line.starts_with("answer: ")).map(str::to_owned).collect::<Vec<_>>()
    };
    let plain = answers(&[]);
    assert_eq!(outputs(&plain).len(), count);
    let grown = plain.lines().find_map(|line| line.strip_prefix("grown by ")).unwrap();
    assert!(grown.parse::<u64>().unwrap() > 2 * LEFT, "{grown}");
    // The first micro-batch's launches are more than the rest, behind those of the weights.
    let short = answers(&[("EMULATED_LEFT", &format!("{LEFT}@40"))]);
    assert_eq!(outputs(&short), outputs(&plain));
}

/// Bytes that another program leaves.
const LEFT: u64 = 300_000;

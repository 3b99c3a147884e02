//! Scripted events: one behaviour each.

use std::sync::Arc;

use crate::world::{STOP_TOKEN, World, deadly, max_tokens, poison, prompt, with};
use scheduler::{
    Error, Failure, FedBack, FinishReason, Generated, LONE_DEATHS, MicroBatchId, MicroBatchOutput, Options,
    Request, Scheduler, SequenceId,
};

// Admission.

#[test]
fn requests_that_can_never_be_served_are_refused_with_their_numbers() {
    let world = World::new().pages(4).page_tokens(4);
    let refusal = |request| world.scheduler.options().check(&request).map_err(|error| error.to_string());
    assert_eq!(refusal(prompt(0)), Err("the prompt is empty".to_owned()));
    assert_eq!(
        refusal(prompt(8190)),
        Err("sequence of 8194 tokens exceeds the context of 8192".to_owned()) // Four tokens are to follow.
    );
    assert_eq!(
        refusal(prompt(14)),
        Err("sequence needs 17 tokens of KV cache, the cache has 16 for one sequence".to_owned())
    );
    assert_eq!(refusal(prompt(13)), Ok(()));
}

#[test]
fn a_refused_request_leaves_nothing_behind() {
    let mut world = World::new();
    assert_eq!(world.scheduler.submit(Arc::new(prompt(0)), Generated::default()), Err(Error::EmptyPrompt));
    assert_eq!(world.scheduler.num_waiting(), 0);
    assert_eq!(world.submit(prompt(1)), SequenceId(0));
}

#[test]
fn sequences_are_admitted_in_order_up_to_the_limit() {
    let mut world = World::new().max_sequences(2);
    let ids = [world.submit(prompt(3)), world.submit(prompt(1)), world.submit(prompt(1))];
    world.fill();
    assert_eq!(world.running(), ids[..2]);
    assert_eq!(world.waiting(), ids[2..]);
    world.run_to_the_end();
}

#[test]
fn a_prompt_is_admitted_when_its_pages_and_a_page_for_each_running_sequence_are_free() {
    let mut world = World::new().pages(5).page_tokens(4);
    let first = world.submit(prompt(4));
    let second = world.submit(prompt(4)); // One page held, one for it, one more for each of the two: four.
    let third = world.submit(prompt(4)); // Two pages held, one for it, one more for each of the three: six.
    world.step();
    assert_eq!((world.running(), world.waiting()), (vec![first, second], vec![third]));
    world.run_to_the_end();
    assert_eq!(world.preempted(), []);
}

#[test]
fn a_short_request_does_not_overtake_a_long_one_that_waits_for_pages() {
    let mut world = World::new().pages(8).page_tokens(4);
    world.submit(prompt(16));
    let long = world.submit(prompt(24));
    let short = world.submit(prompt(1));
    world.step();
    assert_eq!(world.waiting(), [long, short]);
    world.run_to_the_end();
}

// Micro-batches.

#[test]
fn a_long_prompt_goes_in_chunks_that_follow_each_other_through_the_stages() {
    let mut world = World::new().stages(2).micro_batch_tokens(8);
    let id = world.submit(prompt(20));
    world.fill();
    assert_eq!(world.slices_of(id), [(0, 7), (7, 7), (14, 6)]);
    assert!(world.completions.is_empty());
    world.run_to_the_end();
}

#[test]
fn a_sequence_has_one_decode_step_in_flight() {
    let mut world = World::new().stages(4);
    let id = world.submit(prompt(1));
    for position in 0..4 {
        world.fill();
        assert_eq!(world.slices_of(id), [(position, 1)]);
        world.complete();
    }
    assert_eq!(world.completions[&id].generated.tokens.len(), 4);
}

#[test]
fn decode_steps_go_before_prefill_within_the_token_budget() {
    let mut world = World::new().micro_batch_tokens(8);
    let decoding = [world.submit(prompt(1)), world.submit(prompt(1))];
    world.step();
    let long = world.submit(prompt(20));
    assert_eq!(world.send(), Some(vec![(decoding[0], 1), (decoding[1], 1), (long, 6)]));
    world.complete();
    world.run_to_the_end();
}

#[test]
fn ready_sequences_beyond_the_token_budget_take_turns() {
    let mut world = World::new().micro_batch_tokens(2);
    let ids = [world.submit(prompt(1)), world.submit(prompt(1)), world.submit(prompt(1))];
    world.step(); // The first two.
    world.step(); // The first two again, before the third is prefilled: decode goes first.
    world.run_to_the_end();
    assert!(ids.iter().all(|id| world.completions[id].generated.tokens.len() == 4));
}

#[test]
fn with_enough_work_one_micro_batch_more_than_stages_is_in_flight_and_all_are_alike() {
    for num_stages in [2, 3, 4, 8] {
        let mut world = World::new().stages(num_stages).efficient_tokens(4);
        for _ in 0..100 {
            world.submit(max_tokens(prompt(5), 60));
        }
        for step in 0..50 * num_stages {
            world.fill();
            assert_eq!(world.in_flight.len(), num_stages + 1, "step {step}");
            let sizes = world.sizes();
            let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
            // Two rounds after the last prompt all are decode steps.
            let is_decoding = world.num_tokens_in_flight() <= 100 && step > 4 * num_stages;
            assert!(!is_decoding || most - least <= num_stages, "step {step}: {sizes:?}");
            world.complete();
        }
    }
}

#[test]
fn decode_steps_that_came_together_are_shared_out_again() {
    let mut world = World::new().stages(4).efficient_tokens(64).max_sequences(320);
    world.submit_many(60, &max_tokens(prompt(1), 40));
    world.fill();
    assert_eq!(world.sizes(), [60]); // Fewer than the device needs: one micro-batch.
    world.submit_many(260, &max_tokens(prompt(1), 40));
    for _ in 0..15 {
        world.step();
    }
    world.fill();
    assert_eq!(world.sizes(), [64; 5]);
}

#[test]
fn little_work_goes_in_fewer_micro_batches() {
    let mut world = World::new().stages(4).efficient_tokens(16);
    world.submit_many(40, &prompt(1));
    world.fill();
    assert_eq!(world.sizes(), [20, 20]);
    world.run_to_the_end();
}

#[test]
fn a_single_stage_has_one_micro_batch_in_flight() {
    let mut world = World::new();
    world.submit_many(40, &prompt(3));
    world.fill();
    assert_eq!(world.sizes(), [120]);
    world.run_to_the_end();
}

// Tokens that are fed back.

#[test]
fn a_micro_batch_is_issued_before_the_tokens_are_known_that_it_begins_with() {
    let mut world = World::new().feeding_back();
    let ids = [world.submit(prompt(3)), world.submit(prompt(1))];
    world.fill();
    assert_eq!(world.sizes(), [4, 2], "prompts, and the next step behind them");
    let fed_back = |world: &World, at: usize| -> Vec<Option<FedBack>> {
        world.in_flight[at].slices.iter().map(|slice| slice.fed_back).collect()
    };
    let drawn_by =
        |micro_batch| [0, 1].map(|slice| Some(FedBack { micro_batch: MicroBatchId(micro_batch), slice }));
    assert_eq!((fed_back(&world, 0), fed_back(&world, 1)), (vec![None; 2], drawn_by(0).to_vec()));
    for step in 1..3 {
        world.complete();
        world.fill();
        assert_eq!((world.sizes(), fed_back(&world, 1)), (vec![2, 2], drawn_by(step).to_vec()));
    }
    world.complete();
    world.fill();
    assert_eq!(world.sizes(), [2], "the fourth token is the last, which is known ahead");
    world.complete();
    assert!(ids.iter().all(|id| world.completions[id].generated.tokens.len() == 4));
    assert_eq!(world.scheduler.stats().decode_tokens, 6, "nothing was computed in vain");
}

#[test]
fn what_follows_a_stop_token_is_computed_once_in_vain() {
    let mut world = World::new().feeding_back();
    let until_token = |sampling: &mut scheduler::Sampling| {
        (sampling.max_tokens, sampling.stop_token_ids) = (4000, vec![STOP_TOKEN]);
    };
    let id = world.submit(with(prompt(3), until_token));
    while world.completions.is_empty() {
        world.step();
        world.scheduler.check_integrity();
    }
    let num_tokens = world.completions[&id].generated.tokens.len() as u64;
    assert!(num_tokens > 2, "it ends while it runs ahead");
    assert_eq!((world.sizes(), world.running()), (vec![1], vec![id]), "it is drained");
    world.run_to_the_end();
    assert_eq!(world.scheduler.stats().decode_tokens, num_tokens, "one more than is needed");
}

#[test]
fn where_a_row_must_know_its_tokens_none_runs_ahead() {
    let mut world = World::new().feeding_back();
    let ahead = world.submit(max_tokens(prompt(1), 20));
    world.fill();
    assert_eq!(world.sizes(), [1, 1]);
    let bound = world.submit(with(prompt(1), |sampling| sampling.presence_penalty = 0.5));
    for _ in 0..2 {
        world.step();
    }
    while !world.completions.contains_key(&bound) {
        world.fill();
        assert_eq!(world.sizes(), [2], "both, and nothing behind them");
        world.complete();
    }
    world.step();
    world.fill();
    assert_eq!(world.slices_of(ahead).len(), 2, "alone it runs ahead again");
    world.run_to_the_end();
}

#[test]
fn sequences_that_run_ahead_come_home_to_give_their_pages_to_an_older_one() {
    let mut world = World::new().pages(8).page_tokens(2).feeding_back();
    let old = world.submit(max_tokens(prompt(4), 12));
    let new = world.submit(max_tokens(prompt(4), 12));
    while world.preempted().is_empty() {
        world.step();
        world.scheduler.check_integrity();
    }
    assert_eq!((world.preempted(), world.running()), (&[new][..], vec![old]));
    assert!(!world.completions.contains_key(&old), "it did not wait for the other one's end");
    world.run_to_the_end();
    assert_eq!(world.preempted(), [new]);
}

// Pages.

#[test]
fn decode_preempts_the_newest_sequence_when_pages_run_out() {
    let mut world = World::new().pages(8).page_tokens(2);
    let old = world.submit(max_tokens(prompt(4), 12));
    let new = world.submit(max_tokens(prompt(4), 12));
    while world.preempted().is_empty() {
        world.step();
        world.scheduler.check_integrity();
    }
    assert_eq!(world.preempted(), [new]);
    assert_eq!(world.running(), [old]);
    world.run_to_the_end();
    assert_eq!(world.preempted(), [new], "it comes back once there is room, and not before");
}

#[test]
fn the_newest_waits_for_completions_when_no_newer_one_can_be_preempted() {
    let mut world = World::new().stages(2).pages(5).page_tokens(4);
    let old = world.submit(max_tokens(prompt(4), 8)); // Two pages more.
    world.fill();
    let new = world.submit(max_tokens(prompt(3), 8));
    while world.scheduler.num_free_pages() > 0 {
        world.step();
    }
    world.run_to_the_end();
    assert!(
        world.preempted().iter().all(|&id| id == new),
        "{:?} loses pages to {old:?} alone",
        world.preempted()
    );
}

#[test]
fn the_oldest_sequence_is_never_preempted() {
    let mut world = World::new().stages(2).pages(10).page_tokens(2);
    let oldest = world.submit(max_tokens(prompt(4), 16));
    world.submit_many(6, &max_tokens(prompt(2), 16));
    world.run_to_the_end();
    assert!(!world.preempted().is_empty());
    assert!(!world.preempted().contains(&oldest));
}

#[test]
fn a_preempted_sequence_is_computed_again_and_nothing_is_sampled_or_scored_twice() {
    let mut world = World::new().pages(8).page_tokens(2);
    let scored =
        |request| with(request, |sampling| (sampling.prompt_logprobs, sampling.logprobs) = (true, Some(0)));
    world.submit(max_tokens(prompt(4), 12));
    let new = world.submit(scored(max_tokens(prompt(4), 12)));
    world.run_to_the_end(); // Compares tokens and scores with those of a plain loop.
    assert_eq!(world.preempted(), [new]);
    let stats = world.scheduler.stats();
    assert_eq!((stats.preemptions, stats.prefill_tokens), (1, 4 + 4 + stats.recomputed_tokens + 1));
}

#[test]
fn pages_are_taken_lowest_first_so_that_memory_stays_compact() {
    let mut world = World::new().pages(100).page_tokens(4);
    for _ in 0..20 {
        let id = world.submit(prompt(8)); // Three pages with what follows.
        world.fill();
        assert_eq!(*world.in_flight[0].slices[0].pages, [0, 1]);
        world.run_to_the_end();
        assert_eq!(world.completions[&id].generated.tokens.len(), 4);
    }
}

// Ends.

#[test]
fn a_sequence_ends_by_length_stop_token_or_stop_string() {
    let mut world = World::new();
    let by_length = world.submit(max_tokens(prompt(3), 3));
    let until_token = |sampling: &mut scheduler::Sampling| {
        (sampling.max_tokens, sampling.stop_token_ids) = (4000, vec![STOP_TOKEN]);
    };
    let by_token = world.submit(with(prompt(3), until_token));
    let not_before = world.submit(with(with(prompt(3), until_token), |sampling| sampling.min_tokens = 500));
    let until_text = |sampling: &mut scheduler::Sampling| {
        (sampling.max_tokens, sampling.stop) = (4000, vec!["x".to_owned()])
    };
    let by_text = world.submit(with(prompt(3), until_text));
    world.run_to_the_end();
    let end = |id| (world.completions[&id].outcome, world.completions[&id].generated.tokens.len());
    assert_eq!(end(by_length), (Ok(FinishReason::Length), 3));
    assert_eq!(end(by_token).0, Ok(FinishReason::Stop));
    assert_eq!(world.completions[&by_token].generated.tokens.last(), Some(&STOP_TOKEN));
    assert!(end(not_before).0 == Ok(FinishReason::Stop) && end(not_before).1 >= 500, "{:?}", end(not_before));
    assert_eq!(end(by_text).0, Ok(FinishReason::Stop));
}

#[test]
fn scoring_a_prompt_samples_nothing() {
    let mut world = World::new().stages(2).micro_batch_tokens(4);
    let id =
        world.submit(with(prompt(9), |sampling| (sampling.max_tokens, sampling.prompt_logprobs) = (0, true)));
    world.run_to_the_end();
    let completion = &world.completions[&id];
    assert_eq!((completion.generated.tokens.len(), completion.generated.prompt_logprobs.len()), (0, 8));
    assert_eq!(completion.outcome, Ok(FinishReason::Length));
    assert_eq!(
        world.scheduler.stats().prefill_tokens,
        8,
        "nothing follows the last token, so it is not computed"
    );
}

#[test]
fn a_request_that_wants_nothing_ends_without_a_micro_batch() {
    let mut world = World::new();
    let id = world.submit(max_tokens(prompt(9), 0));
    assert_eq!(world.completions[&id].outcome, Ok(FinishReason::Length));
    assert_eq!(world.send(), None);
}

#[test]
fn a_failure_ends_one_sequence_and_not_its_neighbours() {
    let mut world = World::new();
    let fails = world.submit(scheduler::Request { key: poison(4), ..prompt(3) });
    let goes_on = world.submit(prompt(3));
    world.run_to_the_end();
    assert_eq!(world.completions[&fails].outcome, Err(Failure::NonFiniteLogits { position: 4 }));
    assert_eq!(world.completions[&fails].generated.tokens.len(), 2);
    assert_eq!(world.completions[&goes_on].generated.tokens.len(), 4);
}

#[test]
fn a_failure_in_an_early_chunk_drops_the_later_answers_and_then_frees_the_pages() {
    let mut world = World::new().stages(2).micro_batch_tokens(8).page_tokens(4).pages(10);
    let id = world.submit(scheduler::Request { key: poison(2), ..prompt(20) });
    world.fill();
    assert_eq!(world.in_flight.len(), 3);
    world.complete();
    assert!(world.completions[&id].outcome.is_err());
    world.fill();
    world.scheduler.check_integrity();
    assert_eq!((world.in_flight.len(), world.scheduler.num_free_pages()), (2, 5));
    world.run_to_the_end();
}

// Contracts with the caller.

#[test]
#[should_panic(expected = "micro-batches complete in the order of issue")]
fn micro_batches_complete_in_the_order_of_issue() {
    let mut world = World::new().stages(2);
    world.submit_many(4, &prompt(4));
    world.fill();
    let newest = world.in_flight.back().expect("several are in flight").id;
    world.scheduler.complete(MicroBatchOutput { id: newest, slices: vec![] }, |_, _| false);
}

#[test]
#[should_panic(expected = "an answer belongs to a micro-batch in flight")]
fn an_answer_to_nothing_is_a_bug() {
    let output = MicroBatchOutput { id: MicroBatchId(0), slices: vec![] };
    World::new().scheduler.complete(output, |_, _| false);
}

#[test]
#[should_panic(expected = "every option must be positive")]
fn a_pipeline_without_pages_is_a_bug() {
    Scheduler::new(Options { num_pages: 0, ..World::new().options });
}

// Stages that end.

/// Sequences that were held to have ended a stage.
fn convicted(world: &World) -> Vec<SequenceId> {
    let ended = world.completions.iter().filter(|(_, done)| done.outcome == Err(Failure::EndsStage));
    ended.map(|(&id, _)| id).collect()
}

#[test]
fn a_sequence_that_ends_its_stage_is_found_by_halving() {
    let mut world = World::new();
    world.submit_many(40, &prompt(3));
    let culprit = world.submit(Request { key: deadly(4), ..prompt(3) });
    world.submit_many(23, &prompt(3));
    world.run_to_the_end();
    assert_eq!(convicted(&world), [culprit]);
    let mut most = 0;
    most += 1; // All 64 become suspects.
    most += 1; // They end it again, and are halved,
    most += 6; // six times,
    most += LONE_DEATHS as usize - 1; // and one alone ends it again.
    assert!(world.num_ends <= most, "{} ends", world.num_ends);
}

/// Where only the oldest were suspected it would be cleared each time, and its neighbours tried in its place.
#[test]
fn a_sequence_that_ends_its_stage_a_step_ahead_is_found_too() {
    let worlds = || [World::new().feeding_back(), World::new().stages(3).ahead()];
    for (position, mut world) in [0, 3, 4].into_iter().flat_map(|at| worlds().map(|world| (at, world))) {
        world.submit_many(20, &prompt(3));
        let culprit = world.submit(Request { key: deadly(position), ..prompt(3) });
        world.submit_many(11, &prompt(3));
        world.run_to_the_end();
        assert_eq!(convicted(&world), [culprit], "deadly at {position}");
    }
}

#[test]
fn a_stage_that_ends_by_itself_costs_no_sequence() {
    let mut world = World::new().stages(2);
    world.submit_many(64, &max_tokens(prompt(3), 100));
    for _ in 0..20 {
        for _ in 0..7 {
            world.step();
        }
        world.fill();
        world.end_stage(0);
        world.scheduler.check_integrity();
    }
    world.run_to_the_end();
    assert!(world.completions.values().all(|completion| completion.outcome.is_ok()));
}

#[test]
fn a_sequence_goes_on_from_what_an_earlier_run_has() {
    let mut world = World::new();
    let id = world.submit_after(30, max_tokens(prompt(5), 40));
    world.run_to_the_end();
    assert_eq!(world.completions[&id].generated.tokens.len(), 40);
    assert_eq!(world.scheduler.stats().decode_tokens, 9, "thirty are prefilled, and one drawn with them");
}

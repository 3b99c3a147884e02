//! Random requests in random pipelines under random orders of events: each completion is compared
//! with a plain loop, so that any two pipelines give the same, and every invariant is asserted
//! after every event.

use std::ops::Range;

use scheduler::{MicroBatch, Options};

use crate::world::{Random, World, deadly, with};

/// What may come in between.
#[derive(Clone, Copy, PartialEq)]
enum Trouble {
    None,
    /// Stages end, by themselves and over deadly requests.
    Ends,
}

/// Submits, sends, completes and sometimes troubles in an order drawn from `random`, then runs out.
fn play(random: &mut Random, trouble: Trouble, feeds_back: bool) -> World {
    let options = random.options();
    let num_stages = if feeds_back { 1 } else { options.num_stages };
    let mut world = World::of(Options {
        num_stages,
        num_memories: options.num_memories.min(num_stages),
        feeds_back,
        ..options
    });
    // With some that must wait for their tokens none runs ahead.
    let all_run_ahead = feeds_back && !random.once_in(4);
    let mut num_left = 10 + random.below(40);
    while num_left > 0 {
        match random.below(8) {
            0..=1 => {
                let mut request = random.request();
                if all_run_ahead {
                    request = with(request, |sampling| {
                        (sampling.presence_penalty, sampling.repetition_penalty) = (0.0, 1.0);
                    });
                }
                if trouble == Trouble::Ends && random.below(8) == 0 {
                    request.key = deadly(random.below(request.max_positions().max(1)));
                }
                world.submit_after(random.below(4), request);
                num_left -= 1;
            }
            2..=4 => _ = world.send(),
            5..=6 if !world.in_flight.is_empty() => world.complete(),
            // Over several sequences, so that none is convicted for what it did not do.
            7 if trouble == Trouble::Ends && random.below(4) == 0 => {
                let crowds = |batch: &MicroBatch| batch.slices.len() > 1;
                if let Some(index) = world.in_flight.iter().position(crowds) {
                    world.end_stage(index);
                }
            }
            _ => continue,
        }
        world.scheduler.check_integrity();
    }
    world.run_to_the_end();
    world
}

/// What there was to see of all of them.
#[derive(Default)]
struct Seen {
    preemptions: u64,
    recomputed_tokens: u64,
    num_fed_back: usize,
}

fn play_seeds(seeds: Range<u64>, trouble: Trouble, feeds_back: bool) -> Seen {
    let mut seen = Seen::default();
    for seed in seeds {
        // The seed of a failure is the last line of its output.
        let result = std::panic::catch_unwind(|| {
            let world = play(&mut Random(seed), trouble, feeds_back);
            (world.scheduler.stats(), world.num_fed_back)
        });
        let (stats, num_fed_back) = result.unwrap_or_else(|_| panic!("seed {seed}"));
        seen.preemptions += stats.preemptions;
        seen.recomputed_tokens += stats.recomputed_tokens;
        seen.num_fed_back += num_fed_back;
    }
    seen
}

#[test]
fn every_request_gets_what_a_plain_loop_gives_whatever_the_pipeline() {
    let Seen { preemptions, recomputed_tokens, .. } = play_seeds(0..3000, Trouble::None, false);
    // Else these seeds would not show what they are here to show.
    assert!(
        preemptions > 1000 && recomputed_tokens > 10_000,
        "{preemptions} preemptions, {recomputed_tokens} tokens"
    );
}

#[test]
fn stages_that_end_cost_no_row_but_those_that_end_them() {
    play_seeds(200_000..203_000, Trouble::Ends, false);
}

#[test]
fn tokens_that_are_fed_back_change_no_answer() {
    let seen = play_seeds(300_000..303_000, Trouble::None, true);
    let Seen { preemptions, num_fed_back, .. } = seen;
    assert!(
        preemptions > 1000 && num_fed_back > 50_000,
        "{preemptions} preemptions, {num_fed_back} fed back"
    );
    play_seeds(500_000..503_000, Trouble::Ends, true);
}

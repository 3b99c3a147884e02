//! Pages in lanes: what ranks that share out sequences need of the scheduler.

use std::collections::BTreeMap;

use crate::world::{World, max_tokens, prompt};
use scheduler::SequenceId;

/// The lane of each sequence in flight.
fn lanes(world: &World) -> BTreeMap<SequenceId, Vec<usize>> {
    let slices = world.in_flight.iter().flat_map(|micro_batch| &micro_batch.slices);
    let lane = |page_idx: &u32| *page_idx as usize % world.options.num_lanes;
    slices.map(|slice| (slice.sequence, slice.pages.iter().map(lane).collect())).collect()
}

#[test]
fn sequences_go_where_most_pages_are_to_spare() {
    let mut world = World::new().pages(24).page_tokens(4).lanes(2);
    let long = world.submit(prompt(14));
    let short: Vec<SequenceId> = (0..3).map(|_| world.submit(prompt(3))).collect();
    world.fill();
    let lanes = lanes(&world);
    assert_eq!(lanes[&long], [0; 4]);
    // Twelve pages less four and one to grow are seven; in the other lane twelve, ten, eight are left.
    assert_eq!([&lanes[&short[0]], &lanes[&short[1]], &lanes[&short[2]]], [&[1]; 3]);
    world.run_to_the_end();
}

#[test]
fn a_sequence_has_no_more_than_its_lane() {
    let world = World::new().pages(8).page_tokens(4).lanes(2);
    let refusal = |request| world.scheduler.options().check(&request).map_err(|error| error.to_string());
    assert_eq!(refusal(prompt(13)), Ok(()));
    assert_eq!(
        refusal(prompt(14)),
        Err("sequence needs 17 tokens of KV cache, the cache has 16 for one sequence".to_owned())
    );
}

#[test]
fn only_a_sequence_of_the_same_lane_is_preempted() {
    let mut world = World::new().pages(12).page_tokens(2).lanes(2);
    let [oldest, _, third, newest] =
        [(4, 8), (4, 2), (2, 6), (2, 8)].map(|(tokens, more)| world.submit(max_tokens(prompt(tokens), more)));
    world.fill();
    let found = lanes(&world);
    assert_eq!([found[&oldest][0], found[&third][0], found[&newest][0]], [0, 0, 1]);
    while world.preempted().is_empty() {
        world.step();
        world.scheduler.check_integrity();
    }
    assert_eq!(world.preempted(), [third], "the newest has pages of the other lane");
    assert!(world.running().contains(&newest));
    world.run_to_the_end();
}

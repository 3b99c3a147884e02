//! Pipelines that go through their devices twice.

use crate::disturbed::{MODEL, assert_done, row, stdout};
use crate::harness::{Job, fixture, read_json};
use crate::layouts::{FOUR, SETS, all_lines, done};
use crate::profile::{World, even_costs, shapes};

/// A world where the block in the middle takes as long as all others together: a device of its own for it, and the other one for
/// what is before and behind it, are half as fast again as any single cut.
fn world_with_a_dear_block(devices: &'static str) -> World {
    let one_device_each = ["pipeline.tensor_parallel=off", "pipeline.column_cuts=off"];
    let small = ["pipeline.micro_batch_tokens=8", SETS[2]];
    let world = World::on(MODEL, &[&[devices][..], &one_device_each, &small].concat());
    world.measure();
    let shapes = shapes(&fixture(MODEL));
    world.edit(|profile| even_costs(profile, Some(&shapes[shapes.len() / 2])));
    world
}

fn devices(job: &Job) -> Vec<String> {
    let manifest = read_json(&job.out().join("manifest.json"));
    let stages = manifest["plan"]["stages"].as_array().expect("stages").clone();
    stages.iter().map(|stage| stage["device"].as_str().expect("a name").to_owned()).collect()
}

/// Which of two devices has the block in the middle is all the same to a plan.
#[track_caller]
fn assert_gone_through_twice(devices: &[String], of: [&str; 2]) {
    let [one, other] = of;
    assert!(devices == [one, other, one] || devices == [other, one, other], "{devices:?}");
}

#[test]
fn a_run_goes_through_its_devices_twice_where_that_is_faster_and_answers_the_same() {
    let world = world_with_a_dear_block(SETS[0]);
    let job = world.job.anew().over((0..20).map(row));
    let once = ["cpu:0", "cpu:1"];
    let undisturbed = job.anew().set("pipeline.virtual_stages=off");
    done(world.run_job(&undisturbed, &[]));
    assert_eq!(devices(&undisturbed), once);

    let alone = job.anew();
    let output = world.run_job(&alone, &[]);
    let said = done(output.clone());
    let twice = devices(&alone);
    assert_gone_through_twice(&twice, once);
    let layout = format!("stages: [[0, 5], [5, 6], [6, 11]] with devices = {twice:?}, by measured costs");
    assert!(said.contains(&layout), "{said}");
    assert!(!said.contains("would be"), "nothing is left to be pasted: {said}");
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(report.contains(&format!("stage 2   {} blocks [6, 11)", twice[2])), "{report}");
    // The same as where the job's file says it.
    let given = job.anew().set(format!("pipeline.devices={twice:?}"));
    let given = given.set("pipeline.stages=[[0, 5], [5, 6], [6, 11]]");
    done(world.run_job(&given, &[]));
    assert_eq!(devices(&given), twice);

    // A device loads one of its stages anew, and has kept the other.
    let disturbed = job.anew();
    let output = world.run_job_with_faults(&disturbed, "stage2@9:panic");
    assert_done(&output);
    assert!(stdout(&output).contains("started again"), "{}", stdout(&output));

    // Two processes would be in each other's way on a device.
    let processes = job.anew().set("pipeline.stages_run_in=processes");
    let said = done(world.run_job(&processes, &[]));
    assert_eq!(devices(&processes), once);
    assert!(!said.contains("[[0, 5], [5, 6], [6, 11]]"), "{said}");
    for other in [&alone, &given, &disturbed, &processes] {
        assert!(all_lines(other) == all_lines(&undisturbed));
    }
}

#[test]
fn a_job_goes_on_through_its_devices_twice_and_may_end_without() {
    let world = world_with_a_dear_block(SETS[0]);
    let job = world.job.anew().over((0..20).map(row));
    let undisturbed = job.anew().set("pipeline.virtual_stages=off");
    done(world.run_job(&undisturbed, &[]));
    let off = ["--set", "pipeline.virtual_stages=off"];
    for (first, then, stages) in [(&[][..], &[][..], [3, 3]), (&[], &off, [3, 2]), (&off, &[], [2, 3])] {
        let job = job.anew();
        done(world.run_job(&job, &[&["--limit", "8"], first].concat()));
        assert_eq!(devices(&job).len(), stages[0]);
        done(world.run_job(&job, then));
        assert_eq!(devices(&job).len(), stages[1]);
        assert!(all_lines(&job) == all_lines(&undisturbed), "{first:?}, then {then:?}");
    }
}

#[test]
fn each_replica_goes_through_its_own_devices_twice() {
    let world = world_with_a_dear_block(FOUR[0]);
    let job = world.job.anew().over((0..20).map(row)).set("pipeline.replicas=2");
    done(world.run_job(&job, &[]));
    let both = devices(&job);
    assert_gone_through_twice(&both[..3], ["cpu:0", "cpu:1"]);
    assert_gone_through_twice(&both[3..], ["cpu:2", "cpu:3"]);
    let once = job.anew().set("pipeline.virtual_stages=off");
    done(world.run_job(&once, &[]));
    assert_eq!(devices(&once), ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]);
    assert!(all_lines(&job) == all_lines(&once));
}

//! GPUs in processes of their own, on machines that an emulator plays: stages that hand activations over by NCCL, and ranks that
//! share a stage. The same bytes as on threads, and complete jobs whoever dies, in processes or in threads.

use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::cuda::emulator;
use crate::disturbed::{SMALL, assert_done, lines, stderr, stdout};
use crate::harness::{Job, read_json};

/// Few, of a small model: what these jobs are about is who meets whom, and an emulator takes its time for products.
const NUM_ROWS: usize = 12;

/// Rows that decode together and by turns, greedy ones and drawn ones.
fn job(devices: &[&str]) -> Job {
    let mut job = Job::on(SMALL)
        .set("pipeline.max_sequences=3")
        .set("pipeline.micro_batch_tokens=40")
        .set(format!("pipeline.devices={devices:?}"))
        .emulated_gpus(3);
    for i in 0..NUM_ROWS {
        let prompt: Vec<usize> = (0..4 + 3 * i).map(|k| 5 + (k * 7 + i * 31) % 200).collect();
        let body = json!({"prompt": prompt, "max_tokens": 4 + i % 2, "temperature": i % 2, "seed": i, "ignore_eos": true});
        job = job.completion(&format!("row-{i}"), body);
    }
    job
}

const THREE: [&str; 3] = ["cuda:0", "cuda:1", "cuda:2"];

fn in_processes(job: &Job) -> Job {
    job.anew().set("pipeline.stages_run_in=processes")
}

/// Has a job say how its stages meet.
fn telling(command: &mut Command) -> Output {
    command.envs([("SPANWISE_LOG", "info"), ("NO_COLOR", "1")]).output().expect("start spanwise")
}

/// What a job has written, and what it has said to its standard error.
fn run(job: &Job) -> (Vec<String>, String) {
    let output = telling(&mut job.command());
    assert_done(&output);
    (lines(&job.out(), "output.jsonl"), stderr(&output))
}

fn stages(job: &Job) -> Vec<Value> {
    read_json(&job.out().join("manifest.json"))["stages"].as_array().expect("stages").clone()
}

/// Stages on two GPUs and on three, and an FFN that two of them share, whose sums go beside the residual stream.
#[test]
fn stages_of_gpus_in_processes_write_the_same_bytes_as_on_threads_and_meet_by_nccl() {
    let cut = "pipeline.stages=[[0,\"3:64\"],[\"3:64\",8]]";
    let one = run(&job(&["cuda:0"])).0;
    assert_eq!(one.len(), NUM_ROWS);
    for (devices, stages_set) in [
        (&THREE[..2], "pipeline.stages=[[0,4],[4,8]]"),
        (&THREE[1..], cut),
        (&THREE[..], "pipeline.stages=[[0,3],[3,6],[6,8]]"),
    ] {
        let threads = job(devices).set(stages_set);
        let processes = in_processes(&threads);
        let (found, told) = run(&processes);
        assert!(found == run(&threads).0 && found == one, "{stages_set}");
        assert_eq!(told.matches("by_nccl=true").count(), devices.len() - 1, "{told}");
        for (index, stage) in stages(&processes).iter().enumerate() {
            let is_last = index + 1 == devices.len();
            let number = |key: &str| stage[key].as_f64().unwrap();
            assert_eq!(number("hop_bytes") > 0.0 && number("hop_seconds") > 0.0, !is_last, "{stage}");
            assert_eq!(number("restarts"), 0.0, "{stage}\n{told}");
        }
    }
}

/// Two stages on one GPU, and a machine without NCCL.
#[test]
fn stages_of_gpus_in_processes_go_through_the_host_where_nccl_does_not_join_them() {
    let expected = run(&job(&["cuda:0"])).0;
    let cut = "pipeline.stages=[[0,\"3:64\"],[\"3:64\",8]]";
    let on_one = in_processes(&job(&["cuda:1", "cuda:1"])).set(cut);
    let (found, told) = run(&on_one);
    assert!(found == expected && told.contains("by_nccl=false"), "{told}");

    let libraries = tempfile::tempdir().unwrap();
    for library in ["libcuda.so", "libnvrtc.so"] {
        std::fs::copy(emulator().join(library), libraries.path().join(library)).unwrap();
    }
    let without = in_processes(&job(&THREE[..2])).set(cut);
    let mut command = without.command();
    // Some machine may have one of its own.
    command.env("SPANWISE_CUDA_LIBRARIES", libraries.path());
    for name in ["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "HOME", "PATH"] {
        command.env(name, libraries.path());
    }
    let output = telling(&mut command);
    assert_done(&output);
    assert!(stderr(&output).contains("by_nccl=false"), "{}", stderr(&output));
    assert!(lines(&without.out(), "output.jsonl") == expected);
}

/// Neighbours have queues that wait for the one that is gone, or that it waits for.
#[test]
fn a_stage_of_a_gpu_that_dies_or_hangs_is_started_again_and_meets_its_neighbours_anew() {
    let undisturbed = job(&THREE).set("pipeline.stages=[[0,3],[3,6],[6,8]]");
    let expected = run(&undisturbed).0;
    for (stage, fault) in [
        (0, "stage0@12:kill"),
        (1, "stage1@12:kill"),
        (2, "stage2@12:kill"),
        (1, "stage1@13:panic"),
        (1, "stage1@16:hang"),
    ] {
        let job = in_processes(&undisturbed).set("pipeline.step_timeout_seconds=6");
        let output = telling(&mut job.command_with_faults(fault));
        assert_done(&output);
        assert!(lines(&job.out(), "output.jsonl") == expected, "{fault}");
        let restarts: Vec<u64> =
            stages(&job).iter().map(|stage| stage["restarts"].as_u64().unwrap()).collect();
        let others: u64 = (0..3).filter(|other| *other != stage).map(|other| restarts[other]).sum();
        assert!(restarts[stage] > 0 && others == 0, "{fault}: {restarts:?}\n{}", stderr(&output));
        // Both ways at the start, and those of the stage each time that it was started again.
        let joined = 2 + restarts[stage] as usize * if stage == 1 { 2 } else { 1 };
        assert_eq!(stderr(&output).matches("by_nccl=true").count(), joined, "{fault}: {}", stderr(&output));
    }
}

/// One stage of two ranks, alone and after another stage, with everything in processes that can be.
#[test]
fn ranks_of_gpus_in_processes_write_the_same_bytes_as_on_threads() {
    let shared = job(&THREE[..2]).set("pipeline.tensor_parallel=[2]");
    let second = job(&THREE).set("pipeline.tensor_parallel=[1,2]").set("pipeline.stages=[[0,4],[4,8]]");
    for threads in [shared, second].map(|job| job.set("pipeline.split_blocks=all")) {
        let expected = run(&threads).0;
        for sets in [
            &["pipeline.ranks=processes"][..],
            &["pipeline.ranks=processes", "pipeline.stages_run_in=processes"],
        ] {
            let job = sets.iter().fold(threads.anew(), |job, set| job.set(*set));
            let (found, told) = run(&job);
            assert!(found == expected, "{sets:?}");
            let last = stages(&job).pop().unwrap();
            assert_eq!((&last["ranks"], &last["restarts"]), (&json!(2), &json!(0)), "{told}");
        }
    }
}

/// Also where NCCL has whoever leaves a group wait for the others: what it waits for is no hang of the stage's.
#[test]
fn a_rank_of_a_gpu_that_dies_or_hangs_fails_its_stage_as_one_and_the_job_ends_complete() {
    let undisturbed = job(&THREE)
        .set("pipeline.tensor_parallel=[1,2]")
        .set("pipeline.split_blocks=all")
        .set("pipeline.stages=[[0,4],[4,8]]");
    let expected = run(&undisturbed).0;
    for (fault, ranks, stages) in [
        ("stage1.1@12:kill", "processes", "threads"),
        ("stage1.1@12:kill", "processes", "processes"),
        ("stage1.1@13:panic", "processes", "threads"),
        ("stage1.1@16:hang", "processes", "processes"),
        ("stage1@12:kill", "processes", "processes"),
        ("stage1.1@13:panic", "threads", "threads"),
        ("stage1@13:panic", "threads", "threads"),
        ("stage1.1@16:hang", "threads", "threads"),
    ] {
        let job = undisturbed
            .anew()
            .set(format!("pipeline.ranks={ranks}"))
            .set(format!("pipeline.stages_run_in={stages}"))
            .set("pipeline.step_timeout_seconds=6");
        let output = telling(job.command_with_faults(fault).env("EMULATED_NCCL_ABORT", "waits"));
        assert_done(&output);
        let what = format!("{fault}, ranks in {ranks}, stages in {stages}");
        assert!(stdout(&output).contains("started again"), "{what}: {}", stdout(&output));
        let is_hang = stderr(&output).contains("a step did not end within");
        assert_eq!(is_hang, fault.ends_with("hang"), "{what}: {}", stderr(&output));
        assert!(lines(&job.out(), "output.jsonl") == expected, "{what}");
    }
}

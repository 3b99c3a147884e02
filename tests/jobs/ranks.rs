//! Stages of several devices, and FFNs that are cut by columns, through the binary: right numbers, the same ones every
//! time, and complete jobs when a rank dies.

use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::disturbed::{MODEL, assert_as_run_of, assert_done, row, stderr, stdout};
use crate::harness::{Done, Job, fixture, read_json};
use crate::logits::{F32_BOUND, MODELS, Scores};

/// So many devices, shared out to stages of these widths, which share all of their blocks.
pub(crate) fn layout(job: Job, widths: &[usize]) -> Job {
    let devices: Vec<String> = (0..widths.iter().sum()).map(|device| format!("cpu:{device}")).collect();
    job.set(format!("pipeline.devices={devices:?}"))
        .set(format!("pipeline.tensor_parallel={widths:?}"))
        .set("pipeline.split_blocks=all")
}

pub(crate) fn rows(count: usize) -> Vec<String> {
    (0..count).map(row).collect()
}

/// What a layout's log-probabilities must be near to: those of the reference and of one device that has everything.
pub(crate) struct Expected {
    model: &'static str,
    config: stages::ModelConfig,
    pub(crate) reference: Value,
    unsplit: Scores,
}

impl Expected {
    /// By so many of a model's prompts.
    pub(crate) fn of(model: &'static str, num_prompts: usize) -> Expected {
        let config = stages::ModelConfig::read(&fixture(model)).unwrap();
        let mut reference = read_json(&fixture(model).join("reference.json"));
        reference["prompts"].as_array_mut().expect("prompts").truncate(num_prompts);
        let unsplit = Scores::of_job(Job::on(model).set("model.dtype=f32"), &reference);
        let expected = Expected { model, config, reference, unsplit };
        expected.check(&expected.unsplit, "unsplit");
        expected
    }

    /// Of stages between these places, on so many devices each.
    fn scores(&self, widths: &[usize], cuts: &[String]) -> Scores {
        let bounds = [&["0".to_owned()], cuts, &[self.config.blocks.len().to_string()]].concat();
        let stages: Vec<String> =
            bounds.windows(2).map(|pair| format!("[{}, {}]", pair[0], pair[1])).collect();
        let job = layout(Job::on(self.model).set("model.dtype=f32"), widths);
        Scores::of_job(job.set(format!("pipeline.stages=[{}]", stages.join(", "))), &self.reference)
    }

    #[track_caller]
    pub(crate) fn check(&self, found: &Scores, how: &str) {
        for (other, what) in
            [(&Scores::of_reference(&self.reference), "reference"), (&self.unsplit, "unsplit run")]
        {
            let off = found.difference(other);
            assert!(off <= F32_BOUND, "{}, {how}: off by {off:.2e} from the {what}", self.model);
        }
    }

    /// That stages of so many devices are near, with these places between them.
    #[track_caller]
    fn agrees(&self, widths: &[usize], cuts: &[String]) {
        self.check(&self.scores(widths, cuts), &format!("{widths:?} cut at {cuts:?}"));
    }

    /// All places in the widest FFN where it can be cut; none where the model has no FFN, or one that is too narrow.
    fn cuts(&self) -> Vec<String> {
        let (block, width) = widest_of(&self.config).unwrap_or_default();
        (stages::SUM_CUT..width)
            .step_by(stages::SUM_CUT)
            .map(|column| format!("\"{block}:{column}\""))
            .collect()
    }

    /// That the widest FFN has the same bits where each of its panels is another stage's, of which there may be as many as blocks.
    #[track_caller]
    fn keeps_its_bits_cut_everywhere(&self) {
        for cuts in self.cuts().chunks(self.config.blocks.len() - 1) {
            let found = self.scores(&vec![1; cuts.len() + 1], cuts);
            assert!(found == self.unsplit, "{} cut at all of {cuts:?}", self.model);
        }
    }
}

/// KV heads are shared out unevenly where their number is none of the ranks', and there are fewer of them than ranks.
#[test]
fn every_model_agrees_with_the_reference_on_stages_of_one_to_four_devices() {
    for model in MODELS {
        let expected = Expected::of(model, 3);
        for num_ranks in 1..=4 {
            expected.agrees(&[num_ranks], &[]);
        }
        if expected.config.blocks.len() > 1 {
            expected.agrees(&[2, 3], &["1".to_owned()]);
        }
    }
}

/// Between stages of any two numbers of ranks.
#[test]
fn every_model_agrees_with_the_reference_wherever_its_widest_ffn_is_cut() {
    let mut num_cut = 0;
    for model in MODELS {
        let expected = Expected::of(model, 2);
        let cuts = expected.cuts();
        expected.keeps_its_bits_cut_everywhere();
        for (index, cut) in cuts.iter().enumerate() {
            let widths = [1 + index % 4, 1 + (1 + index + index / 4) % 4];
            expected.agrees(&widths, std::slice::from_ref(cut));
        }
        num_cut += usize::from(!cuts.is_empty());
    }
    assert!(num_cut > MODELS.len() / 2, "{num_cut} of {} models have an FFN to cut", MODELS.len());
}

/// As the two above, for all blocks of Ultra: two KV heads shared by up to four ranks, and its widest FFN cut everywhere, and
/// between stages of one to four ranks.
#[test]
fn a_scaled_down_ultra_agrees_with_the_reference_shared_cut_and_both() {
    let expected = Expected::of("scaled-ultra", 2);
    for num_ranks in 2..=4 {
        expected.agrees(&[num_ranks], &[]);
    }
    expected.keeps_its_bits_cut_everywhere();
    let some: Vec<String> = expected.cuts().into_iter().skip(10).step_by(40).collect();
    let widths: Vec<usize> = (0..=some.len()).map(|stage| 1 + stage % 4).collect();
    assert!(widths.contains(&4), "{some:?}");
    expected.agrees(&widths, &some);
}

/// The block of a model whose FFN is widest, and its width.
pub(crate) fn widest(model: &str) -> (usize, usize) {
    widest_of(&stages::ModelConfig::read(&fixture(model)).unwrap()).expect("an FFN")
}

fn widest_of(config: &stages::ModelConfig) -> Option<(usize, usize)> {
    let width = |(index, block): (usize, &stages::Block)| match block.ffn {
        stages::Ffn::SwiGlu { width } => Some((width, index)),
        stages::Ffn::Linear | stages::Ffn::None => None,
    };
    config.blocks.iter().enumerate().filter_map(width).max().map(|(width, index)| (index, width))
}

pub(crate) fn cut_at(job: Job, block: usize, column: usize, num_blocks: usize) -> Job {
    let place = format!("{block}:{column}");
    job.set("pipeline.devices=[\"cpu:0\", \"cpu:1\"]")
        .set(format!("pipeline.stages=[[0, \"{place}\"], [\"{place}\", {num_blocks}]]"))
}

#[test]
fn a_job_whose_ffn_is_cut_at_any_column_writes_the_same_bytes() {
    let num_blocks = stages::ModelConfig::read(&fixture(MODEL)).unwrap().blocks.len();
    let (block, width) = widest(MODEL);
    let job = || Job::on(MODEL).lines(rows(20));
    for dtype in ["bf16", "f32", "int4-weight"] {
        let of = |job: Job| job.set(format!("model.dtype={dtype}")).run().ok();
        let expected = of(job()).sorted_lines();
        assert!(width >= 256, "the widest FFN has {width} columns");
        for column in (64..width).step_by(64) {
            let done = of(cut_at(job(), block, column, num_blocks));
            assert!(done.sorted_lines() == expected, "{dtype}, cut at {column} of {width}");
            assert!(done.stdout.contains(&format!("blocks [0, {block}:{column})")), "{}", done.stdout);
        }
    }
}

fn manifest(done: &Done) -> Value {
    read_json(&done.folder.path().join("out/manifest.json"))
}

#[test]
fn ranks_in_threads_and_in_processes_write_the_same_bytes_and_are_reported() {
    let job = |home: &str| {
        layout(Job::on(MODEL).lines(rows(30)), &[1, 2]).set(format!("pipeline.ranks={home}")).run().ok()
    };
    let threads = job("threads");
    assert!(threads.sorted_lines() == job("threads").sorted_lines(), "the same every time");
    let processes = job("processes");
    assert!(threads.sorted_lines() == processes.sorted_lines(), "processes as threads");
    assert!(threads.stdout.contains("cpu:1+cpu:2"), "{}", threads.stdout);
    assert!(threads.stdout.contains("2 ranks"), "{}", threads.stdout);
    let manifest = manifest(&threads);
    let stages = manifest["stages"].as_array().expect("stages");
    assert_eq!((&stages[0]["ranks"], &stages[1]["ranks"]), (&json!(1), &json!(2)));
    assert!(stages[1]["collective_bytes"].as_u64().unwrap() > 0);
    assert!(stages[0].get("rank_collectives").is_none());
    for job in [&threads, &processes] {
        let manifest = read_json(&job.folder.path().join("out/manifest.json"));
        let ranks = manifest["stages"][1]["rank_collectives"].as_array().expect("of each rank").clone();
        assert_eq!(ranks.len(), 2);
        for (rank, device) in ranks.iter().zip(["cpu:1", "cpu:2"]) {
            assert_eq!(rank["device"], device);
            let is_above_0 = |key: &str| rank[key].as_f64().unwrap() > 0.0;
            assert!(
                ["collectives", "collective_seconds", "collective_bytes"].into_iter().all(is_above_0),
                "{rank}"
            );
        }
    }
    assert!(stages[0]["hop_bytes"].as_u64().unwrap() > 0);
    assert_eq!(manifest["numeric_profile"]["tensor_parallel"], 2);
}

/// The line of a stage says what its manifest does: of each rank the share of its busy time and the bytes that went through
/// collectives, and what went to the next stage.
#[test]
fn the_report_tells_time_in_collectives_and_bytes_on_hops_of_a_stage_with_ranks() {
    let done = layout(Job::on(MODEL).lines(rows(60)), &[2, 1]).run().ok();
    let line = |stage: usize| {
        let start = format!("stage {stage}");
        done.stdout.lines().find(|line| line.starts_with(&start)).expect("a line of the stage").to_owned()
    };
    let manifest = manifest(&done);
    let stage = &manifest["stages"][0];
    let number = |of: &Value, key: &str| of[key].as_f64().expect("a number");
    let megabytes = |of: &Value, key: &str| {
        let bytes = of[key].as_u64().expect("bytes");
        assert!((1_000_000..1_000_000_000).contains(&bytes), "{key}: {bytes} are told without a comma");
        bytes / 1_000_000
    };
    let share = |rank: &Value| {
        let percent = 100.0 * number(rank, "collective_seconds") / number(stage, "busy_seconds");
        format!("{percent:.1} % ({} MB)", megabytes(rank, "collective_bytes"))
    };
    let shares: Vec<String> =
        stage["rank_collectives"].as_array().expect("ranks").iter().map(share).collect();
    let micros = number(stage, "hop_seconds") * 1e6 / number(stage, "micro_batches");
    let told = format!(
        ", 2 ranks: in collectives {} of it, {} MB handed on in {micros:.0} µs each",
        shares.join(", "),
        megabytes(stage, "hop_bytes")
    );
    assert!(shares.len() == 2 && line(0).ends_with(&told), "{}\nis not{told}", line(0));
    let alone = line(1);
    assert!(!["ranks", "collectives", "handed on"].iter().any(|word| alone.contains(word)), "{alone}");
}

fn restarts(output: &Output) -> bool {
    stdout(output).contains("started again")
}

#[test]
fn a_rank_that_dies_or_hangs_fails_its_stage_as_one_and_the_job_ends_complete() {
    let undisturbed = layout(Job::on(MODEL).lines(rows(40)), &[1, 2]);
    for (home, fault) in [
        ("threads", "stage1.1@20:panic"),
        ("threads", "stage1.1@20:hang"),
        ("threads", "stage1@20:panic"),
        ("processes", "stage1.1@25:kill"),
        ("processes", "stage1.1@25:panic"),
        ("processes", "stage1.1@25:hang"),
        ("processes", "stage1.1@25:stop"),
    ] {
        let job =
            undisturbed.anew().set(format!("pipeline.ranks={home}")).set("pipeline.step_timeout_seconds=2");
        let output = job.command_with_faults(fault).output().expect("start spanwise");
        assert_done(&output);
        assert!(restarts(&output), "{home} {fault}:\n{}", stdout(&output));
        assert_as_run_of(&job.out(), &undisturbed);
    }
}

/// Much less than the ten minutes that a step may take unless a job says otherwise.
const SOON: Duration = Duration::from_secs(60);

#[test]
fn a_rank_or_a_stage_that_dies_or_stops_while_it_loads_is_not_waited_for() {
    let job = || layout(Job::on(MODEL).lines(rows(1)), &[1, 2]);
    let ranks = || job().set("pipeline.ranks=processes");
    let stages = || job().set("pipeline.stages_run_in=processes");
    let soon = "pipeline.step_timeout_seconds=2";
    let silent = "its process was not heard of for 2.5s while it loaded";
    for (job, fault, words) in [
        (ranks(), "load1.1@1:kill", "load stage 1: rank 1: its process ended"),
        (ranks(), "load1.1@2:kill", "load stage 1: rank 1: its process ended"),
        (ranks().set(soon), "load1.1@2:stop", &format!("load stage 1: rank 1: {silent}")[..]),
        (stages(), "load1@1:kill", "load stage 1: its process ended"),
        (stages().set(soon), "load1@1:stop", &format!("load stage 1: {silent}")[..]),
    ] {
        let begun = Instant::now();
        let output = job.command_with_faults(fault).output().expect("start spanwise");
        assert!(begun.elapsed() < SOON, "{fault}: {:?}", begun.elapsed());
        assert!(!output.status.success() && stderr(&output).contains(words), "{fault}: {}", stderr(&output));
    }
}

#[test]
fn a_job_goes_on_with_the_layout_that_it_was_begun_with_and_no_other() {
    let job = layout(Job::on(MODEL).lines(rows(30)), &[2]);
    assert_done(&job.run_once(&["--limit", "10"]));
    let other = job.run_once(&["--set", "pipeline.tensor_parallel=off"]);
    assert_eq!(other.status.code(), Some(2), "{}", stderr(&other));
    assert!(stderr(&other).contains("tensor parallel"), "{}", stderr(&other));
    assert_done(&job.run_once(&[]));
    assert_as_run_of(&job.out(), &layout(Job::on(MODEL).lines(rows(30)), &[2]));
}

#[test]
fn layouts_that_cannot_be_run_are_refused() {
    let num_blocks = stages::ModelConfig::read(&fixture(MODEL)).unwrap().blocks.len();
    let (block, width) = widest(MODEL);
    let job = || Job::on(MODEL).lines(rows(1));
    let linear = (0..num_blocks).find(|index| {
        let config = stages::ModelConfig::read(&fixture(MODEL)).unwrap();
        !matches!(config.blocks[*index].ffn, stages::Ffn::SwiGlu { .. })
    });
    let linear = linear.expect("a block without an FFN of columns");
    let cut = |block, column| cut_at(job(), block, column, num_blocks);
    for (job, words) in [
        (cut(block, 65), "found column 65, expected a multiple of 64"),
        (cut(block, width), "columns"),
        (cut(linear, 64), "has no FFN of columns"),
        (
            cut(block, 64).set("model.dtype=int8"),
            "expected a multiple of 4096, as that many share a scale in int8",
        ),
        (cut(block, 64).set("model.dtype=int8-weight"), "int8-weight sums over columns cannot be parted"),
        (cut(block, 64).set("model.dtype=int8-weight"), "hint: cut between blocks, or set [model] dtype"),
        (
            job().set("pipeline.devices=[\"cpu:0\"]").set("pipeline.tensor_parallel=[2]"),
            "takes 2 devices for 1 device in pipeline.devices, expected as many",
        ),
        (
            job().set("pipeline.devices=[\"cpu:0\", \"cpu:0\"]").set("pipeline.tensor_parallel=[2]"),
            "cpu:0 named twice",
        ),
        (
            layout(job(), &[1, 2]).set(format!("pipeline.stages=[[0, {num_blocks}]]")),
            "1 block range in pipeline.stages for 2 widths in pipeline.tensor_parallel",
        ),
    ] {
        let done = job.run();
        assert_eq!(done.code, Some(2), "{words}: {}", done.stderr);
        assert!(done.stderr.contains(words), "{words}: {}", done.stderr);
    }
}

#[test]
fn a_trace_has_a_row_for_each_rank_with_its_time_in_collectives() {
    let homes = ["threads", "processes"];
    for (stages, home) in homes.iter().flat_map(|stages| homes.map(|home| (stages, home))) {
        let folder = tempfile::tempdir().unwrap();
        let trace = folder.path().join("trace.json");
        let job = layout(Job::on(MODEL).lines(rows(20)), &[1, 2])
            .set(format!("pipeline.ranks={home}"))
            .set(format!("pipeline.stages_run_in={stages}"));
        let done = job.arg("--trace").arg(trace.to_str().unwrap()).run().ok();
        let events = read_json(&trace);
        let events = events.as_array().unwrap();
        let rows: Vec<&str> = (events.iter())
            .filter(|event| event["name"] == "thread_name")
            .map(|event| event["args"]["name"].as_str().unwrap())
            .collect();
        assert!(rows[1].starts_with("stage 1 cpu:1+cpu:2 blocks"), "{rows:?}");
        assert_eq!(rows[2..], ["stage 1 rank 0 cpu:1", "stage 1 rank 1 cpu:2"]);
        let steps = |row: usize| -> Vec<&Value> {
            events.iter().filter(|event| event["ph"] == "X" && event["tid"] == row).collect()
        };
        let micro_batches = manifest(&done)["stages"][1]["micro_batches"].as_u64().unwrap() as usize;
        for row in 1..4 {
            // The last word of another process may come when the job is over.
            let missing = micro_batches - steps(row).len();
            let is_afar = row == 3 && (home == "processes" || *stages == "processes");
            assert!(missing <= usize::from(is_afar), "{stages}, {home}, row {row}: {missing}");
        }
        let hops = steps(0).iter().map(|step| step["args"]["hop_bytes"].as_u64().unwrap()).sum::<u64>();
        let counted = manifest(&done)["stages"][0]["hop_bytes"].as_u64().unwrap();
        // A link by TCP has more to carry than the activations.
        assert!(counted == hops || *stages == "processes" && counted > hops, "{counted} of {hops}");
        let tokens =
            |row: usize| steps(row).iter().map(|step| step["args"]["tokens"].clone()).collect::<Vec<_>>();
        assert_eq!(tokens(2), tokens(1));
        assert_eq!(tokens(3), tokens(1)[..tokens(3).len()]);
        for step in [steps(2), steps(3)].concat() {
            let collectives = step["args"]["collectives_us"].as_f64().unwrap();
            assert!(collectives > 0.0 && collectives <= step["dur"].as_f64().unwrap(), "{step}");
        }
    }
}

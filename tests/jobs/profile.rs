//! What was measured on the machine: how it comes into the store, and what a run makes of it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::disturbed::SMALL;
use crate::harness::{Job, fixture, read_json, spanwise};

/// One device for each stage, and one stage for each device: these tests are about where stages are cut.
const SETS: [&str; 5] = [
    "pipeline.devices=[\"cpu:0\", \"cpu:1\"]",
    "pipeline.micro_batch_tokens=8",
    "model.max_context_tokens=64",
    "pipeline.tensor_parallel=off",
    "pipeline.virtual_stages=off",
];

/// A store with the profile of the job's two devices, whose figures a test may change.
pub(crate) struct World {
    store: tempfile::TempDir,
    sets: Vec<&'static str>,
    pub(crate) job: Job,
}

impl World {
    fn new() -> Self {
        Self::with(&SETS)
    }

    /// A job of the small model with such settings, of which nothing is measured yet.
    pub(crate) fn with(sets: &[&'static str]) -> Self {
        Self::on(SMALL, sets)
    }

    /// The same on another model of the fixtures.
    pub(crate) fn on(model: &str, sets: &[&'static str]) -> Self {
        let row = json!({"prompt": "hello", "max_tokens": 2, "ignore_eos": true});
        Self::of(Job::on(model).completion("row", row), sets)
    }

    /// The same of some job.
    pub(crate) fn of(job: Job, sets: &[&'static str]) -> Self {
        let job = sets.iter().fold(job, |job, set| job.set(*set));
        World { store: tempfile::tempdir().unwrap(), sets: sets.to_vec(), job }
    }

    fn measured() -> Self {
        let world = Self::new();
        world.measure();
        world
    }

    /// Measures, quickly and badly.
    pub(crate) fn measure(&self) {
        let run = self.job.command(); // Writes the job file.
        let file = PathBuf::from(run.get_args().nth(1).unwrap());
        let mut command = spanwise();
        command.envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.env("SPANWISE_PROFILES", self.store.path()).arg("profile").arg(file);
        command.args(["--point-seconds", "0.001"]);
        for set in &self.sets {
            command.args(["--set", set]);
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        for words in ["alone", "busy", "GFLOP/s", "swiglu", "head and greedy draw", "stored"] {
            assert!(stdout.contains(words), "{words} is not in\n{stdout}");
        }
    }

    fn file(&self) -> PathBuf {
        let files: Vec<_> =
            std::fs::read_dir(self.store.path()).unwrap().map(|file| file.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }

    pub(crate) fn edit(&self, edit: impl FnOnce(&mut Value)) {
        let mut profile = read_json(&self.file());
        edit(&mut profile);
        std::fs::write(self.file(), profile.to_string()).unwrap();
    }

    /// Runs a job by what the store has.
    pub(crate) fn run_job(&self, job: &Job, args: &[&str]) -> Output {
        job.command().env("SPANWISE_PROFILES", self.store.path()).args(args).output().unwrap()
    }

    /// The same with a plan of faults.
    pub(crate) fn run_job_with_faults(&self, job: &Job, faults: &str) -> Output {
        job.command_with_faults(faults).env("SPANWISE_PROFILES", self.store.path()).output().unwrap()
    }

    /// What a plan or a simulation of the job says by what the store has, for short rows.
    pub(crate) fn ask(&self, what: &str, args: &[&str]) -> Output {
        self.question(what).args(["--cost", "measured"]).args(args).output().unwrap()
    }

    /// The same by what the program takes by itself.
    fn question(&self, what: &str) -> Command {
        let run = self.job.command();
        let mut command = spanwise();
        command.env("SPANWISE_PROFILES", self.store.path()).arg(what).arg(run.get_args().nth(1).unwrap());
        for set in self.sets.iter().chain(&["plan.prompt_tokens=8", "plan.output_tokens=8"]) {
            command.args(["--set", set]);
        }
        command
    }

    /// Runs the job anew; its plan by the manifest, and what it said.
    #[track_caller]
    fn run(&self, sets: &[&str]) -> (Value, String) {
        let mut command = self.job.command();
        command.arg("--fresh").env("SPANWISE_PROFILES", self.store.path());
        for set in sets {
            command.args(["--set", set]);
        }
        let Output { status, stderr, .. } = command.output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert!(status.success(), "{stderr}");
        (read_json(&self.job.out().join("manifest.json"))["plan"].clone(), stderr)
    }
}

/// Makes everything free but blocks, which take a millisecond each, or ten where they are like block `dear`; and halves of blocks
/// on several devices, which take a quarter of one, but attention by sequences a half.
pub(crate) fn even_costs(profile: &mut Value, dear: Option<&Value>) {
    let set = |points: &mut Value, seconds: f64| set_points(points, |_| seconds);
    for key in ["hop", "embedding", "head"] {
        set(&mut profile[key], 1e-9);
    }
    for entry in profile["attention"].as_array_mut().unwrap() {
        set(&mut entry["decode"], 0.0);
        set(&mut entry["prefill"], 0.0);
    }
    for entry in profile["blocks"].as_array_mut().unwrap() {
        let is_dear = Some(&entry["shape"]) == dear;
        set(&mut entry["points"], if is_dear { 0.01 } else { 0.001 });
    }
    let shared = profile.get_mut("shared").and_then(Value::as_array_mut);
    for entry in shared.into_iter().flatten() {
        set(&mut entry["head"], 1e-9);
        for half in entry["halves"].as_array_mut().unwrap() {
            let is_by_sequences = half["half"].get("attention_by_sequences").is_some();
            set(&mut half["points"], if is_by_sequences { 0.0005 } else { 0.00025 });
        }
    }
}

/// Lets points take so many seconds, by themselves.
pub(crate) fn set_points(points: &mut Value, seconds: impl Fn(&Value) -> f64) {
    for point in points.as_object_mut().unwrap().values_mut().flat_map(|p| p.as_array_mut().unwrap()) {
        let seconds = json!(seconds(point));
        for key in ["median", "lower", "upper"] {
            point["seconds"][key] = seconds.clone();
        }
    }
}

/// The shape of each block of the model, as a profile writes it.
pub(crate) fn shapes(model: &Path) -> Vec<Value> {
    let output = spanwise().arg("inspect").arg(model).args(["--format", "json"]).output().unwrap();
    let inspection: Value = serde_json::from_slice(&output.stdout).unwrap();
    let shape = |block: &Value| {
        let mut attention = json!({"kind": block["attention"]});
        let mut ffn = json!({"kind": block["ffn"]});
        if !block["kv_heads"].is_null() {
            attention["kv_heads"] = block["kv_heads"].clone();
        }
        if !block["ffn_width"].is_null() {
            ffn["width"] = block["ffn_width"].clone();
        }
        json!({"attention": attention, "ffn": ffn})
    };
    inspection["blocks"].as_array().unwrap().iter().map(shape).collect()
}

#[test]
fn a_run_is_cut_by_what_was_measured() {
    let world = World::measured();
    let shapes = shapes(&fixture(SMALL));
    let (plan, stderr) = world.run(&[]);
    assert_eq!(plan["cost"], "measured");
    assert!(stderr.contains("by measured costs"), "{stderr}");
    assert!(plan["stages"][0]["predicted_seconds"].as_f64().unwrap() > 0.0);

    world.edit(|profile| even_costs(profile, None));
    let (even, _) = world.run(&[]);
    let middle = shapes.len() / 2;
    let cut = even["stages"][0]["blocks"][1].as_u64().unwrap() as usize;
    assert!(cut == middle || cut == shapes.len() - middle, "{even}");

    // With a block ten times as dear, and whatever is like it, another cut is the best one.
    let slowest = |dear: &Value, cut: usize| {
        let cost = |shape: &Value| if shape == dear { 0.01 } else { 0.001 };
        let sum = |shapes: &[Value]| shapes.iter().map(cost).sum::<f64>();
        sum(&shapes[..cut]).max(sum(&shapes[cut..]))
    };
    let best = |dear: &Value| (1..shapes.len()).map(|cut| slowest(dear, cut)).fold(f64::INFINITY, f64::min);
    let is_moving = |dear: &&Value| slowest(dear, cut) > best(dear) + 1e-4;
    let dear = shapes.iter().find(is_moving).expect("a block whose price moves the cut");
    world.edit(|profile| even_costs(profile, Some(dear)));
    let (plan, _) = world.run(&[]);
    let moved = plan["stages"][0]["blocks"][1].as_u64().unwrap() as usize;
    assert!(moved != cut && (slowest(dear, moved) - best(dear)).abs() < 1e-9, "{plan}");

    // A cut of the user's own is kept, and compared.
    let given =
        format!("pipeline.stages=[[0, {}], [{}, {}]]", shapes.len() - 1, shapes.len() - 1, shapes.len());
    let (plan, stderr) = world.run(&[&given]);
    assert_eq!(plan["stages"][0]["blocks"], json!([0, shapes.len() - 1]));
    let planned = format!("times as long as [[0, {moved}], [{moved}, {}]], by measured costs", shapes.len());
    assert!(stderr.contains(&planned), "{planned} is not in\n{stderr}");
}

/// Without a number in the job's file: the fewest tokens of which each is hardly dearer.
#[test]
fn stages_have_as_small_micro_batches_as_the_profile_finds_no_dearer() {
    let world = World::with(&[SETS[0], SETS[2], SETS[3], SETS[4]]);
    world.measure();
    let small = "micro-batches: of at most 32 tokens";
    let most_of = |sets: &[&str]| {
        let (plan, stderr) = world.run(sets);
        let most = plan["micro_batch_tokens"].as_u64().expect("a number");
        assert_eq!(stderr.contains(small), most == 32, "{most}: {stderr}");
        most
    };
    // A block takes as long for one token as for all.
    world.edit(|profile| even_costs(profile, None));
    assert_eq!(most_of(&[]), 512);
    world.edit(|profile| {
        for entry in profile["blocks"].as_array_mut().unwrap() {
            set_points(&mut entry["points"], |point| 1e-5 * point["tokens"].as_f64().unwrap());
        }
    });
    assert_eq!(most_of(&[]), 32);
    assert_eq!(most_of(&["pipeline.micro_batch_tokens=100"]), 100);
    assert_eq!(most_of(&["pipeline.profile=off"]), 512);
    // Nobody waits for a lone stage.
    assert_eq!(most_of(&["pipeline.devices=[\"cpu:1\"]"]), 512);
}

#[test]
fn a_profile_of_another_version_is_measured_again_and_one_that_lacks_blocks_completed() {
    let world = World::measured();
    world.edit(|profile| profile["program"] = json!("0.0.1"));
    let (plan, stderr) = world.run(&[]);
    assert_eq!(plan["cost"], "measured");
    assert!(
        stderr.contains("measured by version 0.0.1") && stderr.contains("profile: measured in"),
        "{stderr}"
    );
    assert_eq!(read_json(&world.file())["program"], env!("CARGO_PKG_VERSION"));

    // A job that has nothing to do measures nothing.
    world.edit(|profile| profile["program"] = json!("0.0.1"));
    let mut command = world.job.command();
    command.env("SPANWISE_PROFILES", world.store.path());
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !stderr.contains("profile:"), "{stderr}");
    world.run(&[]);

    let blocks = |profile: &Value| profile["blocks"].as_array().unwrap().len();
    let before = blocks(&read_json(&world.file()));
    world.edit(|profile| drop(profile["blocks"].as_array_mut().unwrap().pop()));
    let (plan, stderr) = world.run(&[]);
    assert!(plan["cost"] == "measured" && stderr.contains("lacks 1 block"), "{stderr}");
    assert_eq!(blocks(&read_json(&world.file())), before);
}

/// A block that did not fit into the memory is tried again only where there is room for it.
#[test]
fn what_was_too_large_to_measure_is_not_tried_by_every_run() {
    let world = World::measured();
    let leave_out = |needed_bytes: u64| {
        world.edit(|profile| {
            let entry = profile["blocks"].as_array_mut().unwrap().pop().unwrap();
            let part = json!({"block": entry["shape"]});
            profile["too_large"] = json!([{"part": part, "needed_bytes": needed_bytes}]);
        });
    };
    leave_out(1 << 50);
    for _ in 0..2 {
        let (plan, stderr) = world.run(&[]);
        assert!(plan["cost"] == "estimate" && stderr.contains("no room to measure it"), "{stderr}");
        assert!(!stderr.contains("measured again"), "{stderr}");
    }
    world.edit(|profile| profile["too_large"][0]["needed_bytes"] = json!(1));
    let (plan, stderr) = world.run(&[]);
    assert!(plan["cost"] == "measured" && stderr.contains("lacks 1 block"), "{stderr}");
    assert_eq!(read_json(&world.file())["too_large"], Value::Null);
}

/// Two stages of each device: it has the time for both.
#[test]
fn devices_that_are_named_twice_are_balanced_and_not_their_stages() {
    let world = World::measured();
    let shapes = shapes(&fixture(SMALL));
    let num_blocks = shapes.len();
    let twice = "pipeline.devices=[\"cpu:0\", \"cpu:1\", \"cpu:0\", \"cpu:1\"]";
    for dear in 0..num_blocks {
        world.edit(|profile| even_costs(profile, Some(&shapes[dear])));
        let (plan, _) = world.run(&[twice]);
        let cost = |shape: &Value| if *shape == shapes[dear] { 0.01 } else { 0.001 };
        let of_stage = |start: usize, end: usize| shapes[start..end].iter().map(cost).sum::<f64>();
        let slowest = |cuts: [usize; 3]| {
            let [a, b, c] = cuts;
            (of_stage(0, a) + of_stage(b, c)).max(of_stage(a, b) + of_stage(c, num_blocks))
        };
        let places = || 1..num_blocks;
        let best = places()
            .flat_map(|a| places().flat_map(move |b| places().map(move |c| [a, b, c])))
            .filter(|[a, b, c]| a < b && b < c)
            .map(slowest)
            .fold(f64::INFINITY, f64::min);
        let cut = |stage: usize| plan["stages"][stage]["blocks"][1].as_u64().unwrap() as usize;
        let found = slowest([cut(0), cut(1), cut(2)]);
        assert!(found <= best + 1e-6, "{dear}: {found}, {best} is possible: {plan}");
    }
}

#[test]
fn without_a_profile_that_holds_a_run_goes_by_an_estimate() {
    let absent = World::new();
    let (plan, stderr) = absent.run(&[]);
    assert!(plan["cost"] == "estimate" && stderr.contains("by an estimate"), "{stderr}");
    assert!(stderr.contains("(spanwise profile ") && stderr.contains("--set 'pipeline.devices="), "{stderr}");
    assert_eq!(std::fs::read_dir(absent.store.path()).unwrap().count(), 0, "nobody asked for a profile");

    let world = World::measured();
    let (plan, _) = world.run(&["pipeline.profile=off"]);
    assert_eq!(plan["cost"], "estimate");
    // The profile of another machine in the place of this one's.
    world.edit(|profile| profile["key"]["device"]["processor"] = json!("Abacus"));
    let (plan, stderr) = world.run(&[]);
    assert!(plan["cost"] == "estimate" && stderr.contains("a profile of cpu"), "{stderr}");
    std::fs::write(world.file(), "{").unwrap();
    let (plan, stderr) = world.run(&[]);
    assert!(
        plan["cost"] == "estimate" && stderr.contains("damaged profile") && stderr.contains("not JSON"),
        "{stderr}"
    );
    assert_eq!(stderr.matches("warning").count(), 1, "{stderr}");
}

#[test]
fn plans_and_simulations_by_measured_costs_are_no_estimates_and_need_them() {
    let measured = World::measured();
    for what in ["plan", "simulate"] {
        let output = measured.ask(what, &["--format", "json"]);
        let report: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
        assert_eq!(report["estimate"], false, "{what}");
        assert!(report["tokens_per_second"].as_f64().unwrap() > 0.0, "{what}");
    }

    let absent = World::new();
    for (world, end) in
        [(&measured, "; --cost measured takes what spanwise profile has measured"), (&absent, " would")]
    {
        let output = world.question("plan").output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        let last = stdout.lines().last().unwrap();
        assert!(last.starts_with("estimate ") && last.ends_with(end), "{last}");
    }

    let refusals = [
        (vec![], "no profile of cpu"),
        (vec![], "hint: spanwise profile"),
        (vec!["--devices", "2xh200"], "no profile of 2xh200"),
        (vec!["--dtype", "f32"], "expected the job's own"),
    ];
    for (args, words) in refusals {
        for what in ["plan", "simulate"] {
            let output = absent.ask(what, &args);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.code() == Some(2) && stderr.contains(words), "{what} {args:?}: {stderr}");
        }
    }
}

#[test]
fn what_cannot_be_profiled_is_refused_in_words() {
    let model = fixture(SMALL);
    let model = model.to_str().unwrap();
    for (args, words) in [
        (vec!["no/such/model"], "no/such/model/config.json"),
        (vec![model, "--device", "gpu:0"], "unknown device kind"),
        (vec![model, "--threads", "0"], "expected a whole number above 0"),
        (vec![model, "--micro-batch-tokens", "0"], "expected a whole number above 0"),
        (vec![model, "--point-seconds", "nan"], "expected a number of seconds above 0"),
        (vec![model, "--device", "cpu:900"], "cores"),
        (vec![model, "--set", "pipeline.simd=avx2"], "expected a job file"),
        (vec!["configs/smollm2.toml", "--threads", "1"], "expected --set"),
        (vec![model, "--max-context-tokens", "99999999"], "max_position_embeddings"),
    ] {
        let output = spanwise().arg("profile").args(&args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && stderr.contains(words), "{args:?}: {stderr}");
    }
}

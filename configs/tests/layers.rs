//! What a job file comes to: defaults, layers, paths, and the job files we ship.

use std::path::{Path, PathBuf};

use configs::{
    AutoCount, Device, Dtype, Error, JobFile, KvCacheDtype, Loaded, Order, OverrideSource, Place, Purpose,
    Simd, Stages,
};

const GOOD: &str = "[model]\npath = \"m\"\n[job]\ninput = \"in.jsonl\"\noutput = \"out\"\n";

/// A working folder with a job file in `jobs/`.
struct World {
    folder: PathBuf,
    sets: Vec<String>,
    env: Vec<(String, String)>,
}

impl World {
    fn new(name: &str, text: &str) -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("layers").join(name);
        std::fs::create_dir_all(folder.join("jobs")).unwrap();
        std::fs::write(folder.join("jobs/job.toml"), text).unwrap();
        Self { folder: folder.canonicalize().unwrap(), sets: Vec::new(), env: Vec::new() }
    }

    fn set(mut self, set: &str) -> Self {
        self.sets.push(set.to_owned());
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    fn try_load(&self) -> Result<Loaded, Error> {
        configs::load(Path::new("jobs/job.toml"), &self.sets, self.env.iter().cloned(), &self.folder)
    }

    #[track_caller]
    fn load(&self) -> Loaded {
        self.try_load().unwrap_or_else(|error| panic!("{error}"))
    }

    #[track_caller]
    fn overrides(&self) -> Vec<String> {
        let shown = self.load().overrides;
        shown.iter().map(|given| format!("{} {}={}", given.source, given.key, given.value)).collect()
    }
}

#[test]
fn what_a_file_leaves_out_has_its_default() {
    let job = World::new("defaults", GOOD).load().job;
    assert_eq!(job.model.dtype, Dtype::Bf16);
    assert_eq!(job.model.max_context_tokens, None);
    assert!(!job.model.random_weights);
    assert_eq!(job.pipeline.devices, [Device::cpu(0)]);
    assert_eq!(job.pipeline.threads, None);
    assert_eq!(job.pipeline.simd, Simd::Auto);
    assert_eq!(job.pipeline.stages, Stages::Auto);
    assert_eq!(job.pipeline.micro_batch_tokens, AutoCount::Auto);
    assert_eq!(job.pipeline.max_sequences, AutoCount::Auto);
    assert_eq!(job.pipeline.kv_cache_tokens, AutoCount::Auto);
    assert_eq!(job.pipeline.kv_cache_dtype, KvCacheDtype::Auto);
    assert_eq!(job.job.order, Order::Input);
    assert_eq!((job.job.seed, job.job.max_error_rate), (0, 1.0));
    assert_eq!(job.prompt, None);
    assert_eq!(job.sampling, configs::Sampling::default());
}

const FULL: &str = r#"
[model]
path = "m"
dtype = "f32"
max_context_tokens = 4096
random_weights = true

[pipeline]
devices = ["cpu:0", "cpu:1", "cpu:0"]
threads = 3
simd = "avx2"
stages = [[0, 4], [4, 9], [9, 10]]
micro_batch_tokens = 16
max_sequences = 7
kv_cache_tokens = 8192
kv_cache_dtype = "bf16"

[job]
input = "in.jsonl"
output = "out"
order = "completion"
seed = 9223372036854775807
max_error_rate = 0.25

[prompt]
system = ""
user = "Summarise: {{ text }}"

[sampling]
temperature = 1
top_p = 0.9
top_k = 0
min_p = 0.05
repetition_penalty = 1.1
frequency_penalty = -2
presence_penalty = 0.5
seed = 3
max_tokens = 64
min_tokens = 64
stop = "END"
stop_token_ids = [2, 4294967295]
ignore_eos = true
"#;

#[test]
fn every_key_arrives_where_it_belongs() {
    let job = World::new("full", FULL).load().job;
    assert_eq!(job.model.dtype, Dtype::F32);
    assert_eq!(job.model.max_context_tokens, Some(4096));
    assert!(job.model.random_weights);
    assert_eq!(job.pipeline.devices, [Device::cpu(0), Device::cpu(1), Device::cpu(0)]);
    assert_eq!(job.pipeline.threads, Some(3));
    assert_eq!(job.pipeline.simd, Simd::Avx2);
    assert_eq!(job.pipeline.stages, blocks([0..4, 4..9, 9..10]));
    assert_eq!(job.pipeline.micro_batch_tokens, AutoCount::Given(16));
    assert_eq!(job.pipeline.max_sequences, AutoCount::Given(7));
    assert_eq!(job.pipeline.kv_cache_tokens, AutoCount::Given(8192));
    assert_eq!(job.pipeline.kv_cache_dtype, KvCacheDtype::Bf16);
    assert_eq!(job.job.order, Order::Completion);
    assert_eq!((job.job.seed, job.job.max_error_rate), (i64::MAX as u64, 0.25));
    let prompt = job.prompt.expect("a [prompt]");
    assert_eq!((prompt.system.as_deref(), prompt.user.as_str()), (Some(""), "Summarise: {{ text }}"));
    let sampling = job.sampling;
    assert_eq!((sampling.temperature, sampling.top_p), (Some(1.0), Some(0.9)));
    assert_eq!((sampling.top_k, sampling.min_p, sampling.seed), (Some(0), Some(0.05), Some(3)));
    let penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty);
    assert_eq!(penalties, (Some(1.1), Some(-2.0), Some(0.5)));
    assert_eq!((sampling.max_tokens, sampling.min_tokens), (Some(64), Some(64)));
    assert_eq!(sampling.stop, Some(vec!["END".to_owned()]));
    assert_eq!(sampling.stop_token_ids, Some(vec![2, u32::MAX]));
    assert_eq!(sampling.ignore_eos, Some(true));
}

#[test]
fn the_kv_cache_follows_the_weights_unless_told_otherwise() {
    assert_eq!(KvCacheDtype::Auto.beside(Dtype::F32), KvCacheDtype::F32);
    for narrower in [Dtype::Bf16, Dtype::Int8, Dtype::Int8Weight, Dtype::Int4Weight] {
        assert_eq!(KvCacheDtype::Auto.beside(narrower), KvCacheDtype::Bf16);
    }
    assert_eq!(KvCacheDtype::F32.beside(Dtype::Int8), KvCacheDtype::F32);
    assert_eq!(KvCacheDtype::F32.beside(Dtype::Bf16), KvCacheDtype::F32);
    assert_eq!(KvCacheDtype::Bf16.beside(Dtype::F32), KvCacheDtype::Bf16);
    assert_eq!(KvCacheDtype::Fp8.beside(Dtype::F32), KvCacheDtype::Fp8);
}

#[test]
fn the_environment_counts_more_than_the_file_and_a_set_more_than_both() {
    let text = format!("{GOOD}[pipeline]\nthreads = 1\nmax_sequences = 1\nmicro_batch_tokens = 1\n");
    let world = World::new("precedence", &text)
        .set("pipeline.micro_batch_tokens=3")
        .set("sampling.top_k=1")
        .set("sampling.top_k=5")
        .env("SPANWISE__PIPELINE__MICRO_BATCH_TOKENS", "2")
        .env("SPANWISE__PIPELINE__MAX_SEQUENCES", "2")
        .env("SPANWISE_LOG", "debug")
        .env("PATH", "/bin");
    let job = world.load().job;
    assert_eq!(job.pipeline.threads, Some(1));
    assert_eq!(job.pipeline.max_sequences, AutoCount::Given(2));
    assert_eq!(job.pipeline.micro_batch_tokens, AutoCount::Given(3));
    assert_eq!(job.sampling.top_k, Some(5));
    // Only those that count are told, so that the manifest explains the job and nothing else.
    assert_eq!(
        world.overrides(),
        [
            "environment pipeline.max_sequences=2",
            "--set pipeline.micro_batch_tokens=3",
            "--set sampling.top_k=5"
        ]
    );
    assert_eq!(world.load().overrides[0].source, OverrideSource::Environment);
}

#[test]
fn the_order_of_the_environment_does_not_matter() {
    let (a, b) = (("SPANWISE__JOB__SEED", "1"), ("SPANWISE__MODEL__DTYPE", "f32"));
    let forth = World::new("env_forth", GOOD).env(a.0, a.1).env(b.0, b.1);
    let back = World::new("env_forth", GOOD).env(b.0, b.1).env(a.0, a.1);
    assert_eq!(forth.load(), back.load());
}

#[test]
fn a_value_that_is_no_toml_is_a_text() {
    let world = World::new("texts", GOOD)
        .set("model.dtype=f32")
        .set("pipeline.devices=[\"cpu:0\", \"cpu:1\"]")
        .set("pipeline.stages = [[0, 14], [14, 30]]")
        .set("prompt.user=Summarise: {{ text }} # all of it")
        .set("prompt.system=a = b")
        .set("sampling.stop='7'")
        .set("sampling.ignore_eos=true")
        .set("job.output=2026-01-31")
        .env("SPANWISE__PIPELINE__THREADS", " 5 ")
        .env("SPANWISE__PIPELINE__KV_CACHE_TOKENS", "auto");
    let job = world.load().job;
    assert_eq!(job.model.dtype, Dtype::F32);
    assert_eq!(job.pipeline.devices, [Device::cpu(0), Device::cpu(1)]);
    assert_eq!(job.pipeline.stages, blocks([0..14, 14..30]));
    let prompt = job.prompt.expect("a [prompt]");
    assert_eq!(prompt.user, "Summarise: {{ text }} # all of it");
    assert_eq!(prompt.system.as_deref(), Some("a = b"));
    assert_eq!(job.sampling.stop, Some(vec!["7".to_owned()]));
    assert_eq!(job.sampling.ignore_eos, Some(true));
    assert_eq!(job.job.output, world.folder.join("2026-01-31"));
    assert_eq!(job.pipeline.threads, Some(5));
}

#[test]
fn an_override_may_bring_what_the_file_lacks() {
    let world =
        World::new("brought", "").set("model.path=m").set("job.input=i").env("SPANWISE__JOB__OUTPUT", "o");
    assert_eq!(world.load().job.job.output, world.folder.join("o"));
}

#[test]
fn paths_of_the_file_start_at_its_folder_and_those_of_overrides_at_the_working_folder() {
    let text = "[model]\npath = \"../models/./m/../n\"\n[job]\ninput = \"in.jsonl\"\noutput = \"/tmp/out\"\n";
    let world = World::new("paths", text);
    let job = world.load().job;
    assert_eq!(job.model.path, world.folder.join("models/m/../n"));
    assert_eq!(job.job.input, world.folder.join("jobs/in.jsonl"));
    assert_eq!(job.job.output, Path::new("/tmp/out"));

    let world = world.set("job.input=./rows/in.jsonl").env("SPANWISE__JOB__OUTPUT", "../elsewhere");
    let job = world.load().job;
    assert_eq!(job.model.path, world.folder.join("models/m/../n"));
    assert_eq!(job.job.input, world.folder.join("rows/in.jsonl"));
    assert_eq!(job.job.output, world.folder.parent().unwrap().join("elsewhere"));
}

#[cfg(unix)]
#[test]
fn two_dots_lead_out_of_the_real_folder_and_not_out_of_a_link() {
    let world = World::new("links", "[model]\npath = \"../m\"\n[job]\ninput = \"i\"\noutput = \"o\"\n");
    let link = world.folder.join("deep/link");
    std::fs::create_dir_all(world.folder.join("deep")).unwrap();
    let _ = std::fs::remove_file(&link); // Of an earlier run.
    std::os::unix::fs::symlink(world.folder.join("jobs"), &link).unwrap();
    let loaded =
        configs::load(Path::new("deep/link/job.toml"), &[], std::iter::empty(), &world.folder).unwrap();
    assert_eq!(loaded.job.model.path, world.folder.join("m"));
}

#[test]
fn an_effective_job_file_loads_to_the_same_job() {
    for (name, text) in [("again_good", GOOD), ("again_full", FULL)] {
        let job = World::new(name, text).load().job;
        assert_eq!(World::new(name, &job.to_toml()).load().job, job);
    }
}

#[test]
fn the_printed_defaults_are_a_job_file_once_the_required_keys_are_there() {
    let text = JobFile::default_toml();
    let expected = r#"[model]
# path =  # required
dtype = "bf16"
# max_context_tokens =  # not set
random_weights = false

[pipeline]
devices = ["cpu:0"]
replicas = 1
# threads =  # not set
simd = "auto"
stages = "auto"
tensor_parallel = "auto"
split_blocks = "auto"
stages_run_in = "threads"
ranks = "threads"
column_cuts = "auto"
virtual_stages = "auto"
profile = "auto"
micro_batch_tokens = "auto"
max_sequences = "auto"
kv_cache_tokens = "auto"
kv_cache_dtype = "auto"
deterministic = true
cuda_graphs = true
token_feedback = true
step_timeout_seconds = 600

[job]
# input =  # required
# output =  # required
order = "input"
seed = 0
max_error_rate = 1.0
checkpoint_tokens = 256

# [prompt]
# system =  # not set
# user =  # required

[sampling]
# temperature =  # not set
# top_p =  # not set
# top_k =  # not set
# min_p =  # not set
# repetition_penalty =  # not set
# frequency_penalty =  # not set
# presence_penalty =  # not set
# seed =  # not set
# max_tokens =  # not set
# min_tokens =  # not set
# stop =  # not set
# stop_token_ids =  # not set
# ignore_eos =  # not set

# [grade]
# kind =  # required
# runs = 1

# [plan]
# devices =  # not set
# prompt_tokens =  # not set
# output_tokens =  # not set
# tokens_in_flight =  # not set
# rows =  # not set
# price_per_hour =  # not set
"#;
    assert_eq!(text, expected);
    let filled = ["path", "input", "output"].iter().fold(text, |text, key| {
        text.replace(&format!("# {key} =  # required"), &format!("{key} = \"{key}\""))
    });
    let job = World::new("printed", &filled).load().job;
    let plain = World::new("printed_plain", GOOD).load().job;
    assert_eq!((job.pipeline, job.sampling), (plain.pipeline, plain.sampling));
}

/// The reference page has one row per key, `| `key` | type | default | … |`, under a heading per section.
#[test]
fn the_reference_page_has_every_key_with_its_default() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/job_file.md");
    let page = std::fs::read_to_string(page).expect("docs/job_file.md");
    let mut section = "";
    for line in JobFile::default_toml().lines() {
        let line = line.trim_start_matches("# ");
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
            continue;
        }
        let Some((key, default)) = line.split_once(" = ") else { continue };
        let default = default.trim_start_matches(" # ");
        let table = page.split(&format!("\n## [{section}]\n")).nth(1).expect(section);
        let table = table.split("\n## ").next().expect(section);
        let row = table.lines().find(|row| row.starts_with(&format!("| `{key}` |")));
        let cells: Vec<_> =
            row.unwrap_or_else(|| panic!("no row for {section}.{key}")).split(" | ").collect();
        let expected = if ["required", "not set"].contains(&default) {
            default.to_owned()
        } else {
            format!("`{default}`")
        };
        assert_eq!(cells[2].trim(), expected, "{section}.{key}");
    }
}

#[test]
fn the_job_files_we_ship_load() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let jobs: Vec<_> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .filter(|path| path.file_name().is_some_and(|name| name != "Cargo.toml" && name != "devices.toml"))
        .collect();
    assert!(!jobs.is_empty());
    for path in jobs {
        let load = |purpose| {
            configs::load_for(purpose, &path, &[], std::iter::empty(), folder)
                .unwrap_or_else(|error| panic!("{error}"))
        };
        // Where the model is ours to ship by its shape alone, there is nothing to run.
        if load(Purpose::Plan).job.plan.is_some() {
            continue;
        }
        let loaded = load(Purpose::Run);
        assert!(
            loaded.job.job.input.is_file(),
            "{} reads {}",
            path.display(),
            loaded.job.job.input.display()
        );
    }
}

/// Stages of whole blocks.
fn blocks<const N: usize>(ranges: [std::ops::Range<usize>; N]) -> Stages {
    Stages::Blocks(ranges.map(|range| Place::from(range.start)..Place::from(range.end)).to_vec())
}

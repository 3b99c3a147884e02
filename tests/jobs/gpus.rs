//! What a job is told of the machine's GPUs, word for word, on machines that an emulator plays; and their memory.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::cuda::emulator;
use crate::harness::{Done, Job, read_json, spanwise};
use crate::profile::{even_costs, shapes};

/// A job of one row on the first GPU.
fn job() -> Job {
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0});
    Job::on("hetero-0-bf16").completion("row", body).set("pipeline.devices=[\"cuda:0\"]")
}

fn both_gpus(job: Job) -> Job {
    job.set("pipeline.devices=[\"cuda:0\",\"cuda:1\"]")
}

/// Runs it on a machine that is like this.
fn on(job: &Job, machine: &[(&str, &str)]) -> Output {
    job.command().envs(machine.iter().copied()).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn assert_refused(output: &Output, error: &str) {
    assert_eq!(stderr(output), error);
    assert_eq!(output.status.code(), Some(2));
}

/// A machine whose Python and CUDA are nowhere but in CUDA's own folders.
fn without_python<'a>(command: &'a mut Command, nowhere: &Path) -> &'a mut Command {
    ["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH"].iter().for_each(|name| {
        command.env_remove(name);
    });
    command.env("PATH", nowhere).env("HOME", nowhere)
}

/// Folders that are always looked in, as far as they are there.
fn tried(first: &Path) -> String {
    let usual = ["/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/wsl/lib"].map(Path::new);
    let there = usual.into_iter().filter(|folder| folder.is_dir());
    let folders: Vec<String> =
        std::iter::once(first).chain(there).map(|folder| folder.display().to_string()).collect();
    folders.join(", ")
}

#[test]
fn without_a_driver_a_job_says_where_it_looked() {
    let nowhere = tempfile::tempdir().unwrap();
    let job = job();
    let mut command = job.command();
    command.env("SPANWISE_CUDA_LIBRARIES", nowhere.path());
    let output = without_python(&mut command, nowhere.path()).output().unwrap();
    let tried = tried(nowhere.path());
    let error = format!(
        "error: no CUDA driver: library missing: libcuda, which comes with NVIDIA's driver: tried libcuda.so, libcuda.so.1 by the system's own search and in {tried}\n"
    );
    assert_refused(&output, &error);
}

#[test]
fn without_a_compiler_a_job_says_where_it_looked() {
    let libraries = tempfile::tempdir().unwrap();
    std::fs::copy(emulator().join("libcuda.so"), libraries.path().join("libcuda.so")).unwrap();
    let job = job();
    let mut command = job.command();
    command.env("SPANWISE_CUDA_LIBRARIES", libraries.path());
    let output = without_python(&mut command, libraries.path()).output().unwrap();
    let tried = tried(libraries.path());
    let error = format!(
        "error: load stage 0: library missing: libnvrtc, which compiles kernels: tried libnvrtc.so, libnvrtc.so.13, libnvrtc.so.12 by the system's own search and in {tried}\n"
    );
    assert_refused(&output, &error);
}

#[test]
fn an_old_driver_a_gpu_that_is_not_there_and_none_at_all_are_named() {
    let job = job().emulated();
    for (driver, name) in [("11040", "11.4"), ("12070", "12.7")] {
        let error = format!(
            "error: driver too old: it is for CUDA {name}, expected 12.8 at least\nhint: install a driver of release 570 or later\n"
        );
        assert_refused(&on(&job, &[("EMULATED_DRIVER", driver)]), &error);
    }
    let none = on(&job, &[("EMULATED_GPUS", "0")]);
    assert_refused(&none, "error: start the driver: CUDA_ERROR_NO_DEVICE\n");
    let second = on(&both_gpus(job), &[]);
    assert_refused(&second, "error: there is no cuda:1, the driver counts 1 devices\n");
}

#[test]
fn a_gpu_without_bf16_tensor_cores_is_refused() {
    let output = on(&job().emulated(), &[("EMULATED_CAPABILITIES", "75")]);
    let error = "error: load stage 0: cuda:0 is a emulator of compute capability 7.5, expected 8.0 at least: bf16 tensor cores\n";
    assert_refused(&output, error);
}

#[test]
fn gpus_of_unlike_architectures_are_refused_by_name() {
    let machine = [("EMULATED_GPUS", "2"), ("EMULATED_CAPABILITIES", "80,90")];
    let error = "error: [pipeline] devices: found cuda:0 (emulator, sm_80) and cuda:1 (emulator, sm_90a), expected GPUs \
                 of one architecture: their tensor cores round unlike\n\
                 hint: [pipeline] deterministic = false lets answers depend on which has which blocks\n";
    assert_refused(&on(&both_gpus(job().emulated()), &machine), error);
    let unlike =
        both_gpus(job().emulated()).set("pipeline.deterministic=false").set("pipeline.stages=[[0,5],[5,11]]");
    let output = on(&unlike, &machine);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let manifest = crate::harness::read_json(&unlike.out().join("manifest.json"));
    let profile = &manifest["numeric_profile"];
    assert_eq!(profile["simd"], "sm_80, sm_90a");
    assert_eq!(profile["deterministic"], false);
}

#[test]
fn a_model_that_does_not_fit_its_gpu_is_refused_with_numbers() {
    let output = on(&job().emulated(), &[("EMULATED_BYTES", "20000000")]);
    let text = stderr(&output);
    assert!(text.starts_with("error: blocks [0, 11) on cuda:0 take "), "{text}");
    assert!(
        text.contains(" of weights and ") && text.contains(" to work in, and 18.8 MB of its memory are free"),
        "{text}"
    );
    assert_eq!(output.status.code(), Some(2));
}

/// Each GPU holds its own stage: what is too much for one is not for two.
#[test]
fn a_gpu_holds_its_own_span_alone() {
    let small = [("EMULATED_GPUS", "2"), ("EMULATED_BYTES", "20000000")];
    let job = job().emulated().set("model.max_context_tokens=512").set("pipeline.micro_batch_tokens=64");
    let one = stderr(&on(&job, &small));
    assert!(one.contains("blocks [0, 11) on cuda:0"), "{one}");
    let two = on(&both_gpus(job).set("pipeline.stages=[[0,5],[5,11]]"), &small);
    assert_eq!(two.status.code(), Some(0), "{}", stderr(&two));
}

/// Where nobody says which blocks are where, a GPU with less memory gets fewer of them, down to where nothing helps.
#[test]
fn a_gpu_with_less_memory_has_fewer_blocks() {
    let job = both_gpus(job().emulated_gpus(2))
        .set("model.max_context_tokens=64")
        .set("pipeline.micro_batch_tokens=16");
    let blocks_there = |bytes: &str| {
        let output = on(&job, &[("EMULATED_GPUS", "2"), ("EMULATED_BYTES", bytes)]);
        if output.status.code() != Some(0) {
            return Err(stderr(&output));
        }
        let plan = &crate::harness::read_json(&job.out().join("manifest.json"))["plan"];
        std::fs::remove_dir_all(job.out()).unwrap();
        let stages = plan["stages"].as_array().unwrap();
        let there = stages.iter().filter(|stage| stage["device"] == "cuda:0");
        let blocks =
            |stage: &Value| stage["blocks"][1].as_u64().unwrap() - stage["blocks"][0].as_u64().unwrap();
        Ok(there.map(blocks).sum::<u64>())
    };
    let mut blocks = Vec::new();
    for mb in [2000, 16, 14, 12, 10, 8, 6, 4, 2] {
        blocks.push(blocks_there(&format!("{mb}000000,2000000000")).unwrap());
    }
    assert!(blocks.is_sorted_by(|more, less| less <= more), "{blocks:?} blocks beside less and less memory");
    assert!(blocks.iter().any(|&some| 0 < some && some < blocks[0]), "{blocks:?}");
    assert_eq!(blocks.last(), Some(&0), "{blocks:?}");
    let refused = blocks_there("2000000,2000000").unwrap_err();
    assert!(refused.contains(" on cuda:") && refused.contains(" of its memory are free"), "{refused}");
}

/// All that a step works in is made before the first, also what is edited of logits and what ranks tell each other: what another
/// program takes then is not missed. Where algorithms are timed one is taken that was not.
#[test]
fn another_program_may_take_what_is_left_of_a_gpu() {
    let prompt: Vec<usize> = (0..150).map(|k| 5 + (k * 7) % 200).collect();
    let mut job = Job::on("hetero-0-bf16").emulated_gpus(2);
    for (i, temperature, more) in [
        (0, 0.0, json!({"logprobs": 2, "echo": true})),
        (1, 1.0, json!({"logprobs": 20, "echo": true})),
        (2, 0.7, json!({"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {"7": 2.0}})),
        (3, 0.9, json!({"guided_regex": "[A-Z]{3}-[0-9]{4}"})),
    ] {
        let mut body =
            json!({"prompt": prompt[i * 40..], "max_tokens": 3, "temperature": temperature, "seed": i});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        job = job.completion(&format!("row-{i}"), body);
    }
    let alone = job.anew().set("pipeline.devices=[\"cuda:0\"]");
    let shared = both_gpus(job.anew()).set("pipeline.tensor_parallel=[2]");
    let timed = alone.anew().set("pipeline.deterministic=false");
    // An algorithm that was not timed may sum in another order.
    for (job, is_same) in [(alone, true), (timed, false), (shared, true)] {
        let expected = is_same.then(|| job.anew().run().ok().sorted_lines());
        let output = on(&job, &[("EMULATED_LEFT", "0@1")]);
        let told = stderr(&output);
        assert!(!told.contains("halves") && !told.contains("started again"), "{told}");
        assert_eq!(output.status.code(), Some(0), "{told}");
        let text = std::fs::read_to_string(job.out().join("output.jsonl")).unwrap();
        let mut lines: Vec<String> = text.lines().map(crate::harness::without_created).collect();
        lines.sort();
        assert_eq!(lines.len(), 4, "{told}");
        assert!(expected.is_none_or(|expected| lines == expected), "other answers with less memory");
    }
}

/// One stage, two on one GPU, two on two of which activations go from device to device, and these with no memory left.
#[test]
fn answers_do_not_depend_on_which_gpus_have_which_blocks() {
    let mut job = Job::on("hetero-0-bf16").set("pipeline.micro_batch_tokens=40").emulated();
    for i in 0..3 {
        let prompt: Vec<usize> = (0..30 + 20 * i).map(|k| 5 + (k * 7 + i * 31) % 200).collect();
        let temperature = [0.0, 0.8, 1.0][i];
        let body = json!({"prompt": prompt, "max_tokens": 4, "temperature": temperature, "top_p": 0.9, "seed": i, "ignore_eos": true});
        job = job.completion(&format!("row-{i}"), body);
    }
    let lines = |devices: &str, machine: &[(&str, &str)]| {
        let mut job = job.anew().set(format!("pipeline.devices=[{devices}]"));
        if devices.contains(',') {
            job = job.set("pipeline.stages=[[0,5],[5,11]]");
        }
        let output = on(&job, machine);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let text = std::fs::read_to_string(job.out().join("output.jsonl")).unwrap();
        let mut lines: Vec<String> = text.lines().map(crate::harness::without_created).collect();
        lines.sort();
        lines
    };
    let one = lines("\"cuda:0\"", &[]);
    assert_eq!(one.len(), 3);
    assert_eq!(one, lines("\"cuda:0\",\"cuda:0\"", &[]));
    let both = "\"cuda:0\",\"cuda:1\"";
    assert_eq!(one, lines(both, &[("EMULATED_GPUS", "2")]));
    assert_eq!(one, lines(both, &[("EMULATED_GPUS", "2"), ("EMULATED_LEFT", "0@1")]));
}

fn devices(args: &[&str], machine: &[(&str, &str)]) -> Done {
    let mut command = spanwise();
    command.arg("devices").args(args).env("SPANWISE_CUDA_LIBRARIES", emulator());
    let output = command.envs(machine.iter().copied()).output().unwrap();
    Done {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
        folder: tempfile::tempdir().unwrap(),
    }
}

#[test]
fn devices_lists_gpus_as_text_and_as_json() {
    let machine = [("EMULATED_GPUS", "2"), ("EMULATED_CAPABILITIES", "90,80")];
    let text = devices(&[], &machine).ok().stdout;
    let line = |index, capability| {
        format!("cuda:{index}   emulator, compute capability {capability}, 4 multiprocessors, 2.1 GB\n")
    };
    assert!(text.starts_with("cpu:0    ") && text.contains(&(line(0, "9.0") + &line(1, "8.0"))), "{text}");
    let json: Value = serde_json::from_str(&devices(&["--format", "json"], &machine).ok().stdout).unwrap();
    assert_eq!(
        json["cuda"][1],
        json!({
            "device": "cuda:1", "name": "emulator", "compute_capability": "8.0", "architecture": "sm_80",
            "multiprocessors": 4, "total_bytes": 2_u64 << 30
        })
    );
    assert_eq!((&json["cpu"]["device"], &json["no_cuda"]), (&json!("cpu:0"), &Value::Null));
    let none = devices(&["--format", "json"], &[("EMULATED_GPUS", "0")]).ok().stdout;
    let json: Value = serde_json::from_str(&none).unwrap();
    assert_eq!(
        (&json["cuda"], &json["no_cuda"]),
        (&json!([]), &json!("start the driver: CUDA_ERROR_NO_DEVICE"))
    );
}

/// A job that finds a driver too old for its compiler says so, as `spanwise devices` does.
#[test]
fn a_compiler_that_is_newer_than_the_driver_is_named_with_a_cure() {
    let machine = [("EMULATED_DRIVER", "12090"), ("EMULATED_COMPILER", "13010")];
    let error = "driver too old: it is for CUDA 12.9, and libnvrtc is of CUDA 13.1\n\
                 hint: install nvidia-cuda-nvrtc of the driver's version";
    assert_refused(&on(&job().emulated(), &machine), &format!("error: load stage 0: {error}\n"));
    let text = devices(&[], &machine).ok().stdout;
    assert!(text.contains(&format!("cuda     {error}\n")), "{text}");
}

/// A job whose GPUs share a stage says so, and so does `spanwise devices`; one that needs no NCCL does not ask.
#[test]
fn an_nccl_that_is_too_old_is_named_with_a_cure() {
    let alone = job().emulated();
    let shared =
        both_gpus(job().emulated()).set("pipeline.tensor_parallel=[2]").set("pipeline.stages=[[0,11]]");
    let library = emulator().join("libnccl.so.2");
    for (version, name) in [("2708", "2.7.8"), ("21903", "2.19.3"), ("22002", "2.20.2")] {
        let machine = [("EMULATED_GPUS", "2"), ("EMULATED_NCCL", version)];
        let error = format!(
            "NCCL too old: {} is of version {name}, expected 2.20.3 at least\n\
             hint: install a later release of nvidia-nccl-cu13",
            library.display()
        );
        assert_refused(&on(&shared, &machine), &format!("error: load stage 0: {error}\n"));
        let text = devices(&[], &machine).ok().stdout;
        assert!(text.contains(&format!("cuda     {error}\n")), "{text}");
        let output = on(&alone, &machine);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }
}

/// Each library is listed by where it was found, or as a job that lacks it says.
#[test]
fn devices_lists_libraries_that_are_there_and_those_that_are_missing() {
    let there = emulator().join("libnvrtc.so");
    let text = devices(&[], &[]).ok().stdout;
    assert!(text.contains(&format!("cuda     libnvrtc: {}\n", there.display())), "{text}");
    let nowhere = tempfile::tempdir().unwrap();
    let mut command = spanwise();
    command.args(["devices", "--format", "json"]).env("SPANWISE_CUDA_LIBRARIES", nowhere.path());
    let output = without_python(&mut command, nowhere.path()).output().unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let tried = tried(nowhere.path());
    let library = |name, purpose, names| {
        let error = format!(
            "library missing: {name}, {purpose}: tried {names} by the system's own search and in {tried}"
        );
        json!({"name": name, "path": null, "error": error})
    };
    let expected = [
        library("libnvrtc", "which compiles kernels", "libnvrtc.so, libnvrtc.so.13, libnvrtc.so.12"),
        library(
            "libcublasLt",
            "which is used with deterministic = false; otherwise the built-in GEMM kernels are used",
            "libcublasLt.so, libcublasLt.so.13, libcublasLt.so.12",
        ),
        library(
            "libnccl",
            "which only GPUs that share a stage cannot do without",
            "libnccl.so.2, libnccl.so",
        ),
    ];
    assert_eq!(json["libraries"], json!(expected));
}

/// The lines of libraries are of no use to who has no driver.
#[test]
fn devices_of_a_machine_without_a_driver_are_two_lines() {
    let nowhere = tempfile::tempdir().unwrap();
    let mut command = spanwise();
    command.arg("devices").env("SPANWISE_CUDA_LIBRARIES", nowhere.path());
    let output = without_python(&mut command, nowhere.path()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.len() == 2 && lines[1].starts_with("cuda     none: no CUDA driver: "), "{text}");
}

#[test]
fn bench_measures_a_gpu_and_what_deterministic_costs() {
    let model = crate::harness::fixture("hetero-0-bf16");
    let cache = tempfile::tempdir().unwrap();
    let bench = |args: &[&str]| {
        let mut command = spanwise();
        command.arg("bench").arg(&model).args([
            "--device",
            "cuda:0",
            "--point-seconds",
            "0.001",
            "--batches",
            "1,2",
        ]);
        command.args(["--context-tokens", "8", "--micro-batch-tokens", "8"]).args(args);
        command.env("SPANWISE_CUDA_LIBRARIES", emulator()).env("XDG_CACHE_HOME", cache.path());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let json: Value = serde_json::from_str(&bench(&["--format", "json"])).unwrap();
    assert_eq!(json["device"]["processor"], "emulator");
    assert_eq!(json["device"]["simd"], "sm_90a");
    for batches in [&json["batches"], &json["not_deterministic"]] {
        let rows: Vec<u64> =
            batches.as_array().unwrap().iter().map(|batch| batch["batch"].as_u64().unwrap()).collect();
        assert_eq!(rows, [1, 2]);
        for key in ["product_flops_per_second", "read_bytes_per_second"] {
            assert!(batches[0]["ceilings"][key].as_f64().unwrap() > 1e3, "{batches}");
        }
        assert!(batches[1]["decode"]["tokens_per_second"].as_f64().unwrap() > 0.0, "{batches}");
    }
    let text = bench(&[]);
    assert!(text.contains("device     cuda sm_90a on emulator\n"), "{text}");
    assert!(text.contains("with deterministic = false, and what true costs\n"), "{text}");
}

/// Three blocks, the first and the last alike, so small that an emulator has measured them in a moment.
fn small_model() -> tempfile::TempDir {
    let (from, to) = (crate::harness::fixture("hetero-0-bf16"), tempfile::tempdir().unwrap());
    for file in ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(file), to.path().join(file)).unwrap();
    }
    let mut config = crate::harness::read_json(&from.join("config.json"));
    config["block_configs"] = [0, 2, 0].map(|slot| config["block_configs"][slot].clone()).to_vec().into();
    config["tie_word_embeddings"] = json!(true);
    for (key, value) in [("num_hidden_layers", 3), ("hidden_size", 64), ("num_attention_heads", 4)] {
        config[key] = json!(value);
    }
    std::fs::write(to.path().join("config.json"), config.to_string()).unwrap();
    to
}

/// Two GPUs are measured by what they hand over to each other, and a job's stages are cut by it: a block that takes as long as
/// many has one of them for itself, and the other one what is before and behind it.
#[test]
fn a_profile_of_gpus_cuts_the_stages_of_a_job() {
    let (store, model) = (tempfile::tempdir().unwrap(), small_model());
    let sets = ["pipeline.micro_batch_tokens=6", "model.max_context_tokens=64", "model.random_weights=true"];
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0});
    let job = both_gpus(Job::on_model(model.path()).completion("row", body)).emulated_gpus(2);
    let job = sets.iter().fold(job, |job, set| job.set(*set));
    let run = job.command();
    let file = run.get_args().nth(1).unwrap().to_owned();
    let with_profiles = |what: &str, args: &[&str]| {
        let mut command = spanwise();
        command.arg(what).arg(&file).args(args);
        for set in sets.iter().chain(&["pipeline.devices=[\"cuda:0\",\"cuda:1\"]"]) {
            command.args(["--set", set]);
        }
        run.get_envs().for_each(|(name, value)| {
            command.env(name, value.unwrap());
        });
        let output = command.env("SPANWISE_PROFILES", store.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let profile = with_profiles("profile", &["--point-seconds", "0.0001", "--format", "json"]);
    let profile: Value = serde_json::from_str(&profile).unwrap();
    let device = &profile["key"]["device"];
    assert_eq!((&device["backend"], &device["processor"]), (&json!("cuda"), &json!("emulator")));
    assert_eq!((&device["devices"], &device["deterministic"]), (&json!(2), &json!(true)));
    let points = |value: &Value| value.as_array().unwrap().len();
    for part in ["hop", "embedding", "head"] {
        for neighbours in ["alone", "busy"] {
            assert_eq!(points(&profile[part][neighbours]), 4, "of 1, 2, 4 and 6 tokens: {part}");
        }
    }
    for attention in profile["attention"].as_array().unwrap() {
        assert!(points(&attention["decode"]["busy"]) > 0 && points(&attention["prefill"]["busy"]) > 0);
    }
    let seconds = |block: &Value| block["points"]["busy"][0]["seconds"]["median"].as_f64().unwrap();
    assert!(profile["blocks"].as_array().unwrap().iter().all(|block| seconds(block) > 0.0), "{profile}");

    let planned = ["--set", "plan.prompt_tokens=8", "--set", "plan.output_tokens=8", "--cost", "measured"];
    let plan: Value =
        serde_json::from_str(&with_profiles("plan", &[&planned[..], &["--format", "json"]].concat()))
            .unwrap();
    assert_eq!(plan["estimate"], false);

    let told = job.command().env("SPANWISE_PROFILES", store.path()).output().unwrap();
    assert!(stderr(&told).contains("by measured costs"), "{}", stderr(&told));
    let plan = |job: &Job| read_json(&job.out().join("manifest.json"))["plan"].clone();
    assert_eq!(plan(&job)["cost"], "measured");

    let stored = std::fs::read_dir(store.path()).unwrap().next().expect("a profile").unwrap().path();
    let mut profile = read_json(&stored);
    even_costs(&mut profile, Some(&shapes(model.path())[1]));
    std::fs::write(&stored, profile.to_string()).unwrap();
    let lines = [("auto", 3), ("off", 2)].map(|(virtual_stages, num_stages)| {
        let job = job.anew().set(format!("pipeline.virtual_stages={virtual_stages}"));
        let output = job.command().env("SPANWISE_PROFILES", store.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let stages = plan(&job)["stages"].as_array().unwrap().clone();
        assert_eq!(stages.len(), num_stages, "{stages:?}");
        assert_eq!(stages[0]["device"] == stages[num_stages - 1]["device"], virtual_stages == "auto");
        let text = std::fs::read_to_string(job.out().join("output.jsonl")).unwrap();
        text.lines().map(crate::harness::without_created).collect::<Vec<_>>()
    });
    assert!(lines[0].len() == 1 && lines[0] == lines[1], "{lines:?}");
}

/// A block that takes as long as ten is two times as fast on two GPUs, which share no narrow weights.
#[test]
fn a_run_proposes_shared_stages_of_gpus_where_it_would_take_them() {
    let sets = ["pipeline.micro_batch_tokens=6", "model.max_context_tokens=64", "model.random_weights=true"];
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0});
    for (dtype, is_proposed) in [("bf16", true), ("int4-weight", false)] {
        let (store, model) = (tempfile::tempdir().unwrap(), small_model());
        let job = both_gpus(Job::on_model(model.path()).completion("row", body.clone())).emulated_gpus(2);
        let job = sets.iter().fold(job.set(format!("model.dtype={dtype}")), |job, set| job.set(*set));
        // A row alone, which is no work for two replicas.
        let job = job.set("pipeline.virtual_stages=off").set("pipeline.max_sequences=1");
        let at = |mut command: Command| {
            let output = command.env("SPANWISE_PROFILES", store.path()).output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
            stderr(&output)
        };
        let mut measure = job.question("profile");
        measure.args(["--point-seconds", "0.0001"]);
        at(measure);
        let stored = std::fs::read_dir(store.path()).unwrap().next().expect("a profile").unwrap().path();
        let mut profile = read_json(&stored);
        even_costs(&mut profile, Some(&shapes(model.path())[1]));
        std::fs::write(&stored, profile.to_string()).unwrap();
        let told = at(job.command());
        assert!(told.contains("by measured costs"), "{told}");
        assert_eq!(told.contains("tensor_parallel"), is_proposed, "{dtype}: {told}");
    }
}

#[test]
fn gpus_of_two_kinds_have_no_profile_together() {
    let job = both_gpus(job()).emulated_gpus(2);
    let run = job.command();
    let mut command = spanwise();
    command.arg("profile").arg(run.get_args().nth(1).unwrap());
    command.args(["--set", "pipeline.devices=[\"cuda:0\",\"cuda:1\"]"]);
    command
        .env("SPANWISE_CUDA_LIBRARIES", emulator())
        .env("EMULATED_GPUS", "2")
        .env("EMULATED_NAMES", "H100,A100");
    let output = command.output().unwrap();
    assert!(
        stderr(&output).contains("found cuda:0 (H100) and cuda:1 (A100), expected GPUs of one kind"),
        "{}",
        stderr(&output)
    );
    assert_eq!(output.status.code(), Some(2));
}

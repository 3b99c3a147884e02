//! Runs the program on a job in a folder of its own and reads what it wrote.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

/// A job under construction.
pub(crate) struct Job {
    folder: tempfile::TempDir,
    model: PathBuf,
    rows: Vec<String>,
    sets: Vec<String>,
    sections: String,
    args: Vec<String>,
    libraries: Option<PathBuf>,
    num_gpus: usize,
}

/// What a job left behind.
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) folder: tempfile::TempDir,
}

impl Job {
    /// A job on a model of `cargo fixtures`.
    pub(crate) fn on(fixture: &str) -> Self {
        Self::on_model(&self::fixture(fixture))
    }

    /// A job on a model directory.
    pub(crate) fn on_model(model: &Path) -> Self {
        Job {
            folder: tempfile::tempdir().expect("a temporary folder"),
            model: model.to_owned(),
            rows: Vec::new(),
            sets: Vec::new(),
            sections: String::new(),
            args: Vec::new(),
            libraries: None,
            num_gpus: 1,
        }
    }

    /// Adds a raw input line.
    pub(crate) fn line(mut self, line: impl Into<String>) -> Self {
        self.rows.push(line.into());
        self
    }

    /// Adds a completions row.
    pub(crate) fn completion(self, custom_id: &str, body: Value) -> Self {
        self.line(batch_line(custom_id, "/v1/completions", &body))
    }

    /// Adds a chat row.
    pub(crate) fn chat(self, custom_id: &str, body: Value) -> Self {
        self.line(batch_line(custom_id, "/v1/chat/completions", &body))
    }

    /// Adds many lines.
    pub(crate) fn lines(mut self, lines: impl IntoIterator<Item = String>) -> Self {
        self.rows.extend(lines);
        self
    }

    /// The same job over other lines.
    pub(crate) fn over(mut self, lines: impl IntoIterator<Item = String>) -> Self {
        self.rows = lines.into_iter().collect();
        self
    }

    /// The same job in a folder of its own.
    pub(crate) fn anew(&self) -> Self {
        Job {
            folder: tempfile::tempdir().expect("a temporary folder"),
            model: self.model.clone(),
            rows: self.rows.clone(),
            sets: self.sets.clone(),
            sections: self.sections.clone(),
            args: self.args.clone(),
            libraries: self.libraries.clone(),
            num_gpus: self.num_gpus,
        }
    }

    /// Sets a key, as `--set` does.
    pub(crate) fn set(mut self, assignment: impl Into<String>) -> Self {
        self.sets.push(assignment.into());
        self
    }

    /// Adds TOML to the job file.
    pub(crate) fn toml(mut self, text: &str) -> Self {
        self.sections.push_str(text);
        self
    }

    /// Adds an argument of `spanwise run`.
    pub(crate) fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// Runs the job with the emulator of a GPU.
    pub(crate) fn emulated(mut self) -> Self {
        self.libraries = Some(crate::cuda::emulator());
        self
    }

    /// Runs the job with the emulator of so many.
    pub(crate) fn emulated_gpus(self, num_gpus: usize) -> Self {
        Job { num_gpus, ..self.emulated() }
    }

    /// Writes the job's files and returns its command, not yet started.
    pub(crate) fn command(&self) -> Command {
        let root = self.folder.path();
        std::fs::write(root.join("input.jsonl"), self.rows.join("\n") + "\n").expect("write the input");
        let toml = format!(
            "[model]\npath = {:?}\n[job]\ninput = \"input.jsonl\"\noutput = \"out\"\n{}",
            self.model, self.sections
        );
        std::fs::write(root.join("job.toml"), toml).expect("write the job file");
        let mut command = spanwise();
        command.arg("run").arg(root.join("job.toml")).args(["--progress", "none"]);
        for set in &self.sets {
            command.args(["--set", set]);
        }
        command.args(&self.args);
        if let Some(libraries) = &self.libraries {
            // Compiled kernels go into the job's own folder, and not to those of whoever runs the tests.
            command
                .env("SPANWISE_CUDA_LIBRARIES", libraries)
                .env("EMULATED_GPUS", self.num_gpus.to_string())
                .env("XDG_CACHE_HOME", self.folder.path().join("cache"));
        }
        command
    }

    /// The command that asks something else of the job's file, such as its plan, with the same keys set and on the same machine.
    pub(crate) fn question(&self, what: &str) -> Command {
        let run = self.command();
        let mut command = spanwise();
        command.arg(what).arg(self.folder.path().join("job.toml"));
        for set in &self.sets {
            command.args(["--set", set]);
        }
        for (name, value) in run.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command
    }

    /// The same with a plan of faults.
    pub(crate) fn command_with_faults(&self, faults: &str) -> Command {
        let plain = self.command();
        let mut command = Command::new(plain.get_program());
        command.args(["--faults", faults]).args(plain.get_args());
        for (name, value) in plain.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }

    /// Runs the job to its end, and leaves it there to be run again.
    pub(crate) fn run_once(&self, args: &[&str]) -> Output {
        self.command().args(args).output().expect("start spanwise")
    }

    /// The folder that the job writes to.
    pub(crate) fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// Runs the job to its end.
    pub(crate) fn run(self) -> Done {
        let output = self.run_once(&[]);
        self.after(output)
    }

    /// What it left behind after such a run.
    pub(crate) fn after(self, Output { status, stdout, stderr }: Output) -> Done {
        Done {
            code: status.code(),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            folder: self.folder,
        }
    }
}

impl Done {
    /// Insists that the job was done.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// The text of an output file.
    pub(crate) fn text(&self, file: &str) -> String {
        std::fs::read_to_string(self.folder.path().join("out").join(file)).unwrap_or_default()
    }

    /// The lines of an output file.
    pub(crate) fn lines(&self, file: &str) -> Vec<Value> {
        self.text(file).lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    }

    /// Bodies of output.jsonl by custom_id.
    #[track_caller]
    pub(crate) fn bodies(&self) -> BTreeMap<String, Value> {
        let mut bodies = BTreeMap::new();
        for line in self.lines("output.jsonl") {
            let id = line["custom_id"].as_str().expect("custom_id").to_owned();
            assert!(bodies.insert(id, line["response"]["body"].clone()).is_none(), "{line} is there twice");
        }
        bodies
    }

    /// The one choice of a row.
    #[track_caller]
    pub(crate) fn choice(&self, custom_id: &str) -> Value {
        let bodies = self.bodies();
        let body = bodies.get(custom_id).unwrap_or_else(|| {
            panic!(
                "no line for {custom_id}; errors:\n{}\nstderr:\n{}",
                self.text("errors.jsonl"),
                self.stderr
            )
        });
        body["choices"][0].clone()
    }

    /// All lines of both files without `created`, sorted: what must not depend on how a job was run.
    pub(crate) fn sorted_lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = (["output.jsonl", "errors.jsonl"].iter())
            .flat_map(|file| self.text(file).lines().map(without_created).collect::<Vec<_>>())
            .collect();
        lines.sort();
        lines
    }
}

/// Cuts `"created":123,` out of a line, byte for byte.
pub(crate) fn without_created(line: &str) -> String {
    let Some(start) = line.find("\"created\":") else { return line.to_owned() };
    let end = start + line[start..].find(',').expect("created is not the last key") + 1;
    format!("{}{}", &line[..start], &line[end..])
}

/// The program under test.
pub(crate) fn spanwise() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spanwise"));
    // No variable of whoever runs the tests may reach a job.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("SPANWISE")) {
        command.env_remove(name);
    }
    // Nor may what was measured on the machine: a folder that nobody makes has no profiles.
    command.env("SPANWISE_PROFILES", std::env::temp_dir().join("spanwise-tests-have-no-profiles"));
    command
}

/// A batch line.
pub(crate) fn batch_line(custom_id: &str, url: &str, body: &Value) -> String {
    json!({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).to_string()
}

/// A model made by `cargo fixtures`.
#[track_caller]
pub(crate) fn fixture(name: &str) -> PathBuf {
    existing(&root().join("target/fixtures").join(name), "cargo fixtures")
}

/// SmolLM2-135M-Instruct as a Hugging Face directory.
#[track_caller]
pub(crate) fn smollm2() -> PathBuf {
    existing(&root().join("models/smollm2-135m"), "cargo xtask smollm2")
}

#[track_caller]
fn existing(path: &Path, maker: &str) -> PathBuf {
    assert!(path.join("config.json").is_file(), "{} is missing: run `{maker}` first", path.display());
    path.to_owned()
}

/// The repository.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A JSON file.
#[track_caller]
pub(crate) fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
    serde_json::from_str(&text).expect("the file is JSON")
}

/// SIMD levels that this processor has, and the plain loops.
pub(crate) fn levels() -> Vec<&'static str> {
    let mut levels = vec!["reference", "portable"];
    if stages::Simd::Avx2.is_available() {
        levels.push("avx2");
    }
    if stages::Simd::Avx512.is_available() {
        levels.push("avx512");
    }
    if stages::Simd::Amx.is_available() {
        levels.push("amx");
    }
    levels
}

/// The devices of a pipeline of so many stages.
pub(crate) fn devices(stages: usize) -> String {
    let mut names: Vec<String> = (0..stages).map(|stage| format!("\"cpu:{}\"", stage % 2)).collect();
    names.sort();
    format!("pipeline.devices=[{}]", names.join(", "))
}

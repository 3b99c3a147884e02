//! How a table of bad input is run: each case breaks one thing of a good job, and is told by its name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{batch_line, fixture, read_json, spanwise};

/// A model with every kind of block, in one shard.
const MODEL: &str = "hetero-0-bf16";

/// One thing that is bad, and all that the program says of it.
pub(super) struct Case {
    name: &'static str,
    breaks: fn(&mut World),
    says: &'static str,
    code: i32,
}

/// A case that is refused before any work. In `says`, `FOLDER` stands for the folder of the case, and `…` for
/// whatever depends on the machine.
pub(super) const fn case(name: &'static str, breaks: fn(&mut World), says: &'static str) -> Case {
    Case { name, breaks, says, code: 2 }
}

impl Case {
    /// This case with another exit code.
    pub(super) const fn exits(self, code: i32) -> Case {
        Case { code, ..self }
    }

    /// What is wrong with how the program takes it; nothing where all is as it should be.
    fn complaint(&self) -> Option<String> {
        let mut world = World::new();
        (self.breaks)(&mut world);
        let before = world.lines_files();
        let output = world.command().output().expect("start spanwise");
        let said =
            String::from_utf8_lossy(&output.stderr).replace(&world.path("").display().to_string(), "FOLDER/");
        let said = said.trim_end();
        let mut complaints = Vec::new();
        if !is_like(said, self.says) {
            complaints.push(format!("says\n{said}\nand should say\n{}", self.says));
        }
        if said.contains("panicked") || said.contains("internal error") {
            complaints.push("has met a bug of ours".to_owned());
        }
        if output.status.code() != Some(self.code) {
            complaints.push(format!("ends with {:?}, expected exit code {}", output.status, self.code));
        }
        let after = world.lines_files();
        if before.iter().any(|(path, bytes)| after.get(path) != Some(bytes)) {
            complaints.push("has changed what an earlier job had written".to_owned());
        }
        (!complaints.is_empty()).then(|| format!("{}: {}", self.name, complaints.join("\n")))
    }
}

/// Whether a text is a pattern's, whose `…` stand for anything.
fn is_like(text: &str, pattern: &str) -> bool {
    let (first, rest) = pattern.split_once('…').unwrap_or((pattern, ""));
    match (text.strip_prefix(first), pattern.len() == first.len()) {
        (Some(left), true) => left.is_empty(),
        (Some(left), false) => left.char_indices().any(|(at, _)| is_like(&left[at..], rest)),
        (None, _) => false,
    }
}

/// Runs every case, and tells of all that are not as they should be.
#[track_caller]
pub(super) fn check(cases: &[Case]) {
    let names: std::collections::BTreeSet<&str> = cases.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    let complaints: Vec<String> = cases.iter().filter_map(Case::complaint).collect();
    let (bad, all) = (complaints.len(), cases.len());
    assert!(complaints.is_empty(), "{bad} of {all} cases:\n\n{}", complaints.join("\n\n"));
}

/// A good job: `model/`, `rows.jsonl`, `job.toml`, and an `out/` that a case may fill.
pub(super) struct World {
    folder: tempfile::TempDir,
    args: Vec<String>,
    /// What is run in place of `run job.toml`.
    command: Option<Vec<String>>,
}

impl World {
    pub(super) fn new() -> World {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let world = World { folder, args: vec![], command: None };
        std::fs::create_dir(world.path("model")).expect("make a folder");
        for entry in std::fs::read_dir(fixture(MODEL)).expect("read the fixture") {
            let path = entry.expect("read the fixture").path();
            let copy = world.path("model").join(path.file_name().expect("a file"));
            match path.extension().is_some_and(|extension| extension == "safetensors") {
                true => std::os::unix::fs::symlink(&path, copy).expect("link the weights"),
                false => std::fs::copy(&path, copy).map(drop).expect("copy the model"),
            }
        }
        world.file("rows.jsonl", ROW);
        world.file("job.toml", JOB);
        world
    }

    /// A path below the folder of the case.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file in place of what was there.
    pub(super) fn file(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("below a folder")).expect("make a folder");
        // Through a link it would be the fixture that is written.
        let _ = std::fs::remove_file(&path);
        std::fs::write(path, content).expect("write a file");
    }

    /// Takes a file away.
    pub(super) fn remove(&self, name: &str) {
        std::fs::remove_file(self.path(name)).expect("remove a file");
    }

    /// Makes a folder, in place of a file if there is one.
    pub(super) fn folder(&self, name: &str) {
        let _ = std::fs::remove_file(self.path(name));
        std::fs::create_dir_all(self.path(name)).expect("make a folder");
    }

    /// Makes a link, in place of a file if there is one.
    pub(super) fn link(&self, name: &str, target: impl AsRef<Path>) {
        let _ = std::fs::remove_file(self.path(name));
        std::os::unix::fs::symlink(target, self.path(name)).expect("make a link");
    }

    /// Changes the bytes of a file.
    pub(super) fn bytes(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.path(name)).expect("read a file");
        change(&mut bytes);
        self.file(name, bytes);
    }

    /// Changes the JSON of a file.
    pub(super) fn json(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut value = read_json(&self.path(name));
        change(&mut value);
        self.file(name, value.to_string());
    }

    /// Changes the model's `config.json`.
    pub(super) fn config(&self, change: impl FnOnce(&mut Value)) {
        self.json("model/config.json", change);
    }

    /// Takes a key out of the model's `config.json`.
    pub(super) fn config_lacks(&self, key: &str) {
        self.config(|config| drop(config.as_object_mut().expect("an object").remove(key)));
    }

    /// Changes the header of the model's shard, and leaves its data alone.
    pub(super) fn header(&self, change: impl FnOnce(&mut Value)) {
        self.bytes("model/model.safetensors", |bytes| {
            let end = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
            let mut header: Value = serde_json::from_slice(&bytes[8..end]).expect("a header is JSON");
            change(&mut header);
            let header = header.to_string().into_bytes();
            let length = (header.len() as u64).to_le_bytes();
            bytes.splice(..end, length.into_iter().chain(header));
        });
    }

    /// Passes a `--set`.
    pub(super) fn set(&mut self, assignment: &str) {
        self.args.extend(["--set".to_owned(), assignment.to_owned()]);
    }

    /// Passes an argument of `spanwise run`.
    pub(super) fn arg(&mut self, arg: &str) {
        self.args.push(arg.to_owned());
    }

    /// Runs another command than `run job.toml`, in the folder of the case.
    pub(super) fn spanwise(&mut self, args: &[&str]) {
        self.command = Some(args.iter().map(|arg| (*arg).to_owned()).collect());
    }

    /// Lets a good run write `out/`.
    pub(super) fn done(&mut self) {
        let output = self.command().output().expect("start spanwise");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub(super) fn command(&self) -> Command {
        let mut command = spanwise();
        command.current_dir(self.folder.path());
        match &self.command {
            Some(args) => command.args(args),
            None => command.args(["run", "job.toml", "--progress", "none"]).args(&self.args),
        };
        command
    }

    /// What a job writes and a user would miss, wherever a case has put it.
    fn lines_files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let names =
            ["output.jsonl", "errors.jsonl", "stale.jsonl", "manifest.json", "journal.sqlite", "rows.jsonl"];
        let folders = [self.path(""), self.path("out")];
        let paths = folders.iter().flat_map(|folder| names.map(|name| folder.join(name)));
        let files = paths.filter_map(|path| std::fs::read(&path).ok().map(|bytes| (path, bytes)));
        files.filter(|(_, bytes)| !bytes.is_empty()).collect()
    }
}

/// The one row of a good job.
const ROW: &str = r#"{"custom_id":"row","method":"POST","url":"/v1/completions","body":{"prompt":"hello","max_tokens":2,"ignore_eos":true}}
"#;

/// A good job file.
const JOB: &str = r#"[model]
path = "model"
[job]
input = "rows.jsonl"
output = "out"
"#;

/// A batch line whose body is a completion of `hello` with these fields.
pub(super) fn completion(custom_id: &str, fields: &Value) -> String {
    let mut body = json!({"prompt": "hello", "max_tokens": 1});
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    batch_line(custom_id, "/v1/completions", &body)
}

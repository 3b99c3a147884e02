//! One job file with its overrides, and the whole of the message that refuses it.

use std::path::{Path, PathBuf};

/// Lines 1 to 5 of most cases: a file that loads.
pub(crate) const GOOD: &str = r#"[model]
path = "m"
[job]
input = "in.jsonl"
output = "out"
"#;

pub(crate) struct Case {
    what: &'static str,
    file: String,
    sets: Vec<String>,
    env: Vec<(String, String)>,
}

pub(crate) fn case(what: &'static str) -> Case {
    Case { what, file: GOOD.to_owned(), sets: Vec::new(), env: Vec::new() }
}

impl Case {
    /// The whole file. The line break after the opening quote is not part of it.
    pub(crate) fn file(mut self, text: &str) -> Self {
        self.file = text.trim_start_matches('\n').to_owned();
        self
    }

    /// The file after its first five lines.
    pub(crate) fn more(mut self, text: &str) -> Self {
        self.file.push_str(text.trim_start_matches('\n'));
        self
    }

    pub(crate) fn set(mut self, set: &str) -> Self {
        self.sets.push(set.to_owned());
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    #[track_caller]
    pub(crate) fn says(self, message: &str) {
        let folder = folder(self.what);
        std::fs::write(folder.join("job.toml"), &self.file).unwrap();
        let loaded = configs::load(Path::new("job.toml"), &self.sets, self.env.into_iter(), &folder);
        let error = loaded.expect_err(self.what).to_string();
        assert_eq!(error, message.trim_start_matches('\n'), "{}", self.what);
    }
}

/// A folder of its own for each case, as tests run side by side.
pub(crate) fn folder(what: &str) -> PathBuf {
    let name: String = what.chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("refusals").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

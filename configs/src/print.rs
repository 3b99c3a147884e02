//! Job files as text: the effective one, and one with nothing but defaults.

use std::fmt::Write;

use toml::Table;

use crate::keys;
use crate::schema::{Grade, JobFile, Plan, Prompt};
use crate::whole::{OPTIONAL, REQUIRED};

impl JobFile {
    /// The whole job file with every default filled in, which loads to the same job again.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("every field is a TOML value")
    }

    /// A job file with every key: those with a default have it, the others stand as comments.
    pub fn default_toml() -> String {
        let all = Self {
            prompt: Some(Prompt::default()),
            grade: Some(Grade::default()),
            plan: Some(Plan::default()),
            ..Self::default()
        };
        let defaults = Table::try_from(all).expect("every field is a TOML value");
        let mut text = String::new();
        for (idx, &section) in keys::sections().iter().enumerate() {
            let table = defaults.get(section).and_then(|value| value.as_table());
            let comment = if OPTIONAL.contains(&section) { "# " } else { "" };
            let gap = if idx > 0 { "\n" } else { "" };
            writeln!(text, "{gap}{comment}[{section}]").expect("a String takes all");
            for &name in keys::keys_of(section) {
                let is_required = REQUIRED.iter().any(|&(s, n, _)| (s, n) == (section, name));
                let line = match table.and_then(|table| table.get(name)) {
                    _ if is_required => format!("# {name} =  # required"),
                    Some(value) => format!("{comment}{name} = {value}"),
                    None => format!("# {name} =  # not set"),
                };
                writeln!(text, "{line}").expect("a String takes all");
            }
        }
        text
    }
}

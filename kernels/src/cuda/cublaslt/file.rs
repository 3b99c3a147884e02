//! Chosen algorithms on disk, beside the cubins: a line for each, after three that say whose they are.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::plan::{Algorithm, Choice, Key, Kind};

/// What the algorithms of a file are good for: another library or device has a file of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    /// The library's number, such as 130100.
    pub(crate) library: usize,
    /// As NVIDIA calls it.
    pub(crate) device: String,
}

/// Choices by key.
pub(crate) type Plans = BTreeMap<Key, Choice>;

impl Owner {
    /// The first lines of a file, which its name is a hash of too.
    fn heading(&self) -> String {
        format!("spanwise gemm plans 1\ncublasLt {}\n{}\n", self.library, self.device.replace('\n', " "))
    }

    /// Where its choices are kept.
    pub(crate) fn path(&self, folder: &Path) -> PathBuf {
        let hash = blake3::hash(self.heading().as_bytes()).to_hex();
        folder.join(format!("gemm-{}.plans", &hash[..32]))
    }

    /// What a file holds. Lines that are damaged, or of a later version, are as if they were not there: they are found anew.
    pub(crate) fn parse(&self, text: &str) -> Plans {
        let Some(lines) = text.strip_prefix(&self.heading()) else { return Plans::new() };
        lines.lines().filter_map(parse_line).collect()
    }

    /// A file's text.
    pub(crate) fn write(&self, plans: &Plans) -> String {
        let mut text = self.heading();
        for (key, choice) in plans {
            let Key { kind, rows, cols, depth, adds } = key;
            let onto = if *adds { "add" } else { "store" };
            let _ = write!(text, "{} {rows} {cols} {depth} {onto} ", kind.name());
            choice.algorithm.0.iter().for_each(|word| {
                let _ = write!(text, "{word:016x}");
            });
            let _ = writeln!(text, " {:.1}", choice.microseconds);
        }
        text
    }

    /// Reads the choices in a folder.
    pub(crate) fn load(&self, folder: &Path) -> Plans {
        std::fs::read_to_string(self.path(folder)).map_or_else(|_| Plans::new(), |text| self.parse(&text))
    }

    /// Adds a choice to those in a folder, whole or not at all. What another process writes at the same moment may be lost, and
    /// where writing fails the choice is made again the next time.
    pub(crate) fn keep(&self, folder: &Path, key: Key, choice: Choice) {
        let mut plans = self.load(folder);
        plans.insert(key, choice);
        let path = self.path(folder);
        let unfinished = path.with_extension(format!("{}.unfinished", std::process::id()));
        let written = std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&unfinished, self.write(&plans)))
            .and_then(|()| std::fs::rename(&unfinished, path));
        let _ = written;
    }
}

fn parse_line(line: &str) -> Option<(Key, Choice)> {
    let fields: Vec<&str> = line.split(' ').collect();
    let [kind, rows, cols, depth, onto, algorithm, microseconds] = fields[..] else { return None };
    let kind = Kind::ALL.into_iter().find(|known| known.name() == kind)?;
    let number = |text: &str| text.parse::<usize>().ok();
    let adds = match onto {
        "add" => true,
        "store" => false,
        _ => return None,
    };
    if algorithm.len() != 128 || !algorithm.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut words = [0; 8];
    for (word, digits) in words.iter_mut().zip(algorithm.as_bytes().chunks(16)) {
        *word = u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    let key = Key { kind, rows: number(rows)?, cols: number(cols)?, depth: number(depth)?, adds };
    let microseconds = microseconds.parse().ok().filter(|time: &f64| time.is_finite())?;
    Some((key, Choice { algorithm: Algorithm(words), microseconds }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(library: usize, device: &str) -> Owner {
        Owner { library, device: device.to_owned() }
    }

    fn key(rows: usize, adds: bool) -> Key {
        Key { kind: Kind::Bf16, rows, cols: 53_248, depth: 16_384, adds }
    }

    const CHOICE: Choice =
        Choice { algorithm: Algorithm([1, 0, 3, u64::MAX, 5, 6, 7, 0xabc]), microseconds: 612.5 };

    #[test]
    fn what_is_kept_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let owner = owner(130_100, "NVIDIA H200");
        assert!(owner.load(folder.path()).is_empty());
        for key in [key(256, false), key(256, true), key(512, false)] {
            owner.keep(folder.path(), key, CHOICE);
        }
        let plans = owner.load(folder.path());
        assert_eq!((plans.len(), plans[&key(256, true)]), (3, CHOICE));
    }

    #[test]
    fn another_library_or_device_has_a_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let one = owner(130_100, "NVIDIA H200");
        one.keep(folder.path(), key(16, false), CHOICE);
        for other in [owner(130_200, "NVIDIA H200"), owner(130_100, "NVIDIA B200")] {
            assert_ne!(one.path(folder.path()), other.path(folder.path()));
            assert!(other.load(folder.path()).is_empty());
            // A file that was copied to the wrong name is no better.
            assert!(other.parse(&one.write(&one.load(folder.path()))).is_empty());
        }
    }

    #[test]
    fn damaged_lines_are_as_if_they_were_not_there() {
        let owner = owner(1, "gpu");
        let mut text = owner.write(&Plans::from([(key(16, false), CHOICE), (key(32, false), CHOICE)]));
        let whole = owner.parse(&text);
        for line in ["", "bf16", "bf16 16 x 3 add 00 1.0", "fp99 16 2 3 add 00 1.0", "bf16 1 2 3 add zz 1"] {
            text += line;
            text += "\n";
        }
        assert_eq!(owner.parse(&text), whole);
        assert_eq!(owner.parse(&text[..text.len() / 2]).len(), 1);
        assert!(owner.parse("").is_empty());
    }
}

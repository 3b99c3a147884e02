//! The job file by itself: strictly parsed, every key known, every value of its type and in its range,
//! each error with its place. Keys may still be missing, since an override may bring them.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_path_to_error::Segment;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::Error;
use crate::keys;
use crate::schema::JobFile;

/// A job file as text.
pub(crate) struct File {
    /// As it was given, for messages.
    path: PathBuf,
    folder: PathBuf,
    text: String,
}

impl File {
    pub(crate) fn read(path: &Path, working_folder: &Path) -> Result<Self, Error> {
        let place = working_folder.join(path);
        let bytes = std::fs::read(&place)
            .map_err(|cause| Error::new(format!("job file {} can't be read: {cause}", path.display())))?;
        let text = String::from_utf8(bytes).map_err(|cause| {
            let good = &cause.as_bytes()[..cause.utf8_error().valid_up_to()];
            let line = good.iter().filter(|byte| **byte == b'\n').count() + 1;
            Error::new(format!("job file {} is not UTF-8: bad byte in line {line}", path.display()))
        })?;
        let folder = place.parent().unwrap_or(working_folder).to_owned();
        Ok(Self { path: path.to_owned(), folder, text })
    }

    /// The folder it stands in.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Checks the file, and returns what it says.
    pub(crate) fn check(&self) -> Result<toml::Table, Error> {
        let tree = DeTable::parse(&self.text)
            .map_err(|cause| self.place(Error::new(cause.message()), cause.span()))?;
        self.check_names(tree.get_ref())?;
        let job = serde_path_to_error::deserialize::<_, JobFile>(toml::Deserializer::from(tree.clone()));
        job.map_err(|cause| {
            let span = span_of(tree.get_ref(), cause.path().iter().cloned()).or(cause.inner().span());
            self.place(Error::new(format!("{}: {}", cause.path(), cause.inner().message())), span)
        })?;
        Ok(toml::from_str(&self.text).expect("parsed a moment ago"))
    }

    /// An error about a key, or about its section where the file lacks the key.
    pub(crate) fn error_at(&self, section: &str, name: &str, error: Error) -> Error {
        let tree = DeTable::parse(&self.text).expect("parsed a moment ago");
        let steps = [section, name].map(|key| Segment::Map { key: key.to_owned() });
        let header = || tree.get_ref().get_key_value(section).map(|(header, _)| header.span());
        let span = span_of(tree.get_ref(), steps).or_else(header);
        self.place(error, span)
    }

    fn place(&self, error: Error, span: Option<Range<usize>>) -> Error {
        match span {
            Some(span) => error.at(&self.path, &self.text, span),
            None => error.in_file(&self.path),
        }
    }

    /// Refuses the first name in the file that is not known.
    fn check_names(&self, tree: &DeTable<'_>) -> Result<(), Error> {
        let mut wrong: Vec<(Range<usize>, Error)> = Vec::new();
        for (section, table) in tree {
            let name = section.get_ref().as_ref();
            match table.get_ref() {
                DeValue::Table(table) if keys::sections().contains(&name) => {
                    let known = keys::keys_of(name);
                    let unknown = table.keys().filter(|key| !known.contains(&key.get_ref().as_ref()));
                    wrong.extend(unknown.map(|key| (key.span(), unknown_key(name, key.get_ref()))));
                }
                found if keys::sections().contains(&name) => {
                    wrong.push((table.span(), no_section(name, found)))
                }
                DeValue::Table(_) => wrong.push((section.span(), unknown_section(name))),
                _ => wrong.push((section.span(), stray_key(name))),
            }
        }
        match wrong.into_iter().min_by_key(|(span, _)| span.start) {
            Some((span, error)) => Err(error.at(&self.path, &self.text, span)),
            None => Ok(()),
        }
    }
}

/// Where the value stands that a path leads to, if it leads to one.
fn span_of(tree: &DeTable<'_>, path: impl IntoIterator<Item = Segment>) -> Option<Range<usize>> {
    let mut steps = path.into_iter();
    let Some(Segment::Map { key: section }) = steps.next() else { return None };
    let start = tree.get(section.as_str())?;
    let end = steps.try_fold(start, |value, step| match (step, value.get_ref()) {
        (Segment::Map { key }, DeValue::Table(table)) => table.get(key.as_str()),
        (Segment::Seq { index }, DeValue::Array(list)) => list.get(index),
        _ => None,
    });
    end.map(Spanned::span)
}

fn unknown_section(name: &str) -> Error {
    let hint = match (homes(name), keys::nearest(name, keys::sections())) {
        (Some(homes), _) => format!("`{name}` is a key of {homes}"),
        (None, Some(section)) => format!("did you mean [{section}]?"),
        (None, None) => format!("the sections are [{}]", keys::sections().join("], [")),
    };
    Error::new(format!("unknown section `{name}`")).hint(hint)
}

fn no_section(name: &str, found: &DeValue<'_>) -> Error {
    let found = if found.is_array() { "a list" } else { "a value" };
    Error::new(format!("{name}: expected a section of keys, found {found}"))
        .hint(format!("begin it with [{name}]"))
}

fn stray_key(name: &str) -> Error {
    let home = homes(name).unwrap_or_else(|| format!("one of [{}]", keys::sections().join("], [")));
    Error::new(format!("key `{name}` stands outside of any section")).hint(format!("put it under {home}"))
}

fn unknown_key(section: &str, name: &str) -> Error {
    let hint = match (homes(name), keys::nearest(name, keys::keys_of(section))) {
        (Some(homes), _) => format!("`{name}` belongs in {homes}"),
        (None, Some(near)) => format!("did you mean `{near}`?"),
        (None, None) => format!("the keys of [{section}] are {}", keys::keys_of(section).join(", ")),
    };
    Error::new(format!("unknown key `{name}` in [{section}]")).hint(hint)
}

/// The sections that have a key of this name, as `[job] or [sampling]`.
fn homes(name: &str) -> Option<String> {
    let homes: Vec<_> =
        keys::all().filter(|key| key.name == name).map(|key| format!("[{}]", key.section)).collect();
    (!homes.is_empty()).then(|| homes.join(" or "))
}

//! The job file by itself: strictly parsed, every key known, every value of its type and in its range,
//! each error with its place. Keys may still be missing, since an override may bring them.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::Error;
use crate::keys;
use crate::schema::JobFile;

/// A file that passed.
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
        let tree = DeTable::parse(&self.text).map_err(|cause| self.refuse(&cause, String::new()))?;
        self.check_names(tree.get_ref())?;
        serde_path_to_error::deserialize::<_, JobFile>(toml::Deserializer::from(tree)).map_err(|cause| {
            let key = format!("{}: ", cause.path());
            self.refuse(cause.inner(), key)
        })?;
        Ok(toml::from_str(&self.text).expect("parsed a moment ago"))
    }

    /// An error about a key, or about its section where the file lacks the key.
    pub(crate) fn error_at(&self, section: &str, name: &str, error: Error) -> Error {
        let tree = DeTable::parse(&self.text).expect("parsed a moment ago");
        let place = tree.get_ref().get_key_value(section).map(|(header, table)| {
            let value = table.get_ref().as_table().and_then(|table| table.get(name));
            value.map_or(header.span(), Spanned::span)
        });
        match place {
            Some(span) => error.at(&self.path, &self.text, span),
            None => error.in_file(&self.path),
        }
    }

    fn refuse(&self, cause: &toml::de::Error, context: String) -> Error {
        let error = Error::new(format!("{context}{}", cause.message()));
        match cause.span() {
            Some(span) => error.at(&self.path, &self.text, span),
            None => error.in_file(&self.path),
        }
    }

    /// Refuses the first name in the file that is not known.
    fn check_names(&self, tree: &DeTable<'_>) -> Result<(), Error> {
        let mut wrong: Vec<(Range<usize>, Error)> = Vec::new();
        for (section, table) in tree {
            let section_name = section.get_ref().as_ref();
            if !keys::sections().contains(&section_name) {
                wrong.push((section.span(), unknown_section(section_name)));
                continue;
            }
            let DeValue::Table(table) = table.get_ref() else {
                let message = format!("{section_name}: expected a section of keys, found a value");
                wrong.push((
                    table.span(),
                    Error::new(message).hint(format!("begin it with [{section_name}]")),
                ));
                continue;
            };
            let known = keys::keys_of(section_name);
            let unknown = table.keys().filter(|key| !known.contains(&key.get_ref().as_ref()));
            wrong.extend(unknown.map(|key| (key.span(), unknown_key(section_name, key.get_ref()))));
        }
        match wrong.into_iter().min_by_key(|(span, _)| span.start) {
            Some((span, error)) => Err(error.at(&self.path, &self.text, span)),
            None => Ok(()),
        }
    }
}

fn unknown_section(name: &str) -> Error {
    let hint = match (keys::nearest(name, keys::sections()), keys::all().find(|key| key.name == name)) {
        (_, Some(key)) => format!("`{name}` belongs in [{}]", key.section),
        (Some(section), None) => format!("did you mean [{section}]?"),
        (None, None) => format!("the sections are [{}]", keys::sections().join("], [")),
    };
    Error::new(format!("unknown section `{name}`")).hint(hint)
}

fn unknown_key(section: &str, name: &str) -> Error {
    let elsewhere = keys::all().find(|key| key.name == name);
    let hint = match (elsewhere, keys::nearest(name, keys::keys_of(section))) {
        (Some(key), _) => format!("`{name}` belongs in [{}]", key.section),
        (None, Some(near)) => format!("did you mean `{near}`?"),
        (None, None) => format!("the keys of [{section}] are {}", keys::keys_of(section).join(", ")),
    };
    Error::new(format!("unknown key `{name}` in [{section}]")).hint(hint)
}

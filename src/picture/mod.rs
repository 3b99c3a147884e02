//! Pictures of models, plans and simulated jobs, as SVG: text that browsers, slides and repositories show.
//!
//! Functions here take what was decided elsewhere and return the whole text of a picture; they compute nothing
//! but places on the page. The same input gives the same bytes, so that the pictures of the documentation can be
//! compared with what the program draws. Nothing outside the file is needed to show it: no fonts, no scripts,
//! and its own white ground, for pages that are dark.

mod canvas;
mod kinds;
mod model;
mod plan;
mod timeline;

use std::path::Path;

use anyhow::{Context, Result};

use crate::replace;

pub(crate) use model::draw as draw_model;
pub(crate) use plan::draw as draw_plan;
pub(crate) use timeline::draw as draw_timeline;

/// Writes a picture to a file, over an earlier one.
///
/// # Errors
/// A path that cannot be written, or at which something else stands.
pub(crate) fn save(path: &Path, svg: &str) -> Result<()> {
    replace::check(path, replace::PICTURE)?;
    std::fs::write(path, svg).with_context(|| format!("write picture {}", path.display()))
}

/// What a model is called in titles: its folder's name, also where its `config.json` was named.
pub(crate) fn model_name(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let folder = if whole.is_file() { whole.parent() } else { Some(whole.as_path()) };
    let name = folder.and_then(Path::file_name).unwrap_or(whole.as_os_str());
    name.to_string_lossy().into_owned()
}

//! Cubins that a program carries behind its own code, for machines that have a GPU's driver and no compiler.
//!
//! A pack is the version of the compiler, a list of cubins and, at its very end, its own length and [`MAGIC`]. Put behind an
//! executable it leaves that as it was: loaders read what the headers at a file's start speak of. A cubin's key is a hash of all
//! that it was made from but the compiler's version, so that one of other source is never taken. A driver that is older than the
//! compiler takes none of them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::OnceLock;

use super::program::{Source, Version, compiler_version};
use crate::error::Result;

/// Ends a file that has a pack.
const MAGIC: &[u8; 16] = b"spanwise cubins2";

/// Architectures that a pack is for: those that CI compiles for.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100a"];

/// Widths of a head that attention is packed for: all that are padded to, up to Nemotron's, and the one beyond that the battery has.
const HEAD_DIMS: [usize; 9] = [16, 32, 48, 64, 80, 96, 112, 128, 256];

/// Compiles all device code, for all architectures and widths of a head, to a pack. No GPU and no driver are needed.
///
/// # Errors
/// No NVRTC in the folder or elsewhere, or the compiler's own words.
pub fn pack_cubins(libraries: Option<&Path>) -> Result<Vec<u8>> {
    let mut cubins = BTreeMap::new();
    for source in Source::ALL {
        let head_dims = if source.is_per_head_dim { &HEAD_DIMS[..] } else { &[0] };
        for (architecture, head_dim) in
            ARCHITECTURES.into_iter().flat_map(|name| head_dims.iter().map(move |width| (name, *width)))
        {
            let cubin = source.compile(libraries, architecture, head_dim)?.cubin;
            cubins.insert(source.key(architecture, head_dim), cubin);
        }
    }
    Ok(Pack { compiler: compiler_version()?, cubins }.bytes())
}

/// The cubin of a key that this program carries.
pub(crate) fn find(key: &str) -> Option<&'static [u8]> {
    own()?.cubins.get(key).map(Vec::as_slice)
}

/// What has compiled the cubins that this program carries, if it carries any.
pub(crate) fn compiler() -> Option<Version> {
    own().map(|pack| pack.compiler)
}

fn own() -> Option<&'static Pack> {
    static OWN: OnceLock<Option<Pack>> = OnceLock::new();
    let read = || {
        let mut file = File::open(std::env::current_exe().ok()?).ok()?;
        Pack::read(&read_end(&mut file)?)
    };
    OWN.get_or_init(read).as_ref()
}

#[derive(Debug, PartialEq, Eq)]
struct Pack {
    compiler: Version,
    cubins: BTreeMap<String, Vec<u8>>,
}

impl Pack {
    /// The version, each key and cubin with its length before it, then the length of all that, and the magic.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            [self.compiler.0, self.compiler.1].into_iter().flat_map(i32::to_le_bytes).collect();
        for part in self.cubins.iter().flat_map(|(key, cubin)| [key.as_bytes(), cubin]) {
            bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
            bytes.extend_from_slice(part);
        }
        let length = bytes.len() as u64;
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(MAGIC);
        bytes
    }

    /// Of what [`read_end`] has found; nothing where that is no pack.
    fn read(bytes: &[u8]) -> Option<Pack> {
        let (major, bytes) = bytes.split_first_chunk()?;
        let (minor, mut bytes) = bytes.split_first_chunk()?;
        let mut part = || {
            let (length, rest) = bytes.split_first_chunk()?;
            let (part, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
            bytes = rest;
            Some((part, rest.is_empty()))
        };
        let mut cubins = BTreeMap::new();
        loop {
            let (key, _) = part()?;
            let (cubin, is_last) = part()?;
            cubins.insert(String::from_utf8(key.to_vec()).ok()?, cubin.to_vec());
            if is_last {
                let compiler = (i32::from_le_bytes(*major), i32::from_le_bytes(*minor));
                return Some(Pack { compiler, cubins });
            }
        }
    }
}

/// The pack at a file's end, without its length and magic.
fn read_end(file: &mut (impl Read + Seek)) -> Option<Vec<u8>> {
    let mut end = [0; 8 + MAGIC.len()];
    let behind = file.seek(SeekFrom::End(-(end.len() as i64))).ok()?;
    file.read_exact(&mut end).ok()?;
    let (length, magic) = end.split_first_chunk()?;
    let start = behind.checked_sub(u64::from_le_bytes(*length)).filter(|_| magic == MAGIC)?;
    file.seek(SeekFrom::Start(start)).ok()?;
    let mut bytes = vec![0; usize::try_from(behind - start).ok()?];
    file.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn a_pack_behind_a_program_is_found_and_nothing_else_passes_for_one() {
        let cubins = BTreeMap::from([("one".to_owned(), vec![1, 2, 3]), ("other".to_owned(), vec![])]);
        let pack = Pack { compiler: (13, 1), cubins };
        let program = b"some program".to_vec();
        let file = [program.clone(), pack.bytes()].concat();
        let read =
            |bytes: &[u8]| read_end(&mut Cursor::new(bytes.to_vec())).and_then(|found| Pack::read(&found));
        assert_eq!(read(&file), Some(pack));
        assert_eq!(read(&program), None);
        assert_eq!(read(&file[..file.len() - 1]), None);
        // A length that the file does not have, and lengths inside that the pack does not have.
        assert_eq!(read(&file[20..]), None);
        let mut broken = file;
        broken[program.len() + 8] = 200; // Behind the version.
        assert_eq!(read(&broken), None);
    }

    #[test]
    fn ci_compiles_for_what_a_pack_is_for() {
        let script = include_str!("../../../tools/compile_cubins.py");
        assert!(script.contains(&format!("\nARCHITECTURES = {ARCHITECTURES:?}\n")));
        assert!(script.contains(&format!("\nHEAD_DIMS = {HEAD_DIMS:?}\n")));
    }

    #[test]
    fn keys_tell_source_architecture_and_width_apart_and_not_compilers() {
        let mut keys = Vec::new();
        for source in Source::ALL {
            let head_dims = if source.is_per_head_dim { &HEAD_DIMS[..] } else { &[0] };
            for architecture in ARCHITECTURES {
                keys.extend(head_dims.iter().map(|width| source.key(architecture, *width)));
            }
        }
        let count = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }
}

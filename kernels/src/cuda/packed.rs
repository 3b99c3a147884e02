//! Cubins that a program carries behind its own code, for machines that have a GPU's driver and no compiler.
//!
//! A pack is a list of cubins and, at its very end, its own length and [`MAGIC`]. Put behind an executable it leaves that as it was:
//! loaders read what the headers at a file's start speak of. A cubin's key is a hash of all that it was made from but the
//! compiler's version, so that one of other source is never taken.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::OnceLock;

use super::program::Source;
use crate::error::Result;

/// Ends a file that has a pack.
const MAGIC: &[u8; 16] = b"spanwise cubins1";

/// Architectures that a pack is for: those that CI compiles for.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100a"];

/// Widths of a head that attention is packed for: all that are padded to, up to Nemotron's, and the one beyond that the battery has.
const HEAD_DIMS: [usize; 9] = [16, 32, 48, 64, 80, 96, 112, 128, 256];

/// Compiles all device code, for all architectures and widths of a head, to a pack. No GPU and no driver are needed.
///
/// # Errors
/// No NVRTC in the folder or elsewhere, or the compiler's own words.
pub fn pack_cubins(libraries: Option<&Path>) -> Result<Vec<u8>> {
    let mut cubins = Vec::new();
    for source in Source::ALL {
        let head_dims = if source.is_per_head_dim { &HEAD_DIMS[..] } else { &[0] };
        for (architecture, head_dim) in
            ARCHITECTURES.into_iter().flat_map(|name| head_dims.iter().map(move |width| (name, *width)))
        {
            let cubin = source.compile(libraries, architecture, head_dim)?.cubin;
            cubins.push((source.key(architecture, head_dim), cubin));
        }
    }
    Ok(packed(&cubins))
}

/// The cubin of a key that this program carries.
pub(crate) fn find(key: &str) -> Option<&'static [u8]> {
    all().get(key).map(Vec::as_slice)
}

/// Whether this program carries any.
pub(crate) fn is_there() -> bool {
    !all().is_empty()
}

fn all() -> &'static HashMap<String, Vec<u8>> {
    static ALL: OnceLock<HashMap<String, Vec<u8>>> = OnceLock::new();
    ALL.get_or_init(|| {
        let own = std::env::current_exe().ok().and_then(|path| File::open(path).ok());
        own.and_then(|mut file| read_end(&mut file)).and_then(|bytes| unpacked(&bytes)).unwrap_or_default()
    })
}

/// Each key and cubin with its length before it, then the length of all that, and the magic.
fn packed(cubins: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in cubins.iter().flat_map(|(key, cubin)| [key.as_bytes(), cubin]) {
        bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
        bytes.extend_from_slice(part);
    }
    let length = bytes.len() as u64;
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(MAGIC);
    bytes
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

/// Nothing where it is no pack.
fn unpacked(mut bytes: &[u8]) -> Option<HashMap<String, Vec<u8>>> {
    let mut part = || {
        let (length, rest) = bytes.split_first_chunk()?;
        let (part, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        bytes = rest;
        Some((part, rest.is_empty()))
    };
    let mut cubins = HashMap::new();
    loop {
        let (key, _) = part()?;
        let (cubin, is_last) = part()?;
        cubins.insert(String::from_utf8(key.to_vec()).ok()?, cubin.to_vec());
        if is_last {
            return Some(cubins);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn a_pack_behind_a_program_is_found_and_nothing_else_passes_for_one() {
        let cubins = [("one".to_owned(), vec![1, 2, 3]), ("other".to_owned(), vec![])];
        let program = b"some program".to_vec();
        let file = [program.clone(), packed(&cubins)].concat();
        let read =
            |bytes: &[u8]| read_end(&mut Cursor::new(bytes.to_vec())).and_then(|found| unpacked(&found));
        assert_eq!(read(&file), Some(HashMap::from(cubins)));
        assert_eq!(read(&program), None);
        assert_eq!(read(&file[..file.len() - 1]), None);
        // A length that the file does not have, and lengths inside that the pack does not have.
        assert_eq!(read(&file[20..]), None);
        let mut broken = file;
        broken[program.len()] = 200;
        assert_eq!(read(&broken), None);
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

//! Memory for weights, in huge pages where the system gives them.
//!
//! A matrix of a small model is smaller than a huge page, so matrices are laid side by side in large chunks.
//! On small pages a product of few rows, which does little but read weights, loses a third of its speed to
//! page walks. A chunk is given back when its last matrix is dropped.

use memmap2::MmapMut;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Bytes of a chunk, and the size from which a matrix has one of its own.
const CHUNK_BYTES: usize = 64 << 20;

/// A huge page of x86-64. Where pages are of another size, this is an alignment and no more.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Pieces start on pages of the usual size: a panel's lines then lie the same way in every matrix.
const PIECE_ALIGN: usize = 4096;

/// The chunk that is being filled, and how far; matrices own it.
static CURRENT: Mutex<(Weak<Chunk>, usize)> = Mutex::new((Weak::new(), 0));

/// A piece of memory that nobody else has, zero at first, aligned to [`PIECE_ALIGN`].
pub(super) struct Piece {
    chunk: Arc<Chunk>,
    offset: usize,
    len: usize,
}

struct Chunk {
    map: MmapMut,
    /// Where in the map the first huge page starts.
    start: usize,
    len: usize,
}

impl Piece {
    /// `len` bytes. Memory that is not touched is not taken from the system.
    pub(super) fn new(len: usize) -> std::io::Result<Self> {
        if len >= CHUNK_BYTES {
            return Ok(Self { chunk: Arc::new(Chunk::new(len)?), offset: 0, len });
        }
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let (chunk, offset) = match (current.0.upgrade(), current.1) {
            (Some(chunk), used) if chunk.len - used >= len => (chunk, used),
            _ => (Arc::new(Chunk::new(CHUNK_BYTES)?), 0),
        };
        *current = (Arc::downgrade(&chunk), (offset + len).next_multiple_of(PIECE_ALIGN).min(chunk.len));
        Ok(Self { chunk, offset, len })
    }

    /// Its first byte.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.chunk.map.as_ptr().wrapping_add(self.chunk.start + self.offset)
    }

    /// Its first byte, to write.
    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        // The mapping is writable, and this piece of it has one owner.
        self.as_ptr().cast_mut()
    }

    /// Its length in bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Its bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the range lies inside of the chunk, which lives as long as the piece, and is initialised as
        // all anonymous memory is; it is written through `as_mut_ptr` alone, which borrows the piece mutably.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }
}

impl Chunk {
    fn new(len: usize) -> std::io::Result<Self> {
        let len = len.next_multiple_of(PIECE_ALIGN);
        let map = MmapMut::map_anon(len + HUGE_PAGE_BYTES)?;
        #[cfg(target_os = "linux")]
        map.advise(memmap2::Advice::HugePage).ok(); // A wish: the results are the same without.
        let start = map.as_ptr().addr().next_multiple_of(HUGE_PAGE_BYTES) - map.as_ptr().addr();
        Ok(Self { map, start, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_zero_and_apart() {
        let mut pieces: Vec<Piece> =
            [1, 4096, 5000, CHUNK_BYTES - 1, 0, 7, CHUNK_BYTES].map(|len| Piece::new(len).unwrap()).into();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert_eq!(piece.as_ptr().addr() % PIECE_ALIGN, 0);
            let len = piece.len().min(10_000);
            assert!(piece.bytes()[..len].iter().all(|&byte| byte == 0));
            // SAFETY: the piece is borrowed mutably, and `len` is at most its length.
            unsafe { piece.as_mut_ptr().write_bytes(i as u8 + 1, len) };
        }
        for (i, piece) in pieces.iter().enumerate() {
            let len = piece.len().min(10_000);
            assert!(piece.bytes()[..len].iter().all(|&byte| byte == i as u8 + 1));
        }
    }
}

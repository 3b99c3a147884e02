//! What things take of a GPU's memory, to be known before anything is put there.

use super::Cuda;
use super::operations::swiglu_columns;

/// Memory as the driver hands it out. Small pieces share a block of 2 MiB, larger ones are whole blocks. NVIDIA
/// promises neither; it is what every driver for 8.0 and later does.
pub fn cuda_allocated_bytes(bytes: u64) -> u64 {
    let granule = if bytes < SMALL_BYTES { PIECE_BYTES } else { BLOCK_BYTES };
    bytes.max(1).next_multiple_of(granule)
}

/// Memory that the products of a SwiGLU are kept in, for so many rows of an FFN of so many columns.
pub fn cuda_swiglu_bytes(rows: usize, width: usize) -> u64 {
    2 * cuda_allocated_bytes(
        (rows * swiglu_columns(rows, width, Cuda::FFN_COLUMNS) * size_of::<f32>()) as u64,
    )
}

const PIECE_BYTES: u64 = 512;
const SMALL_BYTES: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_pieces_are_whole_blocks() {
        assert_eq!([0, 1, 513, 1 << 20].map(cuda_allocated_bytes), [512, 512, 1024, 2 << 20]);
        assert_eq!(cuda_allocated_bytes((2 << 20) + 1), 4 << 20);
        // 512 rows of Ultra's widest FFN: two products of 53,248 columns, 109,051,904 bytes or 52 blocks each.
        assert_eq!(cuda_swiglu_bytes(512, 425_984), 2 * 52 * (2 << 20));
    }
}

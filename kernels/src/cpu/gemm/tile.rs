//! The register tile: what a SIMD level has to offer, and the sizes all of them share.
//!
//! A tile is up to [`MR`] rows of x times up to [`NR`] columns of one panel, in AMX a column of such tiles. Its sums
//! live in registers and run through K in order, one chain per element; where K is cut into chunks, the f32 sums are stored and
//! taken up again, which keeps their bits. So an element's bits depend on its row of x and its row of w
//! alone.

#[cfg(target_arch = "x86_64")]
use super::operand::LINE_BYTES;
#[cfg(target_arch = "x86_64")]
use super::plan::{GROUP_TILES, tile_bytes};
use crate::backend::WeightType;
use crate::cpu::simd::Simd;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::has_vnni;

/// Columns of a panel: four 512-bit registers of f32 sums.
pub(super) const NR: usize = 64;

/// Rows of a tile. With NR columns in AVX-512:
/// * 6 · 4 = 24 registers of sums, 4 of weights, 1 or 2 of x: 30 of 32;
/// * 24 independent sums; two units with a latency of 4 to 6 cycles need 8 to 12;
/// * 4 + 6 = 10 loads for 24 products, where two loads and two products fit in a cycle.
pub(super) const MR: usize = 6;

/// Terms that the loops of AVX-512 and AVX2 take at once, so that they need no tail: K is padded to more.
pub(super) const KR: usize = 8;

/// Bytes of a group: NR columns of one k in f32, of two k in bf16, of four in integers of 8 bits.
pub(super) const GROUP_BYTES: usize = 256;

/// The narrowest piece of a panel that a tile may be: one 512-bit register.
pub(super) const PIECE_COLS: usize = 16;

/// Sums of a tile of the levels below AMX, `[MR, NR]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [f32; MR * NR]);

/// How large the tiles of a level are, with weights of a type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Most rows of a tile.
    pub(super) rows: usize,
    /// Most columns of a tile: those of a panel that lie side by side.
    pub(super) strip: usize,
    /// The narrowest piece of a panel that a tile may be.
    pub(super) narrowest: usize,
    /// Terms that the tile's loop takes at once.
    pub(super) step: usize,
    /// Bytes of a group, or of four lines, that a tile prefetches at once.
    pub(super) prefetch_bytes: usize,
    /// Most tiles of a unit: chunk by chunk of K, they share what is unpacked.
    pub(super) group_tiles: usize,
    /// Whether x is in f32, and weights of a chunk of K are widened to that for a group of tiles, and not in each.
    pub(super) widens: bool,
    /// Whether tiles are registers of AMX.
    pub(super) is_amx: bool,
}

impl Geometry {
    /// The tiles of a level.
    pub(super) fn new(simd: Simd, kind: WeightType) -> Self {
        #[cfg(target_arch = "x86_64")]
        if simd == Simd::Amx && kind != WeightType::F32 {
            return Self {
                rows: match kind {
                    // Each tile's sums are scaled for every group of K, and are to stay in L1.
                    WeightType::Int4Weight => super::amx::BLOCK_ROWS,
                    _ => super::amx::MAX_ROWS,
                },
                strip: super::amx::BLOCK_COLS,
                narrowest: super::amx::BLOCK_COLS,
                step: LINE_BYTES / tile_bytes(kind),
                prefetch_bytes: 256,
                group_tiles: GROUP_TILES,
                widens: false,
                is_amx: true,
            };
        }
        let below_amx = Self {
            rows: MR,
            strip: NR,
            narrowest: PIECE_COLS,
            step: KR,
            prefetch_bytes: GROUP_BYTES,
            group_tiles: GROUP_TILES,
            widens: false,
            is_amx: false,
        };
        #[cfg(target_arch = "x86_64")]
        if simd == Simd::Avx2
            && matches!(kind, WeightType::Bf16 | WeightType::Int8Weight | WeightType::Int4Weight)
        {
            return Self { group_tiles: super::avx2::GROUP_TILES, widens: true, ..below_amx };
        }
        let _ = (simd, kind);
        below_amx
    }

    /// Numbers of a tile's sums.
    pub(super) fn sums(&self) -> usize {
        self.rows * self.strip
    }
}

/// Sums in integers over a part of a block of K, without scales. Only AMX cuts blocks.
#[derive(Clone, Copy)]
pub(super) struct OpenBlock {
    /// `[rows, strip]`, with room for whole registers of rows; not looked at where the tile has all of its block.
    pub(super) sums: *mut i32,
    /// Whether they hold the sums over the block's earlier terms, and the bias with them.
    pub(super) is_begun: bool,
    /// Whether the tile's sums go there, for a later one to go on with, and not to the destination.
    pub(super) is_open: bool,
}

impl OpenBlock {
    /// Of a tile that has all of its block.
    pub(super) const NONE: Self = Self { sums: std::ptr::null_mut(), is_begun: false, is_open: false };
}

/// One call of a kernel: `c = [init +] a · b`, or `c += [init +] a · b`.
///
/// In integers it is `c = [init +] f32(bias + a · b) · (row_scales · scales)`, where `a` is without a sign, and nothing is
/// added to `c`.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// x, `[rows, k]` in the product's number type, aligned to 4 bytes; for integers each 128 above itself.
    pub(super) a: *const u8,
    /// Bytes from row to row of x.
    pub(super) a_stride: usize,
    /// The panel, or what of it was unpacked, from the first k of the chunk and the first column of the piece on, aligned to
    /// 64 bytes.
    pub(super) b: *const u8,
    /// Terms of the sums, a multiple of the geometry's step.
    pub(super) k: usize,
    /// At least 1.
    pub(super) rows: usize,
    /// Rows of a register of AMX; the other levels do not look at it.
    pub(super) register_rows: usize,
    /// 16, 32 or 64.
    pub(super) cols: usize,
    /// For products in integers, what the sums over a block of K start from, `[cols]`; otherwise not looked at.
    pub(super) bias: *const i32,
    /// For those, where in its block the chunk is.
    pub(super) integers: OpenBlock,
    /// For those, what the sums over the block are multiplied with: the columns' factors, `[cols]`,
    pub(super) scales: *const f32,
    /// and the rows', `[rows]`.
    pub(super) row_scales: *const f32,
    /// The sums over earlier chunks, `[rows, strip]`; null for the first chunk.
    pub(super) init: *const f32,
    /// Destination, `[rows, cols]`.
    pub(super) c: *mut f32,
    /// Elements from row to row of the destination.
    pub(super) c_stride: usize,
    /// Whether to add the finished sums to what the destination holds.
    pub(super) is_added: bool,
    /// Weights that will be needed later, to be brought into the L2 cache; may point anywhere.
    pub(super) prefetch: *const u8,
    /// Groups, in AMX fours of lines by all blocks of rows together (one of each of four streams), to prefetch from there on for every step of the
    /// loop.
    pub(super) prefetch_groups: usize,
}

impl Tile {
    /// The same from another column on: what lies column by column is moved, but for the panel.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(super) fn of_columns(&self, first: usize) -> Self {
        let moved = |at: *const f32| if at.is_null() { at } else { at.wrapping_add(first) };
        Self { scales: moved(self.scales), init: moved(self.init), c: self.c.wrapping_add(first), ..*self }
    }
}

/// Computes a tile.
///
/// # Safety
/// The tile's pointers are valid for its shape, and the processor has the level of the function.
pub(super) type TileFn = unsafe fn(&Tile);

/// Replaces `gate` by `silu(gate) * up`; both `[len]`, a multiple of 16.
///
/// # Safety
/// Both pointers are valid for `len` numbers, and the processor has the level of the function.
pub(super) type SwigluFn = unsafe fn(gate: *mut f32, up: *const f32, len: usize);

/// The functions of a SIMD level for a number type.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub(super) tile: TileFn,
    pub(super) swiglu: SwigluFn,
    pub(super) geometry: Geometry,
}

impl Kernel {
    /// The kernel of a level, which the caller knows to be available, for weights of a type.
    pub(super) fn new(simd: Simd, kind: WeightType) -> Self {
        debug_assert!(simd.is_available(), "{} is not available", simd.name());
        let (tile, swiglu): (TileFn, SwigluFn) = match simd {
            #[cfg(target_arch = "x86_64")]
            Simd::Amx => (amx_tile(kind), super::avx512::swiglu),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => (avx512_tile(kind), super::avx512::swiglu),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => (avx2_tile(kind), super::avx2::swiglu),
            _ => (portable_tile(kind), super::portable::swiglu),
        };
        Self { tile, swiglu, geometry: Geometry::new(simd, kind) }
    }

    /// That of 4-bit weights with zero points, which are taken off what has been unpacked to bf16: its tiles read nothing else.
    pub(super) fn with_zeros(simd: Simd) -> Self {
        let Self { swiglu, geometry, .. } = Self::new(simd, WeightType::Int4Weight);
        let Self { tile, .. } = Self::new(simd, WeightType::Bf16);
        Self { tile, swiglu, geometry: Geometry { widens: false, ..geometry } }
    }
}

#[cfg(target_arch = "x86_64")]
fn amx_tile(kind: WeightType) -> TileFn {
    match kind {
        WeightType::F32 => super::avx512::tile_f32,
        WeightType::Bf16 | WeightType::Fp8 | WeightType::Int8Weight | WeightType::Int4Weight => {
            super::amx::tile_bf16
        }
        WeightType::Int8 => super::amx::tile_int8,
    }
}

#[cfg(target_arch = "x86_64")]
fn avx512_tile(kind: WeightType) -> TileFn {
    match kind {
        WeightType::F32 => super::avx512::tile_f32,
        WeightType::Bf16 | WeightType::Fp8 | WeightType::Int8Weight | WeightType::Int4Weight => {
            super::avx512::tile_bf16
        }
        WeightType::Int8 if has_vnni() => super::avx512::tile_int8,
        // Integers are exact: the results are the same.
        WeightType::Int8 => super::avx2::tile_int8,
    }
}

#[cfg(target_arch = "x86_64")]
fn avx2_tile(kind: WeightType) -> TileFn {
    match kind {
        WeightType::F32 => super::avx2::tile_f32,
        WeightType::Bf16 | WeightType::Fp8 => super::avx2::tile_bf16,
        WeightType::Int8 => super::avx2::tile_int8,
        WeightType::Int8Weight => super::avx2::tile_int8_weight,
        WeightType::Int4Weight => super::avx2::tile_int4_weight,
    }
}

fn portable_tile(kind: WeightType) -> TileFn {
    match kind {
        WeightType::F32 => super::portable::tile_f32,
        WeightType::Bf16 | WeightType::Fp8 | WeightType::Int8Weight | WeightType::Int4Weight => {
            super::portable::tile_bf16
        }
        WeightType::Int8 => super::portable::tile_int8,
    }
}

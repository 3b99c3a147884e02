//! The register tile: what a SIMD level has to offer, and the sizes all of them share.
//!
//! A tile is up to [`MR`] rows of x times up to [`NR`] columns of one panel. Its sums live in registers and
//! run through K in order, one chain per element; where K is cut into chunks, the f32 sums are stored and
//! taken up again, which keeps their bits. So an element's bits depend on its row of x and its row of w
//! alone.

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

/// K is padded to a multiple of this, so that the kernels' loops need no tail.
pub(super) const KR: usize = 8;

/// Bytes of a group: NR columns of one k in f32, of two k in bf16, of four in integers of 8 bits.
pub(super) const GROUP_BYTES: usize = 256;

/// The narrowest piece of a panel that a tile may be: one 512-bit register.
pub(super) const PIECE_COLS: usize = 16;

/// A tile's sums while they are not in registers, `[MR, NR]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [f32; MR * NR]);

/// One call of a kernel: `c = [init +] a · b`, or `c += [init +] a · b`.
///
/// In integers it is `c = [init +] f32(bias + a · b)`, where `a` is without a sign, and nothing is added.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// x, `[rows, k]` in the product's number type, aligned to 4 bytes; for integers each 128 above itself.
    pub(super) a: *const u8,
    /// Bytes from row to row of x.
    pub(super) a_stride: usize,
    /// The panel from the first k of the chunk and the first column of the piece on, aligned to 64 bytes.
    pub(super) b: *const u8,
    /// Terms of the sums, a multiple of [`KR`].
    pub(super) k: usize,
    /// 1 ..= MR.
    pub(super) rows: usize,
    /// 16, 32 or 64.
    pub(super) cols: usize,
    /// For products in integers, what the sums over the chunk start from, `[cols]`; otherwise not looked at.
    pub(super) bias: *const i32,
    /// The sums over earlier chunks, `[rows, NR]`; null for the first chunk.
    pub(super) init: *const f32,
    /// Destination, `[rows, cols]`.
    pub(super) c: *mut f32,
    /// Elements from row to row of the destination.
    pub(super) c_stride: usize,
    /// Whether to add the finished sums to what the destination holds.
    pub(super) is_added: bool,
    /// Weights that will be needed later, to be brought into the L2 cache; may point anywhere.
    pub(super) prefetch: *const u8,
    /// Groups to prefetch from there on for every KR terms.
    pub(super) prefetch_groups: usize,
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
}

impl Kernel {
    /// The kernel of a level, which the caller knows to be available, for weights of a type.
    pub(super) fn new(simd: Simd, kind: WeightType) -> Self {
        debug_assert!(simd.is_available(), "{} is not available", simd.name());
        match simd {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => Self { tile: avx512_tile(kind), swiglu: super::avx512::swiglu },
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => Self { tile: avx2_tile(kind), swiglu: super::avx2::swiglu },
            _ => Self { tile: portable_tile(kind), swiglu: super::portable::swiglu },
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn avx512_tile(kind: WeightType) -> TileFn {
    match kind {
        WeightType::F32 => super::avx512::tile_f32,
        WeightType::Bf16 | WeightType::Int8Weight | WeightType::Int4Weight => super::avx512::tile_bf16,
        WeightType::Int8 if has_vnni() => super::avx512::tile_int8,
        // Integers are exact: the results are the same.
        WeightType::Int8 => super::avx2::tile_int8,
    }
}

#[cfg(target_arch = "x86_64")]
fn avx2_tile(kind: WeightType) -> TileFn {
    match kind {
        WeightType::F32 => super::avx2::tile_f32,
        WeightType::Bf16 | WeightType::Int8Weight | WeightType::Int4Weight => super::avx2::tile_bf16,
        WeightType::Int8 => super::avx2::tile_int8,
    }
}

fn portable_tile(kind: WeightType) -> TileFn {
    match kind {
        WeightType::F32 => super::portable::tile_f32,
        WeightType::Bf16 | WeightType::Int8Weight | WeightType::Int4Weight => super::portable::tile_bf16,
        WeightType::Int8 => super::portable::tile_int8,
    }
}

//! The tile in AMX: `TDPBF16PS` multiplies 16 rows of x, 32 terms long, with 16 columns of weights.
//!
//! A tile is walked in blocks of 32 rows by 32 columns: four registers of sums, two of x, two of weights. A step of 32
//! terms takes 4 products of 16 cycles each and 4 loads of 8 from L1: the products are what it waits for. The weights
//! of a tile stay in L1 from block to block. x comes from L2, by loads that are not to push the weights out.
//!
//! `TDPBF16PS` sums the even terms of a step and the odd ones apart, adds both, and adds that to what it has; it
//! takes denormals for zeros and makes zeros of them. That is the level's numeric profile. A step is always the same
//! 32 terms, so that a row's bits depend on K alone.
//!
//! Rust has no AMX instructions yet, so they are written in assembly. The compiler uses no tile register of its own
//! accord; each block of assembly names all it overwrites and leaves nothing in them for the next one. Their shape is
//! a state of the thread as the control word of floating point is: [`Registers`] sets it and takes it back.

mod peak;
mod registers;

use super::operand::LINE_BYTES;
use super::tile::Tile;
use crate::backend::WeightType;
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::{MaybeUninit, offset_of};

pub(super) use peak::{ROUND_FLOPS, bf16_products, integer_products};
pub(crate) use registers::Registers;

/// Rows of a register.
const ROWS: usize = 16;

/// Rows of a block: two registers.
pub(super) const BLOCK_ROWS: usize = 2 * ROWS;

/// Columns of a block, and of a tile: two registers.
pub(super) const BLOCK_COLS: usize = 32;

/// Rows of a tile: weights that are read once serve them all. More would only make fewer units of work.
pub(super) const MAX_ROWS: usize = 256;

/// Bytes of a row of a register: the terms of a block.
const ROW_BYTES: usize = 64;

/// Bytes from one row of weights to the next, a word for each column, and of a row of sums.
const STRIP_BYTES: usize = BLOCK_COLS * 4;

/// What the assembly works on; strides in bytes.
#[repr(C)]
struct Block {
    /// `[rows, 64 * steps]` bytes; the registers' rows are read of each half.
    a: *const u8,
    a_stride: usize,
    /// `[16 * steps, 32]` words.
    b: *const u8,
    steps: usize,
    /// What sums start from, `[rows, 32]`; null for zeros.
    init: *const u8,
    init_stride: usize,
    /// `[rows, 32]`
    c: *mut u8,
    c_stride: usize,
    /// Fours of lines are prefetched in every step, from here on: a line of each of four streams.
    prefetch: *const u8,
    prefetch_fours: usize,
    /// Bytes from stream to stream.
    prefetch_stream: usize,
    /// Two lines of so many rows are asked for in every step, to be written, from here on: where results go.
    own: *const u8,
    own_rows: usize,
    /// Bytes from row to row.
    own_stride: usize,
}

/// `c = [init +] a · b` for one or two registers of rows.
macro_rules! multiply {
    ($two:ident, $one:ident, $product:literal) => {
        /// Two registers of rows.
        unsafe fn $two(block: &Block) {
            // SAFETY: the caller vouches for the pointers and for registers in their shapes.
            unsafe {
                asm!(
                    "mov {x}, [{block} + {init}]",
                    "test {x}, {x}",
                    "jz 2f",
                    "mov {y}, [{block} + {init_stride}]",
                    "tileloadd tmm0, [{x} + {y}*1]",
                    "tileloadd tmm1, [{x} + {y}*1 + 64]",
                    "mov {a1}, {y}",
                    "shl {a1}, 4",
                    "add {x}, {a1}",
                    "tileloadd tmm2, [{x} + {y}*1]",
                    "tileloadd tmm3, [{x} + {y}*1 + 64]",
                    "jmp 3f",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "3:",
                    "mov {a1}, {a_stride}",
                    "shl {a1}, 4",
                    "add {a1}, {a}",
                    "test {steps}, {steps}",
                    "jz 7f",
                    "4:",
                    "tileloadd tmm6, [{b} + {b_stride}*1]",
                    "tileloaddt1 tmm4, [{a} + {a_stride}*1]",
                    concat!($product, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm7, [{b} + {b_stride}*1 + 64]",
                    concat!($product, " tmm1, tmm4, tmm7"),
                    "tileloaddt1 tmm5, [{a1} + {a_stride}*1]",
                    concat!($product, " tmm2, tmm5, tmm6"),
                    concat!($product, " tmm3, tmm5, tmm7"),
                    "add {a}, 64",
                    "add {a1}, 64",
                    "add {b}, 2048",
                    "mov {x}, {fours}",
                    "test {x}, {x}",
                    "jz 6f",
                    "5:",
                    "lea {y}, [{prefetch} + {stream}*2]",
                    "prefetcht1 [{prefetch}]",
                    "prefetcht1 [{prefetch} + {stream}]",
                    "prefetcht1 [{y}]",
                    "prefetcht1 [{y} + {stream}]",
                    "add {prefetch}, 64",
                    "dec {x}",
                    "jnz 5b",
                    "6:",
                    "mov {x}, [{block} + {own_rows}]",
                    "test {x}, {x}",
                    "jz 9f",
                    "8:",
                    "prefetchw [{own}]",
                    "prefetchw [{own} + 64]",
                    "add {own}, [{block} + {own_stride}]",
                    "dec {x}",
                    "jnz 8b",
                    "9:",
                    "dec {steps}",
                    "jnz 4b",
                    "7:",
                    "mov {x}, [{block} + {c}]",
                    "mov {y}, [{block} + {c_stride}]",
                    "tilestored [{x} + {y}*1], tmm0",
                    "tilestored [{x} + {y}*1 + 64], tmm1",
                    "mov {a1}, {y}",
                    "shl {a1}, 4",
                    "add {x}, {a1}",
                    "tilestored [{x} + {y}*1], tmm2",
                    "tilestored [{x} + {y}*1 + 64], tmm3",
                    block = in(reg) block,
                    a = inout(reg) block.a => _,
                    a1 = out(reg) _,
                    a_stride = in(reg) block.a_stride,
                    b = inout(reg) block.b => _,
                    b_stride = in(reg) STRIP_BYTES,
                    steps = inout(reg) block.steps => _,
                    prefetch = inout(reg) block.prefetch => _,
                    fours = in(reg) block.prefetch_fours,
                    stream = in(reg) block.prefetch_stream,
                    own = inout(reg) block.own => _,
                    own_rows = const offset_of!(Block, own_rows),
                    own_stride = const offset_of!(Block, own_stride),
                    x = out(reg) _,
                    y = out(reg) _,
                    init = const offset_of!(Block, init),
                    init_stride = const offset_of!(Block, init_stride),
                    c = const offset_of!(Block, c),
                    c_stride = const offset_of!(Block, c_stride),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }

        /// One register of rows.
        unsafe fn $one(block: &Block) {
            // SAFETY: as above.
            unsafe {
                asm!(
                    "mov {x}, [{block} + {init}]",
                    "test {x}, {x}",
                    "jz 2f",
                    "mov {y}, [{block} + {init_stride}]",
                    "tileloadd tmm0, [{x} + {y}*1]",
                    "tileloadd tmm1, [{x} + {y}*1 + 64]",
                    "jmp 3f",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "3:",
                    "test {steps}, {steps}",
                    "jz 7f",
                    "4:",
                    "tileloadd tmm6, [{b} + {b_stride}*1]",
                    "tileloaddt1 tmm4, [{a} + {a_stride}*1]",
                    concat!($product, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm7, [{b} + {b_stride}*1 + 64]",
                    concat!($product, " tmm1, tmm4, tmm7"),
                    "add {a}, 64",
                    "add {b}, 2048",
                    "mov {x}, {fours}",
                    "test {x}, {x}",
                    "jz 6f",
                    "5:",
                    "lea {y}, [{prefetch} + {stream}*2]",
                    "prefetcht1 [{prefetch}]",
                    "prefetcht1 [{prefetch} + {stream}]",
                    "prefetcht1 [{y}]",
                    "prefetcht1 [{y} + {stream}]",
                    "add {prefetch}, 64",
                    "dec {x}",
                    "jnz 5b",
                    "6:",
                    "mov {x}, [{block} + {own_rows}]",
                    "test {x}, {x}",
                    "jz 9f",
                    "8:",
                    "prefetchw [{own}]",
                    "prefetchw [{own} + 64]",
                    "add {own}, [{block} + {own_stride}]",
                    "dec {x}",
                    "jnz 8b",
                    "9:",
                    "dec {steps}",
                    "jnz 4b",
                    "7:",
                    "mov {x}, [{block} + {c}]",
                    "mov {y}, [{block} + {c_stride}]",
                    "tilestored [{x} + {y}*1], tmm0",
                    "tilestored [{x} + {y}*1 + 64], tmm1",
                    block = in(reg) block,
                    a = inout(reg) block.a => _,
                    a_stride = in(reg) block.a_stride,
                    b = inout(reg) block.b => _,
                    b_stride = in(reg) STRIP_BYTES,
                    steps = inout(reg) block.steps => _,
                    prefetch = inout(reg) block.prefetch => _,
                    fours = in(reg) block.prefetch_fours,
                    stream = in(reg) block.prefetch_stream,
                    own = inout(reg) block.own => _,
                    own_rows = const offset_of!(Block, own_rows),
                    own_stride = const offset_of!(Block, own_stride),
                    x = out(reg) _,
                    y = out(reg) _,
                    init = const offset_of!(Block, init),
                    init_stride = const offset_of!(Block, init_stride),
                    c = const offset_of!(Block, c),
                    c_stride = const offset_of!(Block, c_stride),
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

multiply!(two_of_bf16, one_of_bf16, "tdpbf16ps");
multiply!(two_of_integers, one_of_integers, "tdpbusd");

/// A bf16 tile.
///
/// # Safety
/// As [`super::tile::TileFn`]; besides, x can be read for whole registers of rows, and the thread's registers are
/// in the shapes of [`Registers::shape`] for `tile.register_rows`.
pub(super) unsafe fn tile_bf16(tile: &Tile) {
    let steps = tile.k * 2 / ROW_BYTES;
    let prefetch = Prefetch::new(tile, steps);
    for first in (0..tile.rows).step_by(BLOCK_ROWS) {
        let rows = BLOCK_ROWS.min(tile.rows - first);
        let mut block = Block::new(tile, first, steps, &prefetch);
        block.init = tile.init_of(first).cast();
        let multiply = if rows > ROWS { two_of_bf16 } else { one_of_bf16 };
        // Registers are stored whole.
        let fits = rows == BLOCK_ROWS || rows == tile.register_rows;
        // SAFETY: the caller vouches for what is read. What is written are rows that the tile has, or the buffer,
        // from which those that it has are taken.
        unsafe {
            let c = tile.c.add(first * tile.c_stride);
            if fits && !tile.is_added {
                (block.c, block.c_stride) = (c.cast(), tile.c_stride * 4);
                if tile.c_stride > BLOCK_COLS {
                    let stride = tile.c_stride * 4;
                    block.ask_for(&Results { start: tile.c.cast_const().cast(), stride }, first);
                }
                multiply(&block);
                continue;
            }
            let mut buffer = MaybeUninit::<Buffer>::uninit();
            block.c = buffer.as_mut_ptr().cast();
            multiply(&block);
            copy(block.c.cast(), c, tile.c_stride, rows, tile.is_added);
        }
    }
}

/// A tile in integers of 8 bits. Their sums are exact, so that they have the bits of every other level.
///
/// # Safety
/// As of [`tile_bf16`].
pub(super) unsafe fn tile_int8(tile: &Tile) {
    if !tile.integers.is_open {
        // SAFETY: the caller's.
        return unsafe {
            for_each_block(tile, WeightType::Int8, &Results::NOWHERE, |first, rows, sums| {
                let c = tile.c.wrapping_add(first * tile.c_stride);
                match sums {
                    Sums::F32(sums) => copy(sums, c, tile.c_stride, rows, false),
                    Sums::I32(sums) => add_integers(sums, tile, first, std::ptr::null(), c, tile.c_stride),
                }
            });
        };
    }
    let steps = tile.k / ROW_BYTES;
    let prefetch = Prefetch::new(tile, steps);
    for first in (0..tile.rows).step_by(BLOCK_ROWS) {
        let mut block = Block::new(tile, first, steps, &prefetch);
        block.start_integers(tile, first);
        block.c = tile.integers.sums.wrapping_add(first * BLOCK_COLS).cast();
        // SAFETY: the caller vouches for what is read, and for room for whole registers of sums.
        unsafe { if tile.rows - first > ROWS { two_of_integers(&block) } else { one_of_integers(&block) } }
    }
}

/// Sums of a block, or of a row of one, `[rows, 32]`.
#[derive(Clone, Copy)]
pub(super) enum Sums {
    F32(*const f32),
    /// Exact, over all of K, and without their scales.
    I32(*const i32),
}

/// Calls `take(first row of the tile, rows, sums)` for every block of a tile, whose destination is not looked at.
///
/// A block's sums are taken after the products of the next one have been given out: what is done to them does not wait for
/// those, and fills the time that they take.
///
/// # Safety
/// As of [`tile_bf16`]; `kind` is bf16 or int8. Of integers the tile is the last of its block of K.
pub(super) unsafe fn for_each_block(
    tile: &Tile,
    kind: WeightType,
    results: &Results,
    take: impl Fn(usize, usize, Sums),
) {
    let is_integers = kind == WeightType::Int8;
    let steps = tile.k * if is_integers { 1 } else { 2 } / ROW_BYTES;
    let prefetch = Prefetch::new(tile, steps);
    let mut buffers = [const { MaybeUninit::<Buffer>::uninit() }; 2];
    let finish = |first: usize, rows: usize, sums: *mut f32| {
        let init = tile.init_of(first);
        if !is_integers {
            return take(first, rows, Sums::F32(sums));
        }
        if init.is_null() {
            return take(first, rows, Sums::I32(sums.cast()));
        }
        // SAFETY: the caller vouches for the tile; the buffer holds a whole block.
        unsafe { add_integers(sums.cast(), tile, first, init, sums, BLOCK_COLS) };
        take(first, rows, Sums::F32(sums));
    };
    let mut waiting = None;
    for (i, first) in (0..tile.rows).step_by(BLOCK_ROWS).enumerate() {
        let rows = BLOCK_ROWS.min(tile.rows - first);
        let sums = buffers[i % 2].as_mut_ptr().cast::<f32>();
        let mut block = Block::new(tile, first, steps, &prefetch);
        block.c = sums.cast();
        block.ask_for(results, first);
        // SAFETY: the caller vouches for what is read; the buffer holds a whole block.
        unsafe {
            if is_integers {
                block.start_integers(tile, first);
                if rows > ROWS { two_of_integers(&block) } else { one_of_integers(&block) }
            } else {
                block.init = tile.init_of(first).cast();
                if rows > ROWS { two_of_bf16(&block) } else { one_of_bf16(&block) }
            }
        }
        if let Some((first, rows, sums)) = waiting.replace((first, rows, sums)) {
            finish(first, rows, sums);
        }
    }
    if let Some((first, rows, sums)) = waiting {
        finish(first, rows, sums);
    }
}

impl Tile {
    /// The sums over earlier chunks of rows from `first` on.
    fn init_of(&self, first: usize) -> *const f32 {
        if self.init.is_null() { self.init } else { self.init.wrapping_add(first * BLOCK_COLS) }
    }
}

impl Block {
    /// What sums of integers of a tile's rows from `first` on start from.
    fn start_integers(&mut self, tile: &Tile, first: usize) {
        (self.init, self.init_stride) = match tile.integers.is_begun {
            true => (tile.integers.sums.wrapping_add(first * BLOCK_COLS).cast_const().cast(), STRIP_BYTES),
            false => (tile.bias.cast(), 0), // The same for every row.
        };
    }

    /// A tile's rows from `first` on, with sums that start from zero and destination rows of a strip.
    fn new(tile: &Tile, first: usize, steps: usize, prefetch: &Prefetch) -> Self {
        let (prefetch_stream, (prefetch, prefetch_fours)) =
            (prefetch.stream, prefetch.of_block(first / BLOCK_ROWS));
        Self {
            a: tile.a.wrapping_add(first * tile.a_stride),
            a_stride: tile.a_stride,
            b: tile.b,
            steps,
            init: std::ptr::null(),
            init_stride: STRIP_BYTES,
            c: std::ptr::null_mut(),
            c_stride: STRIP_BYTES,
            prefetch,
            prefetch_fours,
            prefetch_stream,
            own: std::ptr::null(),
            own_rows: 0,
            own_stride: 0,
        }
    }

    /// Asks for the two lines of 32 results of each row from `first` on.
    ///
    /// Such a line was last in another core's cache, mostly: to write to it takes it from there, one store after another
    /// unless it has been asked for.
    fn ask_for(&mut self, results: &Results, first: usize) {
        if results.start.is_null() {
            return;
        }
        self.own = results.start.wrapping_add(first * results.stride);
        self.own_rows = BLOCK_ROWS.div_ceil(self.steps.max(1));
        self.own_stride = results.stride;
    }
}

/// Where the results of a tile's rows go, as far as cache lines are concerned.
pub(super) struct Results {
    /// The first row's; null where nothing is to be asked for.
    pub(super) start: *const u8,
    /// Bytes from row to row.
    pub(super) stride: usize,
}

impl Results {
    /// No lines are asked for.
    pub(super) const NOWHERE: Self = Self { start: std::ptr::null(), stride: 0 };
}

/// How a tile's blocks share what is to be prefetched.
///
/// It is cut into four streams that are asked for side by side. One line after the other holds up the loads of x: a core
/// has few lines under way, and those that come from memory keep their places for long. Of streams the processor
/// itself fetches the next lines, so that most hints find theirs in L2 already (measured: 10 to 15 % less time of
/// products of 512 rows).
struct Prefetch {
    from: *const u8,
    /// Fours of lines for every step of a block; the first blocks have them.
    fours: usize,
    blocks: usize,
    steps: usize,
    /// Bytes from stream to stream.
    stream: usize,
}

impl Prefetch {
    fn new(tile: &Tile, steps: usize) -> Self {
        let (blocks, all) = (tile.rows.div_ceil(BLOCK_ROWS), tile.prefetch_groups);
        // Two blocks are little more than the time of memory: the earlier the better. Otherwise evenly.
        let fours = if blocks <= 2 { all } else { all.div_ceil(blocks) };
        let (blocks, stream) = (all.div_ceil(fours.max(1)), steps * all * LINE_BYTES);
        Self { from: tile.prefetch, fours, blocks, steps, stream }
    }

    fn of_block(&self, block: usize) -> (*const u8, usize) {
        let is_one = block < self.blocks;
        (
            self.from.wrapping_add(block * self.steps * self.fours * LINE_BYTES),
            if is_one { self.fours } else { 0 },
        )
    }
}

/// A block's sums.
#[repr(C, align(64))]
struct Buffer([f32; BLOCK_ROWS * BLOCK_COLS]);

/// `c = sums`, or `c += sums`; `sums: [rows, 32]`, `c: [rows, 32]` with `c_stride` numbers from row to row.
#[target_feature(enable = "avx512f")]
unsafe fn copy(sums: *const f32, c: *mut f32, c_stride: usize, rows: usize, is_added: bool) {
    for row in 0..rows {
        for col in (0..BLOCK_COLS).step_by(16) {
            // SAFETY: the caller vouches for both.
            unsafe {
                let c = c.add(row * c_stride + col);
                let sum = _mm512_loadu_ps(sums.add(row * BLOCK_COLS + col));
                let sum = if is_added { _mm512_add_ps(_mm512_loadu_ps(c), sum) } else { sum };
                _mm512_storeu_ps(c, sum);
            }
        }
    }
}

/// `c = [init +] f32(sums) · (row_scales · scales)` for the block of a tile's rows from `first` on; `sums, init: [rows, 32]`,
/// `c: [rows, 32]` with `c_stride` numbers from row to row.
///
/// # Safety
/// All pointers, those of the tile too, are valid for the block, and the processor has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn add_integers(
    sums: *const i32,
    tile: &Tile,
    first: usize,
    init: *const f32,
    c: *mut f32,
    c_stride: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let scales = [0, 16].map(|col| _mm512_loadu_ps(tile.scales.add(col)));
        for row in 0..BLOCK_ROWS.min(tile.rows - first) {
            let row_scale = _mm512_set1_ps(*tile.row_scales.add(first + row));
            for (col, scales) in [0, 16].into_iter().zip(scales) {
                let sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums.add(row * BLOCK_COLS + col).cast()));
                let mut sum = _mm512_mul_ps(sum, _mm512_mul_ps(row_scale, scales));
                if !init.is_null() {
                    sum = _mm512_add_ps(_mm512_loadu_ps(init.add(row * BLOCK_COLS + col)), sum);
                }
                _mm512_storeu_ps(c.add(row * c_stride + col), sum);
            }
        }
    }
}

//! Products whose last step is taken block by block, while a block's sums are still in L1.
//!
//! In AMX a block of 32 x 32 sums leaves the tile registers for a buffer of 4 KiB. From there they go straight
//! to where they belong, scaled or gated on the way: a strip's sums, 32 KiB, would else go out to L2 and come back once for
//! each step. The bits are those of the other way.

use std::arch::x86_64::*;

use super::{Output, Product};
use crate::cpu::exp::avx512::rough_exp2;
use crate::cpu::gemm::amx::{self, BLOCK_COLS, Results, Sums};
use crate::cpu::gemm::operand::OperandWriter;
use crate::cpu::gemm::plan::Unit;
use crate::cpu::gemm::scratch::with_sums;
use crate::cpu::pool::ThreadPool;

/// Columns of a register.
const LANES: usize = 16;

/// A block's sums, and where they belong.
struct Block {
    sums: Sums,
    piece: usize,
    first_row: usize,
    rows: usize,
}

impl<const N: usize> Product<'_, N> {
    /// Calls `take` with the sums of every block of a unit by matrix `m`, integers without their scales; they will go to
    /// `results(row, piece)`.
    ///
    /// # Safety
    /// `scratch` has room for the unit's tiles, and the level is AMX with weights that are read where they lie.
    unsafe fn sweep_blocks(
        &self,
        unit: &Unit,
        m: usize,
        scratch: *mut f32,
        results: impl Fn(usize, usize) -> Results,
        take: impl Fn(Block),
    ) {
        // SAFETY: the caller's; the tiles are those of a sweep.
        unsafe {
            self.sweep_with(unit, m, scratch, |tile, piece, index| {
                let start = self.plan.rows(index).start;
                amx::for_each_block(tile, self.kind, &results(start, piece), |first, rows, sums| {
                    take(Block { sums, piece, first_row: start + first, rows });
                });
            });
        }
    }

    /// What a row's integers are multiplied with beside the columns' scales, where all of K is one block.
    fn row_scale(&self, row: usize) -> f32 {
        self.x.integers.map_or(1.0, |integers| integers.scales(0)[row])
    }

    /// A block's sums by matrix `m`, with what their columns are still to be multiplied with.
    fn factor(&self, m: usize, block: &Block, sums: Sums) -> Factor {
        let scales = match sums {
            Sums::I32(_) => self.scales(m, block.piece, 0),
            Sums::F32(_) => std::ptr::null(),
        };
        Factor { sums, scales, valid: self.valid_cols(block.piece) }
    }

    /// Where in the scratch a block's sums lie.
    fn place_of(&self, unit: &Unit, block: &Block) -> usize {
        let tile = unit.tiles.clone().find(|&tile| self.plan.rows(tile).contains(&block.first_row));
        let tile = tile.expect("a block is of one of its unit's tiles");
        self.place(unit, block.piece, tile) + (block.first_row - self.plan.rows(tile).start) * BLOCK_COLS
    }
}

impl Product<'_, 1> {
    /// As `write_unit`.
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn write_unit_in_blocks(&self, unit: &Unit, out: Output, is_added: bool) {
        let n = self.weights[0].rows();
        with_sums(self.unit_sums(), |scratch| {
            // SAFETY: the scratch has a place for every tile of a unit; a block's valid columns lie in `out`, and are this
            // unit's alone.
            unsafe {
                let results = |row, piece| {
                    let start = out.at(row * n + self.plan.cols(piece).start).cast_const().cast();
                    Results { start, stride: n * 4 }
                };
                self.sweep_blocks(unit, 0, scratch, results, |block| {
                    let first_col = self.plan.cols(block.piece).start;
                    let to = Rows { at: out.at(block.first_row * n + first_col), step: n };
                    let factor = self.factor(0, &block, block.sums);
                    write_rows(&factor, |row| self.row_scale(row), &block, to, is_added);
                });
            }
        });
    }
}

impl Product<'_, 2> {
    /// As `write_swiglu`: the sums of gate wait in the scratch for those of up.
    pub(super) fn write_swiglu_blocks(&self, pool: &ThreadPool, out: OperandWriter<'_>) {
        self.for_each_unit(pool, |unit| {
            with_sums(2 * self.unit_sums(), |scratch| {
                let for_up = scratch.wrapping_add(self.unit_sums());
                // SAFETY: both scratches have a place for every tile of a unit, and the first sweep fills that of gate. Rows
                // and valid columns lie inside of `out` and are this unit's alone.
                unsafe {
                    self.sweep_to_scratch(&unit, 0, scratch);
                    self.sweep_blocks(
                        &unit,
                        1,
                        for_up,
                        |_, _| Results::NOWHERE,
                        |block| {
                            let gates = scratch.add(self.place_of(&unit, &block)).cast_const();
                            let factors = [
                                self.factor(0, &block, Sums::F32(gates)),
                                self.factor(1, &block, block.sums),
                            ];
                            let to = |row| out.bf16_at(row, self.plan.cols(block.piece).start);
                            gate_rows(&factors, |row| self.row_scale(row), &block, to);
                        },
                    );
                }
            });
        });
    }
}

/// Numbers in rows of `step`.
#[derive(Clone, Copy)]
struct Rows {
    at: *mut f32,
    step: usize,
}

/// A block's sums, of which the first `valid` columns are no padding.
struct Factor {
    sums: Sums,
    /// `[valid]`; null for ones.
    scales: *const f32,
    valid: usize,
}

impl Factor {
    /// Which columns of each half there are.
    fn masks(&self) -> [u16; 2] {
        [0, LANES].map(|first| ((1u32 << self.valid.saturating_sub(first).min(LANES)) - 1) as u16)
    }

    /// The columns' scales, if any.
    ///
    /// # Safety
    /// The processor has AVX-512, and the factor is valid.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn column_scales(&self) -> Option<[__m512; 2]> {
        let [first, second] = self.masks();
        // SAFETY: lanes beyond the valid columns are not read.
        (!self.scales.is_null()).then(|| unsafe {
            let second_at = self.scales.wrapping_add(LANES);
            [_mm512_maskz_loadu_ps(first, self.scales), _mm512_maskz_loadu_ps(second, second_at)]
        })
    }

    /// Half of row `i`, with the last scales.
    ///
    /// # Safety
    /// The processor has AVX-512, and the block has the row.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn half(&self, i: usize, half: usize, row_scale: __m512, scales: Option<[__m512; 2]>) -> __m512 {
        let at = i * BLOCK_COLS + half * LANES;
        // SAFETY: the caller's.
        let sum = unsafe {
            match self.sums {
                Sums::F32(sums) => _mm512_loadu_ps(sums.wrapping_add(at)),
                Sums::I32(sums) => _mm512_cvtepi32_ps(_mm512_loadu_si512(sums.wrapping_add(at).cast())),
            }
        };
        scales.map_or(sum, |scales| _mm512_mul_ps(sum, _mm512_mul_ps(row_scale, scales[half])))
    }
}

/// `to = [to +] sums · (row_scale · scales)`
///
/// # Safety
/// The factor is the block's, `to` has room for its rows and valid columns, and the processor has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn write_rows(
    factor: &Factor,
    row_scale: impl Fn(usize) -> f32,
    block: &Block,
    to: Rows,
    is_added: bool,
) {
    let masks = factor.masks();
    // SAFETY: the caller's.
    unsafe {
        let scales = factor.column_scales();
        for i in 0..block.rows {
            let row_scale = _mm512_set1_ps(row_scale(block.first_row + i));
            for (half, mask) in masks.into_iter().enumerate() {
                let at = to.at.wrapping_add(i * to.step + half * LANES);
                let mut sum = factor.half(i, half, row_scale, scales);
                if is_added {
                    sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sum);
                }
                _mm512_mask_storeu_ps(at, mask, sum);
            }
        }
    }
}

/// `to(row) = silu(gate) ∘ up` in bf16.
///
/// # Safety
/// The factors, gate and up, are the block's, `to` leads to room for the valid columns of each row, and the processor has
/// AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
unsafe fn gate_rows(
    factors: &[Factor; 2],
    row_scale: impl Fn(usize) -> f32,
    block: &Block,
    to: impl Fn(usize) -> *mut u16,
) {
    let [first, second] = factors[0].masks();
    let mask = u32::from(first) | u32::from(second) << 16;
    // SAFETY: the caller's; sums of columns that are padding are zeros.
    unsafe {
        let scales = [factors[0].column_scales(), factors[1].column_scales()];
        let upper = _mm512_loadu_si512(UPPER_HALVES.as_ptr().cast());
        for i in 0..block.rows {
            let row = block.first_row + i;
            let row_scale = _mm512_set1_ps(row_scale(row));
            let mut halves = [_mm512_setzero_si512(); 2];
            for (half, rounded_half) in halves.iter_mut().enumerate() {
                let gate = factors[0].half(i, half, row_scale, scales[0]);
                let up = factors[1].half(i, half, row_scale, scales[1]);
                *rounded_half = rounded(silu_times(gate, up));
            }
            let both = _mm512_permutex2var_epi16(halves[0], upper, halves[1]);
            _mm512_mask_storeu_epi16(to(row).cast(), mask, both);
        }
    }
}

/// `silu(gate) * up` for a result that is rounded to bf16: within 1e-4 of itself for gates from -87 up, a twentieth of
/// bf16's half unit, and in half the time of the exact one. Below, where `silu(gate)` is less than 2e-36, it may be zero.
#[inline]
#[target_feature(enable = "avx512f")]
fn silu_times(gate: __m512, up: __m512) -> __m512 {
    // With the bound first, both hand on a NaN. Beyond the upper one the power is infinite and its inverse zero; at the
    // lower one it adds nothing to 1.
    let x = _mm512_mul_ps(gate, _mm512_set1_ps(-std::f32::consts::LOG2_E));
    let x = _mm512_max_ps(_mm512_set1_ps(-126.0), _mm512_min_ps(_mm512_set1_ps(129.0), x));
    let [m, n] = rough_exp2(x);
    let power = _mm512_scalef_ps(m, n);
    let inverse = _mm512_rcp14_ps(_mm512_add_ps(power, _mm512_set1_ps(1.0)));
    _mm512_mul_ps(_mm512_mul_ps(gate, inverse), up)
}

/// bf16 in the upper halves, as `bf16_bits` has it.
#[inline]
#[target_feature(enable = "avx512f")]
fn rounded(x: __m512) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    _mm512_mask_or_epi32(up, is_nan, bits, _mm512_set1_epi32(0x0040_0000))
}

/// The upper halves of one register's words, then of another's, as `VPERMT2W` finds them.
const UPPER_HALVES: [u16; 32] = {
    let mut places = [0; 32];
    let mut i = 0;
    while i < 32 {
        places[i] = (i as u16 % 16) * 2 + 1 + if i < 16 { 0 } else { 32 };
        i += 1;
    }
    places
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Simd;
    use crate::dtype::bf16_bits;

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn upper_halves(values: [f32; 32]) -> [u16; 32] {
        let mut out = [0; 32];
        // SAFETY: all arrays are as long as what is read or written.
        unsafe {
            let [first, second] = [0, 16].map(|i| rounded(_mm512_loadu_ps(values[i..].as_ptr())));
            let upper = _mm512_loadu_si512(UPPER_HALVES.as_ptr().cast());
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutex2var_epi16(first, upper, second));
        }
        out
    }

    #[test]
    fn sums_are_rounded_as_anywhere_else() {
        if !Simd::Avx512.is_available() {
            return;
        }
        let bits = (0..u32::MAX / 99_731).map(|i| i * 99_731).chain((0..65536).map(|i| i << 16 | 0x8000));
        let values: Vec<f32> = bits.map(f32::from_bits).chain([f32::NAN; 32]).collect();
        for values in values.as_chunks().0 {
            // SAFETY: the level was asked for.
            assert_eq!(unsafe { upper_halves(*values) }, values.map(bf16_bits));
        }
    }

    #[test]
    fn the_gate_is_within_what_is_said() {
        if !Simd::Avx512.is_available() {
            return;
        }
        #[target_feature(enable = "avx512f")]
        unsafe fn at(gate: f32) -> f32 {
            _mm512_cvtss_f32(silu_times(_mm512_set1_ps(gate), _mm512_set1_ps(1.0)))
        }
        // SAFETY: the level was asked for.
        let at = |gate: f32| unsafe { at(gate) };
        for i in -87_000..=80_000 {
            let gate = i as f32 / 1000.0;
            let exact = f64::from(gate) / (1.0 + (-f64::from(gate)).exp());
            assert!((f64::from(at(gate)) - exact).abs() <= 1e-4 * exact.abs(), "{gate}: {}", at(gate));
        }
        assert_eq!([-1e30, 1e30, f32::INFINITY].map(at), [0.0, 1e30, f32::INFINITY]);
        assert!([f32::NAN, f32::NEG_INFINITY].map(at).iter().all(|value| value.is_nan()));
    }
}

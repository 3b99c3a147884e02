//! The register tile of both products of attention: entries of a page times factors of a few rows.

use crate::cpu::lanes::{Lanes, Terms};

/// TILE_ROWS of no level is larger.
pub(super) const MAX_ROWS: usize = 6;

/// Words in a cache line.
const LINE_WORDS: usize = 16;

/// `sums[r] = sums[r] * rescales[r] + Σ entries[step] * factors[r][first_step + step]` over `registers`
/// registers; null for `rescales` starts from zero.
pub(super) struct Product {
    /// `[steps][stride]` words.
    pub(super) entries: *const u32,
    /// Lines to fetch into the cache, one for each that is read; null for none.
    pub(super) ahead: *const u32,
    pub(super) stride: usize,
    pub(super) steps: usize,
    pub(super) registers: usize,
    /// `[rows][factor_stride]`
    pub(super) factors: *const f32,
    pub(super) factor_stride: usize,
    pub(super) first_step: usize,
    /// `[rows][sum_stride]`
    pub(super) sums: *mut f32,
    pub(super) sum_stride: usize,
    pub(super) rescales: *const f32,
}

/// # Safety
/// The pointers are valid for the shape, `1 <= num_rows <= TILE_ROWS`.
#[inline(always)]
pub(super) unsafe fn product<L: Lanes, T: Terms<L>>(num_rows: usize, product: &Product) {
    // SAFETY: the caller's.
    unsafe {
        match num_rows {
            1 => product_rows::<L, T, 1>(product),
            2 => product_rows::<L, T, 2>(product),
            3 => product_rows::<L, T, 3>(product),
            4 => product_rows::<L, T, 4>(product),
            5 if L::TILE_ROWS > 4 => product_rows::<L, T, 5>(product),
            6 if L::TILE_ROWS > 4 => product_rows::<L, T, 6>(product),
            _ => unreachable!("{num_rows} rows in a tile of {}", L::TILE_ROWS),
        }
    }
}

#[inline(always)]
unsafe fn product_rows<L: Lanes, T: Terms<L>, const R: usize>(product: &Product) {
    let mut register = 0;
    // SAFETY: the caller's.
    unsafe {
        if L::TILE_COLS == 4 {
            while register + 4 <= product.registers {
                product_tile::<L, T, R, 4>(product, register);
                register += 4;
            }
        }
        if L::TILE_COLS == 2 {
            while register + 2 <= product.registers {
                product_tile::<L, T, R, 2>(product, register);
                register += 2;
            }
        }
        while register < product.registers {
            product_tile::<L, T, R, 1>(product, register);
            register += 1;
        }
    }
}

/// R rows of C registers; every sum is one chain through the steps in order.
#[inline(always)]
unsafe fn product_tile<L: Lanes, T: Terms<L>, const R: usize, const C: usize>(
    product: &Product,
    register: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let out = product.sums.add(register * L::LANES);
        let mut sums = [[L::splat(0.0); C]; R];
        if !product.rescales.is_null() {
            for (r, sums) in sums.iter_mut().enumerate() {
                let rescale = L::splat(*product.rescales.add(r));
                for (c, sum) in sums.iter_mut().enumerate() {
                    *sum = L::load(out.add(r * product.sum_stride + c * L::LANES)).mul(rescale);
                }
            }
        }
        let mut at = product.entries.add(register * L::LANES);
        let mut ahead = product.ahead.wrapping_add(register * L::LANES);
        for step in product.first_step..product.first_step + product.steps {
            if !product.ahead.is_null() {
                (0..C * L::LANES).step_by(LINE_WORDS).for_each(|word| L::prefetch(ahead.wrapping_add(word)));
                ahead = ahead.wrapping_add(product.stride);
            }
            for part in 0..T::PARTS {
                let mut entries = [T::entries(at, part); C];
                for (c, entries) in entries.iter_mut().enumerate().skip(1) {
                    *entries = T::entries(at.add(c * L::LANES), part);
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let factor = T::factor(product.factors.add(r * product.factor_stride), step, part);
                    for (sum, &entries) in sums.iter_mut().zip(&entries) {
                        *sum = T::mul_add(entries, factor, *sum);
                    }
                }
            }
            at = at.wrapping_add(product.stride);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (c, sum) in sums.iter().enumerate() {
                sum.store(out.add(r * product.sum_stride + c * L::LANES));
            }
        }
    }
}

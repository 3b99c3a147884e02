//! Rotary position embedding, in place.

use crate::array::Array;
use crate::backend::RopeTable;
use crate::check;
use crate::cpu::lanes::{Kernel, Lanes, at_level};
use crate::cpu::pool::ThreadPool;
use crate::cpu::rows::for_each_row;
use crate::cpu::simd::Simd;
use crate::error::Result;

/// Turns the heads of `x: [T, heads * head_dim]` by the angles of `positions[t]`.
pub(crate) fn rope(
    simd: Simd,
    pool: &ThreadPool,
    x: &mut Array,
    table: &RopeTable,
    positions: &[u32],
) -> Result<()> {
    let half = check::rope("rope", x, table, positions)?;
    for_each_row(pool, x, |t, row| {
        let at = positions[t] as usize * half;
        let (cos, sin) = (&table.cos[at..at + half], &table.sin[at..at + half]);
        // SAFETY: the device has its level; the row has whole heads, and the angles are those of one.
        unsafe { at_level(simd, TurnRow { row, cos, sin }) };
    });
    Ok(())
}

struct TurnRow<'a> {
    row: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for TurnRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: the caller's.
        unsafe { turn_heads::<L>(self.row, self.cos, self.sin) }
    }
}

/// The angles of a micro-batch's rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Angles<'a> {
    pub(crate) table: &'a RopeTable,
    /// Of every row.
    pub(crate) positions: &'a [u32],
}

impl Angles<'_> {
    /// Turns whole heads of a row.
    ///
    /// # Safety
    /// The processor has the features of `L`.
    #[inline(always)]
    pub(crate) unsafe fn turn<L: Lanes>(&self, row: usize, heads: &mut [f32]) {
        let half = self.table.head_dim / 2;
        let at = self.positions[row] as usize * half;
        // SAFETY: the caller's.
        unsafe { turn_heads::<L>(heads, &self.table.cos[at..at + half], &self.table.sin[at..at + half]) }
    }
}

/// # Safety
/// The processor has the features of `L`.
#[inline(always)]
unsafe fn turn_heads<L: Lanes>(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for head in heads.chunks_exact_mut(2 * half) {
        let (first, second) = head.split_at_mut(half);
        let (first, second) = (first.as_mut_ptr(), second.as_mut_ptr());
        let (cos, sin) = (cos.as_ptr(), sin.as_ptr());
        let whole = half / L::LANES * L::LANES;
        // SAFETY: the features are the caller's to vouch for; all four have `half` numbers.
        unsafe {
            let mut j = 0;
            while j < whole {
                let (x, y) = (L::load(first.add(j)), L::load(second.add(j)));
                let (x, y) = turn(x, y, L::load(cos.add(j)), L::load(sin.add(j)));
                x.store(first.add(j));
                y.store(second.add(j));
                j += L::LANES;
            }
            let left = half - whole;
            if left > 0 {
                let (x, y) = (L::load_first(first.add(j), left), L::load_first(second.add(j), left));
                let (cos, sin) = (L::load_first(cos.add(j), left), L::load_first(sin.add(j), left));
                let (x, y) = turn(x, y, cos, sin);
                x.store_first(first.add(j), left);
                y.store_first(second.add(j), left);
            }
        }
    }
}

/// # Safety
/// The processor has the features of `L`.
#[inline(always)]
unsafe fn turn<L: Lanes>(x: L, y: L, cos: L, sin: L) -> (L, L) {
    // SAFETY: the caller's.
    unsafe { (y.mul_sub_from(sin, x.mul(cos)), x.mul_add(sin, y.mul(cos))) }
}

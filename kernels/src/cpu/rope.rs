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
        at_level(simd, TurnRow { row, cos, sin });
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
        let half = self.cos.len();
        for head in self.row.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            let mut j = 0;
            while j < half {
                let n = (half - j).min(L::LANES);
                // SAFETY: the features are the caller's to vouch for; the four slices have `half` numbers.
                unsafe {
                    let (a, b) = (first.as_mut_ptr().add(j), second.as_mut_ptr().add(j));
                    let cos = L::load_first(self.cos.as_ptr().add(j), n);
                    let sin = L::load_first(self.sin.as_ptr().add(j), n);
                    let (x, y) = (L::load_first(a, n), L::load_first(b, n));
                    y.mul_sub_from(sin, x.mul(cos)).store_first(a, n);
                    x.mul_add(sin, y.mul(cos)).store_first(b, n);
                }
                j += L::LANES;
            }
        }
    }
}

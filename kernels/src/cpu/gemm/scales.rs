//! Scales of narrow weights, applied to sums.

use crate::cpu::lanes::{Kernel, Lanes};

/// `sums = [sums +] group · scales`: adds what a group of K has come to.
pub(super) struct AddGroup {
    /// `[rows, strip]`, of which `cols` of each strip are read.
    pub(super) group: *const f32,
    /// `[cols]`
    pub(super) scales: *const f32,
    /// Alike; written only, if this is the first group.
    pub(super) sums: *mut f32,
    pub(super) is_first: bool,
    pub(super) rows: usize,
    /// NR, or in AMX half of it.
    pub(super) strip: usize,
    /// 16, 32 or 64.
    pub(super) cols: usize,
}

impl Kernel for AddGroup {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: whoever made the kernel vouches for the pointers; 16 is a multiple of LANES.
        unsafe {
            for col in (0..self.cols).step_by(L::LANES) {
                let scale = L::load(self.scales.add(col));
                for row in 0..self.rows {
                    let group = L::load(self.group.add(row * self.strip + col));
                    let sums = self.sums.add(row * self.strip + col);
                    let sum = match self.is_first {
                        true => group.mul(scale),
                        false => group.mul_add(scale, L::load(sums)),
                    };
                    sum.store(sums);
                }
            }
        }
    }
}

/// `out = [out +] sums · scales`: a row of finished sums.
pub(super) struct Finish {
    /// `[cols]`
    pub(super) sums: *const f32,
    /// `[cols]`; null for ones.
    pub(super) scales: *const f32,
    /// `[cols]`; may be `sums`.
    pub(super) out: *mut f32,
    pub(super) is_added: bool,
    /// Any number.
    pub(super) cols: usize,
}

impl Kernel for Finish {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: whoever made the kernel vouches for the pointers; nothing beyond `cols` is touched.
        unsafe {
            for col in (0..self.cols).step_by(L::LANES) {
                let n = L::LANES.min(self.cols - col);
                let mut sum = L::load_first(self.sums.add(col), n);
                if !self.scales.is_null() {
                    sum = sum.mul(L::load_first(self.scales.add(col), n));
                }
                let out = self.out.add(col);
                if self.is_added {
                    sum = L::load_first(out, n).add(sum);
                }
                sum.store_first(out, n);
            }
        }
    }
}

//! What the unit can do: products from registers alone.

use super::{ROW_BYTES, ROWS, Registers};
use std::arch::asm;

/// Multiplications and additions of a round of products of bf16 from registers alone; of integers twice as many.
pub(in crate::cpu::gemm) const ROUND_FLOPS: usize = 4 * 2 * ROWS * ROWS * ROW_BYTES / 2;

/// So many rounds of four products from registers alone: what the unit can do.
macro_rules! peak {
    ($name:ident, $product:literal) => {
        /// # Safety
        /// As [`Registers::shape`].
        pub(in crate::cpu::gemm) unsafe fn $name(rounds: usize) -> f32 {
            // Numbers of many bits: zeros or ones take less power, and so less time.
            let numbers: [u32; ROW_BYTES / 4 * ROWS] =
                std::array::from_fn(|i| 0x3c00_3c00 | (i as u32).wrapping_mul(0x9e37_79b9) & 0x81ff_81ff);
            let mut sum = [0f32; ROW_BYTES / 4 * ROWS];
            // SAFETY: the caller vouches for the instructions; a register is loaded from a kilobyte and stored to one.
            unsafe {
                let _registers = Registers::shape(ROWS);
                asm!(
                    "tileloadd tmm4, [{numbers} + {row}*1]",
                    "tileloadd tmm5, [{numbers} + {row}*1]",
                    "tileloadd tmm6, [{numbers} + {row}*1]",
                    "tileloadd tmm7, [{numbers} + {row}*1]",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    concat!($product, " tmm0, tmm4, tmm6"),
                    concat!($product, " tmm1, tmm4, tmm7"),
                    concat!($product, " tmm2, tmm5, tmm6"),
                    concat!($product, " tmm3, tmm5, tmm7"),
                    "dec {rounds}",
                    "jnz 2b",
                    "tilestored [{sum} + {row}*1], tmm0",
                    numbers = in(reg) numbers.as_ptr(),
                    rounds = inout(reg) rounds.max(1) => _,
                    sum = in(reg) sum.as_mut_ptr(),
                    row = in(reg) ROW_BYTES,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
            sum[0]
        }
    };
}

peak!(bf16_products, "tdpbf16ps");
peak!(integer_products, "tdpbusd");

//! The tile registers of a thread: shaped for a product, and given back.

use super::{ROW_BYTES, ROWS};
use std::arch::asm;
use std::marker::PhantomData;

/// The shapes of the eight tile registers, as `LDTILECFG` reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The calling thread's tile registers in the shapes of a product, until this is dropped. Then they are empty again,
/// and the system has no 8 KiB to save when it changes threads.
pub(crate) struct Registers(PhantomData<*const ()>);

impl Registers {
    /// For `rows` rows of x in a register, 1 ..= 16.
    ///
    /// # Safety
    /// The processor has AMX, and the system has granted its registers.
    pub(crate) unsafe fn shape(rows: usize) -> Self {
        let mut shapes =
            Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        shapes.row_bytes[..8].fill(ROW_BYTES as u16);
        debug_assert!((1..=ROWS).contains(&rows), "{rows} rows in a register");
        shapes.rows[..6].fill(rows as u8); // Sums and x.
        shapes.rows[6..8].fill(ROWS as u8); // Weights: a row for each word of a block.
        // SAFETY: the caller vouches for the instruction; it reads the 64 bytes of `shapes`.
        unsafe {
            asm!(
                "ldtilecfg [{}]", in(reg) &raw const shapes,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(readonly, nostack, preserves_flags),
            );
        }
        Self(PhantomData)
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: `shape` was called, so the instruction is there.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nomem, nostack, preserves_flags),
            );
        }
    }
}

//! Both products of attention in registers of AMX.
//!
//! The compiler uses no such register of its own accord; each block of assembly names all that it overwrites, and leaves
//! nothing in them for the next one. All eight have 16 rows of 64 bytes.

use std::arch::asm;

/// Scores of 32 keys with the queries of a block, of all heads that share it.
#[repr(C)]
pub(super) struct Scores {
    /// The first head's, from the first of the 32 keys on.
    pub(super) keys: *const u32,
    /// Bytes from key to key.
    pub(super) key_bytes: usize,
    /// Bytes from head to head.
    pub(super) head_bytes: usize,
    /// At least 1.
    pub(super) heads: usize,
    /// `[heads][steps]` registers.
    pub(super) queries: *const u32,
    /// Steps of 32 dimensions, at least 1.
    pub(super) steps: usize,
    /// `[32 keys][16 columns]`
    pub(super) out: *mut f32,
}

/// # Safety
/// The pointers are valid for the shape, the processor has AMX and the thread its registers in their full shape.
#[inline]
pub(super) unsafe fn scores(scores: &Scores) {
    // SAFETY: the caller's.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:", // A head.
            "mov {a}, {keys}",
            "mov {step}, {steps}",
            "3:", // A step of its dimensions.
            "tileloadd tmm6, [{b} + {line}*1]",
            "tileloadd tmm4, [{a} + {key_bytes}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "lea {c}, [{a} + {half}]",
            "tileloadd tmm5, [{c} + {key_bytes}*1]",
            "tdpbf16ps tmm1, tmm5, tmm6",
            "add {a}, 64",
            "add {b}, 1024",
            "dec {step}",
            "jnz 3b",
            "add {keys}, {head_bytes}",
            "dec {heads}",
            "jnz 2b",
            "tilestored [{out} + {line}*1], tmm0",
            "tilestored [{out} + {line}*1 + 1024], tmm1",
            keys = inout(reg) scores.keys => _,
            key_bytes = in(reg) scores.key_bytes,
            half = in(reg) 16 * scores.key_bytes,
            head_bytes = in(reg) scores.head_bytes,
            heads = inout(reg) scores.heads => _,
            b = inout(reg) scores.queries => _,
            steps = in(reg) scores.steps,
            out = in(reg) scores.out,
            line = in(reg) 64usize,
            a = out(reg) _,
            c = out(reg) _,
            step = out(reg) _,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack),
        );
    }
}

/// One to four registers of dimensions; tmm0 and on are sums, tmm5 the weights, tmm6 and tmm7 values in turn.
macro_rules! multiply {
    ($name:ident, [$($sum:literal $value:literal $offset:literal)*]) => {
        unsafe fn $name(factors: &[*const u32], offset: usize, stride: usize, sums: *mut f32) {
            // SAFETY: the caller's.
            unsafe {
                asm!(
                    $(concat!("tileloadd ", $sum, ", [{sums} + {stride}*1 + ", $offset, "]"),)*
                    "2:",
                    "mov {a}, [{list}]",
                    "mov {b}, [{list} + 8]",
                    "add {b}, {offset}",
                    "tileloadd tmm5, [{a} + {line}*1]",
                    $(
                        concat!("tileloadd ", $value, ", [{b} + {stride}*1 + ", $offset, "]"),
                        concat!("tdpbf16ps ", $sum, ", tmm5, ", $value),
                    )*
                    "add {list}, 16",
                    "dec {left}",
                    "jnz 2b",
                    $(concat!("tilestored [{sums} + {stride}*1 + ", $offset, "], ", $sum),)*
                    list = inout(reg) factors.as_ptr() => _,
                    left = inout(reg) factors.len() / 2 => _,
                    offset = in(reg) offset,
                    stride = in(reg) stride,
                    line = in(reg) 64usize,
                    sums = in(reg) sums,
                    a = out(reg) _,
                    b = out(reg) _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

multiply!(one, ["tmm0" "tmm6" "0"]);
multiply!(two, ["tmm0" "tmm6" "0" "tmm1" "tmm7" "64"]);
multiply!(three, ["tmm0" "tmm6" "0" "tmm1" "tmm7" "64" "tmm2" "tmm6" "128"]);
multiply!(four, ["tmm0" "tmm6" "0" "tmm1" "tmm7" "64" "tmm2" "tmm6" "128" "tmm3" "tmm7" "192"]);

/// `sums += weights · values` for `registers` times 16 dimensions, over a list of weights and values in turn: a
/// register of weights `[16 columns][16 pairs]` and `[16 pairs][stride]` of values, from `offset` bytes on. `sums` and values
/// have `stride` bytes from row to row.
///
/// # Safety
/// As of [`scores`]; 1 to 4 registers.
#[inline]
pub(super) unsafe fn values(
    registers: usize,
    factors: &[*const u32],
    offset: usize,
    stride: usize,
    sums: *mut f32,
) {
    if factors.is_empty() {
        return;
    }
    // SAFETY: the caller's.
    unsafe {
        match registers {
            1 => one(factors, offset, stride, sums),
            2 => two(factors, offset, stride, sums),
            3 => three(factors, offset, stride, sums),
            4 => four(factors, offset, stride, sums),
            _ => unreachable!("{registers} registers of outputs"),
        }
    }
}

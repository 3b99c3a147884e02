//! Both products of attention in registers of AMX.
//!
//! The compiler uses no such register of its own accord; each block of assembly names all that it overwrites, and leaves
//! nothing in them for the next one. All eight have 16 rows of 64 bytes.
//!
//! Every round of their loops asks for some lines of what is needed next, see [`Hints`].

use std::arch::asm;
use std::mem::offset_of;

use super::ahead::Hints;

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
    /// For every step of every head.
    pub(super) hints: Hints,
}

/// The rows of [`Hints`] at the address `hints`, from `at` on; `row`, `line` and `left` are overwritten.
macro_rules! hint {
    () => {
        concat!(
            "mov {row}, [{hints} + {rows}]\n",
            "test {row}, {row}\n",
            "jz 7f\n",
            "5:\n",
            "mov {hint}, {at}\n",
            "mov {left}, [{hints} + {streams}]\n",
            "6:\n",
            "prefetcht1 [{hint}]\n",
            "add {hint}, [{hints} + {hint_stride}]\n",
            "dec {left}\n",
            "jnz 6b\n",
            "add {at}, 64\n",
            "dec {row}\n",
            "jnz 5b\n",
            "7:\n",
        )
    };
}

/// # Safety
/// The pointers are valid for the shape, the processor has AMX and the thread its registers in their full shape.
#[inline]
pub(super) unsafe fn scores(scores: &mut Scores) {
    // SAFETY: the caller's.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:", // A head.
            "mov {a}, [{scores} + {keys}]",
            "mov {step}, [{scores} + {steps}]",
            "3:", // A step of its dimensions.
            "tileloadd tmm6, [{b} + {line}*1]",
            "tileloadd tmm4, [{a} + {key_bytes}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "lea {c}, [{a} + {key_bytes}*8]",
            "lea {c}, [{c} + {key_bytes}*8]",
            "tileloadd tmm5, [{c} + {key_bytes}*1]",
            "tdpbf16ps tmm1, tmm5, tmm6",
            hint!(),
            "add {a}, 64",
            "add {b}, 1024",
            "dec {step}",
            "jnz 3b",
            "mov {a}, [{scores} + {head_bytes}]",
            "add [{scores} + {keys}], {a}",
            "dec qword ptr [{scores} + {heads}]",
            "jnz 2b",
            "mov {a}, [{scores} + {out}]",
            "tilestored [{a} + {line}*1], tmm0",
            "tilestored [{a} + {line}*1 + 1024], tmm1",
            scores = in(reg) &raw mut *scores,
            hints = in(reg) &raw const scores.hints,
            key_bytes = in(reg) scores.key_bytes,
            b = inout(reg) scores.queries => _,
            at = inout(reg) scores.hints.at => _,
            line = in(reg) 64usize,
            a = out(reg) _,
            c = out(reg) _,
            step = out(reg) _,
            row = out(reg) _,
            hint = out(reg) _,
            left = out(reg) _,
            keys = const offset_of!(Scores, keys),
            steps = const offset_of!(Scores, steps),
            head_bytes = const offset_of!(Scores, head_bytes),
            heads = const offset_of!(Scores, heads),
            out = const offset_of!(Scores, out),
            rows = const offset_of!(Hints, rows),
            streams = const offset_of!(Hints, streams),
            hint_stride = const offset_of!(Hints, stride),
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack),
        );
    }
}

/// `sums += weights · values` for up to four registers of dimensions.
#[repr(C)]
pub(super) struct Values<'a> {
    /// Weights and values in turn: a register of weights `[16 columns][16 pairs]` and `[16 pairs][stride]` of values.
    pub(super) factors: &'a [*const u32],
    /// Bytes of a row of values before the first dimension.
    pub(super) offset: usize,
    /// Bytes from row to row of values and of sums.
    pub(super) stride: usize,
    /// From the first dimension on.
    pub(super) sums: *mut f32,
    /// For every pair of factors.
    pub(super) hints: Hints,
}

/// One to four registers of dimensions; tmm0 and on are sums, tmm5 the weights, tmm6 and tmm7 values in turn.
macro_rules! multiply {
    ($name:ident, [$($sum:literal $value:literal $offset:literal)*]) => {
        unsafe fn $name(values: &Values<'_>) {
            // SAFETY: the caller's.
            unsafe {
                asm!(
                    "mov {a}, [{values} + {sums}]",
                    $(concat!("tileloadd ", $sum, ", [{a} + {stride}*1 + ", $offset, "]"),)*
                    "2:",
                    "mov {a}, [{list}]",
                    "mov {b}, [{list} + 8]",
                    "add {b}, [{values} + {offset}]",
                    "tileloadd tmm5, [{a} + {line}*1]",
                    $(
                        concat!("tileloadd ", $value, ", [{b} + {stride}*1 + ", $offset, "]"),
                        concat!("tdpbf16ps ", $sum, ", tmm5, ", $value),
                    )*
                    hint!(),
                    "add {list}, 16",
                    "dec {pairs}",
                    "jnz 2b",
                    "mov {a}, [{values} + {sums}]",
                    $(concat!("tilestored [{a} + {stride}*1 + ", $offset, "], ", $sum),)*
                    values = in(reg) values,
                    hints = in(reg) &raw const values.hints,
                    list = inout(reg) values.factors.as_ptr() => _,
                    pairs = inout(reg) values.factors.len() / 2 => _,
                    stride = in(reg) values.stride,
                    line = in(reg) 64usize,
                    at = inout(reg) values.hints.at => _,
                    a = out(reg) _,
                    b = out(reg) _,
                    row = out(reg) _,
                    hint = out(reg) _,
                    left = out(reg) _,
                    sums = const offset_of!(Values<'_>, sums),
                    offset = const offset_of!(Values<'_>, offset),
                    rows = const offset_of!(Hints, rows),
                    streams = const offset_of!(Hints, streams),
                    hint_stride = const offset_of!(Hints, stride),
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

/// `sums += weights · values` for `registers` times 16 dimensions.
///
/// # Safety
/// As of [`scores`]; 1 to 4 registers.
#[inline]
pub(super) unsafe fn values(registers: usize, values: &Values<'_>) {
    if values.factors.is_empty() {
        return;
    }
    // SAFETY: the caller's.
    unsafe {
        match registers {
            1 => one(values),
            2 => two(values),
            3 => three(values),
            4 => four(values),
            _ => unreachable!("{registers} registers of outputs"),
        }
    }
}

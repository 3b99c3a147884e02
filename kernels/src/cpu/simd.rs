//! The vector instructions a kernel may use, chosen once at run time.

/// A level of vector instructions. A higher level implies that the lower ones are available.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Simd {
    /// Plain Rust, left to the compiler: runs everywhere.
    Portable,
    /// AVX2 and FMA: 256-bit registers.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and BF16: 512-bit registers and the bf16 dot product (VDPBF16PS).
    Avx512,
    /// The same and AMX: products of whole tiles of bf16 (TDPBF16PS) and integers (TDPBUSD).
    Amx,
}

impl Simd {
    /// Every level, lowest first.
    pub const ALL: [Simd; 4] = [Simd::Portable, Simd::Avx2, Simd::Avx512, Simd::Amx];

    /// The highest level of this processor.
    pub fn detect() -> Simd {
        Self::ALL.into_iter().rev().find(|level| level.is_available()).unwrap_or(Simd::Portable)
    }

    /// Whether this processor (and its operating system) can run the level.
    pub fn is_available(self) -> bool {
        match self {
            Simd::Portable => true,
            Simd::Avx2 => has_avx2(),
            Simd::Avx512 => has_avx512(),
            Simd::Amx => has_amx(),
        }
    }

    /// The level's name in options and numeric profiles.
    pub fn name(self) -> &'static str {
        match self {
            Simd::Portable => "portable",
            Simd::Avx2 => "avx2",
            Simd::Avx512 => "avx512",
            Simd::Amx => "amx",
        }
    }

    /// The level as numeric profiles name it: processors on which it has other bits than by Intel's manual say so.
    pub fn numerics(self) -> &'static str {
        match self {
            Simd::Avx512 if self.is_available() && !rounds_within_pairs() => "avx512 with pairs unrounded",
            Simd::Amx if self.is_available() && !rounds_within_pairs() => "amx with pairs unrounded",
            _ => self.name(),
        }
    }

    /// The processor features that the level needs, for messages.
    pub(crate) fn features(self) -> &'static str {
        match self {
            Simd::Portable => "nothing",
            Simd::Avx2 => "avx2 and fma",
            Simd::Avx512 => "avx512f, avx512bw, avx512dq, avx512vl and avx512bf16",
            Simd::Amx => "what avx512 does, avx512vnni, amx-tile, amx-bf16 and amx-int8",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
}

/// Avx2 is asked for as well, so that the levels are ordered on every processor.
#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    has_avx2()
        && std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512dq")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512bf16")
}

/// Whether `VDPBF16PS` adds one product of a pair after the other, each time rounded to nearest even, as Intel's manual has it
/// (volume 2, "VDPBF16PS"). Processors of others may add both at once, which gives other bits.
#[cfg(target_arch = "x86_64")]
fn rounds_within_pairs() -> bool {
    /// Beside it 1 is half a unit in the last place, which is lost where it comes alone, and two are one.
    const LARGE: f32 = (1 << 24) as f32;

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn large_and_a_pair_of_ones() -> f32 {
        use std::arch::x86_64::*;
        let one = half::bf16::ONE.to_bits().cast_signed();
        // SAFETY: any bits are numbers of bf16.
        let ones = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi16(one)) };
        _mm512_cvtss_f32(_mm512_dpbf16_ps(_mm512_set1_ps(std::hint::black_box(LARGE)), ones, ones))
    }

    // SAFETY: callers have asked for the level.
    (unsafe { large_and_a_pair_of_ones() }) == LARGE
}

#[cfg(not(target_arch = "x86_64"))]
fn rounds_within_pairs() -> bool {
    true
}

/// Whether there is `VPDPBUSD`, the dot product of integers of 8 bits, in 512-bit registers. No level needs it:
/// a product in integers is the same without.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_vnni() -> bool {
    std::arch::is_x86_feature_detected!("avx512vnni")
}

/// Whether there is `VPERMB`, which puts bytes anywhere. No level needs it.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_vbmi() -> bool {
    std::arch::is_x86_feature_detected!("avx512vbmi")
}

/// AMX, with the system's leave to use its registers: a process has to ask for them.
#[cfg(target_arch = "x86_64")]
fn has_amx() -> bool {
    use std::sync::OnceLock;
    static HAS_AMX: OnceLock<bool> = OnceLock::new();
    *HAS_AMX.get_or_init(|| has_avx512() && has_vnni() && amx::is_on_the_processor() && amx::is_granted())
}

#[cfg(target_arch = "x86_64")]
mod amx {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    /// Bits of EDX of CPUID's leaf 7: AMX-BF16, AMX-TILE, AMX-INT8.
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    /// The states that the system saves of a thread: the tiles' shapes and the tiles.
    const STATES: u32 = 1 << 17 | 1 << 18;

    pub(super) fn is_on_the_processor() -> bool {
        /// Bit of ECX of CPUID's leaf 1: `XGETBV` is there.
        const OSXSAVE: u32 = 1 << 27;
        if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
            return false;
        }
        __cpuid_count(7, 0).edx & FEATURES == FEATURES && saved_states() & STATES == STATES
    }

    /// The lower half of XCR0.
    fn saved_states() -> u32 {
        let states: u32;
        // SAFETY: the caller has seen OSXSAVE, so that the instruction is there; it only reads.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") states, out("edx") _, options(nomem, nostack, preserves_flags));
        }
        states
    }

    /// Ask the system for the tile registers, for this process: its threads have them too, later ones as well.
    #[cfg(target_os = "linux")]
    pub(super) fn is_granted() -> bool {
        const SYS_ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
        const TILE_DATA: i64 = 18;
        let result: i64;
        // SAFETY: the call takes two numbers and touches no memory of ours; a kernel that does not know it
        // returns an error. RCX and R11 are what `syscall` overwrites.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") SYS_ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") TILE_DATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        result == 0
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn is_granted() -> bool {
        false
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_amx() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numerics_begin_with_the_name_and_are_no_more_where_there_are_no_products_of_pairs() {
        assert!(Simd::ALL.iter().all(|level| level.numerics().starts_with(level.name())));
        assert_eq!([Simd::Portable, Simd::Avx2].map(Simd::numerics), ["portable", "avx2"]);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn pairs_are_rounded_where_numerics_say_no_more() {
        use std::arch::x86_64::*;

        #[target_feature(enable = "avx512f,avx512bf16")]
        fn add_pair(sum: f32, a: u32, b: u32) -> f32 {
            let [a, b] = [a, b].map(|pair| _mm512_set1_epi32(pair.cast_signed()));
            // SAFETY: any bits are numbers of bf16.
            let [a, b] = [a, b].map(|pairs| unsafe { std::mem::transmute::<__m512i, __m512bh>(pairs) });
            _mm512_cvtss_f32(_mm512_dpbf16_ps(_mm512_set1_ps(sum), a, b))
        }

        if !Simd::Avx512.is_available() || Simd::Avx512.numerics() != Simd::Avx512.name() {
            return;
        }
        let mut state = 1u32;
        // Numbers of 2^-7 to 2, of either sign: products have bits that sums have no room for.
        let mut number = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) & 0x83ff | 0x3c00
        };
        let mut sum = 0.0f32;
        for _ in 0..10_000 {
            let [even, odd] = [[number(), number()], [number(), number()]];
            let [a, b] = [0, 1].map(|i| even[i] | odd[i] << 16);
            let [even, odd] = [even, odd].map(|pair| pair.map(|number| f32::from_bits(number << 16)));
            let expected = even[0].mul_add(even[1], odd[0].mul_add(odd[1], sum));
            // SAFETY: the level was asked for.
            sum = unsafe { add_pair(sum, a, b) };
            assert_eq!(sum.to_bits(), expected.to_bits());
        }
    }

    #[test]
    fn the_detected_level_and_all_below_it_are_available() {
        let best = Simd::detect();
        for level in Simd::ALL {
            assert_eq!(level.is_available(), level <= best, "{} against {}", level.name(), best.name());
        }
    }
}

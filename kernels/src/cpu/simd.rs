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
}

impl Simd {
    /// Every level, lowest first.
    pub const ALL: [Simd; 3] = [Simd::Portable, Simd::Avx2, Simd::Avx512];

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
        }
    }

    /// The level's name in options and numeric profiles.
    pub fn name(self) -> &'static str {
        match self {
            Simd::Portable => "portable",
            Simd::Avx2 => "avx2",
            Simd::Avx512 => "avx512",
        }
    }

    /// The processor features that the level needs, for messages.
    pub(crate) fn features(self) -> &'static str {
        match self {
            Simd::Portable => "nothing",
            Simd::Avx2 => "avx2 and fma",
            Simd::Avx512 => "avx512f, avx512bw, avx512dq, avx512vl and avx512bf16",
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

/// Whether there is `VPDPBUSD`, the dot product of integers of 8 bits, in 512-bit registers. No level needs it:
/// a product in integers is the same without.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_vnni() -> bool {
    std::arch::is_x86_feature_detected!("avx512vnni")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detected_level_and_all_below_it_are_available() {
        let best = Simd::detect();
        for level in Simd::ALL {
            assert_eq!(level.is_available(), level <= best, "{} against {}", level.name(), best.name());
        }
    }
}

//! What this machine can do at most, measured: the yardstick for the speed of products.
//!
//! Frequencies and neighbours change, so a ceiling is to be measured in the same run, close to what is
//! measured against it, and as the best of short regions: one that was interrupted says nothing.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::arena::Piece;
use super::plan::share;
use crate::backend::WeightType;
use crate::cpu::Cpu;
use crate::cpu::caches::cold_bytes_with_room;
use crate::cpu::pool::ThreadPool;
use crate::cpu::simd::Simd;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::has_vnni;
use crate::error::{Error, Result};
use std::hint::black_box;
use std::time::Instant;

/// Measures a device's ceilings, with its own threads.
pub struct Ceilings<'a> {
    cpu: &'a Cpu,
    memory: Piece,
}

/// Bytes to read at least, so that a region is some milliseconds long; more where twice the last cache are more, see
/// [`cold_bytes_with_room`].
const LEAST_BYTES: usize = 256 << 20;

/// Registers of sums: enough to hide the latency of two units, and few enough for 16 registers.
const SUMS: usize = 12;

/// Products into every sum in one region: some 0.1 ms, well inside of a time slice; fewer of AMX's longer ones.
const ROUNDS: usize = 40_000;

/// Regions, of which the best counts.
const REGIONS: usize = 50;

impl<'a> Ceilings<'a> {
    /// Takes and touches the memory that [`Ceilings::read_bandwidth`] reads.
    pub fn new(cpu: &'a Cpu) -> Result<Self> {
        let len = cold_bytes_with_room(LEAST_BYTES);
        let mut memory = Piece::new(len)
            .map_err(|e| Error::Unsupported(format!("allocate {len} bytes to measure bandwidth: {e}")))?;
        // SAFETY: the piece is borrowed mutably, and as long as that.
        unsafe { memory.as_mut_ptr().write_bytes(1, len) };
        Ok(Self { cpu, memory })
    }

    /// Multiplications and additions per second of the device's fastest product in the number type that its
    /// weights are multiplied in, all threads together: those of [`Ceilings::int8_flops`] for integers on both sides, of
    /// [`Ceilings::bf16_flops`] for bf16 and what is unpacked to it, otherwise of [`Ceilings::f32_flops`].
    pub fn product_flops(&self) -> f64 {
        match self.cpu.weights {
            WeightType::Int8 => self.int8_flops(),
            WeightType::Bf16 | WeightType::Int8Weight | WeightType::Int4Weight => self.bf16_flops(),
            WeightType::F32 | WeightType::Fp8 => self.f32_flops(),
        }
    }

    /// The same in integers of 8 bits on both sides: `TDPBUSD` in AMX, `VPDPBUSD` in AVX-512 where there is one, otherwise
    /// `VPMADDUBSW`, `VPMADDWD` and `VPADDD`. Portable code has that of f32 for a measure.
    pub fn int8_flops(&self) -> f64 {
        match self.cpu.simd {
            #[cfg(target_arch = "x86_64")]
            Simd::Amx => {
                // SAFETY: the device has its level.
                self.flops(ROUNDS / 8, 2 * amx::ROUND_FLOPS, || unsafe { amx::integer_products(ROUNDS / 8) })
            }
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 if has_vnni() => {
                // SAFETY: the device has its level, and `VPDPBUSD`.
                self.flops(ROUNDS, SUMS * 128, || unsafe { x86::integer_products(ROUNDS) })
            }
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 | Simd::Avx2 => {
                // SAFETY: the device has its level, which has AVX2.
                self.flops(ROUNDS / 4, SUMS * 64, || unsafe { x86::integer_products_256(ROUNDS / 4) })
            }
            _ => self.f32_flops(),
        }
    }

    /// The same in bf16: `TDPBF16PS` in AMX, `VDPBF16PS` in AVX-512; the other levels widen it to f32.
    pub fn bf16_flops(&self) -> f64 {
        match self.cpu.simd {
            #[cfg(target_arch = "x86_64")]
            Simd::Amx => {
                // SAFETY: the device has its level.
                self.flops(ROUNDS / 8, amx::ROUND_FLOPS, || unsafe { amx::bf16_products(ROUNDS / 8) })
            }
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => {
                // SAFETY: the device has its level.
                self.flops(ROUNDS, SUMS * 64, || unsafe { x86::dot_products(ROUNDS) })
            }
            _ => self.f32_flops(),
        }
    }

    /// The same in f32: fused multiply-add, or in portable code one after the other.
    pub fn f32_flops(&self) -> f64 {
        match self.cpu.simd {
            // SAFETY: the device has its level.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 | Simd::Amx => self.flops(ROUNDS, SUMS * 32, || unsafe { x86::fma_512(ROUNDS) }),
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => self.flops(ROUNDS, SUMS * 16, || unsafe { x86::fma_256(ROUNDS) }),
            _ => self.flops(ROUNDS, SUMS * 8, || portable(ROUNDS)),
        }
    }

    /// Bytes that are read to measure how fast memory is.
    pub fn read_bytes(&self) -> usize {
        self.memory.len()
    }

    /// Bytes per second that all threads together read from memory.
    pub fn read_bandwidth(&self) -> f64 {
        let threads = self.cpu.pool.num_threads();
        let seconds = best_region(&self.cpu.pool, 3, |thread| {
            // In lines, that no thread reads another's.
            let lines = share(self.read_bytes() / 64, threads, thread);
            let bytes = &self.memory.bytes()[lines.start * 64..lines.end * 64];
            black_box(read_all(self.cpu.simd, bytes));
        });
        self.read_bytes() as f64 / seconds
    }

    /// Seconds that the pool takes to open a region, to have every thread in it and to close it again: the mean of
    /// many that follow each other at once.
    pub fn region_seconds(&self) -> f64 {
        let regions = 10_000;
        let start = Instant::now();
        (0..regions).for_each(|_| {
            self.cpu.pool.for_each(self.cpu.pool.num_threads(), |task| {
                black_box(task);
            })
        });
        start.elapsed().as_secs_f64() / f64::from(regions)
    }

    /// Operations per second, where `work` does so many in each of its rounds.
    fn flops(&self, rounds: usize, per_round: usize, work: impl Fn() -> f32 + Sync) -> f64 {
        let seconds = best_region(&self.cpu.pool, REGIONS, |_| {
            black_box(work());
        });
        (self.cpu.pool.num_threads() * rounds * per_round) as f64 / seconds
    }
}

/// The shortest time of `regions` regions in which every thread calls `work`.
fn best_region(pool: &ThreadPool, regions: usize, work: impl Fn(usize) + Sync) -> f64 {
    let time = |_| {
        let start = Instant::now();
        pool.for_each(pool.num_threads(), &work);
        start.elapsed().as_secs_f64()
    };
    (0..regions).map(time).fold(f64::INFINITY, f64::min)
}

/// Four lanes each, which every processor of 64 bits has.
fn portable(rounds: usize) -> f32 {
    let one = black_box([1.0f32; 4]);
    let mut sums = [[0.0f32; 4]; SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            for (sum, one) in sum.iter_mut().zip(one) {
                *sum = *sum * one + one;
            }
        }
    }
    sums.iter().flatten().sum()
}

/// Reads all bytes, in registers of a level that this processor has.
pub(super) fn read_all(simd: Simd, bytes: &[u8]) -> u64 {
    assert!(simd.is_available(), "{} is not available", simd.name());
    match simd {
        // SAFETY: as it has been asserted.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 | Simd::Amx => unsafe { x86::read_512(bytes) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { x86::read_256(bytes) },
        _ => read(bytes),
    }
}

/// The exclusive or of all words; the features of the function it is inlined into decide how wide.
#[inline(always)]
fn read(bytes: &[u8]) -> u64 {
    let mut words = [0u64; 64];
    for block in bytes.as_chunks::<512>().0 {
        for (word, bytes) in words.iter_mut().zip(block.as_chunks().0) {
            *word ^= u64::from_ne_bytes(*bytes);
        }
    }
    words.iter().fold(0, |all, word| all ^ word)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{SUMS, black_box, read};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn dot_products(rounds: usize) -> f32 {
        // SAFETY: 512 bits are 512 bits; these are ones in bf16.
        let one: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(black_box(0x3f80_3f80))) };
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..rounds {
            sums = std::array::from_fn(|i| _mm512_dpbf16_ps(sums[i], one, one));
        }
        sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn integer_products(rounds: usize) -> f32 {
        let one = _mm512_set1_epi8(black_box(1));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..rounds {
            sums = std::array::from_fn(|i| _mm512_dpbusd_epi32(sums[i], one, one));
        }
        sums.iter().map(|&sum| _mm512_reduce_add_epi32(sum)).sum::<i32>() as f32
    }

    /// Each sum goes on with its own products, as those of one and the same numbers would be made once, before the loop: twelve
    /// chains of three instructions, of which the units are busy with one while they wait for another.
    #[target_feature(enable = "avx2")]
    pub(super) fn integer_products_256(rounds: usize) -> f32 {
        let (bytes, ones) = (_mm256_set1_epi8(black_box(1)), _mm256_set1_epi16(black_box(1)));
        let mut sums = [bytes; SUMS];
        for _ in 0..rounds {
            sums = std::array::from_fn(|i| {
                let products = _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, sums[i]), ones);
                _mm256_add_epi32(sums[i], products)
            });
        }
        sums.iter().map(|&sum| _mm256_cvtsi256_si32(sum) as f32).sum()
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn fma_512(rounds: usize) -> f32 {
        let one = _mm512_set1_ps(black_box(1.0));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..rounds {
            sums = std::array::from_fn(|i| _mm512_fmadd_ps(one, one, sums[i]));
        }
        sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fma_256(rounds: usize) -> f32 {
        let one = _mm256_set1_ps(black_box(1.0));
        let mut sums = [_mm256_setzero_ps(); SUMS];
        for _ in 0..rounds {
            sums = std::array::from_fn(|i| _mm256_fmadd_ps(one, one, sums[i]));
        }
        sums.iter().map(|&sum| _mm256_cvtss_f32(sum)).sum()
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn read_512(bytes: &[u8]) -> u64 {
        read(bytes)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn read_256(bytes: &[u8]) -> u64 {
        read(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::KvDtype;
    use crate::cpu::CpuOptions;

    fn device(simd: Simd, weights: WeightType) -> Cpu {
        Cpu::new(CpuOptions { cores: vec![], threads: 2, simd, weights, kv: KvDtype::F32 }).unwrap()
    }

    /// From a tenth of a slow machine to ten times the fastest.
    fn is_plausible(per_second: f64) -> bool {
        (1e7..1e16).contains(&per_second)
    }

    #[test]
    fn ceilings_are_plausible_numbers() {
        for simd in Simd::ALL.into_iter().filter(|simd| simd.is_available()) {
            for weights in [WeightType::F32, WeightType::Bf16, WeightType::Int8] {
                let cpu = device(simd, weights);
                let ceilings = Ceilings { cpu: &cpu, memory: Piece::new(0).unwrap() };
                assert!(is_plausible(ceilings.product_flops()) && is_plausible(ceilings.f32_flops()));
            }
        }
        let cpu = device(Simd::detect(), WeightType::F32);
        let ceilings = Ceilings::new(&cpu).unwrap();
        assert!(is_plausible(ceilings.read_bandwidth()));
        assert!(ceilings.region_seconds() > 0.0);
    }
}

//! What a device says of itself.

use kernels::{Backend, Cpu, CpuOptions, KvDtype, Reference, Simd, WeightType, available_cores};

use crate::battery::device::{WEIGHT_TYPES, cpu, levels};

/// As job files and manifests have them.
const NAMES: [&str; 5] = ["f32", "bf16", "int8", "int8-weight", "int4-weight"];

#[test]
fn the_profile_names_level_and_types() {
    assert_eq!(Reference::new(WeightType::F32, KvDtype::F32).numeric_profile(), "reference f32 kv f32");
    for simd in levels() {
        for (weights, name) in WEIGHT_TYPES.into_iter().zip(NAMES) {
            let profile = cpu(simd, 1, weights, KvDtype::F32).numeric_profile();
            assert_eq!(profile, format!("cpu {} {name} kv f32", simd.numerics()));
        }
    }
}

#[test]
fn numbers_of_eight_bits_are_refused_with_the_cure() {
    let (cores, simd, kv) = (Vec::new(), Simd::Portable, KvDtype::Bf16);
    let error = Cpu::new(CpuOptions { cores, threads: 1, simd, weights: WeightType::Fp8, kv }).err().unwrap();
    assert!(error.to_string().starts_with("a cpu device has no weights in fp8, which are for GPUs\nhint:"));
}

#[test]
fn a_level_that_the_processor_lacks_is_refused_by_name() {
    let options = |simd, threads| CpuOptions {
        cores: available_cores(),
        threads,
        simd,
        weights: WeightType::Bf16,
        kv: KvDtype::Bf16,
    };
    for simd in Simd::ALL {
        match Cpu::new(options(simd, 1)) {
            Ok(cpu) => assert!(simd.is_available() && cpu.num_threads() == 1),
            Err(error) => {
                let error = error.to_string();
                assert!(
                    !simd.is_available() && error.starts_with(&format!("simd level {}", simd.name())),
                    "{error}"
                );
            }
        }
    }
    assert!(Cpu::new(options(Simd::Portable, 0)).is_err());
}

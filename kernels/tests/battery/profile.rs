//! What a device says of itself.

use kernels::{Backend, Cpu, CpuOptions, Dtype, Reference, Simd, available_cores};

use crate::battery::device::{cpu, levels};

#[test]
fn the_profile_names_level_and_types() {
    assert_eq!(Reference::new(Dtype::F32, Dtype::F32).numeric_profile(), "reference f32 kv f32");
    for simd in levels() {
        let profile = cpu(simd, 1, Dtype::Bf16, Dtype::F32).numeric_profile();
        assert_eq!(profile, format!("cpu {} bf16 kv f32", simd.name()));
    }
}

#[test]
fn a_level_that_the_processor_lacks_is_refused_by_name() {
    let options = |simd, threads| CpuOptions {
        cores: available_cores(),
        threads,
        simd,
        weights: Dtype::Bf16,
        kv: Dtype::Bf16,
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

//! How many tokens keep a device from waiting for its weights, and how many devices read theirs at once.

use configs::{DeviceCatalog, DeviceSpec};
use stages::Device;
use stages::cost::NumberType;

use crate::plan::setting::roofline;

/// A micro-batch of fewer tokens leaves a CPU waiting for its weights. A bf16 weight is two bytes and two
/// operations a token, so compute and memory balance at as many tokens as a core makes operations per byte
/// read: 8 on a Zen 4 core (236 GFLOP/s, 30 GB/s), 12 on a Zen 5 core (473 GFLOP/s, 38 GB/s).
const CPU_EFFICIENT_TOKENS: usize = 8;

/// The same for a device as the catalog calls it: of a GPU by its roofline, 183 for an H200 in bf16.
pub(crate) fn tokens((name, spec): (&str, &DeviceSpec), weights: NumberType) -> usize {
    if configs::cpu_of(name).is_some() {
        return CPU_EFFICIENT_TOKENS;
    }
    (roofline(spec, weights).balanced_rows(weights).round() as usize).max(1)
}

/// The same for a job's devices, all of one kind, of which this is the first as the catalog calls it; none of a GPU on CPUs.
pub(crate) fn tokens_of_first(gpu: Option<&str>, weights: NumberType) -> usize {
    let catalog = DeviceCatalog::shipped();
    let spec = |name| (name, catalog.get(name).expect("the name is the catalog's"));
    gpu.map_or(CPU_EFFICIENT_TOKENS, |name| tokens(spec(name), weights))
}

/// Memories from which stages read their weights, of which these are the devices, the first of each where it has several: the
/// processors of a machine have one.
pub(crate) fn num_memories<'a>(devices: impl Iterator<Item = &'a Device>) -> usize {
    let mut memories: Vec<Option<usize>> = devices.map(Device::gpu).collect();
    memories.sort_unstable();
    memories.dedup();
    memories.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_computes_for_as_long_as_it_reads_where_its_rates_say_so() {
        let h200 = |weights| tokens_of_first(Some("h200"), weights);
        // 792 TFLOP/s and 4.32 TB/s, 1,385 in fp8.
        assert_eq!([h200(NumberType::Bf16), h200(NumberType::Fp8)], [183, 160]);
        assert_eq!(h200(NumberType::Int4Weight), 57);
        assert_eq!(tokens_of_first(None, NumberType::Bf16), CPU_EFFICIENT_TOKENS);
        let catalog = DeviceCatalog::shipped();
        assert_eq!(
            tokens(("cpu-core", catalog.get("cpu-core").unwrap()), NumberType::Bf16),
            CPU_EFFICIENT_TOKENS
        );
    }

    #[test]
    fn each_gpu_has_a_memory_and_all_processors_have_one() {
        let gpu = |index| Device::Cuda {
            index,
            libraries: None,
            cubins: None,
            is_deterministic: true,
            has_graphs: true,
        };
        assert_eq!(num_memories([gpu(0), gpu(2), gpu(0), gpu(2)].iter()), 2);
        assert_eq!(num_memories([Device::Reference, Device::Reference].iter()), 1);
    }
}

//! How many tokens keep a device from waiting for its weights, how many a micro-batch has at most, and how many devices read their
//! weights at once.

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

/// In AVX2 a token of SmolLM2 takes no longer in micro-batches of 64 than of 512, and 7 % longer in those of 32: this lies between.
const HARDLY_LONGER: f64 = 1.03;

/// No micro-batch is made smaller than this for the sake of evenness: below, what a hop and an answer take for each would tell.
const LEAST_MICRO_BATCH_TOKENS: usize = 32;

/// The smallest power of two, from 32 on, whose tokens take hardly longer each than those of `most`; else `most`. `seconds` says
/// what all stages together take for a micro-batch of so many.
///
/// Stages wait for each other where micro-batches are unlike. The last one makes the logits of rows that decode, so no cut is
/// even for prompts and for decoding at once. In small pieces prompts are computed one by one, beside rows that decode or in turn with
/// them, all through a job; in large ones they are done with before most rows decode.
pub(crate) fn micro_batch_tokens(most: usize, seconds: impl Fn(usize) -> f64) -> usize {
    let a_token = |tokens: usize| seconds(tokens) / tokens as f64;
    let bound = HARDLY_LONGER * a_token(most);
    let powers = std::iter::successors(Some(LEAST_MICRO_BATCH_TOKENS), |tokens| tokens.checked_mul(2));
    powers.take_while(|tokens| *tokens < most).find(|tokens| a_token(*tokens) <= bound).unwrap_or(most)
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
    fn micro_batches_are_the_smallest_whose_tokens_take_hardly_longer() {
        // A millisecond for the weights, and so much for each token.
        let with_weights = |of_token: f64| move |tokens: usize| 1e-3_f64 + tokens as f64 * of_token;
        // 1 / 64 ms beside 0.5, 1 / 256 ms beside 0.1.
        assert_eq!(micro_batch_tokens(512, with_weights(5e-4)), 64);
        assert_eq!(micro_batch_tokens(512, with_weights(1e-4)), 256);
        assert_eq!(micro_batch_tokens(512, with_weights(1e-5)), 512);
        assert_eq!(micro_batch_tokens(512, |tokens| tokens as f64), 32);
        assert_eq!(micro_batch_tokens(20, |tokens| tokens as f64), 20);
        // What takes as long for one token as for all is shared by as many as may be.
        assert_eq!(micro_batch_tokens(500, |_| 1.0), 500);
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

//! The battery on a GPU, and on the emulator that runs the same device code without one.
//!
//! Results must be right in both modes; that rows are independent to the bit is asked of the deterministic one alone.

use std::path::{Path, PathBuf};

use kernels::{Cuda, CudaOptions, Dtype, WeightType};

use crate::battery::device::{Check, Device, Readable};
use crate::battery::{
    attention, attention_invariants, embed_gather, logit_stats, matmul, matmul_argmax, refusals, rms_norm,
    rope, row_invariants, swiglu,
};

impl Readable for Cuda {
    fn read(operand: &Self::Operand) -> Vec<f32> {
        operand.values().unwrap()
    }
}

/// Where `cargo xtask emulator` puts it.
fn emulator() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-emulator");
    assert!(
        folder.join("libcuda.so").is_file(),
        "{} is missing\nhint: cargo xtask emulator",
        folder.display()
    );
    folder
}

/// A device of the emulator's libraries, or of the machine's.
fn device(libraries: Option<PathBuf>, is_deterministic: bool) -> Device<Cuda> {
    let (weights, kv) = (WeightType::Bf16, Dtype::Bf16);
    let options = CudaOptions { device: 0, weights, kv, is_deterministic, libraries, cubins: None };
    Device { backend: Cuda::new(options).unwrap(), weights, kv }
}

/// In which mode a check is made.
const BOTH: [bool; 2] = [false, true];
const DETERMINISTIC: [bool; 1] = [true];

macro_rules! checks {
    ($($name:ident: $check:expr, $modes:expr;)*) => {
        mod emulated {
            use super::*;
            $(
                #[test]
                fn $name() {
                    $modes.into_iter().for_each(|mode| $check.check(&device(Some(emulator()), mode)));
                }
            )*
        }

        mod on_a_gpu {
            use super::*;
            $(
                #[test]
                #[ignore = "needs a CUDA device"]
                fn $name() {
                    $modes.into_iter().for_each(|mode| $check.check(&device(None, mode)));
                }
            )*
        }
    };
}

checks! {
    attention_is_the_softmax_mean_of_the_values: attention::Attention::default(), BOTH;
    equal_values_come_out_whatever_the_scores_are: attention::Extremes, BOTH;
    a_prompt_in_chunks_on_other_pages_gives_the_same_bits: attention_invariants::Chunks, DETERMINISTIC;
    sequences_in_any_company_give_the_same_bits: attention_invariants::Company, DETERMINISTIC;
    what_a_row_does_not_see_counts_for_nothing: attention_invariants::Poison, BOTH;
    embed_and_gather_copy_rows: embed_gather::Copies, DETERMINISTIC;
    logit_stats_finds_the_lowest_of_the_largest_and_the_sum: logit_stats::Vocabularies, DETERMINISTIC;
    logit_stats_keeps_what_is_not_finite: logit_stats::Special, DETERMINISTIC;
    matmul_is_the_product_summed_in_f32: matmul::Matmul, DETERMINISTIC;
    no_rows_are_no_work: matmul::NoRows, DETERMINISTIC;
    a_row_with_a_nan_is_nan_and_spoils_no_other: matmul::NotFinite, DETERMINISTIC;
    sums_that_are_gone_on_with_have_the_bits_of_one_product: matmul::Parted, DETERMINISTIC;
    add_adds_number_by_number: matmul::Add, DETERMINISTIC;
    matmul_argmax_finds_the_lowest_of_the_largest_of_the_product: matmul_argmax::Products, DETERMINISTIC;
    matmul_argmax_lets_no_nan_pass: matmul_argmax::NotFinite, DETERMINISTIC;
    shapes_that_do_not_fit_are_refused_with_their_numbers: refusals::Refusals, DETERMINISTIC;
    rms_norm_divides_by_the_root_of_the_mean_square: rms_norm::RmsNorm, DETERMINISTIC;
    rope_turns_each_dimension_with_the_one_half_a_head_away: rope::Rope, DETERMINISTIC;
    rows_together_are_what_each_is_alone: row_invariants::RowsAlone, BOTH;
    swiglu_gates_one_product_by_the_silu_of_the_other: swiglu::Swiglu, DETERMINISTIC;
}

/// A request that cannot be met is an error with its reason.
#[test]
fn what_the_backend_lacks_is_refused_by_name() {
    let options = |device, weights| CudaOptions {
        device,
        weights,
        kv: Dtype::Bf16,
        is_deterministic: false,
        libraries: Some(emulator()),
        cubins: None,
    };
    let error = Cuda::new(options(0, WeightType::Int8)).unwrap_err().to_string();
    assert!(
        error.starts_with("cuda:0: found weights of int8 with keys and values of bf16, expected bf16"),
        "{error}"
    );
    let error = Cuda::new(options(3, WeightType::Bf16)).unwrap_err().to_string();
    assert_eq!(error, "there is no cuda:3, the driver counts 1 devices");
}

/// Memory that is not there is refused with its numbers, and the device goes on.
#[test]
fn more_memory_than_there_is_is_refused_with_its_numbers() {
    use kernels::Backend;
    let device = device(Some(emulator()), true);
    let error = device.backend.kv_cache(1 << 18, 8, 128).unwrap_err().to_string();
    assert!(error.starts_with("cuda:0: kv_cache takes 68719476736 bytes, and "), "{error}");
    assert!(device.backend.kv_cache(2, 8, 128).is_ok());
}

/// Compiled kernels are kept and found again.
#[test]
fn cubins_are_kept_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let open = || {
        let cubins = Some(folder.path().to_owned());
        let (weights, kv, libraries) = (WeightType::Bf16, Dtype::Bf16, Some(emulator()));
        Cuda::new(CudaOptions { device: 0, weights, kv, is_deterministic: false, libraries, cubins }).unwrap()
    };
    drop(open());
    let names = || {
        let entries = std::fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let first = names();
    assert!(
        first.iter().all(|name| name.to_string_lossy().ends_with(".cubin")) && first.len() == 10,
        "{first:?}"
    );
    drop(open());
    assert_eq!(names(), first);
}

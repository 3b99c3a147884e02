//! The battery on a GPU, and on the emulator that runs the same device code without one.
//!
//! Results must be right in both modes; that rows are independent to the bit is asked of the deterministic one alone.

use std::path::{Path, PathBuf};

use kernels::{
    AttentionSlice, Backend, Cuda, CudaOptions, DecodeStep, Int4Groups, KvDtype, RopeTable, WeightType,
    WorkSize,
};

use crate::battery::device::{Check, Device, Readable};
use crate::battery::{
    attend, attention, attention_invariants, checkpoints, choose, draws, embed_gather, logit_stats,
    long_context, matmul, matmul_argmax, refusals, rms_norm, rope, row_invariants, swiglu,
};

impl Readable for Cuda {
    fn read(operand: &Self::Operand) -> Vec<f32> {
        operand.values().unwrap()
    }
}

/// Where `cargo xtask emulator` puts it.
pub(crate) fn emulator() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-emulator");
    assert!(
        folder.join("libcuda.so").is_file(),
        "{} is missing\nhint: cargo xtask emulator",
        folder.display()
    );
    folder
}

/// How a device is set up for a check.
#[derive(Clone, Copy)]
pub(crate) struct Mode {
    is_deterministic: bool,
    ffn_columns: usize,
    weights: WeightType,
    kv: KvDtype,
}

/// Where rows do not depend on their batch.
pub(crate) const FIXED: Mode = Mode {
    is_deterministic: true,
    ffn_columns: Cuda::FFN_COLUMNS,
    weights: WeightType::Bf16,
    kv: KvDtype::Bf16,
};
/// Where contexts are split, and products are cuBLASLt's.
const FAST: Mode = Mode { is_deterministic: false, ..FIXED };
const FP8: Mode = Mode { weights: WeightType::Fp8, ..FIXED };
const INT4: Mode = Mode { weights: WeightType::Int4Weight, ..FIXED };

const DETERMINISTIC: [Mode; 1] = [FIXED];
const BOTH: [Mode; 2] = [FAST, FIXED];
/// Keys and values of every type, and contexts that are split and are not.
const CACHES: [Mode; 4] =
    [FAST, FIXED, Mode { kv: KvDtype::Fp8, ..FAST }, Mode { kv: KvDtype::Fp8, ..FIXED }];
const FIXED_CACHES: [Mode; 2] = [FIXED, Mode { kv: KvDtype::Fp8, ..FIXED }];
/// Both, also with matrices of several chunks, and weights of every type.
const PRODUCTS: [Mode; 8] = [
    FAST,
    FIXED,
    Mode { ffn_columns: 64, ..FAST },
    Mode { ffn_columns: 64, ..FIXED },
    INT4,
    FP8,
    Mode { is_deterministic: false, ..FP8 },
    Mode { is_deterministic: false, ffn_columns: 64, ..FP8 },
];
/// Where sums must have the bits of one product.
const FIXED_SUMS: [Mode; 4] = [FIXED, Mode { ffn_columns: 1024, ..FIXED }, INT4, FP8];

fn options(libraries: Option<PathBuf>, mode: Mode) -> CudaOptions {
    let Mode { is_deterministic, ffn_columns, weights, kv } = mode;
    CudaOptions {
        device: 0,
        weights,
        kv,
        is_deterministic,
        has_graphs: true,
        ffn_columns,
        libraries,
        cubins: None,
    }
}

/// A device of the emulator's libraries, or of the machine's, on which what is never written is no number.
pub(crate) fn device(libraries: Option<PathBuf>, mode: Mode) -> Device<Cuda> {
    let backend = Cuda::new(options(libraries, mode)).unwrap();
    backend.poison_memory();
    Device { int4: Int4Groups::Of128, ..Device::new(backend, mode.weights, mode.kv) }
}

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

        /// All of them, for a program that has no test harness.
        #[allow(dead_code, reason = "tests have a function each")]
        pub(crate) const CHECKS: &[NamedCheck] = &[$((
            stringify!($name),
            |libraries| $modes.into_iter().for_each(|mode| {
                $check.check(&device(libraries.map(Path::to_owned), mode));
            }),
        )),*];

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
    attending_at_once_has_the_bits_of_its_parts: attend::Attend, FIXED_CACHES;
    products_at_once_have_the_bits_of_each: attend::MatmulEach, FIXED_SUMS;
    products_in_pieces_have_the_bits_of_one: attend::MatmulInPieces, FIXED_SUMS;
    attention_is_the_softmax_mean_of_the_values: attention::Attention::default(), CACHES;
    equal_values_come_out_whatever_the_scores_are: attention::Extremes, CACHES;
    a_prompt_in_chunks_on_other_pages_gives_the_same_bits: attention_invariants::Chunks, FIXED_CACHES;
    sequences_in_any_company_give_the_same_bits: attention_invariants::Company, FIXED_CACHES;
    what_a_row_does_not_see_counts_for_nothing: attention_invariants::Poison, CACHES;
    what_a_checkpoint_has_quantised_is_multiplied_as_it_is: checkpoints::Quantized, PRODUCTS;
    groups_of_columns_that_do_not_lie_side_by_side_are_read_or_refused: checkpoints::Ordered, PRODUCTS;
    random_matrices_are_the_host_s: checkpoints::Seeded, FIXED_SUMS;
    integers_with_zeros_of_their_own_are_too: checkpoints::Skew, PRODUCTS;
    a_step_begins_with_the_tokens_of_the_one_before: draws::Ahead, BOTH;
    embed_and_gather_copy_rows: embed_gather::Copies, DETERMINISTIC;
    every_token_is_the_twins: choose::Vocabularies(choose::SMALL), DETERMINISTIC;
    a_large_vocabulary_has_the_twins_tokens_too: choose::Vocabularies(choose::LARGE), DETERMINISTIC;
    rows_are_edited_as_by_the_twin: choose::Edited(choose::SMALL), DETERMINISTIC;
    rows_that_are_not_finite_say_so_and_spoil_no_other: choose::NotFinite, DETERMINISTIC;
    choices_that_mean_nothing_are_refused: choose::Refused, DETERMINISTIC;
    the_longest_context_is_seen_from_its_end: long_context::LongContext::default(), CACHES;
    logit_stats_finds_the_lowest_of_the_largest_and_the_sum: logit_stats::Vocabularies, DETERMINISTIC;
    logit_stats_keeps_what_is_not_finite: logit_stats::Special, DETERMINISTIC;
    matmul_is_the_product_summed_in_f32: matmul::Matmul, PRODUCTS;
    no_rows_are_no_work: matmul::NoRows, PRODUCTS;
    a_row_with_a_nan_is_nan_and_spoils_no_other: matmul::NotFinite, PRODUCTS;
    sums_that_are_gone_on_with_have_the_bits_of_one_product: matmul::Parted, FIXED_SUMS;
    add_adds_number_by_number: matmul::Add, DETERMINISTIC;
    matmul_argmax_finds_the_lowest_of_the_largest_of_the_product: matmul_argmax::Products, BOTH;
    matmul_argmax_lets_no_nan_pass: matmul_argmax::NotFinite, DETERMINISTIC;
    shapes_that_do_not_fit_are_refused_with_their_numbers: refusals::Refusals, DETERMINISTIC;
    rms_norm_divides_by_the_root_of_the_mean_square: rms_norm::RmsNorm, DETERMINISTIC;
    rope_turns_each_dimension_with_the_one_half_a_head_away: rope::Rope, DETERMINISTIC;
    rows_together_are_what_each_is_alone: row_invariants::RowsAlone, FIXED_SUMS;
    swiglu_gates_one_product_by_the_silu_of_the_other: swiglu::Swiglu, PRODUCTS;
}

/// A request that cannot be met is an error with its reason.
#[test]
fn what_the_backend_lacks_is_refused_by_name() {
    let options = |device, weights| CudaOptions { device, weights, ..options(Some(emulator()), FAST) };
    let error = Cuda::new(options(0, WeightType::Int8)).unwrap_err().to_string();
    assert!(
        error.starts_with(
            "cuda:0: found weights of int8 with keys and values of bf16, expected bf16, fp8 or int4-weight, and bf16 or fp8"
        ),
        "{error}"
    );
    let error = Cuda::new(options(3, WeightType::Bf16)).unwrap_err().to_string();
    assert_eq!(error, "there is no cuda:3, the driver counts 1 devices");
}

/// Integers of a checkpoint that the kernels cannot take as they are.
#[test]
fn short_groups_are_refused_with_the_cure() {
    checkpoints::refuses_short_groups(&device(Some(emulator()), INT4));
}

/// Memory that is not there is refused with its numbers, and the device goes on.
#[test]
fn more_memory_than_there_is_is_refused_with_its_numbers() {
    use kernels::Backend;
    let device = device(Some(emulator()), FIXED);
    let error = device.backend.kv_cache(1 << 18, 8, 128).unwrap_err().to_string();
    assert!(error.starts_with("cuda:0: kv_cache takes 68719476736 bytes, and "), "{error}");
    assert!(device.backend.kv_cache(2, 8, 128).is_ok());
}

/// Attention alone, with all that it works in.
struct Attending {
    cuda: Cuda,
    rope: <Cuda as Backend>::Rope,
    cache: <Cuda as Backend>::KvCache,
    arrays: [<Cuda as Backend>::Array; 3],
    out: <Cuda as Backend>::Operand,
}

impl Attending {
    const HEADS: usize = 4;
    const HEAD_DIM: usize = 16;
    const COLS: usize = Self::HEADS * Self::HEAD_DIM;
    const ROWS: usize = 16;
    const CONTEXT: usize = 128;

    fn new(cuda: Cuda) -> Attending {
        let size = WorkSize {
            rows: Self::ROWS,
            sequences: Self::ROWS,
            context_tokens: Self::CONTEXT,
            hidden: Self::COLS,
            kv_heads: Self::HEADS,
            head_dim: Self::HEAD_DIM,
            ..WorkSize::default()
        };
        let angles = Self::CONTEXT * Self::HEAD_DIM / 2;
        let turns = |turn: fn(f32) -> f32| (0..angles).map(|i| turn(i as f32 / 99.0)).collect();
        let rope = RopeTable { head_dim: Self::HEAD_DIM, cos: turns(f32::cos), sin: turns(f32::sin) };
        let mut arrays = [(); 3].map(|()| cuda.array());
        let mut out = cuda.operand();
        arrays.iter_mut().for_each(|array| cuda.reserve(array, Self::ROWS, Self::COLS).unwrap());
        cuda.reserve_operand(&mut out, Self::ROWS, Self::COLS).unwrap();
        let rope = cuda.rope_table(rope).unwrap();
        let mut cache = cuda.kv_cache(2 * Self::ROWS, Self::HEADS, Self::HEAD_DIM).unwrap();
        // What a row sees of its context is there before.
        let numbers: Vec<f32> =
            (0..Self::CONTEXT * Self::COLS).map(|i| (i * 7919 % 1000) as f32 / 500.0 - 1.0).collect();
        let mut context = cuda.array();
        cuda.upload(&numbers, Self::CONTEXT, Self::COLS, &mut context).unwrap();
        for row in 0..Self::ROWS as u32 {
            let (num_rows, pages) = (Self::CONTEXT, vec![2 * row, 2 * row + 1]);
            let slice = AttentionSlice { first_row: 0, num_rows, first_position: 0, pages };
            cuda.kv_append(&mut cache, &context, &context, &[slice]).unwrap();
        }
        cuda.reserve_work(&size).unwrap();
        Attending { rope, cache, arrays, out, cuda }
    }

    /// So many rows that decode, the first at a position and each other one position later; as it is, or to be repeated.
    fn step(&mut self, (rows, position): (usize, usize), is_repeated: bool) -> Vec<f32> {
        let Attending { cuda, rope, cache, arrays: [q, k, v], out } = self;
        let slice = |row: usize| AttentionSlice {
            first_row: row,
            num_rows: 1,
            first_position: position + row,
            pages: vec![2 * row as u32, 2 * row as u32 + 1],
        };
        let slices: Vec<AttentionSlice> = (0..rows).map(slice).collect();
        let positions: Vec<u32> = (0..rows).map(|row| (position + row) as u32).collect();
        let number = |i: usize| (i * 7919 + position * 104_729) % 1000;
        for (seed, array) in [&mut *q, &mut *k, &mut *v].into_iter().enumerate() {
            let numbers = (0..rows * Self::COLS).map(|i| number(i + 31 * seed) as f32 / 500.0 - 1.0);
            cuda.upload(&numbers.collect::<Vec<f32>>(), rows, Self::COLS, array).unwrap();
        }
        let padded = if is_repeated { cuda.padded_rows(rows) } else { rows };
        [&mut *q, &mut *k, &mut *v]
            .into_iter()
            .for_each(|array| cuda.resize(array, padded, Self::COLS).unwrap());
        let mut work = || -> kernels::Result<()> {
            cuda.attend([&mut *q, &mut *k], v, (&*rope, &positions[..]), cache, &slices, out)
        };
        match is_repeated {
            true => cuda.repeat(&DecodeStep { rows: padded, positions: &positions, slices: &slices }, work),
            false => work(),
        }
        .unwrap();
        let values = Cuda::read(out)[..rows * Self::COLS].to_vec();
        assert!(values.iter().all(|value| value.is_finite()));
        values
    }
}

/// A step's work is captured at its second time and launched from then on, as long as no memory comes or goes; rows that nobody asked
/// for change nothing.
fn check_repeats(libraries: Option<&Path>, mode: Mode) {
    let mut attending = Attending::new(device(libraries.map(Path::to_owned), mode).backend);
    // Rows 5 to 8 are of one kind.
    let steps = [(5, 0), (7, 5), (6, 12), (5, 18), (5, 61)];
    let plain = steps.map(|step| attending.step(step, false));
    let mut repeat = |step| (attending.step(step, true), attending.cuda.launched_graphs());
    let repeated = steps.map(&mut repeat);
    assert_eq!(repeated.clone().map(|(_, launched)| launched), [0, 1, 2, 3, 4]);
    assert_eq!(repeated.map(|(values, _)| values), plain);
    drop(attending.cuda.kv_cache(1, 1, 16).unwrap());
    // Run as it is, then captured anew; and 3 rows are of another kind.
    let mut launched = |step| {
        let (plain, repeated) = (attending.step(step, false), attending.step(step, true));
        assert_eq!(repeated, plain);
        attending.cuda.launched_graphs()
    };
    let found = [(6, 12), (7, 5), (3, 60), (3, 60)].map(&mut launched);
    assert_eq!(found, [4, 5, 5, 6]);
}

fn repeats(libraries: Option<&Path>) {
    [FIXED, FAST].into_iter().for_each(|mode| check_repeats(libraries, mode));
}

/// What a check is called, and the check by the libraries of a folder or of the machine.
pub(crate) type NamedCheck = (&'static str, fn(Option<&Path>));

/// As [`CHECKS`], of what no processor has.
#[allow(dead_code, reason = "tests have a function each")]
pub(crate) const CHECKS_OF_GPUS: &[NamedCheck] = &[("a_step_is_captured_once_and_repeated", repeats)];

#[test]
fn a_step_is_captured_once_and_repeated_on_the_emulator() {
    repeats(Some(&emulator()));
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_step_is_captured_once_and_repeated_on_a_gpu() {
    repeats(None);
}

/// A device's own time is no longer than what its host waits for.
#[test]
fn queued_work_is_timed_by_the_device() {
    let cuda = device(Some(emulator()), FAST).backend;
    let (mut array, mut calls) = (cuda.array(), 0);
    let begun = std::time::Instant::now();
    let work = || {
        calls += 1;
        cuda.zeros(64, 64, &mut array)
    };
    let seconds = cuda.seconds_of(work).unwrap();
    // Five samples of eight calls, each behind another one, and one before all. For some the device was early, and they were made again.
    assert!(calls > 5 * (1 + 8) && calls % (1 + 8) == 1, "{calls}");
    assert!(seconds > 0.0 && 40.0 * seconds <= begun.elapsed().as_secs_f64(), "{seconds}");
}

/// Compiled kernels are kept and found again.
#[test]
fn cubins_are_kept_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let open = || {
        let cubins = Some(folder.path().to_owned());
        Cuda::new(CudaOptions { cubins, ..options(Some(emulator()), FAST) }).unwrap()
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
        !first.is_empty() && first.iter().all(|name| name.to_string_lossy().ends_with(".cubin")),
        "{first:?}"
    );
    drop(open());
    assert_eq!(names(), first);
}

/// What cuBLASLt was found to do best is kept beside the cubins, and a run that finds it does not measure again.
#[test]
fn plans_of_products_are_kept_on_disk() {
    use kernels::Backend;
    let folder = tempfile::tempdir().unwrap();
    let product = || {
        let cubins = Some(folder.path().to_owned());
        let backend = Cuda::new(CudaOptions { cubins, ..options(Some(emulator()), FAST) }).unwrap();
        let device = Device::new(backend, WeightType::Bf16, KvDtype::Bf16);
        assert_eq!(device.name(), "cuda sm_90a bf16 kv bf16 cublaslt 13.1.0");
        let ((x, _), w) = (device.operand(&[1.0; 3 * 40], 40), device.matrix(&[0.5; 24 * 40], 24, 40));
        let mut out = device.backend.array();
        device.backend.matmul(&x, &w, &mut out).unwrap();
        device.backend.matmul_add(&x, &w, &mut out).unwrap();
        device.values(&out)
    };
    let plans = || {
        let paths = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let mut plans = paths.filter(|path| path.extension().is_some_and(|ending| ending == "plans"));
        let path = plans.next().expect("a file of plans");
        assert!(plans.next().is_none());
        (std::fs::read_to_string(&path).unwrap(), path)
    };
    let values = product();
    let (text, path) = plans();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..3], ["spanwise gemm plans 1", "cublasLt 130100", "emulator"]);
    assert!(
        lines[3].starts_with("bf16 16 24 40 store ") && lines[4].starts_with("bf16 16 24 40 add "),
        "{text}"
    );
    assert_eq!(lines.len(), 5);
    // The third algorithm in place of what was chosen: it is believed, and not measured.
    let words = |id: u64| format!("{id:016x}{:0112x}", 0);
    let kept = text.lines().map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
        [kind, rows, cols, depth, onto, _, _] => {
            format!("{kind} {rows} {cols} {depth} {onto} {} 7.5\n", words(3))
        }
        _ => format!("{line}\n"),
    });
    let kept: String = kept.collect();
    std::fs::write(&path, &kept).unwrap();
    assert_eq!(product(), values);
    assert_eq!(plans().0, kept);
    // One that the library does not know is measured again.
    std::fs::write(&path, kept.replace(&words(3), &words(9))).unwrap();
    assert_eq!(product(), values);
    assert!(!plans().0.contains(&words(9)));
}

#[test]
fn where_the_library_does_all_products_there_is_nothing_to_tell() {
    for mode in [FIXED, FAST, Mode { is_deterministic: false, ..FP8 }] {
        assert_eq!(Cuda::new(options(Some(emulator()), mode)).unwrap().own_products(), None);
    }
}

/// Without cuBLASLt our own kernel serves, and the profile does not speak of it.
#[test]
fn products_need_no_library() {
    let folder = tempfile::tempdir().unwrap();
    for library in ["libcuda.so", "libnvrtc.so"] {
        std::os::unix::fs::symlink(emulator().join(library), folder.path().join(library)).unwrap();
    }
    let device = device(Some(folder.path().to_owned()), FAST);
    assert_eq!(device.name(), "cuda sm_90a bf16 kv bf16");
    let why = device.backend.own_products().expect("it is told");
    assert!(why.starts_with("library missing: libcublasLt"), "{why}");
    matmul::Matmul.check(&device);
}

//! The values of the keys that are more than a number or a text.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error as _};
use serde::ser::{Serialize, Serializer};

use crate::read::{self, Scalar};

/// An enum whose variants are words in the file, each written once. The first is the default.
macro_rules! words {
    ($(#[$docs:meta])* $name:ident, $expected:literal, { $($(#[$word_docs:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$docs])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$word_docs])* $variant,)+ }

        impl $name {
            /// Every value, in the order of the reference page.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The word that stands for it in a job file.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::ALL[0]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                read::scalar(deserializer, $expected, |found| match found {
                    $(Scalar::Text($word) => Some(Self::$variant),)+
                    _ => None,
                })
            }
        }
    };
}

words! {
    /// How an answer is found in a text, to be compared with the row's own.
    Grader, r#""boxed""#, {
        /// What stands in the last `\boxed{…}`.
        Boxed = "boxed",
    }
}

words! {
    /// Number type in which the weights of blocks are held. Beside f32, matrix products take their inputs in f32,
    /// and embedding and output matrix are held in it; beside all others in bf16.
    Dtype, r#""bf16", "f32", "fp8", "int8", "int8-weight" or "int4-weight""#, {
        /// bfloat16: half the memory of f32 and, where the processor has VDPBF16PS, twice its speed.
        Bf16 = "bf16",
        /// IEEE single precision, for comparing with other programs.
        F32 = "f32",
        /// E4M3 with a scale for each output; inputs are quantised too, with a scale for each row. For GPUs.
        Fp8 = "fp8",
        /// Integers of 8 bits with a scale for each output; inputs are quantised too, and products are of
        /// integers.
        Int8 = "int8",
        /// Integers of 8 bits with a scale for each output, multiplied in bf16.
        Int8Weight = "int8-weight",
        /// Integers of 4 bits with a scale for each output and 32 inputs (on a GPU 128), multiplied in bf16.
        Int4Weight = "int4-weight",
    }
}

words! {
    /// Number type of the KV cache.
    KvCacheDtype, r#""auto", "f32", "bf16" or "fp8""#, {
        /// f32 when the weights are, else bf16.
        Auto = "auto",
        /// IEEE single precision.
        F32 = "f32",
        /// bfloat16.
        Bf16 = "bf16",
        /// E4M3 with a power of two for each head of each token: half the memory of bf16.
        Fp8 = "fp8",
    }
}

words! {
    /// Which instructions the CPU backend uses.
    Simd, r#""auto", "amx", "avx512", "avx2", "portable" or "reference""#, {
        /// The best that the processor has.
        Auto = "auto",
        /// AVX-512, with products of tiles in AMX.
        Amx = "amx",
        /// AVX-512, with VDPBF16PS for bf16.
        Avx512 = "avx512",
        /// AVX2 with FMA.
        Avx2 = "avx2",
        /// No instruction that the compiler's target lacks.
        Portable = "portable",
        /// The plain loops that all the others are compared with; slow.
        Reference = "reference",
    }
}

words! {
    /// The order of the lines in `output.jsonl`.
    Order, r#""input" or "completion""#, {
        /// As the rows stand in the input: lines are put in order at the end.
        Input = "input",
        /// As the rows are done.
        Completion = "completion",
    }
}

impl KvCacheDtype {
    /// The number type this comes to beside weights of `weights`, which is never `Auto`.
    pub fn beside(self, weights: Dtype) -> KvCacheDtype {
        match (self, weights) {
            (Self::Auto, Dtype::F32) => Self::F32,
            (Self::Auto, _) => Self::Bf16,
            (named, _) => named,
        }
    }
}

words! {
    /// Whether an FFN may be cut by its columns between neighbouring stages.
    ColumnCuts, r#""auto" or "off""#, {
        /// Where a plan is faster with it.
        Auto = "auto",
        /// Blocks stay whole.
        Off = "off",
    }
}

words! {
    /// Whether a pipeline may go through its devices twice.
    VirtualStages, r#""auto" or "off""#, {
        /// Where a plan is faster with it.
        Auto = "auto",
        /// Each device is in as many stages as it is named.
        Off = "off",
    }
}

words! {
    /// Which blocks the devices of a stage share.
    SplitBlocks, r#""auto" or "all""#, {
        /// Each half of each block as a plan finds it fastest.
        Auto = "auto",
        /// All that are wide enough, by heads and by columns.
        All = "all",
    }
}

words! {
    /// Whether stages are cut by what was measured on the device.
    Profile, r#""auto" or "off""#, {
        /// Where there is a profile.
        Auto = "auto",
        /// By estimates.
        Off = "off",
    }
}

/// Devices that share each stage's matrices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TensorParallel {
    /// Where a plan is faster with it.
    Auto,
    /// One device for each stage.
    Off,
    /// So many for each stage.
    Widths(Vec<usize>),
}

/// The widths that a stage may have.
pub const TENSOR_PARALLEL_WIDTHS: [usize; 5] = [1, 2, 3, 4, 8];

const TENSOR_PARALLEL: &str =
    "\"auto\", \"off\" or a width of 1, 2, 3, 4 or 8 for each stage such as [1, 1, 2]";

impl Serialize for TensorParallel {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Off => serializer.serialize_str("off"),
            Self::Widths(widths) => serializer.collect_seq(widths),
        }
    }
}

impl<'de> Deserialize<'de> for TensorParallel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = |found: Scalar<'_>| match found {
            Scalar::Text("auto") => Some(Self::Auto),
            Scalar::Text("off") => Some(Self::Off),
            _ => None,
        };
        read::scalar_or_list(deserializer, TENSOR_PARALLEL, word, |widths: Vec<BlockIdx>| {
            let widths: Vec<usize> = widths.into_iter().map(|BlockIdx(width)| width).collect();
            if widths.is_empty() {
                return Err(format!("expected {TENSOR_PARALLEL}, found an empty list"));
            }
            match widths.iter().find(|width| !TENSOR_PARALLEL_WIDTHS.contains(width)) {
                Some(width) => Err(format!("expected {TENSOR_PARALLEL}, found a width of {width}")),
                None => Ok(Self::Widths(widths)),
            }
        })
    }
}

/// What a device is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// An equal group of the machine's cores.
    Cpu,
    /// A GPU, as NVIDIA's driver counts them.
    Cuda,
}

impl DeviceKind {
    /// The word before the colon.
    fn word(self) -> &'static str {
        match self {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Cuda => "cuda",
        }
    }
}

/// A device that can host a stage, written `cpu:0` or `cuda:0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Device {
    /// What it is made of.
    pub kind: DeviceKind,
    /// Which of its kind, from 0.
    pub index: usize,
}

impl Device {
    /// `cpu:index`.
    pub const fn cpu(index: usize) -> Self {
        Self { kind: DeviceKind::Cpu, index }
    }
}

/// Why a text names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Not of the form `kind:index`.
    #[error("expected a device such as \"cpu:0\", found {0:?}")]
    Form(String),
    /// A kind that this build has no backend for.
    #[error("unknown device kind `{kind}` in {text:?}, there are: cpu, cuda")]
    Kind {
        /// The kind asked for.
        kind: String,
        /// The whole text.
        text: String,
    },
}

/// A machine with more groups of cores than this is a typing error.
const MAX_DEVICE_INDEX: usize = 1023;

impl FromStr for Device {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let form = || DeviceError::Form(text.to_owned());
        let (kind, index) = text.split_once(':').ok_or_else(form)?;
        let kind = match kind {
            "cpu" => DeviceKind::Cpu,
            "cuda" => DeviceKind::Cuda,
            "" => return Err(form()),
            _ => return Err(DeviceError::Kind { kind: kind.to_owned(), text: text.to_owned() }),
        };
        let index = index.parse().ok().filter(|index| *index <= MAX_DEVICE_INDEX).ok_or_else(form)?;
        let device = Self { kind, index };
        // `cpu:+1` and `cpu:01` parse too; one device has one name.
        if device.to_string() == text { Ok(device) } else { Err(form()) }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind.word(), self.index)
    }
}

impl Serialize for Device {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text: String = read::scalar(deserializer, "a device such as \"cpu:0\"", |found| match found {
            Scalar::Text(text) => Some(text.to_owned()),
            _ => None,
        })?;
        text.parse().map_err(D::Error::custom)
    }
}

words! {
    /// Where the stages of a pipeline run.
    StagesRunIn, r#""threads" or "processes""#, {
        /// Threads of this process.
        Threads = "threads",
        /// A process each.
        Processes = "processes",
    }
}

words! {
    /// Where the ranks of a stage run that has several.
    Ranks, r#""threads" or "processes""#, {
        /// Threads of one process.
        Threads = "threads",
        /// The first in this process, each other in one of its own.
        Processes = "processes",
    }
}

/// Where a stage begins or ends: before a block, or before a column of a block's FFN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The block.
    pub block: usize,
    /// The column; 0 for the block's begin.
    pub column: usize,
}

impl From<usize> for Place {
    fn from(block: usize) -> Self {
        Self { block, column: 0 }
    }
}

/// As in a job file: `14`, or `14:6400` for a column.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.column {
            0 => write!(f, "{}", self.block),
            column => write!(f, "{}:{column}", self.block),
        }
    }
}

/// Which blocks each stage holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stages {
    /// Cut by cost.
    Auto,
    /// One half-open range for each stage, contiguous from 0, none empty.
    Blocks(Vec<Range<Place>>),
}

const STAGES: &str = "\"auto\" or block ranges such as [[0, 14], [14, 30]]";

impl Serialize for Stages {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Blocks(ranges) => {
                serializer.collect_seq(ranges.iter().map(|range| [range.start, range.end]))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Stages {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let auto = |found: Scalar<'_>| matches!(found, Scalar::Text("auto")).then_some(Self::Auto);
        read::scalar_or_list(deserializer, STAGES, auto, |ranges: Vec<BlockRange>| {
            let ranges: Vec<_> = ranges.into_iter().map(|BlockRange(range)| range).collect();
            check_contiguous(&ranges)?;
            Ok(Self::Blocks(ranges))
        })
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.column {
            0 => serializer.serialize_u64(self.block as u64),
            _ => serializer.collect_str(self),
        }
    }
}

const PLACE: &str = "a block's index, or a column of its FFN such as \"67:6400\"";

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let column = |text: &str| -> Option<Self> {
            let (block, column) = text.split_once(':')?;
            let place = Self { block: block.parse().ok()?, column: column.parse().ok()? };
            // `67:0` is `67`, and one place has one name.
            (place.to_string() == text && place.block <= u32::MAX as usize).then_some(place)
        };
        read::scalar(deserializer, PLACE, |found| match found {
            Scalar::Text(text) => column(text),
            found => found.integer::<u32>(0).map(|block| Self::from(block as usize)),
        })
    }
}

struct BlockRange(Range<Place>);

impl<'de> Deserialize<'de> for BlockRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = "a block range such as [0, 14]";
        read::scalar_or_list(
            deserializer,
            expected,
            |_| None,
            |bounds: Vec<Place>| match bounds[..] {
                [start, end] if start < end => Ok(Self(start..end)),
                [start, end] if start.column == 0 && end.column == 0 => Err(format!(
                    "block range [{start}, {end}] is empty: the end is the first block not taken, so at least {}",
                    start.block + 1
                )),
                [start, end] => Err(format!("block range [{start}, {end}] is empty: the end is not taken")),
                _ => Err(format!("expected {expected}, found a list of {}", bounds.len())),
            },
        )
    }
}

struct BlockIdx(usize);

impl<'de> Deserialize<'de> for BlockIdx {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read::small(deserializer).map(|idx: u32| Self(idx as usize))
    }
}

fn check_contiguous(ranges: &[Range<Place>]) -> Result<(), String> {
    if ranges.is_empty() {
        return Err(format!("expected {STAGES}, found an empty list"));
    }
    let mut next = Place::from(0);
    for (stage_idx, range) in ranges.iter().enumerate() {
        if range.start != next {
            return Err(format!(
                "stage {stage_idx} starts at block {}, expected block {next}: stages take all blocks in order",
                range.start
            ));
        }
        next = range.end;
    }
    Ok(())
}

/// A number of tokens or of sequences that a job may leave to the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutoCount {
    /// As many as are best: the key says for what.
    Auto,
    /// This many.
    Given(usize),
}

impl Serialize for AutoCount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Given(count) => serializer.serialize_u64(*count as u64),
        }
    }
}

impl<'de> Deserialize<'de> for AutoCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read::scalar(deserializer, "\"auto\" or an integer of at least 1", |found| match found {
            Scalar::Text("auto") => Some(Self::Auto),
            found => found.integer(1).map(Self::Given),
        })
    }
}

//! What a model lacks that does not fit, and the nearest that does.

use configs::DeviceList;
use serde::Serialize;
use stages::cost::NumberType;

use crate::abilities::Abilities;
use crate::plan::setting::Setting;
use crate::plan::{answer, kv_type};

/// How far a setting is from fitting.
#[derive(Debug, Serialize)]
pub(crate) struct Missing {
    /// On all devices together.
    pub(crate) bytes: u64,
    /// What each device would need to have more, for some layout to fit.
    pub(crate) bytes_per_device: u64,
    /// Settings that fit, each with one thing changed; the nearest first.
    pub(crate) nearest: Vec<Nearest>,
}

/// One change after which the model fits.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Nearest {
    TokensInFlight(u64),
    Dtype(&'static str),
    Devices(String),
}

/// More devices than this many times those there are no neighbour of the question any more.
const MOST_TIMES: usize = 16;

pub(crate) fn missing(setting: &Setting) -> Missing {
    let needed = setting.types.weights.bytes(setting.config.params()).saturating_mul(4);
    // No device needs more than the whole model with everything in flight.
    let most =
        needed.saturating_add(setting.tokens_in_flight.unwrap_or(0).saturating_mul(1 << 20)) + (1 << 40);
    let bytes_per_device = least(0, most, |bytes| answer::fits(setting, bytes));
    let mut nearest = vec![];
    nearest.extend(fewer_tokens(setting).map(Nearest::TokensInFlight));
    nearest.extend(narrower(setting).map(Nearest::Dtype));
    nearest.extend(more_devices(setting).map(|devices| Nearest::Devices(devices.to_string())));
    let bytes = bytes_per_device.saturating_mul(setting.devices.num_devices() as u64);
    Missing { bytes, bytes_per_device, nearest }
}

/// The least number above `no` for which `is_enough`, which holds for all above it and for `yes`.
fn least(mut no: u64, mut yes: u64, is_enough: impl Fn(u64) -> bool) -> u64 {
    while yes - no > 1 {
        let middle = no.midpoint(yes);
        if is_enough(middle) { yes = middle } else { no = middle }
    }
    yes
}

/// The most tokens in flight that there is room for, where more were asked for.
fn fewer_tokens(setting: &Setting) -> Option<u64> {
    let wanted = setting.tokens_in_flight?;
    let is_too_many =
        |tokens| !answer::fits(&Setting { tokens_in_flight: Some(tokens), ..setting.clone() }, 0);
    let fewest = setting.mix.kv_tokens_per_row;
    (fewest < wanted && !is_too_many(fewest)).then(|| least(fewest, wanted, is_too_many) - 1)
}

/// The widest of the narrower types of weights that fits.
fn narrower(setting: &Setting) -> Option<&'static str> {
    let own = setting.types.weights;
    // A thousand million numbers tell types apart that have scales beside them.
    let bytes = |kind: NumberType| kind.bytes(1 << 30);
    let fitting = types_of(setting).into_iter().filter(|kind| bytes(*kind) < bytes(own)).find(|weights| {
        let mut narrow = setting.clone();
        narrow.types.weights = *weights;
        if !setting.is_kv_type_given {
            narrow.types.kv = kv_type(*weights);
        }
        narrow.has_given_widths() && answer::fits(&narrow, 0)
    });
    fitting.map(|weights| weights.name())
}

/// The types of weights that the devices compute with, the widest first: the job's own have those that a run has on them; of
/// others CPUs have integers, and so has a job that names them, and GPUs narrow floating-point numbers.
fn types_of(setting: &Setting) -> Vec<NumberType> {
    use NumberType::{Bf16, F32, Fp4, Fp8, Int4Weight, Int8, Int8Weight};
    if let Some(kind) = setting.runs_on {
        let runs = |weights: &NumberType| weights.stored().and_then(|own| Abilities::of(own, kind)).is_some();
        return [F32, Bf16, Fp8, Int8Weight, Int4Weight].into_iter().filter(runs).collect();
    }
    let is_cpu = |(_, name): &(usize, String)| configs::cpu_of(name).is_some();
    let has_integers = matches!(setting.types.weights, Int8 | Int8Weight | Int4Weight);
    match has_integers || setting.devices.runs().iter().any(is_cpu) {
        true => vec![F32, Bf16, Int8Weight, Int4Weight],
        false => vec![F32, Bf16, Fp8, Fp4],
    }
}

/// The fewest devices of the last kind more.
fn more_devices(setting: &Setting) -> Option<DeviceList> {
    let most = setting.devices.num_devices() * MOST_TIMES;
    (1..=most)
        .map(|more| setting.devices.with_more(more))
        .find(|devices| answer::fits(&setting.on(devices.clone()), 0))
}

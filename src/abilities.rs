//! What stages can do whose weights are of some type, on devices of some kind: a run refuses what they cannot, and a plan for the
//! job's own devices leaves it out.

use configs::DeviceKind;
use stages::WeightType;

/// What stages can do beside having whole blocks on single devices, which all can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// The multiple of columns at which an FFN can be cut without a change of bits, if it can.
    pub(crate) sum_cut: Option<usize>,
    /// Whether several devices may share a stage.
    pub(crate) may_share: bool,
}

impl Abilities {
    /// None where such devices do not compute with such weights at all. On GPUs a scale of narrow weights belongs to inputs that
    /// several of them would have, and groups of 4 bits are wider than what cuts are multiples of.
    pub(crate) fn of(weights: WeightType, kind: DeviceKind) -> Option<Self> {
        use WeightType::{Bf16, Fp8, Int4Weight};
        let (is_there, is_free) = match kind {
            DeviceKind::Cpu => (weights != Fp8, true),
            DeviceKind::Cuda => (matches!(weights, Bf16 | Fp8 | Int4Weight), weights == Bf16),
        };
        let sum_cut = weights.sum_cut().filter(|_| is_free);
        is_there.then_some(Abilities { sum_cut, may_share: is_free })
    }
}

#[cfg(test)]
mod tests {
    use stages::{INT8_BLOCK, SUM_CUT};

    use super::*;

    #[test]
    fn on_gpus_bf16_alone_is_shared_and_cut_and_on_cpus_all_that_scales_allow() {
        let [cpu, gpu] = [DeviceKind::Cpu, DeviceKind::Cuda];
        let can = |sum_cut, may_share| Some(Abilities { sum_cut, may_share });
        for (weights, on_cpus, on_gpus) in [
            (WeightType::F32, can(Some(SUM_CUT), true), None),
            (WeightType::Bf16, can(Some(SUM_CUT), true), can(Some(SUM_CUT), true)),
            (WeightType::Fp8, None, can(None, false)),
            (WeightType::Int8, can(Some(INT8_BLOCK), true), None),
            (WeightType::Int8Weight, can(None, true), None),
            (WeightType::Int4Weight, can(Some(SUM_CUT), true), can(None, false)),
        ] {
            let found = [cpu, gpu].map(|kind| Abilities::of(weights, kind));
            assert_eq!(found, [on_cpus, on_gpus], "{weights:?}");
        }
    }
}

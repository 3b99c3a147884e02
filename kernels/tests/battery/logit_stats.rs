//! `logit_stats`.

use kernels::LogitStats;

use crate::battery::device::{Check, Device, F32_UNIT, Readable, every_weight_device};
use crate::battery::random::Random;

const VOCABULARIES: [usize; 9] = [1, 2, 17, 100, 4095, 4096, 4097, 49152, 128_256];

fn stats<B: Readable>(device: &Device<B>, logits: &[f32], vocabulary: usize) -> Vec<LogitStats> {
    let mut stats = vec![LogitStats { argmax: 7, max: 7.0, log_sum_exp: 7.0 }];
    device.backend.logit_stats(&device.array(logits, vocabulary), &mut stats).unwrap();
    stats
}

pub(crate) struct Vocabularies;

impl Check for Vocabularies {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(5);
        for vocabulary in VOCABULARIES {
            // Whole numbers, so that the largest stands at several places.
            let logits: Vec<f32> =
                (0..3 * vocabulary).map(|_| (random.signed() * 20.0).round() + 1000.0).collect();
            let found = stats(device, &logits, vocabulary);
            assert_eq!(found.len(), 3);
            for (found, logits) in found.iter().zip(logits.chunks_exact(vocabulary)) {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let argmax = logits.iter().position(|&logit| logit == max).unwrap();
                assert_eq!((found.argmax as usize, found.max), (argmax, max), "{}", device.name());
                let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
                // n positive terms are within n units of their sum; exponential and logarithm add a few.
                let bound = (vocabulary as f64 + 8.0) * F32_UNIT + 4.0 * F32_UNIT * sum.ln();
                let error = (f64::from(found.log_sum_exp) - sum.ln()).abs();
                assert!(error <= bound, "{} of {vocabulary}: off by {error:e} of {bound:e}", device.name());
            }
        }
    }
}

#[test]
fn logit_stats_finds_the_lowest_of_the_largest_and_the_sum() {
    every_weight_device(&Vocabularies);
}

pub(crate) struct Special;

impl Check for Special {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let (vocabulary, at) = (9000, 8111);
        let with = |logit: f32| {
            let mut logits = vec![-3.0; vocabulary];
            logits[at] = logit;
            stats(device, &logits, vocabulary)[0]
        };
        let name = device.name();
        assert!(with(f32::NAN).max.is_nan(), "{name}: a NaN must not pass unseen");
        let infinite = with(f32::INFINITY);
        assert_eq!((infinite.argmax, infinite.max), (at as u32, f32::INFINITY), "{name}");
        let finite = with(f32::NEG_INFINITY);
        assert_eq!((finite.argmax, finite.max), (0, -3.0), "{name}");
        let expected = (vocabulary as f64 - 1.0).ln();
        assert!((f64::from(finite.log_sum_exp) - expected).abs() < 1e-3, "{name}: {finite:?}");

        // A mask may take whole segments of a row away.
        let mut masked = vec![f32::NEG_INFINITY; vocabulary];
        masked[at] = 2.5;
        let masked = stats(device, &masked, vocabulary)[0];
        assert_eq!((masked.argmax, masked.max, masked.log_sum_exp), (at as u32, 2.5, 0.0), "{name}");
        assert_eq!(stats(device, &[f32::NEG_INFINITY; 20], 20)[0].max, f32::NEG_INFINITY, "{name}");

        let zeros = stats(device, &[-0.0, 0.0, -0.0], 3)[0];
        assert_eq!((zeros.argmax, zeros.max), (0, 0.0), "{name}: the zeros are equal");
        assert!(stats(device, &[], 5).is_empty(), "{name}");
    }
}

#[test]
fn logit_stats_keeps_what_is_not_finite() {
    every_weight_device(&Special);
}

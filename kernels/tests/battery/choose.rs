//! `choose`: every backend takes the token of the plain twin, whatever the logits are.

use kernels::{Choice, ChoiceScratch, Chosen, LogitStats, choose_row};

use crate::battery::device::{Check, Device, Readable, every_weight_device};
use crate::battery::random::Random;

const GREEDY: Choice =
    Choice { given: None, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0, top: 0 };

/// Every way to truncate, and all of them together; a given token; many and few named beside it.
fn choices(vocabulary: usize, uniform: u64) -> Vec<Choice> {
    let drawn = Choice { temperature: 0.8, uniform, ..GREEDY };
    vec![
        Choice { top: 3, ..GREEDY },
        drawn,
        Choice { top_k: 1, ..drawn },
        Choice { top_k: 40, top: 5, ..drawn },
        Choice { top_k: u32::MAX, ..drawn },
        Choice { top_p: 0.9, temperature: 1.5, ..drawn },
        Choice { top_p: 1e-20, ..drawn },
        Choice { min_p: 0.05, ..drawn },
        Choice { min_p: 1.0, ..drawn },
        Choice { top_k: 50, top_p: 0.95, min_p: 0.02, temperature: 1.0, top: 20, ..drawn },
        Choice { temperature: 1e-6, ..drawn },
        Choice { temperature: 100.0, top_p: 0.5, ..drawn },
        Choice { given: Some(vocabulary as u32 / 2), top: 1, ..GREEDY },
    ]
}

fn chosen<B: Readable>(device: &Device<B>, logits: &[f32], choices: &[Choice]) -> Vec<Chosen> {
    let (vocabulary, mut out) = (logits.len() / choices.len(), Vec::new());
    let logits = device.array(logits, vocabulary);
    device.backend.choose(&logits, choices, &mut ChoiceScratch::default(), &mut out).unwrap();
    out
}

/// All but the log-sum-exp, which backends sum in orders of their own.
fn assert_like_the_twin(name: &str, row: &[f32], choice: &Choice, found: &Chosen) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let argmax = row.iter().position(|&logit| logit == max).unwrap() as u32;
    let stats = LogitStats { argmax, max, log_sum_exp: found.stats.log_sum_exp };
    let expected = choose_row(row, stats, choice, &mut ChoiceScratch::default());
    assert_eq!(*found, expected, "{name}: {choice:?} of {} tokens", row.len());
}

/// Logits of one kind each: spread, few values with many ties, all alike, all but one impossible, a long tail.
fn kinds(vocabulary: usize, random: &mut Random) -> Vec<Vec<f32>> {
    let at = vocabulary * 2 / 3;
    let mut row = |logit: &mut dyn FnMut(usize, f32) -> f32| -> Vec<f32> {
        (0..vocabulary).map(|i| logit(i, random.signed())).collect()
    };
    vec![
        row(&mut |_, x| x * 12.0),
        row(&mut |_, x| (x * 2.0).round() - 0.0),
        row(&mut |_, _| -7.25),
        row(&mut |i, _| if i == at { 3.0 } else { f32::NEG_INFINITY }),
        row(&mut |i, x| 20.0 - (i as f32 * 0.01).min(60.0) + x * 1e-3),
    ]
}

pub(crate) struct Vocabularies(pub(crate) &'static [usize]);

impl Check for Vocabularies {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(7);
        for &vocabulary in self.0 {
            for (kind, row) in kinds(vocabulary, &mut random).into_iter().enumerate() {
                // The ends of the line, and a place in it.
                let uniform = [0, u64::MAX, 0x9e37_79b9_7f4a_7c15][kind % 3];
                let choices = choices(vocabulary, uniform);
                let logits: Vec<f32> = choices.iter().flat_map(|_| row.iter().copied()).collect();
                let found = chosen(device, &logits, &choices);
                assert_eq!(found.len(), choices.len());
                for (choice, found) in choices.iter().zip(&found) {
                    assert_like_the_twin(&device.name(), &row, choice, found);
                }
            }
        }
    }
}

/// From one token to a number that is no multiple of a block, and beyond 16 bits.
pub(crate) const SMALL: &[usize] = &[1, 2, 257, 1000, 66_001];
/// Llama 3's.
pub(crate) const LARGE: &[usize] = &[128_256];

#[test]
fn every_backend_draws_the_twins_tokens() {
    every_weight_device(&Vocabularies(SMALL));
}

pub(crate) struct NotFinite;

impl Check for NotFinite {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let vocabulary = 600;
        let drawn = Choice { temperature: 1.0, top_k: 5, uniform: 1 << 63, top: 4, ..GREEDY };
        let mut logits: Vec<f32> = (0..4 * vocabulary).map(|i| (i % 97) as f32 * 0.1).collect();
        logits[123] = f32::NAN;
        logits[vocabulary + 5] = f32::INFINITY;
        logits[2 * vocabulary..3 * vocabulary].fill(f32::NEG_INFINITY);
        let found = chosen(device, &logits, &[drawn; 4]);
        let name = device.name();
        assert!(found[0].stats.max.is_nan(), "{name}: a NaN must not pass unseen");
        assert_eq!(found[1].stats.max, f32::INFINITY, "{name}");
        assert_eq!(found[2].stats.max, f32::NEG_INFINITY, "{name}");
        assert!(found[..3].iter().all(|found| found.top.is_empty()), "{name}");
        assert_like_the_twin(&name, &logits[3 * vocabulary..], &drawn, &found[3]);
    }
}

#[test]
fn rows_that_are_not_finite_say_so_and_spoil_no_other() {
    every_weight_device(&NotFinite);
}

pub(crate) struct Refused;

impl Check for Refused {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let logits = device.array(&[1.0, 2.0, 3.0], 3);
        let refusal = |choices: &[Choice]| {
            let mut out = Vec::new();
            let result = device.backend.choose(&logits, choices, &mut ChoiceScratch::default(), &mut out);
            result.unwrap_err().to_string()
        };
        assert_eq!(refusal(&[]), "choose: choices has shape [0], expected [1]");
        let given = Choice { given: Some(3), ..GREEDY };
        assert_eq!(refusal(&[given]), "choose: token 3 is outside 0..3");
        let hot = Choice { temperature: f32::NAN, ..GREEDY };
        assert!(refusal(&[hot]).starts_with("choose: found temperature NaN, top_p 1 and min_p 0, expected"));
        assert!(refusal(&[Choice { top_p: 0.0, ..GREEDY }]).contains("top_p 0"));
    }
}

#[test]
fn choices_that_mean_nothing_are_refused() {
    every_weight_device(&Refused);
}

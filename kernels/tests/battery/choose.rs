//! `choose`: every backend takes the token of the plain twin, whatever the logits are.

use kernels::{Choice, ChoiceScratch, Chosen, Edit, Edits, LogitStats, RowEdits, choose_row};

use crate::battery::device::{Check, Device, Readable, every_device};
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

fn chosen<B: Readable>(
    device: &Device<B>,
    logits: &[f32],
    choices: &[Choice],
    edits: &[RowEdits<'_>],
) -> Vec<Chosen> {
    let (vocabulary, mut out, mut all) = (logits.len() / choices.len(), Vec::new(), Edits::default());
    edits.iter().for_each(|row| all.add_row(*row));
    let mut logits = device.array(logits, vocabulary);
    let scratch = &mut ChoiceScratch::default();
    device.backend.choose(&mut logits, choices, &all, scratch, &mut out).unwrap();
    out
}

/// All but the log-sum-exp, which backends sum in orders of their own.
fn assert_like_the_twin(name: &str, row: &[f32], choice: &Choice, edits: RowEdits<'_>, found: &Chosen) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let argmax = row.iter().position(|&logit| logit == max).unwrap() as u32;
    let stats = LogitStats { argmax, max, log_sum_exp: found.stats.log_sum_exp };
    let expected = choose_row(row, stats, choice, edits, &mut ChoiceScratch::default());
    let edited =
        (edits.edits.len(), edits.mask.map(|mask| mask.iter().map(|word| word.count_ones()).sum::<u32>()));
    assert_eq!(*found, expected, "{name}: {choice:?} of {} tokens, {edited:?} edited", row.len());
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
                let found = chosen(device, &logits, &choices, &[]);
                assert_eq!(found.len(), choices.len());
                for (choice, found) in choices.iter().zip(&found) {
                    assert_like_the_twin(&device.name(), &row, choice, RowEdits::default(), found);
                }
            }
        }
    }
}

/// Edits of all tokens, of a few and of none; masks that leave all, some, the last and none.
struct Changes {
    edits: [Vec<Edit>; 4],
    masks: [Option<Vec<u32>>; 5],
}

impl Changes {
    fn of(vocabulary: usize, random: &mut Random) -> Changes {
        let words = vocabulary.div_ceil(32);
        let mut some = |every: usize| -> Vec<Edit> {
            let edit = |token| Edit {
                token,
                scale: [1.0, 1.3, 0.7][token as usize % 3],
                shift: if token % 11 == 5 { f32::NEG_INFINITY } else { random.signed() * 3.0 },
            };
            (0..vocabulary as u32).step_by(every).map(edit).collect()
        };
        let barred = |token| Edit { token, scale: 1.0, shift: f32::NEG_INFINITY };
        let edits = [vec![], some(1), some(7), (0..vocabulary as u32).map(barred).collect()];
        let mut last = vec![0; words];
        last[words - 1] = 1 << ((vocabulary - 1) % 32);
        let scattered = (0..words as u32).map(|word| word.wrapping_mul(0x9e37_79b9) | 2).collect();
        Changes {
            edits,
            masks: [None, Some(vec![u32::MAX; words]), Some(scattered), Some(last), Some(vec![0; words])],
        }
    }

    fn each(&self) -> impl Iterator<Item = RowEdits<'_>> {
        self.edits
            .iter()
            .flat_map(|edits| self.masks.iter().map(move |mask| RowEdits { edits, mask: mask.as_deref() }))
    }
}

pub(crate) struct Edited(pub(crate) &'static [usize]);

impl Check for Edited {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut random = Random::new(11);
        for &vocabulary in self.0 {
            let changes = Changes::of(vocabulary, &mut random);
            for (kind, row) in kinds(vocabulary, &mut random).into_iter().enumerate() {
                let uniform = [0, u64::MAX, 0x9e37_79b9_7f4a_7c15][kind % 3];
                let asked = choices(vocabulary, uniform);
                // Rows beside each other with edits of their own, each with one of the choices.
                let edits: Vec<RowEdits<'_>> = changes.each().collect();
                let choices: Vec<Choice> =
                    (0..edits.len()).map(|i| asked[(i + 3 * kind) % asked.len()]).collect();
                let logits: Vec<f32> = choices.iter().flat_map(|_| row.iter().copied()).collect();
                let found = chosen(device, &logits, &choices, &edits);
                for ((choice, edits), found) in choices.iter().zip(edits).zip(&found) {
                    assert_like_the_twin(&device.name(), &row, choice, edits, found);
                }
            }
        }
    }
}

#[test]
fn every_backend_edits_rows_as_the_twin_does() {
    every_device(&Edited(SMALL));
}

/// From one token to a number that is no multiple of a block, and beyond 16 bits.
pub(crate) const SMALL: &[usize] = &[1, 2, 257, 1000, 66_001];
/// Llama 3's.
pub(crate) const LARGE: &[usize] = &[128_256];

#[test]
fn every_backend_draws_the_twins_tokens() {
    every_device(&Vocabularies(SMALL));
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
        let found = chosen(device, &logits, &[drawn; 4], &[]);
        let name = device.name();
        assert!(found[0].stats.max.is_nan(), "{name}: a NaN must not pass unseen");
        assert_eq!(found[1].stats.max, f32::INFINITY, "{name}");
        assert_eq!(found[2].stats.max, f32::NEG_INFINITY, "{name}");
        assert!(found[..3].iter().all(|found| found.top.is_empty() && found.token.is_none()), "{name}");
        assert_like_the_twin(&name, &logits[3 * vocabulary..], &drawn, RowEdits::default(), &found[3]);
    }
}

#[test]
fn rows_that_are_not_finite_say_so_and_spoil_no_other() {
    every_device(&NotFinite);
}

pub(crate) struct Refused;

impl Check for Refused {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let mut logits = device.array(&[1.0, 2.0, 3.0], 3);
        let mut refusal = |choices: &[Choice], rows: &[RowEdits<'_>]| {
            let (mut out, mut edits, scratch) = (Vec::new(), Edits::default(), &mut ChoiceScratch::default());
            rows.iter().for_each(|row| edits.add_row(*row));
            let result = device.backend.choose(&mut logits, choices, &edits, scratch, &mut out);
            result.unwrap_err().to_string()
        };
        assert_eq!(refusal(&[], &[]), "choose: choices has shape [0], expected [1]");
        let given = Choice { given: Some(3), ..GREEDY };
        assert_eq!(refusal(&[given], &[]), "choose: token 3 is outside 0..3");
        let hot = Choice { temperature: f32::NAN, ..GREEDY };
        assert!(
            refusal(&[hot], &[]).starts_with("choose: found temperature NaN, top_p 1 and min_p 0, expected")
        );
        assert!(refusal(&[Choice { top_p: 0.0, ..GREEDY }], &[]).contains("top_p 0"));
        let mut refusal = |rows: &[RowEdits<'_>]| refusal(&[GREEDY], rows);
        assert_eq!(refusal(&[RowEdits::default(); 2]), "choose: edits has shape [2], expected [1]");
        let masked = RowEdits { mask: Some(&[0, 0]), ..RowEdits::default() };
        assert_eq!(refusal(&[masked]), "choose: mask has shape [2], expected [1]");
        let edit = |token, scale, shift| Edit { token, scale, shift };
        let mut edited = |edits: &[Edit]| refusal(&[RowEdits { edits, mask: None }]);
        assert_eq!(edited(&[edit(3, 1.0, 0.0)]), "choose: edited token 3 is outside 0..3");
        for wrong in [edit(1, 0.0, 0.0), edit(1, f32::INFINITY, 0.0), edit(1, 1.0, f32::NAN)] {
            let found = edited(&[wrong]);
            assert!(
                found.starts_with(&format!("choose: found {wrong:?}, expected a finite scale")),
                "{found}"
            );
        }
        assert!(edited(&[edit(1, 1.0, 0.0), edit(1, 1.0, 0.0)]).ends_with("and rising tokens"));
    }
}

#[test]
fn choices_that_mean_nothing_are_refused() {
    every_device(&Refused);
}

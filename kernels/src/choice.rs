//! How a token is chosen from a row of logits: what is asked, what comes back, and the plain way to it.
//!
//! Every backend gives the same token for equal logits. So weights are `exp((logit - max) / temperature)` in f32 operations that
//! round alike everywhere, and their shares are counted in whole numbers, whose sums know no order. All that truncation
//! leaves is a beginning of the tokens by falling weight, ties by id, and is known by its mass.
//!
//! A row may be edited before the draw, by [`Edits`]: penalties, biases, tokens that are barred and masks all come to that. What is
//! reported beside the token, its logit among it, is of the row as it was.

use crate::backend::LogitStats;

/// What is asked of a row of logits. A draw applies the row's edits, its mask, temperature, top-k, top-p and min-p, in this order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// No draw: this token, for its logit.
    pub given: Option<u32>,
    /// Divides the logits; 0 takes the largest.
    pub temperature: f32,
    /// Keep this many of the heaviest; 0 keeps all.
    pub top_k: u32,
    /// Keep the heaviest whose shares sum to at least this, above 0; 1 keeps all.
    pub top_p: f32,
    /// Keep those of at least this share of the heaviest one's weight; 0 keeps all.
    pub min_p: f32,
    /// Where on the line from 0 to the sum of what is kept the token lies, in 2⁻⁶⁴.
    pub uniform: u64,
    /// Tokens to be named with the largest logits.
    pub top: u32,
}

/// How the logit of a token is changed before the draw: one above 0 is divided by `scale`, any other multiplied by it, and
/// then `shift` is added; each step is rounded to f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Edit {
    /// Whose.
    pub token: u32,
    /// Above 0 and finite; 1 changes nothing. It is a repetition penalty (Keskar et al. 2019, CTRL).
    pub scale: f32,
    /// Below infinity; that of a token that must not be drawn is `-inf`.
    pub shift: f32,
}

/// What is changed of each row of logits before the draw. Of no rows at all: nothing of any.
#[derive(Debug, Clone, Default)]
pub struct Edits {
    pub(crate) edits: Vec<Edit>,
    pub(crate) masks: Vec<u32>,
    pub(crate) rows: Vec<EditsEnd>,
}

/// Where a row's edits and its mask end in those of all rows, and whether it has a mask.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct EditsEnd {
    pub(crate) edits: usize,
    pub(crate) masks: usize,
}

/// What is changed of one row.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowEdits<'a> {
    /// By rising token, at most one for each.
    pub edits: &'a [Edit],
    /// A bit for each token of the vocabulary, from the lowest of each word on: 0 bars the token, 1 leaves it. Nothing: bars none.
    pub mask: Option<&'a [u32]>,
}

impl Edits {
    /// Forgets all rows, and keeps the memory.
    pub fn clear(&mut self) {
        self.edits.clear();
        self.masks.clear();
        self.rows.clear();
    }

    /// Adds a row.
    pub fn add_row(&mut self, row: RowEdits<'_>) {
        self.edits.extend_from_slice(row.edits);
        self.masks.extend_from_slice(row.mask.unwrap_or_default());
        self.rows.push(EditsEnd { edits: self.edits.len(), masks: self.masks.len() });
    }

    /// Where a row's begin, which is where those of the row before end.
    pub(crate) fn begin(&self, row: usize) -> EditsEnd {
        let before = row.min(self.rows.len()).checked_sub(1);
        before.map_or(EditsEnd::default(), |before| self.rows[before])
    }

    /// Those of a row.
    pub(crate) fn row(&self, row: usize) -> RowEdits<'_> {
        let (begin, end) = (self.begin(row), self.begin(row + 1));
        let mask = &self.masks[begin.masks..end.masks];
        RowEdits {
            edits: &self.edits[begin.edits..end.edits],
            mask: Some(mask).filter(|mask| !mask.is_empty()),
        }
    }
}

impl RowEdits<'_> {
    fn is_none(&self) -> bool {
        self.edits.is_empty() && self.mask.is_none()
    }

    fn apply(&self, logits: &mut [f32]) {
        for Edit { token, scale, shift } in self.edits {
            let logit = &mut logits[*token as usize];
            let scaled = if *logit > 0.0 { *logit / scale } else { *logit * scale };
            *logit = scaled + shift;
        }
        for (logits, bits) in logits.chunks_mut(32).zip(self.mask.unwrap_or_default()) {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if bits >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// What was chosen. Where the largest logit is not finite only the statistics are of meaning.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// The token; nothing where the row is not finite, or where its edits leave nothing to draw from.
    pub token: Option<u32>,
    /// Its logit before any edit, or the largest one.
    pub logit: f32,
    /// Those of the row before any edit.
    pub stats: LogitStats,
    /// Tokens with the largest logits before any edit and these, falling, ties by id; as many as were asked for, or all.
    pub top: Vec<(u32, f32)>,
}

/// Memory that choices share, so that one allocates little in the steady state.
#[derive(Debug, Default)]
pub struct ChoiceScratch {
    pub(crate) logits: Vec<f32>,
    pub(crate) stats: Vec<LogitStats>,
    edited: Vec<f32>,
    weights: Vec<f32>,
    candidates: Vec<u32>,
}

/// A weight of 1 as a whole number. The sum of 2²³ of them is below 2⁶⁴, and what is lost of a weight is below 10⁻¹².
const ONE: f32 = (1u64 << 40) as f32;

/// Chooses from one row: the plain twin of `choose.cu`.
pub fn choose_row(
    logits: &[f32],
    stats: LogitStats,
    choice: &Choice,
    edits: RowEdits<'_>,
    scratch: &mut ChoiceScratch,
) -> Chosen {
    let mut chosen = Chosen { token: None, logit: stats.max, stats, top: Vec::new() };
    if !stats.max.is_finite() {
        return chosen;
    }
    chosen.token = match choice.given {
        Some(token) => Some(token),
        None if edits.is_none() => Some(draw(logits, (stats.argmax, stats.max), choice, scratch)),
        None => draw_edited(logits, edits, choice, scratch),
    };
    if let Some(token) = chosen.token {
        chosen.logit = logits[token as usize];
    }
    chosen.top = largest(logits, choice.top as usize);
    chosen
}

/// Nothing where the edits leave no largest logit that is finite.
fn draw_edited(
    logits: &[f32],
    edits: RowEdits<'_>,
    choice: &Choice,
    scratch: &mut ChoiceScratch,
) -> Option<u32> {
    let mut edited = std::mem::take(&mut scratch.edited);
    edited.clear();
    edited.extend_from_slice(logits);
    edits.apply(&mut edited);
    let (mut argmax, mut max) = (0, f32::NEG_INFINITY);
    for (token, &logit) in (0..).zip(&edited) {
        if logit > max {
            (argmax, max) = (token, logit);
        }
    }
    let token = max.is_finite().then(|| draw(&edited, (argmax, max), choice, scratch));
    scratch.edited = edited;
    token
}

fn draw(logits: &[f32], (argmax, max): (u32, f32), choice: &Choice, scratch: &mut ChoiceScratch) -> u32 {
    let Choice { temperature, top_k, top_p, min_p, uniform, .. } = *choice;
    if temperature == 0.0 {
        return argmax;
    }
    let ChoiceScratch { weights, candidates, .. } = scratch;
    weights.clear();
    weights.extend(logits.iter().map(|&logit| exp_of_negative((logit - max) / temperature)));
    let total: u64 = weights.iter().map(|&weight| mass(weight)).sum();
    if top_k == 0 && top_p >= 1.0 && min_p == 0.0 {
        return pick(0..weights.len() as u32, weights, share(total, uniform));
    }
    let kept = truncate(weights, total, choice, candidates);
    pick(candidates.iter().copied(), weights, share(kept, uniform))
}

/// The first tokens by falling weight, ties by id: at least those that the choice keeps. Returns the mass of these.
fn truncate(weights: &[f32], total: u64, choice: &Choice, candidates: &mut Vec<u32>) -> u64 {
    let Choice { top_k, top_p, min_p, .. } = *choice;
    let by_weight = |&a: &u32, &b: &u32| weights[b as usize].total_cmp(&weights[a as usize]).then(a.cmp(&b));
    // Sorting a vocabulary costs more than the model's last step. All tokens lighter than (1 - top_p) · total / vocab weigh
    // together less than what top-p may leave out, so none of them is in the nucleus; top-k, which goes first, only makes
    // the nucleus smaller. A thousandth less, as the bound is rounded.
    let mut floor = min_p; // The heaviest weight is 1.
    if top_p < 1.0 && top_k == 0 {
        let share = 0.999 * (1.0 - f64::from(top_p)) * total as f64 / f64::from(ONE);
        floor = floor.max((share / weights.len() as f64) as f32);
    }
    candidates.clear();
    candidates.extend((0..weights.len() as u32).filter(|&token| weights[token as usize] >= floor));
    if top_k > 0 && (top_k as usize) < candidates.len() {
        candidates.select_nth_unstable_by(top_k as usize - 1, by_weight);
        candidates.truncate(top_k as usize);
    }
    candidates.sort_unstable_by(by_weight);
    let masses = || candidates.iter().map(|&token| mass(weights[token as usize]));
    let mut kept: u64 = masses().sum();
    if top_p < 1.0 {
        // Shares of what top-k left, which min-p has not made smaller yet, or of the whole vocabulary.
        let whole =
            if top_k == 0 { total } else { mass_of_first(weights, top_k as usize, min_p, candidates) };
        let limit = (f64::from(top_p) * whole as f64).ceil() as u64;
        let mut nucleus = 0;
        for mass in masses() {
            if nucleus >= limit {
                break;
            }
            nucleus += mass;
        }
        kept = kept.min(nucleus);
    }
    kept
}

/// The mass of the `count` heaviest, of which candidates lack those below min-p.
fn mass_of_first(weights: &[f32], count: usize, min_p: f32, candidates: &[u32]) -> u64 {
    let there: u64 = candidates.iter().map(|&token| mass(weights[token as usize])).sum();
    let missing = count.min(weights.len()) - candidates.len();
    if missing == 0 || min_p == 0.0 {
        return there;
    }
    let mut lighter: Vec<f32> = weights.iter().copied().filter(|&weight| weight < min_p).collect();
    lighter.sort_unstable_by(|a, b| b.total_cmp(a));
    there + lighter.iter().take(missing).map(|&weight| mass(weight)).sum::<u64>()
}

/// A weight as a whole number.
fn mass(weight: f32) -> u64 {
    (weight * ONE) as u64
}

/// Where on a line of so many units a number in 2⁻⁶⁴ lies.
fn share(units: u64, uniform: u64) -> u64 {
    ((u128::from(units) * u128::from(uniform)) >> 64) as u64
}

/// The token in whose part of the line the target lies.
fn pick(tokens: impl Iterator<Item = u32>, weights: &[f32], target: u64) -> u32 {
    let mut reached = 0;
    for token in tokens {
        reached += mass(weights[token as usize]);
        if target < reached {
            return token;
        }
    }
    unreachable!("{target} is beyond the {reached} that were kept")
}

/// `exp(x)` for `x <= 0` in plain f32 arithmetic that compilers vectorise: `2^n · p(r)` with
/// `x = n ln 2 + r`, `|r| <= ln 2 / 2`, and p the Taylor polynomial of degree 6, whose error there is
/// below `(ln 2 / 2)^7 / 7! = 1.2e-7`.
fn exp_of_negative(x: f32) -> f32 {
    /// Adding and subtracting 1.5 · 2^23 rounds to the nearest whole number.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first exact in few bits, so that n · LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.max(-87.0); // exp(-87) is the smallest that is normal.
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 720.0;
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + coefficient;
    }
    let scale = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.0 { 0.0 } else { p * scale }
}

/// The `count` largest entries by falling value, ties by id.
fn largest(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<u32> = Vec::with_capacity(if count == 0 { 0 } else { count + 1 });
    if count == 0 {
        return Vec::new();
    }
    for (token, &logit) in logits.iter().enumerate() {
        // An equal logit with a higher id never displaces one that came before.
        if best.len() == count && logit <= logits[best[count - 1] as usize] {
            continue;
        }
        let at = best.partition_point(|&other| logits[other as usize] >= logit);
        best.insert(at, token as u32);
        best.truncate(count);
    }
    best.into_iter().map(|token| (token, logits[token as usize])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(temperature: f32, top_k: u32, top_p: f32, min_p: f32) -> Choice {
        Choice { given: None, temperature, top_k, top_p, min_p, uniform: 0, top: 0 }
    }

    fn stats(logits: &[f32]) -> LogitStats {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let argmax = logits.iter().position(|&logit| logit == max).unwrap() as u32;
        LogitStats { argmax, max, log_sum_exp: 0.0 }
    }

    fn token(logits: &[f32], choice: &Choice) -> u32 {
        choose_edited(logits, choice, RowEdits::default()).token.unwrap()
    }

    fn choose_edited(logits: &[f32], choice: &Choice, edits: RowEdits<'_>) -> Chosen {
        choose_row(logits, stats(logits), choice, edits, &mut ChoiceScratch::default())
    }

    /// How often each token is drawn over an even grid of uniform numbers.
    fn shares(probabilities: &[f32], choice: &Choice) -> Vec<f64> {
        const DRAWS: usize = 10_000;
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let mut counts = vec![0usize; logits.len()];
        for i in 0..DRAWS {
            let uniform = u64::MAX / DRAWS as u64 * i as u64;
            counts[token(&logits, &Choice { uniform, ..*choice }) as usize] += 1;
        }
        counts.into_iter().map(|count| count as f64 / DRAWS as f64).collect()
    }

    #[track_caller]
    fn assert_shares(found: &[f64], expected: &[f64]) {
        for (token, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found - expected).abs() < 2e-3, "token {token}: share {found}, expected {expected}");
        }
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_equal_logits() {
        assert_eq!(token(&[1.0, 3.0, 3.0, 2.0], &choice(0.0, 0, 1.0, 0.0)), 1);
    }

    #[test]
    fn temperature_alone_draws_by_probability() {
        let p = [0.1, 0.4, 0.2, 0.3];
        assert_shares(&shares(&p, &choice(1.0, 0, 1.0, 0.0)), &[0.1, 0.4, 0.2, 0.3]);
        // At temperature 0.5 probabilities are squared: 0.01 0.16 0.04 0.09 of 0.30.
        assert_shares(&shares(&p, &choice(0.5, 0, 1.0, 0.0)), &[0.0333, 0.5333, 0.1333, 0.3]);
    }

    #[test]
    fn top_k_top_p_and_min_p_keep_what_they_say() {
        let p = [0.1, 0.4, 0.2, 0.3];
        assert_shares(&shares(&p, &choice(1.0, 2, 1.0, 0.0)), &[0.0, 0.5714, 0.0, 0.4286]);
        // 0.4 + 0.3 reaches 0.65, and the token that reaches it is kept.
        assert_shares(&shares(&p, &choice(1.0, 0, 0.65, 0.0)), &[0.0, 0.5714, 0.0, 0.4286]);
        // Half of the largest probability is 0.2, and equal is kept (0.21 would not be).
        assert_shares(&shares(&p, &choice(1.0, 0, 1.0, 0.49)), &[0.0, 0.4444, 0.2222, 0.3333]);
        // Of the three that top-k leaves, 0.4 / 0.9 alone is below 0.5: two are kept.
        assert_shares(&shares(&p, &choice(1.0, 3, 0.5, 0.0)), &[0.0, 0.5714, 0.0, 0.4286]);
        // Top-p is of what top-k left, before min-p takes the 0.2 away: 0.4 of 0.9 is not yet 0.45 of it.
        assert_shares(&shares(&p, &choice(1.0, 3, 0.45, 0.6)), &[0.0, 0.5714, 0.0, 0.4286]);
        // A nucleus never is empty.
        assert_shares(&shares(&p, &choice(1.0, 0, 1e-6, 0.0)), &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn the_floor_of_top_p_changes_nothing() {
        let logits: Vec<f32> =
            (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 300.0).collect();
        let weights: Vec<f32> = logits.iter().map(|l| exp_of_negative(l - 13.7)).collect();
        let total: u64 = weights.iter().map(|&weight| mass(weight)).sum();
        for top_p in [0.1, 0.5, 0.9, 0.95, 0.999] {
            let kept = truncate(&weights, total, &choice(1.0, 0, top_p, 0.0), &mut Vec::new());
            let mut all = weights.clone();
            all.sort_by(|a, b| b.total_cmp(a));
            let mut sum = 0;
            for weight in all {
                if sum as f64 >= f64::from(top_p) * total as f64 {
                    break;
                }
                sum += mass(weight);
            }
            assert_eq!(kept, sum, "top_p {top_p}");
        }
    }

    #[test]
    fn edits_decide_the_draw_and_nothing_that_is_reported() {
        let logits = [1.0, 4.0, -2.0, 3.0, 0.0];
        let greedy = Choice { top: 2, ..choice(0.0, 0, 1.0, 0.0) };
        let edit = |token, scale, shift| Edit { token, scale, shift };
        let chosen = |edits: &[Edit], mask| {
            let chosen = choose_edited(&logits, &greedy, RowEdits { edits, mask });
            assert_eq!((chosen.stats.argmax, chosen.top), (1, vec![(1, 4.0), (3, 3.0)]));
            (chosen.token, chosen.logit)
        };
        assert_eq!(chosen(&[], None), (Some(1), 4.0));
        // 4 / 2 falls below 3, and the logit that is told is the model's.
        assert_eq!(chosen(&[edit(1, 2.0, 0.0)], None), (Some(3), 3.0));
        // 4 / 2 + 1 is as much as 3, and the lower id wins.
        assert_eq!(chosen(&[edit(1, 2.0, 1.0)], None), (Some(1), 4.0));
        assert_eq!(chosen(&[edit(2, 0.5, 5.5)], None), (Some(2), -2.0)); // -2 · 0.5 + 5.5 = 4.5.
        assert_eq!(chosen(&[edit(1, 1.0, f32::NEG_INFINITY)], Some(&[0b00111])), (Some(0), 1.0));
        assert_eq!(chosen(&[edit(4, 1.0, 100.0)], Some(&[0b00001])), (Some(0), 1.0));
        assert_eq!(chosen(&[], Some(&[0])).0, None);
        let warm = choice(1.0, 0, 1.0, 0.0);
        for uniform in [0, 1 << 62, u64::MAX] {
            let edits = RowEdits { edits: &[], mask: Some(&[0b10100]) };
            let token = choose_edited(&logits, &Choice { uniform, ..warm }, edits).token;
            assert!([Some(2), Some(4)].contains(&token), "{token:?} at {uniform}");
        }
    }

    #[test]
    fn exp_is_right_to_a_few_units_in_the_last_place() {
        for i in 0..200_000 {
            let x = -87.0 * (i as f32 / 200_000.0);
            let (found, expected) = (f64::from(exp_of_negative(x)), f64::from(x).exp());
            // 1.2e-7 of the polynomial and a few roundings of 6e-8 each.
            assert!((found / expected - 1.0).abs() < 4e-7, "exp({x}): {found}, expected {expected}");
        }
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(-1e9), 0.0);
        assert_eq!(exp_of_negative(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn the_largest_come_in_falling_order_with_ties_by_id() {
        let logits = [1.0, 5.0, 3.0, 5.0, 3.0, 0.0];
        assert_eq!(largest(&logits, 4), [(1, 5.0), (3, 5.0), (2, 3.0), (4, 3.0)]);
        assert!(largest(&logits, 0).is_empty());
        assert_eq!(largest(&logits, 9).len(), 6);
    }
}

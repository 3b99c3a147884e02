//! From a row of logits to a token, and to log-probabilities.
//!
//! Everything here is plain arithmetic in a fixed order, so that equal logits give equal tokens on every
//! backend. A draw applies, in this order, temperature, top-k, top-p and min-p, as transformers does.

use kernels::LogitStats;
use scheduler::{Sampling, TokenId, TokenLogprobs};

/// Memory that draws share, so that a draw allocates nothing in the steady state.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    weights: Vec<f32>,
    candidates: Vec<TokenId>,
}

/// Largest entry and log-sum-exp of one row, for rows that were changed after the device looked at them.
pub(crate) fn stats(logits: &[f32]) -> LogitStats {
    let (mut argmax, mut max) = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return LogitStats { argmax: token as u32, max: f32::NAN, log_sum_exp: f32::NAN };
        }
        if logit > max {
            (argmax, max) = (token as u32, logit);
        }
    }
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    LogitStats { argmax, max, log_sum_exp: sum.ln() as f32 }
}

/// Draws a token; `uniform` is a number in `[0, 1)`. Temperature 0 takes the largest logit, the lowest id
/// on a tie.
pub(crate) fn draw(
    logits: &[f32],
    stats: LogitStats,
    sampling: &Sampling,
    uniform: f64,
    scratch: &mut Scratch,
) -> TokenId {
    if sampling.temperature == 0.0 {
        return stats.argmax;
    }
    let weights = &mut scratch.weights;
    weights.clear();
    weights.extend(logits.iter().map(|&logit| exp_of_negative((logit - stats.max) / sampling.temperature)));
    let keeps_all = sampling.top_k == 0 && sampling.top_p >= 1.0 && sampling.min_p == 0.0;
    if keeps_all {
        let target = uniform * sum(weights);
        return pick((0..weights.len() as TokenId).map(|token| (token, weights[token as usize])), target);
    }
    let candidates = &mut scratch.candidates;
    candidates_by_weight(weights, sampling, candidates);
    let total: f64 = candidates.iter().map(|&token| f64::from(weights[token as usize])).sum();
    pick(candidates.iter().map(|&token| (token, weights[token as usize])), uniform * total)
}

/// The tokens that top-k, top-p and min-p leave, by falling weight, ties by id.
fn candidates_by_weight(weights: &[f32], sampling: &Sampling, candidates: &mut Vec<TokenId>) {
    let total = sum(weights);
    let by_weight =
        |&a: &TokenId, &b: &TokenId| weights[b as usize].total_cmp(&weights[a as usize]).then(a.cmp(&b));
    // Sorting a vocabulary costs more than the model's last step. All tokens lighter than
    // (1 - top_p) · total / vocab weigh together less than what top-p may leave out, so none of them is
    // in the nucleus; top-k, which goes first, only makes the nucleus smaller.
    let mut floor = sampling.min_p; // The heaviest weight is 1.
    if sampling.top_p < 1.0 && sampling.top_k == 0 {
        floor = floor.max(((1.0 - f64::from(sampling.top_p)) * total / weights.len() as f64) as f32);
    }
    candidates.clear();
    candidates.extend((0..weights.len() as TokenId).filter(|&token| weights[token as usize] >= floor));
    let top_k = if sampling.top_k == 0 { usize::MAX } else { sampling.top_k as usize };
    if top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, by_weight);
        candidates.truncate(top_k);
    }
    candidates.sort_unstable_by(by_weight);
    if sampling.top_p < 1.0 {
        // Shares of what top-k left, or of the whole vocabulary.
        let kept = if sampling.top_k == 0 {
            total
        } else {
            candidates.iter().map(|&token| f64::from(weights[token as usize])).sum()
        };
        let mut mass = 0.0;
        let nucleus = candidates.iter().take_while(|&&token| {
            let is_in = mass < f64::from(sampling.top_p) * kept;
            mass += f64::from(weights[token as usize]);
            is_in
        });
        let size = nucleus.count().max(1);
        candidates.truncate(size);
    }
    // The heaviest weight is 1, so that min-p is a bound on weights.
    candidates.truncate(candidates.partition_point(|&token| weights[token as usize] >= sampling.min_p));
}

/// The token in whose part of the line from 0 to the sum of weights the target lies.
fn pick(weighted: impl Iterator<Item = (TokenId, f32)>, target: f64) -> TokenId {
    let (mut reached, mut last) = (0.0, 0);
    for (token, weight) in weighted.filter(|&(_, weight)| weight > 0.0) {
        reached += f64::from(weight);
        last = token;
        if target < reached {
            break;
        }
    }
    last // Rounding may leave the target at the very end.
}

/// A sum in a fixed order: eight partial sums that the compiler may keep in registers.
fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let chunks = weights.chunks_exact(8);
    let rest: f64 = chunks.remainder().iter().map(|&w| f64::from(w)).sum();
    for chunk in chunks {
        for (lane, &weight) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(weight);
        }
    }
    lanes.iter().sum::<f64>() + rest
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

/// A token's log-probability before temperature, with the `top` most likely ones.
pub(crate) fn token_logprobs(logits: &[f32], stats: LogitStats, token: TokenId, top: u32) -> TokenLogprobs {
    let logprob = |token: TokenId| logits[token as usize] - stats.max - stats.log_sum_exp;
    TokenLogprobs {
        token,
        logprob: logprob(token),
        top: most_likely(logits, top as usize).into_iter().map(|token| (token, logprob(token))).collect(),
    }
}

/// The `count` largest entries by falling value, ties by id.
fn most_likely(logits: &[f32], count: usize) -> Vec<TokenId> {
    let mut best: Vec<TokenId> = Vec::with_capacity(count + 1);
    if count == 0 {
        return best;
    }
    for (token, &logit) in logits.iter().enumerate() {
        // An equal logit with a higher id never displaces one that came before.
        if best.len() == count && logit <= logits[best[count - 1] as usize] {
            continue;
        }
        let at = best.partition_point(|&other| logits[other as usize] >= logit);
        best.insert(at, token as TokenId);
        best.truncate(count);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f32, top_k: u32, top_p: f32, min_p: f32) -> Sampling {
        Sampling {
            temperature,
            top_p,
            top_k,
            min_p,
            seed: 0,
            max_tokens: 1,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            stop: Vec::new(),
            logprobs: None,
            prompt_logprobs: false,
        }
    }

    fn logits_of(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    /// How often each token is drawn over an even grid of uniform numbers.
    fn shares(probabilities: &[f32], sampling: &Sampling) -> Vec<f64> {
        const DRAWS: usize = 10_000;
        let logits = logits_of(probabilities);
        let stats = stats(&logits);
        let mut scratch = Scratch::default();
        let mut counts = vec![0usize; logits.len()];
        for i in 0..DRAWS {
            let uniform = (i as f64 + 0.5) / DRAWS as f64;
            counts[draw(&logits, stats, sampling, uniform, &mut scratch) as usize] += 1;
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
        let logits = [1.0, 3.0, 3.0, 2.0];
        let token = draw(&logits, stats(&logits), &sampling(0.0, 0, 1.0, 0.0), 0.99, &mut Scratch::default());
        assert_eq!(token, 1);
    }

    #[test]
    fn temperature_alone_draws_by_probability() {
        let p = [0.1, 0.4, 0.2, 0.3];
        assert_shares(&shares(&p, &sampling(1.0, 0, 1.0, 0.0)), &[0.1, 0.4, 0.2, 0.3]);
        // At temperature 0.5 probabilities are squared: 0.01 0.16 0.04 0.09 of 0.30.
        assert_shares(&shares(&p, &sampling(0.5, 0, 1.0, 0.0)), &[0.0333, 0.5333, 0.1333, 0.3]);
    }

    #[test]
    fn top_k_top_p_and_min_p_keep_what_they_say() {
        let p = [0.1, 0.4, 0.2, 0.3];
        assert_shares(&shares(&p, &sampling(1.0, 2, 1.0, 0.0)), &[0.0, 0.5714, 0.0, 0.4286]);
        // 0.4 + 0.3 reaches 0.65, and the token that reaches it is kept.
        assert_shares(&shares(&p, &sampling(1.0, 0, 0.65, 0.0)), &[0.0, 0.5714, 0.0, 0.4286]);
        // Half of the largest probability is 0.2, and equal is kept (0.21 would not be).
        assert_shares(&shares(&p, &sampling(1.0, 0, 1.0, 0.49)), &[0.0, 0.4444, 0.2222, 0.3333]);
        // Of the three that top-k leaves, 0.4 / 0.9 alone is below 0.5: two are kept.
        assert_shares(&shares(&p, &sampling(1.0, 3, 0.5, 0.0)), &[0.0, 0.5714, 0.0, 0.4286]);
        // A nucleus never is empty.
        assert_shares(&shares(&p, &sampling(1.0, 0, 1e-6, 0.0)), &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn the_floor_of_top_p_changes_nothing() {
        let logits: Vec<f32> =
            (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 300.0).collect();
        let weights: Vec<f32> = logits.iter().map(|l| exp_of_negative(l - 13.7)).collect();
        for top_p in [0.1, 0.5, 0.9, 0.95, 0.999] {
            let mut fast = Vec::new();
            candidates_by_weight(&weights, &sampling(1.0, 0, top_p, 0.0), &mut fast);
            let mut all: Vec<TokenId> = (0..5000).collect();
            all.sort_by(|&a, &b| weights[b as usize].total_cmp(&weights[a as usize]).then(a.cmp(&b)));
            let total = sum(&weights);
            let mut mass = 0.0;
            let size = all
                .iter()
                .take_while(|&&t| {
                    let is_in = mass < f64::from(top_p) * total;
                    mass += f64::from(weights[t as usize]);
                    is_in
                })
                .count();
            assert_eq!(fast, all[..size], "top_p {top_p}");
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
    fn the_most_likely_tokens_come_in_falling_order_with_ties_by_id() {
        let logits = [1.0, 5.0, 3.0, 5.0, 3.0, 0.0];
        assert_eq!(most_likely(&logits, 4), [1, 3, 2, 4]);
        assert!(most_likely(&logits, 0).is_empty());
        assert_eq!(most_likely(&logits, 9).len(), 6);
    }

    #[test]
    fn logprobs_are_those_of_the_softmax() {
        let logits = logits_of(&[0.1, 0.4, 0.2, 0.3]);
        let found = token_logprobs(&logits, stats(&logits), 2, 1);
        assert!((found.logprob - 0.2f32.ln()).abs() < 1e-6);
        assert_eq!(found.top[0].0, 1);
    }
}

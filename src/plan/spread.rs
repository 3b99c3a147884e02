//! How output lengths are spread around a mean, and what that makes of averages.

use crate::cli::LengthsArg;

/// Spread of the logarithm of log-normal lengths. Chat corpora have 0.9 to 1.3.
pub(crate) const SIGMA: f64 = 1.0;

/// Half-width, in standard deviations, and number of steps of the sum that takes the place of an integral over a normal
/// distribution: what is beyond has a share of 1e-14, and the sum is exact to some 1e-12 for what is smooth.
const DEVIATIONS: f64 = 8.0;
const STEPS: i32 = 320;

/// The means of a length, and of its square.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Moments {
    pub(crate) first: f64,
    pub(crate) second: f64,
}

impl LengthsArg {
    /// Its word in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Exponential => "exponential",
            Self::Lognormal => "lognormal",
        }
    }

    /// The moments of lengths that are spread around `mean` and then cut at `limit`. Both are at least 1.
    pub(crate) fn moments(self, mean: f64, limit: f64) -> Moments {
        match self {
            Self::Fixed => of_one(mean.min(limit)),
            Self::Exponential => geometric(mean, limit),
            Self::Lognormal => lognormal(mean, limit),
        }
    }
}

fn of_one(length: f64) -> Moments {
    Moments { first: length, second: length * length }
}

/// Each token is the last one with a chance of 1 / mean, so that a length is above k with that of q^k: the sums of q^k and of
/// (2k + 1) q^k over k below the limit.
fn geometric(mean: f64, limit: f64) -> Moments {
    let (last, goes_on) = (1.0 / mean, 1.0 - 1.0 / mean);
    let cut = goes_on.powf(limit);
    let second =
        (1.0 + goes_on - cut * ((2.0 * limit + 1.0) - (2.0 * limit - 1.0) * goes_on)) / (last * last);
    Moments { first: (1.0 - cut) / last, second }
}

/// The mean of exp(sigma z) is exp(sigma² / 2).
fn lognormal(mean: f64, limit: f64) -> Moments {
    let mut sums = (0.0, 0.0, 0.0);
    for step in -STEPS..=STEPS {
        let normal = DEVIATIONS * f64::from(step) / f64::from(STEPS);
        let weight = (-normal * normal / 2.0).exp();
        let length = (mean * (SIGMA * normal - SIGMA * SIGMA / 2.0).exp()).clamp(1.0, limit);
        sums = (sums.0 + weight, sums.1 + weight * length, sums.2 + weight * length * length);
    }
    Moments { first: sums.1 / sums.0, second: sums.2 / sums.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_close(left: f64, right: f64) {
        assert!((left / right - 1.0).abs() < 1e-3, "{left} is not {right}");
    }

    #[test]
    fn without_a_limit_the_mean_stays_and_squares_are_those_of_the_distribution() {
        let none = f64::from(u32::MAX);
        let [fixed, geometric, lognormal] =
            [LengthsArg::Fixed, LengthsArg::Exponential, LengthsArg::Lognormal]
                .map(|a| a.moments(200.0, none));
        for moments in [fixed, geometric, lognormal] {
            assert_close(moments.first, 200.0);
        }
        assert_close(fixed.second, 40_000.0);
        assert_close(geometric.second, 2.0 * 40_000.0 - 200.0);
        assert_close(lognormal.second, 40_000.0 * 1.0_f64.exp());
    }

    /// Against the sum over all lengths.
    #[test]
    fn a_limit_cuts_what_is_longer() {
        for (mean, limit) in [(1.0_f64, 5_u32), (20.0, 1), (20.0, 30), (500.0, 40), (30.0, 4_000)] {
            let chance = |length: u32| (1.0 - 1.0 / mean).powi(length as i32 - 1) / mean;
            let over = |part: fn(f64) -> f64| {
                let below: f64 = (1..limit).map(|length| chance(length) * part(length.into())).sum();
                let rest = 1.0 - (1..limit).map(chance).sum::<f64>();
                below + rest * part(limit.into())
            };
            let moments = LengthsArg::Exponential.moments(mean, limit.into());
            assert_close(moments.first, over(|length| length));
            assert_close(moments.second, over(|length| length * length));
        }
        assert_eq!(LengthsArg::Fixed.moments(9.0, 4.0), of_one(4.0));
        let short = LengthsArg::Lognormal.moments(200.0, 50.0);
        assert!(short.first < 50.0 && short.first > 30.0, "{short:?}");
    }
}

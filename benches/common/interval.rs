//! Where a median lies, by what was measured: as `benches/peers/compare.py` has it.

use std::fmt;

/// How sure an interval is to be, where there are values enough.
const CONFIDENCE: f64 = 0.95;

/// Two of the values, in order, that have the median of what they were drawn from between them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Interval {
    pub(crate) low: f64,
    pub(crate) high: f64,
    /// How many values there are,
    pub(crate) of: usize,
    /// and how many of these lie beyond either end.
    pub(crate) beyond: usize,
    /// The chance that the median is between them.
    pub(crate) confidence: f64,
}

impl Interval {
    /// The narrowest with 95 %, or else all of the values, of which there is one at least.
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let of = sorted.len();
        let sure = (0..of.div_ceil(2)).rev().find(|&beyond| confidence(of, beyond) >= CONFIDENCE);
        let beyond = sure.unwrap_or(0);
        let (low, high) = (sorted[beyond], sorted[of - 1 - beyond]);
        Interval { low, high, of, beyond, confidence: confidence(of, beyond) }
    }
}

/// In numbers of three places, or as many as are asked for.
impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Interval { low, high, of, beyond, confidence } = self;
        let (places, percent) = (f.precision().unwrap_or(3), 100.0 * confidence);
        let (first, last) = (beyond + 1, of - beyond);
        write!(f, "{low:.places$} to {high:.places$} with {percent:.0} % (values {first} and {last} of {of})")
    }
}

/// The chance that the median lies between two values beyond each of which so many lie: any value is above it as likely as below.
fn confidence(of: usize, beyond: usize) -> f64 {
    let (mut ways, mut outside) = (1.0, 0.0);
    for below in 0..=beyond {
        outside += ways;
        ways *= (of - below) as f64 / (below + 1) as f64;
    }
    1.0 - 2.0 * outside / 2f64.powi(of as i32)
}

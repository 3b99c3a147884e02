//! The figures of a profile.

use serde::{Deserialize, Serialize};

/// A time that was measured several times.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// Half of the times are less.
    pub median: f64,
    /// A quarter of them is less.
    pub lower: f64,
    /// A quarter of them is more.
    pub upper: f64,
    /// How often it was measured.
    pub repeats: usize,
}

/// What was measured for micro-batches of so many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TokenPoint {
    /// Tokens, or rows of logits.
    pub tokens: usize,
    /// Time for all of them.
    pub seconds: Seconds,
    /// Operations of matrix products a second.
    pub flops_per_second: f64,
    /// Bytes of weights a second.
    pub bytes_per_second: f64,
}

/// What attention takes beyond the first few positions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ContextPoint {
    /// Positions that a token attends to, on average.
    pub context: f64,
    /// Time for one token; below nothing where it is less than that of tokens which decode.
    pub seconds: Seconds,
    /// Bytes of keys and values a second.
    pub bytes_per_second: f64,
}

/// The same figures for one device at work and for all that share the memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Both<T> {
    /// The others are idle.
    pub alone: T,
    /// All do the same.
    pub busy: T,
}

impl<T> Both<T> {
    /// One of both.
    pub fn get(&self, neighbours: Neighbours) -> &T {
        match neighbours {
            Neighbours::Idle => &self.alone,
            Neighbours::Busy => &self.busy,
        }
    }

    /// Makes something of each.
    pub(super) fn map<U>(&self, make: impl Fn(&T, Neighbours) -> U) -> Both<U> {
        Both { alone: make(&self.alone, Neighbours::Idle), busy: make(&self.busy, Neighbours::Busy) }
    }
}

/// What the devices do that share the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neighbours {
    /// Nothing.
    Idle,
    /// The same as this one.
    Busy,
}

impl Seconds {
    /// Of some times, at least one.
    pub(super) fn of(mut times: Vec<f64>) -> Self {
        assert!(!times.is_empty(), "nothing was measured");
        times.sort_by(f64::total_cmp);
        let at = |quarters: usize| {
            let twice = quarters * (times.len() - 1); // Four times the place, between two where it is not whole.
            let (low, high) = (times[twice / 4], times[twice.div_ceil(4)]);
            low + (high - low) * (twice % 4) as f64 / 4.0
        };
        Seconds { median: at(2), lower: at(1), upper: at(3), repeats: times.len() }
    }

    /// One part of `parts` of what is left beside `other` seconds.
    pub(super) fn share(self, other: f64, parts: f64) -> Self {
        let part = |seconds: f64| (seconds - other) / parts;
        Seconds { median: part(self.median), lower: part(self.lower), upper: part(self.upper), ..self }
    }

    /// The same where a time below this one can only be chance.
    pub(super) fn at_least(self, least: f64) -> Self {
        let bound = |seconds: f64| seconds.max(least);
        Seconds { median: bound(self.median), lower: bound(self.lower), upper: bound(self.upper), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_between_the_times() {
        let seconds = Seconds::of(vec![5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!((seconds.lower, seconds.median, seconds.upper, seconds.repeats), (2.0, 3.0, 4.0, 5));
        let even = Seconds::of(vec![1.0, 2.0]);
        assert_eq!((even.lower, even.median, even.upper), (1.25, 1.5, 1.75));
        assert_eq!(seconds.share(1.0, 2.0).median, 1.0);
    }
}

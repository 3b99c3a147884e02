//! A job over time, in bins that double when there are too many.

use super::waits::{Doing, KINDS};

/// Most bins: on a picture a few pixels each.
const MAX_BINS: usize = 256;

/// What a stage did in one bin, as shares of its time; they sum up to 1. See [`Waits`](super::Waits).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Share {
    /// Computing.
    pub busy: f64,
    /// Waiting while another stage computed.
    pub starved: f64,
    /// Waiting while sequences waited for pages.
    pub kv_limited: f64,
    /// Waiting when nothing was left to admit.
    pub tail: f64,
    /// Waiting while no stage computed.
    pub idle: f64,
}

/// A job in at most 256 bins of equal width. The last one ends with the job: what is in it are shares and
/// means of its part before that.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Timeline {
    /// Width of a bin.
    pub bin_seconds: f64,
    /// For each stage, what it did in each bin.
    pub stages: Vec<Vec<Share>>,
    /// Mean share of the KV pages in use.
    pub kv: Vec<f64>,
    /// Mean number of running sequences.
    pub running: Vec<f64>,
    /// Generated tokens a second.
    pub tokens: Vec<f64>,
}

/// A timeline in the making. A bin is a power of two of nanoseconds wide.
#[derive(Debug)]
pub(super) struct Bins {
    shift: u32,
    /// For each stage and bin the nanoseconds of everything it may do.
    stages: Vec<Vec<[u64; KINDS]>>,
    /// For each bin the pages in use, times nanoseconds.
    pages: Vec<f64>,
    /// For each bin the running sequences, times nanoseconds.
    running: Vec<f64>,
    /// For each bin the tokens.
    tokens: Vec<u64>,
}

impl Bins {
    pub(super) fn new(num_stages: usize) -> Self {
        Self {
            shift: 0,
            stages: vec![vec![[0; KINDS]; MAX_BINS]; num_stages],
            pages: vec![0.0; MAX_BINS],
            running: vec![0.0; MAX_BINS],
            tokens: vec![0; MAX_BINS],
        }
    }

    /// Makes room for times up to `to_ns`, that moment included.
    pub(super) fn reach(&mut self, to_ns: u64) {
        while (to_ns >> self.shift) as usize >= MAX_BINS {
            self.shift += 1;
            for bins in &mut self.stages {
                halve(bins, |a, b| std::array::from_fn(|kind| a[kind] + b[kind]));
            }
            halve(&mut self.pages, |a, b| a + b);
            halve(&mut self.running, |a, b| a + b);
            halve(&mut self.tokens, |a, b| a + b);
        }
    }

    pub(super) fn add_doing(&mut self, stage: usize, doing: Doing, from_ns: u64, to_ns: u64) {
        let bins = &mut self.stages[stage];
        over_bins(self.shift, from_ns, to_ns, |bin, ns| bins[bin][doing as usize] += ns);
    }

    pub(super) fn add_levels(&mut self, pages: usize, running: usize, from_ns: u64, to_ns: u64) {
        over_bins(self.shift, from_ns, to_ns, |bin, ns| {
            self.pages[bin] += pages as f64 * ns as f64;
            self.running[bin] += running as f64 * ns as f64;
        });
    }

    pub(super) fn add_tokens(&mut self, num_tokens: u64, at_ns: u64) {
        self.tokens[(at_ns >> self.shift) as usize] += num_tokens;
    }

    /// For one stage the nanoseconds of everything it did, all bins together.
    pub(super) fn totals(&self, stage: usize) -> [u64; KINDS] {
        std::array::from_fn(|kind| self.stages[stage].iter().map(|bin| bin[kind]).sum())
    }

    /// Pages in use times nanoseconds, all bins together.
    pub(super) fn page_ns(&self) -> f64 {
        self.pages.iter().sum()
    }

    /// What came of it by `end_ns`, of a pool of so many pages.
    pub(super) fn finish(&self, end_ns: u64, num_pages: usize) -> Timeline {
        let width_ns = 1u64 << self.shift;
        let num_bins = end_ns.div_ceil(width_ns) as usize;
        let covered_ns = |bin: usize| (end_ns - bin as u64 * width_ns).min(width_ns) as f64;
        let means =
            |sums: &[f64], scale: f64| (0..num_bins).map(|bin| sums[bin] / covered_ns(bin) / scale).collect();
        let mut tokens = self.tokens.clone();
        if num_bins > 0 && tokens.len() > num_bins {
            // What came at the very end of the last bin counts there.
            tokens[num_bins - 1] += tokens[num_bins];
        }
        let share = |bin: usize, ns: [u64; KINDS]| {
            let [busy, starved, kv_limited, tail, idle] = ns.map(|ns| ns as f64 / covered_ns(bin));
            Share { busy, starved, kv_limited, tail, idle }
        };
        let stage = |bins: &Vec<[u64; KINDS]>| (0..num_bins).map(|bin| share(bin, bins[bin])).collect();
        Timeline {
            bin_seconds: width_ns as f64 * 1e-9,
            stages: self.stages.iter().map(stage).collect(),
            kv: means(&self.pages, num_pages as f64),
            running: means(&self.running, 1.0),
            tokens: (0..num_bins).map(|bin| tokens[bin] as f64 / covered_ns(bin) * 1e9).collect(),
        }
    }
}

/// Puts two bins together into one, for all of them.
fn halve<T: Copy + Default>(bins: &mut [T], join: impl Fn(T, T) -> T) {
    let half = bins.len() / 2;
    for bin in 0..half {
        bins[bin] = join(bins[2 * bin], bins[2 * bin + 1]);
    }
    bins[half..].fill(T::default());
}

/// Calls `add` for every bin that a time has a part in, with the length of that part.
fn over_bins(shift: u32, from_ns: u64, to_ns: u64, mut add: impl FnMut(usize, u64)) {
    let mut at_ns = from_ns;
    while at_ns < to_ns {
        let bin = at_ns >> shift;
        let end_ns = to_ns.min((bin + 1) << shift);
        add(bin as usize, end_ns - at_ns);
        at_ns = end_ns;
    }
}

//! What the planner is given, and what one stage of an answer costs.

use std::ops::Range;

/// The smallest part of a model that a cut leaves whole, on one rank of a stage: a block, or some of the
/// columns of its FFN (with the block's attention, for the first of them).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Piece {
    /// Time for the micro-batch.
    pub seconds: f64,
    /// Weights in memory.
    pub weight_bytes: u64,
    /// Keys and values that each token in flight keeps.
    pub kv_bytes_per_token: u64,
}

/// What the first or the last stage has beside its pieces: the embedding, or the output matrix and sampling.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Extra {
    /// Time for the micro-batch.
    pub seconds: f64,
    /// Weights in memory.
    pub bytes: u64,
}

/// Costs of all pieces on one rank, as sums over the pieces before each position.
#[derive(Debug, Clone, PartialEq)]
pub struct RankCosts {
    seconds: Vec<f64>,
    weight_bytes: Vec<u64>,
    kv_bytes_per_token: Vec<u64>,
    first: Extra,
    last: Extra,
    shared_bytes: u64,
    /// By where a stage ends.
    cut_seconds: Vec<f64>,
    most_cut_seconds: f64,
    entry_seconds: f64,
}

impl RankCosts {
    /// Sums up the costs of `pieces`, in order.
    pub fn new(pieces: impl IntoIterator<Item = Piece>, first: Extra, last: Extra) -> Self {
        let mut costs = RankCosts {
            seconds: vec![0.0],
            weight_bytes: vec![0],
            kv_bytes_per_token: vec![0],
            first,
            last,
            shared_bytes: 0,
            cut_seconds: vec![0.0],
            most_cut_seconds: 0.0,
            entry_seconds: 0.0,
        };
        let mut sum = Piece::default();
        for piece in pieces {
            assert!(
                piece.seconds.is_finite() && piece.seconds >= 0.0,
                "a piece takes {} seconds",
                piece.seconds
            );
            sum.seconds += piece.seconds;
            sum.weight_bytes += piece.weight_bytes;
            sum.kv_bytes_per_token += piece.kv_bytes_per_token;
            costs.seconds.push(sum.seconds);
            costs.weight_bytes.push(sum.weight_bytes);
            costs.kv_bytes_per_token.push(sum.kv_bytes_per_token);
            costs.cut_seconds.push(0.0);
        }
        costs
    }

    /// Charges a stage of this width, where its end cuts a block, with what is said of its last piece.
    ///
    /// # Panics
    /// If not as much is said as there are pieces.
    #[must_use]
    pub fn with_cuts(mut self, cut_seconds: impl IntoIterator<Item = f64>) -> Self {
        self.cut_seconds = std::iter::once(0.0).chain(cut_seconds).collect();
        assert_eq!(self.cut_seconds.len(), self.num_pieces() + 1, "pieces and what cuts behind them take");
        self.most_cut_seconds = self.cut_seconds.iter().copied().fold(0.0, f64::max);
        self
    }

    /// Charges every stage of this width so much for giving all its ranks what comes in.
    #[must_use]
    pub fn with_entry(self, entry_seconds: f64) -> Self {
        Self { entry_seconds, ..self }
    }

    /// Takes so many bytes, at most those of either end, off a stage that is both first and last: what both share.
    #[must_use]
    pub fn with_shared(self, shared_bytes: u64) -> Self {
        assert!(shared_bytes <= self.first.bytes.min(self.last.bytes), "the ends have less than they share");
        Self { shared_bytes, ..self }
    }

    /// The same where more is known of each piece's memory: its weights, embedding and head among them where it is at an end, and
    /// the keys and values that a token in flight keeps.
    ///
    /// # Panics
    /// If there are not as many as pieces.
    #[must_use]
    pub fn with_bytes(mut self, bytes: &[(u64, u64)]) -> Self {
        assert_eq!(bytes.len(), self.num_pieces(), "pieces and their bytes");
        for (piece, (weights, kv)) in bytes.iter().enumerate() {
            self.weight_bytes[piece + 1] = self.weight_bytes[piece] + weights;
            self.kv_bytes_per_token[piece + 1] = self.kv_bytes_per_token[piece] + kv;
        }
        (self.first.bytes, self.last.bytes, self.shared_bytes) = (0, 0, 0);
        self
    }

    /// The pieces alone, without embedding, head, cuts and what a stage begins with.
    #[must_use]
    pub fn without_extras(&self) -> Self {
        Self {
            first: Extra::default(),
            last: Extra::default(),
            shared_bytes: 0,
            cut_seconds: vec![0.0; self.cut_seconds.len()],
            most_cut_seconds: 0.0,
            entry_seconds: 0.0,
            ..self.clone()
        }
    }

    /// The same with the pieces between neighbouring `places` made one, the first place 0 and the last the end.
    pub(super) fn at(&self, places: &[usize]) -> Self {
        Self {
            seconds: places.iter().map(|place| self.seconds[*place]).collect(),
            weight_bytes: places.iter().map(|place| self.weight_bytes[*place]).collect(),
            kv_bytes_per_token: places.iter().map(|place| self.kv_bytes_per_token[*place]).collect(),
            cut_seconds: places.iter().map(|place| self.cut_seconds[*place]).collect(),
            ..*self
        }
    }

    pub(super) fn shared_bytes(&self) -> u64 {
        self.shared_bytes
    }

    /// What a stage is charged with more when it ends there and cuts a block.
    pub fn cut_seconds(&self, end: usize) -> f64 {
        self.cut_seconds[end]
    }

    /// The most of that.
    pub(super) fn most_cut_seconds(&self) -> f64 {
        self.most_cut_seconds
    }

    /// What a stage is charged with for giving all its ranks what comes in.
    pub fn entry_seconds(&self) -> f64 {
        self.entry_seconds
    }

    /// How many pieces.
    pub fn num_pieces(&self) -> usize {
        self.seconds.len() - 1
    }

    /// Time for a run of pieces as a stage, with embedding or head where it has them, without the hop that follows.
    pub fn seconds(&self, pieces: Range<usize>) -> f64 {
        let mut sum = self.seconds[pieces.end] - self.seconds[pieces.start];
        sum += if pieces.is_empty() { 0.0 } else { self.entry_seconds };
        sum += if pieces.start == 0 { self.first.seconds } else { 0.0 };
        sum += if pieces.end == self.num_pieces() { self.last.seconds } else { 0.0 };
        sum
    }

    /// Weights of a run of pieces, with embedding or head where it has them.
    pub fn weight_bytes(&self, pieces: Range<usize>) -> u64 {
        let mut sum = self.weight_bytes[pieces.end] - self.weight_bytes[pieces.start];
        sum += if pieces.start == 0 { self.first.bytes } else { 0 };
        sum += if pieces.end == self.num_pieces() { self.last.bytes } else { 0 };
        sum - if pieces == (0..self.num_pieces()) { self.shared_bytes } else { 0 }
    }

    /// Keys and values that each token in flight keeps in a run of pieces.
    pub fn kv_bytes_per_token(&self, pieces: Range<usize>) -> u64 {
        self.kv_bytes_per_token[pieces.end] - self.kv_bytes_per_token[pieces.start]
    }

    /// Weights of a run of pieces, and its keys and values of `kv_tokens`.
    pub fn memory_bytes(&self, pieces: Range<usize>, kv_tokens: u64) -> u64 {
        let kv = self.kv_bytes_per_token(pieces.clone()).saturating_mul(kv_tokens);
        self.weight_bytes(pieces).saturating_add(kv)
    }

    /// Whether a run could take at most `seconds`, by its pieces alone.
    pub(super) fn may_reach(&self, start: usize, end: usize, seconds: f64) -> bool {
        start >= end || self.seconds[end] - self.seconds[start] <= seconds
    }

    /// The furthest end of a run from `start`, what it begins with and [`Extra`]s of a start at 0 included and those of the
    /// end left out, that takes at most `seconds` and `bytes`.
    pub(super) fn furthest(&self, start: usize, seconds: f64, bytes: u64, kv_tokens: u64) -> usize {
        let first = if start == 0 { self.first } else { Extra::default() };
        let is_within = |end: usize| {
            let kv = self.kv_bytes_per_token(start..end).saturating_mul(kv_tokens);
            let weights = self.weight_bytes[end] - self.weight_bytes[start] + first.bytes;
            self.seconds[end] - self.seconds[start] + first.seconds + self.entry_seconds <= seconds
                && weights.saturating_add(kv) <= bytes
        };
        let (mut within, mut beyond) = (start, self.num_pieces() + 1);
        while beyond - within > 1 {
            let middle = within.midpoint(beyond);
            if is_within(middle) { within = middle } else { beyond = middle }
        }
        within
    }
}

/// Costs on one kind of device, for each tensor-parallel width that a stage may have.
pub type Costs = Vec<(usize, RankCosts)>;

/// A device in the order of the pipeline.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageDevice {
    /// Index into [`Problem::costs`]. Ranks of one stage are neighbours, of one kind where nobody gives its width.
    pub kind: usize,
    /// Room for weights, keys and values: workspace is taken off already.
    pub memory_bytes: u64,
    /// Time to hand the micro-batch on to the next device in the list, which the sender is charged with.
    pub hop_seconds: f64,
    /// The same where an FFN is cut by columns, whose sum so far travels too. At least `hop_seconds`.
    pub cut_hop_seconds: f64,
}

/// Blocks to place on devices, for one micro-batch size.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// In the order of the pipeline. A device may be left idle.
    pub devices: &'a [StageDevice],
    /// For each piece, whether a block ends with it; what follows any other is more columns of its FFN.
    pub ends_block: &'a [bool],
    /// For each kind of device.
    pub costs: &'a [Costs],
    /// The width of each stage, where it is given, of whatever kinds its ranks then are; stages at the end may be left out.
    pub widths: Option<&'a [usize]>,
}

/// What a device holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Weights.
    pub weight_bytes: u64,
    /// Keys and values that each token in flight keeps.
    pub kv_bytes_per_token: u64,
}

/// A run of pieces on one or more devices. A device that a pipeline passes twice is in two of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedStage {
    /// The pieces.
    pub pieces: Range<usize>,
    /// The devices, equal ones; their number is the tensor-parallel width.
    pub devices: Range<usize>,
}

impl<'a> Problem<'a> {
    /// A problem whose stages may have any width that there are costs for.
    pub fn new(devices: &'a [StageDevice], ends_block: &'a [bool], costs: &'a [Costs]) -> Self {
        Problem { devices, ends_block, costs, widths: None }
    }

    /// The same where the width of each stage is given.
    #[must_use]
    pub fn with_widths(self, widths: Option<&'a [usize]>) -> Self {
        Problem { widths, ..self }
    }
}

impl Problem<'_> {
    /// How many pieces there are.
    pub fn num_pieces(&self) -> usize {
        self.ends_block.len()
    }

    /// Costs on each rank of a stage: of unlike ones those of the slowest kind.
    ///
    /// # Panics
    /// If the stage's width is none of its kind's.
    pub fn rank_costs(&self, stage: &PlannedStage) -> &RankCosts {
        let costs = self.costs_on(stage.devices.clone());
        costs.unwrap_or_else(|| panic!("no costs for stages of {}", stage.devices.len()))
    }

    /// Costs on each rank of a stage of such devices; none where a kind of them has none for so many. Ranks wait for each
    /// other: where they are unlike, each takes as long as one of the kind that takes longest for the whole model.
    pub(super) fn costs_on(&self, devices: Range<usize>) -> Option<&RankCosts> {
        let width = devices.len();
        let alike = self.devices[devices].chunk_by(|one, next| one.kind == next.kind);
        let of_kind = |alike: &[StageDevice]| {
            let of_width = self.costs[alike[0].kind].iter().find(|(of, _)| *of == width);
            of_width.map(|(_, costs)| costs)
        };
        let whole = |costs: &RankCosts| costs.seconds(0..self.num_pieces());
        let slower = alike.map(of_kind).reduce(|one, other| {
            one.zip(other).map(|(one, other)| if whole(one) < whole(other) { other } else { one })
        });
        slower.flatten()
    }

    /// Time that a stage takes for the micro-batch, with the hop to the next.
    pub fn stage_seconds(&self, stage: &PlannedStage) -> f64 {
        self.rank_costs(stage).seconds(stage.pieces.clone()) + self.hop_seconds(stage)
    }

    /// Time to hand on what a stage has computed.
    pub fn hop_seconds(&self, stage: &PlannedStage) -> f64 {
        let sender = &self.devices[stage.devices.end - 1];
        match stage.pieces.end {
            end if end == self.num_pieces() => 0.0,
            0 => sender.hop_seconds,
            end if self.ends_block[end - 1] => sender.hop_seconds,
            end => sender.cut_hop_seconds + self.rank_costs(stage).cut_seconds(end),
        }
    }

    /// What the fullest of a stage's devices lacks for `kv_tokens` in flight.
    pub fn stage_missing_bytes(&self, stage: &PlannedStage, kv_tokens: u64) -> u64 {
        let needed = self.rank_costs(stage).memory_bytes(stage.pieces.clone(), kv_tokens);
        needed.saturating_sub(self.room(stage.devices.clone()))
    }

    /// The room on the smallest of some devices.
    pub(super) fn room(&self, devices: Range<usize>) -> u64 {
        self.smallest(devices).memory_bytes
    }

    /// The device with the least room, of some.
    ///
    /// # Panics
    /// If there is none.
    pub fn smallest(&self, devices: Range<usize>) -> &StageDevice {
        self.devices[devices].iter().min_by_key(|device| device.memory_bytes).expect("a stage has a device")
    }

    /// What the fullest device lacks for all of its stages, with `kv_tokens` in flight.
    pub fn missing_bytes(&self, stages: &[PlannedStage], kv_tokens: u64) -> u64 {
        let missing = stages.iter().map(|stage| {
            let held = self.held_beside(stages, stage);
            let kv = held.kv_bytes_per_token.saturating_mul(kv_tokens);
            held.weight_bytes.saturating_add(kv).saturating_sub(self.room(stage.devices.clone()))
        });
        missing.max().unwrap_or(0)
    }

    /// What each of a stage's devices holds, of all `stages` that it is in.
    pub fn held_beside(&self, stages: &[PlannedStage], stage: &PlannedStage) -> Held {
        let own = || stages.iter().filter(|other| other.devices == stage.devices);
        let costs = self.rank_costs(stage);
        let has_both_ends = own().any(|own| own.pieces.start == 0)
            && own().any(|own| own.pieces.end == self.num_pieces())
            && own().count() > 1;
        let weight_bytes: u64 = own().map(|own| costs.weight_bytes(own.pieces.clone())).sum();
        Held {
            weight_bytes: weight_bytes - if has_both_ends { costs.shared_bytes } else { 0 },
            kv_bytes_per_token: own().map(|own| costs.kv_bytes_per_token(own.pieces.clone())).sum(),
        }
    }

    /// Time that each device takes for the micro-batch, over all stages that it is in.
    pub fn device_seconds(&self, stages: &[PlannedStage]) -> Vec<f64> {
        let mut seconds = vec![0.0; self.devices.len()];
        for stage in stages {
            let own = self.stage_seconds(stage);
            seconds[stage.devices.clone()].iter_mut().for_each(|seconds| *seconds += own);
        }
        seconds
    }

    /// The slowest device's time.
    pub fn bottleneck(&self, stages: &[PlannedStage]) -> f64 {
        self.device_seconds(stages).into_iter().fold(0.0, f64::max)
    }

    /// The slowest device's time over the mean of all devices, idle ones counted.
    pub fn bottleneck_over_mean(&self, stages: &[PlannedStage]) -> f64 {
        let seconds = self.device_seconds(stages);
        self.bottleneck(stages) * self.devices.len() as f64 / seconds.iter().sum::<f64>()
    }
}

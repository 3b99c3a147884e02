//! A model's profile, measured part by part.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kernels::PAGE_TOKENS;

use super::attention::AttentionGrid;
use super::gang::Gang;
use super::grid::Grid;
use super::key::ProfileKey;
use super::points::{Both, Seconds, TokenPoint};
use super::subject::{self, Pages, Place, Step, Subject};
use super::{AttentionEntry, BlockEntry, BlockShape, FORMAT, Missing, Profile, SharedHalf, TooLarge};
use crate::block::{Attention, Block, Ffn};
use crate::cost::NumberType;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::stage::{Device, Dtypes};
use crate::weights::Weights;

/// Copies of a block, at most: a thousand tiny ones take longer to load than they say.
const MAX_COPIES: u64 = 256;

/// Pages that rows share, at least, and at most on a GPU: its processor is long at filling them.
const MIN_SHARED_PAGES: u64 = 8;
const MAX_SHARED_PAGES: u64 = 4096;

/// The share of the free memory that subjects may take: a matrix is there twice while it is packed.
const MEMORY_SHARE: f64 = 0.4;

/// The same of a GPU, where weights are made in their place: the rest is for what steps work in.
const GPU_MEMORY_SHARE: f64 = 0.8;

/// How long to look.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effort {
    /// Time for each point, alone and busy each.
    pub point_seconds: f64,
    /// Repeats that a point has at least, unless it takes ten times its time.
    pub least_repeats: usize,
}

/// What is measured, and with what.
#[derive(Debug, Clone)]
pub struct MeasureOptions {
    /// All devices alike that share the memory, or GPUs that hand over to each other; the first is the one that is also
    /// measured alone.
    pub devices: Vec<Device>,
    /// Number types.
    pub dtypes: Dtypes,
    /// Longest context.
    pub context_tokens: usize,
    /// Largest micro-batch.
    pub micro_batch_tokens: usize,
    /// Numbers of devices, more than one, that may share a stage. Of GPUs such stages are not measured.
    pub widths: Vec<usize>,
    /// Memory for all devices together.
    pub free_bytes: u64,
    /// How long to look.
    pub effort: Effort,
}

impl Default for Effort {
    /// A point of a small block has some 50 repeats then, and a profile of 20 shapes takes two minutes.
    fn default() -> Self {
        Effort { point_seconds: 0.15, least_repeats: 5 }
    }
}

impl MeasureOptions {
    /// Memory for what one device holds.
    pub fn room_bytes(&self) -> u64 {
        let share = if self.is_on_gpus() { GPU_MEMORY_SHARE } else { MEMORY_SHARE };
        (self.free_bytes as f64 * share) as u64 / self.devices.len() as u64
    }

    fn is_on_gpus(&self) -> bool {
        matches!(self.devices[0], Device::Cuda { .. })
    }

    /// What a profile of `model` by these options holds for.
    pub fn key(&self, model: &Model) -> ProfileKey {
        let config = &model.config;
        let model_bytes = NumberType::from(self.dtypes.weights).bytes(config.params());
        ProfileKey::of(&self.devices[0], self.devices.len(), self.dtypes, config.dims, model_bytes)
    }
}

/// Measures embedding, head, and of the blocks, attention and shared halves those that are `wanted`. `say` hears a line now and
/// then. A block that the memory has no room for is left out, and `say` hears why.
///
/// # Errors
/// What a device refuses, and an output matrix that there is no memory for.
pub fn measure(
    model: &Model,
    options: &MeasureOptions,
    wanted: &Missing,
    say: &mut dyn FnMut(&str),
) -> Result<Profile> {
    let key = options.key(model);
    let random = Model { weights: Weights::Random, ..model.clone() };
    // What a GPU makes for itself is there at once, and takes as long as what was trained.
    let model = if options.is_on_gpus() { &random } else { model };
    let bench = Bench { model, options, walked_bytes: key.walked_bytes };
    let hop = bench.hop()?;
    let embedding = bench.embedding(&hop)?;
    let head = bench.head(&hop)?;
    say("embedding and head measured");
    let mut profile = Profile {
        format: FORMAT,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        measured_at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs(),
        key,
        hop,
        embedding,
        head,
        blocks: Vec::new(),
        attention: Vec::new(),
        shared: Vec::new(),
        too_large: Vec::new(),
    };
    for (idx, shape) in wanted.blocks.iter().enumerate() {
        let which = format!("block {} of {}: {shape}", idx + 1, wanted.blocks.len());
        match unless_too_large(&which, || bench.block(*shape, &profile.hop), say)? {
            Ok(entry) => profile.blocks.push(entry),
            Err(needed_bytes) => {
                profile.too_large.push(TooLarge { part: super::Part::Block(*shape), needed_bytes });
            }
        }
    }
    for (idx, kv_heads) in wanted.kv_heads.iter().enumerate() {
        let which = format!("attention {} of {}: {kv_heads} KV heads", idx + 1, wanted.kv_heads.len());
        match unless_too_large(&which, || bench.attention(*kv_heads), say)? {
            Ok(entry) => profile.attention.push(entry),
            Err(needed_bytes) => {
                profile.too_large.push(TooLarge { part: super::Part::Attention(*kv_heads), needed_bytes });
            }
        }
    }
    for (idx, half) in wanted.halves.iter().enumerate() {
        let SharedHalf { ranks, half: name } = half;
        if profile.shared(*ranks).is_none() {
            profile.shared.push(bench.shared(*ranks, &profile.hop)?);
        }
        let entry = profile.shared.iter_mut().find(|entry| entry.ranks == *ranks).expect("it was put there");
        let which = format!("half {} of {}: {name} on {ranks} devices", idx + 1, wanted.halves.len());
        match unless_too_large(&which, || bench.half(*half, &profile.hop, &entry.broadcast), say)? {
            Ok(half) => entry.halves.push(half),
            Err(needed_bytes) => {
                profile.too_large.push(TooLarge { part: super::Part::Half(*half), needed_bytes });
            }
        }
    }
    Ok(profile)
}

/// Measures a part, or says why it is left out, and how many bytes it would take.
fn unless_too_large<T>(
    which: &str,
    measure: impl FnOnce() -> Result<T>,
    say: &mut dyn FnMut(&str),
) -> Result<std::result::Result<T, u64>> {
    let begun = Instant::now();
    match measure() {
        Ok(entry) => {
            say(&format!("{which}, {:.1} s", begun.elapsed().as_secs_f64()));
            Ok(Ok(entry))
        }
        Err(error @ Error::TooLargeToMeasure { needed_bytes, .. }) => {
            say(&format!("{which} is left out: {error}"));
            Ok(Err(needed_bytes))
        }
        Err(error) => Err(error),
    }
}

/// A model on the devices.
pub(super) struct Bench<'a> {
    pub(super) model: &'a Model,
    pub(super) options: &'a MeasureOptions,
    pub(super) walked_bytes: u64,
}

pub(super) type Curve = Both<Vec<TokenPoint>>;

impl Bench<'_> {
    /// All devices, `width` of them a stage.
    pub(super) fn gang(&self, width: usize, scrub_bytes: u64) -> Gang<'_> {
        let MeasureOptions { devices, dtypes, effort, .. } = self.options;
        // What the host reads is in no cache of a GPU.
        let scrub_bytes = if self.options.is_on_gpus() { 0 } else { scrub_bytes };
        Gang { devices, width, dtypes: *dtypes, effort: *effort, scrub_bytes }
    }

    pub(super) fn hidden(&self) -> usize {
        self.model.config.dims.hidden
    }

    pub(super) fn vocab(&self) -> usize {
        self.model.config.dims.vocab
    }

    fn grid(&self) -> Grid {
        Grid::of(&self.options.devices[0])
    }

    pub(super) fn tokens(&self) -> Vec<usize> {
        self.grid().tokens(self.options.micro_batch_tokens)
    }

    pub(super) fn weight_bytes(&self, params: u64) -> u64 {
        NumberType::from(self.options.dtypes.weights).bytes(params)
    }

    pub(super) fn table_params(&self) -> u64 {
        (self.vocab() * self.hidden()) as u64
    }

    /// Of the embedding, or of the output matrix, which are not narrowed.
    pub(super) fn table_bytes(&self) -> u64 {
        NumberType::from(self.options.dtypes.weights).at_least_bf16().bytes(self.table_params())
    }

    fn room(&self) -> u64 {
        self.options.room_bytes()
    }

    fn check_room(&self, what: &str, needed_bytes: u64) -> Result<()> {
        let free_bytes = self.room();
        match needed_bytes > free_bytes {
            true => Err(Error::TooLargeToMeasure { what: what.to_owned(), needed_bytes, free_bytes }),
            false => Ok(()),
        }
    }

    /// Times of what a stage has beside its blocks.
    fn no_blocks(&self, place: Place, scrub_bytes: u64) -> Result<Vec<Both<Seconds>>> {
        let input = (place != Place::First).then(|| self.hidden());
        let step = |tokens: usize| subject::short_rows(tokens, 1, input, self.vocab());
        let steps: Vec<Step> = self.tokens().into_iter().map(step).collect();
        self.gang(1, scrub_bytes).time(&Subject::no_blocks(self.model, place), &[], &steps)
    }

    fn hop(&self) -> Result<Curve> {
        let times = self.no_blocks(Place::Middle, 0)?;
        Ok(Part { flops_per_token: 0, weight_bytes: 0, copies: 1 }.curve(&self.tokens(), &times, None))
    }

    fn embedding(&self, hop: &Curve) -> Result<Curve> {
        let bytes = self.table_bytes();
        self.check_room("the embedding", bytes)?;
        let times = self.no_blocks(Place::First, self.walked_bytes.saturating_sub(bytes))?;
        let part = Part { flops_per_token: 0, weight_bytes: 0, copies: 1 };
        Ok(part.curve(&self.tokens(), &times, Some((hop, HALF))))
    }

    fn head(&self, hop: &Curve) -> Result<Curve> {
        let weight_bytes = self.table_bytes();
        self.check_room("the output matrix", weight_bytes)?;
        let times = self.no_blocks(Place::Last, self.walked_bytes.saturating_sub(weight_bytes))?;
        let part = Part { flops_per_token: 2 * self.table_params(), weight_bytes, copies: 1 };
        Ok(part.curve(&self.tokens(), &times, Some((hop, HALF))))
    }

    /// So many that weights are cold, as far as the memory has room.
    fn copies(&self, what: &str, weight_bytes: u64) -> Result<usize> {
        self.copies_on(what, weight_bytes, 1)
    }

    /// The same on several devices, which hold `weight_bytes` together.
    pub(super) fn copies_on(&self, what: &str, weight_bytes: u64, devices: usize) -> Result<usize> {
        let own_bytes = weight_bytes.div_ceil(devices as u64);
        self.check_room(what, own_bytes)?;
        let wanted = self.walked_bytes.div_ceil(own_bytes).min(self.room() / own_bytes);
        Ok(wanted.clamp(1, MAX_COPIES) as usize)
    }

    /// The model's first block with these halves, which has weights to measure with.
    pub(super) fn block_like(&self, is_like: impl Fn(&Block) -> bool) -> Block {
        *self
            .model
            .config
            .blocks
            .iter()
            .find(|block| is_like(block))
            .expect("only shapes of the model are wanted")
    }

    fn block(&self, shape: BlockShape, hop: &Curve) -> Result<BlockEntry> {
        let block = self.block_like(|block| BlockShape::from(*block) == shape);
        let dims = self.model.config.dims;
        let weight_bytes = self.weight_bytes(block.params(dims));
        let copies = self.copies("one", weight_bytes)?;
        let tokens = self.tokens();
        let most = tokens.last().map_or(1, |tokens| *tokens);
        let num_pages = subject::pages_of_short_rows(most, 1);
        let subject = Subject::blocks(self.model, block, copies, num_pages, PAGE_TOKENS);
        let step = |tokens: &usize| subject::short_rows(*tokens, 1, Some(dims.hidden), dims.vocab);
        let steps: Vec<Step> = tokens.iter().map(step).collect();
        let times = self.gang(1, 0).time(&subject, &[], &steps)?;
        let part = Part { flops_per_token: block.flops_per_token(dims), weight_bytes, copies };
        Ok(BlockEntry {
            shape,
            weight_bytes,
            copies,
            points: part.curve(&tokens, &times, Some((hop, WHOLE))),
        })
    }

    fn attention(&self, kv_heads: usize) -> Result<AttentionEntry> {
        let attention = Attention::Gqa { kv_heads };
        let block = Block { ffn: Ffn::None, ..self.block_like(|block| block.attention == attention) };
        let dims = self.model.config.dims;
        let kv_bytes = self.kv_bytes_per_token(attention);
        let copies = self.copies("attention", self.weight_bytes(block.params(dims)))?;
        let MeasureOptions { context_tokens, micro_batch_tokens, .. } = *self.options;
        let grid = AttentionGrid::new(self.grid(), context_tokens, micro_batch_tokens);
        let page_bytes = kv_bytes * PAGE_TOKENS as u64 * copies as u64;
        let own = grid.own_pages();
        let held = copies as u64 * self.weight_bytes(block.params(dims)) + own as u64 * page_bytes;
        let room = self.room().saturating_sub(held);
        let pages = Pages { own, shared: self.shared_pages(&grid, page_bytes, room) };
        let context_tokens = context_tokens + self.grid().chunk_tokens;
        let subject = Subject::blocks(self.model, block, copies, pages.total(), context_tokens);
        let steps = grid.steps(pages, dims);
        let fill = match self.options.is_on_gpus() {
            true => pages.fill_whole(dims.hidden, dims.vocab),
            false => pages.fill(dims.hidden, dims.vocab),
        };
        let times = self.gang(1, 0).time(&subject, &fill, &steps)?;
        Ok(grid.entry(kv_heads, copies, kv_bytes, &times))
    }

    fn kv_bytes_per_token(&self, attention: Attention) -> u64 {
        let dims = self.model.config.dims;
        NumberType::from(self.options.dtypes.kv).kv_bytes(attention.kv_values_per_token(dims), dims.head_dim)
    }

    /// Enough that keys and values are read from memory, as far as `room` bytes hold them: on cores, whose caches are large beside what a
    /// copy's rows read, as many as a step reads, so that none is read again before those of all copies have been. Those of a model
    /// that is tiny stay in a cache all the same, as they do in a job.
    fn shared_pages(&self, grid: &AttentionGrid, page_bytes: u64, room: u64) -> usize {
        let wanted = match self.options.is_on_gpus() {
            true => self.walked_bytes.div_ceil(page_bytes).min(MAX_SHARED_PAGES),
            false => grid.shared_pages() as u64,
        };
        wanted.min(room / page_bytes).max(MIN_SHARED_PAGES) as usize
    }
}

/// Of a hop, which a stage takes over and hands on.
pub(super) const WHOLE: f64 = 1.0;
/// Of a hop, where a stage is the first or the last.
pub(super) const HALF: f64 = 0.5;

/// Where the times of a subject without the hop are less, they are of no weight, and chance alone.
const LEAST_SECONDS: f64 = 1e-9;

/// What one of several copies of a part computes and reads.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) flops_per_token: u64,
    pub(super) weight_bytes: u64,
    pub(super) copies: usize,
}

impl Part {
    /// Its share of what was measured, less some of the hop.
    pub(super) fn curve(
        self,
        tokens: &[usize],
        times: &[Both<Seconds>],
        hop: Option<(&Curve, f64)>,
    ) -> Curve {
        let all = Both { alone: (), busy: () };
        all.map(|(), neighbours| {
            let point = |(idx, tokens): (usize, &usize)| {
                let hop = hop.map_or(0.0, |(hop, share)| share * hop.get(neighbours)[idx].seconds.median);
                let seconds =
                    times[idx].get(neighbours).share(hop, self.copies as f64).at_least(LEAST_SECONDS);
                TokenPoint {
                    tokens: *tokens,
                    seconds,
                    flops_per_second: (self.flops_per_token * *tokens as u64) as f64 / seconds.median,
                    bytes_per_second: self.weight_bytes as f64 / seconds.median,
                }
            };
            tokens.iter().enumerate().map(point).collect()
        })
    }
}

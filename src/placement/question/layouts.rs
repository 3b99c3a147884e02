//! The layouts that answer a question.
//!
//! They run as they are: each device that the job names has a stage, or shares one, or is in two. Each GPU has room for its
//! own stages; where that leaves less for keys and values than the job's sequences would keep, the answer is the layout that
//! is fastest with as many as there is room for.

use anyhow::{Context, Result, bail};
use configs::{AutoCount, TensorParallel};
use scheduler::{PlannedStage, least_bottleneck, least_bottleneck_within};
use stages::cost::{Balance, PieceShape, pieces};
use stages::{PAGE_TOKENS, Sharing};

use super::{BETTER_LAYOUT, Kept, Question, Source};
use crate::gpu_memory;
use crate::layout::{self, StageLayout, part_of};
use crate::plan::answer::{self, ends_block};
use crate::plan::setting::Setting;

/// Layouts are sought with room for so many percent of the tokens that the one before had room for.
const NEXT_PERCENT: u64 = 70;

/// What a layout is sought for.
#[derive(Clone, Copy)]
struct Wish<'a> {
    /// In flight in a replica.
    sequences: u64,
    /// Tokens that each stage must have room for.
    kv_tokens: u64,
    /// What weights, keys and values may have of each device; where nothing is said, all that they want.
    rooms: Option<&'a [u64]>,
    /// How ranks may share blocks, of the first replica.
    way: &'a Setting,
}

impl Question {
    /// The best layout: of stages of the given widths, or else with one stage for each device, or where that is faster and nothing
    /// speaks against it with stages that devices share.
    pub(in crate::placement) fn plan(
        &self,
        widths: Option<&[usize]>,
        kept: &Kept,
    ) -> Result<Vec<StageLayout>> {
        let endless = Wish { sequences: self.max_sequences, kv_tokens: 0, rooms: None, way: &self.first };
        let endless = self.plan_for(widths, kept, endless)?.with_context(|| {
            format!("[pipeline] tensor_parallel: found {widths:?}, which no cut of the model fits")
        })?;
        match self.pages.gpus() {
            // Where nothing fits, its numbers are told when it is refused.
            Some(gpus) => Ok(self.within_memory(gpus, widths, kept, &endless).unwrap_or(endless)),
            None => Ok(endless),
        }
    }

    /// Refuses a list of widths of which the best layout has no use for the last.
    ///
    /// # Errors
    /// Fewer stages than widths.
    pub(in crate::placement) fn check_widths(
        &self,
        widths: Option<&[usize]>,
        best: &[StageLayout],
    ) -> Result<()> {
        let Some((used, idle)) = widths.and_then(|widths| widths.split_at_checked(best.len())) else {
            return Ok(());
        };
        if idle.is_empty() {
            return Ok(());
        }
        bail!(
            "[pipeline] tensor_parallel: found {:?}, of which the fastest cut leaves the last {} stages without work\nhint: \
             tensor_parallel = {used:?} with {} devices{}, or stages that say which blocks each has",
            [used, idle].concat(),
            idle.len(),
            used.iter().sum::<usize>(),
            if self.replicas > 1 { " for each replica" } else { "" }
        )
    }

    /// The fastest of the layouts that leave room for all tokens that are wanted, for fewer and fewer, and of the one that minds
    /// no memory; none where none of them fits.
    fn within_memory(
        &self,
        gpus: &gpu_memory::Question,
        widths: Option<&[usize]>,
        kept: &Kept,
        endless: &[StageLayout],
    ) -> Option<Vec<StageLayout>> {
        let shared = self.with_sharing(endless);
        if self.pages.fit(&shared) && self.sequences(&shared) == self.max_sequences {
            return Some(endless.to_vec());
        }
        // What a step works in depends on the stage: it may have none of it.
        let rooms = [gpus.rooms(), gpus.usable()];
        // Unasked, GPUs share no stages.
        let ways = self.first.ways_to_share(widths.unwrap_or(&[1]));
        let mut layouts = vec![endless.to_vec()];
        for kv_tokens in self.wanted_tokens() {
            let sequences = self.sequences_of(kv_tokens).min(self.max_sequences);
            for (rooms, way) in rooms.iter().flat_map(|rooms| ways.iter().map(move |way| (rooms, way))) {
                let wish = Wish { sequences, kv_tokens, rooms: Some(rooms), way };
                layouts.extend(self.plan_for(widths, kept, wish).ok().flatten());
            }
        }
        self.fastest_that_fits(layouts)
    }

    /// The first of the fastest layouts that the GPUs have room for.
    fn fastest_that_fits(&self, layouts: Vec<Vec<StageLayout>>) -> Option<Vec<StageLayout>> {
        let fitting = layouts.into_iter().filter_map(|stages| {
            let shared = self.with_sharing(&stages);
            self.pages.fit(&shared).then(|| (self.speed_as_shared(&shared), stages))
        });
        fitting.reduce(|best, other| if other.0 > best.0 { other } else { best }).map(|(_, stages)| stages)
    }

    /// From what all sequences keep down to what the longest one takes, or what the job says.
    fn wanted_tokens(&self) -> Vec<u64> {
        if let AutoCount::Given(tokens) = self.setting.kv_cache_tokens {
            return vec![tokens as u64];
        }
        let least = self.setting.context_tokens.next_multiple_of(PAGE_TOKENS) as u64;
        let all = self.max_sequences.saturating_mul(self.setting.mix.kv_tokens_per_row);
        let next = |tokens: &u64| (*tokens > least).then(|| least.max(tokens / 100 * NEXT_PERCENT));
        std::iter::successors(Some(all.max(least)), next).collect()
    }

    /// The best layout for what is wished, where one fits.
    fn plan_for(
        &self,
        widths: Option<&[usize]>,
        kept: &Kept,
        wish: Wish<'_>,
    ) -> Result<Option<Vec<StageLayout>>> {
        if let Some(widths) = widths {
            let mut kinds = widths.to_vec();
            kinds.sort_unstable();
            kinds.dedup();
            return Ok(self.least_bottleneck(&kinds, Some(widths), self.may_cut(), widths.len(), wish));
        }
        let Some(one_each) = self.one_each(wish)? else { return Ok(None) };
        let is_auto = *kept == Kept::Nothing && self.setting.tensor_parallel == TensorParallel::Auto;
        let may_share = is_auto && !self.is_guess(&one_each);
        let shared = if may_share { self.shared() } else { None };
        let is_faster =
            |shared: &Vec<StageLayout>| self.speed(shared) > BETTER_LAYOUT * self.speed(&one_each);
        Ok(Some(shared.filter(is_faster).unwrap_or(one_each)))
    }

    /// A setting with as much room on each device as is wished: of the devices of the first replica, what is left on the fullest
    /// of those that are in their place in any.
    fn with_rooms(&self, setting: &Setting, wish: Wish<'_>) -> Setting {
        let least = |rooms: &[u64]| {
            let mut least = rooms.to_vec();
            for replica in 0..self.replicas {
                for (seat, other) in self.seats_of(0).iter().zip(self.seats_of(replica)) {
                    least[*seat] = least[*seat].min(rooms[*other]);
                }
            }
            least
        };
        Setting { rooms: wish.rooms.map(least), ..setting.clone() }
    }

    fn may_cut(&self) -> bool {
        self.setting.column_cut().is_some()
    }

    /// The best cut with one stage for each device, of whole blocks or where that is faster with FFNs that are cut. Whoever
    /// names a device several times has whole blocks.
    fn one_each(&self, wish: Wish<'_>) -> Result<Option<Vec<StageLayout>>> {
        let seats = self.seats_of(0);
        let num_stages = seats.len();
        let rows = self.rows(wish.sequences, num_stages);
        let mut case = self.with_rooms(&self.setting, wish).case(&self.pieces, &[1], Balance::Roofline, rows);
        if let (Some(gpus), Some(_)) = (self.pages.gpus(), wish.rooms) {
            let bytes = gpus.block_bytes();
            for (_, costs) in case.costs.iter_mut().flatten() {
                *costs = costs.clone().with_bytes(&bytes);
            }
        }
        let ends = ends_block(&self.pieces);
        let stages = least_bottleneck_within(&case.problem(&ends), seats, wish.kv_tokens)?;
        let whole = stages.map(|stages| self.whole(&stages));
        let may_cut = self.may_cut() && self.is_once() && num_stages > 1;
        let cut = if may_cut { self.least_bottleneck(&[1], None, true, num_stages, wish) } else { None };
        // The plan's own bytes are short of what caches are rounded up to.
        let cut = cut.filter(|cut| wish.rooms.is_none() || self.pages.fit(cut));
        let is_faster = |cut: &Vec<StageLayout>| {
            whole.as_ref().is_none_or(|whole| self.slowest(whole) > BETTER_LAYOUT * self.slowest(cut))
        };
        Ok(cut.filter(is_faster).or(whole))
    }

    /// Stages of whole blocks as they run.
    fn whole(&self, stages: &[PlannedStage]) -> Vec<StageLayout> {
        let parts = stages.iter().map(|stage| part_of(&self.pieces, &stage.pieces)).collect();
        layout::stages(parts, None)
    }

    /// The fastest layout of a replica on devices that are named once, where that has stages which several share and gives
    /// every device something to do. GPUs share stages only where the job says so.
    fn shared(&self) -> Option<Vec<StageLayout>> {
        let num_devices = self.seats_of(0).len();
        if !self.is_once() || self.own.has_gpus() || num_devices == 1 {
            return None;
        }
        let pieces = self.first.pieces();
        let stages = as_run(&pieces, &answer::passed_once(&self.first, &pieces)?.stages);
        let is_shared = stages.iter().any(|stage| stage.devices.len() > 1);
        let used: usize = stages.iter().map(|stage| stage.devices.len()).sum();
        (is_shared && used == num_devices).then_some(stages)
    }

    /// Whether these stages' costs on CPUs are an estimate, by which no device shares a stage and none has two: it knows neither what
    /// hops and sums cost nor what small micro-batches do. By one the quickstart on two cores with AVX2 was to be 1.14 times as
    /// fast with two stages each, and was not.
    fn is_guess(&self, stages: &[StageLayout]) -> bool {
        self.pages.gpus().is_none() && !matches!(self.source(stages), Source::Measured(_))
    }

    /// The fastest layout of a replica that goes through its devices twice, where it may and is faster than planned stages. It
    /// changes no answer: a job goes on with it or without.
    pub(in crate::placement) fn passed_twice(&self, planned: &[StageLayout]) -> Option<Vec<StageLayout>> {
        if !self.is_once() || self.is_guess(planned) {
            return None;
        }
        let setting = self.with_memory(&self.first, self.sequences(planned));
        let twice = as_run(&self.pieces, &answer::passed_twice(&setting, &self.pieces)?.stages);
        let is_faster = self.speed(&twice) > BETTER_LAYOUT * self.speed(planned);
        (is_faster && self.pages.fit(&twice)).then_some(twice)
    }

    /// The cut whose slowest stage takes least, of stages of such widths.
    fn least_bottleneck(
        &self,
        kinds: &[usize],
        widths: Option<&[usize]>,
        may_cut: bool,
        num_stages: usize,
        wish: Wish<'_>,
    ) -> Option<Vec<StageLayout>> {
        let pieces = pieces(&self.setting.config, self.setting.column_cut().filter(|_| may_cut));
        let rows = self.rows(wish.sequences, num_stages);
        let case = self.with_rooms(wish.way, wish).case(&pieces, kinds, Balance::Roofline, rows);
        let ends = ends_block(&pieces);
        let problem = case.problem(&ends).with_widths(widths);
        Some(as_run(&pieces, &least_bottleneck(&problem, wish.kv_tokens, problem.devices.len())?))
    }
}

/// Planned stages as they run.
fn as_run(pieces: &[PieceShape], stages: &[PlannedStage]) -> Vec<StageLayout> {
    let stage = |stage: &PlannedStage| StageLayout {
        part: part_of(pieces, &stage.pieces),
        devices: stage.devices.clone(),
        sharing: Sharing::default(),
    };
    stages.iter().map(stage).collect()
}

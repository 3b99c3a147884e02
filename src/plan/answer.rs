//! The fastest layout for a setting, and the layouts of others beside it.

use std::collections::BTreeSet;

use configs::{SplitBlocks, VirtualStages};
use scheduler::{
    Case, Choice, Costs, KvTokens, Load, PlannedStage, Problem, RankCosts, best_layout, faster_layout,
    faster_looped, in_flight, least_bottleneck,
};
use stages::cost::{Balance, PieceShape};
use stages::{PAGE_TOKENS, Sharing};

use crate::lanes::{self, Lanes, WantedTokens, Worth};
use crate::layout::{self, StageLayout, part_of};
use crate::plan::given::GivenStages;
use crate::plan::setting::Setting;

/// Going through the devices twice takes more hops and more micro-batches in flight: what gains less is not worth it.
const LEAST_GAIN: f64 = 1.01;

/// A micro-batch between two that are looked at is less than so many times as large as the smaller one, and not faster by more.
const LADDER_STEP: f64 = 2.0;

/// Pipelines of more devices are cut finely enough by going through them once.
const MOST_DEVICES_PASSED_TWICE: usize = 16;

/// A layout and what to expect of it, by the roofline.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// One of the replicas, with how its ranks may share blocks.
    pub(crate) setting: Setting,
    /// In the order of the pipeline. A device that it goes through twice is in two of them.
    pub(crate) stages: Vec<PlannedStage>,
    /// Its largest micro-batch, with what everything costs for it.
    pub(crate) case: Case,
    pub(crate) tokens_per_second: f64,
}

/// All that a plan says.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) pieces: Vec<PieceShape>,
    /// How often the plan is there, each on devices of its own; see [`Setting::replica`].
    pub(crate) replicas: usize,
    /// One of the replicas, with the tokens a second of all of them.
    pub(crate) plan: Layout,
    /// The job's own stages, where it gives any.
    pub(crate) given: Option<Other>,
    pub(crate) even: Other,
    /// One stage of all devices, and what to expect of it if it fits; nothing where devices are unlike.
    pub(crate) uniform: Option<(usize, Option<Layout>)>,
    pub(crate) bottleneck_over_mean: f64,
    pub(crate) blocks_only: f64,
    pub(crate) blocks_only_even: f64,
}

/// Other stages than the plan's.
#[derive(Debug)]
pub(crate) struct Other {
    /// In what is balanced.
    pub(crate) over_mean: f64,
    /// What to expect of them, if they fit.
    pub(crate) layout: Option<Layout>,
}

impl Layout {
    /// Rows in flight for all of its micro-batches.
    pub(crate) fn sequences(&self) -> u64 {
        self.case.rows * in_flight(self.stages.len() as u64)
    }

    pub(crate) fn problem<'a>(&'a self, ends_block: &'a [bool]) -> Problem<'a> {
        self.case.problem(ends_block)
    }
}

/// The plan beside the stages that a job gives, or none when nothing fits.
pub(crate) fn answer(setting: &Setting, given_stages: Option<&GivenStages>) -> Option<Answer> {
    let pieces = setting.pieces();
    let ends = ends_block(&pieces);
    let (replicas, plan) = plan(setting, &pieces)?;
    let replica = &plan.setting;
    let even = even_split(setting, &pieces);
    let rows = plan.case.rows;
    let balanced = replica.case(&pieces, &replica.widths(), setting.balance, rows);
    let problem = balanced.problem(&ends);
    let (blocks_only, blocks_only_even) = blocks_only(setting, &pieces, &even, rows);
    Some(Answer {
        bottleneck_over_mean: problem.bottleneck_over_mean(&plan.stages),
        given: given_stages.map(|own| {
            let layout = given(setting, own);
            let replica =
                layout.as_ref().map_or_else(|| setting.given_replica(), |layout| layout.setting.clone());
            Other { over_mean: over_mean(&replica, &own.pieces, &own.stages, rows), layout }
        }),
        even: other(setting, &pieces, even, rows),
        uniform: uniform(setting, &pieces),
        blocks_only,
        blocks_only_even,
        replicas,
        plan,
        pieces,
    })
}

/// The fastest layout, and how often it is there; none where nothing fits.
pub(crate) fn plan(setting: &Setting, pieces: &[PieceShape]) -> Option<(usize, Layout)> {
    let replica_counts = setting.replica_counts();
    let once = once(setting, pieces, &replica_counts)?;
    let least = once.1.tokens_per_second * LEAST_GAIN;
    let twice = choose_twice(setting, pieces, &replica_counts, least);
    let twice = twice.and_then(|chosen| replicated(setting, pieces, chosen));
    Some(twice.unwrap_or(once))
}

/// The fastest layout that goes through its devices once.
fn once(setting: &Setting, pieces: &[PieceShape], replica_counts: &[usize]) -> Option<(usize, Layout)> {
    let mut searched = vec![];
    let find = |way: &Setting, least: Option<f64>| {
        let costs = match way.balance {
            Balance::Roofline => costs(way, pieces, &way.widths()),
            Balance::Flops | Balance::Weights => vec![],
        };
        let others: &[Vec<Vec<Costs>>] = if least.is_some() { &searched } else { &[] };
        let sizes = new_sizes(&costs, others);
        let chosen = choose(way, pieces, replica_counts, (&sizes, least.unwrap_or(0.0)));
        searched.push(costs);
        replicated(way, pieces, chosen?)
    };
    in_best_way(setting, pieces, &setting.widths(), find)
}

/// Finds a layout, of stages of such widths, whose ranks share blocks as they do where it is run: see [`lanes`]. Where `find` is
/// told a speed, it need not find what is slower, or was there in the ways before.
fn in_best_way(
    setting: &Setting,
    pieces: &[PieceShape],
    widths: &[usize],
    mut find: impl FnMut(&Setting, Option<f64>) -> Option<(usize, Layout)>,
) -> Option<(usize, Layout)> {
    let worth = |(_, layout): &(usize, Layout)| {
        let lanes = lanes_of(pieces, layout);
        let speed = layout.tokens_per_second;
        Worth { num_lanes: lanes.num_lanes, row_tokens: Some(lanes.row_tokens()), speed }
    };
    let mut found: Vec<(usize, Layout)> = vec![];
    for way in setting.ways_to_share(widths) {
        let of_any_page = found.iter().map(worth).filter(|worth| worth.num_lanes == 1);
        let least = match of_any_page.map(|worth| worth.speed).reduce(f64::max) {
            Some(speed) => Some(speed / LADDER_STEP),
            None if found.is_empty() => Some(0.0),
            None => None, // Its lanes may be too short.
        };
        found.extend(find(&way, least));
    }
    lanes::choose(found, setting.context_tokens, worth)
}

/// The fastest layout of one pipeline that goes through its devices once; none where nothing fits.
pub(crate) fn passed_once(setting: &Setting, pieces: &[PieceShape]) -> Option<Layout> {
    Some(once(setting, pieces, &[1])?.1)
}

/// The fastest layout of one pipeline that goes through its devices twice, where it may; none where nothing fits.
pub(crate) fn passed_twice(setting: &Setting, pieces: &[PieceShape]) -> Option<Layout> {
    Some(replicated(setting, pieces, choose_twice(setting, pieces, &[1], 0.0)?)?.1)
}

/// What given stages come to in all replicas that the job has; none where they do not fit.
pub(crate) fn given(setting: &Setting, given: &GivenStages) -> Option<Layout> {
    let GivenStages { pieces, stages } = given;
    let find = |way: &Setting, _: Option<f64>| replicated(way, pieces, (way.replicas, stages.clone()));
    in_best_way(setting, pieces, &setting.widths(), find).map(|(_, layout)| layout)
}

/// Whether anything fits on devices with so many more bytes each.
pub(crate) fn fits(setting: &Setting, more_bytes: u64) -> bool {
    let is_shared = setting.tokens_in_flight.is_some();
    // Where a replica fits that has all its rows to itself, it also fits with the other devices idle.
    let counts = setting.replica_counts().into_iter().take(if is_shared { usize::MAX } else { 1 });
    let ways = |replica: Setting| replica.ways_to_share(&replica.widths());
    counts.map(|count| setting.replica(count)).flat_map(ways).any(|way| smallest(&way, more_bytes).is_some())
}

/// Any layout for micro-batches of one row, on devices with so many more bytes each.
fn smallest(setting: &Setting, more_bytes: u64) -> Option<Choice> {
    let pieces = setting.pieces();
    let mut case = setting.case(&pieces, &setting.widths(), setting.balance, 1);
    for device in &mut case.devices {
        device.memory_bytes = device.memory_bytes.saturating_add(more_bytes);
    }
    best_layout(&[case], &ends_block(&pieces), setting.given_widths(), setting.kv())
}

pub(crate) fn ends_block(pieces: &[PieceShape]) -> Vec<bool> {
    pieces.iter().map(|piece| piece.ends_block).collect()
}

/// A layout, and how often it is there.
type Chosen = (usize, Vec<PlannedStage>);

/// What to expect of all replicas.
fn replicated(setting: &Setting, pieces: &[PieceShape], chosen: Chosen) -> Option<(usize, Layout)> {
    let (replicas, stages) = chosen;
    let replica = setting.replica(replicas);
    let mut layout = expect(&replica, pieces, &replica.widths(), stages)?;
    layout.tokens_per_second *= replicas as f64;
    Some((replicas, layout))
}

/// By throughput, of `sizes` what makes more than so many rows a second, or where another cost is balanced the layout with the least
/// of it.
fn choose(
    setting: &Setting,
    pieces: &[PieceShape],
    replica_counts: &[usize],
    (sizes, rows_per_second): (&[Size<'_>], f64),
) -> Option<Chosen> {
    let ends = ends_block(pieces);
    if setting.balance != Balance::Roofline {
        return Some((1, smallest(setting, 0)?.stages));
    }
    fastest(setting, replica_counts, rows_per_second, |replica, rows_per_second| {
        let cases = cases(replica, sizes);
        let widths = setting.given_widths();
        let choice = faster_layout(&cases, &ends, widths, replica.kv(), rows_per_second)?;
        Some((cases[choice.case].rows_per_second(choice.bottleneck), choice.stages))
    })
}

/// The fastest layout that goes through the devices twice, where one makes more than `rows_per_second`. Widths that
/// are given are those of stages on devices of their own, and a cut by another cost than time is not about speed.
fn choose_twice(
    setting: &Setting,
    pieces: &[PieceShape],
    replica_counts: &[usize],
    rows_per_second: f64,
) -> Option<Chosen> {
    let is_one_stage_each = setting.given_widths().is_some() || setting.virtual_stages == VirtualStages::Off;
    if setting.balance != Balance::Roofline || is_one_stage_each {
        return None;
    }
    let ends = ends_block(pieces);
    fastest(setting, replica_counts, rows_per_second, |replica, rows_per_second| {
        let num_devices = replica.devices.num_devices();
        if !(2..=MOST_DEVICES_PASSED_TWICE).contains(&num_devices) {
            return None;
        }
        let costs = costs(replica, pieces, &[1]);
        let cases = cases(replica, &new_sizes(&costs, &[]));
        let choice = faster_looped(&cases, &ends, replica.kv(), rows_per_second)?;
        Some((cases[choice.case].rows_per_second(choice.bottleneck), choice.stages))
    })
}

/// What everything costs for each micro-batch that is looked at.
fn costs(setting: &Setting, pieces: &[PieceShape], widths: &[usize]) -> Vec<Vec<Costs>> {
    let of_rows = |rows| setting.costs(pieces, widths, Balance::Roofline, setting.load(rows));
    setting.micro_batches().into_iter().map(of_rows).collect()
}

/// What everything costs for a micro-batch that is looked at, where it is worth a search.
type Size<'a> = Option<&'a Vec<Costs>>;

/// The micro-batches that cost otherwise than in other ways to share blocks.
fn new_sizes<'a>(costs: &'a [Vec<Costs>], others: &[Vec<Vec<Costs>>]) -> Vec<Size<'a>> {
    let is_new = |index: usize| others.iter().all(|other| other[index] != costs[index]);
    (0..costs.len()).map(|index| is_new(index).then(|| &costs[index])).collect()
}

/// The micro-batches of one of several replicas, whose devices are of the same kinds, and which has none that not all of them have.
fn cases(replica: &Setting, sizes: &[Size<'_>]) -> Vec<Case> {
    let case = |(rows, costs): (u64, &Size<'_>)| {
        costs.map(|costs| replica.case_of(costs.clone(), Balance::Roofline, rows))
    };
    replica.micro_batches().into_iter().zip(sizes).filter_map(case).collect()
}

/// The fastest layout of any number of replicas, where one makes more than `rows_per_second`; of equally fast ones the
/// fewest. `find` has the rows per second and the stages of one replica that makes more than it is told.
fn fastest(
    setting: &Setting,
    replica_counts: &[usize],
    mut rows_per_second: f64,
    find: impl Fn(&Setting, f64) -> Option<(f64, Vec<PlannedStage>)>,
) -> Option<Chosen> {
    let mut best = None;
    for &count in replica_counts {
        if let Some((speed, stages)) = find(&setting.replica(count), rows_per_second / count as f64) {
            rows_per_second = speed * count as f64;
            best = Some((count, stages));
        }
    }
    best
}

/// What to expect of a layout: with the largest micro-batch that its fullest stage has room for. Time a row never
/// rises with the micro-batch, as each cost is the larger of a constant and a share of the rows.
fn expect(
    setting: &Setting,
    pieces: &[PieceShape],
    widths: &[usize],
    stages: Vec<PlannedStage>,
) -> Option<Layout> {
    let rows = most_rows(setting, pieces, &stages)?;
    let case = setting.case(pieces, widths, Balance::Roofline, rows);
    let bottleneck = case.problem(&ends_block(pieces)).bottleneck(&stages);
    let tokens_per_second = case.rows_per_second(bottleneck);
    Some(Layout { setting: setting.clone(), tokens_per_second, stages, case })
}

/// Rows of the largest micro-batch that every stage has room for; none where there is none. How ranks share blocks depends on the rows,
/// and what they hold on that, so that more rows may fit where fewer do not: all sizes are gone through from the largest down, and
/// only what is between two of them is halved.
fn most_rows(setting: &Setting, pieces: &[PieceShape], stages: &[PlannedStage]) -> Option<u64> {
    let ends = ends_block(pieces);
    let widths: BTreeSet<usize> = stages.iter().map(|stage| stage.devices.len()).collect();
    let widths: Vec<usize> = widths.into_iter().collect();
    // Nowhere are there fewer weights than where all halves are shared.
    let lightest = Setting { split_blocks: SplitBlocks::All, ..setting.clone() };
    if lightest.case(pieces, &widths, Balance::Roofline, 1).problem(&ends).missing_bytes(stages, 0) > 0 {
        return None;
    }
    let mut known: Option<(Vec<Sharing>, Vec<Costs>)> = None;
    let mut fits = |rows: u64| {
        let Some(kv_tokens) = setting.kv().needed(rows, stages.len() as u64) else { return false };
        let load = setting.load(rows);
        let shared: Vec<Sharing> = stages.iter().map(|stage| sharing(setting, pieces, stage, load)).collect();
        // As many bytes where blocks are shared in the same way.
        let (_, costs) = match known.take().filter(|(other, _)| *other == shared) {
            Some(same) => known.insert(same),
            None => known.insert((shared, setting.costs(pieces, &widths, Balance::Roofline, load))),
        };
        let devices = setting.stage_devices(Balance::Roofline, load);
        Problem::new(&devices, &ends, costs).missing_bytes(stages, kv_tokens) == 0
    };
    let sizes = setting.micro_batches();
    let largest = sizes.iter().rposition(|rows| fits(*rows))?;
    let mut within = sizes[largest];
    let mut beyond = sizes.get(largest + 1).copied().unwrap_or(setting.max_rows() + 1);
    while beyond - within > 1 {
        let middle = within.midpoint(beyond);
        if fits(middle) { within = middle } else { beyond = middle }
    }
    Some(within)
}

/// Tokens of KV that the fullest device has room for; none where no stage keeps any.
pub(crate) fn kv_tokens(layout: &Layout, ends_block: &[bool]) -> Option<u64> {
    let problem = layout.problem(ends_block);
    let room = |stage: &PlannedStage| {
        let held = problem.held_beside(&layout.stages, stage);
        let room = problem.smallest(stage.devices.clone()).memory_bytes;
        (room - held.weight_bytes).checked_div(held.kv_bytes_per_token)
    };
    layout.stages.iter().filter_map(room).min()
}

/// Lanes of KV pages, as a run of the layout has them, which keeps no more rows in flight and says how large its cache is as the job
/// does.
pub(crate) fn lanes_of(pieces: &[PieceShape], layout: &Layout) -> Lanes {
    let Layout { setting, stages, case, .. } = layout;
    let load = setting.load(case.rows);
    let stage = |stage: &PlannedStage| StageLayout {
        part: part_of(pieces, &stage.pieces),
        devices: stage.devices.clone(),
        sharing: sharing(setting, pieces, stage, load),
    };
    let num_lanes = layout::num_lanes(&stages.iter().map(stage).collect::<Vec<_>>());
    let room = kv_tokens(layout, &ends_block(pieces)).unwrap_or(u64::MAX);
    let room = room.min(setting.shared_room.unwrap_or(u64::MAX)) / PAGE_TOKENS as u64;
    let wanted = WantedTokens {
        kv_cache_tokens: setting.kv_cache_tokens,
        context_tokens: setting.context_tokens,
        sequences: layout.sequences() as usize,
    };
    wanted.lanes(num_lanes, usize::try_from(room).unwrap_or(usize::MAX))
}

/// How the ranks of a stage share blocks: as is fastest for the plan's micro-batch.
pub(crate) fn sharing(setting: &Setting, pieces: &[PieceShape], stage: &PlannedStage, load: Load) -> Sharing {
    let costs = setting.cost_model(setting.kinds()[setting.slowest_kind(stage.devices.clone(), load)]);
    setting.sharing(&*costs, &pieces[stage.pieces.clone()], stage.devices.len(), load)
}

/// Tokens of KV that a layout keeps in flight.
pub(crate) fn tokens_in_flight(setting: &Setting, layout: &Layout) -> u64 {
    match setting.kv() {
        KvTokens::Wanted { tokens, .. } => tokens,
        KvTokens::PerRow { tokens, .. } => layout.sequences() * tokens,
    }
}

/// As many slots for each device, empty ones counted; what remains goes to the stages before the last, one each,
/// as vLLM does it.
pub(crate) fn even_split(setting: &Setting, pieces: &[PieceShape]) -> Vec<PlannedStage> {
    let num_devices = setting.devices.num_devices();
    let num_slots = setting.config.num_slots;
    let rest = num_slots % num_devices;
    let mut counts = vec![num_slots / num_devices; num_devices];
    for back in 2..rest + 2 {
        // With a remainder of all devices but one, the first gets its own too.
        counts[num_devices.saturating_sub(back)] += 1;
    }
    let mut end_slot = 0;
    let mut start = 0;
    let mut stages = vec![];
    for (device, count) in counts.into_iter().enumerate() {
        end_slot += count;
        let end = pieces.partition_point(|piece| setting.config.blocks[piece.block].slot < end_slot);
        if end > start {
            stages.push(PlannedStage { pieces: start..end, devices: device..device + 1 });
        }
        start = end;
    }
    stages
}

/// The slowest device over the mean, in what is balanced, for stages on all devices.
fn over_mean(setting: &Setting, pieces: &[PieceShape], stages: &[PlannedStage], rows: u64) -> f64 {
    let case = setting.case(pieces, &setting.widths(), setting.balance, rows);
    let ends = ends_block(pieces);
    case.problem(&ends).bottleneck_over_mean(stages)
}

fn other(setting: &Setting, pieces: &[PieceShape], stages: Vec<PlannedStage>, rows: u64) -> Other {
    let over_mean = over_mean(setting, pieces, &stages, rows);
    Other { over_mean, layout: expect(setting, pieces, &setting.widths(), stages) }
}

fn uniform(setting: &Setting, pieces: &[PieceShape]) -> Option<(usize, Option<Layout>)> {
    let ranks = setting.devices.num_devices();
    let is_possible = setting.kinds().len() == 1 && setting.config.dims.heads.is_multiple_of(ranks);
    let stage = PlannedStage { pieces: 0..pieces.len(), devices: 0..ranks };
    let find = |way: &Setting, _: Option<f64>| Some((1, expect(way, pieces, &[ranks], vec![stage.clone()])?));
    is_possible.then(|| (ranks, in_best_way(setting, pieces, &[ranks], find).map(|(_, layout)| layout)))
}

/// The slowest device over the mean for the blocks alone, without embedding, head, hops or limits of memory:
/// of the best cut, and of the even split.
fn blocks_only(setting: &Setting, pieces: &[PieceShape], even: &[PlannedStage], rows: u64) -> (f64, f64) {
    let load = setting.load(rows);
    let mut devices = setting.stage_devices(setting.balance, load);
    for device in &mut devices {
        (device.memory_bytes, device.hop_seconds, device.cut_hop_seconds) = (u64::MAX, 0.0, 0.0);
    }
    let mut costs = setting.costs(pieces, &setting.widths(), setting.balance, load);
    for (_, costs) in costs.iter_mut().flatten() {
        *costs = RankCosts::without_extras(costs);
    }
    let ends = ends_block(pieces);
    let problem =
        Problem { devices: &devices, ends_block: &ends, costs: &costs, widths: setting.given_widths() };
    let best = least_bottleneck(&problem, 0, devices.len()).expect("memory is no limit");
    (problem.bottleneck_over_mean(&best), problem.bottleneck_over_mean(even))
}

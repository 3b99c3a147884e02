//! Whether stages fit their GPUs, and how many KV pages there is room for: deciding only.
//!
//! All stages have as many pages, so the fullest GPU says how many. Pages take what weights, a step's arrays and a reserve
//! leave; they are never so few that a row's answer would depend on how much memory is free.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Result, bail};
use configs::{AutoCount, Pipeline, StagesRunIn};
use scheduler::Span;
use stages::{Dtypes, GpuMemory, ModelConfig, PAGE_TOKENS, Part, RankPlace, Sharing, StepSize};

use crate::lanes::{Lanes, WantedTokens};
use crate::layout::{self, StageLayout};
use crate::lower::sequences_per_replica;
use crate::{gpus, text};

/// Of a GPU's memory so much is left at most: to kernels that are loaded, captured graphs, libraries' workspaces, and to how
/// a driver's memory falls to pieces.
const RESERVED_BYTES: u64 = 1 << 30;

/// As both together, of small memories: one part in so many.
const RESERVED_SHARE: u64 = 16;

/// What NCCL has of a GPU's memory for each other GPU that this one moves numbers to or from. It takes that at the first move,
/// when pages are long there: buffers of 10 MiB for each of up to 32 channels to receive by, which are 320 MiB, and 192 MiB for
/// what it does not tell. An estimate, as it depends on how GPUs are linked.
const NCCL_PEER_BYTES: u64 = 512 << 20;

/// What a job may do whose GPUs have no room for what they share as in its first run.
const SHARED_ALIKE: &str = "free memory, or pass --accept-numerics with split_blocks = \"all\"";

/// What is known of a pipeline's GPUs before its stages are placed.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    config: ModelConfig,
    dtypes: Dtypes,
    /// The index of each GPU that the job names, those of one replica after the other.
    indices: Vec<usize>,
    replicas: usize,
    /// By the GPU's index.
    free_bytes: BTreeMap<usize, u64>,
    step: StepSize,
    /// Whether each stage is a process of its own: what is handed over then arrives in memory of its own also on the same GPU.
    are_processes: bool,
    /// Most of a GPU, where contexts are split over them.
    multiprocessors: Option<usize>,
    wanted: WantedTokens,
}

impl Question {
    /// Asks the GPUs what is free.
    ///
    /// # Errors
    /// One that is not there, and why, or two that are unlike.
    pub(crate) fn of(
        pipeline: &Pipeline,
        config: &ModelConfig,
        dtypes: Dtypes,
        context_tokens: usize,
    ) -> Result<Question> {
        gpus::check_alike(pipeline)?;
        let (rows, sequences) = (pipeline.most_micro_batch_tokens(), sequences_per_replica(pipeline));
        let micro_batches = scheduler::in_flight(pipeline.devices_per_replica() as u64) as usize;
        let are_processes = pipeline.stages_run_in == StagesRunIn::Processes;
        let arrivals = if are_processes { micro_batches } else { 1 };
        Ok(Question {
            config: config.clone(),
            dtypes,
            indices: pipeline.devices.iter().map(|device| device.index).collect(),
            replicas: pipeline.replicas,
            free_bytes: gpus::free_bytes(pipeline)?,
            step: StepSize { rows, sequences, context_tokens, micro_batches, arrivals },
            are_processes,
            multiprocessors: (!pipeline.deterministic)
                .then(|| gpus::multiprocessors(pipeline))
                .transpose()?,
            wanted: WantedTokens::of(pipeline, context_tokens),
        })
    }

    /// Pages of each replica, in the stages' lanes, each of which has room for the longest sequence where the job does not say how
    /// many there are.
    ///
    /// # Errors
    /// A GPU that its stages do not fit.
    pub(crate) fn lanes(&self, stages: &[StageLayout]) -> Result<Lanes> {
        let step = self.step_of(stages.len());
        let load = |(&index, &free_bytes): (&usize, &u64)| {
            let (mut memory, mut peers) = (GpuMemory::default(), 0);
            let (mut parts, mut is_shared_unlike) = (Vec::new(), false);
            for indices in self.indices.chunks(self.indices.len() / self.replicas) {
                let mut before = None;
                for (stage, StageLayout { part, devices: ranks, sharing }) in stages.iter().enumerate() {
                    let first = indices[ranks.start];
                    let step = self.behind(step, before.replace(first), first);
                    let is_here = |(_, other): &(usize, &usize)| **other == index;
                    for (rank, _) in indices[ranks.clone()].iter().enumerate().filter(is_here) {
                        let place = RankPlace { rank, num_ranks: ranks.len() };
                        memory += self.memory(*part, (place, sharing), step);
                        peers += nccl_peers(self.are_processes, (stage, stages.len()), place);
                        parts.push(*part);
                        is_shared_unlike |= *sharing != Sharing::default();
                    }
                }
            }
            GpuLoad { index, free_bytes, parts, is_shared_unlike, memory, nccl_peers: peers }
        };
        lanes(&self.free_bytes.iter().map(load).collect::<Vec<_>>(), self.wanted, layout::num_lanes(stages))
    }

    pub(crate) fn wanted(&self) -> WantedTokens {
        self.wanted
    }

    /// The largest step of so many stages, which in threads may be more than devices.
    fn step_of(&self, num_stages: usize) -> StepSize {
        let micro_batches = self.step.micro_batches.max(scheduler::in_flight(num_stages as u64) as usize);
        StepSize { micro_batches, ..self.step }
    }

    /// Such a step of a stage that begins on a GPU behind one that does on another, or on the same.
    fn behind(&self, step: StepSize, before: Option<usize>, gpu: usize) -> StepSize {
        let stays = !self.are_processes && before == Some(gpu);
        StepSize { arrivals: if stays { 0 } else { step.arrivals }, ..step }
    }

    /// Of each GPU that the job names, once each and in that order, the bytes that weights, keys and values may have: all that
    /// a step works in taken off, were the whole model there.
    pub(crate) fn rooms(&self) -> Vec<u64> {
        let whole = Span { start: 0, end: self.config.blocks.len() };
        let memory = self.alone(whole, self.step.context_tokens);
        let angles = memory.weight_bytes - self.alone(whole, 0).weight_bytes;
        let taken = memory.work_bytes + angles;
        self.usable().into_iter().map(|bytes| bytes.saturating_sub(taken)).collect()
    }

    /// Of each block, the bytes of its weights, tables of the first and the last among them, and those that it keeps of a token.
    pub(crate) fn block_bytes(&self) -> Vec<(u64, u64)> {
        let bytes = |block| {
            let memory = self.alone(Span { start: block, end: block + 1 }, 0);
            (memory.with_pages(0) - memory.work_bytes, memory.page_bytes.div_ceil(PAGE_TOKENS as u64))
        };
        (0..self.config.blocks.len()).map(bytes).collect()
    }

    /// What blocks take, were they a GPU's only stage, with angles for so many positions.
    fn alone(&self, blocks: Span, context_tokens: usize) -> GpuMemory {
        let step = StepSize { context_tokens, ..self.step };
        self.memory(blocks.into(), (RankPlace::ALONE, &Sharing::default()), step)
    }

    fn memory(&self, part: Part, shard: (RankPlace, &Sharing), step: StepSize) -> GpuMemory {
        GpuMemory::of(&self.config, part, shard, self.dtypes, (step, self.multiprocessors))
    }

    /// The same with nothing taken off, of GPUs that host a stage in the middle and share it with nobody.
    pub(crate) fn usable(&self) -> Vec<u64> {
        let is_first = |(at, index): &(usize, &usize)| !self.indices[..*at].contains(index);
        let named = self.indices.iter().enumerate().filter(is_first);
        let peers = nccl_peers(self.are_processes, (1, 3), RankPlace::ALONE);
        named.map(|(_, index)| usable(self.free_bytes[index], peers)).collect()
    }
}

/// Other GPUs that a rank moves numbers to or from by NCCL: the ranks beside it, and, of a stage's first one, those of the stages before
/// and behind it, where stages are processes.
fn nccl_peers(are_processes: bool, (stage, num_stages): (usize, usize), place: RankPlace) -> u64 {
    let hops = match are_processes && place.rank == 0 {
        true => u64::from(stage > 0) + u64::from(stage + 1 < num_stages),
        false => 0,
    };
    place.num_ranks as u64 - 1 + hops
}

/// What is left of free memory beside the reserve, of a GPU that NCCL joins to so many others.
fn usable(free_bytes: u64, nccl_peers: u64) -> u64 {
    free_bytes - (RESERVED_BYTES + nccl_peers * NCCL_PEER_BYTES).min(free_bytes / RESERVED_SHARE)
}

/// A GPU and the stages that it hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
struct GpuLoad {
    /// As the driver counts it.
    index: usize,
    /// Bytes that are free before anything is loaded.
    free_bytes: u64,
    /// What the stages hold, in the order of the pipeline.
    parts: Vec<Part>,
    /// Whether some half of theirs is not shared by heads or by columns.
    is_shared_unlike: bool,
    /// What they take together.
    memory: GpuMemory,
    /// How many other GPUs NCCL joins them to.
    nccl_peers: u64,
}

/// Pages that every GPU has room for, as many in each lane and no more than are of use.
///
/// # Errors
/// A GPU that its stages, or the pages that must be there, do not fit.
fn lanes(gpus: &[GpuLoad], wanted: WantedTokens, num_lanes: usize) -> Result<Lanes> {
    for gpu in gpus {
        gpu.check_weights()?;
    }
    let Some(fullest) = gpus.iter().min_by_key(|gpu| gpu.pages()) else {
        return Ok(wanted.lanes(num_lanes, usize::MAX));
    };
    let lanes = wanted.lanes(num_lanes, fullest.pages());
    let least = wanted.least_pages(num_lanes);
    if lanes.pages >= least {
        return Ok(lanes);
    }
    let taken = text::bytes((least * num_lanes) as u64 * fullest.memory.page_bytes);
    let (index, left, spans) = (fullest.index, text::bytes(fullest.left()), fullest.spans_and_nccl());
    // A layout that is chosen anew has no lanes that are too short.
    let cure = match num_lanes {
        1 => String::new(),
        _ => format!("\nhint: devices share out sequences, as in the job's first run: {SHARED_ALIKE}"),
    };
    if let AutoCount::Given(tokens) = wanted.kv_cache_tokens {
        bail!(
            "[pipeline] kv_cache_tokens: {tokens} take {taken} on cuda:{index}, and {left} of its memory are free beside {spans}{cure}"
        );
    }
    bail!(
        "a context of {} tokens{} takes {taken} of KV cache on cuda:{index}, and {left} of its memory are free beside {spans}\n\
         hint: set [model] max_context_tokens to at most {}, or [pipeline] kv_cache_tokens{cure}",
        wanted.context_tokens,
        if num_lanes == 1 { String::new() } else { format!(" in each of {num_lanes} lanes") },
        lanes.row_tokens()
    )
}

impl GpuLoad {
    fn usable(&self) -> u64 {
        usable(self.free_bytes, self.nccl_peers)
    }

    /// Bytes that are left to NCCL.
    fn nccl_bytes(&self) -> u64 {
        usable(self.free_bytes, 0) - self.usable()
    }

    fn pages(&self) -> usize {
        self.memory.pages_in(self.usable())
    }

    /// What is left for pages.
    fn left(&self) -> u64 {
        self.usable().saturating_sub(self.memory.with_pages(0))
    }

    fn check_weights(&self) -> Result<()> {
        let (needed, usable) = (self.memory.with_pages(0), self.usable());
        if needed <= usable {
            return Ok(());
        }
        bail!(
            "{} on cuda:{} take {} of weights and {} to work in, and {} of its memory are free{}\n\
             hint: name more GPUs in [pipeline] devices, set a smaller micro_batch_tokens, or give this one fewer blocks by stages{}",
            self.spans(),
            self.index,
            text::bytes(self.memory.weight_bytes),
            text::bytes(needed - self.memory.weight_bytes),
            text::bytes(usable),
            match self.nccl_bytes() {
                0 => String::new(),
                bytes => format!(" beside {} for NCCL", text::bytes(bytes)),
            },
            // A layout that is chosen anew shares all halves alike where nothing else fits.
            match self.is_shared_unlike {
                true => format!("\nhint: devices share blocks as in the job's first run: {SHARED_ALIKE}"),
                false => String::new(),
            }
        )
    }

    /// Such as `blocks [0, 14) and [30, 31)`.
    fn spans(&self) -> String {
        let mut text = "blocks ".to_owned();
        for (place, part) in self.parts.iter().enumerate() {
            let joint = if place == 0 { "" } else { " and " };
            write!(text, "{joint}{part}").expect("a text takes what is written");
        }
        text
    }

    /// Such as `blocks [0, 14) and 1.1 GB for NCCL`.
    fn spans_and_nccl(&self) -> String {
        match self.nccl_bytes() {
            0 => self.spans(),
            bytes => format!("{} and {} for NCCL", self.spans(), text::bytes(bytes)),
        }
    }
}

#[cfg(test)]
mod tests {
    use stages::{KvDtype, WeightType};

    use super::*;

    const GB: u64 = 1_000_000_000;

    /// What is known of Super on two GPUs, which are named in this order. Of a large step: what is handed on takes room.
    fn question(indices: &[usize]) -> Question {
        let models = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models");
        let config = ModelConfig::read(&models.join("Llama-3_3-Nemotron-Super-49B-v1")).unwrap();
        let (sequences, context_tokens) = (1000, 4096);
        let micro_batches = scheduler::in_flight(indices.len() as u64) as usize;
        Question {
            config,
            dtypes: Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 },
            indices: indices.to_vec(),
            replicas: 1,
            free_bytes: BTreeMap::from([(0, 140 * GB), (1, 140 * GB)]),
            step: StepSize { rows: 2048, sequences, context_tokens, micro_batches, arrivals: 1 },
            are_processes: false,
            multiprocessors: None,
            wanted: WantedTokens { kv_cache_tokens: AutoCount::Auto, context_tokens, sequences },
        }
    }

    #[test]
    fn gpus_that_are_gone_through_twice_have_the_pages_that_they_have_where_they_are_named_twice() {
        let spans = [[0, 20], [20, 40], [40, 60], [60, 80]].map(|[start, end]| Span { start, end }.into());
        let named = layout::stages(spans.to_vec(), None);
        let twice: Vec<StageLayout> = (named.iter().zip([0..1, 1..2].iter().cycle()))
            .map(|(stage, devices)| StageLayout { devices: devices.clone(), ..stage.clone() })
            .collect();
        let pages = question(&[0, 1]).lanes(&twice).unwrap();
        assert_eq!(pages, question(&[0, 1, 0, 1]).lanes(&named).unwrap());
    }

    /// A GPU with so much free for a stage of 100 GB, whose pages take 1 MB each.
    fn gpu(index: usize, free_bytes: u64) -> GpuLoad {
        let memory =
            GpuMemory { weight_bytes: 90 * GB, work_bytes: 10 * GB, page_bytes: 1_000_000, num_caches: 0 };
        let parts = vec![Span { start: 0, end: 14 }.into()];
        GpuLoad { index, free_bytes, parts, is_shared_unlike: false, memory, nccl_peers: 0 }
    }

    fn wanted(kv_cache_tokens: AutoCount) -> WantedTokens {
        WantedTokens { kv_cache_tokens, context_tokens: 1000, sequences: 100 }
    }

    fn pages(gpus: &[GpuLoad], kv_cache_tokens: AutoCount) -> std::result::Result<usize, String> {
        lanes(gpus, wanted(kv_cache_tokens), 1).map(Lanes::num_pages).map_err(|error| error.to_string())
    }

    #[test]
    fn pages_take_what_the_fullest_gpu_has_left_and_no_more_than_are_of_use() {
        // So much is free that of all but the reserve these bytes are left.
        let left = |bytes| 100 * GB + RESERVED_BYTES + bytes;
        // Sixteen pages for a row of 1,000 tokens, and for 100 of them.
        assert_eq!(pages(&[gpu(0, left(50 * GB))], AutoCount::Auto), Ok(1600));
        assert_eq!(pages(&[gpu(0, left(50 * GB)), gpu(1, left(GB))], AutoCount::Auto), Ok(1000));
        assert_eq!(pages(&[gpu(0, left(GB))], AutoCount::Given(128 * 64 - 1)), Ok(128));
    }

    #[test]
    fn each_lane_has_room_for_the_longest_row() {
        let in_lanes = |pages: u64, tokens, num_lanes| {
            let gpus = [gpu(0, 100 * GB + RESERVED_BYTES + pages * 1_000_000)];
            lanes(&gpus, wanted(tokens), num_lanes).map(Lanes::num_pages).map_err(|error| error.to_string())
        };
        assert_eq!(in_lanes(50, AutoCount::Auto, 3), Ok(48));
        // Sequences of 16 pages each, of which one lane has no more than another.
        assert_eq!(in_lanes(5000, AutoCount::Auto, 3), Ok(16 * 102));
        assert_eq!(in_lanes(5000, AutoCount::Given(640), 3), Ok(12));
        let error = in_lanes(47, AutoCount::Auto, 3).unwrap_err();
        assert_eq!(
            error,
            "a context of 1000 tokens in each of 3 lanes takes 48.0 MB of KV cache on cuda:0, and 47.0 MB of its memory are \
             free beside blocks [0, 14)\nhint: set [model] max_context_tokens to at most 960, or [pipeline] kv_cache_tokens\n\
             hint: devices share out sequences, as in the job's first run: free memory, or pass --accept-numerics with \
             split_blocks = \"all\""
        );
        let error = in_lanes(11, AutoCount::Given(640), 3).unwrap_err();
        assert!(error.starts_with("[pipeline] kv_cache_tokens: 640 take 12.0 MB on cuda:0"), "{error}");
        assert!(error.ends_with("pass --accept-numerics with split_blocks = \"all\""), "{error}");
    }

    #[test]
    fn what_arrives_takes_room_where_it_comes_from_another_gpu_or_process() {
        let spans = [[0, 40], [40, 80]].map(|[start, end]| Span { start, end }.into());
        let stages = layout::stages(spans.to_vec(), None);
        // Of the second stage alone: into the first one nothing arrives.
        let taken = |indices: &[usize], are_processes| {
            let pages = |arrivals| {
                let known = question(indices);
                let step = StepSize { arrivals, ..known.step };
                // The second GPU has least room, and neither has it for all pages that are wanted.
                let free_bytes = BTreeMap::from([(0, 400 * GB), (1, 70 * GB)]);
                let known = Question { step, free_bytes, are_processes, ..known };
                known.lanes(&stages).unwrap().num_pages()
            };
            pages(0) - pages(100)
        };
        assert!(taken(&[0, 1], false) > 0);
        assert_eq!(taken(&[0, 0], false), 0, "what stays on a GPU is not copied");
        assert!(taken(&[0, 0], true) > 0);
    }

    #[test]
    fn nccl_joins_ranks_and_in_processes_neighbours() {
        let peers = |are_processes, stage, rank, num_ranks| {
            nccl_peers(are_processes, (stage, 3), RankPlace { rank, num_ranks })
        };
        assert_eq!([0, 1, 2].map(|stage| peers(false, stage, 0, 1)), [0; 3]);
        assert_eq!([0, 1, 2].map(|stage| peers(true, stage, 0, 1)), [1, 2, 1]);
        assert_eq!([peers(true, 1, 0, 4), peers(true, 1, 1, 4), peers(false, 1, 0, 4)], [5, 3, 3]);
    }

    #[test]
    fn what_nccl_takes_at_its_first_move_is_kept_back_and_told() {
        let joined = |free_bytes| GpuLoad { nccl_peers: 2, ..gpu(1, free_bytes) };
        let all = 100 * GB + RESERVED_BYTES + 2 * NCCL_PEER_BYTES;
        assert_eq!(pages(&[joined(all + GB)], AutoCount::Auto), Ok(1000));
        assert_eq!(
            pages(&[joined(all + 5_500_000)], AutoCount::Given(640)).unwrap_err(),
            "[pipeline] kv_cache_tokens: 640 take 10.0 MB on cuda:1, and 5.5 MB of its memory are free beside blocks [0, 14) \
             and 1.1 GB for NCCL"
        );
        let error = pages(&[joined(all - GB)], AutoCount::Auto).unwrap_err();
        assert!(error.contains("99.0 GB of its memory are free beside 1.1 GB for NCCL\nhint"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_numbers() {
        // Of 8 GiB a sixteenth is kept back.
        let error = pages(&[gpu(3, 8 << 30)], AutoCount::Auto).unwrap_err();
        assert_eq!(
            error,
            "blocks [0, 14) on cuda:3 take 90.0 GB of weights and 10.0 GB to work in, and 8.1 GB of its memory are free\n\
             hint: name more GPUs in [pipeline] devices, set a smaller micro_batch_tokens, or give this one fewer blocks by stages"
        );
        let kept = pages(&[GpuLoad { is_shared_unlike: true, ..gpu(3, 8 << 30) }], AutoCount::Auto);
        let cure =
            "as in the job's first run: free memory, or pass --accept-numerics with split_blocks = \"all\"";
        assert_eq!(kept.unwrap_err(), format!("{error}\nhint: devices share blocks {cure}"));
        let tight = gpu(1, 100 * GB + RESERVED_BYTES + 5_500_000);
        let error = pages(&[gpu(0, 140 * GB), tight.clone()], AutoCount::Given(640)).unwrap_err();
        assert_eq!(
            error,
            "[pipeline] kv_cache_tokens: 640 take 10.0 MB on cuda:1, and 5.5 MB of its memory are free beside blocks [0, 14)"
        );
        let error = pages(&[tight], AutoCount::Auto).unwrap_err();
        assert_eq!(
            error,
            "a context of 1000 tokens takes 16.0 MB of KV cache on cuda:1, and 5.5 MB of its memory are free beside \
             blocks [0, 14)\nhint: set [model] max_context_tokens to at most 320, or [pipeline] kv_cache_tokens"
        );
    }
}

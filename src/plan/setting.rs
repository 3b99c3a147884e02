//! What is planned: a model on devices for rows of given lengths, and the planner's problem made of it.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail};
use configs::{
    AutoCount, ColumnCuts, DeviceCatalog, DeviceKind, DeviceList, DeviceSpec, SplitBlocks,
    TENSOR_PARALLEL_WIDTHS, TensorParallel, VirtualStages,
};
use scheduler::{Case, Costs, KvTokens, RankCosts, StageDevice};
use stages::cost::{
    Balance, Channel, CostModel, Estimator, Load, Measured, NumberType, NumberTypes, PieceShape, Roofline,
    activation_bytes, hop_bytes, pieces,
};
use stages::{INT8_BLOCK, ModelConfig, SUM_CUT};

use crate::abilities::Abilities;
use crate::cli::LengthsArg;
use crate::plan::input::Work;

/// What the job's rows ask, on average.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mix {
    /// Of a sequence.
    pub(crate) prompt_tokens: f64,
    /// Of a sequence, above 0.
    pub(crate) output_tokens: f64,
    /// Positions that a decode token attends to: over all decode tokens, so that long outputs count for more.
    pub(crate) decode_context: f64,
    /// Positions that a prompt's token attends to, over all of these.
    pub(crate) prefill_context: f64,
    /// Keys and values that a row keeps, in tokens, weighted by the time that rows are in flight.
    pub(crate) kv_tokens_per_row: u64,
}

/// Everything that a plan depends on.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) config: ModelConfig,
    pub(crate) catalog: DeviceCatalog,
    pub(crate) devices: DeviceList,
    /// What the devices are made of where they are the job's own, for which only layouts that run are sought. Of others a plan
    /// says what could be.
    pub(crate) runs_on: Option<DeviceKind>,
    /// What weights, keys and values may have of each device, where more is known than the catalog says.
    pub(crate) rooms: Option<Vec<u64>>,
    /// Tokens of all replicas together that devices with one memory have room for, where more is known than the catalog says.
    pub(crate) shared_room: Option<u64>,
    /// Longest sequence.
    pub(crate) context_tokens: usize,
    /// Of each replica.
    pub(crate) kv_cache_tokens: AutoCount,
    pub(crate) types: NumberTypes,
    /// Whether the job names the type of keys and values, which then stays whatever the weights are.
    pub(crate) is_kv_type_given: bool,
    pub(crate) mix: Mix,
    /// How outputs are spread around the means that `mix` is made of.
    pub(crate) lengths: LengthsArg,
    pub(crate) tokens_in_flight: Option<u64>,
    /// Most sequences that a run of the job keeps in flight, of all replicas together.
    pub(crate) max_sequences: u64,
    /// Most tokens of a micro-batch. A longer prompt comes in chunks.
    pub(crate) max_tokens: f64,
    /// Sequences of the job: its rows, each as often as it has choices.
    pub(crate) rows: Option<u64>,
    /// The rows that `mix` and `rows` are made of.
    pub(crate) work: Arc<Work>,
    /// How often the job has its own stages; 1 where the devices are not so many groups that are alike.
    pub(crate) replicas: usize,
    pub(crate) tensor_parallel: TensorParallel,
    pub(crate) split_blocks: SplitBlocks,
    /// Whether ranks may share out sequences where that is faster.
    pub(crate) may_share_sequences: bool,
    pub(crate) column_cuts: ColumnCuts,
    pub(crate) virtual_stages: VirtualStages,
    pub(crate) balance: Balance,
    /// What takes the roofline's place.
    pub(crate) measured: Option<Measured>,
    /// How the plan would be by what was measured, where the devices are this machine's: the end of a sentence.
    pub(crate) to_measure: Option<String>,
}

/// Rows of a micro-batch beyond which nothing is gained: products reach their ceiling at some 200 tokens.
const MAX_ROWS: u64 = 1024;

/// Most tokens of a micro-batch, prompts included.
pub(crate) const MAX_TOKENS: f64 = 16_384.0;

impl Mix {
    /// A micro-batch in the middle of the job: `decode_rows` that decode are in the middle of their output, and as many
    /// prompt tokens come along as it takes to replace the rows that end.
    fn load(self, decode_rows: f64) -> Load {
        Load {
            decode_tokens: decode_rows,
            decode_context: self.decode_context,
            prefill_tokens: decode_rows * self.prompt_tokens / self.output_tokens,
            prefill_context: self.prefill_context,
            logit_rows: decode_rows,
        }
    }

    /// Tokens of a micro-batch for each row that decodes.
    fn tokens_per_row(self) -> f64 {
        1.0 + self.prompt_tokens / self.output_tokens
    }
}

/// Refuses devices that nothing is known of, and widths that stages on `num_devices` are too few for.
pub(crate) fn check(
    catalog: &DeviceCatalog,
    devices: &DeviceList,
    num_devices: usize,
    tensor_parallel: &TensorParallel,
) -> Result<()> {
    for (_, name) in devices.runs() {
        catalog.get(name)?;
    }
    let TensorParallel::Widths(widths) = tensor_parallel else { return Ok(()) };
    let wanted = widths.iter().sum::<usize>();
    if wanted > num_devices {
        bail!("[pipeline] tensor_parallel: {widths:?} are {wanted} devices, expected at most {num_devices}");
    }
    Ok(())
}

impl Setting {
    /// The largest micro-batch that is looked at: never more rows than the job has.
    pub(crate) fn max_rows(&self) -> u64 {
        let most = (self.max_tokens / self.mix.tokens_per_row()) as u64;
        most.clamp(1, MAX_ROWS).min(self.rows.unwrap_or(u64::MAX))
    }

    /// The micro-batches that are looked at: each some 6 % larger than the one before.
    pub(crate) fn micro_batches(&self) -> Vec<u64> {
        let next = |rows: &u64| match rows {
            0..8 => Some(rows + 1),
            _ => Some((rows + rows * 6 / 100).next_multiple_of(8).max(rows + 8)),
        };
        let most = self.max_rows();
        std::iter::successors(Some(1), next).take_while(|rows| *rows <= most).collect()
    }

    /// Rows that decode in a micro-batch for which `rows` are in flight, on average: fewer than one where even a
    /// single row's prompt comes in several chunks.
    pub(crate) fn decode_rows(&self, rows: u64) -> f64 {
        (rows as f64).min(self.max_tokens / self.mix.tokens_per_row())
    }

    /// A micro-batch in the middle of the job, for which `rows` are in flight.
    pub(crate) fn load(&self, rows: u64) -> Load {
        self.mix.load(self.decode_rows(rows))
    }

    /// The same with other devices.
    pub(crate) fn on(&self, devices: DeviceList) -> Self {
        Setting { devices, rooms: None, ..self.clone() }
    }

    /// How often the model may be there: as often as the devices are groups that are alike. A layout whose widths are given is
    /// there as often as the job says, and a cut that is to be compared with others once.
    pub(crate) fn replica_counts(&self) -> Vec<usize> {
        if self.balance != Balance::Roofline {
            return vec![1];
        }
        if self.given_widths().is_some() {
            return vec![self.replicas];
        }
        let most = self.rows.unwrap_or(u64::MAX);
        (1..=self.devices.num_devices())
            .filter(|count| *count as u64 <= most && self.devices.group(*count).is_some())
            .collect()
    }

    /// One of the replicas that the job has of its own stages.
    pub(crate) fn given_replica(&self) -> Self {
        self.replica(self.replicas)
    }

    /// What one of so many replicas has: the first group of devices, and its share of the rows and of the tokens in
    /// flight, rounded up.
    ///
    /// # Panics
    /// If the count is none of [`Setting::replica_counts`].
    pub(crate) fn replica(&self, count: usize) -> Self {
        let share = |all: Option<u64>| all.map(|all| all.div_ceil(count as u64));
        let devices = self.devices.group(count).expect("so many groups are alike");
        // All replicas have the same stages: what the fullest of them has room for.
        let least = |rooms: &Vec<u64>| -> Vec<u64> {
            let of_place =
                |place: usize| rooms.iter().skip(place).step_by(devices.num_devices()).copied().min();
            (0..devices.num_devices()).filter_map(of_place).collect()
        };
        Setting {
            rooms: self.rooms.as_ref().map(least),
            devices,
            rows: share(self.rows),
            tokens_in_flight: share(self.tokens_in_flight),
            shared_room: self.shared_room.map(|room| room / count as u64),
            ..self.clone()
        }
    }

    /// The kind of each device, an index into [`Setting::kinds`].
    pub(crate) fn kind_of_each(&self) -> Vec<usize> {
        let kinds = self.kind_names();
        let kind_of = |name: &str| kinds.iter().position(|kind| *kind == name).expect("every name is a kind");
        self.devices.names().map(kind_of).collect()
    }

    fn kind_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = vec![];
        for (_, name) in self.devices.runs() {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        names
    }

    /// The distinct devices.
    pub(crate) fn kinds(&self) -> Vec<&DeviceSpec> {
        self.kind_names()
            .into_iter()
            .map(|name| self.catalog.get(name).expect("names were checked"))
            .collect()
    }

    /// The kind of those devices of a stage that its others wait for: that which would take longest for the whole model.
    pub(crate) fn slowest_kind(&self, devices: Range<usize>, load: Load) -> usize {
        let (kinds, pieces, ranks) = (self.kinds(), pieces(&self.config, None), devices.len());
        let seconds = |kind: &usize| {
            let costs = self.rank_costs(kinds[*kind], Balance::Roofline, &pieces, ranks, load);
            costs.seconds(0..pieces.len())
        };
        let mut of_stage = self.kind_of_each()[devices].to_vec();
        of_stage.dedup();
        let slowest = of_stage.into_iter().max_by(|one, other| seconds(one).total_cmp(&seconds(other)));
        slowest.expect("a stage has a device")
    }

    /// What stages can do, where only those that run are sought.
    fn abilities(&self) -> Option<Abilities> {
        Abilities::of(self.types.weights.stored()?, self.runs_on?)
    }

    /// The multiple of columns at which FFNs may be cut where the job says so, if they may.
    pub(crate) fn sum_cut(&self) -> Option<usize> {
        match (self.abilities(), self.types.weights) {
            (Some(own), _) => own.sum_cut,
            (None, NumberType::Int8) => Some(INT8_BLOCK),
            (None, _) => Some(SUM_CUT),
        }
    }

    /// The multiple of columns at which a plan may cut FFNs, if it may.
    pub(crate) fn column_cut(&self) -> Option<usize> {
        match self.column_cuts {
            ColumnCuts::Off => None,
            ColumnCuts::Auto => self.sum_cut(),
        }
    }

    /// The model in pieces.
    pub(crate) fn pieces(&self) -> Vec<PieceShape> {
        pieces(&self.config, self.column_cut())
    }

    /// Widths that a stage may have.
    pub(crate) fn widths(&self) -> Vec<usize> {
        let most = match self.tensor_parallel {
            TensorParallel::Off => 1,
            _ if self.abilities().is_some_and(|own| !own.may_share) => 1,
            TensorParallel::Auto | TensorParallel::Widths(_) => self.devices.num_devices(),
        };
        let is_even = |width: &usize| self.config.dims.heads.is_multiple_of(*width);
        let given = self.given_widths().unwrap_or_default();
        // Ranks that have unlike numbers of heads wait for each other: nobody has that unasked.
        (TENSOR_PARALLEL_WIDTHS.into_iter())
            .filter(|width| *width <= most && (is_even(width) || given.contains(width)))
            .collect()
    }

    /// The widths of all stages, where the job gives them.
    pub(crate) fn given_widths(&self) -> Option<&[usize]> {
        match &self.tensor_parallel {
            TensorParallel::Widths(widths) => Some(widths),
            TensorParallel::Auto | TensorParallel::Off => None,
        }
    }

    /// Whether stages may have the widths that the job gives, where it gives any.
    pub(crate) fn has_given_widths(&self) -> bool {
        let widths = self.widths();
        self.given_widths().is_none_or(|given| given.iter().all(|width| widths.contains(width)))
    }

    pub(crate) fn kv(&self) -> KvTokens {
        let per_row = self.mix.kv_tokens_per_row;
        match self.tokens_in_flight {
            Some(tokens) => KvTokens::Wanted { tokens, per_row },
            None => KvTokens::PerRow { tokens: per_row, rows: self.rows.unwrap_or(u64::MAX) },
        }
    }

    pub(crate) fn estimator(&self, spec: &DeviceSpec, balance: Balance) -> Estimator<'_> {
        Estimator {
            config: &self.config,
            roofline: roofline(spec, self.types.weights),
            types: self.types,
            balance,
        }
    }

    /// What a device takes for pieces of the model: by what was measured, or by its roofline.
    pub(crate) fn cost_model(&self, spec: &DeviceSpec) -> Box<dyn CostModel + '_> {
        match &self.measured {
            Some(measured) => Box::new(measured.clone()),
            None => Box::new(self.estimator(spec, Balance::Roofline)),
        }
    }

    /// Costs for each kind of device under any load, for stages of `widths`.
    pub(crate) fn costs(
        &self,
        pieces: &[PieceShape],
        widths: &[usize],
        balance: Balance,
        load: Load,
    ) -> Vec<Costs> {
        let kinds = self.kinds();
        let of_kind = |spec: &&DeviceSpec| {
            let of_width = |width: &usize| (*width, self.rank_costs(spec, balance, pieces, *width, load));
            widths.iter().map(of_width).collect()
        };
        kinds.iter().map(of_kind).collect()
    }

    /// Costs on one kind of device, where time is balanced by what was measured if there is such.
    pub(crate) fn rank_costs(
        &self,
        spec: &DeviceSpec,
        balance: Balance,
        pieces: &[PieceShape],
        width: usize,
        load: Load,
    ) -> RankCosts {
        let of = |costs: &dyn CostModel| {
            let sharing = self.sharing(costs, pieces, width, load);
            costs.shared_costs(pieces, width, &sharing, load)
        };
        match (&self.measured, balance) {
            (Some(measured), Balance::Roofline) => of(measured),
            _ => of(&self.estimator(spec, balance)),
        }
    }

    /// The devices, with their times for a hop of a micro-batch and what its activations leave of their memory.
    pub(crate) fn stage_devices(&self, balance: Balance, load: Load) -> Vec<StageDevice> {
        let kinds = self.kinds();
        let each = self.kind_of_each();
        let bytes = hop_bytes(self.config.dims, load.tokens());
        let hop = |idx: usize, bytes_of_hop: f64| match (balance, &self.measured) {
            (Balance::Roofline, Some(measured)) => measured.hop_seconds(load) * bytes_of_hop / bytes,
            (Balance::Roofline, None) => hop_seconds(hop_links(&kinds, &each, idx), bytes_of_hop),
            (Balance::Flops | Balance::Weights, _) => 0.0,
        };
        (each.iter().enumerate())
            .map(|(idx, &kind)| StageDevice {
                kind,
                memory_bytes: match &self.rooms {
                    Some(rooms) => rooms[idx],
                    None => memory_bytes(kinds[kind]).saturating_sub(self.workspace_bytes(kinds[kind], load)),
                },
                hop_seconds: hop(idx, bytes),
                cut_hop_seconds: hop(idx, 2.0 * bytes),
            })
            .collect()
    }

    /// Both ends of the way from a device to the one after it.
    pub(crate) fn links_after(&self, device: usize) -> [Channel; 2] {
        hop_links(&self.kinds(), &self.kind_of_each(), device)
    }

    /// Memory that neither weights nor keys and values get.
    pub(crate) fn workspace_bytes(&self, spec: &DeviceSpec, load: Load) -> u64 {
        (spec.reserved_gb * 1e9) as u64 + activation_bytes(&self.config, load.tokens())
    }

    /// One micro-batch size as the planner takes it.
    pub(crate) fn case(&self, pieces: &[PieceShape], widths: &[usize], balance: Balance, rows: u64) -> Case {
        self.case_of(self.costs(pieces, widths, balance, self.load(rows)), balance, rows)
    }

    /// The same of what everything costs for it.
    pub(crate) fn case_of(&self, costs: Vec<Costs>, balance: Balance, rows: u64) -> Case {
        let devices = self.stage_devices(balance, self.load(rows));
        Case { rows, decode_rows: self.decode_rows(rows), devices, costs }
    }
}

/// All of a device's memory.
pub(crate) fn memory_bytes(spec: &DeviceSpec) -> u64 {
    (spec.memory_mib * f64::from(1 << 20)) as u64
}

/// Both ends of a hop; after the last device a pipeline that goes through them twice comes to the first.
fn hop_links(kinds: &[&DeviceSpec], kind_of_each: &[usize], device: usize) -> [Channel; 2] {
    let next = kind_of_each[(device + 1) % kind_of_each.len()];
    [kind_of_each[device], next].map(|kind| link(kinds[kind]))
}

/// Time for a hop: its slower end carries it.
pub(crate) fn hop_seconds(ends: [Channel; 2], bytes: f64) -> f64 {
    ends.map(|end| end.seconds(bytes)).into_iter().fold(0.0, f64::max)
}

fn link(spec: &DeviceSpec) -> Channel {
    Channel { latency_seconds: spec.link_latency_us * 1e-6, bytes_per_second: spec.link_gb_per_s * 1e9 }
}

/// What the device reaches with weights of a type: where it has no rate for it, that of the next wider type.
pub(crate) fn roofline(spec: &DeviceSpec, weights: NumberType) -> Roofline {
    let bf16 = spec.bf16_tflops * spec.bf16_efficiency;
    let fp8 = spec.fp8_tflops.map_or(bf16, |rate| rate * spec.fp8_efficiency);
    let fp4 = spec.fp4_tflops.map_or(fp8, |rate| rate * spec.fp4_efficiency);
    let tflops = match weights {
        NumberType::F32 => bf16 / 2.0, // As on the CPU; GPUs have TF32 at the same rate.
        NumberType::Bf16 => bf16,
        NumberType::Fp8 => fp8,
        NumberType::Fp4 => fp4,
        NumberType::Int8 => fp8, // Integers of 8 bits have fp8's rate on GPUs.
        NumberType::Int8Weight | NumberType::Int4Weight => bf16,
    };
    let bytes_per_second = spec.bandwidth_gb_per_s * spec.bandwidth_efficiency * 1e9;
    Roofline {
        flops_per_second: tflops * 1e12,
        bf16_flops_per_second: bf16 * 1e12,
        attention_flops_per_second: spec.attention_efficiency.map_or(bf16, |share| spec.bf16_tflops * share)
            * 1e12,
        attention_head_seconds: spec.attention_head_ns * 1e-9,
        bytes_per_second,
        activation_bytes_per_second: bytes_per_second,
        link: link(spec),
        all_reduce: Channel {
            latency_seconds: spec.all_reduce_latency_us * 1e-6,
            bytes_per_second: spec.all_reduce_gb_per_s * 1e9,
        },
    }
}

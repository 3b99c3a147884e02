//! A job's stages as they run: which part of the model, on which of the job's devices.

use std::ops::Range;

use anyhow::{Result, bail};
use configs::{DeviceKind, Pipeline, Place, Stages, StagesRunIn, TensorParallel, VirtualStages};
use scheduler::Span;
use stages::cost::PieceShape;
use stages::{Ffn, ModelConfig, Part, SUM_CUT, Sharing, WeightType};

use crate::abilities::Abilities;

/// A stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StageLayout {
    pub(crate) part: Part,
    /// Its ranks' devices, by their place among those of a replica in `[pipeline] devices`.
    pub(crate) devices: Range<usize>,
    /// How its ranks share its blocks.
    pub(crate) sharing: Sharing,
}

/// The parts that a job gives its stages, if it does.
///
/// # Errors
/// Places that the model does not have, or where sums may not be parted.
pub(crate) fn given(
    pipeline: &Pipeline,
    weights: WeightType,
    config: &ModelConfig,
) -> Result<Option<Vec<Part>>> {
    let sum_cut = Abilities::of(weights, kind(pipeline)).and_then(|own| own.sum_cut);
    given_where(pipeline, sum_cut, weights.name(), config)
}

/// The same where FFNs may be cut at multiples of `sum_cut` columns, with weights of such a name.
///
/// # Errors
/// Places that the model does not have, or where sums may not be parted.
pub(crate) fn given_where(
    pipeline: &Pipeline,
    sum_cut: Option<usize>,
    weights: &str,
    config: &ModelConfig,
) -> Result<Option<Vec<Part>>> {
    let Stages::Blocks(ranges) = &pipeline.stages else { return Ok(None) };
    let num_blocks = config.blocks.len();
    let end = ranges.last().map_or(Place::from(0), |range| range.end);
    if end != Place::from(num_blocks) {
        let slots = match config.num_slots - num_blocks {
            0 => String::new(),
            empty => format!(" ({} slots, and no block in {empty} of them)", config.num_slots),
        };
        bail!(
            "[pipeline] stages: the last one ends at block {end}, the model has {num_blocks} blocks{slots}"
        );
    }
    for range in ranges {
        check_place(range.end, sum_cut, weights, config)?;
    }
    Ok(Some(ranges.iter().map(part).collect()))
}

fn check_place(place: Place, sum_cut: Option<usize>, weights: &str, config: &ModelConfig) -> Result<()> {
    let Place { block, column } = place;
    if column == 0 {
        return Ok(());
    }
    let at = format!("[pipeline] stages: \"{place}\"");
    match config.blocks.get(block).map(|block| block.ffn) {
        Some(Ffn::SwiGlu { width }) if column < width => {}
        Some(Ffn::SwiGlu { width }) => bail!("{at}: the FFN of block {block} has {width} columns"),
        Some(Ffn::Linear | Ffn::None) => bail!("{at}: block {block} has no FFN of columns"),
        None => bail!("{at}: the model has {} blocks", config.blocks.len()),
    }
    let Some(multiple) = sum_cut else {
        bail!(
            "{at}: with weights in {weights} sums over columns cannot be parted, as scales belong to more of them\n\
             hint: cut between blocks, or set [model] dtype to \"bf16\", \"f32\" or on CPUs \"int8\" or \"int4-weight\", whose cuts change no bit"
        );
    };
    if !column.is_multiple_of(multiple) {
        let scales = if multiple > SUM_CUT { ", as that many share a scale in int8" } else { "" };
        bail!("{at}: found column {column}, expected a multiple of {multiple}{scales}");
    }
    Ok(())
}

/// What a job's devices are made of: all of them are of one kind.
pub(crate) fn kind(pipeline: &Pipeline) -> DeviceKind {
    pipeline.devices.first().map_or(DeviceKind::Cpu, |device| device.kind)
}

/// Whether a job's pipelines may go through their devices twice. Processes do not share a device's threads.
pub(crate) fn virtual_stages(pipeline: &Pipeline) -> VirtualStages {
    match pipeline.stages_run_in {
        StagesRunIn::Threads => pipeline.virtual_stages,
        StagesRunIn::Processes => VirtualStages::Off,
    }
}

/// Refuses stages that several devices share whose weights cannot be parted between them.
///
/// # Errors
/// Narrow weights on GPUs: a scale belongs to inputs that several of them would have.
pub(crate) fn check_shared(pipeline: &Pipeline, weights: WeightType) -> Result<()> {
    let cannot = Abilities::of(weights, kind(pipeline)).is_some_and(|own| !own.may_share);
    match widths(pipeline) {
        Some(widths) if cannot => bail!(
            "[pipeline] tensor_parallel: found {widths:?} with weights in {} on {}, expected \"off\" or weights in bf16: a \
             scale belongs to weights of several GPUs",
            weights.name(),
            pipeline.devices[0]
        ),
        _ => Ok(()),
    }
}

fn part(range: &Range<Place>) -> Part {
    let Place { block, column } = range.end;
    let (end, end_column) = if column == 0 { (block, None) } else { (block + 1, Some(column)) };
    Part { blocks: Span { start: range.start.block, end }, first_column: range.start.column, end_column }
}

/// How many devices each stage has, where a job gives some stage more than one.
pub(crate) fn widths(pipeline: &Pipeline) -> Option<&[usize]> {
    match &pipeline.tensor_parallel {
        TensorParallel::Widths(widths) if widths.iter().any(|width| *width > 1) => Some(widths),
        TensorParallel::Auto | TensorParallel::Off | TensorParallel::Widths(_) => None,
    }
}

/// Stages of these parts, which take their devices in order: one each, or as many as the job says.
pub(crate) fn stages(parts: Vec<Part>, widths: Option<&[usize]>) -> Vec<StageLayout> {
    let mut next = 0;
    (parts.into_iter().enumerate())
        .map(|(index, part)| {
            let first = next;
            next += widths.map_or(1, |widths| widths[index]);
            StageLayout { part, devices: first..next, sharing: Sharing::default() }
        })
        .collect()
}

/// Whether each stage has a device of its own, in the order in which the job names them.
pub(crate) fn is_one_each(stages: &[StageLayout]) -> bool {
    stages.iter().enumerate().all(|(index, stage)| stage.devices == (index..index + 1))
}

/// Lanes of KV pages: a multiple of the ranks of each stage whose ranks share out sequences.
pub(crate) fn num_lanes(stages: &[StageLayout]) -> usize {
    let shares_out = |stage: &&StageLayout| stage.sharing.has_sequences();
    stages.iter().filter(shares_out).map(|stage| stage.devices.len()).fold(1, least_common_multiple)
}

fn least_common_multiple(one: usize, other: usize) -> usize {
    let (mut divisor, mut rest) = (one, other);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    one / divisor * other
}

/// The devices of a replica's stage, as the job calls them.
pub(crate) fn device_names(pipeline: &Pipeline, replica: usize, stage: &StageLayout) -> String {
    let devices = &pipeline.devices[replica * pipeline.devices_per_replica()..];
    let names = devices[stage.devices.clone()].iter().map(ToString::to_string);
    names.collect::<Vec<_>>().join("+")
}

/// Such as `replica 1 `, where there are several.
pub(crate) fn of_replica(pipeline: &Pipeline, replica: usize) -> String {
    if pipeline.replicas > 1 { format!("replica {replica} ") } else { String::new() }
}

/// The part that is a run of planned pieces.
pub(crate) fn part_of(pieces: &[PieceShape], run: &Range<usize>) -> Part {
    let (first, last) = (&pieces[run.start], &pieces[run.end - 1]);
    let blocks = Span { start: first.block, end: last.block + 1 };
    let first_column = first.columns.as_ref().map_or(0, |columns| columns.start);
    let end_column = if last.ends_block { None } else { last.columns.as_ref().map(|columns| columns.end) };
    Part { blocks, first_column, end_column }
}

/// A model in pieces that are whole blocks, but for those that the stages' parts cut; and the pieces of each part.
pub(crate) fn pieces_of(config: &ModelConfig, parts: &[Part]) -> (Vec<PieceShape>, Vec<Span>) {
    let (mut pieces, mut spans) = (Vec::new(), Vec::new());
    for part in parts {
        let start = pieces.len();
        for block in part.blocks.range() {
            let first = if block == part.blocks.start { part.first_column } else { 0 };
            let end = if block + 1 == part.blocks.end { part.end_column } else { None };
            let columns = match config.blocks[block].ffn {
                Ffn::SwiGlu { width } => Some(first..end.unwrap_or(width)),
                Ffn::Linear | Ffn::None => None,
            };
            pieces.push(PieceShape { block, columns, ends_block: end.is_none() });
        }
        spans.push(Span { start, end: pieces.len() });
    }
    (pieces, spans)
}

/// Parts as a job file has them.
pub(crate) fn ranges(parts: &[Part]) -> String {
    let place = |block: usize, column: usize| match column {
        0 => block.to_string(),
        column => format!("\"{block}:{column}\""),
    };
    let range = |part: &Part| {
        let Span { start, end } = part.blocks;
        let end = part.end_column.map_or(place(end, 0), |column| place(end - 1, column));
        format!("[{}, {end}]", place(start, part.first_column))
    };
    format!("[{}]", parts.iter().map(range).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> [Part; 3] {
        let part = |start, end, first_column, end_column| Part {
            blocks: Span { start, end },
            first_column,
            end_column,
        };
        [part(0, 3, 0, Some(128)), part(2, 3, 128, Some(512)), part(2, 5, 512, None)]
    }

    #[test]
    fn parts_are_written_as_a_job_file_reads_them() {
        let text = ranges(&parts());
        assert_eq!(text, r#"[[0, "2:128"], ["2:128", "2:512"], ["2:512", 5]]"#);
        assert_eq!(ranges(&[Span { start: 0, end: 4 }.into()]), "[[0, 4]]");
        let places = [
            Place::from(0)..Place { block: 2, column: 128 },
            Place { block: 2, column: 128 }..Place { block: 2, column: 512 },
            Place { block: 2, column: 512 }..Place::from(5),
        ];
        assert_eq!(places.iter().map(part).collect::<Vec<_>>(), parts());
    }

    #[test]
    fn pages_are_in_lanes_for_all_ranks_that_share_out_sequences() {
        use stages::{AttentionSharing, BlockSharing};
        let by_sequences = BlockSharing { attention: AttentionSharing::Sequences, ..Default::default() };
        let mut stages = stages(parts().to_vec(), Some(&[4, 6, 5]));
        assert_eq!(num_lanes(&stages), 1);
        for (stage, lanes) in [(0, 4), (1, 12)] {
            stages[stage].sharing = Sharing::uniform([stages[stage].part.blocks.start], by_sequences);
            assert_eq!(num_lanes(&stages), lanes);
        }
    }

    #[test]
    fn stages_take_as_many_devices_as_they_have_ranks() {
        let devices = |widths: Option<&[usize]>| -> Vec<Range<usize>> {
            stages(parts().to_vec(), widths).into_iter().map(|stage| stage.devices).collect()
        };
        assert_eq!(devices(None), [0..1, 1..2, 2..3]);
        assert_eq!(devices(Some(&[2, 1, 4])), [0..2, 2..3, 3..7]);
    }
}

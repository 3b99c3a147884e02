//! What a job keeps of the layout of its first run.
//!
//! What several devices sum up together differs in its last bits from what one does, and which devices share what may be
//! the plan's choice, by costs that are measured anew at any time. So a job's journal has its stages, and a run that goes on
//! takes those again wherever a stage is shared. Where none is, stages may begin wherever they like, and a device may have two.

use anyhow::{Result, bail};
use configs::{DeviceKind, Pipeline, Stages, TensorParallel};
use jobs::{Settings, StageShape};
use scheduler::Span;
use stages::{Exceptions, ModelConfig, Part, Sharing};

use crate::layout::{self, StageLayout};
use crate::lower::GPU_BACKEND;

/// What is decided before anything is planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kept {
    /// Nothing: the job is new, or its file says it all.
    Nothing,
    /// Each stage has one device.
    OneEach,
    /// These stages.
    Stages(Vec<StageLayout>),
}

/// The stages of a job's first run, where there was one and it had such devices: GPUs need not be able to share what CPUs do.
pub(crate) fn stages_on(pipeline: &Pipeline, first: Option<Settings>) -> Option<Vec<StageShape>> {
    let are_gpus = layout::kind(pipeline) == DeviceKind::Cuda;
    let first = first.filter(|first| (first.backend() == Some(GPU_BACKEND)) == are_gpus);
    first.map(|first| first.layout)
}

/// What a run keeps of the `first` one's stages, where there was one. What the job's file says comes first: whether it says
/// the same as it did then is checked with all that decides answers.
///
/// # Errors
/// The devices are no longer those that the stages took; unless the caller `accepts` answers with other last bits.
pub(crate) fn kept(
    pipeline: &Pipeline,
    config: &ModelConfig,
    first: Option<&[StageShape]>,
    accepts: bool,
) -> Result<Kept> {
    let Some(first) = first.filter(|_| pipeline.stages == Stages::Auto) else { return Ok(Kept::Nothing) };
    let widths: Vec<usize> = first.iter().map(|stage| stage.ranks).collect();
    let is_shared = widths.iter().any(|width| *width > 1);
    match &pipeline.tensor_parallel {
        TensorParallel::Auto if !is_shared => return Ok(Kept::OneEach),
        TensorParallel::Auto => {}
        TensorParallel::Widths(given) if is_shared && *given == widths => {}
        TensorParallel::Off | TensorParallel::Widths(_) => return Ok(Kept::Nothing),
    }
    let parts: Vec<Part> = first.iter().map(part).collect();
    if !Part::cover(&parts, config) {
        return Ok(Kept::Nothing); // It is another model, which is refused as such.
    }
    let taken = widths.iter().sum::<usize>();
    match what_differs(pipeline, taken) {
        None => {
            let mut stages = layout::stages(parts, Some(&widths));
            share_blocks(&mut stages, first, |_| Sharing::default());
            Ok(Kept::Stages(stages))
        }
        Some(_) if accepts => Ok(Kept::Nothing),
        Some(found) => bail!(
            "[pipeline] devices: found {found}, and the job's first run took {taken} for stages = {} with tensor_parallel = {widths:?}, \
             which decide its answers' last bits\nhint: name {taken} devices once each; or pass --accept-numerics to have the other \
             rows computed in a layout that fits, or --fresh to start over",
            layout::ranges(&parts)
        ),
    }
}

/// Why so many devices are not there, if they are not.
fn what_differs(pipeline: &Pipeline, taken: usize) -> Option<String> {
    let devices = &pipeline.devices;
    let twice = (0..devices.len()).find(|index| devices[..*index].contains(&devices[*index]));
    match twice {
        Some(index) => Some(format!("{} twice", devices[index])),
        None => (pipeline.devices_per_replica() != taken).then(|| pipeline.devices_per_replica().to_string()),
    }
}

/// Decides how ranks share blocks: as in the `first` run, in stages that were there just so; in others as `planned`.
pub(crate) fn share_blocks(
    stages: &mut [StageLayout],
    first: &[StageShape],
    planned: impl Fn(&StageLayout) -> Sharing,
) {
    for stage in stages.iter_mut().filter(|stage| stage.devices.len() > 1) {
        let is_same = |shape: &&StageShape| part(shape) == stage.part && shape.ranks == stage.devices.len();
        stage.sharing = match first.iter().find(is_same) {
            Some(shape) => sharing(shape),
            None => planned(stage),
        };
    }
}

/// The stages of a run, for the journal.
pub(crate) fn shapes(stages: &[StageLayout]) -> Vec<StageShape> {
    let shape = |stage: &StageLayout| {
        let Part { blocks, first_column, end_column } = stage.part;
        let Exceptions { attention_by_sequences, attention_on_first_rank, ffn_on_first_rank } =
            stage.sharing.exceptions();
        StageShape {
            blocks: [blocks.start, blocks.end],
            first_column,
            end_column,
            ranks: stage.devices.len(),
            attention_by_sequences,
            attention_on_first_rank,
            ffn_on_first_rank,
        }
    };
    stages.iter().map(shape).collect()
}

fn sharing(shape: &StageShape) -> Sharing {
    Sharing::from(Exceptions {
        attention_by_sequences: shape.attention_by_sequences.clone(),
        attention_on_first_rank: shape.attention_on_first_rank.clone(),
        ffn_on_first_rank: shape.ffn_on_first_rank.clone(),
    })
}

fn part(shape: &StageShape) -> Part {
    let StageShape { blocks: [start, end], first_column, end_column, .. } = *shape;
    Part { blocks: Span { start, end }, first_column, end_column }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config() -> ModelConfig {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/models");
        ModelConfig::read(&models.join("Llama-3_1-Nemotron-Ultra-253B-v1")).unwrap()
    }

    fn pipeline(devices: &[usize], tensor_parallel: TensorParallel) -> Pipeline {
        let devices = devices.iter().map(|index| configs::Device::cpu(*index)).collect();
        Pipeline { devices, tensor_parallel, ..Pipeline::default() }
    }

    fn stage(blocks: [usize; 2], ranks: usize) -> StageShape {
        StageShape {
            blocks,
            first_column: 0,
            end_column: None,
            ranks,
            attention_by_sequences: vec![],
            attention_on_first_rank: vec![],
            ffn_on_first_rank: vec![],
        }
    }

    fn ask(pipeline: &Pipeline, first: Option<&[StageShape]>, accepts: bool) -> Result<Kept> {
        kept(pipeline, &config(), first, accepts)
    }

    #[test]
    fn stages_that_were_shared_come_back_as_they_were() {
        let shared = StageShape {
            attention_by_sequences: vec![4, 9],
            attention_on_first_rank: vec![5],
            ffn_on_first_rank: vec![4, 7],
            ..stage([0, 30], 2)
        };
        let first = [shared, stage([30, 81], 1)];
        for tensor_parallel in [TensorParallel::Auto, TensorParallel::Widths(vec![2, 1])] {
            let found = ask(&pipeline(&[0, 1, 2], tensor_parallel), Some(&first), false).unwrap();
            let Kept::Stages(stages) = found else { panic!("{found:?}") };
            assert_eq!(shapes(&stages), first);
            assert_eq!(stages[1].devices, 2..3);
        }
    }

    #[test]
    fn where_no_stage_was_shared_none_will_be_on_any_devices() {
        let first = [stage([0, 30], 1), stage([30, 81], 1)];
        for devices in [&[0, 1][..], &[0, 1, 2], &[0, 1, 0]] {
            assert_eq!(
                ask(&pipeline(devices, TensorParallel::Auto), Some(&first), false).unwrap(),
                Kept::OneEach
            );
        }
    }

    #[test]
    fn a_new_job_and_one_that_says_otherwise_keep_nothing() {
        let first = [stage([0, 81], 2)];
        assert_eq!(ask(&pipeline(&[0, 1], TensorParallel::Auto), None, false).unwrap(), Kept::Nothing);
        for tensor_parallel in [TensorParallel::Off, TensorParallel::Widths(vec![1, 1])] {
            let found = ask(&pipeline(&[0, 1], tensor_parallel), Some(&first), false).unwrap();
            assert_eq!(found, Kept::Nothing);
        }
        let of_other_model = [stage([0, 7], 2)];
        let found = ask(&pipeline(&[0, 1], TensorParallel::Auto), Some(&of_other_model), false).unwrap();
        assert_eq!(found, Kept::Nothing);
    }

    #[test]
    fn devices_that_no_longer_fit_are_refused_with_the_cure() {
        let first = [stage([0, 81], 2)];
        for (devices, found) in
            [(&[0][..], "found 1,"), (&[0, 1, 2], "found 3,"), (&[0, 0], "found cpu:0 twice,")]
        {
            let pipeline = pipeline(devices, TensorParallel::Auto);
            let error = ask(&pipeline, Some(&first), false).unwrap_err().to_string();
            for words in [found, "took 2", "[[0, 81]]", "tensor_parallel = [2]", "name 2 devices", "--fresh"]
            {
                assert!(error.contains(words), "{words} is not in {error}");
            }
            assert_eq!(ask(&pipeline, Some(&first), true).unwrap(), Kept::Nothing);
        }
    }
}

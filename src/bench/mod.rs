//! `spanwise bench`: how many tokens a second a model prefills and decodes on a device of this machine, by batch size.

mod report;
mod table;

use anyhow::Result;
use configs::AutoCount;
use scheduler::Span;
use stages::profile::{DeviceKey, Throughput, ThroughputOptions, throughput};
use stages::{Device, Model, PAGE_TOKENS, Sharing};

use crate::cli::{BenchArgs, Format};
use crate::layout::StageLayout;
use crate::target::{self, Target};
use crate::{gpus, lower, machine, print, say};

use report::Report;

/// Tokens of a prompt, where nobody says: most prompts with half of their answers are about as long.
const CONTEXT_TOKENS: usize = 256;

/// Measures and prints, batch by batch.
///
/// # Errors
/// A model or job file that cannot be read, a device that is not there, a model that the memory has no room for.
pub(crate) fn bench(args: &BenchArgs) -> Result<()> {
    let target = Target::read(&args.target)?;
    let model = target.open_model()?;
    let Target { mut files, mut pipeline } = target;
    let longest = lower::context_tokens(&files, &model.config)?;
    files.max_context_tokens = Some(args.context_tokens.unwrap_or(CONTEXT_TOKENS.min(longest)));
    pipeline.max_sequences = AutoCount::Given(args.batches.iter().copied().max().unwrap_or(1));
    let context_tokens = lower::context_tokens(&files, &model.config)?;
    lower::check(&pipeline)?;
    let machine = machine::detect();
    let index = pipeline.devices.first().map_or(0, |device| device.index);
    let mut options = ThroughputOptions {
        device: lower::device_groups(&pipeline, &machine)?.swap_remove(index),
        dtypes: lower::dtypes(&files, &pipeline, &model.config),
        context_tokens,
        micro_batch_tokens: pipeline.most_micro_batch_tokens(),
        batches: args.batches.clone(),
        most_pages: None,
        effort: target::effort(args.point_seconds),
    };
    if let Device::Cuda { index, .. } = options.device {
        let (free_bytes, multiprocessors) =
            (gpus::free_bytes(&pipeline)?[&index], gpus::multiprocessors(&pipeline)?);
        options.most_pages = Some(options.pages_in(&model, free_bytes, multiprocessors));
    }
    // The model with these pages must fit, as in a run.
    pipeline.kv_cache_tokens = AutoCount::Given(options.num_pages(&model) * PAGE_TOKENS);
    let whole = Span { start: 0, end: model.config.blocks.len() };
    lower::pipeline(&files, &pipeline, &model.config, &machine)?.with(&[StageLayout {
        part: whole.into(),
        devices: 0..1,
        sharing: Sharing::default(),
    }])?;

    let mut report = Report::new(&model.config, &options, DeviceKey::of(&options.device, 1));
    say(&format!("measuring {} on {}", files.path.display(), report.device));
    let show = |line: &str| match args.format {
        Format::Text => print(line),
        Format::Json => say(line),
    };
    let mut hear = |batch: &_| {
        if report.batches.is_empty() {
            table::head(&report).iter().for_each(|line| show(line));
        }
        show(&table::line(batch));
        report.batches.push(*batch);
    };
    throughput(&model, &options, &mut |line| say(line), &mut hear)?;
    if let Device::Cuda { is_deterministic: true, .. } = &options.device {
        table::cost_head().iter().for_each(|line| show(line));
        report.not_deterministic = Some(not_deterministic(&model, &options, &report.batches, &show)?);
    }
    match args.format {
        Format::Text => print(&table::ceilings(&report)),
        Format::Json => print(&serde_json::to_string_pretty(&report)?),
    }
    Ok(())
}

/// Measures a GPU once more, where a row's bits may depend on its batch, and shows what it costs that they do not.
fn not_deterministic(
    model: &Model,
    options: &ThroughputOptions,
    fixed: &[Throughput],
    show: &(dyn Fn(&str) + Sync),
) -> Result<Vec<Throughput>> {
    let mut options = options.clone();
    if let Device::Cuda { is_deterministic, .. } = &mut options.device {
        *is_deterministic = false;
    }
    let mut free = Vec::new();
    let mut hear = |batch: &Throughput| {
        show(&table::cost(&fixed[free.len()], batch));
        free.push(*batch);
    };
    throughput(model, &options, &mut |line| say(line), &mut hear)?;
    Ok(free)
}

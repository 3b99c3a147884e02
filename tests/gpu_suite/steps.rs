//! What does a step take of the processor, and do two stages on one GPU take as long as one?
//!
//! The same micro-batches go through all blocks as one stage, and as two on threads of their own that hand over on the device and are
//! given the next one while it computes one, as a pipeline of one process does. Times are of a steady state: one micro-batch more
//! than stages is under way. Two stages are held against one that is queued as they are: one whose device idles between steps would
//! be slower, and flatter them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use scheduler::{MicroBatch, Span};
use stages::{
    Activations, Arrival, Device, Dtypes, KvDtype, Model, PAGE_TOKENS, Queued, SpanOptions, Stage, StepSize,
    WeightType,
};

use crate::bars;
use crate::decoding::Decoding;
use crate::items::Setting;
use crate::models::{self, Measured};

/// Micro-batches under way, one more than stages.
const IN_FLIGHT: usize = 3;

/// What a step's thread may have of a processor, and two stages of the time of one.
const MOST_OF_PROCESSOR: f64 = 0.05;
const MOST_OF_ONE: f64 = 1.03;

/// Micro-batches that a stage has begun with.
const QUEUED: usize = 2;

/// What a stage hears.
enum Event {
    /// What is to go through it.
    Way(Arc<MicroBatch>, Option<Activations>),
    /// Its device is done with the oldest micro-batch.
    Arrival,
    /// There is no more.
    End,
}

/// Rows that decode, and what for.
struct Work {
    rows: usize,
    context: usize,
    /// Micro-batches that are timed, after some that are not.
    timed: usize,
}

/// A line for one stage with its time on the processor, one without captured steps, and one for two stages.
pub(crate) fn measure(measured: &Measured, setting: &Setting) -> Result<Vec<String>> {
    let model = models::open(measured, setting)?;
    let work = match setting.is_small {
        true => Work { rows: 2, context: 20, timed: 3 },
        false => Work { rows: 256, context: 2048, timed: 40 },
    };
    let device = models::device(setting);
    let (one, processor) = one_stage(&model, &device, &work)?;
    let (plain, of_plain) = one_stage(&model, &without_graphs(&device), &work)?;
    let (ahead, of_ahead) = ahead(&model, &device, &work)?;
    let two = two_stages(&model, &device, &work)?;
    let share = two / one.min(ahead);
    let time = |seconds: f64, processor: f64| {
        let (ms, share) = (processor * 1e3, 100.0 * processor / seconds);
        format!("{:.2} ms a step, of which its thread computes {ms:.2} ms ({share:.1} %)", seconds * 1e3)
    };
    Ok(vec![
        format!(
            "one stage, {} rows at {} tokens: {}; {}",
            work.rows,
            work.context,
            time(one, processor),
            bars::verdict(processor / one < MOST_OF_PROCESSOR)
        ),
        format!("the same without graphs: {}", time(plain, of_plain)),
        format!("the same, each queued before the last one's answer: {}", time(ahead, of_ahead)),
        format!(
            "two stages: {:.2} ms a micro-batch, {share:.3} of one stage's, queued alike; {}",
            two * 1e3,
            bars::verdict(share <= MOST_OF_ONE)
        ),
    ])
}

fn without_graphs(device: &Device) -> Device {
    let mut device = device.clone();
    if let Device::Cuda { has_graphs, .. } = &mut device {
        *has_graphs = false;
    }
    device
}

fn load(model: &Model, device: &Device, blocks: Span, work: &Work) -> Result<Box<dyn Stage>> {
    let num_pages = work.rows * work.context.div_ceil(PAGE_TOKENS);
    let step = StepSize {
        rows: work.rows,
        sequences: work.rows,
        context_tokens: work.context,
        micro_batches: IN_FLIGHT,
        arrivals: 0,
    };
    let options = SpanOptions {
        part: blocks.into(),
        num_pages,
        context_tokens: work.context,
        largest_step: Some(step),
    };
    let dtypes = Dtypes { weights: WeightType::Bf16, kv: KvDtype::Bf16 };
    let mut stage = stages::load(model, device, dtypes, options)?;
    stage.fill_pages(num_pages)?;
    Ok(stage)
}

/// Seconds of a step, and what its thread had of a processor.
fn one_stage(model: &Model, device: &Device, work: &Work) -> Result<(f64, f64)> {
    let end = model.config.blocks.len();
    let mut stage = load(model, device, Span { start: 0, end }, work)?;
    let batch = micro_batch(model, work);
    for _ in 0..=work.timed / 4 {
        stage.step(&batch, None)?;
        stage.finish()?;
    }
    let (begun, before) = (Instant::now(), processor_seconds()?);
    for _ in 0..work.timed {
        stage.step(&batch, None)?;
        stage.finish()?;
    }
    let count = work.timed as f64;
    Ok((begun.elapsed().as_secs_f64() / count, (processor_seconds()? - before) / count))
}

/// The same where a step is queued before the answer to the one before is there.
fn ahead(model: &Model, device: &Device, work: &Work) -> Result<(f64, f64)> {
    let end = model.config.blocks.len();
    let mut stage = load(model, device, Span { start: 0, end }, work)?;
    let batch = Arc::new(micro_batch(model, work));
    stage.queue(&batch, None)?.context("a step has no room")?;
    let mut step = || -> Result<()> {
        stage.queue(&batch, None)?.context("a step has no room")?;
        stage.collect()?;
        Ok(())
    };
    (0..=work.timed / 4).try_for_each(|_| step())?;
    let (begun, before) = (Instant::now(), processor_seconds()?);
    (0..work.timed).try_for_each(|_| step())?;
    let count = work.timed as f64;
    Ok((begun.elapsed().as_secs_f64() / count, (processor_seconds()? - before) / count))
}

/// Seconds of a micro-batch where the second half of the blocks is another stage of the same GPU.
fn two_stages(model: &Model, device: &Device, work: &Work) -> Result<f64> {
    let end = model.config.blocks.len();
    let middle = end / 2;
    std::thread::scope(|scope| {
        let ways = [(); 2].map(|()| channel());
        let (to_end, done) = channel();
        let [to_first, to_second] = ways.each_ref().map(|(to, _)| to.clone());
        let next = [to_second, to_end];
        let parts = [Span { start: 0, end: middle }, Span { start: middle, end }];
        let start = |((blocks, way), next)| {
            scope.spawn(move || {
                let served = load(model, device, blocks, work).and_then(|stage| serve(stage, way, &next));
                let _ = next.send(Event::End); // Where it has ended by itself, it says why.
                served
            })
        };
        let threads: Vec<_> = parts.into_iter().zip(ways).zip(next).map(start).collect();
        let seconds = drive(micro_batch(model, work), work, &to_first, &done);
        let _ = to_first.send(Event::End); // As that.
        for thread in threads {
            thread.join().expect("a stage does not panic")?;
        }
        seconds
    })
}

/// A stage, until there is no more for it.
fn serve(
    mut stage: Box<dyn Stage>,
    (own, takes): (Sender<Event>, Receiver<Event>),
    next: &Sender<Event>,
) -> Result<()> {
    let (waits, arrivals) = channel::<Arrival>();
    std::thread::spawn(move || {
        for arrival in arrivals {
            let _ = arrival.wait(); // What the device refuses is said to whoever collects.
            if own.send(Event::Arrival).is_err() {
                return;
            }
        }
    });
    let send = |way| next.send(way).context("the next stage has ended");
    let (mut waiting, mut queued) = (VecDeque::new(), VecDeque::new());
    for event in takes {
        match event {
            Event::Way(batch, input) => waiting.push_back((batch, input)),
            Event::Arrival => {
                let batch = queued.pop_front().context("a device has computed what nobody gave it")?;
                if stage.collect()?.output.is_some() {
                    send(Event::Way(batch, None))?;
                }
            }
            Event::End => break,
        }
        while queued.len() < QUEUED
            && let Some((batch, input)) = waiting.pop_front()
        {
            let begun = stage.queue(&batch, input.as_ref())?.context("a step has no room")?;
            let Queued { activations, arrival } = begun;
            waits.send(arrival).context("a thread that waits has ended")?;
            if activations.is_some() {
                send(Event::Way(Arc::clone(&batch), activations))?;
            }
            queued.push_back(batch);
        }
    }
    Ok(())
}

/// Keeps micro-batches under way.
fn drive(batch: MicroBatch, work: &Work, first: &Sender<Event>, done: &Receiver<Event>) -> Result<f64> {
    let batch = Arc::new(batch);
    let issue = || first.send(Event::Way(Arc::clone(&batch), None)).context("the first stage has ended");
    let take = || match done.recv() {
        Ok(Event::Way(..)) => Ok(()),
        _ => bail!("a stage has ended"),
    };
    (0..IN_FLIGHT).try_for_each(|_| issue())?;
    // Stages are loaded meanwhile, and arrays find their size.
    for _ in 0..=work.timed / 4 {
        take()?;
        issue()?;
    }
    take()?;
    let begun = Instant::now();
    for _ in 0..work.timed {
        issue()?;
        take()?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    (1..IN_FLIGHT).try_for_each(|_| take())?;
    Ok(seconds / work.timed as f64)
}

fn micro_batch(model: &Model, work: &Work) -> MicroBatch {
    let Work { rows, context, .. } = *work;
    let decoding = Decoding { rows, context, pages_of_row: context.div_ceil(PAGE_TOKENS) };
    decoding.micro_batch(0, |row| (row * 7919 % model.config.dims.vocab) as u32)
}

/// What this thread has had of a processor.
fn processor_seconds() -> Result<f64> {
    let path = "/proc/thread-self/schedstat";
    let text = std::fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    match text.split_whitespace().next().map(str::parse::<u64>) {
        Some(Ok(nanoseconds)) => Ok(nanoseconds as f64 / 1e9),
        _ => bail!("{path}: found {text:?}, expected nanoseconds"),
    }
}

//! A simulated job as a picture: what each stage does over time, and beneath it, on the same axis, KV pages, running
//! sequences and generated tokens.
//!
//! It draws the bins of the report and nothing finer. A dashed line goes through all of it where the last row was
//! admitted, and the stage that the plan calls its slowest is framed.

mod levels;
mod rows;
mod steps;

use crate::picture::canvas::{self, Canvas, FIGURE, NOTE, SMALL, TITLE};
use crate::picture::timeline::steps::Bins;
use crate::simulate::report::Report;
use crate::text::{duration, grouped};

const WIDTH: f64 = 1280.0;
const LEFT: f64 = 32.0;
const RIGHT: f64 = WIDTH - 32.0;
/// Where time begins, and the width of all of it.
const PLOT: f64 = 208.0;
const PLOT_WIDTH: f64 = 880.0;
/// Where figures begin beside it.
const FIGURES: f64 = PLOT + PLOT_WIDTH + 12.0;
/// Where the first stage is.
const TOP: f64 = 168.0;
/// Of the plan's slowest stage, as in the picture of a plan.
const BOTTLENECK: &str = "#c62828";
const GRID: &str = "#e4e7eb";
const TICK: &str = "#9aa5b1";
/// Of the line where the last row was admitted.
const TAIL: &str = "#5f3d8c";

/// Draws a job that was played.
pub(crate) fn draw(name: &str, report: &Report) -> String {
    let title = format!("{name} on {}, {}", report.devices, report.dtype);
    let mut canvas = Canvas::new(WIDTH, &format!("Simulation of {title}"));
    draw_head(&mut canvas, &title, report);
    let scale = PLOT_WIDTH / report.wall_seconds.max(1e-9);
    let timeline = &report.timeline;
    let bins = Bins::new(PLOT, scale, timeline.tokens.len(), timeline.bin_seconds, report.wall_seconds);
    let end = rows::draw(&mut canvas, &bins, report, TOP);
    let levels = end + 50.0;
    let bottom = levels::draw(&mut canvas, &bins, report, levels);
    for y in [end + 4.0, bottom] {
        draw_time_axis(&mut canvas, report.wall_seconds, scale, y);
    }
    draw_tail(&mut canvas, report, scale, (TOP - 6.0, bottom));
    canvas.finish(bottom + 42.0)
}

fn draw_head(canvas: &mut Canvas, title: &str, report: &Report) {
    canvas.text(LEFT, 44.0, TITLE.within(title, 920.0), title);
    let speed = grouped(report.tokens_per_second.round() as u64);
    canvas.text(RIGHT, 44.0, TITLE.to_the_left(), &format!("{speed} tokens/s"));
    let planned = grouped(report.plan.tokens_per_second.round() as u64);
    let beside = format!("{:.3} of the plan's {planned}", report.plan.ratio);
    canvas.text(RIGHT, 66.0, FIGURE.to_the_left(), &beside);
    let source = match report.estimate {
        true => "generated; an estimate, nothing was measured",
        false => "generated; an estimate, by measured times of stages",
    };
    canvas.text(RIGHT, 86.0, NOTE.to_the_left(), source);
    canvas.text(LEFT, 70.0, FIGURE, &job(report));
    canvas.text(LEFT, 90.0, FIGURE, &pipeline(report));
}

fn job(report: &Report) -> String {
    let lengths = &report.lengths;
    format!(
        "{} rows with prompts of {} tokens, {} generated on average, {}; seed {}",
        grouped(report.rows),
        grouped(lengths.prompt_tokens.round() as u64),
        grouped(lengths.output_tokens.round() as u64),
        lengths.distribution,
        lengths.seed
    )
}

fn pipeline(report: &Report) -> String {
    let preempted = match report.preemptions {
        0 => String::new(),
        1 => "; 1 preemption".to_owned(),
        many => format!("; {} preemptions", grouped(many)),
    };
    format!(
        "micro-batches of {} rows, {} KV; {} in all, {} of them after the last row was admitted{preempted}",
        grouped(report.pipeline.micro_batch_rows),
        report.kv_cache_dtype,
        time(report.wall_seconds),
        time(report.tail_ns as f64 * 1e-9)
    )
}

/// Tenths of seconds for jobs that are short.
fn time(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.1} s") } else { duration(seconds) }
}

/// Round times beneath `y`.
fn draw_time_axis(canvas: &mut Canvas, wall_seconds: f64, scale: f64, y: f64) {
    let (unit, name) = match wall_seconds {
        7200.0.. => (3600.0, "h"),
        120.0.. => (60.0, "min"),
        1.0.. => (1.0, "s"),
        _ => (1e-3, "ms"),
    };
    let step = canvas::step(wall_seconds / unit, 12.0);
    canvas.line((PLOT, y), (PLOT + PLOT_WIDTH, y), TICK);
    for mark in 0..=(wall_seconds / unit / step) as usize {
        let value = mark as f64 * step;
        let x = PLOT + value * unit * scale;
        canvas.line((x, y), (x, y + 4.0), TICK);
        let words = format!("{} {name}", (value * 1e3).round() / 1e3);
        canvas.text(x, y + 17.0, SMALL.centred(), &words);
    }
}

/// The moment after which no row waits, with its words beneath everything, on the side that has more room.
fn draw_tail(canvas: &mut Canvas, report: &Report, scale: f64, (top, bottom): (f64, f64)) {
    let x = PLOT + (report.wall_seconds - report.tail_ns as f64 * 1e-9) * scale;
    canvas.dashes((x, top), (x, bottom + 24.0), TAIL);
    let font = canvas::Font { colour: TAIL, ..SMALL };
    let (x, font) = if x > PLOT + PLOT_WIDTH / 2.0 { (x - 5.0, font.to_the_left()) } else { (x + 5.0, font) };
    canvas.text(x, bottom + 31.0, font, "last row admitted");
}

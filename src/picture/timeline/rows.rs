//! What each stage does over time: a row whose height is all of its time, filled bin by bin with the shares.

use crate::picture::canvas::{Area, Canvas, FIGURE, Font, NAME, NOTE, SMALL, Shape};
use crate::picture::timeline::steps::Bins;
use crate::picture::timeline::{BOTTLENECK, FIGURES, LEFT, PLOT, PLOT_WIDTH, RIGHT};
use crate::plan::table::device_range;
use crate::simulate::report::{Report, SharePart, StagePart};

/// More stages than these are drawn in narrow rows, as in the picture of a plan.
const MOST_WIDE_ROWS: usize = 12;
/// What a stage may do, from the bottom of its row up. Computing has the colour of FFNs, waiting for pages that of
/// KV in memory, and waiting for what is on its way that of hops.
const PARTS: [Part; 5] = [
    Part { name: "busy", colour: "#4fae8f", words: "busy", share: |share| share.busy },
    Part {
        name: "starved",
        colour: "#ecd48a",
        words: "starved: another computes",
        share: |share| share.starved,
    },
    Part {
        name: "kv_limited",
        colour: "#4f94d4",
        words: "KV-limited: no free pages",
        share: |share| share.kv_limited,
    },
    Part { name: "tail", colour: "#b79ad6", words: "tail: no rows left", share: |share| share.tail },
    Part { name: "idle", colour: "#cbd2d9", words: "idle: all on its way", share: |share| share.idle },
];

/// Something that a stage may do.
struct Part {
    name: &'static str,
    colour: &'static str,
    words: &'static str,
    share: fn(&SharePart) -> f64,
}

/// How rows are drawn.
struct Style {
    pitch: f64,
    height: f64,
    is_wide: bool,
}

/// Draws what colours mean, and all stages from `y` on; returns where the rows end.
pub(super) fn draw(canvas: &mut Canvas, bins: &Bins, report: &Report, y: f64) -> f64 {
    let is_wide = report.stages.len() <= MOST_WIDE_ROWS;
    let (pitch, height) = if is_wide { (50.0, 36.0) } else { (15.0, 13.0) };
    let style = Style { pitch, height, is_wide };
    draw_head(canvas, y);
    for (index, (stage, shares)) in report.stages.iter().zip(&report.timeline.stages).enumerate() {
        let y = y + index as f64 * style.pitch;
        let is_bottleneck = report.stages.len() > 1 && report.plan.bottleneck == index;
        let outlines = shapes(bins, shares, y + style.height, style.height);
        canvas.shapes(("data-stage", index.to_string()), &words(report, index, stage), &outlines);
        style.draw_name(canvas, y, index, stage, is_bottleneck);
        style.draw_figures(canvas, y, report, stage, is_bottleneck);
        if is_bottleneck {
            canvas.frame(Area { x: PLOT, y, width: PLOT_WIDTH, height: style.height }, BOTTLENECK, 2.0);
        }
    }
    y + (report.stages.len() - 1) as f64 * style.pitch + style.height
}

fn draw_head(canvas: &mut Canvas, y: f64) {
    canvas.text(PLOT, y - 34.0, NAME, "what each stage does, as shares of its time");
    canvas.legend(PLOT, y - 13.0, NOTE, PARTS.iter().map(|part| (part.colour, part.words)));
    canvas.text(FIGURES + 62.0, y - 11.0, NAME.to_the_left(), "busy");
    canvas.text(RIGHT, y - 11.0, NAME.to_the_left(), "planned");
}

/// The shares of all bins, each above those before it. All that is at or beneath a part's upper edge has its
/// colour, and the next one is drawn over it, so that no gap can show between two.
fn shapes(bins: &Bins, shares: &[SharePart], bottom: f64, height: f64) -> Vec<Shape> {
    let mut shapes = vec![];
    for (index, part) in PARTS.iter().enumerate().rev() {
        if shares.iter().any(|share| (part.share)(share) > 0.0) {
            let upto =
                |share: &SharePart| PARTS[..=index].iter().map(|part| (part.share)(share)).sum::<f64>();
            let outline = bins.area(bottom, shares.iter().map(|share| upto(share) * height));
            shapes.push(Shape { outline, name: part.name, colour: part.colour, stroke: None });
        }
    }
    shapes
}

/// All of a stage's time, in a tooltip.
fn words(report: &Report, index: usize, stage: &StagePart) -> String {
    let share = |ns: u64| percent(ns as f64 / report.wall_ns.max(1) as f64);
    format!(
        "stage {index}: busy {}, starved {}, KV-limited {}, tail {}, idle {}",
        share(stage.busy_ns),
        share(stage.starved_ns),
        share(stage.kv_limited_ns),
        share(stage.tail_ns),
        share(stage.idle_ns)
    )
}

impl Style {
    fn draw_name(&self, canvas: &mut Canvas, y: f64, index: usize, stage: &StagePart, is_bottleneck: bool) {
        let devices = device_range(&stage.devices);
        let blocks = format!("[{}, {})", stage.blocks[0], stage.blocks[1]);
        let room = PLOT - LEFT - 8.0;
        if self.is_wide {
            let word = if is_bottleneck { ", bottleneck" } else { "" };
            canvas.text(LEFT, y + 11.0, marked(NAME, is_bottleneck), &format!("stage {index}{word}"));
            canvas.text(LEFT, y + 24.0, SMALL.within(&devices, room), &devices);
            canvas.text(LEFT, y + 37.0, SMALL, &format!("blocks {blocks}"));
        } else {
            let text = format!("{index} {devices} {blocks}");
            canvas.text(LEFT, y + 10.5, marked(SMALL.within(&text, room), is_bottleneck), &text);
        }
    }

    /// The share of its time that a stage is busy, and that by the plan.
    fn draw_figures(
        &self,
        canvas: &mut Canvas,
        y: f64,
        report: &Report,
        stage: &StagePart,
        is_bottleneck: bool,
    ) {
        let font = marked(if self.is_wide { FIGURE } else { SMALL }, is_bottleneck).to_the_left();
        let y = y + self.height / 2.0 + font.size * 0.36;
        let busy = stage.busy_ns as f64 / report.wall_ns.max(1) as f64;
        canvas.text(FIGURES + 62.0, y, font, &percent(busy));
        canvas.text(RIGHT, y, font, &percent(stage.planned_busy));
    }
}

fn marked(font: Font, is_bottleneck: bool) -> Font {
    if is_bottleneck { Font { colour: BOTTLENECK, is_bold: true, ..font } } else { font }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

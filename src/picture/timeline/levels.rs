//! What the whole pipeline has over time: KV pages, running sequences and generated tokens, each a line on an
//! axis of its own.

use crate::picture::canvas::{self, Canvas, FIGURE, NAME, SMALL, Shape};
use crate::picture::timeline::steps::Bins;
use crate::picture::timeline::{FIGURES, GRID, LEFT, PLOT, PLOT_WIDTH};
use crate::simulate::report::Report;
use crate::text::{grouped, short};

const HEIGHT: f64 = 62.0;
/// From the bottom of one panel to that of the next.
const PITCH: f64 = 88.0;
/// That of KV in memory.
const KV: &str = "#4f94d4";
const RUNNING: &str = "#52606d";
const TOKENS: &str = "#e8801c";

/// One of them.
struct Level<'a> {
    mark: &'static str,
    name: &'static str,
    /// What follows the name, beneath it.
    of: &'static str,
    unit: &'static str,
    colour: &'static str,
    values: &'a [f64],
    /// What the axis reaches.
    top: f64,
    /// A value to compare with.
    dashed: Option<f64>,
    words: [String; 2],
}

/// Draws them beneath `y`; returns where the last one ends.
pub(super) fn draw(canvas: &mut Canvas, bins: &Bins, report: &Report, y: f64) -> f64 {
    let levels = levels(report);
    for (index, level) in levels.iter().enumerate() {
        level.draw(canvas, bins, y + HEIGHT + index as f64 * PITCH);
    }
    y + HEIGHT + (levels.len() - 1) as f64 * PITCH
}

fn levels(report: &Report) -> [Level<'_>; 3] {
    let timeline = &report.timeline;
    let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let whole = |number: f64| grouped(number.round() as u64);
    let planned = report.plan.tokens_per_second;
    [
        Level {
            mark: "kv",
            name: "KV pages",
            of: "in use",
            unit: " %",
            colour: KV,
            values: &timeline.kv,
            top: 1.0,
            dashed: None,
            words: [format!("mean {}", percent(report.kv.mean)), format!("most {}", percent(report.kv.most))],
        },
        Level {
            mark: "running",
            name: "sequences",
            of: "running",
            unit: "",
            colour: RUNNING,
            values: &timeline.running,
            top: most(&timeline.running),
            dashed: None,
            words: [
                format!("most {}", whole(most(&timeline.running))),
                format!("limit {}", grouped(report.pipeline.max_sequences as u64)),
            ],
        },
        Level {
            mark: "tokens",
            name: "tokens/s",
            of: "generated",
            unit: "",
            colour: TOKENS,
            values: &timeline.tokens,
            top: most(&timeline.tokens).max(planned),
            dashed: Some(planned),
            words: [
                format!("mean {}", whole(report.tokens_per_second)),
                format!("plan {} (dashed)", whole(planned)),
            ],
        },
    ]
}

impl Level<'_> {
    fn draw(&self, canvas: &mut Canvas, bins: &Bins, bottom: f64) {
        let top = if self.top > 0.0 { self.top } else { 1.0 };
        let height = |value: f64| value / top * HEIGHT;
        self.draw_axis(canvas, bottom, top);
        if let Some(value) = self.dashed {
            let y = bottom - height(value);
            canvas.dashes((PLOT, y), (PLOT + PLOT_WIDTH, y), RUNNING);
        }
        let heights = self.values.iter().map(|value| height(*value));
        let outline = bins.line(bottom, heights);
        let line = Shape { outline, name: self.mark, colour: self.colour, stroke: Some(1.6) };
        canvas.shapes(("data-level", self.mark.to_owned()), &format!("{} {}", self.name, self.of), &[line]);
    }

    /// The name and figures on both sides, and lines at round values.
    fn draw_axis(&self, canvas: &mut Canvas, bottom: f64, top: f64) {
        canvas.text(LEFT, bottom - HEIGHT / 2.0 - 3.0, NAME, self.name);
        canvas.text(LEFT, bottom - HEIGHT / 2.0 + 11.0, SMALL, self.of);
        for (line, words) in self.words.iter().enumerate() {
            canvas.text(FIGURES, bottom - HEIGHT / 2.0 - 4.0 + 17.0 * line as f64, FIGURE, words);
        }
        let factor = if self.unit.is_empty() { 1.0 } else { 100.0 };
        let step = canvas::step(top * factor, 4.0) / factor;
        for mark in 0..=(top / step * 1.000_001) as usize {
            let value = mark as f64 * step;
            let y = bottom - value / top * HEIGHT;
            canvas.line((PLOT, y), (PLOT + PLOT_WIDTH, y), GRID);
            let words = format!("{}{}", short(value * factor), self.unit);
            canvas.text(PLOT - 6.0, y + 3.5, SMALL.to_the_left(), &words);
        }
    }
}

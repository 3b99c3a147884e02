//! A stage's time as a bar: its blocks in order, each as wide as its time. Stages that share a device share a bar.
//!
//! A block has the colour of its FFN, and along its upper edge that of its attention. Where only some of its
//! columns are in the stage it is hatched.

use std::ops::Range;

use scheduler::{PlannedStage, Problem};
use stages::ModelConfig;
use stages::cost::PieceShape;

use crate::picture::canvas::{Area, Bar, Canvas, FIGURE, Font, HATCH, INK};
use crate::picture::kinds::{self, Kinds};
use crate::picture::plan::parts::{Part, Segment, segments};
use crate::picture::plan::{BARS, BARS_WIDTH};

/// Of the slowest stage.
pub(super) const SLOWEST: &str = "#c62828";
/// Embedding, output matrix and sampling.
pub(super) const EXTRA: &str = "#7b8794";
pub(super) const HOP: &str = "#cbd2d9";
/// In place of colours: attention, FFNs, and fused ones.
const GREY_ATTENTION: &str = "#7b8794";
const GREY_FFN: &str = "#c9d0d7";
const GREY_FUSED: &str = "#a5b0bb";
/// The share of a bar's height that says what attention is.
const ATTENTION_HEIGHT: f64 = 0.3;
/// Narrower blocks have no number on them.
const NARROWEST_WITH_NUMBER: f64 = 25.0;
const NUMBER: Font = Font { size: 11.0, colour: "#ffffff", is_bold: true, ..FIGURE };

/// A stage, or all of a device, and what its time goes to.
pub(super) struct Row {
    pub(super) segments: Vec<Segment>,
    pub(super) seconds: f64,
    pub(super) num_devices: usize,
    pub(super) blocks: Vec<Range<usize>>,
}

/// How a row is drawn.
pub(super) struct Style<'a> {
    pub(super) y: f64,
    pub(super) height: f64,
    /// Pixels for a second.
    pub(super) scale: f64,
    /// Seconds of the stage that is marked.
    pub(super) slowest: f64,
    pub(super) kinds: &'a Kinds,
    /// Whether blocks have the colours of their kinds, or are grey.
    pub(super) is_coloured: bool,
}

impl Row {
    /// The row of stages that have the same devices, with their times by `factor`.
    ///
    /// # Panics
    /// If there is no stage.
    pub(super) fn of(
        config: &ModelConfig,
        pieces: &[PieceShape],
        problem: &Problem<'_>,
        stages: &[&PlannedStage],
        factor: f64,
    ) -> Self {
        let mut segments: Vec<Segment> =
            stages.iter().flat_map(|stage| segments(config, pieces, problem, stage)).collect();
        segments.iter_mut().for_each(|segment| segment.seconds *= factor);
        let blocks = |stage: &&PlannedStage| {
            let own = &pieces[stage.pieces.clone()];
            own[0].block..own[own.len() - 1].block + 1
        };
        Row {
            segments,
            seconds: stages.iter().map(|stage| problem.stage_seconds(stage)).sum::<f64>() * factor,
            num_devices: stages[0].devices.len(),
            blocks: stages.iter().map(blocks).collect(),
        }
    }

    /// The runs of blocks in words.
    pub(super) fn blocks_in_words(&self) -> String {
        let words = self.blocks.iter().map(|range| format!("[{}, {})", range.start, range.end));
        words.collect::<Vec<_>>().join(", ")
    }

    /// Whether a block is in other stages too.
    pub(super) fn shares_a_block(&self) -> bool {
        self.segments.iter().any(|segment| matches!(segment.part, Part::Block { share, .. } if share < 1.0))
    }

    /// Draws the bar and its time; `mark` is what programs find its parts by.
    pub(super) fn draw(&self, canvas: &mut Canvas, style: &Style<'_>, config: &ModelConfig, mark: &str) {
        let (mut x, end) = (BARS, BARS + BARS_WIDTH);
        for segment in &self.segments {
            let width = (segment.seconds * style.scale).min(end - x);
            let area = Area { x, y: style.y, width, height: style.height };
            let tooltip = format!("{}: {}", words(config, &segment.part), milliseconds(segment.seconds));
            canvas.bars(("data-stage", mark.to_owned()), &tooltip, &style.bars(config, &segment.part, area));
            if let Part::Block { index, share, .. } = &segment.part
                && style.is_coloured
                && style.kinds.ffn(config.blocks[*index]).is_some()
                && area.width >= NARROWEST_WITH_NUMBER
            {
                let number = if *share < 1.0 { Font { colour: INK, ..NUMBER } } else { NUMBER };
                let below = style.height * (1.0 + ATTENTION_HEIGHT) / 2.0;
                canvas.text(area.middle(), area.y + below + 4.0, number.centred(), &index.to_string());
            }
            x += area.width;
        }
        if self.seconds * style.scale > BARS_WIDTH * 1.001 {
            style.draw_break(canvas, end);
        }
        self.draw_seconds(canvas, style, x);
    }

    /// The time after the bar, and a frame around the slowest.
    fn draw_seconds(&self, canvas: &mut Canvas, style: &Style<'_>, end: f64) {
        let is_slowest = self.seconds == style.slowest;
        let (font, word) = match (is_slowest, style.is_coloured) {
            (true, true) => (Font { colour: SLOWEST, is_bold: true, ..FIGURE }, ", slowest"),
            (true, false) => (Font { is_bold: true, ..FIGURE }, ", slowest"),
            (false, _) => (FIGURE, ""),
        };
        let font = Font { size: (style.height - 0.5).min(FIGURE.size), ..font };
        let text = format!("{}{word}", milliseconds(self.seconds));
        let width = font.width(&text);
        let ground = Area { x: end + 4.0, y: style.y, width: width + 4.0, height: style.height };
        canvas.bar(Bar { area: ground, fill: "#ffffff" });
        canvas.text(end + 8.0, style.y + style.height / 2.0 + font.size * 0.36, font, &text);
        if is_slowest && style.is_coloured {
            let area = Area { x: BARS, y: style.y, width: end - BARS, height: style.height };
            canvas.frame(area, SLOWEST, 2.0);
        }
    }
}

impl Style<'_> {
    /// Two gaps near the end of a bar that is longer than the page has room for.
    fn draw_break(&self, canvas: &mut Canvas, end: f64) {
        for gap in [22.0, 14.0] {
            let area = Area { x: end - gap, y: self.y, width: 3.0, height: self.height };
            canvas.bar(Bar { area, fill: "#ffffff" });
        }
    }

    /// The rectangles of a part, with white between it and the next.
    fn bars(&self, config: &ModelConfig, part: &Part, area: Area) -> Vec<Bar> {
        let area = Area { width: (area.width - 0.8).max(area.width * 0.6), ..area };
        let Part::Block { index, share, has_first_column } = *part else {
            return vec![Bar { area, fill: if *part == Part::Hop { HOP } else { EXTRA } }];
        };
        let block = config.blocks[index];
        let (mut attention, mut ffn) = (self.kinds.attention(block), self.kinds.ffn(block));
        if !self.is_coloured {
            let grey = if self.kinds.is_fused(block) { GREY_FUSED } else { GREY_FFN };
            (attention, ffn) = (attention.map(|_| GREY_ATTENTION), ffn.map(|_| grey));
        }
        let attention_height = area.height * ATTENTION_HEIGHT;
        let upper = Area { height: attention_height, ..area };
        let lower = Area { y: area.y + attention_height, height: area.height - attention_height, ..area };
        let mut bars = vec![];
        bars.extend(attention.filter(|_| has_first_column).map(|fill| Bar { area: upper, fill }));
        bars.extend(ffn.map(|fill| Bar { area: lower, fill }));
        bars.extend((share < 1.0 && self.is_coloured).then_some(Bar { area: lower, fill: HATCH }));
        bars
    }
}

fn words(config: &ModelConfig, part: &Part) -> String {
    match *part {
        Part::Embedding => "embedding".to_owned(),
        Part::Head => "output matrix and sampling".to_owned(),
        Part::Hop => "hop to the next stage".to_owned(),
        Part::Block { index, share, has_first_column } => {
            let block = config.blocks[index];
            let ffn = kinds::ffn_words(block);
            let ffn = if share < 1.0 { format!("{:.0} % of {ffn}", share * 100.0) } else { ffn };
            match has_first_column {
                true => format!("block {index}, {}, {ffn}", kinds::attention_words(block)),
                false => format!("block {index}, {ffn}"),
            }
        }
    }
}

/// Times of very small models are told in microseconds.
fn milliseconds(seconds: f64) -> String {
    let milliseconds = seconds * 1e3;
    if milliseconds < 1.0 { format!("{milliseconds:.3} ms") } else { format!("{milliseconds:.1} ms") }
}

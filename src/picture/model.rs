//! A model as a picture: its blocks in the checkpoint's order, attention above a line and FFNs beneath it.
//!
//! Heights are parameters, on one scale for both sides, so that areas compare too. Nothing is drawn where a half
//! is missing, and on the line itself empty slots are pale.

use stages::{Block, ModelConfig};

use crate::picture::canvas::{self, Area, Bar, Canvas, FIGURE, NOTE, SMALL, TITLE};
use crate::picture::kinds::{self, Kinds};
use crate::text::{grouped, short};

const WIDTH: f64 = 1280.0;
/// Where slots begin and end.
const LEFT: f64 = 96.0;
const RIGHT: f64 = 1252.0;
/// Of the tallest attention and the tallest FFN together.
const BARS_HEIGHT: f64 = 540.0;
const TOP: f64 = 140.0;
/// The line between attention and FFNs, where slots are.
const LINE_HEIGHT: f64 = 6.0;
/// Bars of models with few blocks stay bars.
const WIDEST_BAR: f64 = 56.0;
/// Keys and values in the caption are bf16, as in the table.
const KV_BYTES: u64 = 2;

const GRID: &str = "#e4e7eb";
const SLOT: &str = "#3e4c59";
const EMPTY_SLOT: &str = "#d3d9df";

/// Draws a model.
pub(crate) fn draw(name: &str, config: &ModelConfig) -> String {
    let page = Page::of(config);
    let kinds = Kinds::of(config);
    let mut canvas = Canvas::new(WIDTH, &format!("The blocks of {name}"));
    canvas.text(32.0, 44.0, TITLE.within(name, RIGHT - 32.0), name);
    for (line, text) in caption(config, &kinds).iter().enumerate() {
        canvas.text(32.0, 70.0 + 20.0 * line as f64, FIGURE, text);
    }
    draw_scale(&mut canvas, &page);
    draw_slots(&mut canvas, &page, config);
    for (index, block) in config.blocks.iter().enumerate() {
        canvas.bars(
            ("data-block", index.to_string()),
            &tooltip(config, index, *block),
            &page.bars(config, &kinds, *block),
        );
    }
    draw_fused_sizes(&mut canvas, &page, config, &kinds);
    let legend = kinds.legend();
    let legend = legend.iter().map(|(fill, words)| (*fill, words.as_str()));
    let is_full = config.blocks.len() == config.num_slots;
    let empty = (!is_full).then_some((EMPTY_SLOT, "empty slot"));
    let end = canvas.legend(LEFT, page.bottom + 54.0, NOTE, legend.chain(empty));
    canvas.text(LEFT - 10.0, page.bottom + 16.0, SMALL.to_the_left(), "parameters");
    canvas.finish(end + 26.0)
}

/// Where things are on the page.
struct Page {
    /// Pixels for a parameter.
    scale: f64,
    /// Pixels for a slot.
    pitch: f64,
    /// The bottom of attention, and the top of FFNs.
    above: f64,
    below: f64,
    bottom: f64,
    most_above: u64,
    most_below: u64,
}

impl Page {
    fn of(config: &ModelConfig) -> Self {
        let most = |of: &dyn Fn(&Block) -> u64| config.blocks.iter().map(of).max().unwrap_or(0);
        let most_above = most(&|block| block.attention.params(config.dims));
        let most_below = most(&|block| block.ffn.params(config.dims));
        let scale = BARS_HEIGHT / (most_above + most_below).max(1) as f64;
        let above = TOP + most_above as f64 * scale;
        Page {
            scale,
            pitch: (RIGHT - LEFT) / config.num_slots.max(1) as f64,
            above,
            below: above + LINE_HEIGHT,
            bottom: above + LINE_HEIGHT + most_below as f64 * scale,
            most_above,
            most_below,
        }
    }

    /// The place of a bar of so many parameters, from the line up or down.
    fn area(&self, slot: usize, params: u64, is_above: bool) -> Area {
        let width = (self.pitch * 0.86).min(WIDEST_BAR);
        let height = params as f64 * self.scale;
        let y = if is_above { self.above - height } else { self.below };
        Area { x: self.slot_middle(slot) - width / 2.0, y, width, height }
    }

    fn slot_middle(&self, slot: usize) -> f64 {
        LEFT + (slot as f64 + 0.5) * self.pitch
    }

    fn bars(&self, config: &ModelConfig, kinds: &Kinds, block: Block) -> Vec<Bar> {
        let attention = kinds
            .attention(block)
            .map(|fill| Bar { area: self.area(block.slot, block.attention.params(config.dims), true), fill });
        let ffn = kinds
            .ffn(block)
            .map(|fill| Bar { area: self.area(block.slot, block.ffn.params(config.dims), false), fill });
        attention.into_iter().chain(ffn).collect()
    }
}

fn caption(config: &ModelConfig, kinds: &Kinds) -> [String; 2] {
    let blocks = &config.blocks;
    let kv_values: u64 = blocks.iter().map(|block| block.attention.kv_values_per_token(config.dims)).sum();
    let with_attention = blocks.iter().filter(|block| crate::inspect::kv_heads(block).is_some()).count();
    let fused = match kinds.num_fused() {
        0 => String::new(),
        1 => ", 1 fused FFN".to_owned(),
        many => format!(", {many} fused FFNs"),
    };
    [
        format!(
            "{} parameters in {} blocks of {} slots; {with_attention} blocks with attention{fused}",
            grouped(config.params()),
            blocks.len(),
            config.num_slots,
        ),
        format!(
            "{} bytes of KV a token in bf16; hidden {}, {} heads of {}, vocabulary {}",
            grouped(kv_values * KV_BYTES),
            config.dims.hidden,
            config.dims.heads,
            config.dims.head_dim,
            config.dims.vocab,
        ),
    ]
}

fn tooltip(config: &ModelConfig, index: usize, block: Block) -> String {
    format!(
        "block {index}, slot {}: {} ({} parameters), {} ({} parameters)",
        block.slot,
        kinds::attention_words(block),
        grouped(block.attention.params(config.dims)),
        kinds::ffn_words(block),
        grouped(block.ffn.params(config.dims)),
    )
}

/// Lines across the page at round numbers of parameters, on both sides.
fn draw_scale(canvas: &mut Canvas, page: &Page) {
    let step = canvas::step((page.most_above + page.most_below) as f64, 10.0);
    let mut rule = |params: f64, y: f64| {
        canvas.line((LEFT, y), (RIGHT, y), GRID);
        canvas.text(LEFT - 10.0, y + 4.0, SMALL.to_the_left(), &short(params));
    };
    for mark in 1..=(page.most_above as f64 / step) as usize {
        rule(mark as f64 * step, page.above - mark as f64 * step * page.scale);
    }
    for mark in 1..=(page.most_below as f64 / step) as usize {
        rule(mark as f64 * step, page.below + mark as f64 * step * page.scale);
    }
    canvas.text(32.0, page.above - 1.0, SMALL, "attention");
    canvas.text(32.0, page.below + 9.0, SMALL, "FFN");
}

/// The line itself, and numbers of slots above everything.
fn draw_slots(canvas: &mut Canvas, page: &Page, config: &ModelConfig) {
    let mut is_empty = vec![true; config.num_slots];
    config.blocks.iter().for_each(|block| is_empty[block.slot] = false);
    for (slot, is_empty) in is_empty.into_iter().enumerate() {
        let area = Area {
            x: LEFT + (slot as f64 + 0.07) * page.pitch,
            y: page.above + 1.0,
            width: page.pitch * 0.86,
            height: LINE_HEIGHT - 2.0,
        };
        canvas.bar(Bar { area, fill: if is_empty { EMPTY_SLOT } else { SLOT } });
    }
    let step = canvas::step(config.num_slots as f64, 20.0).max(1.0) as usize;
    canvas.text(LEFT - 10.0, TOP - 14.0, SMALL.to_the_left(), "slot");
    for slot in (0..config.num_slots).step_by(step) {
        canvas.text(page.slot_middle(slot), TOP - 14.0, SMALL.centred(), &slot.to_string());
    }
}

/// The sizes of fused FFNs beneath them, left out where one would run into the last.
fn draw_fused_sizes(canvas: &mut Canvas, page: &Page, config: &ModelConfig, kinds: &Kinds) {
    let (mut last_x, mut last_y) = (0.0, 0.0);
    for block in config.blocks.iter().filter(|block| kinds.is_fused(**block)) {
        let params = block.ffn.params(config.dims);
        let (area, size) = (page.area(block.slot, params, false), short(params as f64));
        let (x, y) = (area.middle(), area.y + area.height + 16.0);
        if x - last_x > NOTE.width(&size) || f64::abs(y - last_y) > NOTE.size {
            canvas.text(x, y, NOTE.centred(), &size);
            (last_x, last_y) = (x, y);
        }
    }
}

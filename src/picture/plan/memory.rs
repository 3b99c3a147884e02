//! The memory of a stage's devices as a stacked bar: all of the device is as long as the column is wide.

use crate::picture::canvas::{Area, Bar, Canvas, SMALL};
use crate::picture::plan::{MEMORY, MEMORY_WIDTH};
use crate::plan::report::StagePart;
use crate::plan::table::gigabytes;
use crate::text::{grouped, short};

const WEIGHTS: &str = "#52606d";
const KV: &str = "#4f94d4";
const WORKSPACE: &str = "#d9b44a";
const FREE: &str = "#eef1f4";

/// In narrow rows the room for KV stands beside the bar.
pub(super) const NARROW_WIDTH: f64 = MEMORY_WIDTH - 74.0;

/// What the colours of memory mean.
pub(super) const LEGEND: [(&str, &str); 4] =
    [(WEIGHTS, "weights"), (KV, "KV"), (WORKSPACE, "workspace"), (FREE, "free")];

/// Draws the memory of a stage; where there is room, its figures beneath it.
pub(super) fn draw(canvas: &mut Canvas, y: f64, stage: &StagePart, is_wide: bool) {
    let memory = &stage.memory;
    let width = if is_wide { MEMORY_WIDTH } else { NARROW_WIDTH };
    let scale = width / memory.total as f64;
    let mut x = MEMORY;
    let parts = [memory.weights, memory.kv, memory.workspace, memory.free];
    for (bytes, (fill, name)) in parts.into_iter().zip(LEGEND) {
        let area = Area { x, y: y + 2.0, width: bytes as f64 * scale, height: 13.0 };
        let tooltip = format!("{name}: {} of {}", gigabytes(bytes), gigabytes(memory.total));
        canvas.bars(("data-memory", name.to_owned()), &tooltip, &[Bar { area, fill }]);
        x += area.width;
    }
    canvas.frame(Area { x: MEMORY, y: y + 2.0, width, height: 13.0 }, "#9aa5b1", 0.5);
    if is_wide {
        for (line, words) in figures(stage).iter().enumerate() {
            canvas.text(MEMORY, y + 28.0 + 13.0 * line as f64, SMALL, words);
        }
    } else {
        let tokens = stage.kv_tokens.map_or("no KV".to_owned(), |tokens| short(tokens as f64));
        canvas.text(MEMORY + width + 8.0, y + 12.5, SMALL, &tokens);
    }
}

fn figures(stage: &StagePart) -> [String; 2] {
    let memory = &stage.memory;
    let (weights, total) = (gigabytes(memory.weights), gigabytes(memory.total));
    match stage.kv_tokens {
        Some(tokens) => [
            format!("weights {weights}, KV {} of {total}", gigabytes(memory.kv)),
            format!("room for {} KV tokens", grouped(tokens)),
        ],
        None => [format!("weights {weights} of {total}"), "no KV".to_owned()],
    }
}

//! The memory of a stage's devices as a stacked bar: all of the device is as long as the column is wide.

use crate::picture::canvas::{Area, Bar, Canvas, SMALL};
use crate::picture::plan::{MEMORY, MEMORY_WIDTH};
use crate::plan::report::{MemoryPart, StagePart};
use crate::text::bytes as sized;
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

/// Draws the memory of the stages that share a device; where there is room, its figures beneath it.
pub(super) fn draw(canvas: &mut Canvas, y: f64, stages: &[&StagePart], is_wide: bool) {
    let memory = &shared(stages);
    let kv_tokens = stages.iter().find_map(|stage| stage.kv_tokens);
    let width = if is_wide { MEMORY_WIDTH } else { NARROW_WIDTH };
    let scale = width / memory.total as f64;
    let mut x = MEMORY;
    let parts = [memory.weights, memory.kv, memory.workspace, memory.free];
    for (bytes, (fill, name)) in parts.into_iter().zip(LEGEND) {
        let area = Area { x, y: y + 2.0, width: bytes as f64 * scale, height: 13.0 };
        let tooltip = format!("{name}: {} of {}", sized(bytes), sized(memory.total));
        canvas.bars(("data-memory", name.to_owned()), &tooltip, &[Bar { area, fill }]);
        x += area.width;
    }
    canvas.frame(Area { x: MEMORY, y: y + 2.0, width, height: 13.0 }, "#9aa5b1", 0.5);
    if is_wide {
        for (line, words) in figures(memory, kv_tokens).iter().enumerate() {
            canvas.text(MEMORY, y + 28.0 + 13.0 * line as f64, SMALL, words);
        }
    } else {
        let tokens = kv_tokens.map_or("no KV".to_owned(), |tokens| short(tokens as f64));
        canvas.text(MEMORY + width + 8.0, y + 12.5, SMALL, &tokens);
    }
}

/// What stages have on a device together.
fn shared(stages: &[&StagePart]) -> MemoryPart {
    let first = &stages[0].memory;
    let weights = stages.iter().map(|stage| stage.memory.weights).sum();
    MemoryPart { weights, kv: stages.iter().map(|stage| stage.memory.kv).sum(), ..*first }
}

fn figures(memory: &MemoryPart, kv_tokens: Option<u64>) -> [String; 2] {
    let (weights, total) = (sized(memory.weights), sized(memory.total));
    match kv_tokens {
        Some(tokens) => [
            format!("weights {weights}, KV {} of {total}", sized(memory.kv)),
            format!("room for {} KV tokens", grouped(tokens)),
        ],
        None => [format!("weights {weights} of {total}"), "no KV".to_owned()],
    }
}

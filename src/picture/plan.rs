//! A plan as a picture: each stage's time as a bar of its blocks beside its memory, and the even split beneath. Where
//! the pipeline goes through its devices twice, both stages of a device have one bar.
//!
//! All bars of time are on one scale, and a dashed line goes through them at the slowest stage of the plan, for
//! which every other waits. The even split has as many rows to do, in micro-batches of its own size: where its
//! bars are twice as long, it is half as fast. Where it does not fit it is told by the plan's micro-batch.

mod memory;
mod parts;
mod row;

use scheduler::PlannedStage;
use stages::cost::Balance;

use crate::picture::canvas::{self, Canvas, FIGURE, HATCH, NAME, NOTE, SMALL, TITLE};
use crate::picture::kinds::Kinds;
use crate::picture::plan::row::{EXTRA, HOP, Row, SLOWEST, Style};
use crate::plan::answer::{self, Answer};
use crate::plan::report::{Found, StagePart};
use crate::plan::setting::Setting;
use crate::plan::table::{beside, device_range};
use crate::text::{grouped, short};

const WIDTH: f64 = 1280.0;
const LEFT: f64 = 32.0;
/// Where bars of time begin, and where the longest one ends; its figure follows.
const BARS: f64 = 200.0;
const BARS_WIDTH: f64 = 600.0;
/// Where bars of memory begin and end.
const MEMORY: f64 = 964.0;
const MEMORY_WIDTH: f64 = 284.0;
/// Where the first stage is.
const TOP: f64 = 172.0;
/// More stages than these are drawn in narrow rows.
const MOST_WIDE_ROWS: usize = 12;
/// The plan's bars have at least this share of the width; longer ones of the even split are cut short.
const LEAST_SHARE: f64 = 0.3;
const RULE: &str = "#d3d9df";

/// Draws a plan that fits.
pub(crate) fn draw(name: &str, setting: &Setting, answer: &Answer, found: &Found) -> String {
    let page = Page::of(setting, answer, found);
    let title = format!("{name} on {}, {}", setting.devices, setting.types.weights.name());
    let mut canvas = Canvas::new(WIDTH, &format!("Plan of {title}"));
    page.draw_head(&mut canvas, &title);
    let end = page.draw_stages(&mut canvas, TOP);
    let end = page.draw_time_axis(&mut canvas, end);
    let end = page.draw_even_split(&mut canvas, end);
    let end = page.draw_legend(&mut canvas, end + 26.0);
    canvas.finish(end + 24.0)
}

/// All that is drawn, and how large.
struct Page<'a> {
    setting: &'a Setting,
    found: &'a Found,
    kinds: Kinds,
    plan: Vec<Row>,
    /// The stages in each row of the plan.
    stages: Vec<Vec<usize>>,
    even: Vec<Row>,
    /// Pixels for a second.
    scale: f64,
    is_wide: bool,
}

impl<'a> Page<'a> {
    fn of(setting: &'a Setting, answer: &Answer, found: &'a Found) -> Self {
        let ends = answer::ends_block(&answer.pieces);
        let problem = answer.plan.problem(&ends);
        let stages = by_device(&answer.plan.stages);
        let row = |own: &Vec<usize>| {
            let own: Vec<&PlannedStage> = own.iter().map(|idx| &answer.plan.stages[*idx]).collect();
            Row::of(&setting.config, &answer.pieces, &problem, &own, 1.0)
        };
        let plan: Vec<Row> = stages.iter().map(row).collect();
        let even = even_rows(setting, answer, &ends);
        Page {
            kinds: Kinds::of(&setting.config),
            scale: BARS_WIDTH / longest(&even).clamp(longest(&plan), longest(&plan) / LEAST_SHARE),
            is_wide: plan.len().max(even.len()) <= MOST_WIDE_ROWS,
            setting,
            found,
            plan,
            stages,
            even,
        }
    }

    fn draw_head(&self, canvas: &mut Canvas, title: &str) {
        canvas.text(LEFT, 44.0, TITLE.within(title, 920.0), title);
        let speed = grouped(self.found.tokens_per_second.round() as u64);
        let end = WIDTH - LEFT;
        canvas.text(end, 44.0, TITLE.to_the_left(), &format!("{speed} tokens/s"));
        let note = match self.setting.measured {
            Some(_) => "generated; by measured times of each block",
            None => "generated; an estimate, nothing was measured",
        };
        canvas.text(end, 66.0, NOTE.to_the_left(), note);
        canvas.text(LEFT, 72.0, FIGURE, &self.job());
        canvas.text(LEFT, 92.0, FIGURE, &self.load());
        let rows = grouped(self.found.micro_batch_rows);
        canvas.text(BARS, TOP - 22.0, NAME, &format!("time of each stage for a micro-batch of {rows} rows"));
        canvas.text(MEMORY, TOP - 36.0, NAME, "memory of each device");
        canvas.legend(MEMORY, TOP - 17.0, SMALL, memory::LEGEND);
        if !self.is_wide {
            canvas.text(WIDTH - LEFT, TOP - 36.0, SMALL.to_the_left(), "room for KV tokens");
        }
    }

    fn job(&self) -> String {
        let (config, mix) = (&self.setting.config, self.setting.mix);
        format!(
            "{} parameters in {} blocks of {} slots, {} KV; prompts of {} tokens, {} generated for each",
            short(config.params() as f64),
            config.blocks.len(),
            config.num_slots,
            self.setting.types.kv.name(),
            grouped(mix.prompt_tokens.round() as u64),
            grouped(mix.output_tokens.round() as u64),
        )
    }

    fn load(&self) -> String {
        let used: usize = self.plan.iter().map(|row| row.num_devices).sum();
        let idle = match self.setting.devices.num_devices() - used {
            0 => String::new(),
            1 => ", 1 device idle".to_owned(),
            many => format!(", {many} devices idle"),
        };
        let by = match self.setting.balance {
            Balance::Roofline => "",
            Balance::Flops => ", balanced by FLOPs",
            Balance::Weights => ", balanced by weights",
        };
        format!(
            "micro-batches of {} rows, {} tokens of KV in flight; bubble {:.1} %{by}{idle}",
            grouped(self.found.micro_batch_rows),
            grouped(self.found.tokens_in_flight),
            self.found.bubble * 100.0
        )
    }

    /// The plan's stages from `y` on; returns where they end.
    fn draw_stages(&self, canvas: &mut Canvas, y: f64) -> f64 {
        let (pitch, height) = if self.is_wide { (52.0, 34.0) } else { (22.0, 17.0) };
        let end = y + self.plan.len() as f64 * pitch;
        self.draw_slowest_line(canvas, y - 8.0, end);
        for (index, (row, stages)) in self.plan.iter().zip(&self.stages).enumerate() {
            let y = y + index as f64 * pitch;
            let parts: Vec<&StagePart> = stages.iter().map(|stage| &self.found.stages[*stage]).collect();
            self.draw_name(canvas, y, stages, row, &device_range(&parts[0].devices));
            let style = self.style(y, height, true);
            row.draw(canvas, &style, &self.setting.config, &format!("plan {index}"));
            memory::draw(canvas, y, &parts, self.is_wide);
        }
        end
    }

    fn draw_name(&self, canvas: &mut Canvas, y: f64, stages: &[usize], row: &Row, devices: &str) {
        let blocks = row.blocks_in_words();
        let index = stages.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        if self.is_wide {
            let word = if stages.len() > 1 { "stages" } else { "stage" };
            canvas.text(LEFT, y + 11.0, NAME, &format!("{word} {index}"));
            canvas.text(LEFT, y + 26.0, SMALL, devices);
            canvas.text(LEFT, y + 39.0, SMALL, &format!("blocks {blocks}"));
        } else {
            let words = format!("{index} {devices} {blocks}");
            canvas.text(LEFT, y + 12.5, SMALL.within(&words, BARS - LEFT - 4.0), &words);
        }
    }

    fn style(&self, y: f64, height: f64, is_coloured: bool) -> Style<'_> {
        let rows = if is_coloured { &self.plan } else { &self.even };
        let slowest = if rows.len() > 1 { longest(rows) } else { f64::INFINITY };
        Style { y, height, scale: self.scale, slowest, kinds: &self.kinds, is_coloured }
    }

    /// A line at the time of the plan's slowest stage, beneath whatever is drawn after it.
    fn draw_slowest_line(&self, canvas: &mut Canvas, from: f64, to: f64) {
        let x = BARS + longest(&self.plan) * self.scale;
        canvas.dashes((x, from), (x, to), SLOWEST);
    }

    /// Milliseconds beneath the plan's stages.
    fn draw_time_axis(&self, canvas: &mut Canvas, y: f64) -> f64 {
        let longest = BARS_WIDTH / self.scale * 1e3;
        let step = canvas::step(longest, 10.0);
        canvas.line((BARS, y), (BARS + BARS_WIDTH, y), RULE);
        for mark in 0..=(longest / step) as usize {
            let (milliseconds, x) = (mark as f64 * step, BARS + mark as f64 * step * 1e-3 * self.scale);
            canvas.line((x, y), (x, y + 4.0), RULE);
            canvas.text(x, y + 17.0, SMALL.centred(), &format!("{} ms", (milliseconds * 1e3).round() / 1e3));
        }
        y + 20.0
    }

    /// The even split beneath `y`; returns where it ends. One device has nothing to split.
    fn draw_even_split(&self, canvas: &mut Canvas, y: f64) -> f64 {
        if self.setting.devices.num_devices() == 1 {
            return y;
        }
        canvas.text(BARS, y + 40.0, NAME, "even split: as many slots on each device, empty ones counted");
        canvas.text(BARS, y + 58.0, FIGURE, &self.even_words());
        let (pitch, height) = if self.is_wide { (25.0, 18.0) } else { (14.0, 11.0) };
        let y = y + 72.0;
        let end = y + self.even.len() as f64 * pitch;
        self.draw_slowest_line(canvas, y - 4.0, end);
        for (index, row) in self.even.iter().enumerate() {
            let y = y + index as f64 * pitch;
            let words = format!("stage {index}, blocks {}", row.blocks_in_words());
            canvas.text(LEFT, y + height / 2.0 + 4.0, SMALL, &words);
            row.draw(canvas, &self.style(y, height, false), &self.setting.config, &format!("even {index}"));
        }
        end
    }

    fn even_words(&self) -> String {
        let even = &self.found.even_split;
        match even.tokens_per_second {
            Some(_) => format!("{}; times for as many rows", beside(even.tokens_per_second, even.ratio)),
            None => {
                let times = longest(&self.even) / longest(&self.plan);
                format!(
                    "does not fit; with more memory its slowest stage would take {times:.2} times as long"
                )
            }
        }
    }

    /// What colours mean, and uniform tensor parallelism in words; returns where it ends.
    fn draw_legend(&self, canvas: &mut Canvas, y: f64) -> f64 {
        let kinds = self.kinds.legend();
        let kinds = kinds.iter().map(|(fill, words)| (*fill, words.as_str()));
        let has_shared = self.plan.iter().any(Row::shares_a_block);
        let shared = has_shared.then_some((HATCH, "part of a block's columns"));
        let extras = [(EXTRA, "embedding, output matrix"), (HOP, "hop")];
        let y = canvas.legend(LEFT, y, NOTE, kinds.chain(shared).chain(extras));
        let Some(words) = self.uniform_words() else { return y };
        canvas.text(LEFT, y + 26.0, NOTE, &words);
        y + 26.0
    }

    /// The other placement that needs no thought; nothing on one device, or on devices that are unlike.
    fn uniform_words(&self) -> Option<String> {
        let uniform = self.found.uniform_tp.as_ref().filter(|uniform| uniform.tensor_parallel > 1)?;
        let num_devices = uniform.tensor_parallel;
        if self.plan[0].num_devices == num_devices {
            return Some(format!(
                "the plan is uniform tensor parallelism: all {num_devices} devices on every block"
            ));
        }
        let speed = beside(uniform.tokens_per_second, uniform.ratio);
        Some(format!("uniform tensor parallelism, all {num_devices} devices on every block: {speed}"))
    }
}

/// The stages that each device has, or each group of devices that share theirs.
fn by_device(stages: &[PlannedStage]) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..stages.len()).collect();
    order.sort_by_key(|stage| stages[*stage].devices.start);
    order.chunk_by(|one, next| stages[*one].devices == stages[*next].devices).map(<[usize]>::to_vec).collect()
}

/// Seconds of the slowest stage.
fn longest(rows: &[Row]) -> f64 {
    rows.iter().map(|row| row.seconds).fold(f64::MIN_POSITIVE, f64::max)
}

/// The even split's stages with their time for as many rows as the plan's micro-batch has.
fn even_rows(setting: &Setting, answer: &Answer, ends: &[bool]) -> Vec<Row> {
    let (layout, factor) = match &answer.even.layout {
        Some(even) => (even, answer.plan.case.rows as f64 / even.case.rows as f64),
        None => (&answer.plan, 1.0),
    };
    let problem = layout.problem(ends);
    let row = |stage: &PlannedStage| Row::of(&setting.config, &answer.pieces, &problem, &[stage], factor);
    answer::even_split(setting, &answer.pieces).iter().map(row).collect()
}

//! What a run says at its end.

use std::time::Duration;

use actors::{HopTimes, StageParts, StageTimes};
use jobs::{RankRecord, Score, Scores, StageRecord};
use stages::{Alike, CollectiveTimes, Part, Sharing};

use crate::hindsight::BetterCut;
use crate::layout::ranges;
use crate::placement::Source;
use crate::text::{grouped, rate};

/// Another cut is worth a line when the run would have been faster by so much.
const LEAST_GAIN_PERCENT: f64 = 3.0;

/// The figures of a run.
pub(crate) struct Report {
    pub(crate) scores: Option<Scores>,
    pub(crate) rows_completed: u64,
    pub(crate) rows_failed: u64,
    /// Why these failed, where there are any.
    pub(crate) failed: Option<String>,
    /// Rows of these that earlier runs had finished.
    pub(crate) rows_resumed: u64,
    /// Lines that were moved to `stale.jsonl`.
    pub(crate) stale_lines: u64,
    /// Tokens of this run.
    pub(crate) prompt_tokens: u64,
    pub(crate) generated_tokens: u64,
    pub(crate) load: Duration,
    pub(crate) run: Duration,
    /// Time that the pipeline actor took between the last stage and the first.
    pub(crate) handling: Duration,
    /// CPU time of the threads that read and tokenize rows, and that detokenize and write them.
    pub(crate) reader_cpu: Duration,
    pub(crate) writer_cpu: Duration,
    pub(crate) stages: Vec<StageLine>,
    /// By what the stages were predicted.
    pub(crate) costs: Source,
    pub(crate) better: Option<BetterCut>,
    /// The file of steps, and how many there are.
    pub(crate) trace: Option<String>,
    /// What the scheduler did, where it could still be asked.
    pub(crate) scheduler: Option<scheduler::Stats>,
    /// Replicas that others went on without, and why.
    pub(crate) failed_replicas: Vec<(usize, String)>,
    pub(crate) peak_bytes: Option<u64>,
    /// Keys that were set from outside of the job file.
    pub(crate) overrides: Vec<String>,
    pub(crate) output: String,
}

/// One stage's part.
pub(crate) struct StageLine {
    /// Which replica has it, where there are several.
    pub(crate) replica: Option<usize>,
    pub(crate) device: String,
    pub(crate) part: Part,
    /// How many devices share it.
    pub(crate) ranks: usize,
    /// How these share its blocks.
    pub(crate) sharing: Sharing,
    /// What each rank spent on collectives, the first one first.
    pub(crate) collectives: Vec<CollectiveTimes>,
    pub(crate) times: StageTimes,
    /// Seconds that it should have been busy.
    pub(crate) predicted: f64,
}

impl StageLine {
    /// It in the manifest.
    pub(crate) fn record(&self) -> StageRecord {
        let parts = &self.times.parts;
        StageRecord {
            replica: self.replica.unwrap_or(0),
            device: self.device.clone(),
            blocks: [self.part.blocks.start, self.part.blocks.end],
            first_column: self.part.first_column,
            end_column: self.part.end_column,
            ranks: self.ranks,
            collective_seconds: self.of_first_rank().time.as_secs_f64(),
            collective_bytes: self.of_first_rank().bytes,
            rank_collectives: match self.ranks {
                1 => Vec::new(),
                _ => self.rank_records(),
            },
            hop_bytes: self.times.hops.bytes,
            hop_seconds: self.times.hops.time.as_secs_f64(),
            busy_seconds: parts.busy.as_secs_f64(),
            starved_seconds: parts.starved.as_secs_f64(),
            blocked_seconds: parts.blocked.as_secs_f64(),
            kv_limited_seconds: parts.kv_limited.as_secs_f64(),
            tail_seconds: parts.tail.as_secs_f64(),
            idle_seconds: parts.idle.as_secs_f64(),
            predicted_seconds: Some(self.predicted),
            micro_batches: self.times.steps,
            tokens: self.times.tokens,
            restarts: self.times.restarts,
        }
    }

    fn of_first_rank(&self) -> CollectiveTimes {
        self.collectives.first().copied().unwrap_or_default()
    }

    fn rank_records(&self) -> Vec<RankRecord> {
        let record = |(device, times): (&str, &CollectiveTimes)| RankRecord {
            device: device.to_owned(),
            collectives: times.calls,
            collective_seconds: times.time.as_secs_f64(),
            collective_bytes: times.bytes,
        };
        self.device.split('+').zip(&self.collectives).map(record).collect()
    }

    /// What ranks and hops have moved, as far as they have any.
    fn moved(&self) -> String {
        let megabytes = |bytes: u64| grouped(bytes / 1_000_000);
        let mut text = match self.ranks {
            1 => String::new(),
            ranks => {
                let busy = self.times.parts.busy.as_secs_f64().max(f64::MIN_POSITIVE);
                let share = |times: &CollectiveTimes| {
                    let percent = 100.0 * times.time.as_secs_f64() / busy;
                    format!("{percent:.1} % ({} MB)", megabytes(times.bytes))
                };
                let shares = self.collectives.iter().map(share).collect::<Vec<_>>().join(", ");
                format!(", {ranks} ranks{}: in collectives {shares} of it", exceptions(&self.sharing))
            }
        };
        let HopTimes { hops, bytes, time } = self.times.hops;
        if bytes > 0 {
            let micros = time.as_secs_f64() * 1e6 / hops as f64;
            text += &format!(", {} MB handed on in {micros:.0} µs each", megabytes(bytes));
        }
        text
    }

    fn text(&self, costs: Source) -> String {
        let times = &self.times;
        let restarted = match times.restarts {
            0 => String::new(),
            restarts => format!(", started again {} times", grouped(restarts)),
        };
        let busy = times.parts.busy.as_secs_f64();
        let predicted = match self.predicted {
            0.005.. => format!(", predicted {:.2} s {}", self.predicted, costs.words()),
            _ => String::new(), // Nothing to hold what was measured against.
        };
        let predicted = format!(" ({busy:.2} s{predicted})");
        let replica = self.replica.map_or_else(String::new, |replica| format!("replica {replica} "));
        format!(
            "{replica}{} blocks {}: {}, {} micro-batches of {:.0} tokens{}{restarted}",
            self.device,
            self.part,
            parts(&times.parts, &predicted),
            grouped(times.steps),
            times.tokens as f64 / times.steps.max(1) as f64,
            self.moved(),
        )
    }
}

impl Report {
    /// The report, line by line.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut add = |name: &str, text: String| lines.push(format!("{name:<9} {text}"));
        let resumed = match self.rows_resumed {
            0 => String::new(),
            rows => format!("; {} of them by earlier runs", grouped(rows)),
        };
        let rows = (grouped(self.rows_completed), grouped(self.rows_failed));
        add("rows", format!("{} done, {} failed{resumed}", rows.0, rows.1));
        if let Some(why) = &self.failed {
            add("failed", why.clone());
        }
        if self.stale_lines > 0 {
            let stale = grouped(self.stale_lines);
            add("stale", format!("{stale} lines of rows that have left the input, in stale.jsonl"));
        }
        add(
            "tokens",
            format!(
                "{} of prompts, {} generated",
                grouped(self.prompt_tokens),
                grouped(self.generated_tokens)
            ),
        );
        let seconds = self.run.as_secs_f64();
        let speed = |tokens: u64| rate(if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 });
        let (generated, all) =
            (speed(self.generated_tokens), speed(self.generated_tokens + self.prompt_tokens));
        add("speed", format!("{generated} generated tokens/s, {all} tokens/s with prompts"));
        add("time", format!("{seconds:.2} s, and {:.2} s to load the model", self.load.as_secs_f64()));
        for (index, stage) in self.stages.iter().enumerate() {
            add(&format!("stage {index}"), stage.text(self.costs));
        }
        for (replica, error) in &self.failed_replicas {
            add(&format!("replica {replica}"), format!("was given up, and others took its rows: {error}"));
        }
        if let Some(BetterCut { spans, saved }) = &self.better {
            // Whatever the slowest stage waited for, it would wait for again.
            let percent = 100.0 * saved / (seconds - saved).max(f64::MIN_POSITIVE);
            if percent >= LEAST_GAIN_PERCENT {
                let parts: Vec<Part> = spans.iter().map(|span| (*span).into()).collect();
                add("hint:", format!("stages = {} would be about {percent:.0} % faster", ranges(&parts)));
            }
        }
        let share = |time: Duration| if seconds > 0.0 { 100.0 * time.as_secs_f64() / seconds } else { 0.0 };
        let handling = share(self.handling);
        add("pipeline", format!("scheduling and stop strings took {handling:.2} % of the time"));
        let (reader, writer) = (share(self.reader_cpu), share(self.writer_cpu));
        let text = format!("reading and tokenizing {reader:.2} %, detokenizing and writing {writer:.2} %");
        add("text", format!("{text}, on threads of their own"));
        if let Some(stats) = self.scheduler.filter(|stats| stats.preemptions > 0) {
            add(
                "KV cache",
                format!(
                    "preempted {} times for want of pages, {} tokens computed again",
                    grouped(stats.preemptions),
                    grouped(stats.recomputed_tokens)
                ),
            );
        }
        if let Some(bytes) = self.peak_bytes {
            add("memory", format!("{} MB at most", grouped(bytes / 1_000_000)));
        }
        if let Some(trace) = &self.trace {
            add("trace", trace.clone());
        }
        for text in &self.overrides {
            add("override", text.clone());
        }
        add("output", self.output.clone());
        lines.extend(self.scores.iter().flat_map(score_lines));
        lines
    }
}

/// Such as ` (attention of 2 blocks by sequences)`, where ranks do not share all by heads and by columns.
fn exceptions(sharing: &Sharing) -> String {
    let exceptions = sharing.exceptions();
    let alike = exceptions.alike().map(|Alike { half, how, blocks }| match blocks.len() {
        1 => format!("{half} of 1 block {how}"),
        count => format!("{half} of {count} blocks {how}"),
    });
    match alike.collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => none,
        some => format!(" ({some})"),
    }
}

/// The shares of a stage's wall time: how busy it was, and whatever else there was of it.
fn parts(parts: &StageParts, predicted: &str) -> String {
    let wall = parts.wall().as_secs_f64();
    let share = |time: Duration| if wall > 0.0 { 100.0 * time.as_secs_f64() / wall } else { 0.0 };
    let waits = [
        ("starved", parts.starved),
        ("blocked", parts.blocked),
        ("KV-limited", parts.kv_limited),
        ("tail", parts.tail),
        ("idle", parts.idle),
    ];
    let mut text = format!("busy {:.1} %{predicted}", share(parts.busy));
    for (name, time) in waits.into_iter().filter(|(_, time)| share(*time) >= 0.05) {
        text += &format!(", {name} {:.1} %", share(time));
    }
    text
}

fn score_lines(scores: &Scores) -> Vec<String> {
    let width = scores.kinds.keys().map(|kind| kind.chars().count()).max().unwrap_or(0);
    let line = |(kind, Score { rows, pass_at_1 }): (&String, &Score)| {
        format!("  {kind:<width$}  {pass_at_1:.3} of {} rows", grouped(*rows))
    };
    let mut lines = vec![format!("pass@1 {:.3}", scores.all.pass_at_1)];
    lines.extend(scores.kinds.iter().map(line));
    lines
}

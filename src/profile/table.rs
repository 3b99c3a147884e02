//! A profile as people read it.

use stages::profile::{
    AttentionEntry, Both, ContextPoint, Half, Neighbours, Profile, SharedEntry, TokenPoint,
};
use stages::{Block, ModelConfig};

/// The columns of times, as far as they were measured.
const SHOWN_TOKENS: [usize; 4] = [1, 8, 64, 512];

/// The micro-batch by which shares are told.
const SHARE_TOKENS: usize = 64;

pub(super) fn lines(config: &ModelConfig, profile: &Profile) -> Vec<String> {
    let key = &profile.key;
    let mut lines = vec![format!("device     {}, {} weights, {} KV", key.device, key.weights, key.kv)];
    let last = profile.hop.alone.last().map_or(1, |point| point.tokens);
    let mut shown: Vec<usize> = SHOWN_TOKENS.into_iter().filter(|tokens| *tokens < last).collect();
    shown.push(last);
    let of_tokens: String = shown.iter().map(|tokens| format!("{:>9}", format!("{tokens} tok"))).collect();
    lines.push(format!(
        "{:<26} {:>5} {:>8}  {:<5}{of_tokens} {:>8} {:>6} {:>6}",
        "ms of one", "count", "MB", "", "GFLOP/s", "GB/s", "share"
    ));
    let neighbours: &[Neighbours] = match key.device.devices {
        1 => &[Neighbours::Idle],
        _ => &[Neighbours::Idle, Neighbours::Busy],
    };
    let rows = rows(config, profile);
    for neighbours in neighbours {
        let seconds =
            |row: &Row<'_>| row.count as f64 * at(row.points.get(*neighbours), SHARE_TOKENS).seconds.median;
        let all: f64 = rows.iter().map(seconds).sum();
        for row in &rows {
            lines.push(row.line(*neighbours, &shown, seconds(row) / all));
        }
    }
    for entry in &profile.shared {
        lines.extend(shared_lines(config, entry, &shown));
    }
    for entry in &profile.attention {
        lines.extend(neighbours.iter().flat_map(|neighbours| attention_lines(entry, *neighbours)));
    }
    lines
}

/// A part of the model.
struct Row<'a> {
    name: String,
    /// How often the model has it.
    count: usize,
    weight_bytes: u64,
    points: &'a Both<Vec<TokenPoint>>,
}

fn rows<'a>(config: &ModelConfig, profile: &'a Profile) -> Vec<Row<'a>> {
    let count = |entry: &stages::profile::BlockEntry| {
        config.blocks.iter().filter(|block| entry.shape == (**block).into()).count()
    };
    let mut rows: Vec<Row<'a>> = (profile.blocks.iter())
        .filter(|entry| count(entry) > 0)
        .map(|entry| Row {
            name: entry.shape.to_string(),
            count: count(entry),
            weight_bytes: entry.weight_bytes,
            points: &entry.points,
        })
        .collect();
    let extra = |name: &str, points| Row { name: name.to_owned(), count: 1, weight_bytes: 0, points };
    rows.push(extra("embedding", &profile.embedding));
    rows.push(extra("head and greedy draw", &profile.head));
    rows.push(extra("hop", &profile.hop));
    rows
}

/// The last point of at most so many tokens.
fn at(points: &[TokenPoint], tokens: usize) -> TokenPoint {
    points[points.partition_point(|point| point.tokens <= tokens).max(1) - 1]
}

fn word(neighbours: Neighbours) -> &'static str {
    match neighbours {
        Neighbours::Idle => "alone",
        Neighbours::Busy => "busy",
    }
}

impl Row<'_> {
    /// Rates are those of the largest micro-batch, for operations, and of a single token, for bytes.
    fn line(&self, neighbours: Neighbours, shown: &[usize], share: f64) -> String {
        let points = self.points.get(neighbours);
        let ms: String =
            shown.iter().map(|tokens| format!("{:>9.3}", at(points, *tokens).seconds.median * 1e3)).collect();
        let rate = |rate: f64| if rate > 0.0 { format!("{:.1}", rate / 1e9) } else { "-".to_owned() };
        let flops = points.last().map_or(0.0, |point| point.flops_per_second);
        let bytes = points.first().map_or(0.0, |point| point.bytes_per_second);
        format!(
            "{:<26} {:>5} {:>8.2}  {:<5}{ms} {:>8} {:>6} {:>5.1}%",
            self.name,
            self.count,
            self.weight_bytes as f64 / 1e6,
            word(neighbours),
            rate(flops),
            rate(bytes),
            share * 100.0
        )
    }
}

/// Halves of blocks on a stage of several devices, and what its ranks tell each other: beside busy neighbours, which are the
/// same as no neighbours where the stage has all devices.
fn shared_lines(config: &ModelConfig, entry: &SharedEntry, shown: &[usize]) -> Vec<String> {
    let line = |name: String, count: usize, weight_bytes: u64, points: &[TokenPoint]| {
        let ms: String =
            shown.iter().map(|tokens| format!("{:>9.3}", at(points, *tokens).seconds.median * 1e3)).collect();
        let (count, mb) = (count.to_string(), weight_bytes as f64 / 1e6);
        format!("{name:<26} {count:>5} {mb:>8.2}  {:<5}{ms}", format!("on {}", entry.ranks))
    };
    let count = |half: Half| {
        let has = |block: &&Block| match half {
            Half::Attention(attention) | Half::AttentionBySequences(attention) => {
                block.attention == attention
            }
            Half::Ffn(ffn) => block.ffn == ffn,
        };
        config.blocks.iter().filter(has).count()
    };
    let halves = entry.halves.iter().filter(|half| count(half.half) > 0);
    let mut lines: Vec<String> = halves
        .map(|half| {
            let points = half.points.get(Neighbours::Busy);
            line(half.half.to_string(), count(half.half), half.weight_bytes, points)
        })
        .collect();
    lines.push(line("head and greedy draw".to_owned(), 1, 0, entry.head.get(Neighbours::Busy)));
    lines.push(line("all-reduce".to_owned(), 1, 0, &entry.all_reduce));
    lines.push(line("all-gather".to_owned(), 1, 0, &entry.all_gather));
    lines.push(line("broadcast".to_owned(), 1, 0, &entry.broadcast));
    lines
}

fn attention_lines(entry: &AttentionEntry, neighbours: Neighbours) -> [String; 2] {
    let kind = |name: &str, curve: &Both<Vec<ContextPoint>>| {
        let points = curve.get(neighbours).iter();
        let points: Vec<String> =
            points.map(|point| format!("{:.0}: {:.2}", point.context, point.seconds.median * 1e6)).collect();
        let (kv_heads, word, points) = (entry.kv_heads, word(neighbours), points.join(", "));
        format!("attention, {kv_heads} KV heads, {name}, {word}: us more for a token by context {points}")
    };
    [kind("decode", &entry.decode), kind("prefill", &entry.prefill)]
}

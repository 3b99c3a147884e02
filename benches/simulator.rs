//! How long does the simulator take for a million requests on 64 stages, and does its memory stay flat?
//!
//! The job: prompts of 256 tokens, geometric output lengths of 128 on average, micro-batches of about 256 rows that
//! decode. The baseline is the bar of 60 seconds. A tenth of the job is played first: the whole of it must not
//! need more memory.
//!
//! `cargo bench --bench simulator [-- REQUESTS]`, with nothing else running.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a bench prints")]

use std::time::{Duration, Instant};

use scheduler::{Lengths, Load, Options, Simulated, Simulation, VirtualStage};

const NUM_STAGES: usize = 64;
const ROWS: usize = 256;
const PROMPT_TOKENS: u32 = 256;
const OUTPUT_TOKENS: f64 = 128.0;
const MAX_TOKENS: u32 = 4096;
const BAR_SECONDS: f64 = 60.0;
/// What the allocator may come to hold beside what is needed.
const SLACK_KIB: u64 = 32 << 10;

fn main() {
    let requests = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(1_000_000);
    play(requests / 10);
    let before = peak_kib();
    let (simulated, time) = play(requests);
    let after = peak_kib();

    let slices = simulated.generated_tokens;
    println!(
        "{NUM_STAGES} stages, {requests} requests, {} micro-batches of {:.0} rows, {slices} generated tokens",
        simulated.micro_batches,
        slices as f64 / simulated.micro_batches as f64
    );
    let seconds = time.as_secs_f64();
    println!(
        "{seconds:.1} s, {:.0} ns a generated token, {:.2} of the bar; {:.0} MB at most, {:.0} MB for a tenth",
        seconds * 1e9 / slices as f64,
        seconds / BAR_SECONDS,
        after as f64 / 1024.0,
        before as f64 / 1024.0
    );
    assert!(after <= before + SLACK_KIB, "memory grows with the number of requests");
}

/// Plays so many requests, and checks what came of it.
fn play(requests: u64) -> (Simulated, Duration) {
    let in_flight = NUM_STAGES + 1;
    let options = Options {
        num_stages: NUM_STAGES,
        micro_batch_tokens: 1024,
        max_sequences: ROWS * in_flight,
        num_pages: ROWS * in_flight * 8,
        num_lanes: 1,
        page_tokens: 64,
        context_tokens: (PROMPT_TOKENS + MAX_TOKENS) as usize,
        efficient_tokens: 16,
        num_memories: 1,
        feeds_back: false,
        is_ahead: false,
    };
    // A product that waits for its weights below 300 tokens, and attention; microseconds, as of a 64th of a
    // model on a fast device.
    let seconds =
        |load: Load| 1e-6 * (load.tokens().max(300.0) + 1e-3 * load.decode_tokens * load.decode_context);
    let stage = |device| VirtualStage { device, seconds: Box::new(seconds), hop_seconds: Box::new(|_| 5e-6) };
    let stages = (0..NUM_STAGES).map(stage).collect();
    let window = 2 * options.max_sequences;
    let simulation = Simulation { options, stages, window, max_tokens: MAX_TOKENS };

    let mut drawn = 0;
    let started = Instant::now();
    let lengths = lengths(requests).inspect(|lengths| drawn += u64::from(lengths.output_tokens));
    let simulated = simulation.run(lengths, &mut |_| ()).expect("every request fits");
    let time = started.elapsed();
    assert_eq!((simulated.rows, simulated.generated_tokens), (requests, drawn));
    assert_eq!(simulated.stats.prefill_tokens + simulated.stats.decode_tokens, {
        // The last token of a request is never computed.
        requests * u64::from(PROMPT_TOKENS) + drawn - requests + simulated.stats.recomputed_tokens
    });
    for stage in &simulated.stages {
        assert_eq!(stage.total(), simulated.wall);
    }
    (simulated, time)
}

/// Geometric lengths from a linear congruential generator (Knuth's): the same job on every machine.
fn lengths(requests: u64) -> impl Iterator<Item = Lengths> {
    let mut state = 1u64;
    (0..requests).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (state >> 11) as f64 / (1u64 << 53) as f64;
        let length = 1.0 + ((1.0 - uniform).ln() / (-1.0 / OUTPUT_TOKENS).ln_1p()).floor();
        Lengths { prompt_tokens: PROMPT_TOKENS, output_tokens: length.min(f64::from(MAX_TOKENS)) as u32 }
    })
}

/// The most memory this process has had, in KiB; 0 where the system does not tell.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

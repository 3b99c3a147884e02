//! Simulated jobs against closed forms, and against a plain simulation that goes from moment to moment.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use scheduler::{
    Generated, Lengths, Load, MicroBatch, MicroBatchOutput, Options, Request, RequestKey, Sampling,
    Scheduler, SequenceId, Simulated, Simulation, SliceOutput, Step, VirtualStage,
};

const STOP: u32 = 9;

fn options(num_stages: usize) -> Options {
    Options {
        num_stages,
        micro_batch_tokens: 64,
        max_sequences: 32,
        num_pages: 1000,
        num_lanes: 1,
        page_tokens: 4,
        context_tokens: 400,
        efficient_tokens: 1,
        num_memories: 1,
        feeds_back: false,
        is_ahead: false,
    }
}

/// Stages that take the same for every micro-batch, in milliseconds, and hops.
fn constant(stages_ms: &[(f64, f64)]) -> Vec<VirtualStage<'static>> {
    let stage = |(device, &(compute, hop)): (usize, &(f64, f64))| VirtualStage {
        device,
        seconds: Box::new(move |_| compute * 1e-3),
        hop_seconds: Box::new(move |_| hop * 1e-3),
    };
    stages_ms.iter().enumerate().map(stage).collect()
}

fn rows(count: usize, prompt_tokens: u32, output_tokens: u32) -> Vec<Lengths> {
    vec![Lengths { prompt_tokens, output_tokens }; count]
}

/// Plays a job, and asserts what holds for every one.
fn play(simulation: &Simulation<'_>, rows: &[Lengths]) -> (Simulated, Vec<Step>) {
    let mut steps = vec![];
    let simulated = simulation.run(rows.iter().copied(), &mut |step| steps.push(step)).unwrap();
    assert_eq!(simulated.rows, rows.len() as u64);
    let sum = |part: fn(&Lengths) -> u32| rows.iter().map(|row| u64::from(part(row))).sum::<u64>();
    assert_eq!(simulated.prompt_tokens, sum(|row| row.prompt_tokens));
    let most = simulation.max_tokens;
    let generated: u64 = rows.iter().map(|row| u64::from(row.output_tokens.clamp(1, most))).sum();
    assert_eq!(simulated.generated_tokens, generated, "every row ends at its length");
    for (stage, waits) in simulated.stages.iter().enumerate() {
        assert_eq!(waits.total(), simulated.wall, "{waits:?}");
        let of_stage = || steps.iter().filter(|step| step.stage == stage);
        assert_eq!(waits.busy, of_stage().map(|step| step.end - step.start).sum::<Duration>());
        assert_eq!(of_stage().count() as u64, simulated.micro_batches);
        assert!(of_stage().zip(of_stage().skip(1)).all(|(one, next)| one.end <= next.start), "steps overlap");
    }
    assert!(simulated.tail <= simulated.wall);
    check_timeline(&simulated);
    (simulated, steps)
}

/// The timeline's bins, taken together, are what is said of the whole job.
fn check_timeline(simulated: &Simulated) {
    let timeline = &simulated.timeline;
    let (num_bins, wall) = (timeline.tokens.len(), simulated.wall.as_secs_f64());
    assert!(num_bins <= 256 && timeline.kv.len() == num_bins && timeline.running.len() == num_bins);
    let width = |bin: usize| timeline.bin_seconds.min(wall - bin as f64 * timeline.bin_seconds);
    let integral = |means: &[f64]| means.iter().enumerate().map(|(bin, mean)| mean * width(bin)).sum::<f64>();
    let near = |a: f64, b: f64| assert!((a - b).abs() <= 1e-9 * (1.0 + b.abs()), "{a} and {b}");
    near(integral(&timeline.tokens), simulated.generated_tokens as f64);
    near(integral(&timeline.kv), simulated.kv * wall);
    for (bins, waits) in timeline.stages.iter().zip(&simulated.stages) {
        let sum = |share: fn(&scheduler::Share) -> f64| integral(&bins.iter().map(share).collect::<Vec<_>>());
        near(sum(|share| share.busy), waits.busy.as_secs_f64());
        near(sum(|share| share.starved), waits.starved.as_secs_f64());
        near(sum(|share| share.kv_limited), waits.kv_limited.as_secs_f64());
        near(sum(|share| share.tail), waits.tail.as_secs_f64());
        near(sum(|share| share.idle), waits.idle.as_secs_f64());
        for share in bins {
            near(share.busy + share.starved + share.kv_limited + share.tail + share.idle, 1.0);
        }
    }
}

fn simulation(stages_ms: &[(f64, f64)]) -> Simulation<'static> {
    let options = options(stages_ms.len());
    Simulation { options, stages: constant(stages_ms), window: 64, max_tokens: 100 }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Four stages of two devices, 3 and 5 ms for a micro-batch each: never both stages of a device at once, and the slower device
/// is busy all the time but where the pipeline fills and empties.
#[test]
fn stages_of_one_device_share_its_time() {
    let mut stages = constant(&[(2.0, 0.1), (1.0, 0.1), (1.0, 0.1), (4.0, 0.0)]);
    for (stage, device) in stages.iter_mut().zip([0, 1, 0, 1]) {
        stage.device = device;
    }
    let simulation = Simulation { options: options(4), stages, window: 64, max_tokens: 300 };
    let (simulated, steps) = play(&simulation, &rows(400, 8, 40));
    for device in [0, 1] {
        let mut of_device: Vec<&Step> = steps.iter().filter(|step| step.stage % 2 == device).collect();
        of_device.sort_by_key(|step| step.start);
        assert!(of_device.windows(2).all(|pair| pair[0].end <= pair[1].start), "steps overlap");
    }
    let busy = simulated.stages[1].busy + simulated.stages[3].busy;
    let share = busy.as_secs_f64() / simulated.wall.as_secs_f64();
    assert!(share > 0.9 && share <= 1.0, "{share}");
}

#[test]
fn one_stage_is_busy_from_begin_to_end() {
    // The prompt fills one micro-batch, which draws the first token.
    let (simulated, steps) = play(&simulation(&[(3.0, 0.0)]), &rows(1, 64, 10));
    assert_eq!((simulated.micro_batches, simulated.wall), (10, ms(30)));
    assert_eq!((simulated.stages[0].busy, simulated.tail), (ms(30), ms(30)));
    assert_eq!(steps.iter().map(|step| step.decode_tokens).sum::<usize>(), 9);
}

#[test]
fn one_row_goes_through_one_stage_after_the_other_and_back() {
    let (simulated, steps) = play(&simulation(&[(2.0, 1.0), (3.0, 0.0), (5.0, 1.0)]), &rows(1, 1, 6));
    assert_eq!(simulated.wall, ms(6 * (2 + 1 + 3 + 5 + 1)));
    assert_eq!(steps[4].start, ms(12 + 3));
    // From its admission on nothing waits: it is all tail.
    assert_eq!((simulated.tail, simulated.stages[1].tail), (simulated.wall, simulated.wall - ms(18)));
}

#[test]
fn a_job_without_rows_takes_no_time() {
    let (simulated, steps) = play(&simulation(&[(2.0, 1.0), (3.0, 0.0)]), &[]);
    assert_eq!((simulated.wall, steps.len(), simulated.tokens_per_second()), (Duration::ZERO, 0, 0.0));
    assert!(simulated.timeline.tokens.is_empty());
}

#[test]
fn a_full_pipeline_is_as_fast_as_its_slowest_stage() {
    let (simulated, steps) = play(&simulation(&[(2.0, 0.0), (5.0, 0.0), (3.0, 0.0)]), &rows(2000, 4, 25));
    let micro_batches = simulated.micro_batches;
    let slowest = simulated.stages[1];
    assert_eq!(slowest.busy, ms(5) * micro_batches as u32);
    // It waits while the pipeline fills, and at the end while it drains.
    assert!(slowest.busy.as_secs_f64() > 0.98 * simulated.wall.as_secs_f64(), "{slowest:?}");
    assert_eq!((steps[1].start, slowest.kv_limited, slowest.idle), (ms(2), Duration::ZERO, Duration::ZERO));
    // The others wait for it alone.
    let fast = simulated.stages[0];
    assert!(fast.starved.as_secs_f64() > 0.55 * simulated.wall.as_secs_f64(), "{fast:?}");
}

/// Two GPUs that read their weights in 10 ms, which is what products of 184 rows take; contexts take 40 µs a row. 256 rows are too few
/// for three micro-batches of 184, and even for two.
#[test]
fn gpus_with_few_rows_have_a_micro_batch_each_in_flight() {
    let play_with = |num_memories: usize, efficient_tokens: usize| {
        let mut stages = constant(&[(0.0, 0.2); 2]);
        for stage in &mut stages {
            stage.seconds = Box::new(|load: Load| {
                let products = load.tokens().max(184.0) * 10e-3 / 184.0;
                products + load.decode_tokens * 40e-6
            });
        }
        let options = Options {
            micro_batch_tokens: 512,
            max_sequences: 256,
            num_pages: 100_000,
            num_memories,
            efficient_tokens,
            ..options(2)
        };
        let simulation = Simulation { options, stages, window: 512, max_tokens: 300 };
        play(&simulation, &rows(1024, 4, 200)).0
    };
    let each = play_with(2, 184);
    for waits in &each.stages {
        assert!(waits.busy.as_secs_f64() > 0.96 * each.wall.as_secs_f64(), "{waits:?} of {:?}", each.wall);
    }
    // One that holds all rows leaves a GPU idle; of three each reads the weights as the two did.
    let (one, three) = (play_with(1, 184), play_with(1, 1));
    let (near, seconds) = (|a: f64, b: f64| (a / b - 1.0).abs() < 0.03, each.wall.as_secs_f64());
    assert!(near(one.wall.as_secs_f64() / seconds, 48.7 / 30.6), "{:?} {:?}", one.wall, each.wall);
    assert!(near(three.wall.as_secs_f64() / seconds, 40.2 / 30.6), "{:?} {:?}", three.wall, each.wall);
}

#[test]
fn equal_stages_fill_and_drain_in_a_step_each() {
    // Every prompt fills a micro-batch and wants one token: 20 micro-batches go through 4 stages.
    let (simulated, _) = play(&simulation(&[(10.0, 0.0); 4]), &rows(20, 64, 1));
    assert_eq!((simulated.micro_batches, simulated.wall), (20, ms(10 * (20 + 3))));
    for (stage, waits) in simulated.stages.iter().enumerate() {
        assert_eq!(waits.busy, ms(200));
        // Before the first micro-batch it starves, and after the last one it is the tail.
        let before = ms(10 * stage as u64);
        assert_eq!((waits.starved, waits.tail), (before, ms(30) - before), "{waits:?}");
    }
}

#[test]
fn time_when_everything_is_between_stages_is_idle() {
    let mut lone = simulation(&[(10.0, 5.0)]);
    lone.options.max_sequences = 1;
    let (simulated, _) = play(&lone, &rows(3, 4, 1));
    // More rows would not help: the one micro-batch that a lone stage has is on its way.
    let waits = simulated.stages[0];
    assert_eq!((simulated.wall, waits.idle, waits.tail), (ms(45), ms(15), ms(0)));
}

#[test]
fn too_few_pages_leave_stages_waiting_for_them() {
    let stages = [(10.0, 0.0); 4];
    let mut job = simulation(&stages);
    (job.max_tokens, job.options.efficient_tokens) = (5, 8);
    let plenty = play(&job, &rows(40, 36, 5)).0;
    job.options.num_pages = 22; // Ten pages a row, and one each to grow: two rows at a time.
    let scarce = play(&job, &rows(40, 36, 5)).0;
    assert!(plenty.stages.iter().all(|waits| waits.kv_limited.is_zero()));
    assert!(scarce.wall > 2 * plenty.wall, "{:?} and {:?}", scarce.wall, plenty.wall);
    for waits in &scarce.stages {
        assert!(waits.kv_limited > waits.busy, "{waits:?}");
    }
    assert!(scarce.kv_most > 0.8 && scarce.kv > plenty.kv, "{} {}", scarce.kv_most, scarce.kv);
}

#[test]
fn rows_end_at_their_lengths_or_at_the_job_s_limit() {
    let mut short = simulation(&[(1.0, 0.0), (1.0, 0.0)]);
    short.max_tokens = 7;
    let lengths: Vec<Lengths> =
        (0..30).map(|row| Lengths { prompt_tokens: 1 + row % 5, output_tokens: row }).collect();
    play(&short, &lengths); // Asserts the sum of clipped lengths.
}

#[test]
fn a_row_that_can_never_be_served_is_refused() {
    let refused = simulation(&[(1.0, 0.0)]).run(rows(1, 400, 3), &mut |_| ());
    assert_eq!(refused.unwrap_err().to_string(), "sequence of 401 tokens exceeds the context of 400");
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

#[test]
fn rows_of_unlike_prompts_end_with_their_lane() {
    // Two lanes of 20 positions, and the last token of a row is never computed.
    let options = Options { num_pages: 10, num_lanes: 2, ..options(1) };
    let simulation = Simulation { options, stages: constant(&[(1.0, 0.0)]), window: 4, max_tokens: 18 };
    let rows = [3, 15].map(|prompt_tokens| Lengths { prompt_tokens, output_tokens: 100 });
    let simulated = simulation.run(rows, &mut |_| ()).unwrap();
    assert_eq!(simulated.generated_tokens, 18 + 6);
}

/// A random small case: options, for each stage microseconds of a micro-batch, a token and a hop, and rows.
struct Case {
    options: Options,
    costs: Vec<[u64; 3]>,
    window: usize,
    max_tokens: u32,
    rows: Vec<Lengths>,
}

impl Case {
    fn new(random: &mut Random) -> Self {
        let num_stages = 1 + random.below(4) as usize;
        let max_tokens = 1 + random.below(12) as u32;
        let prompts = 1 + random.below(12);
        let page_tokens = 1 + random.below(4) as usize;
        let needed = (prompts as usize + max_tokens as usize).div_ceil(page_tokens);
        let options = Options {
            num_stages,
            micro_batch_tokens: 1 + random.below(12) as usize,
            max_sequences: 1 + random.below(8) as usize,
            num_pages: needed + random.below(30) as usize,
            num_lanes: 1,
            page_tokens,
            context_tokens: 30,
            efficient_tokens: 1 + random.below(3) as usize,
            num_memories: 1 + random.below(num_stages as u64) as usize,
            feeds_back: false,
            is_ahead: false,
        };
        let rows = (0..random.below(25))
            .map(|_| Lengths {
                prompt_tokens: 1 + random.below(prompts) as u32,
                output_tokens: 1 + random.below(14) as u32,
            })
            .collect();
        let mut costs = || [random.below(20), random.below(5), random.below(6)];
        let costs = (0..num_stages).map(|_| costs()).collect();
        Case { options, costs, window: 1 + random.below(12) as usize, max_tokens, rows }
    }

    fn simulation(&self) -> Simulation<'_> {
        let stage = |(device, &[each, token, hop]): (usize, &[u64; 3])| VirtualStage {
            device,
            seconds: Box::new(move |load: Load| (each as f64 + token as f64 * load.tokens()) * 1e-6),
            hop_seconds: Box::new(move |_| hop as f64 * 1e-6),
        };
        let stages = self.costs.iter().enumerate().map(stage).collect();
        Simulation { options: self.options.clone(), stages, window: self.window, max_tokens: self.max_tokens }
    }
}

/// What a stage does in the plain simulation: `(micro-batch, microsecond it ends at)`.
type Work = Option<(usize, u64)>;

/// Goes from microsecond to microsecond and lets every stage look at its queue: no arithmetic on starts and
/// ends. Returns `(stage, micro-batch, start, end)` of all steps, and the microsecond of the end.
fn plain(case: &Case) -> (Vec<(usize, usize, u64, u64)>, u64) {
    let mut scheduler = Scheduler::new(case.options.clone());
    let num_stages = case.options.num_stages;
    let (mut batches, mut steps): (Vec<MicroBatch>, _) = (vec![], vec![]);
    // Arrivals at each stage, the scheduler last: (microsecond, micro-batch) in the order of sending.
    let mut ways: Vec<Vec<(u64, usize)>> = vec![vec![]; num_stages + 1];
    let mut at: Vec<Work> = vec![None; num_stages];
    let mut lengths: BTreeMap<SequenceId, u32> = BTreeMap::new();
    let (mut next_row, mut offered, mut now, mut end) = (0, 0, 0, 0);
    loop {
        let mut is_quiet = false;
        while !is_quiet {
            is_quiet = true;
            while offered < case.window && next_row < case.rows.len() {
                let id = scheduler.submit(request(case, next_row), Generated::default()).unwrap();
                lengths.insert(id, case.rows[next_row].output_tokens);
                (next_row, offered) = (next_row + 1, offered + 1);
            }
            while let Some(batch) = scheduler.next_micro_batch() {
                ways[0].push((now, batches.len()));
                batches.push(batch);
            }
            for stage in 0..num_stages {
                if let Some((batch, ends)) = at[stage]
                    && ends == now
                {
                    ways[stage + 1].push((now + case.costs[stage][2], batch));
                    at[stage] = None;
                    is_quiet = false;
                }
                if at[stage].is_none() && ways[stage].first().is_some_and(|(arrives, _)| *arrives <= now) {
                    let (_, batch) = ways[stage].remove(0);
                    let [each, token, _] = case.costs[stage];
                    let ends = now + each + token * batches[batch].num_tokens() as u64;
                    steps.push((stage, batch, now, ends));
                    at[stage] = Some((batch, ends));
                    is_quiet = false;
                }
            }
            if ways[num_stages].first().is_some_and(|(arrives, _)| *arrives <= now) {
                let (_, batch) = ways[num_stages].remove(0);
                let completed = scheduler.complete(answer(&batches[batch], &lengths), |_, _| false);
                offered -= completed.len();
                end = now;
                is_quiet = false;
            }
        }
        if scheduler.num_in_flight() == 0 {
            return (steps, end);
        }
        now += 1;
    }
}

fn request(case: &Case, row: usize) -> Arc<Request> {
    let sampling = Sampling { stop_token_ids: vec![STOP], ..Sampling::greedy(case.max_tokens) };
    let prompt = vec![3; case.rows[row].prompt_tokens as usize];
    Arc::new(Request { key: RequestKey(row as u128), prompt, sampling: Arc::new(sampling), sample: 0 })
}

fn answer(batch: &MicroBatch, lengths: &BTreeMap<SequenceId, u32>) -> MicroBatchOutput {
    let slices = batch.slices.iter().map(|slice| {
        let positions = slice.first_position as usize + slice.tokens.len();
        let drawn = (positions + 1).saturating_sub(slice.request.prompt.len()); // Of no meaning within a prompt.
        let token = if drawn >= lengths[&slice.sequence] as usize { STOP } else { 3 };
        SliceOutput {
            sequence: slice.sequence,
            token: slice.sample.then_some(token),
            logprobs: None,
            prompt_logprobs: vec![],
            failure: None,
        }
    });
    MicroBatchOutput { id: batch.id, slices: slices.collect() }
}

#[test]
fn random_small_jobs_go_as_in_a_plain_simulation() {
    let (mut preemptions, mut limited) = (0, Duration::ZERO);
    for seed in 0..400 {
        let case = Case::new(&mut Random(seed));
        let (simulated, steps) = play(&case.simulation(), &case.rows);
        let us = |time: Duration| time.as_micros() as u64;
        let mut simple: Vec<_> = (steps.iter())
            .map(|step| (step.stage, step.micro_batch as usize, us(step.start), us(step.end)))
            .collect();
        simple.sort_unstable();
        let (mut expected, end) = plain(&case);
        expected.sort_unstable();
        assert_eq!((simple, us(simulated.wall)), (expected, end), "seed {seed}");
        preemptions += simulated.stats.preemptions;
        limited += simulated.stages[0].kv_limited;
    }
    assert!(preemptions > 0 && !limited.is_zero(), "the cases are too easy: {preemptions} {limited:?}");
}

#[test]
fn the_same_input_gives_the_same_result_however_it_is_observed() {
    let case = Case::new(&mut Random(77));
    let (first, _) = play(&case.simulation(), &case.rows);
    let calls = Rc::new(RefCell::new(0));
    let counted = calls.clone();
    let second =
        case.simulation().run(case.rows.iter().copied(), &mut |_| *counted.borrow_mut() += 1).unwrap();
    assert_eq!(first, second);
    assert_eq!(*calls.borrow(), first.micro_batches * case.options.num_stages as u64);
}

//! A stage of two ranks: the first is here, and the other a thread beside it, or a process of its own that meets it by TCP and is told
//! of steps through a pipe, as a job's ranks are.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use scheduler::{MicroBatch, TokenId};
use stages::{
    Array, Collective, CollectiveClock, Device, Exceptions, GroupExit, Model, RankGroup, RankStep, Sharing,
    StageOutput, TcpRank, load_first_rank, load_follower, rank_steps, thread_ranks,
};

use super::{DTYPES, STEPS, Times, WARM_UP, all, device, median, micro_batch, options};

const PATIENCE: Duration = Duration::from_secs(60);
/// The argument by which the bench becomes the second rank's process, and what that says when it has loaded.
const FOLLOW: &str = "follow";
const READY: &str = "ready";
/// The number of the only group there is.
const GROUP: u64 = 1;

/// Where the second rank runs.
#[derive(Clone, Copy)]
pub(super) enum Home {
    Threads,
    Processes,
}

/// What the second rank's process is told, where this is one: the model's folder, the first rank's address, a core, and which
/// blocks are not shared as most are.
pub(super) fn asked_to_follow(args: &[String]) -> Option<&[String; 4]> {
    let (first, others) = args.split_first()?;
    others.try_into().ok().filter(|_| first == FOLLOW)
}

/// Is the second rank until its input ends, which names micro-batches; its last word is the nanoseconds that went to collectives.
pub(super) fn follow([folder, leader, core, exceptions]: &[String; 4]) -> Result<()> {
    let collective = TcpRank::join(leader.parse()?, 1, 2, GROUP, PATIENCE)?;
    let model = Model::open(Path::new(folder), true)?.0;
    let sharing = serde_json::from_str::<Exceptions>(exceptions)?.into();
    let clock = Arc::default();
    let group = group(collective, &sharing, &clock);
    let mut follower = load_follower(&model, &device(core.parse()?), DTYPES, options(all(&model)), group)?;
    println!("{READY}");
    for id in std::io::stdin().lines() {
        follower.follow(&RankStep::of(&micro_batch(id?.parse()?), true))?;
    }
    println!("{}", clock.read().time.as_nanos());
    Ok(())
}

/// Times, and the tokens that all micro-batches draw.
pub(super) fn in_threads(model: &Model, devices: &[Device], sharing: &Sharing) -> (Times, Vec<TokenId>) {
    let loaded = Barrier::new(2);
    let clocks: [Arc<CollectiveClock>; 2] = Default::default();
    let (mut times, drawn) = std::thread::scope(|scope| {
        let mut ranks = thread_ranks(2, PATIENCE).into_iter();
        let (first, second) = (ranks.next().expect("two"), ranks.next().expect("two"));
        let (sender, steps) = rank_steps();
        let (loaded, clocks) = (&loaded, &clocks);
        scope.spawn(move || {
            let group = group(second, sharing, &clocks[1]);
            let follower = load_follower(model, &devices[1], DTYPES, options(all(model)), group);
            let mut follower = follower.expect("it loads");
            loaded.wait();
            steps.for_each(|step| follower.follow(&step).expect("a step"));
        });
        let own = scope.spawn(move || {
            let tell = |batch: &MicroBatch| {
                sender.send(Arc::new(RankStep::of(batch, true))).expect("the other rank is there");
            };
            let wait = || {
                loaded.wait();
            };
            lead(model, &devices[0], group(first, sharing, &clocks[0]), wait, tell)
        });
        own.join().expect("it ends")
    });
    times.collectives = clocks.iter().map(|clock| clock.read().time).collect();
    (times, drawn)
}

/// The same with a process; the model is in a folder.
///
/// # Errors
/// What a process can fail in.
pub(super) fn in_processes(
    (model, folder): (&Model, &Path),
    devices: &[Device],
    sharing: &Sharing,
) -> Result<(Times, Vec<TokenId>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let Device::Cpu { cores, .. } = &devices[1] else { bail!("found {:?}, expected a core", devices[1]) };
    let mut other = Command::new(std::env::current_exe()?)
        .arg(FOLLOW)
        .arg(folder)
        .args([listener.local_addr()?.to_string(), cores[0].to_string()])
        .arg(serde_json::to_string(&sharing.exceptions())?)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut orders = other.stdin.take().context("its input")?;
    let mut words = BufReader::new(other.stdout.take().context("its output")?).lines();
    let clock = Arc::default();
    let group = group(TcpRank::lead(&listener, 2, GROUP, PATIENCE, || None)?, sharing, &clock);
    let wait = || assert_eq!(words.next().expect("a word").expect("a line"), READY);
    let tell = |batch: &MicroBatch| writeln!(orders, "{}", batch.id.0).expect("the other rank is there");
    // On a thread of its own, as ranks pin theirs to their cores.
    let (mut times, drawn) = std::thread::scope(|scope| {
        scope.spawn(|| lead(model, &devices[0], group, wait, tell)).join().expect("it ends")
    });
    drop(orders);
    let nanos = words.next().context("it ended without a last word")??.parse()?;
    ensure!(other.wait()?.success(), "the second rank failed");
    times.collectives = vec![clock.read().time, Duration::from_nanos(nanos)];
    Ok((times, drawn))
}

fn group(
    collective: impl Collective<Array> + 'static,
    sharing: &Sharing,
    clock: &Arc<CollectiveClock>,
) -> RankGroup {
    RankGroup {
        collective: Box::new(collective),
        sharing: sharing.clone(),
        clock: Arc::clone(clock),
        exit: GroupExit::default(),
    }
}

/// Takes all steps as the first rank, and tells the other of each; `wait` is over when that has loaded.
fn lead(
    model: &Model,
    device: &Device,
    group: RankGroup,
    wait: impl FnOnce(),
    mut tell: impl FnMut(&MicroBatch),
) -> (Times, Vec<TokenId>) {
    let mut stage = load_first_rank(model, device, DTYPES, options(all(model)), group).expect("it loads");
    wait();
    let (mut begun, mut drawn, mut steps) = (Instant::now(), Vec::new(), Vec::new());
    for id in 0..STEPS {
        if id == WARM_UP as u64 {
            begun = Instant::now();
        }
        let batch = micro_batch(id);
        tell(&batch);
        let step = Instant::now();
        let StageOutput::Tokens(output) = stage.step(&batch, None).expect("a step") else {
            panic!("the stage is the last")
        };
        steps.push(step.elapsed().as_secs_f64());
        drawn.extend(output.slices.iter().filter_map(|slice| slice.token));
    }
    let micro_batch = begun.elapsed().as_secs_f64() / (STEPS as usize - WARM_UP) as f64;
    (Times { micro_batch, steps: vec![median(&steps)], collectives: Vec::new() }, drawn)
}

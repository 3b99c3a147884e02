//! The process that is a stage: its device thread, with a link to the next stage's process.

use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam::channel::{Sender, bounded};
use scheduler::{MicroBatchId, MicroBatchOutput};
use stages::{CollectiveClock, CollectiveTimes, Frame};

use super::wire::{End, FLUSH, JOIN, LOST, Order, Word};
use crate::child::beat;
use crate::clock::StepWork;
use crate::device_thread::{DeviceThread, LoadStage, Next, WayBack, Witness};
use crate::ranks::{Done, RankHome, RanksArgs, Watch};
use crate::stage::{Flush, StageEnd, Work, mailbox_size};
use crate::stage_set::Lost;
use crate::tcp_link::{OnFailure, OwnGate, TcpInlet, TcpLink};
use crate::thread::{lock, spawn};
use crate::wire;

/// What a process does that is a stage: reads its order and then orders from `input`, and says to `output` what it is at, and
/// why it ends. Ends the process when its input ends, whatever it is at: a stage that hangs must not outlive who started it.
///
/// # Errors
/// What it has also said to `output`.
pub fn serve_stage(
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
) -> Result<(), String> {
    let voice = Voice(wire::Voice::new(output));
    serve(BufReader::new(input), &voice).inspect_err(|message| {
        voice.end(End { message: message.clone(), is_panic: false, micro_batch: None });
    })
}

/// Says words, from any thread.
#[derive(Clone)]
struct Voice(wire::Voice);

impl Voice {
    fn say(&self, word: &Word) {
        let (kind, body) = word.encode();
        self.0.say(kind, &body);
    }

    fn end(&self, end: End) {
        self.say(&Word::End(end));
    }

    /// What ends the process where something of the stage's ways is of no more use.
    fn failure(&self, what: String) -> OnFailure {
        let voice = self.clone();
        Arc::new(move |message| {
            voice.end(End { message: format!("{what}: {message}"), is_panic: false, micro_batch: None });
            std::process::exit(1)
        })
    }

    /// What says each step of a rank.
    fn of_ranks(&self) -> Arc<dyn Fn(usize, Done) + Send + Sync> {
        let voice = self.clone();
        Arc::new(move |rank, done| voice.say(&Word::RankStep(rank, done)))
    }
}

impl WayBack for Voice {
    fn bring(&self, output: MicroBatchOutput) {
        self.say(&Word::Tokens(output));
    }
}

/// The keeper, as the device thread sees it.
struct Far {
    voice: Voice,
    /// Of each rank.
    collectives: Vec<Arc<CollectiveClock>>,
    /// What of these was told.
    told: Mutex<Vec<CollectiveTimes>>,
}

impl Witness for Far {
    fn begins(&self, micro_batch: MicroBatchId) {
        self.voice.say(&Word::Begins(micro_batch));
    }

    fn hands_on(&self, work: &StepWork, _: Option<Duration>) {
        // What comes from another process is there before a step begins.
        let mut told = lock(&self.told);
        let since = |(clock, told): (&Arc<CollectiveClock>, &mut CollectiveTimes)| {
            let now = clock.read();
            let before = std::mem::replace(told, now);
            CollectiveTimes {
                calls: now.calls - before.calls,
                bytes: now.bytes - before.bytes,
                time: now.time - before.time,
            }
        };
        let since = self.collectives.iter().zip(told.iter_mut()).map(since).collect();
        self.voice.say(&Word::HandsOn(*work, since));
    }

    fn computes_in_vain(&self) {
        self.voice.say(&Word::ComputesInVain);
    }

    fn rests(&self) {
        self.voice.say(&Word::Rests);
    }

    fn ends(&self, end: StageEnd) {
        self.voice.end(End::of(&end));
    }
}

fn serve(mut input: impl Read + Send + 'static, voice: &Voice) -> Result<(), String> {
    let mut body = Vec::new();
    Frame::read(&mut input, &mut body).map_err(|e| format!("read what to do: {e}"))?;
    let order = Order::decode(&body).ok_or("it was told what it does not understand")?;
    order.span.install_faults()?;
    let beats = voice.clone();
    let _beating = beat(move || beats.say(&Word::Beat));
    let (stage, size) = (order.span.stage, mailbox_size(order.num_stages));
    // Room for what a link that was left behind has still brought.
    let (work, orders) = bounded(2 * size);
    let hops = voice.clone();
    let on_hop = Arc::new(move |bytes, time| hops.say(&Word::Hop { bytes, time }));
    let (gate, to_next) = (OwnGate::default(), voice.failure(format!("the way to stage {}", stage + 1)));
    let link = TcpLink::new(size, order.span.patience, Arc::clone(&gate), on_hop, to_next);
    let lost = Lost::default();
    lost.all_before(MicroBatchId(order.lost_before));
    let listening =
        Listening { group: order.span.group, link: link.clone(), lost: lost.clone(), work: work.clone() };
    let flushes = voice.clone();
    spawn("orders", move || listening.run(input, &flushes));

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|e| e.to_string())?;
    let port = listener.local_addr().map_err(|e| e.to_string())?.port();
    let on_damage = voice.failure(format!("what came from stage {}", stage.saturating_sub(1)));
    let (group, patience) = (order.span.group, order.span.patience);
    let inlet =
        TcpInlet { group, credits: size, patience, work, gate: gate.clone(), lost: lost.clone(), on_damage };
    inlet.listen(listener);

    let watch =
        Watch::from_afar(stage, order.devices.len(), order.tells_rank_steps.then(|| voice.of_ranks()));
    let collectives = watch.clocks().to_vec();
    let args = ranks(&order, watch)?;
    let is_last = args.options.part.is_last(&args.model.config);
    // Neighbours are told of each other when both are loaded.
    let load: LoadStage = Arc::new(move || {
        jobs::faults::load(args.stage, None);
        let stage = args.load()?;
        stage.gate().into_iter().for_each(|own| drop(gate.set(own)));
        Ok(stage)
    });
    let next = if is_last { Next::Pipeline(Box::new(voice.clone())) } else { Next::Stage(Box::new(link)) };
    let told = Mutex::new(vec![CollectiveTimes::default(); collectives.len()]);
    let witness = Far { voice: voice.clone(), collectives, told };
    let is_ready = |loaded: crate::error::Result<()>| match loaded {
        Ok(()) => {
            voice.say(&Word::Ready { port });
            true
        }
        Err(error) => {
            voice.end(End::of(&error.into()));
            false
        }
    };
    DeviceThread { index: stage, work: orders, next, witness, lost }.run(&load, is_ready);
    Ok(())
}

/// The stage's ranks, with its model as this process finds it.
fn ranks(order: &Order, watch: Watch) -> Result<RanksArgs, String> {
    let span = &order.span;
    Ok(RanksArgs {
        stage: span.stage,
        model: span.open_model()?,
        devices: order.devices.clone(),
        dtypes: span.dtypes,
        options: span.options,
        sharing: span.sharing.clone(),
        home: if order.ranks_are_processes { RankHome::Processes } else { RankHome::Threads },
        patience: span.patience,
        watch,
        weights: Arc::default(),
    })
}

/// Hears orders.
struct Listening {
    group: u64,
    link: TcpLink,
    lost: Lost,
    work: Sender<Work>,
}

impl Listening {
    /// Ends the process when there is nobody any more to give orders.
    fn run(self, mut input: impl Read, voice: &Voice) -> ! {
        let mut body = Vec::new();
        while let Ok(frame) = Frame::read(&mut input, &mut body) {
            // What is lost is so before whatever was waited for comes to an end.
            self.lost.all_before(MicroBatchId(frame.sequence));
            match frame.kind {
                FLUSH => {
                    let voice = voice.clone();
                    let flush = Flush::answered_by(move || voice.say(&Word::Flushed));
                    let _ = self.work.send(Work::Flush(flush)); // A stage that ends says so itself.
                }
                JOIN => {
                    let address = std::str::from_utf8(&body).ok().and_then(|text| text.parse().ok());
                    if let Some(address) = address {
                        self.join(address, voice);
                    }
                }
                LOST => {}
                _ => break,
            }
        }
        std::process::exit(0)
    }

    /// A stage without a way to the next is of no use, and what it pushed would be waited for for ever.
    fn join(&self, address: SocketAddr, voice: &Voice) {
        if let Err(error) = self.link.join(address, self.group) {
            let message = format!("no way to the next stage at {address}: {error}");
            voice.end(End { message, is_panic: false, micro_batch: None });
            std::process::exit(1)
        }
    }
}

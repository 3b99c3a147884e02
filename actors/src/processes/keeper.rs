//! The thread beside a stage's actor that keeps its process: starts it, gives it orders, and hears what it says.

use std::collections::VecDeque;
use std::io::BufReader;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ChildStdout;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use scheduler::MicroBatchId;
use stages::Frame;
use tokio::sync::oneshot;

use super::wire::{End, FLUSH, JOIN, LOST, Order, Word};
use super::{ProcessArgs, ProcessEnds};
use crate::child::{BEAT_EVERY, Child};
use crate::clock::AtWork;
use crate::device_thread::{Here, WayBack, Witness};
use crate::error::{Error, Result};
use crate::link::Link;
use crate::stage::{Flush, Join, StageEnd, Work, mailbox_size};
use crate::stage_set::Lost;
use crate::tcp_link::TcpLink;
use crate::thread::{lock, spawn};

/// The subcommand by which this program becomes a stage.
const SUBCOMMAND: &str = "stage";

/// All that the thread works with.
pub(crate) struct Keeper {
    pub(crate) args: Arc<ProcessArgs>,
    pub(crate) ends: ProcessEnds,
    pub(crate) work: Receiver<Work>,
    pub(crate) witness: Here,
    pub(crate) lost: Lost,
}

/// Those who wait for what came before to be dealt with, in order.
type Flushes = Arc<Mutex<VecDeque<Flush>>>;

impl Keeper {
    /// Starts the thread; `ready` hears when the process has its span, or why it could not be.
    pub(crate) fn spawn(self, ready: oneshot::Sender<Result<()>>) {
        let name = format!("stage-{}", self.witness.index);
        spawn(name, move || self.run(ready));
    }

    fn run(self, ready: oneshot::Sender<Result<()>>) {
        let Keeper { args, ends, work, witness, lost } = self;
        let stage = args.ranks.stage;
        // All lives of all stages of a pipeline know each other by the process that started them.
        let group = u64::from(std::process::id());
        let order = Order::of(&args, group, lost.next()).encode();
        let (mut process, stdout) = match Child::start(SUBCOMMAND, &order, args.ranks.patience) {
            Ok(started) => started,
            Err(message) => return drop(ready.send(Err(Error::Load { stage, message }))),
        };
        let (flushes, at_work) = (Flushes::default(), Arc::clone(&witness.at_work));
        let (first_word, loaded) = bounded(1);
        let ear = Ear { args: Arc::clone(&args), ends, witness, flushes: Arc::clone(&flushes), first_word };
        let is_first = ear.ends.is_first;
        spawn(format!("stage-{stage}-ear"), move || ear.hear(stdout));

        let loaded = wait_until_loaded(stage, &loaded, &at_work, args.ranks.patience);
        let link = TcpLink::of_pipeline(mailbox_size(args.num_stages), args.ranks.patience);
        let joined = loaded.and_then(|address| match is_first {
            true => link.join(address, group).map_err(|e| Error::Load { stage, message: e.to_string() }),
            false => Ok(()),
        });
        let is_joined = joined.is_ok();
        // Nobody waits for the answer any more when the start was given up.
        if ready.send(joined).is_err() || !is_joined {
            return;
        }
        // Where it is gone, its end is on its way.
        let mut tell = |kind, body: &[u8]| drop(process.tell(kind, lost.next().0, body));
        // Ends when the actor is gone, and with it the sender of work; and the process with it.
        for work in &work {
            match work {
                Work::Step(step) => link.push(step.batch, step.input),
                Work::Flush(flush) => {
                    lock(&flushes).push_back(flush);
                    tell(FLUSH, &[]);
                }
                Work::Lost => tell(LOST, &[]),
                Work::Join(Join(address)) => tell(JOIN, address.to_string().as_bytes()),
            }
        }
    }
}

/// Waits until a stage's process is loaded or says why it is not, however long it takes, as long as it says that it is there.
fn wait_until_loaded(
    stage: usize,
    loaded: &Receiver<Result<SocketAddr>>,
    at_work: &AtWork,
    patience: Duration,
) -> Result<SocketAddr> {
    at_work.beat(); // It was just started.
    loop {
        match loaded.recv_timeout(BEAT_EVERY) {
            Ok(loaded) => return loaded,
            Err(RecvTimeoutError::Disconnected) => return Err(Error::Ended("a stage's process")),
            Err(RecvTimeoutError::Timeout) if at_work.give_up_after(patience) => {
                let message = format!("its process was not heard of for {patience:?} while it loaded");
                return Err(Error::Load { stage, message });
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// Hears what a process says, on a thread of its own.
struct Ear {
    args: Arc<ProcessArgs>,
    ends: ProcessEnds,
    witness: Here,
    flushes: Flushes,
    /// Is told where it takes micro-batches, or why it does not.
    first_word: Sender<Result<SocketAddr>>,
}

impl Ear {
    /// Until it ends, one way or another.
    fn hear(self, stdout: ChildStdout) {
        let mut stdout = BufReader::new(stdout);
        let mut body = Vec::new();
        let mut end = None;
        while let Ok(frame) = Frame::read(&mut stdout, &mut body) {
            match Word::decode(frame.kind, &body) {
                Some(Word::End(said)) => {
                    end = Some(said);
                    break;
                }
                Some(word) => self.take(word),
                None => {
                    let message = "its process said what nobody understands".to_owned();
                    end = Some(End { message, is_panic: true, micro_batch: None });
                    break;
                }
            }
        }
        let at = self.witness.at_work.micro_batch();
        let killed = || End {
            message: "its process ended".to_owned(),
            is_panic: false,
            micro_batch: at.map(|id| id.0),
        };
        self.ended(&end.unwrap_or_else(killed));
    }

    fn take(&self, word: Word) {
        self.witness.at_work.beat();
        match word {
            Word::Ready { port } => {
                let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                let _ = self.ends.address.set(address); // A process says so once.
                let _ = self.first_word.try_send(Ok(address));
            }
            Word::Beat => {}
            Word::Begins(micro_batch) => self.witness.begins(micro_batch),
            Word::HandsOn(work, collectives) => {
                let clocks = self.args.ranks.watch.clocks();
                clocks.iter().zip(collectives).for_each(|(clock, times)| clock.add(times));
                self.witness.hands_on(&work, None);
            }
            Word::RankStep(rank, done) => self.args.ranks.watch.tell(rank, done),
            Word::ComputesInVain => self.witness.computes_in_vain(),
            Word::Rests => self.witness.rests(),
            Word::Hop { bytes, time } => self.ends.hops.add(bytes, time),
            Word::Flushed => {
                if let Some(flush) = lock(&self.flushes).pop_front() {
                    flush.answer();
                }
            }
            Word::Tokens(output) => self.ends.tokens.bring(output),
            Word::End(end) => self.ended(&end),
        }
    }

    fn ended(&self, end: &End) {
        let stage = self.args.ranks.stage;
        let is_loaded = self.ends.address.get().is_some();
        let error = end.error(stage, is_loaded);
        self.witness.computes_in_vain();
        if self.first_word.try_send(Err(error.clone())).is_ok() && !is_loaded {
            return; // Who waits for it to be there hears of it.
        }
        let micro_batch = end.micro_batch.map(MicroBatchId);
        self.witness.ends(StageEnd { error, micro_batch });
    }
}

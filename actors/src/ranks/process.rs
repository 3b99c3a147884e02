//! Ranks that are processes of their own: this program again, which is told by its standard input what to do, and meets the others
//! by TCP on this host.
//!
//! A rank's input ends with the process that started it, and its connections with any rank, so that none is left
//! behind. What it has to say comes by its standard output.

use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, unbounded};
use stages::{CollectiveClock, Follower, Frame, GroupExit, RankGroup, RankStep, TcpRank};

use super::threads::{Loaded, follow};
use super::watch::Doing;
use super::wire::{Order, Word, decode_step, encode_step};
use super::{RankEnd, RankLink, RanksArgs, cause, ended};
use crate::child::{Child, beat};
use crate::error::with_causes;
use crate::thread::spawn;
use crate::wire::Voice;

/// The subcommand by which this program becomes a rank.
const SUBCOMMAND: &str = "rank";

/// A process that follows the first rank. It is ended with the stage.
struct ProcessRank {
    child: Child,
    num_steps: u64,
    end: RankEnd,
}

impl RankLink for ProcessRank {
    fn tell(&mut self, step: &Arc<RankStep>) -> bool {
        self.num_steps += 1;
        self.child.tell(0, self.num_steps, &encode_step(step)).is_ok()
    }

    fn end(&self) -> &RankEnd {
        &self.end
    }
}

/// Loads the first rank here, with its way out of the group, and has a process started for each other.
pub(super) fn load(args: &RanksArgs, exit: &GroupExit) -> stages::Result<Loaded> {
    let failed = |rank: usize, message: String| stages::Error::Rank { rank, message };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|e| failed(0, e.to_string()))?;
    let leader = listener.local_addr().map_err(|e| failed(0, e.to_string()))?;
    let num_ranks = args.devices.len();
    // Whoever came by a port that another group had before has another number.
    let group = u64::from(leader.port()) << 32 | u64::from(std::process::id());
    let mut others = Vec::new();
    let mut loading = Vec::new();
    for rank in 1..num_ranks {
        let (other, words) = start(args, rank, leader, group).map_err(|message| failed(rank, message))?;
        others.push(other);
        loading.push(words);
    }
    let ends: Vec<&RankEnd> = others.iter().map(|other| &other.end).collect();
    let blamed = |error: stages::Error| match error.is_of_other_rank().then(|| cause(&ends)).flatten() {
        Some((rank, message)) => failed(rank, message),
        None => error,
    };
    let collective = TcpRank::lead(&listener, num_ranks, group, args.patience, || ended(&ends));
    // Loaded with the collective in hand: the others join before they load.
    let collective = Box::new(collective.map_err(|e| blamed(e.into()))?);
    let first = stages::load_first_rank(
        &args.model,
        &args.devices[0],
        args.dtypes,
        args.options,
        RankGroup {
            collective,
            sharing: args.sharing.clone(),
            clock: args.watch.clock(0),
            exit: exit.clone(),
        },
    );
    let first = first.map_err(blamed)?;
    for (rank, words) in (1..).zip(loading) {
        wait_until_ready(&words, args.patience).map_err(|message| failed(rank, message))?;
    }
    Ok((first, others.into_iter().map(|other| Box::new(other) as Box<dyn RankLink>).collect()))
}

/// Waits until a process has loaded its part, however long it takes, as long as it says that it is there.
fn wait_until_ready(words: &Receiver<Word>, patience: Duration) -> Result<(), String> {
    loop {
        match words.recv_timeout(patience) {
            Ok(Word::Beat) => {}
            Ok(Word::Ready | Word::Done(_)) => return Ok(()),
            Ok(Word::End { message, .. }) => return Err(message),
            Err(RecvTimeoutError::Timeout) => {
                return Err(format!("its process was not heard of for {patience:?} while it loaded"));
            }
            Err(RecvTimeoutError::Disconnected) => return Err("its process ended while it loaded".to_owned()),
        }
    }
}

/// Starts a rank's process and tells it what it is. What it says until it is loaded comes by the channel, its end to [`RankEnd`].
fn start(
    args: &RanksArgs,
    rank: usize,
    leader: SocketAddr,
    group: u64,
) -> Result<(ProcessRank, Receiver<Word>), String> {
    let order = Order::of(args, rank, leader, group).encode();
    let (child, stdout) = Child::start(SUBCOMMAND, &order, args.patience)?;
    let end = RankEnd::default();
    let other = ProcessRank { child, num_steps: 0, end: end.clone() };
    let (first_words, words) = unbounded();
    let watch = args.watch.clone();
    let listen = move || {
        let mut stdout = BufReader::new(stdout);
        let mut body = Vec::new();
        while Frame::read(&mut stdout, &mut body).is_ok() {
            let Some(word) = Word::decode(&body) else { break };
            match &word {
                Word::Beat | Word::Ready => {}
                Word::Done(done) => {
                    watch.tell_from_afar(rank, *done);
                    continue;
                }
                Word::End { message, is_consequence } => end.tell(message.clone(), *is_consequence),
            }
            let _ = first_words.send(word); // Later words are ends, which were told.
        }
        end.tell("its process ended".to_owned(), false);
    };
    spawn(format!("stage-{}.{rank}", args.stage), listen);
    Ok((other, words))
}

/// What a process does that is a rank: reads its order and then step after step from `input`, and says to `output` that it is
/// ready, or why it ends. Ends the process when its input ends, whatever it is at: a rank that hangs must not outlive
/// who started it.
///
/// # Errors
/// What it has also said to `output`.
pub fn serve_rank(
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
) -> Result<(), String> {
    let voice = Voice::new(output);
    let mut follower = None;
    let outcome = serve(input, &voice, &mut follower);
    let outcome = outcome.map_err(|(message, is_consequence)| {
        Word::End { message: message.clone(), is_consequence }.say(&voice);
        message
    });
    // Not before: with it goes the connection, by which others see that it is gone.
    drop(follower);
    outcome
}

fn serve(
    input: impl Read + Send + 'static,
    voice: &Voice,
    follower: &mut Option<Box<dyn Follower>>,
) -> Result<(), (String, bool)> {
    let mut input = BufReader::new(input);
    let mut body = Vec::new();
    let own = |message: String| (message, false);
    Frame::read(&mut input, &mut body).map_err(|e| own(format!("read what to do: {e}")))?;
    let order =
        Order::decode(&body).ok_or_else(|| own("it was told what it does not understand".to_owned()))?;
    let Order { span, rank, num_ranks, leader, device } = order;
    let beats = voice.clone();
    let (beating, steps) = (beat(move || Word::Beat.say(&beats)), listen(input));
    span.install_faults().map_err(own)?;
    jobs::faults::load(span.stage, Some(rank));
    let collective =
        TcpRank::join(leader, rank, num_ranks, span.group, span.patience).map_err(|e| own(e.to_string()))?;
    jobs::faults::load(span.stage, Some(rank));
    let model = span.open_model().map_err(own)?;
    let clock = Arc::new(CollectiveClock::default());
    // Whoever gives this rank up ends its process.
    let exit = GroupExit::default();
    let group = RankGroup {
        collective: Box::new(collective),
        sharing: span.sharing,
        clock: Arc::clone(&clock),
        exit,
    };
    let loaded = stages::load_follower(&model, &device, span.dtypes, span.options, group);
    let follower = follower.insert(loaded.map_err(|e| own(with_causes(&e)))?);
    drop(beating); // From now on it is the first rank that is watched.
    Word::Ready.say(voice);
    for body in steps {
        let step = decode_step(&body)
            .ok_or_else(|| own("it was told a step that it does not understand".to_owned()))?;
        let doing = Doing::begin(&clock);
        follow(&mut **follower, span.stage, rank, &step)?;
        Word::Done(doing.end(&clock, &step)).say(voice);
    }
    Ok(())
}

/// The bodies of all that comes in, from a thread that does nothing else and ends the process when there is no more.
fn listen(mut input: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, steps) = unbounded();
    let read = move || {
        let mut body = Vec::new();
        while Frame::read(&mut input, &mut body).is_ok() {
            // Where nobody takes it, the rank is about to end by itself.
            let _ = sender.send(std::mem::take(&mut body));
        }
        std::process::exit(0)
    };
    spawn("orders", read);
    steps
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::sync::Mutex;
    use std::{io, mem};

    use scheduler::Span;
    use stages::{Device, Dtypes, KvDtype, Model, PAGE_TOKENS, SpanOptions, WeightType};

    use super::*;
    use crate::ranks::{SpanOrder, some_order};
    use crate::tests::emulated;

    /// Hears a rank's words, and notes of each whether the rank was still joined to the first.
    struct Heard {
        first: TcpListener,
        joined: Option<TcpStream>,
        words: Arc<Mutex<Vec<(Word, bool)>>>,
        bytes: Vec<u8>,
    }

    impl Write for Heard {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.bytes.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            let (mut frames, mut body) = (&self.bytes[..], Vec::new());
            while Frame::read(&mut frames, &mut body).is_ok() {
                let joined = self.joined.get_or_insert_with(|| self.first.accept().unwrap().0);
                Frame::read(joined, &mut Vec::new()).ok();
                joined.set_nonblocking(true)?;
                let is_joined = joined.peek(&mut [0]).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock);
                let word = Word::decode(&body).unwrap();
                if word != Word::Beat {
                    self.words.lock().unwrap().push((word, is_joined));
                }
            }
            self.bytes.clear();
            Ok(())
        }
    }

    #[test]
    fn a_rank_says_why_it_ends_before_the_others_see_it_leave() {
        let folder = emulated::folder();
        let (model, _) = Model::open(folder.path(), true).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let span = SpanOrder {
            model: folder.path().display().to_string(),
            random_weights: true,
            identity: model.identity,
            dtypes: Dtypes { weights: WeightType::F32, kv: KvDtype::F32 },
            options: SpanOptions {
                part: Span { start: 0, end: 1 }.into(),
                num_pages: 1,
                context_tokens: PAGE_TOKENS,
                largest_step: None,
            },
            sharing: Default::default(),
            faults: None,
            ..some_order(None)
        };
        let leader = listener.local_addr().unwrap();
        let order = Order { span, rank: 1, num_ranks: 2, leader, device: Device::Reference };
        let (input, mut orders) = io::pipe().unwrap();
        for body in [&order.encode()[..], b"no step"] {
            Frame { kind: 0, sequence: 0, shape: [0, 0] }.write(&mut orders, body).unwrap();
        }
        mem::forget(orders); // With its input this whole process would end.
        let words = Arc::default();
        let output = Heard { first: listener, joined: None, words: Arc::clone(&words), bytes: Vec::new() };
        serve_rank(input, output).unwrap_err();
        let message = "it was told a step that it does not understand".to_owned();
        let end = Word::End { message, is_consequence: false };
        assert_eq!(*words.lock().unwrap(), [(Word::Ready, true), (end, true)]);
    }

    #[test]
    fn a_process_may_load_for_longer_than_it_may_be_silent() {
        let patience = Duration::from_secs(1);
        let (say, words) = unbounded();
        let loading = std::thread::spawn(move || {
            for word in [Word::Beat, Word::Beat, Word::Beat, Word::Beat, Word::Beat, Word::Ready] {
                std::thread::sleep(patience / 4);
                say.send(word).unwrap();
            }
            say
        });
        assert_eq!(wait_until_ready(&words, patience), Ok(()));
        let _silent = loading.join().unwrap();
        let silence = "its process was not heard of for 1s while it loaded".to_owned();
        assert_eq!(wait_until_ready(&words, patience), Err(silence));
    }
}

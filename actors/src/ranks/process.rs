//! Ranks that are processes of their own: this program again, which is told by its standard input what to do, and meets the others
//! by TCP on this host.
//!
//! A rank's input ends with the process that started it, and its connections with any rank, so that none is left
//! behind. What it has to say comes by its standard output.

use std::io::{BufReader, BufWriter, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;

use crossbeam::channel::{Receiver, bounded, unbounded};
use stages::{CollectiveClock, Frame, GroupExit, RankGroup, RankStep, TcpRank};

use super::threads::{Loaded, follow};
use super::watch::Doing;
use super::wire::{Order, Word, decode_step, encode_step};
use super::{RankEnd, RankLink, RanksArgs};
use crate::error::with_causes;

/// The subcommand by which this program becomes a rank.
const SUBCOMMAND: &str = "rank";

/// A process that follows the first rank. It is ended with the stage.
struct ProcessRank {
    child: Child,
    steps: BufWriter<ChildStdin>,
    num_steps: u64,
    end: RankEnd,
}

impl RankLink for ProcessRank {
    fn tell(&mut self, step: &Arc<RankStep>) -> bool {
        self.num_steps += 1;
        let frame = Frame { kind: 0, sequence: self.num_steps, shape: [0, 0] };
        let written = frame.write(&mut self.steps, &encode_step(step));
        written.and_then(|()| self.steps.flush()).is_ok()
    }

    fn end(&self) -> &RankEnd {
        &self.end
    }
}

impl Drop for ProcessRank {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
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
    let collective = || TcpRank::lead(&listener, num_ranks, group, args.patience);
    // Loaded with the collective in hand: the others join before they load.
    let collective = Box::new(collective()?);
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
    )?;
    for (rank, words) in (1..).zip(loading) {
        match words.recv() {
            Ok(Word::Ready | Word::Done(_)) => {}
            Ok(Word::End { message, .. }) => return Err(failed(rank, message)),
            Err(_) => return Err(failed(rank, "its process ended while it loaded".to_owned())),
        }
    }
    Ok((first, others.into_iter().map(|other| Box::new(other) as Box<dyn RankLink>).collect()))
}

/// Starts a rank's process and tells it what it is. Its first word comes by the channel, its end to [`RankEnd`].
fn start(
    args: &RanksArgs,
    rank: usize,
    leader: SocketAddr,
    group: u64,
) -> Result<(ProcessRank, Receiver<Word>), String> {
    let program = std::env::current_exe().map_err(|e| format!("find this program: {e}"))?;
    let mut child = Command::new(program)
        .arg(SUBCOMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // Ctrl-C is for the job, which ends in order.
        .process_group(0)
        .spawn()
        .map_err(|e| format!("start its process: {e}"))?;
    let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        unreachable!("both were asked for")
    };
    let end = RankEnd::default();
    let mut other = ProcessRank { child, steps: BufWriter::new(stdin), num_steps: 0, end: end.clone() };
    let order = Order::of(args, rank, leader, group).encode();
    let told = Frame { kind: 0, sequence: 0, shape: [0, 0] }.write(&mut other.steps, &order);
    told.and_then(|()| other.steps.flush()).map_err(|e| format!("tell it what to do: {e}"))?;
    let (first_word, words) = bounded(1);
    let watch = args.watch.clone();
    let listen = move || {
        let mut stdout = BufReader::new(stdout);
        let mut body = Vec::new();
        while Frame::read(&mut stdout, &mut body).is_ok() {
            let Some(word) = Word::decode(&body) else { break };
            match &word {
                Word::Ready => {}
                Word::Done(done) => {
                    watch.tell_from_afar(rank, *done);
                    continue;
                }
                Word::End { message, is_consequence } => end.tell(message.clone(), *is_consequence),
            }
            let _ = first_word.try_send(word); // Later words are ends, which were told.
        }
        end.tell("its process ended".to_owned(), false);
    };
    std::thread::Builder::new()
        .name(format!("stage-{}.{rank}", args.stage))
        .spawn(listen)
        .expect("the system starts a thread");
    Ok((other, words))
}

/// What a process does that is a rank: reads its order and then step after step from `input`, and says to `output` that it is
/// ready, or why it ends. Ends the process when its input ends, whatever it is at: a rank that hangs must not outlive
/// who started it.
///
/// # Errors
/// What it has also said to `output`.
pub fn serve_rank(input: impl Read + Send + 'static, mut output: impl Write) -> Result<(), String> {
    let mut say = |word: &Word| {
        let frame = Frame { kind: 0, sequence: 0, shape: [0, 0] };
        // Where nobody listens any more, the input ends too.
        let _ = frame.write(&mut output, &word.encode()).and_then(|()| output.flush());
    };
    let outcome = serve(input, &mut say);
    outcome.map_err(|(message, is_consequence)| {
        say(&Word::End { message: message.clone(), is_consequence });
        message
    })
}

fn serve(input: impl Read + Send + 'static, say: &mut impl FnMut(&Word)) -> Result<(), (String, bool)> {
    let mut input = BufReader::new(input);
    let mut body = Vec::new();
    let own = |message: String| (message, false);
    Frame::read(&mut input, &mut body).map_err(|e| own(format!("read what to do: {e}")))?;
    let order =
        Order::decode(&body).ok_or_else(|| own("it was told what it does not understand".to_owned()))?;
    let Order { span, rank, num_ranks, leader, device } = order;
    span.install_faults().map_err(own)?;
    let collective =
        TcpRank::join(leader, rank, num_ranks, span.group, span.patience).map_err(|e| own(e.to_string()))?;
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
    let follower = stages::load_follower(&model, &device, span.dtypes, span.options, group);
    let mut follower = follower.map_err(|e| own(with_causes(&e)))?;
    let steps = listen(input);
    say(&Word::Ready);
    for body in steps {
        let step = decode_step(&body)
            .ok_or_else(|| own("it was told a step that it does not understand".to_owned()))?;
        let doing = Doing::begin(&clock);
        follow(&mut *follower, span.stage, rank, &step)?;
        say(&Word::Done(doing.end(&clock, &step)));
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
    std::thread::Builder::new().name("orders".to_owned()).spawn(read).expect("the system starts a thread");
    steps
}

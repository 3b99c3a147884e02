//! The way to a stage in another process of this host: TCP, with credits and checksums.
//!
//! Both ends count. A sender has as many credits as its receiver has room for micro-batches, and gets one back for each that is
//! taken up; who has none waits on a thread of its own, for no longer than its patience, so that no stage ever waits to send. A
//! receiver says of each micro-batch that it has arrived whole, which is the time of a hop. What was damaged on the way ends the
//! receiver's stage; where one end is gone, what was under way is lost, and whoever starts that stage again knows.
//!
//! Between two GPUs activations do not pass here: the sender's greeting names a group of NCCL's, in which both ends meet, and a frame
//! says what is to come by it, as soon as that is computed: a receiver's queue that waited for it would take multiprocessors from what
//! it computes. A sender whose receiver is gone leaves the group at once. A receiver whose sender is gone has queues
//! that wait for numbers, and lets them go on only when all that came by this connection is known to be lost. The connection alone
//! says who is gone: at both ends a thread hears it while another waits in the group, and calls that one off; and what NCCL says of
//! an end that dies is no failure of the other's.

mod inlet;
mod wire;

use std::collections::VecDeque;
use std::io::{self, BufReader, ErrorKind};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use scheduler::MicroBatch;
use stages::{Activations, Frame, Gate, GroupExit, GroupId, Parcel, Rows};

pub(crate) use self::inlet::{Credit, TcpInlet};
use self::wire::{Content, Moved};
use crate::link::Link;
use crate::thread::{lock, spawn};

/// What frames are, from a sender.
const HELLO: u32 = 1;
const STEP: u32 = 2;

/// What frames are, from a receiver: [`HELLO`] with its credits, that a micro-batch has arrived, and that one was taken up.
const ARRIVED: u32 = 3;
const TAKEN: u32 = 4;

/// How often an end looks whether the other one is gone, and whether what that has sent is lost.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// How long after a failure of NCCL's the connection may end that explains it. Of a process that dies the system closes all at once,
/// but a thread that hears of it has yet to be run.
const GRACE: Duration = Duration::from_secs(2);

/// Hears of each micro-batch that has arrived: bytes on the way, and the time since it was pushed, or, by NCCL, since it was computed.
pub(crate) type OnHop = Arc<dyn Fn(u64, Duration) + Send + Sync>;

/// Hears why an end is of no more use, once.
pub(crate) type OnFailure = Arc<dyn Fn(String) + Send + Sync>;

/// The way that a stage's device has to those of other processes, if it has one, once the stage is loaded.
pub(crate) type OwnGate = Arc<OnceLock<Gate>>;

/// A sender's end, which may be joined to another receiver at any time.
#[derive(Clone)]
pub(crate) struct TcpLink {
    way: Arc<Mutex<Way>>,
    gate: OwnGate,
    on_hop: OnHop,
    on_failure: OnFailure,
    /// Micro-batches that can be under way to a stage, those that are lost among them.
    room: usize,
    patience: Duration,
}

/// Where what is pushed goes.
#[derive(Default)]
enum Way {
    /// Nowhere: nobody was joined yet.
    #[default]
    Unjoined,
    Open(Connection),
    /// Nowhere any more. Whoever was joined is gone, or about to be found hanging.
    Left,
}

/// A connection, as who pushes sees it.
struct Connection {
    steps: Sender<(Instant, Arc<MicroBatch>, Option<Activations>)>,
    stream: TcpStream,
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both); // It may be gone already.
    }
}

/// Micro-batches that were sent and have not arrived, in order: since when each is on its way, and its bytes.
type UnderWay = Arc<Mutex<VecDeque<(Instant, u64)>>>;

impl TcpLink {
    /// Joined to nobody yet. Of two full mailboxes what one has may be lost.
    pub(crate) fn new(
        mailbox_size: usize,
        patience: Duration,
        gate: OwnGate,
        on_hop: OnHop,
        on_failure: OnFailure,
    ) -> Self {
        TcpLink { way: Arc::default(), gate, on_hop, on_failure, room: 2 * mailbox_size, patience }
    }

    /// The way to the first stage, by which come no activations.
    pub(crate) fn of_pipeline(mailbox_size: usize, patience: Duration) -> Self {
        TcpLink::new(mailbox_size, patience, OwnGate::default(), Arc::new(|_, _| {}), Arc::new(|_| {}))
    }

    /// Joins it to the receiver of such a group at an address. Who was joined to it before is left.
    ///
    /// # Errors
    /// Nobody is there, or somebody else.
    pub(crate) fn join(&self, address: SocketAddr, group: u64) -> io::Result<()> {
        *lock(&self.way) = Way::Left;
        let mut stream = TcpStream::connect_timeout(&address, self.patience)?;
        set_up(&stream, self.patience)?;
        let gate = self.gate.get();
        // Where there is no NCCL, numbers go through the host.
        let of_gpus = gate.and_then(|gate| gate.new_group().ok().map(|id| (gate.clone(), id)));
        let greeting = of_gpus.as_ref().map_or_else(Vec::new, |(gate, id)| wire::greeting(gate.device(), id));
        Frame { kind: HELLO, sequence: group, shape: [0, 0] }.write(&mut stream, &greeting)?;
        let welcome = Frame::read(&mut stream, &mut Vec::new())?;
        if welcome.kind != HELLO || welcome.sequence != group {
            return Err(io::Error::new(ErrorKind::InvalidData, "somebody else is there"));
        }
        let (credits, granted) = bounded(usize::try_from(welcome.shape[0]).unwrap_or(0));
        while credits.try_send(()).is_ok() {}
        let (steps, pushed) = bounded(self.room);
        let (under_way, exit) = (UnderWay::default(), GroupExit::default());
        let is_accepted = welcome.shape[1] == 1;
        if gate.is_some() {
            tracing::info!(%address, by_nccl = is_accepted, "joined");
        }
        let ends = (stream.try_clone()?, stream.try_clone()?);
        ends.1.set_read_timeout(None)?; // Credits come when there is something to do.
        let sender = SendingEnd {
            stream: ends.0,
            granted,
            under_way: Arc::clone(&under_way),
            patience: self.patience,
            of_gpus: of_gpus.filter(|_| is_accepted),
            exit: exit.clone(),
            on_failure: Arc::clone(&self.on_failure),
        };
        spawn("link-out", move || sender.run(&pushed));
        let on_hop = Arc::clone(&self.on_hop);
        spawn("link-back", move || {
            hear(ends.1, &credits, &under_way, &*on_hop);
            exit.leave(); // Nobody receives any more what is queued.
        });
        *lock(&self.way) = Way::Open(Connection { steps, stream });
        Ok(())
    }
}

impl Link for TcpLink {
    fn push(&self, batch: Arc<MicroBatch>, activations: Option<Activations>) {
        let mut way = lock(&self.way);
        match &*way {
            // Where nothing is taken any more, the other end is about to be found hanging, or gone.
            Way::Open(connection) => {
                if connection.steps.try_send((Instant::now(), batch, activations)).is_err() {
                    *way = Way::Left;
                }
            }
            // Whoever starts the other end again knows what is lost.
            Way::Left => {}
            // Nobody else would ever know.
            Way::Unjoined => {
                (self.on_failure)(format!("{:?} is to go by it, and it leads nowhere yet", batch.id))
            }
        }
    }
}

/// The thread that sends.
struct SendingEnd {
    stream: TcpStream,
    granted: Receiver<()>,
    under_way: UnderWay,
    patience: Duration,
    /// The group that the other end has accepted to meet in.
    of_gpus: Option<(Gate, GroupId)>,
    exit: GroupExit,
    on_failure: OnFailure,
}

impl SendingEnd {
    /// Ends when there is nobody to push any more, or the other end takes nothing for too long.
    fn run(mut self, pushed: &Receiver<(Instant, Arc<MicroBatch>, Option<Activations>)>) {
        // Where the other end is gone meanwhile, that is no failure of this one.
        if let Err(error) = self.send_all(pushed)
            && !self.leaves_in_time()
        {
            (self.on_failure)(error.to_string());
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Whether the group is left, as it is by whoever hears that the receiver is gone.
    fn leaves_in_time(&self) -> bool {
        let since = Instant::now();
        while !self.exit.has_left() && since.elapsed() < GRACE {
            std::thread::sleep(LOOK_EVERY);
        }
        self.exit.has_left()
    }

    fn send_all(
        &mut self,
        pushed: &Receiver<(Instant, Arc<MicroBatch>, Option<Activations>)>,
    ) -> stages::Result<()> {
        let meet = |(gate, id): &(Gate, GroupId)| gate.sender(&self.exit, *id);
        let mut gpu = self.of_gpus.as_ref().map(meet).transpose()?;
        let mut body = Vec::new();
        for (since, batch, activations) in pushed {
            if self.granted.recv_timeout(self.patience).is_err() {
                break;
            }
            let mut parcels = Vec::new();
            let content = match activations {
                None => Content::Nothing,
                Some(Activations { values: Rows::Device(values), sums, hidden }) if gpu.is_some() => {
                    parcels.push(values);
                    parcels.extend(sums.and_then(Rows::into_parcel));
                    Content::Moved(Moved { arrays: parcels.len(), rows: batch.num_tokens(), hidden })
                }
                Some(activations) => Content::Here(activations.into_host()?),
            };
            let parcels: Vec<&Parcel> = parcels.iter().collect();
            let gpu = gpu.as_mut().filter(|_| !parcels.is_empty());
            let since = match &gpu {
                Some(gpu) => gpu.wait_for(&parcels).map(|()| Instant::now())?,
                None => since,
            };
            let frame = wire::encode(&batch, &content, &mut body);
            let bytes = (stages::FRAME_HEADER_BYTES + body.len()) as u64 + content.moved_bytes();
            lock(&self.under_way).push_back((since, bytes));
            if frame.write(&mut self.stream, &body).is_err() {
                break;
            }
            if let Some(gpu) = gpu {
                gpu.send(&parcels)?;
            }
        }
        Ok(())
    }
}

/// Hears what the receiver says, until it is gone.
fn hear(
    stream: TcpStream,
    credits: &Sender<()>,
    under_way: &UnderWay,
    on_hop: &(dyn Fn(u64, Duration) + Send + Sync),
) {
    let mut stream = BufReader::new(stream);
    while let Ok(frame) = Frame::read(&mut stream, &mut Vec::new()) {
        match frame.kind {
            ARRIVED => {
                if let Some((since, bytes)) = lock(under_way).pop_front() {
                    on_hop(bytes, since.elapsed());
                }
            }
            // More than were taken would be a bug of the other end's.
            TAKEN if credits.try_send(()).is_ok() => {}
            _ => break,
        }
    }
    let _ = stream.get_ref().shutdown(Shutdown::Both);
}

fn set_up(stream: &TcpStream, timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{Ipv4Addr, TcpListener};

    use crossbeam::channel::unbounded;

    use super::wire::tests::{activations, batch, encoded};
    use super::*;
    use crate::stage::{Step, Work};
    use crate::stage_set::Lost;

    const PATIENCE: Duration = Duration::from_secs(10);
    const GROUP: u64 = 7;

    /// A receiver, what it takes, what it says of damage, and where it is.
    fn inlet(credits: usize) -> (Receiver<Work>, Receiver<String>, SocketAddr) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let ((work, taken), (damage, damaged)) = (unbounded(), unbounded());
        let on_damage: OnFailure = Arc::new(move |message| drop(damage.send(message)));
        let (gate, lost) = (OwnGate::default(), Lost::default());
        TcpInlet { group: GROUP, credits, patience: PATIENCE, work, gate, lost, on_damage }.listen(listener);
        (taken, damaged, address)
    }

    #[test]
    fn a_micro_batch_that_is_pushed_before_anybody_was_joined_is_a_failure() {
        let (failure, failed) = unbounded();
        let on_failure: OnFailure = Arc::new(move |message| drop(failure.send(message)));
        let link = TcpLink::new(3, PATIENCE, OwnGate::default(), Arc::new(|_, _| {}), on_failure);
        link.push(Arc::new(batch(5)), None);
        let message = failed.try_recv().expect("told at once");
        assert!(message.contains("MicroBatchId(5)"), "{message}");
    }

    fn link(patience: Duration) -> (TcpLink, Receiver<(u64, Duration)>) {
        let (hops, heard) = unbounded();
        let on_hop: OnHop = Arc::new(move |bytes, time| {
            let _ = hops.send((bytes, time));
        });
        (TcpLink::new(3, patience, OwnGate::default(), on_hop, Arc::new(|_| {})), heard)
    }

    fn taken(work: &Receiver<Work>) -> Step {
        match work.recv_timeout(PATIENCE).expect("a micro-batch comes") {
            Work::Step(step) => step,
            Work::Flush(_) | Work::Join(_) | Work::Lost => panic!("no micro-batch"),
        }
    }

    #[test]
    fn micro_batches_arrive_in_order_bit_for_bit_and_hops_are_told() {
        let (work, _, address) = inlet(3);
        let (link, hops) = link(PATIENCE);
        link.join(address, GROUP).unwrap();
        for id in 0..50 {
            let sent = (batch(id), activations(id as usize + 1, id % 2 == 0));
            link.push(Arc::new(sent.0.clone()), Some(sent.1.clone()));
            let Step { batch, input, credit } = taken(&work);
            drop(credit);
            assert_eq!(format!("{batch:?} {input:?}"), format!("{:?} {:?}", sent.0, Some(sent.1)));
            let (bytes, _) = hops.recv_timeout(PATIENCE).unwrap();
            assert!(bytes > (id + 1) * 4 * 6, "{bytes} bytes");
        }
    }

    #[test]
    fn no_more_is_sent_than_there_is_room_for_and_the_rest_comes_when_there_is() {
        let (work, _, address) = inlet(2);
        let (link, hops) = link(PATIENCE);
        link.join(address, GROUP).unwrap();
        (0..5).for_each(|id| link.push(Arc::new(batch(id)), None));
        let mut held: VecDeque<Step> = (0..2).map(|_| taken(&work)).collect();
        assert!(work.recv_timeout(Duration::from_millis(200)).is_err(), "sent without a credit");
        assert_eq!(hops.len(), 2);
        for id in 0..5 {
            let step = held.pop_front().unwrap();
            assert_eq!(step.batch.id.0, id);
            drop(step.credit);
            if id < 3 {
                held.push_back(taken(&work));
            }
        }
    }

    #[test]
    fn who_takes_nothing_for_too_long_is_left_and_pushing_never_waits() {
        let (work, _, address) = inlet(1);
        let (link, _) = link(Duration::from_millis(100));
        link.join(address, GROUP).unwrap();
        let begun = Instant::now();
        (0..6).for_each(|id| link.push(Arc::new(batch(id)), None));
        assert!(begun.elapsed() < Duration::from_millis(90), "pushing waited {:?}", begun.elapsed());
        let first = taken(&work);
        std::thread::sleep(Duration::from_millis(300));
        drop(first);
        assert!(work.recv_timeout(Duration::from_millis(200)).is_err(), "the link was left");
        link.join(address, GROUP).unwrap();
        link.push(Arc::new(batch(77)), None);
        assert_eq!(taken(&work).batch.id.0, 77);
    }

    #[test]
    fn what_was_damaged_is_told_and_strangers_are_not_listened_to() {
        let (work, damaged, address) = inlet(3);
        let (stranger, _) = link(Duration::from_millis(300));
        assert!(stranger.join(address, GROUP + 1).is_err());
        let mut stream = TcpStream::connect(address).unwrap();
        Frame { kind: HELLO, sequence: GROUP, shape: [0, 0] }.write(&mut stream, &[]).unwrap();
        let (frame, body) = encoded(&batch(1), &Content::Nothing);
        let mut bytes = Vec::new();
        frame.write(&mut bytes, &body).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 4;
        stream.write_all(&bytes).unwrap();
        assert!(damaged.recv_timeout(PATIENCE).unwrap().contains("damaged"));
        assert!(work.try_recv().is_err());
    }

    /// A frame any earlier would have the other end's queue wait, on multiprocessors by which it computes.
    #[test]
    fn a_receiver_hears_of_what_comes_by_nccl_no_sooner_than_it_is_computed() {
        let own = OwnGate::default();
        let gate = own.get_or_init(inlet::tests::gate).clone();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let welcome = std::thread::spawn(move || {
            let (mut stream, mut said) = (listener.accept().unwrap().0, Vec::new());
            Frame::read(&mut stream, &mut said).unwrap();
            Frame { kind: HELLO, sequence: GROUP, shape: [3, 1] }.write(&mut stream, &[]).unwrap();
            (stream, wire::read_greeting(&said).expect("a sender with a GPU").1)
        });
        let link = TcpLink::new(3, PATIENCE, own.clone(), Arc::new(|_, _| {}), Arc::new(|_| {}));
        link.join(address, GROUP).unwrap();
        let (mut stream, group) = welcome.join().unwrap();
        let _receiver = gate.receiver(&GroupExit::default(), group).unwrap();
        // What will have been computed when somebody has sent it, who does not; or when nobody waits for that any more.
        let (id, held) = (gate.new_group().unwrap(), GroupExit::default());
        let sender_gate = gate.clone();
        let sender = std::thread::spawn(move || sender_gate.sender(&GroupExit::default(), id).unwrap());
        let mut never_sent = gate.receiver(&held, id).unwrap();
        let _sender = sender.join().unwrap();
        let values = Rows::Device(never_sent.receive(1, 6, 8).unwrap().remove(0));
        link.push(Arc::new(batch(1)), Some(Activations { values, sums: None, hidden: 8 }));
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        assert!(stream.peek(&mut [0]).is_err(), "told of what is not computed");
        held.leave();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(Frame::read(&mut stream, &mut Vec::new()).unwrap().kind, STEP);
    }

    #[test]
    fn a_receiver_that_is_gone_costs_what_was_under_way_and_no_more() {
        let (link, _) = link(PATIENCE);
        let (work, _, address) = inlet(3);
        link.join(address, GROUP).unwrap();
        link.push(Arc::new(batch(2)), None);
        assert_eq!(taken(&work).batch.id.0, 2);
        assert!(link.join("127.0.0.1:1".parse().unwrap(), GROUP).is_err());
        link.push(Arc::new(batch(3)), None);
        link.join(address, GROUP).unwrap();
        link.push(Arc::new(batch(4)), None);
        assert_eq!(taken(&work).batch.id.0, 4);
    }
}

//! The receiver's end: who greets with its group is listened to, the last who did.

use std::io::{self, BufReader, ErrorKind};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use scheduler::{MicroBatch, MicroBatchId};
use stages::{Activations, Frame, Gate, GroupExit, GroupId, NcclReceiver, RowPool};

use super::wire::{self, Content, Moved};
use super::{ARRIVED, GRACE, HELLO, LOOK_EVERY, OnFailure, OwnGate, STEP, TAKEN, set_up};
use crate::stage::{Step, Work};
use crate::stage_set::Lost;
use crate::thread::{lock, spawn};

/// Whoever connects and does not greet within this is none of ours.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// What a micro-batch that came over a connection takes up; dropped when it is taken out of the mailbox.
pub(crate) struct Credit(Arc<Mutex<TcpStream>>);

impl Drop for Credit {
    fn drop(&mut self) {
        // Where the sender is gone, nobody wants it.
        let _ = Frame { kind: TAKEN, sequence: 0, shape: [0, 0] }.write(&mut *lock(&self.0), &[]);
    }
}

/// A receiver's end: takes micro-batches from whoever greets with its group, the last who did.
pub(crate) struct TcpInlet {
    pub(crate) group: u64,
    /// Micro-batches that there is room for.
    pub(crate) credits: usize,
    pub(crate) patience: Duration,
    /// Where they go.
    pub(crate) work: Sender<Work>,
    pub(crate) gate: OwnGate,
    /// What is lost, as soon as it is known to be.
    pub(crate) lost: Lost,
    /// Hears of what was damaged on the way.
    pub(crate) on_damage: OnFailure,
}

/// A connection that has been greeted.
struct Greeted {
    stream: TcpStream,
    /// Where GPUs meet.
    of_gpus: Option<(Gate, GroupId)>,
}

impl TcpInlet {
    /// Takes micro-batches from now on, on threads of their own, and as long as the process lives.
    pub(crate) fn listen(self, listener: TcpListener) {
        let inlet = Arc::new(self);
        spawn("link-in", move || {
            let mut present: Option<TcpStream> = None;
            for stream in listener.incoming().flatten() {
                let Ok(greeted) = inlet.greet(stream) else { continue }; // None of ours.
                let Ok(own) = greeted.stream.try_clone() else { continue };
                if let Some(before) = present.replace(own) {
                    let _ = before.shutdown(Shutdown::Both);
                }
                let inlet = Arc::clone(&inlet);
                spawn("link-in", move || inlet.take(greeted));
            }
        });
    }

    fn greet(&self, mut stream: TcpStream) -> io::Result<Greeted> {
        set_up(&stream, GREETING_TIMEOUT)?;
        let mut body = Vec::new();
        let hello = Frame::read(&mut stream, &mut body)?;
        if hello.kind != HELLO || hello.sequence != self.group {
            return Err(ErrorKind::InvalidData.into());
        }
        // Within a GPU numbers go through the host, too: NCCL joins one GPU with others.
        let meets = |gate: &Gate| {
            let (device, id) = wire::read_greeting(&body)?;
            (device != gate.device() && gate.has_nccl()).then(|| (gate.clone(), id))
        };
        let of_gpus = self.gate.get().and_then(meets);
        let shape = [self.credits as u64, u64::from(of_gpus.is_some())];
        let welcome = Frame { kind: HELLO, sequence: self.group, shape };
        welcome.write(&mut stream, &[])?;
        stream.set_read_timeout(None)?; // Micro-batches come when there is something to do.
        stream.set_write_timeout(Some(self.patience))?;
        Ok(Greeted { stream, of_gpus })
    }

    /// Takes micro-batches until the sender is gone.
    fn take(&self, Greeted { stream, of_gpus }: Greeted) {
        let Ok(back) = stream.try_clone() else { return };
        let back = Arc::new(Mutex::new(back));
        match of_gpus {
            None => self.tell(listen_to(stream, |heard| self.hand_on(heard, &back, None))),
            Some(group) => self.take_by_nccl(stream, &back, &group),
        }
    }

    /// The same where numbers come by NCCL: a thread hears the connection while this one waits in the group.
    fn take_by_nccl(&self, stream: TcpStream, back: &Arc<Mutex<TcpStream>>, group: &(Gate, GroupId)) {
        let exit = GroupExit::default();
        let (frames, heard) = bounded(self.credits);
        let (tell, told) = bounded(1);
        // Waits for all that is queued when it is dropped, and so is dropped when the group was left.
        let mut gpu = None;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut last = None;
                let ended = listen_to(stream, |heard| {
                    last = Some(heard.batch.id);
                    frames.send(heard).map_err(|_| Ended::Gone)
                });
                drop((tell.send(ended), frames));
                self.leave_when_lost(last, &exit);
            });
            let ended = match self.receive_all(&heard, group, &exit, &mut gpu, back) {
                Ended::Gone => told.try_recv().unwrap_or(Ended::Gone),
                // The connection knows better. What comes by it until then is heard and left.
                damaged => told.recv_timeout(GRACE).unwrap_or(damaged),
            };
            self.tell(ended);
            let _ = lock(back).shutdown(Shutdown::Both); // It may be closed already.
            drop(heard); // Not before: that nobody takes frames any more is no end of the connection's.
        });
    }

    /// Hands micro-batches on until none is heard any more, or the group fails.
    fn receive_all(
        &self,
        heard: &Receiver<Heard>,
        (gate, id): &(Gate, GroupId),
        exit: &GroupExit,
        gpu: &mut Option<NcclReceiver>,
        back: &Arc<Mutex<TcpStream>>,
    ) -> Ended {
        let gpu = match gate.receiver(exit, *id) {
            Ok(receiver) => gpu.insert(receiver),
            Err(error) => return Ended::Damaged(error.to_string()),
        };
        let handed_on = heard.iter().try_for_each(|heard| self.hand_on(heard, back, Some(gpu)));
        handed_on.err().unwrap_or(Ended::Gone)
    }

    /// What is queued to come may not go on with numbers that are none, as long as anybody may want what comes of it.
    fn leave_when_lost(&self, last: Option<MicroBatchId>, exit: &GroupExit) {
        while last.is_some_and(|last| !self.lost.contains(last)) {
            std::thread::sleep(LOOK_EVERY);
        }
        exit.leave();
    }

    /// Hands a micro-batch on to the stage, as soon as what it consists of is on the way.
    fn hand_on(
        &self,
        Heard { batch, content, sequence }: Heard,
        back: &Arc<Mutex<TcpStream>>,
        gpu: Option<&mut NcclReceiver>,
    ) -> Result<(), Ended> {
        let input = match (content, gpu) {
            (Content::Nothing, _) => None,
            (Content::Here(activations), _) => Some(activations),
            (Content::Moved(Moved { arrays, rows, hidden }), Some(gpu)) => {
                let received = gpu.receive(arrays, rows, hidden);
                let parcels = received.map_err(|error| Ended::Damaged(error.to_string()))?;
                Activations::on_a_device(parcels, hidden)
            }
            (Content::Moved(_), None) => {
                return Err(Ended::Damaged("a micro-batch by a way that there is none of".to_owned()));
            }
        };
        let arrived = Frame { kind: ARRIVED, sequence, shape: [0, 0] };
        arrived.write(&mut *lock(back), &[]).map_err(|_| Ended::Gone)?;
        let step = Step { batch: Arc::new(batch), input, credit: Some(Credit(Arc::clone(back))) };
        self.work.send(Work::Step(step)).map_err(|_| Ended::Gone)
    }

    fn tell(&self, ended: Ended) {
        if let Ended::Damaged(message) = ended {
            (self.on_damage)(message);
        }
    }
}

/// Why nothing more comes by a connection.
enum Ended {
    /// One of its ends is gone.
    Gone,
    Damaged(String),
}

/// A micro-batch as it came over a connection, and its frame's number.
struct Heard {
    batch: MicroBatch,
    content: Content,
    sequence: u64,
}

/// Hands on all that a sender says, until it is gone.
fn listen_to(stream: TcpStream, mut hand_on: impl FnMut(Heard) -> Result<(), Ended>) -> Ended {
    let (mut stream, mut body, pool) = (BufReader::new(stream), Vec::new(), RowPool::default());
    loop {
        let frame = match Frame::read(&mut stream, &mut body) {
            Ok(frame) => frame,
            Err(error) if error.kind() == ErrorKind::InvalidData => return Ended::Damaged(error.to_string()),
            Err(_) => return Ended::Gone,
        };
        let step = if frame.kind == STEP { wire::decode(&frame, &body, &pool) } else { None };
        let Some((batch, content)) = step else {
            return Ended::Damaged("a frame that is no micro-batch".to_owned());
        };
        if let Err(ended) = hand_on(Heard { batch, content, sequence: frame.sequence }) {
            return ended;
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::Ipv4Addr;
    use std::thread::JoinHandle;
    use std::time::Instant;

    use crossbeam::channel::unbounded;
    use scheduler::Span;
    use stages::{PAGE_TOKENS, SpanOptions};

    use super::super::wire::tests::{batch, encoded};
    use super::*;
    use crate::tests::emulated;

    const GROUP: u64 = 7;
    /// Much less than ranks wait for each other in a group, and time enough on a machine that has much else to do.
    const SOON: Duration = Duration::from_secs(30);

    /// That of a stage on a GPU that an emulator plays, which is number 0.
    pub(crate) fn gate() -> Gate {
        let part = Span { start: 0, end: 1 }.into();
        let options = SpanOptions { part, num_pages: 1, context_tokens: PAGE_TOKENS, largest_step: None };
        stages::load(&emulated::model(), &emulated::gpu(), emulated::DTYPES, options)
            .unwrap()
            .gate()
            .expect("a GPU has one")
    }

    /// A receiver that has been greeted by a sender with a GPU of another number.
    struct Met {
        sender: TcpStream,
        gate: Gate,
        group: GroupId,
        damaged: Receiver<String>,
        lost: Lost,
        taking: JoinHandle<()>,
        _work: Receiver<Work>,
    }

    fn meet() -> Met {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let ((work, taken), (damage, damaged)) = (unbounded(), unbounded());
        let on_damage: OnFailure = Arc::new(move |message| drop(damage.send(message)));
        let (own, lost, gate) = (OwnGate::default(), Lost::default(), gate());
        assert!(own.set(gate.clone()).is_ok());
        let group = gate.new_group().unwrap();
        Frame { kind: HELLO, sequence: GROUP, shape: [0, 0] }
            .write(&mut sender, &wire::greeting(gate.device() + 1, &group))
            .unwrap();
        let inlet = TcpInlet {
            group: GROUP,
            credits: 3,
            patience: SOON,
            work,
            gate: own,
            lost: lost.clone(),
            on_damage,
        };
        let greeted = inlet.greet(listener.accept().unwrap().0).unwrap();
        let welcome = Frame::read(&mut sender, &mut Vec::new()).unwrap();
        assert_eq!(welcome.shape, [3, 1], "they meet by NCCL");
        let taking = std::thread::spawn(move || inlet.take(greeted));
        Met { sender, gate, group, damaged, lost, taking, _work: taken }
    }

    impl Met {
        fn has_ended_soon(&self) -> bool {
            let since = Instant::now();
            while !self.taking.is_finished() && since.elapsed() < SOON {
                std::thread::sleep(LOOK_EVERY);
            }
            self.taking.is_finished()
        }

        /// Has the receiver told of more rows than its memory holds, which fails there.
        fn send_what_fails(&mut self) {
            self.send(1, &Content::Moved(Moved { arrays: 1, rows: 6, hidden: 1 << 28 }));
        }

        fn send(&mut self, id: u64, content: &Content) {
            let (frame, body) = encoded(&batch(id), content);
            frame.write(&mut self.sender, &body).unwrap();
        }
    }

    #[test]
    fn a_sender_that_dies_before_it_has_joined_is_not_waited_for() {
        let met = meet();
        met.sender.shutdown(Shutdown::Both).unwrap();
        assert!(met.has_ended_soon());
        assert!(met.damaged.try_recv().is_err(), "the receiver's stage is not to blame");
    }

    #[test]
    fn what_nccl_says_of_a_sender_that_dies_is_no_failure_of_the_receivers() {
        let mut met = meet();
        let exit = GroupExit::default();
        let _joined = met.gate.sender(&exit, met.group).unwrap();
        met.send_what_fails();
        std::thread::sleep(GRACE / 10);
        met.sender.shutdown(Shutdown::Both).unwrap();
        std::thread::sleep(GRACE / 10);
        assert!(!met.taking.is_finished(), "left before its numbers are known to be lost");
        met.lost.all_before(MicroBatchId(2));
        assert!(met.has_ended_soon());
        assert!(met.damaged.try_recv().is_err(), "the receiver's stage is not to blame");
    }

    #[test]
    fn a_failure_beside_a_sender_that_lives_and_goes_on_is_told() {
        let mut met = meet();
        let exit = GroupExit::default();
        let _joined = met.gate.sender(&exit, met.group).unwrap();
        met.send_what_fails();
        std::thread::sleep(GRACE / 4);
        met.send(2, &Content::Nothing);
        assert!(met.damaged.recv_timeout(SOON).is_ok());
        assert!(met.sender.peek(&mut [0]).is_ok_and(|bytes| bytes == 0), "the connection is left");
        met.lost.all_before(MicroBatchId(3));
        assert!(met.has_ended_soon());
    }
}

//! Ranks that are processes, joined by TCP in a star: all talk to rank 0, which adds up and hands on.
//!
//! With R ranks, rank 0 receives and sends R - 1 times what a call is about, one after another: right for the few ranks of
//! a stage on one host. Connections are blocking, with the group's patience as time limit of every read and write.

use std::io::{self, ErrorKind};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::frame::Frame;
use super::{Axis, Collective, Op, gathered, place};
use crate::array::Array;
use crate::error::{Error, Result};

/// How often a rank looks whether somebody has come.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Whoever connects and does not greet within this is none of ours.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// A rank that talks to the others by TCP.
#[derive(Debug)]
pub struct TcpRank {
    rank: usize,
    num_ranks: usize,
    /// Of rank 0 to ranks 1, 2, …; of any other to rank 0.
    peers: Vec<TcpStream>,
    num_calls: u64,
    body: Vec<u8>,
    /// Why the group has ended, as this rank saw it.
    end: Option<String>,
}

impl TcpRank {
    /// Rank 0: waits until the others have come, at most for `patience`, and no longer once `gone` names a rank that will not.
    /// `group` tells groups apart: whoever names another one is sent away.
    ///
    /// # Errors
    /// Not all have come, or the listener failed.
    pub fn lead(
        listener: &TcpListener,
        num_ranks: usize,
        group: u64,
        patience: Duration,
        gone: impl Fn() -> Option<usize>,
    ) -> Result<TcpRank> {
        let refused = |message: String| Op::Hello.error(0, message);
        let mut peers: Vec<Option<TcpStream>> = (1..num_ranks).map(|_| None).collect();
        listener.set_nonblocking(true).map_err(|e| refused(e.to_string()))?;
        let begun = Instant::now();
        while let Some(missing) = peers.iter().position(Option::is_none) {
            if let Some(rank) = gone() {
                return Err(refused(format!("rank {rank} is gone")));
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    // Who does not know how to greet is none of ours.
                    if let Ok((rank, stream)) = greeted(stream, num_ranks, group, patience) {
                        peers[rank - 1].get_or_insert(stream);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if begun.elapsed() > patience {
                        return Err(refused(format!(
                            "rank {} did not come within {patience:?}",
                            missing + 1
                        )));
                    }
                    std::thread::sleep(LOOK_EVERY);
                }
                Err(error) => return Err(refused(error.to_string())),
            }
        }
        let peers = peers.into_iter().flatten().collect();
        Ok(TcpRank { rank: 0, num_ranks, peers, num_calls: 0, body: Vec::new(), end: None })
    }

    /// Any other rank: goes to rank 0.
    ///
    /// # Errors
    /// Nobody is there, or it has waited too long.
    pub fn join(
        leader: SocketAddr,
        rank: usize,
        num_ranks: usize,
        group: u64,
        patience: Duration,
    ) -> Result<TcpRank> {
        assert!((1..num_ranks).contains(&rank), "rank {rank} of {num_ranks} joins");
        let connect = || -> io::Result<TcpStream> {
            let mut stream = TcpStream::connect_timeout(&leader, patience)?;
            set_up(&stream, patience)?;
            let hello =
                Frame { kind: Op::Hello as u32, sequence: group, shape: [rank as u64, num_ranks as u64] };
            hello.write(&mut stream, &[])?;
            Ok(stream)
        };
        let stream = connect().map_err(|e| Op::Hello.error(rank, format!("rank 0 at {leader}: {e}")))?;
        Ok(TcpRank { rank, num_ranks, peers: vec![stream], num_calls: 0, body: Vec::new(), end: None })
    }

    /// Runs a call; where it fails, the group has ended, and the others hear of it.
    fn call(&mut self, op: Op, run: impl FnOnce(&mut Self) -> std::result::Result<(), String>) -> Result<()> {
        if let Some(end) = &self.end {
            return Err(op.error(self.rank, end.clone()));
        }
        let outcome = run(self);
        self.num_calls += 1;
        outcome.map_err(|message| self.fail(op, message))
    }

    fn fail(&mut self, op: Op, message: String) -> Error {
        for peer in &self.peers {
            let _ = peer.shutdown(Shutdown::Both); // It may be gone already.
        }
        self.end = Some(message.clone());
        op.error(self.rank, message)
    }

    fn peer_rank(&self, peer: usize) -> usize {
        if self.rank == 0 { peer + 1 } else { 0 }
    }

    fn send(&mut self, peer: usize, op: Op, shape: [usize; 2], values: &[f32]) -> Sent<()> {
        let [rows, cols] = shape.map(|size| size as u64);
        let frame = Frame { kind: op as u32, sequence: self.num_calls, shape: [rows, cols] };
        let written = frame.write(&mut self.peers[peer], bytemuck::cast_slice(values));
        written.map_err(|e| self.lost(peer, &e))
    }

    /// Receives into `self.body`; returns the shape.
    fn receive(&mut self, peer: usize, op: Op) -> Sent<[usize; 2]> {
        let frame = Frame::read(&mut self.peers[peer], &mut self.body).map_err(|e| self.lost(peer, &e))?;
        let shape = frame.shape.map(|size| usize::try_from(size).unwrap_or(usize::MAX));
        let numbers = shape[0].checked_mul(shape[1]);
        let is_whole = numbers.and_then(|numbers| numbers.checked_mul(4)) == Some(self.body.len());
        match frame.kind == op as u32 && frame.sequence == self.num_calls && is_whole {
            true => Ok(shape),
            false => Err(format!("rank {} is at another operation", self.peer_rank(peer))),
        }
    }

    /// Sends a part to rank 0, which puts all of them together.
    fn bring(&mut self, axis: Axis, part: &Array, out: &mut Array) -> Sent<()> {
        let (op, shape) = (Op::gather(axis), [part.rows(), part.cols()]);
        if self.rank > 0 {
            return self.send(0, op, shape, part.values());
        }
        let mut parts = vec![(shape, part.values().to_vec())];
        for peer in 0..self.peers.len() {
            let shape = self.receive(peer, op)?;
            parts.push((shape, self.received().collect()));
        }
        let [rows, cols] = gathered(axis, parts.iter().map(|(shape, _)| *shape))
            .map_err(|other| format!("rank {other} has another shape"))?;
        out.reshape(rows, cols);
        let mut before = 0;
        for ([part_rows, part_cols], values) in &parts {
            place(axis, values, *part_cols, before, out.values_mut(), cols);
            before += if axis == Axis::Rows { part_rows } else { part_cols };
        }
        Ok(())
    }

    fn lost(&self, peer: usize, error: &io::Error) -> String {
        let rank = self.peer_rank(peer);
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => format!("rank {rank} did not come in time"),
            ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::BrokenPipe
            | ErrorKind::NotConnected => format!("rank {rank} is gone"),
            _ => format!("rank {rank}: {error}"),
        }
    }

    /// What `self.body` holds.
    fn received(&self) -> impl Iterator<Item = f32> {
        self.body.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes))
    }

    fn take(&self, shape: [usize; 2], out: &mut Array) {
        out.reshape(shape[0], shape[1]);
        out.values_mut().iter_mut().zip(self.received()).for_each(|(out, value)| *out = value);
    }
}

/// A result whose error is told to the user as a rank's.
type Sent<T> = std::result::Result<T, String>;

impl Collective<Array> for TcpRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    fn all_reduce(&mut self, x: &mut Array) -> Result<()> {
        let (op, shape) = (Op::AllReduce, [x.rows(), x.cols()]);
        self.call(op, |group| {
            if group.rank > 0 {
                group.send(0, op, shape, x.values())?;
                group.receive(0, op)?;
                group.take(shape, x);
                return Ok(());
            }
            for peer in 0..group.peers.len() {
                if group.receive(peer, op)? != shape {
                    return Err(format!("rank {} has another shape", peer + 1));
                }
                x.values_mut().iter_mut().zip(group.received()).for_each(|(sum, term)| *sum += term);
            }
            (0..group.peers.len()).try_for_each(|peer| group.send(peer, op, shape, x.values()))
        })
    }

    fn all_gather(&mut self, axis: Axis, part: &Array, out: &mut Array) -> Result<()> {
        let op = Op::gather(axis);
        self.call(op, |group| {
            group.bring(axis, part, out)?;
            if group.rank > 0 {
                let whole = group.receive(0, op)?;
                group.take(whole, out);
                return Ok(());
            }
            let shape = [out.rows(), out.cols()];
            (0..group.peers.len()).try_for_each(|peer| group.send(peer, op, shape, out.values()))
        })
    }

    fn gather(&mut self, axis: Axis, part: &Array, out: &mut Array) -> Result<()> {
        self.call(Op::gather(axis), |group| group.bring(axis, part, out))
    }

    fn broadcast(&mut self, root: usize, x: &mut Array) -> Result<()> {
        assert!(root < self.num_ranks, "root {root} of {} ranks", self.num_ranks);
        let op = Op::Broadcast;
        self.call(op, |group| {
            if group.rank == root && root > 0 {
                return group.send(0, op, [x.rows(), x.cols()], x.values());
            }
            if group.rank != root {
                let from = if group.rank == 0 { root - 1 } else { 0 };
                let shape = group.receive(from, op)?;
                group.take(shape, x);
            }
            if group.rank > 0 {
                return Ok(());
            }
            (0..group.peers.len())
                .filter(|peer| peer + 1 != root)
                .try_for_each(|peer| group.send(peer, op, [x.rows(), x.cols()], x.values()))
        })
    }
}

fn set_up(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))
}

/// The rank that has come by a connection.
fn greeted(
    mut stream: TcpStream,
    num_ranks: usize,
    group: u64,
    patience: Duration,
) -> io::Result<(usize, TcpStream)> {
    set_up(&stream, patience.min(GREETING_TIMEOUT))?;
    let hello = Frame::read(&mut stream, &mut Vec::new())?;
    let [rank, of] = hello.shape;
    let is_ours = hello.kind == Op::Hello as u32 && hello.sequence == group && of == num_ranks as u64;
    match usize::try_from(rank) {
        Ok(rank) if is_ours && (1..num_ranks).contains(&rank) => {
            set_up(&stream, patience)?;
            Ok((rank, stream))
        }
        _ => Err(ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// Longer than any machine keeps a test waiting.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_rank_that_is_known_to_be_gone_is_not_waited_for() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let begun = Instant::now();
        let error = TcpRank::lead(&listener, 3, 6, LONG, || Some(2)).unwrap_err();
        assert_eq!(error.to_string(), "hello on rank 0: rank 2 is gone");
        assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
    }

    #[test]
    fn a_stranger_who_says_nothing_does_not_keep_a_group_from_meeting() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let leader = listener.local_addr().unwrap();
        let begun = Instant::now();
        let _silent = TcpStream::connect(leader).unwrap();
        let _other = TcpRank::join(leader, 1, 2, 6, LONG).unwrap();
        TcpRank::lead(&listener, 2, 6, LONG, || None).unwrap();
        assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
    }
}

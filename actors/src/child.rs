//! Children of this process, which are this program again: each takes orders by its standard input, and ends with whoever started it.

use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{self, ChildStdout, Command, Stdio};
use std::time::Duration;

use crossbeam::channel::{RecvTimeoutError, Sender, bounded};
use stages::Frame;

use crate::thread::spawn;

/// How often a child says that it is there: many times within the shortest step timeout, a second.
pub(crate) const BEAT_EVERY: Duration = Duration::from_millis(100);

/// A child, which is ended with this.
pub(crate) struct Child {
    process: process::Child,
    orders: BufWriter<UnixStream>,
}

impl Child {
    /// Starts what this program is by a subcommand, and tells it what to do; also what it will say comes back. Nothing that it is told
    /// takes longer than `patience`.
    ///
    /// # Errors
    /// It cannot be started, or does not hear what it is to do.
    pub(crate) fn start(
        subcommand: &str,
        order: &[u8],
        patience: Duration,
    ) -> Result<(Self, ChildStdout), String> {
        let program = std::env::current_exe().map_err(|e| format!("find this program: {e}"))?;
        let mut command = Command::new(program);
        // Ctrl-C is for the job, which ends in order.
        command.arg(subcommand).stdout(Stdio::piped()).process_group(0);
        let mut child = Child::spawn(command, patience).map_err(|e| format!("start its process: {e}"))?;
        let words = child.process.stdout.take().expect("it was asked for");
        child.tell(0, 0, order).map_err(|e| format!("tell its process what to do: {e}"))?;
        Ok((child, words))
    }

    /// By a socket, which has a timeout: a process that is stopped reads nothing, and a pipe would wait for it for ever.
    fn spawn(mut command: Command, patience: Duration) -> io::Result<Self> {
        let (orders, input) = UnixStream::pair()?;
        orders.set_write_timeout(Some(patience))?;
        let process = command.stdin(OwnedFd::from(input)).spawn()?;
        Ok(Child { process, orders: BufWriter::new(orders) })
    }

    /// Tells it something, as a frame.
    ///
    /// # Errors
    /// It is gone, or reads nothing.
    pub(crate) fn tell(&mut self, kind: u32, sequence: u64, body: &[u8]) -> io::Result<()> {
        Frame { kind, sequence, shape: [0, 0] }.write(&mut self.orders, body)?;
        self.orders.flush()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Has a child say that it is there, from a thread of its own, until what comes of it is dropped.
pub(crate) fn beat(say: impl Fn() + Send + 'static) -> Sender<()> {
    let (beating, beats) = bounded(0);
    spawn("beats", move || {
        while beats.recv_timeout(BEAT_EVERY) == Err(RecvTimeoutError::Timeout) {
            say();
        }
    });
    beating
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_process_that_does_not_read_what_it_is_told_is_waited_for_no_longer_than_the_patience() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let mut child = Child::spawn(command, Duration::from_millis(200)).unwrap();
        let begun = Instant::now();
        // More than any way holds that nobody reads at its end.
        assert!(child.tell(0, 0, &vec![7; 8 << 20]).is_err());
        drop(child);
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    }
}

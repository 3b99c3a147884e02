//! Ctrl-C: the first asks for an orderly end, the second is obeyed at once.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// What shells report for a program that Ctrl-C ended.
pub(crate) const EXIT_CODE: u8 = 130;

/// How long an orderly end may take. Users were promised five seconds.
const GRACE: Duration = Duration::from_millis(4500);

/// Hears of interrupts.
#[derive(Debug, Clone)]
pub(crate) struct Interrupt(watch::Receiver<bool>);

impl Interrupt {
    /// Listens from now on. Must be called on the runtime.
    ///
    /// # Errors
    /// A system that refuses to say when it is interrupted.
    pub(crate) fn listen() -> Result<Self> {
        let mut signals = Signals::new().context("listen for Ctrl-C")?;
        let (sender, receiver) = watch::channel(false);
        tokio::spawn(async move {
            signals.next().await;
            crate::say("interrupted: ending in order; once more to stop at once");
            let _ = sender.send(true);
            tokio::select! {
                () = signals.next() => {}
                () = tokio::time::sleep(GRACE) => crate::say("the end takes too long: stopping at once"),
            }
            std::process::exit(i32::from(EXIT_CODE));
        });
        Ok(Interrupt(receiver))
    }

    /// Resolves when the user has interrupted.
    pub(crate) async fn wait(mut self) {
        // The sender lives as long as the process.
        let _ = self.0.wait_for(|interrupted| *interrupted).await;
    }
}

/// Ctrl-C, and the signal by which systems end services.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let [interrupt, terminate] = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
        Ok(Signals { interrupt: interrupt?, terminate: terminate? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

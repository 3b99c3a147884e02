//! Ctrl-C: the first asks for an orderly end, the second is obeyed at once.

use std::time::Duration;

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
    pub(crate) fn listen() -> Self {
        let (sender, receiver) = watch::channel(false);
        tokio::spawn(async move {
            signal().await;
            // A bar that stands on the terminal is left alone; the report comes below it.
            crate::say("interrupted: ending the rows' lines; once more to stop at once");
            let _ = sender.send(true);
            tokio::select! {
                () = signal() => {}
                () = tokio::time::sleep(GRACE) => crate::say("the end takes too long: stopping at once"),
            }
            std::process::exit(i32::from(EXIT_CODE));
        });
        Interrupt(receiver)
    }

    /// Resolves when the user has interrupted.
    pub(crate) async fn wait(mut self) {
        // The sender lives as long as the process.
        let _ = self.0.wait_for(|interrupted| *interrupted).await;
    }
}

/// Ctrl-C, or the signal by which systems end services.
async fn signal() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        },
        Err(_) => {
            let _ = tokio::signal::ctrl_c().await;
        }
    }
}

//! Stopping: one token that everything watches, one tracker that knows what still runs. And
//! SIGHUP, which asks for the configuration to be read anew.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::telemetry::report;

/// The wish to stop, and the tasks that must end before the process does.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    token: CancellationToken,
    tracker: TaskTracker,
    ends_alone: Arc<AtomicBool>,
    hangup: Arc<Notify>,
}

impl Shutdown {
    /// Without signals: [`Shutdown::request`] alone stops.
    pub fn new() -> Shutdown {
        Shutdown::default()
    }

    /// For what ends with the process, or alone before it: one configuration.
    pub fn part(&self) -> Shutdown {
        Shutdown {
            token: self.token.child_token(),
            tracker: TaskTracker::new(),
            ends_alone: Arc::default(),
            hangup: self.hangup.clone(),
        }
    }

    /// Asks a part alone to stop and drain: another one takes its place.
    pub fn request_alone(&self) {
        self.ends_alone.store(true, Ordering::Release);
        self.token.cancel();
    }

    /// Whether a successor takes this part's place, in this process.
    pub fn ends_alone(&self) -> bool {
        self.ends_alone.load(Ordering::Acquire)
    }

    /// Waits for a SIGHUP that came after the last one waited for. Dropping the future loses
    /// nothing.
    pub async fn hangup(&self) {
        self.hangup.notified().await;
    }

    /// Asks everything to stop reading and drain.
    pub fn request(&self) {
        self.token.cancel();
    }

    /// Whether a stop was asked for.
    pub fn is_requested(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until a stop is asked for. Dropping the future loses nothing.
    pub async fn requested(&self) {
        self.token.cancelled().await;
    }

    /// The token, for those that take one.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Spawn on this what must end before the process does.
    pub fn tracker(&self) -> &TaskTracker {
        &self.tracker
    }

    /// Waits at most `timeout` until every tracked task has ended; says whether they did.
    pub async fn drained(&self, timeout: Duration) -> bool {
        self.tracker.close();
        tokio::time::timeout(timeout, self.tracker.wait()).await.is_ok()
    }
}

/// A [`Shutdown`] that follows signals: the first SIGTERM or SIGINT asks for a stop, the second
/// ends the process at once with status 1. SIGHUP is passed on to whoever waits for it. SIGXFSZ ends
/// nothing: a file that may not grow is an error of its write, as on a full disk.
///
/// The first thing that a service does: until then a signal ends the process at once, a reload's too.
/// Must be called within a tokio runtime.
pub fn install() -> Shutdown {
    let shutdown = Shutdown::new();
    // The handler stays when its `Signal` is dropped.
    if let Err(error) = signal(SignalKind::from_raw(libc::SIGXFSZ)) {
        report(&format!(
            "SIGXFSZ cannot be caught, and a limit of file sizes would end the process: {error}"
        ));
    }
    let signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
    let [Ok(terminate), Ok(interrupt), Ok(hangup)] = signals.map(signal) else {
        report("signals cannot be caught: a signal ends the process without a drain");
        return shutdown;
    };
    tokio::spawn(watch(shutdown.clone(), terminate, interrupt, hangup));
    shutdown
}

async fn watch(
    shutdown: Shutdown,
    mut terminate: Signal,
    mut interrupt: Signal,
    mut hangup: Signal,
) {
    loop {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            _ = hangup.recv() => {
                shutdown.hangup.notify_one();
                continue;
            }
        };
        if shutdown.is_requested() {
            warn!(signal = name, "second signal: ending at once");
            std::process::exit(1);
        }
        info!(signal = name, "stopping; a second signal ends at once");
        shutdown.request();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_signal_asks_for_a_stop_and_tasks_are_waited_for() {
        let shutdown = install();
        let inside = shutdown.clone();
        shutdown.tracker().spawn(async move { inside.requested().await });
        let process = rustix::process::getpid();
        rustix::process::kill_process(process, rustix::process::Signal::TERM).expect("kill");
        shutdown.requested().await;
        assert!(shutdown.drained(Duration::from_secs(60)).await);
    }

    #[tokio::test]
    async fn a_part_ends_alone_or_with_the_whole() {
        let whole = Shutdown::new();
        let part = whole.part();
        part.request_alone();
        assert!(part.is_requested() && part.ends_alone());
        assert!(!whole.is_requested());
        let part = whole.part();
        whole.request();
        assert!(part.is_requested() && !part.ends_alone());
    }

    #[tokio::test]
    async fn a_hangup_is_not_lost_on_the_way() {
        let shutdown = install();
        let process = rustix::process::getpid();
        rustix::process::kill_process(process, rustix::process::Signal::HUP).expect("kill");
        shutdown.part().hangup().await;
        assert!(!shutdown.is_requested());
    }

    #[tokio::test]
    async fn a_task_that_does_not_end_is_given_up() {
        let shutdown = Shutdown::new();
        shutdown.tracker().spawn(std::future::pending::<()>());
        shutdown.request();
        assert!(!shutdown.drained(Duration::from_millis(1)).await);
    }
}

//! What a service manager hears of this process (sd_notify(3)): ready, reloading, stopping, and
//! that it is not hung. Without `NOTIFY_SOCKET` nothing is said.

use std::time::Duration;

use sd_notify::NotifyState;
use tracing::warn;

use crate::shutdown::Shutdown;

/// Pings come no faster, whatever is asked for.
const SHORTEST: Duration = Duration::from_millis(1);

/// Sockets are bound and the state is open; or a reload is over, whatever became of it.
pub fn ready() {
    say(&[NotifyState::Ready]);
}

/// The configuration is read anew: [`ready`] must follow. With the time that `Type=notify-reload`
/// asks for.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => say(&[NotifyState::Reloading, now]),
        Err(error) => warn!(%error, "the service manager cannot be told of a reload"),
    }
}

/// Tells of the stop when it comes, and until then, where the service manager watches
/// (`WatchdogSec=`), three times per interval that the runtime still runs tasks.
pub fn accompany(shutdown: &Shutdown) {
    let stop = shutdown.clone();
    tokio::spawn(async move {
        stop.requested().await;
        say(&[NotifyState::Stopping]);
    });
    if let Some(interval) = sd_notify::watchdog_enabled() {
        tokio::spawn(async move {
            // It goes on while the process drains, until the runtime ends.
            let mut ticks = tokio::time::interval((interval / 3).max(SHORTEST));
            loop {
                ticks.tick().await;
                say(&[NotifyState::Watchdog]);
            }
        });
    }
}

fn say(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "the service manager cannot be told: {state:?}");
    }
}

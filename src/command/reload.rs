//! What `send` and `receive` say and count when SIGHUP asks for a changed configuration.

use tracing::{error, info};

use crate::metrics::Reloads;
use crate::systemd;

/// A changed configuration has taken the place of the one before.
pub(super) fn done() {
    info!("the changed configuration is in force");
    systemd::ready();
}

/// What to put in force, if anything: `None` within means that nothing changed. What is refused is
/// told like a fault at the start, and what is in force goes on.
pub(super) fn judge<T>(next: anyhow::Result<Option<T>>, reloads: &Reloads) -> Option<T> {
    reloads.count(next.is_ok());
    match next {
        Ok(Some(next)) => Some(next),
        Ok(None) => {
            info!("the configuration has not changed");
            None
        }
        Err(error) => {
            for line in super::told(&error).lines() {
                error!("{line}");
            }
            error!("the changed configuration is refused; the one before stays in force");
            None
        }
    }
}

//! Notices a changed tokens file, so that no restart is needed and a revoked token ends at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::Tokens;
use crate::record::escape_path;
use crate::stamp::Stamp;

/// How often the file is looked at.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// Looks at the file until `stop`. A broken or missing file keeps the entries known before.
/// Subscribers are woken by a change, and when a token expires.
pub async fn run(
    file: PathBuf,
    tokens: watch::Sender<Arc<Tokens>>,
    interval: Duration,
    stop: CancellationToken,
) {
    let mut known = None;
    loop {
        // Taken before the file is read: an edit in between is met at the next look.
        let stamp = Stamp::of(&file);
        if known != Some(stamp) {
            known = Some(stamp);
            reload(&file, &tokens);
        }
        let expiry = tokens.borrow().next_expiry(Timestamp::now());
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(interval) => {}
        }
        if expiry.is_some_and(|expiry| expiry <= Timestamp::now()) {
            tokens.send_modify(|_| {});
        }
    }
}

/// Reads the file now, as [`run`] does at its next look.
pub fn reload(file: &Path, tokens: &watch::Sender<Arc<Tokens>>) {
    match Tokens::load(file) {
        Ok(fresh) => {
            let changed = tokens.send_if_modified(|known| {
                let changed = **known != fresh;
                if changed {
                    *known = Arc::new(fresh);
                }
                changed
            });
            if changed {
                info!(file = %escape_path(file), entries = tokens.borrow().entries().len(), "tokens taken over");
            }
        }
        Err(error) => error!(
            %error,
            "the tokens known before stay in force, and none can be revoked until this is mended"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::{self, hash, mint};

    #[test]
    fn a_broken_or_missing_file_keeps_the_entries_known_before() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("tokens.toml");
        let token = mint(&file, "web-1", tokens::Terms::default()).expect("mint");
        let (sender, receiver) = watch::channel(Arc::new(Tokens::load(&file).expect("load")));
        let known = || receiver.borrow().find(&hash(&token), Timestamp::now()).is_some();
        std::fs::write(&file, "[[token]]\nbroken").expect("write");
        reload(&file, &sender);
        assert!(known(), "broken");
        std::fs::remove_file(&file).expect("remove");
        reload(&file, &sender);
        assert!(known(), "missing");
        std::fs::write(&file, "").expect("write");
        reload(&file, &sender);
        assert!(!known(), "an empty file is a whole one");
    }
}

//! Whether the destination answers: by its own word, and by what comes back from it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::destination;

/// Frames that wait so long without any receipt mean a destination that does not answer.
const STALLED_AFTER: Duration = Duration::from_secs(30);

/// What is known of the destination.
#[derive(Debug)]
pub(super) struct Health {
    /// Its own word.
    word: watch::Receiver<destination::Health>,
    /// When it last gave a sign.
    sign: Mutex<Instant>,
}

impl Health {
    pub(super) fn new(word: watch::Receiver<destination::Health>) -> Health {
        Health { word, sign: Mutex::new(Instant::now()) }
    }

    /// A frame goes to the destination while it holds nothing else, or a final receipt came back.
    pub(super) fn note(&self) {
        self.note_at(Instant::now());
    }

    /// `in_use`: whether the destination holds frames.
    pub(super) fn is_ready(&self, in_use: bool) -> bool {
        self.is_ready_at(in_use, Instant::now())
    }

    fn note_at(&self, now: Instant) {
        *self.sign.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    fn is_ready_at(&self, in_use: bool, now: Instant) -> bool {
        if *self.word.borrow() != destination::Health::Ready {
            return false;
        }
        let sign = *self.sign.lock().unwrap_or_else(PoisonError::into_inner);
        !in_use || now.duration_since(sign) < STALLED_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_frames_that_wait_in_vain_make_it_unready() {
        let (_word, follow) = watch::channel(destination::Health::Ready);
        let health = Health::new(follow);
        let start = Instant::now();
        health.note_at(start);
        assert!(health.is_ready_at(true, start));
        let later = start + STALLED_AFTER;
        assert!(health.is_ready_at(false, later), "nothing waits");
        assert!(!health.is_ready_at(true, later));
        health.note_at(later);
        assert!(health.is_ready_at(true, later));
    }

    #[test]
    fn the_word_of_the_destination_counts() {
        let (word, follow) = watch::channel(destination::Health::Starting);
        let health = Health::new(follow);
        assert!(!health.is_ready(false));
        word.send_replace(destination::Health::Ready);
        assert!(health.is_ready(false));
        word.send_replace(destination::Health::Down { reason: "away".to_owned() });
        assert!(!health.is_ready(false));
    }
}

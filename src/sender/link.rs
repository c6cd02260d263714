//! What streams see of the connections to receivers.
//!
//! The links that live are published through a watch channel, and each stream uses one at a time.
//! A link that breaks costs nothing: every stream sends what has no receipt on another one.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::debug;
use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

use crate::protocol::{Receipt, Refused, Welcome};
use crate::transport::Outgoing;

/// Messages between streams and the socket: enough to keep it busy, few enough to stay small.
const OUTGOING_MAX: usize = 4;

/// Streams with much to send that wait for credit or for the socket at a time, likewise.
const TURNS_MAX: usize = 4;

/// A connection on which lines can be sent.
#[derive(Debug)]
pub struct Link {
    /// Which receiver it leads to: its URL, or its name in the tokens file.
    pub receiver: String,
    /// What the receiver said.
    pub welcome: Welcome,
    /// Uncompressed bytes that may still be sent.
    pub credit: Semaphore,
    /// Frames that may still be sent.
    pub frames: Semaphore,
    /// What a stream with much to send holds for each frame, from before its credit until it is on
    /// its way. So who has little to send waits for the frames of a few, however many they are.
    pub turns: Semaphore,
    /// Whether frames are compressed.
    pub compress: bool,
    /// Cancelled when the connection is gone.
    pub closed: CancellationToken,
    /// The receiver is about to stop: nothing new is sent.
    pub draining: CancellationToken,
    granted: Mutex<u64>,
    outgoing: mpsc::Sender<Outgoing>,
    routes: Mutex<HashMap<u32, Route>>,
    next_handle: AtomicU32,
}

/// What a receiver says about a segment.
#[derive(Clone, Debug)]
pub enum Letter {
    /// Verdicts.
    Receipt(Receipt),
    /// It does not take the segment.
    Refused(Refused),
}

impl Letter {
    /// The segment that it is about.
    pub fn handle(&self) -> u32 {
        match self {
            Letter::Receipt(receipt) => receipt.handle,
            Letter::Refused(refused) => refused.handle,
        }
    }
}

/// Who gets the letters about a segment.
#[derive(Debug)]
enum Route {
    Stream(Arc<Mailbox>),
    /// Nobody: its stream ended while the receiver had so much of it, which is counted here, since the
    /// receiver counts it too.
    Nobody {
        bytes: u64,
        frames: usize,
    },
}

/// Letters for one stream. Bounded by what the stream has sent and not seen receipted.
#[derive(Debug, Default)]
pub struct Mailbox {
    letters: Mutex<VecDeque<Letter>>,
    /// Also rung by others who want the stream to look around.
    pub wake: Notify,
}

impl Mailbox {
    /// Takes all letters.
    pub fn take(&self) -> VecDeque<Letter> {
        std::mem::take(&mut *lock(&self.letters))
    }

    fn put(&self, letter: Letter) {
        lock(&self.letters).push_back(letter);
        self.wake.notify_one();
    }
}

/// The links that live.
#[derive(Clone, Debug, Default)]
pub struct Links(Vec<Arc<Link>>);

impl Links {
    /// The link on which new lines of this run are sent. The highest weight wins, made of run and
    /// receiver, so that a receiver that comes or goes moves no other runs than its own.
    pub fn choose(&self, run: Uuid) -> Option<&Arc<Link>> {
        let open = self.0.iter().filter(|link| link.takes_more());
        open.max_by_key(|link| {
            let mut weight = Xxh3::new();
            weight.update(run.as_bytes());
            weight.update(link.receiver.as_bytes());
            weight.digest()
        })
    }

    /// How many they are.
    pub fn count(&self) -> u64 {
        self.0.len() as u64
    }

    /// Adds a link.
    pub fn add(&mut self, link: Arc<Link>) {
        self.0.push(link);
    }

    /// Takes a link out.
    pub fn remove(&mut self, link: &Link) {
        self.0.retain(|other| !std::ptr::eq(&**other, link));
    }
}

impl Link {
    /// What the connection is to write comes out of the other end.
    pub fn new(
        receiver: String,
        welcome: Welcome,
        compress: bool,
    ) -> (Link, mpsc::Receiver<Outgoing>) {
        let (outgoing, messages) = mpsc::channel(OUTGOING_MAX);
        let credit = welcome.credit.min(CREDIT_MAX);
        let frames = usize::try_from(welcome.limits.frames).unwrap_or(usize::MAX);
        let link = Link {
            credit: Semaphore::new(credit as usize),
            frames: Semaphore::new(frames.clamp(1, Semaphore::MAX_PERMITS)),
            turns: Semaphore::new(TURNS_MAX),
            compress: compress && welcome.features.iter().any(|feature| feature == "zstd"),
            closed: CancellationToken::new(),
            draining: CancellationToken::new(),
            receiver,
            granted: Mutex::new(credit),
            outgoing,
            routes: Mutex::default(),
            next_handle: AtomicU32::new(1),
            welcome,
        };
        (link, messages)
    }

    /// A handle whose letters go into this mailbox.
    pub fn register(&self, mailbox: Arc<Mailbox>) -> u32 {
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        lock(&self.routes).insert(handle, Route::Stream(mailbox));
        handle
    }

    /// Forgets a segment; the credit of what still awaits a receipt comes back with that.
    pub fn unregister(&self, handle: u32, bytes: u64, frames: usize) {
        let mut routes = lock(&self.routes);
        match bytes {
            0 => routes.remove(&handle),
            _ => routes.insert(handle, Route::Nobody { bytes, frames }),
        };
    }

    /// Hands a message to the connection; `false` when it is gone.
    pub async fn send(&self, message: Outgoing) -> bool {
        tokio::select! {
            () = self.closed.cancelled() => false,
            sent = self.outgoing.send(message) => sent.is_ok(),
        }
    }

    /// Whether the receiver still takes new lines.
    pub fn takes_more(&self) -> bool {
        !self.draining.is_cancelled() && !self.closed.is_cancelled()
    }

    /// Whether nothing awaits a receipt.
    pub fn is_idle(&self) -> bool {
        self.credit.available_permits() as u64 >= *lock(&self.granted)
    }

    /// Sets the total credit: a larger one is there at once, a smaller one as receipts come.
    pub fn grant(&self, bytes: u64) {
        let bytes = bytes.min(CREDIT_MAX);
        let mut granted = lock(&self.granted);
        if bytes >= *granted {
            self.credit.add_permits((bytes - *granted) as usize);
            *granted = bytes;
        } else {
            *granted -= self.credit.forget_permits((*granted - bytes) as usize) as u64;
        }
    }

    /// Hands a letter to the stream that it is for.
    pub fn route(&self, handle: u32, letter: Letter) {
        let mut routes = lock(&self.routes);
        match routes.get_mut(&handle) {
            Some(Route::Stream(mailbox)) => mailbox.put(letter),
            Some(Route::Nobody { bytes, frames }) => {
                let answered = match letter {
                    Letter::Receipt(receipt) => receipt.to.saturating_sub(receipt.from).min(*bytes),
                    Letter::Refused(_) => *bytes,
                };
                *bytes -= answered;
                self.credit.add_permits(answered as usize);
                if *bytes == 0 {
                    self.frames.add_permits(*frames);
                    routes.remove(&handle);
                }
            }
            None => debug!(handle, "letter for a segment that is finished"),
        }
    }
}

/// More credit than a sender makes use of; bounds what it keeps in its windows (I7).
const CREDIT_MAX: u64 = 64 << 20;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{DayBounds, Limits, RefusalCode, VERSION};
    use crate::record::{Day, IndexRule, SenderId};

    fn link(receiver: &str) -> Arc<Link> {
        let today = Day::today();
        let welcome = Welcome {
            version: VERSION,
            features: Vec::new(),
            sender: SenderId::mint(),
            name: "test".to_owned(),
            credit: 1 << 20,
            limits: Limits { frame_bytes: 1 << 20, frames: 10 },
            rule: IndexRule::default(),
            types: Vec::new(),
            days: DayBounds { from: today, to: today },
            destination: None,
        };
        Arc::new(Link::new(receiver.to_owned(), welcome, false).0)
    }

    #[test]
    fn credit_of_an_ended_stream_comes_back_with_its_receipts() {
        let link = link("wss://a/");
        let mailbox = Arc::new(Mailbox::default());
        let handle = link.register(mailbox.clone());
        link.credit.try_acquire_many(100).expect("credit").forget();
        link.frames.try_acquire_many(2).expect("frames").forget();
        let receipt = |from, to| {
            link.route(handle, Letter::Receipt(Receipt { handle, from, to, runs: Vec::new() }));
        };
        let left = || (link.credit.available_permits(), link.frames.available_permits());
        receipt(0, 10);
        assert_eq!((mailbox.take().len(), left()), (1, ((1 << 20) - 100, 8)), "its stream counts");
        link.unregister(handle, 90, 2);
        assert_eq!(left(), ((1 << 20) - 100, 8));
        receipt(10, 40);
        assert_eq!(left(), ((1 << 20) - 70, 8));
        assert!(!link.is_idle());
        receipt(40, 100);
        assert_eq!(left(), ((1 << 20) - 10, 10));
        receipt(40, 100);
        assert_eq!(left(), ((1 << 20) - 10, 10), "an answer counts once");
    }

    #[test]
    fn a_refusal_gives_all_credit_of_an_ended_stream_back() {
        let link = link("wss://a/");
        let handle = link.register(Arc::default());
        link.credit.try_acquire_many(100).expect("credit").forget();
        link.unregister(handle, 100, 0);
        let (code, reason) = (RefusalCode::Type, String::new());
        link.route(handle, Letter::Refused(Refused { handle, code, reason }));
        assert!(link.is_idle());
    }

    #[test]
    fn runs_are_spread_and_a_lost_receiver_moves_only_its_own() {
        let all = [link("wss://a/"), link("wss://b/"), link("wss://c/")];
        let links = Links(all.to_vec());
        let runs: Vec<Uuid> = (0..300).map(|_| Uuid::now_v7()).collect();
        let choice = |links: &Links, run: Uuid| links.choose(run).expect("one").receiver.clone();
        let before: Vec<String> = runs.iter().map(|run| choice(&links, *run)).collect();
        for link in &all {
            let its = before.iter().filter(|receiver| **receiver == link.receiver).count();
            assert!((50..150).contains(&its), "{its} of 300 to {}", link.receiver);
        }
        all[1].draining.cancel();
        for (run, before) in runs.iter().zip(before) {
            let after = choice(&links, *run);
            assert!(after != all[1].receiver);
            assert!(after == before || before == all[1].receiver);
        }
        all[0].closed.cancel();
        all[2].closed.cancel();
        assert!(links.choose(runs[0]).is_none());
    }
}

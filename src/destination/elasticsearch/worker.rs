//! One request slot: takes what is there, sends it, sorts the answers, goes on.
//!
//! As many run side by side as requests may be in flight. A worker never lingers for more lines and
//! never waits for a single line's second attempt: that waits aside.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::destination::Queue;

use super::answer::{Answer, Answers};
use super::aside::{Aside, Parking, Work};
use super::batch::{Batch, Judge, Next, Part, Room, Stretch};
use super::dead_letter::DeadLetter;
use super::exchange::{Exchange, Outcome, Stopped};
use super::target::{Kind, Target, Targets};
use super::verdict::{self, Attempt, Circumstances, Fate, Pause};

/// Between attempts of a document that met 429, 503 or another 5xx.
const AGAIN_MIN: Duration = Duration::from_millis(250);
const AGAIN_MAX: Duration = Duration::from_secs(8);

/// When a sender tries again what found no room to wait here.
const FULL_DELAY: Duration = Duration::from_secs(2);

/// What all workers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) exchange: Exchange,
    pub(super) queue: Arc<Queue>,
    pub(super) targets: Targets,
    pub(super) aside: Aside,
    pub(super) dead_letter: DeadLetter,
    /// Least time between the two creates of a conflict.
    pub(super) conflict_pause: Duration,
}

impl Shared {
    /// Holds lines until they are due; those for which there is no room go back.
    pub(super) fn put_aside(&self, due: Instant, work: Work) {
        if let Err(work) = self.aside.push(due, work) {
            work.stretch().defer("too many lines wait for another attempt", FULL_DELAY);
        }
    }
}

/// A request slot.
pub(super) struct Worker {
    shared: Arc<Shared>,
    room: Room,
    reply: Vec<u8>,
    again: Backoff,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>) -> Worker {
        let haste = shared.exchange.haste;
        let again = Backoff::new(AGAIN_MIN / haste, AGAIN_MAX / haste);
        Worker { shared, room: Room::default(), reply: Vec::new(), again }
    }

    /// Works until the queue is closed and everything is answered, or until the process stops.
    pub(super) async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut closed = false;
        loop {
            let work = tokio::select! {
                biased;
                () = shared.exchange.shutdown.cancelled() => return,
                work = shared.aside.take(closed) => match work {
                    Some(work) => work,
                    // Another worker may be at it still; what it puts aside is its own.
                    None => return,
                },
                frame = shared.queue.pop(), if !closed => match frame {
                    Some(frame) => Work::Index(Stretch::whole(frame, &shared.targets)),
                    None => {
                        closed = true;
                        continue;
                    }
                },
            };
            let done = match work {
                Work::Index(stretch) => self.index(stretch).await,
                Work::Park(parking) => self.park(parking).await,
            };
            if done.is_err() {
                return;
            }
        }
    }

    /// One bulk request, which starts with this stretch.
    async fn index(&mut self, first: Stretch) -> Result<(), Stopped> {
        let shared = Arc::clone(&self.shared);
        let room = std::mem::take(&mut self.room);
        let mut batch = Batch::new(room, shared.exchange.batch_bytes());
        self.admit(first, &mut batch).await;
        while batch.has_room() {
            let stretch = match shared.aside.try_take() {
                Some(Work::Index(stretch)) => stretch,
                Some(parking) => {
                    // Its turn comes as soon as a slot is free.
                    shared.aside.hand_on(parking);
                    break;
                }
                None => match shared.queue.try_pop() {
                    Some(frame) => Stretch::whole(frame, &shared.targets),
                    None => break,
                },
            };
            self.admit(stretch, &mut batch).await;
            // Building is work without a pause; the connections want to be served too.
            tokio::task::yield_now().await;
        }
        let (body, sent) = batch.seal();
        let outcome = match body.documents() {
            0 => Outcome { answers: Answers::AllStored(0), repeated: false },
            _ => shared.exchange.send(&body, &mut self.reply).await?,
        };
        self.learn(sent.parts(), &outcome.answers).await;
        let mut judge = Answered::new(&outcome, shared.conflict_pause);
        let open = sent.settle(&outcome.answers, &mut judge);
        self.room = sent.recycle(body);
        self.keep(open, judge.busy).await
    }

    /// Adds lines to a batch, index by index.
    async fn admit(&self, mut stretch: Stretch, batch: &mut Batch) {
        let shared = &self.shared;
        while let Some(rest) = stretch.split(&shared.targets) {
            self.admit_one_index(stretch, batch).await;
            if !batch.has_room() {
                return shared.aside.hand_on(Work::Index(rest));
            }
            stretch = rest;
        }
        self.admit_one_index(stretch, batch).await;
    }

    /// Adds lines to a batch, unless their index takes none.
    async fn admit_one_index(&self, stretch: Stretch, batch: &mut Batch) {
        let shared = &self.shared;
        let target = Arc::clone(&stretch.target);
        if let Some((reason, after)) = target.trouble(Instant::now()) {
            return stretch.defer_for(&target, &reason, after);
        }
        if target.wants_check(Instant::now()) {
            target.check(&shared.exchange.client).await;
            if let Kind::Refused(reason) = target.view().kind {
                let after = target.set_trouble(&reason, Instant::now());
                return stretch.defer_for(&target, &reason, after);
            }
        }
        if let Some(since) = stretch.attempt.conflict
            && let Err(reason) = target.flush(&shared.exchange.client, since).await
        {
            return stretch.defer(&reason, target.delay());
        }
        if let Some(rest) = batch.add(stretch, now_ms()) {
            shared.aside.hand_on(Work::Index(rest));
        }
    }

    /// Notes what the answers say of their indices.
    async fn learn(&self, parts: &[Part], answers: &Answers) {
        for part in parts {
            let target = &part.stretch.target;
            let documents = part.documents();
            let stored = match answers {
                Answers::AllStored(_) => documents.len(),
                Answers::Each(answers) => {
                    let answers = &answers[documents];
                    if answers.iter().any(|answer| matches!(answer, Answer::Elsewhere(_))) {
                        target.check(&self.shared.exchange.client).await;
                    }
                    answers.iter().filter(|answer| **answer == Answer::Stored).count()
                }
            };
            if stored > 0 {
                target.add_stored(stored);
            }
        }
    }

    /// Puts aside what has no verdict yet; rests where Elasticsearch has too much to do.
    async fn keep(&mut self, open: Vec<(Stretch, Next)>, busy: bool) -> Result<(), Stopped> {
        let shared = &self.shared;
        let now = Instant::now();
        let backoff = self.again.delay();
        let mut waits = false;
        for (stretch, next) in open {
            let work = |attempt: Attempt| Work::Index(Stretch { attempt, ..stretch.clone() });
            let (due, work) = match next {
                Next::Again(attempt, Pause::None) => (now, work(attempt)),
                Next::Again(attempt, Pause::Conflict) => {
                    let first = attempt.conflict.unwrap_or(now);
                    (first + shared.conflict_pause, work(attempt))
                }
                Next::Again(attempt, Pause::Backoff) => {
                    waits = true;
                    (now + backoff, work(attempt))
                }
                Next::Park(reason) => {
                    (now, Work::Park(Parking { stretch, reason, conflict: None }))
                }
            };
            shared.put_aside(due, work);
        }
        if !waits {
            self.again.reset();
        }
        if busy { shared.exchange.pause(backoff).await } else { Ok(()) }
    }

    /// One bulk request for the dead letter, which starts with this stretch.
    async fn park(&mut self, first: Parking) -> Result<(), Stopped> {
        let shared = Arc::clone(&self.shared);
        let mut parkings = vec![first];
        let bytes_max = shared.exchange.batch_bytes();
        let mut bytes = parkings[0].stretch.len();
        while bytes < bytes_max {
            match shared.aside.try_take() {
                Some(Work::Park(parking)) => {
                    bytes += parking.stretch.len();
                    parkings.push(parking);
                }
                Some(stretch) => {
                    shared.aside.hand_on(stretch);
                    break;
                }
                None => break,
            }
        }
        shared.dead_letter.write(&shared, parkings, now_ms(), &mut self.reply).await
    }
}

/// Judges the answers of one exchange.
struct Answered<'a> {
    outcome: &'a Outcome,
    now: Instant,
    conflict_pause: Duration,
    /// 429 was among them.
    busy: bool,
    /// The delay that the lines of a target get: the same for all, so that their receipt is short.
    delay: Option<(Arc<Target>, Duration)>,
}

impl Answered<'_> {
    fn new(outcome: &Outcome, conflict_pause: Duration) -> Answered<'_> {
        Answered { outcome, now: Instant::now(), conflict_pause, busy: false, delay: None }
    }
}

impl Judge for Answered<'_> {
    fn fate(&mut self, part: &Part, document: usize, single: impl FnOnce() -> Stretch) -> Fate {
        let answer = self.outcome.answers.get(document);
        let target = &part.stretch.target;
        let attempt = part.stretch.attempt;
        self.busy |= matches!(answer, Answer::Busy(_));
        let refused = matches!(answer, Answer::Refused(_) | Answer::Broken(_));
        let id = if refused { single().first_id() } else { None };
        let remembered = id.and_then(|id| target.refused_when(&id));
        let at = Circumstances {
            now: self.now,
            conflict_pause: self.conflict_pause,
            repeated: self.outcome.repeated,
            stored_before: remembered.unwrap_or(part.stored_before),
        };
        let fate = match answer {
            Answer::Stored => Fate::Stored,
            answer => verdict::fate(answer, attempt, &target.view(), at),
        };
        match (&fate, id, attempt.refused_when) {
            (Fate::Deferred(_), Some(id), Some(stored)) => target.remember_refused(id, stored),
            (Fate::Park(_), Some(id), _) => target.forget_refused(&id),
            _ => {}
        }
        fate
    }

    fn delay(&mut self, part: &Part, fate: &Fate) -> Duration {
        let target = &part.stretch.target;
        match (&self.delay, fate) {
            (Some((of, delay)), _) if Arc::ptr_eq(of, target) => *delay,
            (_, fate) => {
                let delay = match fate {
                    Fate::IndexTrouble(reason) => target.set_trouble(reason, self.now),
                    _ => target.delay(),
                };
                self.delay = Some((Arc::clone(target), delay));
                delay
            }
        }
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

//! What an answer means for a line: one pure function over answer, history and index.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::parse::Form;

use super::answer::Answer;
use super::target::{Kind, View};

/// How often a document meets a 5xx before it is tried in reduced form.
const FAILURES_MAX: u8 = 5;

/// How often a document meets 429 or 503 before it goes back to its sender, so that the memory it
/// holds serves other indices (I6).
const BUSY_MAX: u8 = 6;

/// What a line went through so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Attempt {
    pub(super) form: Form,
    /// When a first conflict was answered.
    pub(super) conflict: Option<Instant>,
    /// 5xx answers.
    pub(super) failures: u8,
    /// 429 and 503 answers.
    pub(super) busy: u8,
    /// First refused, or met by a 5xx, when so many documents of its index were stored.
    pub(super) refused_when: Option<u64>,
}

impl Attempt {
    /// The first one.
    pub(super) const FIRST: Attempt =
        Attempt { form: Form::Full, conflict: None, failures: 0, busy: 0, refused_when: None };
}

/// What becomes of a line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    /// In its index.
    Stored,
    /// In its index since an earlier attempt.
    Already,
    /// No document.
    Skipped,
    /// Tried again by us.
    Again(Attempt, Pause),
    /// Belongs into the dead letter.
    Park(Arc<str>),
    /// Back to the sender: its index takes nothing for now.
    IndexTrouble(Arc<str>),
    /// Back to the sender: its index refuses this line, and may take others.
    Deferred(Arc<str>),
    /// Back to the sender: there is too much to do for now.
    Busy(Arc<str>),
}

/// When a line is tried again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pause {
    /// At once.
    None,
    /// After a jittered backoff.
    Backoff,
    /// After the pause between the two creates of a conflict.
    Conflict,
}

/// Circumstances of an exchange.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Circumstances {
    /// When the answer came.
    pub(super) now: Instant,
    /// Least time between the two creates of a conflict.
    pub(super) conflict_pause: Duration,
    /// The request was sent more than once, so that a conflict may be with ourselves, just now.
    pub(super) repeated: bool,
    /// Documents of its index stored before the request was sent, or when the line was refused in
    /// an earlier round.
    pub(super) stored_before: u64,
}

/// Decides over one answer.
pub(super) fn fate(answer: &Answer, attempt: Attempt, target: &View, at: Circumstances) -> Fate {
    match answer {
        Answer::Stored => Fate::Stored,
        Answer::Pipeline => Fate::Park(Arc::from("pipeline")),
        Answer::Elsewhere(index) => elsewhere(index, target),
        Answer::Conflict => match attempt.conflict {
            Some(first) if !at.repeated && at.now >= first + at.conflict_pause => Fate::Already,
            _ => Fate::Again(Attempt { conflict: Some(at.now), ..attempt }, Pause::Conflict),
        },
        Answer::Busy(reason) | Answer::Unavailable(reason) => match attempt.busy + 1 {
            BUSY_MAX.. => Fate::Busy(Arc::clone(reason)),
            busy => Fate::Again(Attempt { busy, ..attempt }, Pause::Backoff),
        },
        Answer::Broken(reason) => match attempt.failures + 1 {
            FAILURES_MAX.. => refused(reason, attempt, target, at),
            failures => {
                let refused_when = attempt.refused_when.or(Some(at.stored_before));
                Fate::Again(Attempt { failures, refused_when, ..attempt }, Pause::Backoff)
            }
        },
        Answer::Index(reason) => Fate::IndexTrouble(Arc::clone(reason)),
        Answer::Refused(reason) => refused(reason, attempt, target, at),
        Answer::Unacceptable(reason) => Fate::Park(Arc::clone(reason)),
    }
}

/// Once more in reduced form; refused in that form too, it is the line's fault only where its index
/// has taken another one since.
fn refused(reason: &Arc<str>, attempt: Attempt, target: &View, at: Circumstances) -> Fate {
    match (attempt.form, attempt.refused_when) {
        (Form::Reduced, Some(before)) if target.stored > before => Fate::Park(Arc::clone(reason)),
        (Form::Reduced, _) => Fate::Deferred(Arc::clone(reason)),
        (Form::Full, _) => {
            let refused_when = attempt.refused_when.or(Some(at.stored_before));
            let attempt = Attempt { form: Form::Reduced, refused_when, failures: 0, ..attempt };
            Fate::Again(attempt, Pause::None)
        }
    }
}

fn elsewhere(index: &str, target: &View) -> Fate {
    match &target.kind {
        Kind::Refused(reason) => Fate::IndexTrouble(Arc::clone(reason)),
        // The name stands for an index, so that only a pipeline can have sent the line elsewhere.
        Kind::Index | Kind::Missing => Fate::Park(Arc::from("pipeline")),
        Kind::Hidden | Kind::Unchecked if target.named => Fate::Park(Arc::from("pipeline")),
        Kind::Hidden | Kind::Unchecked => Fate::IndexTrouble(Arc::from(format!(
            "documents land in {index}: an alias, a data stream or a pipeline stands behind the name"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_secs(2);

    fn at(now: Instant) -> Circumstances {
        Circumstances { now, conflict_pause: PAUSE, repeated: false, stored_before: 7 }
    }

    fn view(stored: u64) -> View {
        View { kind: Kind::Index, named: true, stored }
    }

    fn decide(answer: &Answer, attempt: Attempt) -> Fate {
        fate(answer, attempt, &view(7), at(Instant::now()))
    }

    fn why() -> Arc<str> {
        Arc::from("why")
    }

    #[test]
    fn only_created_in_the_named_index_is_stored() {
        assert_eq!(decide(&Answer::Stored, Attempt::FIRST), Fate::Stored);
        assert_eq!(decide(&Answer::Pipeline, Attempt::FIRST), Fate::Park("pipeline".into()));
    }

    #[test]
    fn a_conflict_is_believed_at_the_second_create_two_seconds_later() {
        let first = Instant::now();
        let Fate::Again(attempt, Pause::Conflict) =
            fate(&Answer::Conflict, Attempt::FIRST, &view(0), at(first))
        else {
            panic!("held aside");
        };
        let second = |later: Duration, repeated: bool| {
            let at = Circumstances { repeated, ..at(first + later) };
            fate(&Answer::Conflict, attempt, &view(0), at)
        };
        assert_eq!(second(PAUSE, false), Fate::Already);
        assert!(matches!(second(PAUSE / 2, false), Fate::Again(_, Pause::Conflict)));
        assert!(
            matches!(second(PAUSE, true), Fate::Again(_, Pause::Conflict)),
            "a request sent twice may conflict with itself"
        );
        assert_eq!(fate(&Answer::Stored, attempt, &view(0), at(first + PAUSE)), Fate::Stored);
    }

    #[test]
    fn busy_documents_are_tried_again_and_then_give_their_memory_back() {
        for answer in [Answer::Busy(why()), Answer::Unavailable(why())] {
            let mut attempt = Attempt::FIRST;
            for _ in 1..BUSY_MAX {
                let Fate::Again(next, Pause::Backoff) = decide(&answer, attempt) else {
                    panic!("again");
                };
                attempt = next;
            }
            assert_eq!(decide(&answer, attempt), Fate::Busy(why()));
        }
    }

    #[test]
    fn a_5xx_met_five_times_is_tried_in_reduced_form() {
        let mut attempt = Attempt::FIRST;
        for _ in 1..FAILURES_MAX {
            let Fate::Again(next, Pause::Backoff) = decide(&Answer::Broken(why()), attempt) else {
                panic!("again");
            };
            attempt = next;
            assert_eq!(attempt.form, Form::Full);
        }
        let Fate::Again(attempt, Pause::None) = decide(&Answer::Broken(why()), attempt) else {
            panic!("reduced");
        };
        assert_eq!((attempt.form, attempt.failures), (Form::Reduced, 0));
    }

    #[test]
    fn a_line_is_parked_only_where_its_index_took_another_one() {
        let refused = Answer::Refused(why());
        let Fate::Again(attempt, Pause::None) = decide(&refused, Attempt::FIRST) else {
            panic!("reduced");
        };
        assert_eq!((attempt.form, attempt.refused_when), (Form::Reduced, Some(7)));
        let again = |stored| fate(&refused, attempt, &view(stored), at(Instant::now()));
        assert_eq!(again(7), Fate::Deferred(why()));
        assert_eq!(again(8), Fate::Park(why()));
    }

    #[test]
    fn an_index_that_is_none_is_never_stored() {
        let elsewhere = Answer::Elsewhere(Arc::from("real"));
        let with = |kind, named| {
            let view = View { kind, named, stored: 0 };
            fate(&elsewhere, Attempt::FIRST, &view, at(Instant::now()))
        };
        assert_eq!(with(Kind::Refused(why()), false), Fate::IndexTrouble(why()));
        assert!(matches!(with(Kind::Hidden, false), Fate::IndexTrouble(_)));
        assert!(matches!(with(Kind::Unchecked, false), Fate::IndexTrouble(_)));
        assert_eq!(with(Kind::Hidden, true), Fate::Park("pipeline".into()));
        assert_eq!(with(Kind::Index, false), Fate::Park("pipeline".into()));
        assert_eq!(with(Kind::Missing, false), Fate::Park("pipeline".into()));
    }

    #[test]
    fn faults_of_the_index_and_of_one_document_keep_apart() {
        assert_eq!(decide(&Answer::Index(why()), Attempt::FIRST), Fate::IndexTrouble(why()));
        assert_eq!(decide(&Answer::Unacceptable(why()), Attempt::FIRST), Fate::Park(why()));
    }
}

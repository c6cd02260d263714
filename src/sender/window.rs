//! The window of one segment: what was sent, what was receipted, what comes next. No I/O.
//!
//! Receipts come in any order; the position is the end of the unbroken prefix (I2). Ranges never
//! overlap and never leave a gap behind the frontier, whatever the receiver says.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;

use crate::protocol::{Receipt, Run, Verdict};
use crate::state::Fingerprint;

/// What the window wants next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Send exactly this range again.
    Again {
        /// First byte.
        from: u64,
        /// One past the last byte.
        to: u64,
        /// What the bytes before `to` were when they were sent first, where `to` ended a frame.
        fingerprint: Option<Fingerprint>,
    },
    /// Read on from here.
    New {
        /// First byte that was never sent.
        from: u64,
    },
    /// Everything up to the segment's end is on its way or receipted.
    Nothing,
}

/// A contiguous range of whole records with one state.
#[derive(Clone, Debug)]
struct Span {
    from: u64,
    to: u64,
    state: SpanState,
    /// At `to`, where it is the end of a frame.
    fingerprint: Option<Fingerprint>,
    /// The records, where somebody wants to see the receipts.
    records: Bytes,
    continues: bool,
    /// Data frames that count as outstanding until this span is settled: 1, or 0 for a piece.
    frames: u32,
}

impl Span {
    fn again(&self) -> Next {
        Next::Again { from: self.from, to: self.to, fingerprint: self.fingerprint }
    }
}

#[derive(Clone, Debug)]
enum SpanState {
    /// On the wire of the current connection.
    Sent,
    /// To be sent again, on the next occasion.
    Unsent,
    /// To be sent again, not before this instant.
    Waiting(Instant),
    /// Receipted, skipped or reported lost.
    Done(Vec<Run>),
}

/// A finished range at the front of the window, for the receipts that a person reads.
#[derive(Clone, Debug)]
pub struct Finished {
    /// First byte.
    pub from: u64,
    /// One past the last byte.
    pub to: u64,
    /// What became of its records, in order.
    pub runs: Vec<Run>,
    /// The records themselves; empty where they were not asked for.
    pub records: Bytes,
    /// The first one goes on from one that was cut.
    pub continues: bool,
}

/// What a receipt changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counted {
    /// Lines newly stored.
    pub stored: u64,
    /// Lines that were there already.
    pub already: u64,
    /// Lines without a document.
    pub skipped: u64,
    /// Lines newly parked.
    pub parked: u64,
    /// Bytes whose credit came back: receipted or deferred.
    pub credit: u64,
    /// Frames that are not outstanding any more.
    pub frames: u32,
}

impl Counted {
    /// Lines with a verdict that is final.
    pub fn lines(&self) -> u64 {
        self.stored + self.already + self.skipped + self.parked
    }
}

/// See the module.
#[derive(Debug)]
pub struct Window {
    spans: VecDeque<Span>,
    position: u64,
    /// The newest position at which the bytes before are known: what can be saved.
    anchor: Option<Fingerprint>,
    frontier: u64,
    end: Option<u64>,
}

impl Window {
    /// For a segment receipted up to `position`, ending at `end` where that is known.
    pub fn new(position: u64, end: Option<u64>) -> Window {
        Window { spans: VecDeque::new(), position, anchor: None, frontier: position, end }
    }

    /// End of the unbroken prefix of receipts, skips and reported losses.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The first byte that was never sent.
    pub fn frontier(&self) -> u64 {
        self.frontier
    }

    /// Where the segment ends, once that is known.
    pub fn end(&self) -> Option<u64> {
        self.end
    }

    /// Whether nothing is left to do up to the segment's known end.
    pub fn is_finished(&self) -> bool {
        self.end.is_some_and(|end| self.position >= end)
    }

    /// Whether all that was ever sent is receipted.
    pub fn is_idle(&self) -> bool {
        self.spans.is_empty()
    }

    /// Whether all that was sent and is not receipted waits to be sent again later.
    pub fn is_deferred(&self) -> bool {
        let waits = |span: &Span| matches!(span.state, SpanState::Waiting(_) | SpanState::Done(_));
        !self.is_idle() && self.spans.iter().all(waits)
    }

    /// Bytes and frames on the wire without a receipt.
    pub fn outstanding(&self) -> (u64, u32) {
        let sent = self.spans.iter().filter(|span| matches!(span.state, SpanState::Sent));
        sent.fold((0, 0), |(bytes, frames), span| {
            (bytes + span.to - span.from, frames + span.frames)
        })
    }

    /// The newest position that can be saved, once.
    pub fn take_anchor(&mut self) -> Option<Fingerprint> {
        self.anchor.take()
    }

    /// Fixes the end. Nothing behind it was ever sent: the caller chose it at or past the frontier.
    pub fn set_end(&mut self, end: u64) {
        debug_assert!(end >= self.frontier);
        self.end = Some(end);
    }

    /// What to send next.
    pub fn next(&self, now: Instant) -> Next {
        for span in &self.spans {
            match span.state {
                SpanState::Unsent => return span.again(),
                SpanState::Waiting(until) if until <= now => {
                    return span.again();
                }
                _ => {}
            }
        }
        match self.end {
            Some(end) if self.frontier >= end => Next::Nothing,
            _ => Next::New { from: self.frontier },
        }
    }

    /// When the next deferred range is due.
    pub fn next_due(&self) -> Option<Instant> {
        let due = |span: &Span| match span.state {
            SpanState::Waiting(until) => Some(until),
            _ => None,
        };
        self.spans.iter().filter_map(due).min()
    }

    /// New records were sent: they start at the frontier.
    pub fn sent_new(&mut self, to: u64, fingerprint: Fingerprint, records: Bytes, continues: bool) {
        debug_assert!(to > self.frontier);
        let span = Span {
            from: self.frontier,
            to,
            state: SpanState::Sent,
            fingerprint: Some(fingerprint),
            records,
            continues,
            frames: 1,
        };
        self.frontier = to;
        self.spans.push_back(span);
    }

    /// A range that [`Window::next`] named was sent again.
    pub fn sent_again(&mut self, from: u64, to: u64) {
        for span in &mut self.spans {
            if span.from == from && span.to == to {
                span.state = SpanState::Sent;
                span.frames = 1;
            }
        }
    }

    /// Bytes at the frontier that become no document: a NUL run, or a loss reported by the caller.
    pub fn skip(&mut self, to: u64, fingerprint: Option<Fingerprint>) {
        let (from, state) = (self.frontier, SpanState::Done(Vec::new()));
        self.frontier = to;
        let (records, continues, frames) = (Bytes::new(), false, 0);
        self.spans.push_back(Span { from, to, state, fingerprint, records, continues, frames });
        self.advance(&mut |_| {});
    }

    /// The connection is gone: what was on its way is to be sent again.
    pub fn disconnected(&mut self) {
        for span in &mut self.spans {
            if matches!(span.state, SpanState::Sent) {
                span.state = SpanState::Unsent;
            }
        }
    }

    /// Takes a receipt. Ranges that are not on their way are ignored: a receipt cannot be for
    /// anything else. `finished` sees each range that leaves the window, in order.
    pub fn receipt(
        &mut self,
        receipt: &Receipt,
        now: Instant,
        finished: &mut dyn FnMut(Finished),
    ) -> Counted {
        let mut counted = Counted::default();
        let mut from = receipt.from;
        for run in &receipt.runs {
            if run.to <= from {
                continue;
            }
            self.settle(from, run, now, &mut counted);
            from = run.to;
        }
        self.advance(finished);
        counted
    }

    /// One run of a receipt: splits the spans at its edges and settles those inside.
    fn settle(&mut self, from: u64, run: &Run, now: Instant, counted: &mut Counted) {
        let mut fresh = false;
        self.split(from);
        self.split(run.to);
        let first = self.spans.partition_point(|span| span.to <= from);
        for span in self.spans.iter_mut().skip(first).take_while(|span| span.to <= run.to) {
            if !matches!(span.state, SpanState::Sent) {
                continue;
            }
            fresh = true;
            counted.credit += span.to - span.from;
            counted.frames += std::mem::take(&mut span.frames);
            span.state = match &run.verdict {
                Verdict::Deferred { after, .. } => SpanState::Waiting(now + *after),
                _ => SpanState::Done(vec![run.clone()]),
            };
        }
        if fresh {
            match run.verdict {
                Verdict::Stored => counted.stored += run.lines,
                Verdict::Already => counted.already += run.lines,
                Verdict::Skipped => counted.skipped += run.lines,
                Verdict::Parked { .. } => counted.parked += run.lines,
                Verdict::Deferred { .. } => {}
            }
        }
    }

    /// Divides the span that contains `at`, if one does and it is on its way.
    fn split(&mut self, at: u64) {
        let number = self.spans.partition_point(|span| span.to <= at);
        let Some(span) = self.spans.get_mut(number) else { return };
        if span.from >= at || !matches!(span.state, SpanState::Sent) {
            return;
        }
        let mut rest = span.clone();
        let cut = (at - span.from) as usize;
        if !span.records.is_empty() {
            rest.records = span.records.slice(cut.min(span.records.len())..);
            span.records.truncate(cut);
        }
        span.to = at;
        span.fingerprint = None;
        span.frames = 0;
        rest.from = at;
        rest.continues = false;
        self.spans.insert(number + 1, rest);
    }

    /// Moves the position over what is done at the front.
    fn advance(&mut self, finished: &mut dyn FnMut(Finished)) {
        while let Some(span) = self.spans.front() {
            debug_assert_eq!(span.from, self.position, "no gap behind the frontier (I2)");
            let SpanState::Done(runs) = &span.state else { break };
            finished(Finished {
                from: span.from,
                to: span.to,
                runs: runs.clone(),
                records: span.records.clone(),
                continues: span.continues,
            });
            self.position = span.to;
            self.anchor = span.fingerprint.or(self.anchor);
            self.spans.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn mark(offset: u64) -> Fingerprint {
        Fingerprint { offset, hash: offset }
    }

    fn receipt(from: u64, runs: &[(u64, Verdict)]) -> Receipt {
        let to = runs.last().map_or(from, |(to, _)| *to);
        let runs = runs
            .iter()
            .map(|(to, verdict)| Run { to: *to, lines: 1, verdict: verdict.clone() })
            .collect();
        Receipt { handle: 1, from, to, runs }
    }

    fn deferred(seconds: u64) -> Verdict {
        let after = Duration::from_secs(seconds);
        Verdict::Deferred { reason: "later".to_owned(), after, index: None }
    }

    fn window(ends: &[u64]) -> Window {
        let mut window = Window::new(0, None);
        for &end in ends {
            window.sent_new(end, mark(end), Bytes::new(), false);
        }
        window
    }

    #[test]
    fn receipts_in_any_order_advance_only_an_unbroken_prefix() {
        let now = Instant::now();
        let mut window = window(&[10, 20, 30]);
        window.receipt(&receipt(20, &[(30, Verdict::Stored)]), now, &mut |_| {});
        assert_eq!(window.position(), 0);
        window.receipt(&receipt(0, &[(10, Verdict::Stored)]), now, &mut |_| {});
        assert_eq!(window.position(), 10);
        window.receipt(&receipt(10, &[(20, Verdict::Already)]), now, &mut |_| {});
        assert_eq!(window.position(), 30);
        assert_eq!(window.take_anchor(), Some(mark(30)));
        assert!(window.is_idle());
    }

    #[test]
    fn a_deferred_part_is_sent_again_alone_and_holds_the_position() {
        let now = Instant::now();
        let mut window = window(&[30]);
        let parts = [(10, Verdict::Stored), (20, deferred(5)), (30, Verdict::Stored)];
        let counted = window.receipt(&receipt(0, &parts), now, &mut |_| {});
        assert_eq!((counted.stored, counted.credit), (2, 30));
        assert_eq!(window.position(), 10);
        assert!(window.is_deferred() && !window.is_idle());
        assert_eq!(window.next(now), Next::New { from: 30 });
        let later = now + Duration::from_secs(5);
        assert_eq!(window.next_due(), Some(later));
        assert_eq!(window.next(later), Next::Again { from: 10, to: 20, fingerprint: None });
        window.sent_again(10, 20);
        assert!(!window.is_deferred(), "its second receipt is to come");
        assert_eq!(window.next(later), Next::New { from: 30 });
        window.receipt(&receipt(10, &[(20, Verdict::Stored)]), later, &mut |_| {});
        assert_eq!(window.position(), 30);
    }

    #[test]
    fn a_lost_connection_sends_only_what_has_no_receipt() {
        let now = Instant::now();
        let mut window = window(&[10, 20, 30]);
        window.receipt(&receipt(10, &[(20, Verdict::Stored)]), now, &mut |_| {});
        window.disconnected();
        assert_eq!(window.next(now), Next::Again { from: 0, to: 10, fingerprint: Some(mark(10)) });
        window.sent_again(0, 10);
        assert_eq!(window.next(now), Next::Again { from: 20, to: 30, fingerprint: Some(mark(30)) });
        window.sent_again(20, 30);
        assert_eq!(window.next(now), Next::New { from: 30 });
    }

    #[test]
    fn the_end_finishes_a_segment() {
        let now = Instant::now();
        let mut window = window(&[10]);
        window.set_end(10);
        assert_eq!(window.next(now), Next::Nothing);
        assert!(!window.is_finished());
        window.receipt(&receipt(0, &[(10, Verdict::Stored)]), now, &mut |_| {});
        assert!(window.is_finished());
    }

    #[test]
    fn a_stale_or_false_receipt_changes_nothing() {
        let now = Instant::now();
        let mut window = window(&[10]);
        window.receipt(&receipt(50, &[(90, Verdict::Stored)]), now, &mut |_| {});
        window.receipt(&receipt(0, &[]), now, &mut |_| {});
        assert_eq!(window.position(), 0);
        window.disconnected();
        // A receipt of the connection before: the range is not on its way.
        window.receipt(&receipt(0, &[(10, Verdict::Stored)]), now, &mut |_| {});
        assert_eq!(window.position(), 0);
    }

    proptest! {
        /// Whatever ranges and verdicts come, the position never passes a byte that was not
        /// settled for good, ranges finish in order and exactly once, and nothing panics.
        #[test]
        fn no_receipt_moves_the_position_too_far(
            steps in proptest::collection::vec((0_u64..60, 1_u64..20, 0_u8..4), 0..60)
        ) {
            let now = Instant::now();
            let mut window = Window::new(0, None);
            for frame in 1..=10 {
                window.sent_new(frame * 6, mark(frame * 6), Bytes::new(), false);
            }
            let mut settled = [false; 60];
            let mut waiting = [false; 60];
            let mut finished_to = 0;
            for (from, length, kind) in steps {
                let to = (from + length).min(60);
                let verdict = match kind {
                    0 => deferred(1_000_000),
                    1 => Verdict::Already,
                    _ => Verdict::Stored,
                };
                for at in from as usize..to as usize {
                    if !settled[at] && !waiting[at] {
                        if kind == 0 { waiting[at] = true } else { settled[at] = true }
                    }
                }
                let message = receipt(from, &[(to, verdict)]);
                window.receipt(&message, now, &mut |finished| {
                    assert_eq!(finished.from, finished_to);
                    finished_to = finished.to;
                });
                let prefix = settled.iter().take_while(|settled| **settled).count() as u64;
                prop_assert_eq!(window.position(), prefix);
                prop_assert_eq!(finished_to, prefix);
            }
        }
    }
}

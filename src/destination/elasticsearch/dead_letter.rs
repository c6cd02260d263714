//! The dead letter: lines that their index refuses, kept whole and durable with the reason.
//!
//! Called by the workers. `parked` is answered only when every piece of a line lies in the
//! dead-letter index; where that fails the line goes back to its sender (I1, I6). A document stays
//! where it is when the same line is stored later: the one in its own index supersedes it, as both
//! have the same id.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use tokio::time::Instant;

use crate::protocol::Verdict;
use crate::record::{Record, RecordKind};

use super::answer::{Answer, Answers};
use super::aside::{Parking, Work};
use super::batch::Stretch;
use super::bulk::Body;
use super::exchange::Stopped;
use super::target::Target;
use super::worker::Shared;

/// Longer lines are cut, in bytes: a document this size passes any proxy's default limit.
const PIECE_BYTES_MAX: usize = 256 << 10;

/// When a sender tries a line again that could be stored nowhere.
const DEFER: Duration = Duration::from_secs(10);

/// The dead-letter index.
#[derive(Debug)]
pub(super) struct DeadLetter {
    target: Arc<Target>,
}

/// One document; everything in it but the line tells where the line belongs.
#[derive(Serialize)]
struct Letter<'a> {
    reason: &'a str,
    /// When it was parked, milliseconds since 1970.
    time: u64,
    sender: String,
    sender_name: &'a str,
    source: &'a str,
    path: &'a str,
    segment: String,
    offset: u64,
    index: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    piece: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pieces: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<&'a str>,
    /// Instead of `line`, where the line is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    line_base64: Option<String>,
}

impl DeadLetter {
    pub(super) fn new(target: Arc<Target>) -> DeadLetter {
        DeadLetter { target }
    }

    /// Writes lines and answers them; those that met their own documents wait aside once more.
    pub(super) async fn write(
        &self,
        shared: &Shared,
        parkings: Vec<Parking>,
        now_ms: u64,
        reply: &mut Vec<u8>,
    ) -> Result<(), Stopped> {
        if let Some((reason, after)) = self.target.trouble(Instant::now()) {
            for parking in parkings {
                self.refuse(&parking, &reason, after);
            }
            return Ok(());
        }
        let earliest = parkings.iter().filter_map(|parking| parking.conflict).max();
        if let Some(since) = earliest
            && let Err(reason) = self.target.flush(&shared.exchange.client, since).await
        {
            for parking in parkings {
                parking.stretch.defer(&join(&parking, &reason), DEFER);
            }
            return Ok(());
        }
        let mut body = Body::new(Vec::new(), Vec::new());
        body.target(&self.target.name);
        let mut sent: Vec<(Parking, Range<usize>)> = Vec::new();
        for parking in parkings {
            self.add(shared, parking, now_ms, &mut body, &mut sent);
        }
        let body = body.seal();
        let outcome = shared.exchange.send(&body, reply).await?;
        for (parking, documents) in sent {
            self.settle(shared, parking, documents, &outcome.answers, outcome.repeated);
        }
        Ok(())
    }

    /// Adds what fits of a stretch; the rest waits for the next request.
    fn add(
        &self,
        shared: &Shared,
        mut parking: Parking,
        now_ms: u64,
        body: &mut Body,
        sent: &mut Vec<(Parking, Range<usize>)>,
    ) {
        let first = body.documents();
        let bytes_max = shared.exchange.batch_bytes();
        let stretch = parking.stretch.clone();
        let mut at = stretch.from;
        for record in stretch.records() {
            if body.len() >= bytes_max && body.documents() > 0 {
                let rest = Stretch { from: at, continues: record.continues, ..stretch.clone() };
                let (reason, conflict) = (Arc::clone(&parking.reason), parking.conflict);
                let rest = Work::Park(Parking { stretch: rest, reason, conflict });
                shared.aside.hand_on(rest);
                break;
            }
            if record.kind != RecordKind::Skipped {
                write_line(&stretch, &record, &parking.reason, now_ms, body);
            }
            at += record.length as u32;
        }
        if at > stretch.from {
            parking.stretch.to = at;
            sent.push((parking, first..body.documents()));
        }
    }

    /// Neither its own index nor this one takes the line.
    fn refuse(&self, parking: &Parking, why: &str, after: Duration) {
        parking.stretch.defer_for(&self.target, &join(parking, why), after);
    }

    fn settle(
        &self,
        shared: &Shared,
        parking: Parking,
        documents: Range<usize>,
        answers: &Answers,
        repeated: bool,
    ) {
        let mut conflict = false;
        for document in documents {
            match answers.get(document) {
                Answer::Stored => {}
                Answer::Conflict => conflict = true,
                failure => {
                    let reason = format!("dead letter not written: {}", describe(failure));
                    tracing::warn!(index = %self.target.name, %reason, "line sent back");
                    return match failure {
                        Answer::Index(why) => {
                            let after = self.target.set_trouble(why, Instant::now());
                            self.refuse(&parking, &reason, after)
                        }
                        Answer::Busy(_) | Answer::Unavailable(_) => {
                            parking.stretch.defer(&join(&parking, &reason), DEFER)
                        }
                        _ => self.refuse(&parking, &reason, DEFER),
                    };
                }
            }
        }
        if conflict && (parking.conflict.is_none() || repeated) {
            // As for any document: a conflict is believed when it is met again.
            let now = Instant::now();
            let again = Parking { conflict: Some(now), ..parking };
            return shared.put_aside(now + shared.conflict_pause, Work::Park(again));
        }
        tracing::warn!(
            index = %parking.stretch.target.name,
            sender = %parking.stretch.frame.segment.sender_name,
            reason = %parking.reason,
            "line parked"
        );
        parking.stretch.answer(Verdict::Parked { reason: parking.reason.to_string() });
    }
}

/// Why a line is to be parked, and why it cannot be.
fn join(parking: &Parking, why: &str) -> String {
    format!("{}; {why}", parking.reason)
}

fn describe(answer: &Answer) -> String {
    match answer {
        Answer::Stored | Answer::Conflict => "stored".to_owned(),
        Answer::Elsewhere(index) => format!("it went to {index}"),
        Answer::Pipeline => "a pipeline dropped it".to_owned(),
        Answer::Busy(reason)
        | Answer::Unavailable(reason)
        | Answer::Broken(reason)
        | Answer::Index(reason)
        | Answer::Refused(reason)
        | Answer::Unacceptable(reason) => reason.to_string(),
    }
}

fn write_line(stretch: &Stretch, record: &Record<'_>, reason: &str, now_ms: u64, body: &mut Body) {
    let segment = &stretch.frame.segment;
    let id = segment.ids.of(record);
    let day = stretch.frame.day_of(record).unwrap_or_else(|outside| outside.day);
    let index = segment.index_on(day);
    let text = std::str::from_utf8(record.payload).ok();
    let cuts = cuts(record.payload, text);
    let pieces = u32::try_from(cuts.len()).expect("a record has RECORD_BYTES_MAX bytes at most");
    for (number, cut) in (0..pieces).zip(cuts) {
        let letter = Letter {
            reason,
            time: now_ms,
            sender: segment.sender.to_string(),
            sender_name: &segment.sender_name,
            source: &segment.row.source,
            path: &segment.row.path,
            segment: segment.row.segment.to_string(),
            offset: record.offset,
            index: &index,
            piece: (pieces > 1).then_some(number),
            pieces: (pieces > 1).then_some(pieces),
            line: text.map(|text| &text[cut.clone()]),
            line_base64: text.is_none().then(|| STANDARD.encode(&record.payload[cut])),
        };
        let id = if number == 0 { id } else { id.piece(number) };
        body.create(&id, |out| {
            serde_json::to_writer(out, &letter).expect("strings and numbers are always JSON");
        });
    }
}

/// Where a line is cut: never within a character of a line that is UTF-8.
fn cuts(payload: &[u8], text: Option<&str>) -> Vec<Range<usize>> {
    let mut cuts = Vec::new();
    let mut from = 0;
    loop {
        let most = from + PIECE_BYTES_MAX;
        if most >= payload.len() {
            cuts.push(from..payload.len());
            return cuts;
        }
        let to = text.map_or(most, |text| text.floor_char_boundary(most));
        cuts.push(from..to);
        from = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_cut_between_characters_and_nothing_is_lost() {
        let text = "é".repeat(PIECE_BYTES_MAX) + "x";
        for text in [&text[..], "short", &text[..2 * (PIECE_BYTES_MAX / 2)]] {
            let cuts = cuts(text.as_bytes(), Some(text));
            let joined: String = cuts.iter().map(|cut| &text[cut.clone()]).collect();
            assert_eq!(joined, text);
            assert!(cuts.iter().all(|cut| (1..=PIECE_BYTES_MAX).contains(&cut.len())));
        }
        assert_eq!(cuts(&[0xff; PIECE_BYTES_MAX + 1], None).len(), 2);
        assert_eq!(cuts(&[0xff; PIECE_BYTES_MAX], None).len(), 1);
    }
}

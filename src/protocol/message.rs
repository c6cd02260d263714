//! Control messages: JSON objects with a `type`; fields a side does not know are ignored.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Chain;
use crate::record::{Day, IndexRule, Row, SenderId, TypeName};

/// Any control message.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Control {
    /// First message of the sender.
    Hello(Hello),
    /// The receiver's answer.
    Welcome(Welcome),
    /// Sender: a segment, before its first frame on this connection. Boxed: it is the largest.
    Open(Box<Open>),
    /// Receiver: this segment is not accepted; its frames are dropped unread.
    Refused(Refused),
    /// Receiver: verdicts of a range of one segment.
    Receipt(Receipt),
    /// Receiver: the number of bytes that may be without a receipt, from now on.
    Credit {
        /// Uncompressed bytes.
        bytes: u64,
    },
    /// Receiver: it is about to close; send nothing new.
    Drain(Drain),
}

impl Control {
    /// The text of the message.
    pub fn encode(&self) -> String {
        serde_json::to_string(self).expect("control messages have string keys only")
    }

    /// Reads a message; the error says what is wrong with it.
    pub fn decode(text: &str) -> Result<Control, serde_json::Error> {
        serde_json::from_str(text)
    }
}

/// What a sender says first.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// [`super::VERSION`].
    pub version: u32,
    /// What it can do beyond the version: `zstd`.
    #[serde(default)]
    pub features: Vec<String>,
    /// Minted when the state directory was made: two different ones under one token are reported.
    pub instance: Uuid,
    /// Minted when the process was started: two live ones of one instance are reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<Uuid>,
    /// Program and version, for the receiver's log.
    #[serde(default)]
    pub agent: String,
    /// The answer to the receiver's challenge, of a sender that has a chain key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain: Option<Chain>,
}

/// What a receiver answers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// [`super::VERSION`].
    pub version: u32,
    /// What both sides can do.
    #[serde(default)]
    pub features: Vec<String>,
    /// The authenticated sender.
    pub sender: SenderId,
    /// Its name in the tokens file.
    pub name: String,
    /// Uncompressed bytes that may be without a receipt; at least one largest frame.
    pub credit: u64,
    /// What the receiver accepts.
    pub limits: Limits,
    /// How the receiver names indices.
    pub rule: IndexRule,
    /// Types this sender may use.
    pub types: Vec<TypeName>,
    /// Days this receiver accepts.
    pub days: DayBounds,
    /// Identity of the destination, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<Uuid>,
}

/// Sizes that a receiver accepts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Largest frame, uncompressed bytes without header.
    pub frame_bytes: u64,
    /// Frames without a receipt.
    pub frames: u64,
}

/// First and last day that a row may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DayBounds {
    /// First day accepted.
    pub from: Day,
    /// Last day accepted.
    pub to: Day,
}

impl DayBounds {
    /// Whether the day lies within.
    pub fn contains(&self, day: Day) -> bool {
        (self.from..=self.to).contains(&day)
    }
}

/// Declares a segment under a small number that its frames carry.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Open {
    /// Chosen by the sender, unique on this connection.
    pub handle: u32,
    /// The segment's durable row, complete with sender and rule.
    pub row: Row,
}

/// A segment that the receiver does not accept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Refused {
    /// As in `open`.
    pub handle: u32,
    /// What kind of refusal.
    pub code: RefusalCode,
    /// For a person: why, and the line that mends it.
    pub reason: String,
}

/// Why a segment is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The row's index rule is neither this receiver's nor one of the former rules that it lists.
    Rule,
    /// The type is not one of those listed with the token.
    Type,
    /// The day lies outside the bounds.
    Day,
    /// The row names another sender than the authenticated one.
    Sender,
    /// The framing is not known here.
    Framing,
    /// Anything else that is wrong with the row.
    #[serde(other)]
    Row,
}

impl fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As it stands on the wire.
        self.serialize(f)
    }
}

/// Verdicts of one range of a segment; ranges come in any order.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Receipt {
    /// As in `open`.
    pub handle: u32,
    /// First byte of the range.
    pub from: u64,
    /// One past its last byte.
    pub to: u64,
    /// Runs of records with the same verdict, in order, covering the range.
    pub runs: Vec<Run>,
}

/// Neighbouring records with one verdict.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// One past the last byte of the run; it starts where the one before ended.
    pub to: u64,
    /// How many records it has.
    pub lines: u64,
    /// What became of them.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// What became of a record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// The destination holds it durably in its index.
    Stored,
    /// It was there already: a conflict met twice, at least 2 s apart.
    Already,
    /// No document: an empty line or NUL bytes.
    Skipped,
    /// It lies in the dead letter under its own id.
    Parked {
        /// Why the destination refused it.
        reason: String,
    },
    /// Nothing stored: send it again after a while.
    Deferred {
        /// Why not now.
        reason: String,
        /// When to try again, in milliseconds.
        #[serde(rename = "after_ms", with = "milliseconds")]
        after: Duration,
        /// The index that refuses the record, where a person may have to mend it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        index: Option<String>,
    },
}

impl Verdict {
    /// Whether the position may move over a record with this verdict.
    pub fn is_final(&self) -> bool {
        !matches!(self, Verdict::Deferred { .. })
    }
}

/// The receiver is about to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Drain {
    /// How long it still answers what it has, in milliseconds.
    #[serde(rename = "within_ms", with = "milliseconds")]
    pub within: Duration,
}

mod milliseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_reads_as_documented() {
        let text = concat!(
            r#"{"type":"receipt","handle":1,"from":0,"to":40,"runs":["#,
            r#"{"to":10,"lines":2,"verdict":"stored"},"#,
            r#"{"to":20,"lines":1,"verdict":"parked","reason":"mapping"},"#,
            r#"{"to":30,"lines":1,"verdict":"deferred","reason":"disk full","after_ms":1500},"#,
            r#"{"to":40,"lines":1,"verdict":"deferred","reason":"closed","after_ms":1500,"#,
            r#""index":"a"}]}"#
        );
        let message = Control::decode(text).expect("a receipt");
        assert_eq!(message.encode(), text);
        let Control::Receipt(receipt) = message else { panic!("not a receipt") };
        assert!(receipt.runs[1].verdict.is_final());
        assert!(!receipt.runs[2].verdict.is_final());
        assert!(!receipt.runs[3].verdict.is_final());
    }

    #[test]
    fn unknown_fields_are_ignored_and_unknown_messages_are_not() {
        let text = r#"{"type":"credit","bytes":5,"later":true}"#;
        assert_eq!(Control::decode(text).expect("credit"), Control::Credit { bytes: 5 });
        assert!(Control::decode(r#"{"type":"nonsense"}"#).is_err());
        assert!(Control::decode("[]").is_err());
    }
}

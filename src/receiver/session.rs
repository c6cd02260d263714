//! The receiver's side of `waybill.v1` without I/O: messages in, answers and frames out.
//!
//! Everything that comes in is outside bytes: whatever it holds, the worst is a close code (I8).

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;
use tracing::{info, warn};
use uuid::Uuid;

use super::chain::Claim;
use super::outstanding::Outstanding;
use crate::parse::Segment;
use crate::protocol::{
    ChainKey, Challenge, Control, DataFrame, DayBounds, FRAME_BYTES_MAX, FRAMES_OUTSTANDING_MAX,
    FrameError, Hello, Limits, Open, Receipt, RefusalCode, Refused, VERSION, Welcome,
};
use crate::record::{
    Day, IndexRule, OFFSET_MAX, REPEATED_BYTES_MAX, Row, SenderId, TAGS_MAX, TypeName,
};
use crate::transport::close;

/// The longest control message, in bytes: rows are small, and each one is kept (I7).
const CONTROL_BYTES_MAX: usize = 64 << 10;

/// How many segments one connection may open before it must connect anew, which costs nothing.
const SEGMENTS_MAX: usize = 10_000;

/// Bytes of `open` messages that one connection may send, likewise: a row is kept as long as its
/// connection.
const ROWS_BYTES_MAX: usize = 8 << 20;

/// Lines without a receipt beyond which no further frame is read: each may be a run of its own in a
/// receipt, which takes more memory than a short line (I7).
const LINES_OUTSTANDING_MAX: u64 = 200_000;

const ZSTD: &str = "zstd";

/// Who was authenticated at the upgrade.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Sender {
    pub(super) id: SenderId,
    pub(super) name: String,
    pub(super) types: Vec<TypeName>,
    /// What it must prove to have.
    pub(super) chain_key: Option<ChainKey>,
}

impl Sender {
    /// Whether its `hello` is to answer a challenge. No other token gets one, which tells `waybill
    /// check` what the token needs.
    pub(super) fn asks(&self) -> bool {
        self.chain_key.is_some()
    }
}

/// What a receiver tells every sender and checks every segment against.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    pub(super) rule: IndexRule,
    pub(super) former_rules: Vec<IndexRule>,
    /// Relative to today.
    pub(super) days: (i32, i32),
    /// Uncompressed bytes per connection; at least one largest frame.
    pub(super) credit: u64,
    pub(super) destination: Option<Uuid>,
}

impl Terms {
    pub(super) fn day_bounds(&self, today: Day) -> DayBounds {
        DayBounds { from: today.plus(self.days.0), to: today.plus(self.days.1) }
    }
}

/// Why a session ends: the sender broke a rule.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{reason}")]
pub(super) struct Violation {
    /// RFC 6455 §7.4.1.
    pub(super) code: u16,
    /// For the close frame and the log.
    pub(super) reason: String,
    /// It has the token and does not prove its chain key.
    pub(super) is_unproven: bool,
}

impl Violation {
    pub(super) fn new(code: u16, reason: impl Into<String>) -> Violation {
        Violation { code, reason: reason.into(), is_unproven: false }
    }

    /// The sender has the token and not its chain key. The reason fits into a close frame.
    fn unproven(hello: &Hello) -> Violation {
        let reason = match hello.chain {
            None => "this token needs its chain key: give the sender --chain-key-file FILE",
            Some(_) => {
                "not this token's chain key: copy the right file, or make another: waybill token \
                 NAME --rotate --chain-key FILE"
            }
        };
        Violation { is_unproven: true, ..Violation::new(close::POLICY, reason) }
    }
}

impl From<FrameError> for Violation {
    fn from(error: FrameError) -> Violation {
        let code = match &error {
            FrameError::Size(_) => close::TOO_BIG,
            FrameError::Zstd(_) => close::BAD_DATA,
            FrameError::Short(_)
            | FrameError::Unknown(_)
            | FrameError::Length { .. }
            | FrameError::Offset(_) => close::PROTOCOL,
        };
        Violation::new(code, error.to_string())
    }
}

/// A frame that passed every check and was counted.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) segment: Arc<Segment>,
    /// Days that its records may have by their own time.
    pub(super) days: DayBounds,
    pub(super) frame: DataFrame,
}

/// One connection's state.
#[derive(Debug)]
pub(super) struct Session {
    sender: Sender,
    challenge: Challenge,
    terms: Arc<Terms>,
    state: State,
    claim: Option<Claim>,
    segments: HashMap<u32, Declared>,
    rows_bytes: usize,
    outstanding: Outstanding,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    AwaitsHello,
    Open(Identity),
}

/// Who said `hello`, beyond the token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    /// Its state directory.
    pub(super) instance: Uuid,
    /// Its process, where it says so.
    pub(super) run: Option<Uuid>,
}

/// What an `open` came to.
#[derive(Debug)]
enum Declared {
    Accepted(Arc<Segment>),
    Refused,
}

impl Session {
    pub(super) fn new(sender: Sender, challenge: Challenge, terms: Arc<Terms>) -> Session {
        Session {
            sender,
            challenge,
            terms,
            state: State::AwaitsHello,
            claim: None,
            segments: HashMap::new(),
            rows_bytes: 0,
            outstanding: Outstanding::default(),
        }
    }

    /// Who the sender is, once it said `hello`.
    pub(super) fn identity(&self) -> Option<Identity> {
        match self.state {
            State::AwaitsHello => None,
            State::Open(identity) => Some(identity),
        }
    }

    /// What a sender that has proven its key says of its last receipt, once.
    pub(super) fn take_claim(&mut self) -> Option<Claim> {
        self.claim.take()
    }

    /// Whether no frame awaits a receipt.
    pub(super) fn is_idle(&self) -> bool {
        self.outstanding.is_empty()
    }

    /// Whether so many lines await a receipt that no frame should be read until there are fewer.
    pub(super) fn is_full(&self) -> bool {
        self.outstanding.lines() >= LINES_OUTSTANDING_MAX
    }

    /// A text message; gives the answer, where there is one.
    pub(super) fn text(&mut self, text: &str, today: Day) -> Result<Option<Control>, Violation> {
        if text.len() > CONTROL_BYTES_MAX {
            let reason =
                format!("control message of {} bytes, allowed are {CONTROL_BYTES_MAX}", text.len());
            return Err(Violation::new(close::TOO_BIG, reason));
        }
        let message = Control::decode(text).map_err(|error| {
            Violation::new(close::BAD_DATA, format!("control message is broken: {error}"))
        })?;
        match (message, self.state) {
            (Control::Hello(hello), State::AwaitsHello) => self.hello(&hello, today).map(Some),
            (Control::Open(open), State::Open(_)) => self.open(*open, text.len(), today),
            (_, State::AwaitsHello) => {
                Err(Violation::new(close::PROTOCOL, "the first message must be hello"))
            }
            (_, State::Open(_)) => {
                Err(Violation::new(close::PROTOCOL, "a sender says hello once, then only open"))
            }
        }
    }

    fn hello(&mut self, hello: &Hello, today: Day) -> Result<Control, Violation> {
        if hello.version.abs_diff(VERSION) > 1 {
            let reason = format!(
                "version {} is too far from {VERSION}, which is spoken here: update the older side",
                hello.version
            );
            return Err(Violation::new(close::PROTOCOL, reason));
        }
        if let Some(key) = &self.sender.chain_key {
            let chain = hello.chain.as_ref().filter(|chain| chain.is_answer(key, &self.challenge));
            let chain = chain.ok_or_else(|| Violation::unproven(hello))?;
            let last = chain.index.clone().zip(chain.id.clone());
            self.claim = last.map(|(index, id)| Claim { index, id });
        }
        info!(
            sender = self.sender.name, instance = %hello.instance, agent = hello.agent,
            "sender connected"
        );
        self.state = State::Open(Identity { instance: hello.instance, run: hello.run });
        let features = hello.features.iter().filter(|feature| *feature == ZSTD).take(1);
        Ok(Control::Welcome(Welcome {
            version: VERSION,
            features: features.cloned().collect(),
            sender: self.sender.id,
            name: self.sender.name.clone(),
            credit: self.terms.credit,
            limits: Limits {
                frame_bytes: FRAME_BYTES_MAX as u64,
                frames: FRAMES_OUTSTANDING_MAX as u64,
            },
            rule: self.terms.rule.clone(),
            types: self.sender.types.clone(),
            days: self.terms.day_bounds(today),
            destination: self.terms.destination,
        }))
    }

    fn open(&mut self, open: Open, bytes: usize, today: Day) -> Result<Option<Control>, Violation> {
        let Open { handle, row } = open;
        if self.segments.contains_key(&handle) {
            let reason = format!("handle {handle} is declared twice");
            return Err(Violation::new(close::PROTOCOL, reason));
        }
        if self.segments.len() >= SEGMENTS_MAX {
            let reason = format!("{SEGMENTS_MAX} segments were opened here: connect again");
            return Err(Violation::new(close::RESTART, reason));
        }
        self.rows_bytes += bytes;
        if self.rows_bytes > ROWS_BYTES_MAX {
            let reason = format!("rows of {ROWS_BYTES_MAX} bytes were opened here: connect again");
            return Err(Violation::new(close::RESTART, reason));
        }
        match self.check(&row, today) {
            Ok(index) => {
                let (id, name) = (self.sender.id, self.sender.name.clone());
                let segment = Arc::new(Segment::new(row, id, name, index));
                self.segments.insert(handle, Declared::Accepted(segment));
                Ok(None)
            }
            Err((code, reason)) => {
                warn!(
                    sender = self.sender.name, segment = %row.segment, source = row.source,
                    reason, "segment refused"
                );
                self.segments.insert(handle, Declared::Refused);
                Ok(Some(Control::Refused(Refused { handle, code, reason })))
            }
        }
    }

    /// The index of an acceptable row, or why it is refused and the line that mends it.
    fn check(&self, row: &Row, today: Day) -> Result<String, (RefusalCode, String)> {
        let name = &self.sender.name;
        if row.sender != Some(self.sender.id) {
            let reason = format!(
                "the row belongs to another sender than {name:?}: end it and open a new one"
            );
            return Err((RefusalCode::Sender, reason));
        }
        let Some(rule) = &row.rule else {
            return Err((RefusalCode::Row, "the row has no index rule".to_owned()));
        };
        if *rule != self.terms.rule && !self.terms.former_rules.contains(rule) {
            let reason = format!(
                "its lines began under another index rule; at the receiver, add this to its \
                 configuration: former_index = [{:?}]",
                rule.as_str()
            );
            return Err((RefusalCode::Rule, reason));
        }
        if !self.sender.types.contains(&row.type_name) {
            let mut types: Vec<&str> = self.sender.types.iter().map(TypeName::as_str).collect();
            types.push(row.type_name.as_str());
            let reason = format!(
                "type {:?} is not listed with this token; in the receiver's tokens file, set for \
                 {name:?}: types = {types:?}",
                row.type_name.as_str()
            );
            return Err((RefusalCode::Type, reason));
        }
        let days = self.terms.day_bounds(today);
        if !days.contains(row.day) {
            let (from, to) = self.terms.days;
            let reason = format!(
                "day {} is outside {} to {} (today {from:+} to {to:+} days): check the sender's \
                 clock, or widen days_before and days_after in the receiver's --config file",
                row.day, days.from, days.to
            );
            return Err((RefusalCode::Day, reason));
        }
        if !row.framing.is_known() {
            let reason = "its framing is not known here: update the receiver".to_owned();
            return Err((RefusalCode::Framing, reason));
        }
        let repeated = row.repeated_bytes();
        if repeated > REPEATED_BYTES_MAX || row.tags.len() > TAGS_MAX || row.labels.len() > TAGS_MAX
        {
            let reason = format!(
                "each of its documents would repeat {repeated} bytes of names, path, {} tags and \
                 {} labels; allowed are {REPEATED_BYTES_MAX}, {TAGS_MAX} and {TAGS_MAX}: shorten them",
                row.tags.len(),
                row.labels.len()
            );
            return Err((RefusalCode::Row, reason));
        }
        if row.start >= OFFSET_MAX {
            return Err((RefusalCode::Row, "the row starts past any segment's end".to_owned()));
        }
        Ok(rule.name(&row.type_name, row.day))
    }

    /// A binary message; `None` for a frame of a refused segment, which is dropped.
    pub(super) fn binary(
        &mut self,
        message: Bytes,
        today: Day,
    ) -> Result<Option<Taken>, Violation> {
        if self.state == State::AwaitsHello {
            return Err(Violation::new(close::PROTOCOL, "the first message must be hello"));
        }
        let frame = DataFrame::decode(message)?;
        let segment = match self.segments.get(&frame.handle) {
            Some(Declared::Accepted(segment)) => Arc::clone(segment),
            Some(Declared::Refused) => return Ok(None),
            None => {
                let reason = format!("frame for handle {}, which is not open", frame.handle);
                return Err(Violation::new(close::PROTOCOL, reason));
            }
        };
        let bytes = frame.records.len() as u64;
        let (held, frames) = (self.outstanding.bytes(), self.outstanding.frames());
        if held + bytes > self.terms.credit {
            let reason = format!("{held} bytes await a receipt and {bytes} more exceed the credit");
            return Err(Violation::new(close::POLICY, reason));
        }
        if frames >= FRAMES_OUTSTANDING_MAX {
            let reason = format!("{frames} frames await a receipt, which is the limit");
            return Err(Violation::new(close::POLICY, reason));
        }
        let framing = segment.row.framing;
        let records = framing.records(&frame.records, frame.offset, frame.flags.continues);
        self.outstanding.add(frame.handle, frame.offset, bytes, records.count() as u64);
        Ok(Some(Taken { segment, days: self.terms.day_bounds(today), frame }))
    }

    /// A receipt leaves for the sender.
    pub(super) fn settle(&mut self, receipt: &Receipt) {
        self.outstanding.settle(receipt);
    }
}

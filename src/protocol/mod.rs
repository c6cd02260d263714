//! The wire protocol `waybill.v1`, as values: no I/O here.
//!
//! Control messages are JSON in WebSocket text messages; data frames are binary. `docs/protocol.md`
//! describes the same for strangers, and the tests hold the two together.

mod chain;
mod frame;
mod message;

pub use chain::{CHALLENGE_HEADER, Chain, ChainKey, Challenge};
pub use frame::{DataFrame, FRAME_HEADER_BYTES, FrameError, FrameFlags};
pub use message::{
    Control, DayBounds, Drain, Hello, Limits, Open, Receipt, RefusalCode, Refused, Run, Verdict,
    Welcome,
};

/// The WebSocket subprotocol (RFC 6455 §1.9); an unknown one is refused at the handshake.
pub const SUBPROTOCOL: &str = "waybill.v1";

/// The subprotocol of clients that send a line per message, see [`crate::receiver`].
pub const TEXT_SUBPROTOCOL: &str = "waybill.text.v1";

/// The header of a receiver's answer to the upgrade that lists the types of the sender's token, with
/// commas between: `waybill check` says no `hello`, and gets no `welcome`.
pub const TYPES_HEADER: &str = "waybill-types";

/// A longer list is left out of the header, in bytes: proxies bound an answer's headers.
pub const TYPES_HEADER_BYTES_MAX: usize = 2 << 10;

/// What a sender that listens answers, with a newline, to a request that is no upgrade and shows a
/// token that lets in.
pub const TOKEN_LETS_IN: &str = "this token lets in";

/// Protocol version in `hello` and `welcome`; versions may differ by one.
pub const VERSION: u32 = 1;

/// How many bytes a sender puts into a frame where records allow it.
pub const FRAME_BYTES_TARGET: usize = 256 << 10;

/// The largest frame, in uncompressed bytes without its header: one record of the largest size
/// with its newline, or with its spool header and key.
pub const FRAME_BYTES_MAX: usize = (1 << 20) + (4 << 10);

/// The largest WebSocket message that a side accepts, in bytes.
pub const MESSAGE_BYTES_MAX: usize = FRAME_BYTES_MAX + FRAME_HEADER_BYTES + (4 << 10);

/// How many data frames of one connection may be without a receipt.
pub const FRAMES_OUTSTANDING_MAX: usize = 4096;

/// Interval between pings; each one is jittered by a tenth.
pub const PING_INTERVAL: std::time::Duration = std::time::Duration::from_secs(20);

/// A connection that was silent for so long is dead.
pub const DEAD_AFTER: std::time::Duration = std::time::Duration::from_secs(45);

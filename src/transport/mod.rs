//! WebSockets over TLS, TCP or Unix sockets: connect, listen, send, receive, close.
//!
//! Sender and receiver call this; which of them dialled makes no difference to what they get. It
//! must never let a byte of an unauthenticated peer past the HTTP upgrade, nor hold more of a
//! message than [`crate::protocol::MESSAGE_BYTES_MAX`] (I7).

mod connect;
mod fault;
mod heartbeat;
mod listen;
mod proxy;
mod request;
mod retry;
mod socket;
mod stream;

pub use connect::{CONNECT_TIMEOUT, Offer, Steps, ask, connect, connect_noting};
pub use fault::{ConnectError, TlsFault};
pub use heartbeat::{Beat, Heartbeat};
pub use listen::{BindError, Listener};
pub use request::{Answer, Handler, Peer, Refuse, Request};
pub use retry::{Pause, Retry};
pub use socket::{
    Incoming, Outgoing, Socket, SocketError, SocketReceiver, SocketSender, Text, hang_up,
};

/// Close codes that Waybill uses (RFC 6455 §7.4.1 and the IANA registry).
pub mod close {
    /// Done.
    pub const NORMAL: u16 = 1000;
    /// This side stops.
    pub const GOING_AWAY: u16 = 1001;
    /// The peer broke the protocol.
    pub const PROTOCOL: u16 = 1002;
    /// A message of a kind that is not taken here.
    pub const UNSUPPORTED: u16 = 1003;
    /// A close frame without a code; never sent.
    pub const NO_CODE: u16 = 1005;
    /// A message whose content is not what its type says.
    pub const BAD_DATA: u16 = 1007;
    /// The peer broke a rule of this side: silence, credit, a revoked token.
    pub const POLICY: u16 = 1008;
    /// A message that is too big.
    pub const TOO_BIG: u16 = 1009;
    /// This side restarts.
    pub const RESTART: u16 = 1012;
    /// This side is overloaded.
    pub const TRY_LATER: u16 = 1013;
}

#[cfg(test)]
mod tests;

//! Waybill carries log lines from a server to Elasticsearch and answers each with a receipt.
//!
//! # The way of a line
//!
//! ```text
//!  file ─────────────┐
//!  unix socket ─┐    │                          ┌ decode ┐
//!  stdin ───────┴ spool ─ segment ─ frame ─ WSS ┤ split  ├ document ─ bulk ─ Elasticsearch
//!                                               └ parse  ┘                └ embedded store
//!                         ▲                                    │
//!                         └──────────── receipt ───────────────┘
//! ```
//!
//! Everything is an append-only run of bytes: a tailed file is one already, and what arrives on a
//! socket is appended to the [`spool`] first. The [`sender`] reads whole records and sends their
//! bytes as they are; the [`receiver`] splits, parses and hands them to a [`destination`]; one
//! [`protocol::Receipt`] comes back along the same path, and only it moves a position.
//!
//! # Invariants
//!
//! - **I1 No false receipt.** A line is receipted only when the destination holds it durably.
//! - **I2 No loss.** A segment's position is the end of its unbroken prefix of receipts, skips and
//!   reported losses.
//! - **I3 No duplicate.** A line sent again has the same document id in the same index.
//! - **I4 No suppression.** Two different lines never share an id, and the receiver computes it.
//! - **I5 Losing state costs duplicates, never lines.**
//! - **I6 A bad line never blocks its neighbours**, nor a bad index another index.
//! - **I7 Everything is bounded in bytes.** Full means stop reading, and say so.
//! - **I8 Outside bytes never panic**, never choose a path, never reach a terminal unescaped.
//! - **I9 Every loss that cannot be prevented is counted, ranged and reported.**
//!
//! # Glossary
//!
//! *Stream*: one source's run of bytes. *Segment*: a stretch of a stream whose row fixes all that
//! an id, an index name or a parse depends on. *Row*: that durable description. *Position*: where
//! the unbroken receipted prefix of a segment ends. *Parked*: a line that the destination refused
//! and that lies in the dead letter under its own id.
//!
//! Modules in reading order; an arrow of use never points back up this list.

pub mod record;

pub mod protocol;

pub mod backoff;
pub mod clock;
pub mod config;
pub mod descriptors;
pub mod inherited;
pub mod metrics;
pub mod shutdown;
pub mod stamp;
pub mod systemd;
pub mod telemetry;
pub mod tls;

pub mod destination;
pub mod parse;
pub mod search;
pub mod source;
pub mod spool;
pub mod state;
pub mod tokens;
pub mod transport;

pub mod receiver;
pub mod sender;

pub mod import;

pub mod cli;
pub mod command;
pub mod exit;

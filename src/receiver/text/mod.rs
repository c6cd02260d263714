//! `waybill.text.v1`: every text message is one line, every answer one JSON receipt.
//!
//! For clients that keep nothing: the receiver itself makes the row that a sender would have made.
//! It must never answer before the destination did (I1), nor out of order, nor read more than it
//! may hold (I7). A line without a key that is sent again is a second document; one with a key and
//! a time is not (I3).

mod connection;
mod envelope;
mod lines;
mod origin;

pub(super) use connection::run;
pub(super) use origin::Origin;

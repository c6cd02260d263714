//! Streams to transport, receipts to positions.

mod window;

//! Streams to transport, receipts to positions.

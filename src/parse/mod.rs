//! One record's bytes to one document, written straight into the bulk body.

mod segment;

pub use segment::{Form, FrameTimes, Segment};

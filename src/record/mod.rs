//! Plain values that both sides share: ids, offsets, rows, index names, framing.
//!
//! Nothing here does I/O. What an id, an index name or a record boundary is, is decided here and
//! nowhere else, because sender, receiver and `verify` must agree on it for ever.

mod day;
pub mod framing;
mod id;
mod index;
mod origin;
mod path;
mod row;

pub use day::Day;
pub use framing::{Framing, RECORD_BYTES_MAX, Record, RecordKind};
pub use id::{DocumentId, END_MAX, IdPrefix, OFFSET_MAX, SegmentId, SenderId};
pub use index::{DEFAULT_RULE, DEFAULT_TYPES, IndexRule, IndexRuleError, TypeName, TypeNameError};
pub use origin::time_of_origin;
pub use path::{escape_path, unescape_path};
pub use row::{Format, Prefix, REPEATED_BYTES_MAX, Row, TAGS_BYTES_MAX, TAGS_MAX, bytes_of_tags};

//! Queries of `waybill search`, for the embedded store and for Elasticsearch alike.
//!
//! [`Query`] is read once; [`embedded`] compiles it to SQL with bound parameters, [`elasticsearch`]
//! to a request body. Both give the same [`Answer`], which [`render`] writes. What was typed never
//! becomes SQL or query syntax, and what was logged never reaches a terminal unescaped (I8).

pub mod elasticsearch;
pub mod embedded;
pub mod query;
pub mod render;

use std::path::PathBuf;

use crate::config::ElasticsearchConfig;

pub use query::{Query, QueryError};

/// Lines shown where no limit is given.
pub const LIMIT_DEFAULT: usize = 50;

/// Hits are counted up to here; beyond it "more than" is said. Elasticsearch's own default.
pub const COUNT_MAX: u64 = 10_000;

/// What was typed.
#[derive(Clone, Debug)]
pub struct SearchArgs {
    /// The query; empty for every line.
    pub query: String,
    /// Lines at this time or later: RFC 3339, a date, or `15m` ago.
    pub after: Option<String>,
    /// Lines before this time, likewise.
    pub before: Option<String>,
    /// How many lines are shown, the newest; 1 or more.
    pub limit: usize,
    /// One JSON document per line.
    pub json: bool,
    /// Where to search.
    pub target: SearchTarget,
}

/// Where lines are searched.
#[derive(Clone, Debug)]
pub enum SearchTarget {
    /// In the embedded store's file.
    Store(PathBuf),
    /// In Elasticsearch.
    Elasticsearch {
        /// How it is reached.
        config: ElasticsearchConfig,
        /// Names of the indices, with wildcards: [`crate::record::IndexRule::wildcard`].
        index: String,
    },
}

/// What a search found.
#[derive(Clone, PartialEq, Debug)]
pub struct Answer {
    /// The newest hits, oldest of them first, as a log is read.
    pub hits: Vec<Hit>,
    /// How many there are; at most [`COUNT_MAX`] where `total_is_exact` is false.
    pub total: u64,
    /// Whether `total` is all there are.
    pub total_is_exact: bool,
    /// Why hits may be missing, where the destination could not search everything.
    pub incomplete: Option<String>,
}

/// One line that was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hit {
    /// The document id in its text form.
    pub id: String,
    /// The index that holds it.
    pub index: String,
    /// The document: one JSON object.
    pub document: String,
}

//! Deletes the oldest lines, in small transactions between those of the writer.
//!
//! Only what `keep_days` and `keep_bytes` name is deleted, in the order in which it arrived: a time
//! that a line gives itself must not push out other senders' lines (I4). Freed pages are used again;
//! the file itself does not shrink.

use rusqlite::{Connection, Transaction, TransactionBehavior};

use crate::config::EmbeddedConfig;

/// Lines that one transaction deletes at most: some milliseconds, so that new lines do not wait.
const STEP_LINES: usize = 1000;

/// Pages that the word index merges after a step: deleted words leave it by merging only.
const MERGE_PAGES: i64 = 64;

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// What is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retention {
    days: Option<u32>,
    bytes: Option<u64>,
}

/// What a step did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Nothing is too old or too much.
    Done,
    /// So many lines are gone, and there may be more.
    Deleted(usize),
}

impl Retention {
    pub(super) fn new(config: &EmbeddedConfig) -> Retention {
        Retention { days: config.keep_days, bytes: config.keep_bytes }
    }

    /// Deletes some of the oldest lines if there is anything to delete. `now` is in milliseconds
    /// since 1970.
    pub(super) fn step(&self, connection: &Connection, now: u64) -> rusqlite::Result<Step> {
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        let too_old = self.days.map(|days| now.saturating_sub(i64::from(days) * DAY_MS));
        let too_many = match self.bytes {
            Some(bytes) => used_bytes(connection)? > bytes,
            None => false,
        };
        if too_many {
            return delete_before(connection, i64::MAX);
        }
        match too_old {
            Some(time) => delete_before(connection, time),
            None => Ok(Step::Done),
        }
    }
}

/// Bytes of the pages in use.
pub(super) fn used_bytes(connection: &Connection) -> rusqlite::Result<u64> {
    let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let pages = pragma("page_count")? - pragma("freelist_count")?;
    Ok(u64::try_from(pages * pragma("page_size")?).unwrap_or(0))
}

/// Deletes the oldest lines and parked lines that arrived before `time`.
fn delete_before(connection: &Connection, time: i64) -> rusqlite::Result<Step> {
    let oldest = oldest_lines(connection, time)?;
    let Some(&(last, arrived)) = oldest.last() else {
        return delete_parked(connection, time);
    };
    let transaction = Transaction::new_unchecked(connection, TransactionBehavior::Immediate)?;
    {
        let mut words = transaction.prepare_cached("DELETE FROM words WHERE rowid = ?1")?;
        let mut lines = transaction.prepare_cached("DELETE FROM lines WHERE line = ?1")?;
        // In order of their numbers: else the word index writes out what it holds each time.
        for (line, _) in &oldest {
            words.execute([line])?;
            lines.execute([line])?;
        }
    }
    transaction.execute("DELETE FROM parked WHERE arrived < ?1", [arrived])?;
    transaction.execute("DELETE FROM segments WHERE newest <= ?1", [last])?;
    transaction.execute("INSERT INTO words (words, rank) VALUES ('merge', ?1)", [MERGE_PAGES])?;
    transaction.commit()?;
    Ok(Step::Deleted(oldest.len()))
}

/// Number and time of arrival of the oldest lines, up to the first that did not arrive before `time`.
fn oldest_lines(connection: &Connection, time: i64) -> rusqlite::Result<Vec<(i64, i64)>> {
    connection
        .prepare_cached("SELECT line, arrived FROM lines ORDER BY line LIMIT ?1")?
        .query_map([STEP_LINES as i64], |row| Ok((row.get(0)?, row.get(1)?)))?
        .take_while(|line| !matches!(line, Ok((_, arrived)) if *arrived >= time))
        .collect()
}

/// Where no line is left to delete, the oldest of the parked ones go.
fn delete_parked(connection: &Connection, time: i64) -> rusqlite::Result<Step> {
    let deleted = connection.execute(
        "DELETE FROM parked WHERE rowid IN \
         (SELECT rowid FROM parked WHERE arrived < ?1 ORDER BY arrived LIMIT ?2)",
        [time, STEP_LINES as i64],
    )?;
    Ok(if deleted == 0 { Step::Done } else { Step::Deleted(deleted) })
}

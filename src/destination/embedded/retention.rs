//! Deletes the oldest lines, in small transactions between those of the writer.
//!
//! Only what `keep_days` and `keep_bytes` name is deleted, in the order in which it arrived: a time
//! that a line gives itself must not push out other senders' lines (I4). Freed pages are used again;
//! the file itself does not shrink.
//!
//! Age is told by this machine's clock, which may jump. So what is too old goes a day for each hour that
//! passes, at most: a clock that is ahead for a while does not empty a store whose lines have their receipts.

use std::time::Instant;

use rusqlite::{Connection, OptionalExtension as _, Transaction, TransactionBehavior};

use crate::config::EmbeddedConfig;

/// Lines that one transaction deletes at most: some milliseconds, so that new lines do not wait.
const STEP_LINES: usize = 1000;

/// Pages that the word index merges after a step: deleted words leave it by merging only.
const MERGE_PAGES: i64 = 64;

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// How many times as fast as time passes age may delete.
const HASTE: u32 = 24;

/// What is kept.
#[derive(Clone, Debug)]
pub(super) struct Retention {
    age: Option<Age>,
    bytes: Option<u64>,
}

/// How old lines may be.
#[derive(Clone, Debug)]
struct Age {
    /// In milliseconds.
    max: i64,
    /// What arrived before may go, in milliseconds since 1970; `None` before the first look.
    before: Option<i64>,
    looked: Instant,
}

impl Age {
    /// Up to which time of arrival lines go, at a moment that the clock calls `now`.
    fn before(
        &mut self,
        connection: &Connection,
        now: i64,
        moment: Instant,
    ) -> rusqlite::Result<i64> {
        let wanted = now.saturating_sub(self.max);
        let gained = moment.saturating_duration_since(self.looked).saturating_mul(HASTE);
        // A stretch without lines is passed over but for its last day: it may be decades long, where the
        // first came before a machine without a clock had asked for the time.
        let oldest = oldest_arrival(connection)?.filter(|oldest| *oldest <= now);
        let known = match (self.before, oldest) {
            (Some(known), Some(oldest)) => known.max(oldest - DAY_MS),
            (known, oldest) => known.or(oldest).unwrap_or(wanted),
        };
        let gained = i64::try_from(gained.as_millis()).unwrap_or(i64::MAX);
        let before = wanted.min(known.saturating_add(gained));
        (self.before, self.looked) = (Some(before), moment);
        Ok(before)
    }
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
        let age =
            |days| Age { max: i64::from(days) * DAY_MS, before: None, looked: Instant::now() };
        Retention { age: config.keep_days.map(age), bytes: config.keep_bytes }
    }

    /// Deletes some of the oldest lines if there is anything to delete. `now` is what the clock says
    /// at that moment, in milliseconds since 1970.
    pub(super) fn step(
        &mut self,
        connection: &Connection,
        now: u64,
        moment: Instant,
    ) -> rusqlite::Result<Step> {
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        let too_many = match self.bytes {
            Some(bytes) => used_bytes(connection)? > bytes,
            None => false,
        };
        if too_many {
            return delete_before(connection, i64::MAX, i64::MAX);
        }
        match &mut self.age {
            Some(age) => delete_before(connection, age.before(connection, now, moment)?, now),
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
fn delete_before(connection: &Connection, time: i64, now: i64) -> rusqlite::Result<Step> {
    let oldest = oldest_lines(connection, time, now)?;
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

/// Number and time of arrival of the oldest lines, up to the last before the first that did not arrive before
/// `time`. One that arrived after `now`, by a clock that was ahead, is as old as the next that did not.
fn oldest_lines(connection: &Connection, time: i64, now: i64) -> rusqlite::Result<Vec<(i64, i64)>> {
    let mut lines: Vec<(i64, i64)> = connection
        .prepare_cached("SELECT line, arrived FROM lines ORDER BY line LIMIT ?1")?
        .query_map([STEP_LINES as i64], |row| Ok((row.get(0)?, row.get(1)?)))?
        .take_while(|line| !matches!(line, Ok((_, arrived)) if (time..=now).contains(arrived)))
        .collect::<Result<_, _>>()?;
    let last = lines.iter().rposition(|(_, arrived)| *arrived < time);
    lines.truncate(last.map_or(0, |last| last + 1));
    Ok(lines)
}

fn oldest_arrival(connection: &Connection) -> rusqlite::Result<Option<i64>> {
    connection
        .prepare_cached("SELECT arrived FROM lines ORDER BY line LIMIT 1")?
        .query_row([], |row| row.get(0))
        .optional()
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

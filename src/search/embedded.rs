//! A query over the embedded store, as SQL.
//!
//! Statement text is built from constants alone; everything that was typed is a bound parameter
//! (I8). A receiver may write the same file meanwhile: a search sees one consistent state of it.

use std::path::Path;

use rusqlite::types::Value;
use rusqlite::{Connection, TransactionBehavior, params_from_iter};

use crate::destination::embedded::{StoreError, open_reader};
use crate::record::DocumentId;

use super::query::{Matcher, Query};
use super::{Answer, COUNT_MAX, Hit};

/// Searches the store at `path`. Blocks: call it where blocking is allowed.
pub fn search(path: &Path, query: &Query) -> Result<Answer, StoreError> {
    let mut connection = open_reader(path)?;
    run(&mut connection, query).map_err(|source| StoreError::of(path, source))
}

fn run(connection: &mut Connection, query: &Query) -> rusqlite::Result<Answer> {
    let selection = Selection::of(query);
    // One transaction, so that the count and the hits are of the same moment.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
    let total = count(&transaction, &selection)?;
    let mut hits = newest(&transaction, &selection, query.limit)?;
    hits.reverse();
    let total_is_exact = total <= COUNT_MAX;
    Ok(Answer { hits, total: total.min(COUNT_MAX), total_is_exact, incomplete: None })
}

/// How many lines match, counted to one more than [`COUNT_MAX`].
fn count(connection: &Connection, selection: &Selection) -> rusqlite::Result<u64> {
    let statement = format!("SELECT count(*) FROM (SELECT 1 {} LIMIT ?)", selection.sql);
    let limit = Value::Integer(COUNT_MAX as i64 + 1);
    let parameters = selection.parameters.iter().cloned().chain([limit]);
    let count: i64 =
        connection.query_row(&statement, params_from_iter(parameters), |row| row.get(0))?;
    Ok(u64::try_from(count).unwrap_or(0))
}

/// The newest hits, newest first. Documents are read for these alone.
fn newest(
    connection: &Connection,
    selection: &Selection,
    limit: usize,
) -> rusqlite::Result<Vec<Hit>> {
    let statement = format!(
        "SELECT l.id, s.index_name, l.document \
         FROM (SELECT lines.line {} ORDER BY lines.time DESC, lines.line DESC LIMIT ?) AS hit \
         CROSS JOIN lines AS l ON l.line = hit.line \
         CROSS JOIN segments AS s ON s.number = l.segment \
         ORDER BY l.time DESC, l.line DESC",
        selection.sql
    );
    let limit = Value::Integer(i64::try_from(limit).unwrap_or(i64::MAX));
    let parameters = selection.parameters.iter().cloned().chain([limit]);
    let mut statement = connection.prepare(&statement)?;
    let hits = statement.query_map(params_from_iter(parameters), |row| {
        let id: [u8; 24] = row.get(0)?;
        let id = DocumentId(id).to_string();
        Ok(Hit { id, index: row.get(1)?, document: row.get(2)? })
    })?;
    hits.collect()
}

/// `FROM … WHERE …` over `lines`, and the parameters of its question marks in order.
struct Selection {
    sql: String,
    parameters: Vec<Value>,
}

impl Selection {
    fn of(query: &Query) -> Selection {
        let mut selection = Selection { sql: String::new(), parameters: Vec::new() };
        match words(query) {
            Some(Words::Within(expression)) => {
                // CROSS: the words are looked up first, whatever the planner guesses.
                selection.sql.push_str(
                    "FROM words CROSS JOIN lines ON lines.line = words.rowid WHERE words MATCH ?",
                );
                selection.parameters.push(Value::Text(expression));
            }
            Some(Words::Without(expression)) => {
                selection.sql.push_str(
                    "FROM lines WHERE lines.line NOT IN (SELECT rowid FROM words WHERE words MATCH ?)",
                );
                selection.parameters.push(Value::Text(expression));
            }
            None => selection.sql.push_str("FROM lines WHERE true"),
        }
        if let Some(after) = query.after {
            selection.and(false, "lines.time >= ?", [Value::Integer(after.as_millisecond())]);
        }
        if let Some(before) = query.before {
            selection.and(false, "lines.time < ?", [Value::Integer(before.as_millisecond())]);
        }
        for term in &query.terms {
            selection.matcher(term.negated, &term.matcher);
        }
        selection
    }

    fn and(&mut self, negated: bool, sql: &str, parameters: impl IntoIterator<Item = Value>) {
        let not = if negated { "NOT " } else { "" };
        self.sql.push_str(&format!(" AND {not}({sql})"));
        self.parameters.extend(parameters);
    }

    fn matcher(&mut self, negated: bool, matcher: &Matcher) {
        match matcher {
            Matcher::Words(_) => {}
            Matcher::Id(text) => {
                // What is no id's text equals no line's id.
                let id = DocumentId::parse(text).map_or(Vec::new(), |id| id.0.into());
                self.and(negated, "lines.id = ?", [Value::Blob(id)]);
            }
            Matcher::Index(name) => self.and(
                negated,
                "lines.segment IN (SELECT number FROM segments WHERE index_name = ?)",
                [Value::Text(name.clone())],
            ),
            Matcher::Field { name, value } => self.field(negated, name, value),
        }
    }

    /// Strings equal as text, numbers as numbers. Both the nested and the
    /// dotted spelling of a name are looked for; a list matches by any of its elements.
    fn field(&mut self, negated: bool, name: &str, value: &str) {
        let nested: String = name.split('.').map(|part| format!(".\"{part}\"")).collect();
        let paths = [format!("${nested}"), format!("$.\"{name}\"")];
        let text = Value::Text(value.to_owned());
        let number = match value.parse::<f64>() {
            Ok(number) if number.is_finite() => Value::Real(number),
            _ => Value::Null,
        };
        // Booleans are the numbers 1 and 0 as atoms, and `true` and `false` as types.
        let one = "EXISTS (SELECT 1 FROM json_each(lines.document, ?) WHERE CASE \
                   WHEN type IN ('true', 'false') THEN type = ? \
                   WHEN type = 'text' THEN atom = ? ELSE atom = ? END)";
        let parameters = paths
            .into_iter()
            .flat_map(|path| [Value::Text(path), text.clone(), text.clone(), number.clone()]);
        self.and(negated, &format!("{one} OR {one}"), parameters);
    }
}

/// All terms over the line's words, as one FTS5 expression.
enum Words {
    /// Lines that match it.
    Within(String),
    /// Lines that do not match it.
    Without(String),
}

fn words(query: &Query) -> Option<Words> {
    let strings = |negated: bool| -> Vec<String> {
        let of = query.terms.iter().filter(|term| term.negated == negated);
        of.filter_map(|term| match &term.matcher {
            Matcher::Words(text) => Some(fts_string(text)),
            _ => None,
        })
        .collect()
    };
    let (with, without) = (strings(false).join(" AND "), strings(true).join(" OR "));
    match (with.is_empty(), without.is_empty()) {
        (true, true) => None,
        (false, true) => Some(Words::Within(with)),
        (true, false) => Some(Words::Without(without)),
        (false, false) => Some(Words::Within(format!("({with}) NOT ({without})"))),
    }
}

/// An FTS5 string: within its quotes nothing has a meaning but the quote, which is doubled. A NUL
/// would end the expression; for the tokenizer it separates words as a space does.
fn fts_string(text: &str) -> String {
    format!("\"{}\"", text.replace('\0', " ").replace('"', "\"\""))
}

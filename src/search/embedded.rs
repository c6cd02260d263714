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

    /// Strings equal as text, numbers as numbers; a list matches by any of its elements.
    fn field(&mut self, negated: bool, name: &str, value: &str) {
        let path: String = name.split('.').map(|part| format!(".\"{part}\"")).collect();
        let text = Value::Text(value.to_owned());
        let number = match value.parse::<f64>() {
            Ok(number) if number.is_finite() => Value::Real(number),
            _ => Value::Null,
        };
        // Booleans are the numbers 1 and 0 as atoms, and `true` and `false` as types.
        self.and(
            negated,
            "EXISTS (SELECT 1 FROM json_each(lines.document, ?) WHERE CASE \
             WHEN type IN ('true', 'false') THEN type = ? \
             WHEN type = 'text' THEN atom = ? ELSE atom = ? END)",
            [Value::Text(format!("${path}")), text.clone(), text, number],
        );
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;
    use tempfile::TempDir;

    use crate::destination::embedded::tests::store_documents;

    use super::super::query::parse;
    use super::*;

    /// A store of these lines, a second apart from 2026-11-21T00:00:00Z; the folder keeps it alive.
    fn store(lines: &[(&str, serde_json::Value)]) -> (TempDir, Connection) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("store");
        let documents = lines.iter().enumerate().map(|(second, (line, document))| {
            let mut document = document.clone();
            document["@timestamp"] = json!(format!("2026-11-21T00:00:{second:02}.000Z"));
            (line.as_bytes().to_vec(), document.to_string())
        });
        store_documents(&path, documents);
        let connection = open_reader(&path).expect("a store");
        (folder, connection)
    }

    fn everything(text: &str) -> Query {
        let terms = parse(text).expect(text);
        Query { terms, after: None, before: None, limit: 100 }
    }

    /// The `n` of each document found.
    fn found(connection: &mut Connection, query: &Query) -> Vec<i64> {
        let answer = run(connection, query).expect("a search");
        assert_eq!(answer.total, answer.hits.len() as u64);
        let number = |hit: &Hit| {
            let document: serde_json::Value = serde_json::from_str(&hit.document).expect("JSON");
            document["n"].as_i64().expect("a number")
        };
        answer.hits.iter().map(number).collect()
    }

    fn four_lines() -> (TempDir, Connection) {
        store(&[
            ("alpha beta gamma", json!({"n": 0, "host": {"name": "web1"}, "tags": ["a", "b"]})),
            ("Alpha gamma beta", json!({"n": 1, "http": {"response": {"status_code": 404}}})),
            ("delta 10.0.0.1", json!({"n": 2, "json": {"ok": true, "code": "404", "half": 0.5}})),
            ("alpha; DROP TABLE lines", json!({"n": 3, "host": {"name": "web2"}, "tags": "b"})),
        ])
    }

    #[test]
    fn every_kind_of_term_selects_its_lines() {
        let (_folder, mut store) = four_lines();
        for (query, expected) in [
            ("", &[0, 1, 2, 3][..]),
            ("ALPHA", &[0, 1, 3]),
            ("alpha beta", &[0, 1]),
            ("\"alpha beta\"", &[0]),
            ("10.0.0.1", &[2]),
            ("alpha -gamma", &[3]),
            ("-alpha", &[2]),
            ("-alpha -delta", &[]),
            ("host.name:web1", &[0]),
            ("-host.name:web1", &[1, 2, 3]),
            ("http.response.status_code:404", &[1]),
            ("json.code:404", &[2]),
            ("json.ok:true", &[2]),
            ("json.ok:1", &[]),
            ("json.half:0.50", &[2]),
            ("tags:b", &[0, 3]),
            ("alpha tags:b -host.name:web2", &[0]),
            ("_index:test", &[0, 1, 2, 3]),
            ("-_index:test", &[]),
            ("_id:nonsense", &[]),
            ("-_id:nonsense", &[0, 1, 2, 3]),
            ("message:delta", &[2]),
        ] {
            assert_eq!(found(&mut store, &everything(query)), expected, "{query}");
        }
        let hits = run(&mut store, &everything("delta")).expect("a search").hits;
        assert_eq!(found(&mut store, &everything(&format!("_id:{}", hits[0].id))), [2]);
    }

    #[test]
    fn time_and_limit_keep_the_newest() {
        let (_folder, mut store) = four_lines();
        let time = |text: &str| Some(text.parse().expect("a time"));
        let query = Query { after: time("2026-11-21T00:00:01Z"), ..everything("") };
        assert_eq!(found(&mut store, &query), [1, 2, 3]);
        let query = Query { before: time("2026-11-21T00:00:03Z"), ..query };
        assert_eq!(found(&mut store, &query), [1, 2]);
        let query = Query { limit: 2, ..everything("alpha") };
        let answer = run(&mut store, &query).expect("a search");
        assert_eq!((answer.hits.len(), answer.total, answer.total_is_exact), (2, 3, true));
        assert!(answer.hits[1].document.contains("web2"), "the newest is last");
    }

    #[test]
    fn what_looks_like_syntax_is_only_text() {
        let (_folder, mut store) = four_lines();
        for (query, expected) in [
            ("\"alpha; DROP TABLE lines\"", &[3][..]),
            ("\"alpha\\\" OR \\\"delta\"", &[]),
            ("\"line: alpha\"", &[]),
            ("alpha* NEAR", &[]),
            ("\"NEAR(alpha beta)\"", &[]),
            ("host.name:\"' OR 1=1 --\"", &[]),
            ("_index:\"x') OR 1=1 --\"", &[]),
        ] {
            assert_eq!(found(&mut store, &everything(query)), expected, "{query}");
        }
    }

    proptest! {
        // Each case makes a store.
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn no_text_breaks_a_statement(text in any::<String>()) {
            let (_folder, mut store) = store(&[("x", json!({"n": 0}))]);
            for matcher in [
                Matcher::Words(text.clone()),
                Matcher::Id(text.clone()),
                Matcher::Index(text.clone()),
                Matcher::Field { name: "json.a".to_owned(), value: text },
            ] {
                for negated in [false, true] {
                    let terms = vec![super::super::query::Term { negated, matcher: matcher.clone() }];
                    let query = Query { terms, after: None, before: None, limit: 1 };
                    run(&mut store, &query).expect("a search");
                }
            }
        }

        #[test]
        fn a_line_is_found_by_its_own_text(text in "[a-z]{1,8}[-\":*()^\\\\ .a-z0-9]{0,30}") {
            let (_folder, mut store) = store(&[(&text, json!({"n": 0})), ("?", json!({"n": 1}))]);
            let quoted = text.replace('\\', "\\\\").replace('"', "\\\"");
            prop_assert_eq!(found(&mut store, &everything(&format!("\"{quoted}\""))), [0]);
        }
    }
}

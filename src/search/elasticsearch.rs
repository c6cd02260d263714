//! A query as the body of an Elasticsearch `_search`, and the answer to it.
//!
//! The same body serves Elasticsearch 7.17 to 9 and OpenSearch. Sending it is the part of the
//! destination's client; nothing here does I/O.

use serde_json::{Value, json};
use thiserror::Error;

use super::query::{Matcher, Query, QueryError};
use super::{Answer, COUNT_MAX, Hit};

/// The default of `index.max_result_window`.
const LIMIT_MAX: usize = 10_000;

/// Where a line's words are. `event.original` is not indexed, so the words of a syslog header are
/// found by their fields only.
const TEXT_FIELD: &str = "message";

/// An answer that is no search response.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("elasticsearch's answer has no {0}; check that the URL names Elasticsearch or OpenSearch")]
pub struct ResponseError(&'static str);

/// The request body for a query. Every value that was typed is a JSON string, in clauses that take
/// it as a value: there is no query syntax to escape from.
pub fn to_elasticsearch(query: &Query) -> Result<Value, QueryError> {
    if query.limit > LIMIT_MAX {
        return Err(QueryError::LimitTooLarge { max: LIMIT_MAX });
    }
    let clauses = |negated: bool| -> Vec<Value> {
        let terms = query.terms.iter().filter(|term| term.negated == negated);
        terms.map(|term| clause(&term.matcher)).collect()
    };
    let mut filter = clauses(false);
    if query.after.is_some() || query.before.is_some() {
        filter.push(range(query));
    }
    Ok(json!({
        "size": query.limit,
        "track_total_hits": COUNT_MAX,
        "query": { "bool": { "filter": filter, "must_not": clauses(true) } },
        // `_id` cannot be sorted by everywhere; lines of one instant keep the order of their file.
        "sort": [
            { "@timestamp": { "order": "desc", "unmapped_type": "date" } },
            { "log.offset": { "order": "desc", "unmapped_type": "long" } },
        ],
    }))
}

fn range(query: &Query) -> Value {
    let mut bounds = serde_json::Map::new();
    bounds.insert("format".to_owned(), json!("strict_date_optional_time"));
    if let Some(after) = query.after {
        bounds.insert("gte".to_owned(), json!(after.to_string()));
    }
    if let Some(before) = query.before {
        bounds.insert("lt".to_owned(), json!(before.to_string()));
    }
    json!({ "range": { "@timestamp": bounds } })
}

fn clause(matcher: &Matcher) -> Value {
    match matcher {
        Matcher::Words(text) => phrase(text, TEXT_FIELD),
        Matcher::Id(id) => json!({ "ids": { "values": [id] } }),
        Matcher::Index(name) => json!({ "term": { "_index": name } }),
        Matcher::Field { name, value } => phrase(value, name),
    }
}

/// A phrase on text, a term on everything else. Lenient: a word matches no number, and that is no
/// error.
fn phrase(text: &str, field: &str) -> Value {
    json!({ "multi_match": { "query": text, "type": "phrase", "fields": [field], "lenient": true } })
}

/// Reads the response to such a request.
pub fn from_elasticsearch(response: &Value) -> Result<Answer, ResponseError> {
    let hits = &response["hits"];
    let listed = hits["hits"].as_array().ok_or(ResponseError("hits.hits"))?;
    let mut hits_read = listed.iter().map(hit).collect::<Result<Vec<Hit>, ResponseError>>()?;
    hits_read.reverse();
    let total = hits["total"]["value"].as_u64().ok_or(ResponseError("hits.total"))?;
    let total_is_exact = hits["total"]["relation"] == "eq";
    Ok(Answer { hits: hits_read, total, total_is_exact, incomplete: incomplete(response) })
}

fn hit(hit: &Value) -> Result<Hit, ResponseError> {
    let text = |name: &str| hit[name].as_str().map(str::to_owned);
    let document = hit.get("_source").filter(|source| source.is_object());
    Ok(Hit {
        id: text("_id").ok_or(ResponseError("_id in a hit"))?,
        index: text("_index").ok_or(ResponseError("_index in a hit"))?,
        document: document.ok_or(ResponseError("_source in a hit"))?.to_string(),
    })
}

fn incomplete(response: &Value) -> Option<String> {
    let failed = response["_shards"]["failed"].as_u64().unwrap_or(0);
    if response["timed_out"] == true {
        Some("elasticsearch ran out of time".to_owned())
    } else if failed > 0 {
        let reason = &response["_shards"]["failures"][0]["reason"]["reason"];
        let reason = reason.as_str().unwrap_or("no reason given");
        Some(format!("{failed} shards could not be searched: {reason}"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::query::parse;
    use super::*;

    fn query(text: &str) -> Query {
        let terms = parse(text).expect("a good query");
        let time = |text: &str| Some(text.parse().expect("a time"));
        Query { terms, after: time("2026-11-20T00:00:00Z"), before: None, limit: 7 }
    }

    #[test]
    fn a_query_becomes_filters_that_hold_values_only() {
        let text = r#"err host.name:"x\"}*" -_index:i -_id:q"#;
        let body = to_elasticsearch(&query(text)).expect("a body");
        let phrase = |query: &str, field: &str| {
            json!({ "multi_match": {
            "query": query, "type": "phrase", "fields": [field], "lenient": true } })
        };
        assert_eq!(body["size"], 7);
        let expected = json!({
            "filter": [
                phrase("err", "message"),
                phrase("x\"}*", "host.name"),
                { "range": { "@timestamp": {
                    "format": "strict_date_optional_time", "gte": "2026-11-20T00:00:00Z" } } },
            ],
            "must_not": [
                { "term": { "_index": "i" } },
                { "ids": { "values": ["q"] } },
            ],
        });
        assert_eq!(body["query"]["bool"], expected);
    }

    #[test]
    fn a_limit_that_elasticsearch_refuses_is_refused_before() {
        let query = Query { limit: LIMIT_MAX + 1, ..query("") };
        assert_eq!(to_elasticsearch(&query), Err(QueryError::LimitTooLarge { max: LIMIT_MAX }));
    }

    #[test]
    fn a_response_is_read_oldest_first_and_says_what_is_missing() {
        let response = json!({
            "timed_out": false,
            "_shards": { "failed": 1, "failures": [{ "reason": { "reason": "gone" } }] },
            "hits": {
                "total": { "value": 10_000, "relation": "gte" },
                "hits": [
                    { "_id": "2", "_index": "i", "_source": { "message": "later" } },
                    { "_id": "1", "_index": "i", "_source": { "message": "first" } },
                ],
            },
        });
        let answer = from_elasticsearch(&response).expect("a response");
        assert_eq!(answer.hits[0].id, "1");
        assert_eq!(answer.hits[1].document, r#"{"message":"later"}"#);
        assert_eq!((answer.total, answer.total_is_exact), (10_000, false));
        assert!(answer.incomplete.expect("a shard failed").contains("gone"));
    }

    #[test]
    fn what_is_no_response_is_an_error() {
        for response in [
            json!(null),
            json!([]),
            json!({ "hits": { "hits": [{}], "total": { "value": 1 } } }),
            json!({ "hits": { "hits": [] } }),
            json!({ "hits": { "hits": [{ "_id": "1", "_index": "i", "_source": "x" }] } }),
        ] {
            assert!(from_elasticsearch(&response).is_err(), "{response}");
        }
    }
}

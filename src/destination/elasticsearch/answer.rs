//! The answer to a bulk request, item by item: bytes in, one [`Answer`] per document out.
//!
//! Called by the exchange. An answer that does not name exactly the documents that were asked for
//! is unreadable, never a success (I1).

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use thiserror::Error;

/// The longest reason that is kept of an error, in bytes: it travels to the sender.
const REASON_BYTES_MAX: usize = 500;

/// Neighbouring documents that went to one index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Expected<'a> {
    pub(super) index: &'a str,
    pub(super) count: usize,
}

/// What Elasticsearch says of one document.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    /// 201, `created`, in the index that was named.
    Stored,
    /// Created under another index than the one named: an alias, a data stream or a pipeline.
    Elsewhere(Arc<str>),
    /// Any other success: a pipeline dropped it or sent it to a failure store.
    Pipeline,
    /// 409: the id is there already, perhaps not durably yet.
    Conflict,
    /// 429: too much at once.
    Busy(Arc<str>),
    /// 503: its shard is not there for now.
    Unavailable(Arc<str>),
    /// Any other 5xx.
    Broken(Arc<str>),
    /// 403, 404 and what else is the index's fault, not the line's.
    Index(Arc<str>),
    /// 400 and any other refusal of the document.
    Refused(Arc<str>),
    /// The request was refused as a whole when this document was its only one.
    Unacceptable(Arc<str>),
}

/// The answers to a whole request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Answers {
    /// The usual case, without a value per document.
    AllStored(usize),
    /// In the order of the documents.
    Each(Vec<Answer>),
}

impl Answers {
    /// How many documents are answered.
    pub(super) fn len(&self) -> usize {
        match self {
            Answers::AllStored(count) => *count,
            Answers::Each(answers) => answers.len(),
        }
    }

    /// The answer to one document; they are fewer than [`Answers::len`].
    pub(super) fn get(&self, document: usize) -> &Answer {
        match self {
            Answers::AllStored(_) => &Answer::Stored,
            Answers::Each(answers) => &answers[document],
        }
    }

    /// Adds the answers to the documents that follow.
    pub(super) fn append(&mut self, more: Answers) {
        match (&mut *self, more) {
            (Answers::AllStored(count), Answers::AllStored(more)) => *count += more,
            (Answers::Each(answers), Answers::AllStored(more)) => {
                answers.resize(answers.len() + more, Answer::Stored);
            }
            (Answers::Each(answers), Answers::Each(mut more)) => answers.append(&mut more),
            (Answers::AllStored(count), Answers::Each(more)) => {
                let mut answers = vec![Answer::Stored; *count];
                answers.extend(more);
                *self = Answers::Each(answers);
            }
        }
    }
}

/// Why an answer says nothing about what was stored.
#[derive(Debug, Error)]
pub(super) enum Unreadable {
    #[error("the answer is not a bulk answer: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the answer has {actual} items for {expected} documents")]
    Count { expected: usize, actual: usize },
}

/// Reads an answer.
pub(super) fn read(reply: &[u8], expected: &[Expected<'_>]) -> Result<Answers, Unreadable> {
    let count = expected.iter().map(|run| run.count).sum();
    if is_all_stored(reply, expected) {
        return Ok(Answers::AllStored(count));
    }
    let mut answers = Vec::with_capacity(count);
    let mut json = serde_json::Deserializer::from_slice(reply);
    Reply { expected, answers: &mut answers }.deserialize(&mut json)?;
    json.end()?;
    if answers.len() != count {
        return Err(Unreadable::Count { expected: count, actual: answers.len() });
    }
    if answers.iter().all(|answer| *answer == Answer::Stored) {
        return Ok(Answers::AllStored(count));
    }
    Ok(Answers::Each(answers))
}

/// Compares the answer with the one that a server writes when all is well: the whole of it, byte
/// by byte, without parsing. Anything else goes the slow way.
fn is_all_stored(reply: &[u8], expected: &[Expected<'_>]) -> bool {
    let Some(mut rest) = reply.strip_prefix(br#"{"errors":false,"items":["#) else {
        return false;
    };
    let mut left: usize = expected.iter().map(|run| run.count).sum();
    let mut item = Vec::new();
    for run in expected {
        item.clear();
        item.extend_from_slice(br#"{"create":{"_index":""#);
        // A name that needs escapes matches nothing here, which is only slower.
        item.extend_from_slice(run.index.as_bytes());
        item.extend_from_slice(br#"","result":"created","status":201}},"#);
        for _ in 0..run.count {
            left -= 1;
            if left == 0 {
                // The last item has no comma.
                return rest.strip_prefix(&item[..item.len() - 1]) == Some(b"]}");
            }
            match rest.strip_prefix(item.as_slice()) {
                Some(next) => rest = next,
                None => return false,
            }
        }
    }
    false
}

/// The whole answer; its other fields are of no interest.
struct Reply<'e, 'a> {
    expected: &'e [Expected<'a>],
    answers: &'e mut Vec<Answer>,
}

impl<'de> DeserializeSeed<'de> for Reply<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Reply<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a bulk answer")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut found = false;
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            if key == "items" && !found {
                found = true;
                map.next_value_seed(Items { expected: self.expected, answers: self.answers })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct Items<'e, 'a> {
    expected: &'e [Expected<'a>],
    answers: &'e mut Vec<Answer>,
}

impl<'de> DeserializeSeed<'de> for Items<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Items<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the items of a bulk answer")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let indices =
            self.expected.iter().flat_map(|run| std::iter::repeat_n(run.index, run.count));
        for index in indices {
            let Some(item) = items.next_element::<Item<'de>>()? else {
                return Ok(());
            };
            self.answers.push(item.create.answer(index));
        }
        // Surplus items make the number wrong, whatever they say.
        while items.next_element::<IgnoredAny>()?.is_some() {
            self.answers.push(Answer::Stored);
        }
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Item<'a> {
    #[serde(borrow)]
    create: Created<'a>,
}

/// Any of its texts may be missing or `null`: that must not make the other items unreadable.
#[derive(Deserialize)]
struct Created<'a> {
    #[serde(rename = "_index", borrow, default)]
    index: Option<Cow<'a, str>>,
    status: u16,
    #[serde(borrow, default)]
    result: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    failure_store: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    error: Option<Fault<'a>>,
}

#[derive(Deserialize, Default)]
struct Fault<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    reason: Option<Cow<'a, str>>,
}

impl Created<'_> {
    fn answer(self, index: &str) -> Answer {
        let fault = self.error.as_ref().unwrap_or(&Fault { kind: None, reason: None });
        match self.status {
            200..=299 => self.success(index),
            409 => Answer::Conflict,
            status if fault.is_of_the_index(status) => Answer::Index(fault.text(status)),
            429 => Answer::Busy(fault.text(429)),
            503 => Answer::Unavailable(fault.text(503)),
            status @ 500.. => Answer::Broken(fault.text(status)),
            status => Answer::Refused(fault.text(status)),
        }
    }

    fn success(&self, index: &str) -> Answer {
        let created = self.status == 201 && self.result.as_deref() == Some("created");
        match self.index.as_deref() {
            _ if !created || self.failure_store.as_deref() == Some("used") => Answer::Pipeline,
            Some(named) if named == index => Answer::Stored,
            named => Answer::Elsewhere(Arc::from(named.unwrap_or_default())),
        }
    }
}

impl Fault<'_> {
    fn kind(&self) -> &str {
        self.kind.as_deref().unwrap_or_default()
    }

    /// Whether the index would refuse any document now.
    fn is_of_the_index(&self, status: u16) -> bool {
        match status {
            403 | 404 => true,
            // A full disk makes indices read-only under 429. Under 503 it is the whole cluster
            // that is blocked, which passes.
            429 => self.kind() == "cluster_block_exception",
            // The primary was away for the whole of the request's timeout, at the cost of all
            // other indices in it: not to be repeated for each batch (I6).
            503 => self.kind() == "unavailable_shards_exception",
            // Closed; shard limit of the cluster; a name that this version refuses.
            400 => matches!(
                self.kind(),
                "index_closed_exception"
                    | "cluster_block_exception"
                    | "validation_exception"
                    | "invalid_index_name_exception"
            ),
            _ => false,
        }
    }

    fn text(&self, status: u16) -> Arc<str> {
        let text = match (self.kind(), self.reason.as_deref().unwrap_or_default()) {
            ("", "") => format!("HTTP status {status}"),
            (kind, "") => kind.to_owned(),
            ("", reason) => reason.to_owned(),
            (kind, reason) => format!("{kind}: {reason}"),
        };
        Arc::from(shortened(&text))
    }
}

/// The error in the answer to a whole request, as text for a person.
pub(super) fn error_of_request(reply: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Whole<'a> {
        #[serde(borrow)]
        error: Fault<'a>,
    }
    let text = match serde_json::from_slice::<Whole<'_>>(reply) {
        Ok(whole) => whole.error.text(0).to_string(),
        // A proxy's page, perhaps: its first line is better than nothing.
        Err(_) => {
            let text = String::from_utf8_lossy(&reply[..reply.len().min(REASON_BYTES_MAX)]);
            let line = text.lines().map(str::trim).find(|line| !line.is_empty());
            line.unwrap_or("no reason given").to_owned()
        }
    };
    shortened(&text).to_owned()
}

fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(REASON_BYTES_MAX)]
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Expected<'_> = Expected { index: "a", count: 2 };
    const B: Expected<'_> = Expected { index: "bb", count: 1 };

    fn stored(index: &str) -> String {
        format!(r#"{{"create":{{"_index":"{index}","result":"created","status":201}}}}"#)
    }

    fn reply(errors: bool, items: &[String]) -> String {
        format!(r#"{{"errors":{errors},"items":[{}]}}"#, items.join(","))
    }

    fn one(item: &str) -> Answer {
        let reply = format!(r#"{{"errors":true,"items":[{{"create":{item}}}]}}"#);
        let expected = [Expected { index: "a", count: 1 }];
        read(reply.as_bytes(), &expected).expect("readable").get(0).clone()
    }

    #[test]
    fn the_usual_answer_is_compared_as_bytes() {
        let all = reply(false, &[stored("a"), stored("a"), stored("bb")]);
        assert!(is_all_stored(all.as_bytes(), &[A, B]));
        assert_eq!(read(all.as_bytes(), &[A, B]).expect("readable"), Answers::AllStored(3));
    }

    #[test]
    fn other_spacing_and_order_are_read_too() {
        let spaced = concat!(
            r#"{ "took": 3, "items": [ {"create": {"status": 201, "result": "created", "#,
            r#""_index": "a", "_id": "x", "_shards": {"total": 2}}} ], "errors": false }"#
        );
        let expected = [Expected { index: "a", count: 1 }];
        assert!(!is_all_stored(spaced.as_bytes(), &expected));
        assert_eq!(read(spaced.as_bytes(), &expected).expect("readable"), Answers::AllStored(1));
    }

    #[test]
    fn a_short_long_or_foreign_answer_is_unreadable() {
        let few = reply(false, &[stored("a"), stored("a")]);
        let many = reply(false, &[stored("a"), stored("a"), stored("bb"), stored("bb")]);
        let other =
            reply(false, &[stored("a"), stored("a"), stored("bb").replace("create", "index")]);
        let whole = reply(false, &[stored("a"), stored("a"), stored("bb")]);
        for bad in [&few, &many, &other, "{}", "[]", "", "<html>", r#"{"errors":false,"items":[]}"#]
        {
            assert!(!is_all_stored(bad.as_bytes(), &[A, B]), "{bad}");
            assert!(read(bad.as_bytes(), &[A, B]).is_err(), "{bad}");
        }
        for end in 0..whole.len() {
            assert!(read(&whole.as_bytes()[..end], &[A, B]).is_err(), "cut at {end}");
        }
        assert!(read(format!("{whole} x").as_bytes(), &[A, B]).is_err());
    }

    #[test]
    fn only_the_named_index_counts_as_stored() {
        let swapped = reply(false, &[stored("a"), stored("bb"), stored("a")]);
        let Answers::Each(answers) = read(swapped.as_bytes(), &[A, B]).expect("readable") else {
            panic!("not all stored");
        };
        let elsewhere = |index: &str| Answer::Elsewhere(Arc::from(index));
        assert_eq!(answers, [Answer::Stored, elsewhere("bb"), elsewhere("a")]);
    }

    #[test]
    fn successes_that_store_nothing_are_told_apart() {
        assert_eq!(one(r#"{"_index":"a","status":200,"result":"noop"}"#), Answer::Pipeline);
        assert_eq!(one(r#"{"_index":"a","status":200,"result":"updated"}"#), Answer::Pipeline);
        assert_eq!(one(r#"{"_index":"a","status":201}"#), Answer::Pipeline);
        let failed = r#"{"_index":"a","status":201,"result":"created","failure_store":"used"}"#;
        assert_eq!(one(failed), Answer::Pipeline);
    }

    #[test]
    fn errors_are_sorted_by_whose_fault_they_are() {
        let item = |status: u16, kind: &str| {
            one(&format!(
                r#"{{"_index":"a","status":{status},"error":{{"type":"{kind}","reason":"why"}}}}"#
            ))
        };
        let text = |kind: &str| Arc::from(format!("{kind}: why"));
        for (status, kind) in [
            (403, "security_exception"),
            (403, "cluster_block_exception"),
            (404, "index_not_found_exception"),
            (400, "index_closed_exception"),
            (400, "validation_exception"),
            (400, "invalid_index_name_exception"),
            (429, "cluster_block_exception"),
            (503, "unavailable_shards_exception"),
        ] {
            assert_eq!(item(status, kind), Answer::Index(text(kind)), "{status} {kind}");
        }
        let busy = "es_rejected_execution_exception";
        assert_eq!(item(429, busy), Answer::Busy(text(busy)));
        let missing = "cluster_block_exception";
        assert_eq!(item(503, missing), Answer::Unavailable(text(missing)));
        assert_eq!(item(500, "x"), Answer::Broken(text("x")));
        assert_eq!(item(502, "x"), Answer::Broken(text("x")));
        let mapping = "mapper_parsing_exception";
        assert_eq!(item(400, mapping), Answer::Refused(text(mapping)));
        assert_eq!(item(413, "x"), Answer::Refused(text("x")));
        assert_eq!(item(409, "version_conflict_engine_exception"), Answer::Conflict);
        assert_eq!(one(r#"{"status":500}"#), Answer::Broken(Arc::from("HTTP status 500")));
        let null = r#"{"status":400,"error":{"type":"x","reason":null}}"#;
        assert_eq!(one(null), Answer::Refused(Arc::from("x")));
        let nulls = r#"{"_index":null,"status":400,"result":null,"error":null}"#;
        assert_eq!(one(nulls), Answer::Refused(Arc::from("HTTP status 400")));
    }

    #[test]
    fn reasons_are_bounded() {
        let long = "é".repeat(5000);
        let item = format!(r#"{{"status":400,"error":{{"type":"t","reason":"{long}"}}}}"#);
        let Answer::Refused(reason) = one(&item) else { panic!("refused") };
        assert!(reason.len() <= REASON_BYTES_MAX);
        assert!(error_of_request(long.as_bytes()).len() <= REASON_BYTES_MAX);
    }

    #[test]
    fn a_refused_request_names_its_reason() {
        let json = br#"{"error":{"root_cause":[],"type":"t","reason":"r"},"status":403}"#;
        assert_eq!(error_of_request(json), "t: r");
        assert_eq!(error_of_request(b"\n <html>413</html>\n"), "<html>413</html>");
        assert_eq!(error_of_request(b"\xff"), "\u{fffd}");
        assert_eq!(error_of_request(b""), "no reason given");
    }

    #[test]
    fn answers_join_in_order() {
        let mut answers = Answers::AllStored(2);
        answers.append(Answers::AllStored(1));
        assert_eq!(answers, Answers::AllStored(3));
        answers.append(Answers::Each(vec![Answer::Conflict]));
        answers.append(Answers::AllStored(1));
        assert_eq!(answers.len(), 5);
        assert_eq!(answers.get(3), &Answer::Conflict);
        assert_eq!(answers.get(4), &Answer::Stored);
    }
}

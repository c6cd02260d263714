//! The query language: words, phrases, fields and times.
//!
//! ```text
//! query  = { [ "-" ] ( phrase | field ":" ( phrase | word ) | word ) }     separated by spaces
//! phrase = '"' any text, with \" and \\ '"'
//! ```
//!
//! Every part must match; a part with `-` must not. Words are whole words, without regard to case;
//! a word with punctuation inside (`10.0.0.1`) is the phrase of its parts. There are no wildcards.
//! The embedded store looks for words in the whole line as it came, Elasticsearch in `message`.

use std::str::Chars;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use thiserror::Error;

use super::SearchArgs;

/// Parts that a query may have, so that no statement grows without bound (I7).
const TERMS_MAX: usize = 64;

/// Bytes of a query, likewise.
const QUERY_BYTES_MAX: usize = 16 << 10;

/// First parts of the field names that documents have: ECS, then ours.
const FIELD_ROOTS: [&str; 24] = [
    "agent",
    "client",
    "cloud",
    "container",
    "destination",
    "ecs",
    "error",
    "event",
    "host",
    "http",
    "json",
    "labels",
    "log",
    "network",
    "process",
    "server",
    "service",
    "source",
    "tls",
    "trace",
    "url",
    "user",
    "user_agent",
    "waybill",
];

/// Field names without a dot.
const FIELDS_WHOLE: [&str; 4] = ["_id", "_index", "message", "tags"];

/// A query that was understood.
#[derive(Clone, PartialEq, Debug)]
pub struct Query {
    /// All must hold.
    pub terms: Vec<Term>,
    /// Lines at this instant or later.
    pub after: Option<Timestamp>,
    /// Lines before this instant.
    pub before: Option<Timestamp>,
    /// How many hits are wanted, the newest; 1 or more.
    pub limit: usize,
}

/// One part of a query.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Term {
    /// It must not match.
    pub negated: bool,
    /// What is looked for.
    pub matcher: Matcher,
}

/// What a term looks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Matcher {
    /// These words, one after another, in the line's text. Has at least one letter or digit.
    Words(String),
    /// A document id in its text form.
    Id(String),
    /// An index name.
    Index(String),
    /// A field that has this value, or a list that holds it. The name consists of `[A-Za-z0-9_@-]`
    /// parts joined by dots; the value is not empty.
    Field {
        /// ECS name, or `json.…`.
        name: String,
        /// As typed, without its quotes.
        value: String,
    },
}

/// What is wrong with a query; each is the user's to mend.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum QueryError {
    /// A quote that is not closed.
    #[error("the query has a '\"' without its partner; write \\\" for a quote inside a phrase")]
    Unclosed,
    /// Text glued to a phrase.
    #[error(
        "the query has a '\"' inside {0:?}; put the whole in quotes and write \\\" for the inner one"
    )]
    QuoteInside(String),
    /// Nothing that an index of words could find.
    #[error("{0:?} has no letter or digit to search for")]
    NoWord(String),
    /// A field without a value.
    #[error("field {0:?} has no value; write {0}:value or {0}:\"some words\"")]
    NoValue(String),
    /// A name before a colon that no document has.
    #[error(
        "field {0:?} is not known; fields are named as in ECS (host.name, log.file.path, \
         http.response.status_code), those of JSON lines json.NAME; to search for a text with a colon, \
         put it in quotes"
    )]
    UnknownField(String),
    /// The time of a line is not searched as a field.
    #[error("search for times with --after and --before")]
    TimeField,
    /// Not an instant in any form.
    #[error(
        "{0:?} is no time; write 2026-11-21T10:00:00Z, 2026-11-21, or 15m, 2h, 3d, 1w for so long ago"
    )]
    BadTime(String),
    /// The range is empty.
    #[error("--after is not earlier than --before, so nothing can lie between")]
    EmptyRange,
    /// Over a bound.
    #[error("the query is too long: at most {QUERY_BYTES_MAX} bytes and {TERMS_MAX} parts")]
    TooLong,
    /// No hit was asked for.
    #[error("--limit must be 1 or more")]
    NoLimit,
    /// More hits than Elasticsearch gives at once.
    #[error(
        "elasticsearch gives at most {max} lines at once; use --limit {max} or a narrower time range"
    )]
    LimitTooLarge {
        /// The most it gives.
        max: usize,
    },
}

impl Query {
    /// Reads what was typed; `now` is what relative times count from.
    pub fn new(args: &SearchArgs, now: Timestamp) -> Result<Query, QueryError> {
        let time = |text: &Option<String>| text.as_deref().map(|t| parse_time(t, now)).transpose();
        let (after, before) = (time(&args.after)?, time(&args.before)?);
        if let (Some(after), Some(before)) = (after, before)
            && after >= before
        {
            return Err(QueryError::EmptyRange);
        }
        if args.limit == 0 {
            return Err(QueryError::NoLimit);
        }
        Ok(Query { terms: parse(&args.query)?, after, before, limit: args.limit })
    }
}

/// Reads the parts of a query; none for an empty one.
pub fn parse(text: &str) -> Result<Vec<Term>, QueryError> {
    if text.len() > QUERY_BYTES_MAX {
        return Err(QueryError::TooLong);
    }
    let mut terms = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        if terms.len() == TERMS_MAX {
            return Err(QueryError::TooLong);
        }
        let (term, after) = term(rest)?;
        terms.push(term);
        rest = after.trim_start();
    }
    Ok(terms)
}

/// Reads the term at the start of `text`, which is neither empty nor starts with a space.
fn term(text: &str) -> Result<(Term, &str), QueryError> {
    let (negated, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (matcher, rest) = match field_name(text) {
        Some(name) => {
            let (value, rest) = value(&text[name.len() + 1..])?;
            (field(name, value)?, rest)
        }
        None => {
            let (words, rest) = value(text)?;
            (Matcher::Words(with_word(words)?), rest)
        }
    };
    Ok((Term { negated, matcher }, rest))
}

/// What stands before the first colon of an unquoted word.
fn field_name(text: &str) -> Option<&str> {
    let end = text.find(|c: char| c == ':' || c == '"' || c.is_whitespace())?;
    text[end..].starts_with(':').then(|| &text[..end])
}

/// Reads a phrase, or a word up to the next space, and what follows it.
fn value(text: &str) -> Result<(String, &str), QueryError> {
    if let Some(quoted) = text.strip_prefix('"') {
        let (phrase, rest) = phrase(quoted)?;
        if rest.starts_with(|c: char| !c.is_whitespace()) {
            let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
            return Err(QueryError::QuoteInside(format!("\"{phrase}\"{}", &rest[..end])));
        }
        return Ok((phrase, rest));
    }
    let end = text.find(char::is_whitespace).unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    if word.contains('"') {
        return Err(QueryError::QuoteInside(word.to_owned()));
    }
    Ok((word.to_owned(), rest))
}

/// Reads up to the closing quote; a backslash before a quote or a backslash is taken away.
fn phrase(text: &str) -> Result<(String, &str), QueryError> {
    let mut phrase = String::new();
    let mut chars: Chars<'_> = text.chars();
    while let Some(character) = chars.next() {
        match character {
            '"' => return Ok((phrase, chars.as_str())),
            '\\' if chars.as_str().starts_with(['"', '\\']) => phrase.extend(chars.next()),
            _ => phrase.push(character),
        }
    }
    Err(QueryError::Unclosed)
}

fn field(name: &str, value: String) -> Result<Matcher, QueryError> {
    if name == "@timestamp" {
        return Err(QueryError::TimeField);
    }
    if !is_field(name) {
        return Err(QueryError::UnknownField(name.to_owned()));
    }
    if value.is_empty() {
        return Err(QueryError::NoValue(name.to_owned()));
    }
    Ok(match name {
        "message" => Matcher::Words(with_word(value)?),
        "_id" => Matcher::Id(value),
        "_index" => Matcher::Index(value),
        _ => Matcher::Field { name: name.to_owned(), value },
    })
}

fn is_field(name: &str) -> bool {
    let is_part = |part: &str| {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'@' | b'-');
        !part.is_empty() && part.bytes().all(allowed)
    };
    match name.split_once('.') {
        None => FIELDS_WHOLE.contains(&name),
        Some((root, rest)) => FIELD_ROOTS.contains(&root) && rest.split('.').all(is_part),
    }
}

fn with_word(text: String) -> Result<String, QueryError> {
    if text.chars().any(char::is_alphanumeric) { Ok(text) } else { Err(QueryError::NoWord(text)) }
}

/// An instant: RFC 3339, a date or a date and time (UTC both), or how long before `now`.
fn parse_time(text: &str, now: Timestamp) -> Result<Timestamp, QueryError> {
    let text = text.trim();
    let utc = |time: DateTime| time.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp());
    ago(text)
        .and_then(|ago| now.checked_sub(ago).ok())
        .or_else(|| text.parse::<Timestamp>().ok())
        .or_else(|| text.parse::<DateTime>().ok().and_then(utc))
        .ok_or_else(|| QueryError::BadTime(text.to_owned()))
}

/// `90s`, `15m`, `2h`, `3d`, `1w`.
fn ago(text: &str) -> Option<SignedDuration> {
    let unit = match text.chars().next_back()? {
        's' => 1,
        'm' => 60,
        'h' => 60 * 60,
        'd' => 24 * 60 * 60,
        'w' => 7 * 24 * 60 * 60,
        _ => return None,
    };
    let digits = &text[..text.len() - 1];
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let seconds = digits.parse::<i64>().ok()?.checked_mul(unit)?;
    Some(SignedDuration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::super::SearchTarget;
    use super::*;

    fn words(text: &str) -> Term {
        Term { negated: false, matcher: Matcher::Words(text.to_owned()) }
    }

    fn field(name: &str, value: &str) -> Term {
        let matcher = Matcher::Field { name: name.to_owned(), value: value.to_owned() };
        Term { negated: false, matcher }
    }

    fn not(term: Term) -> Term {
        Term { negated: true, ..term }
    }

    fn now() -> Timestamp {
        "2026-11-21T12:00:00Z".parse().expect("a time")
    }

    fn args(after: Option<&str>, before: Option<&str>) -> SearchArgs {
        SearchArgs {
            query: String::new(),
            after: after.map(str::to_owned),
            before: before.map(str::to_owned),
            limit: 5,
            json: false,
            target: SearchTarget::Store(PathBuf::new()),
        }
    }

    #[test]
    fn words_phrases_fields_and_negation() {
        let query =
            r#" error "timed \"out\" \\ x" host.name:web1 -json.user:"a b" -"not this" tags:x"#;
        let expected = [
            words("error"),
            words(r#"timed "out" \ x"#),
            field("host.name", "web1"),
            not(field("json.user", "a b")),
            not(words("not this")),
            field("tags", "x"),
        ];
        assert_eq!(parse(query).expect("a good query"), expected);
        assert_eq!(parse("").expect("an empty query"), []);
        assert_eq!(parse("message:oops").expect("a good query"), [words("oops")]);
    }

    #[test]
    fn a_bad_query_says_what_to_do() {
        for (query, says) in [
            ("\"open", "without its partner"),
            ("a\"b", "put the whole in quotes"),
            ("\"a\"b", "put the whole in quotes"),
            ("status:404", "http.response.status_code"),
            ("http://x/", "put it in quotes"),
            ("12:30", "put it in quotes"),
            ("json.:1", "not known"),
            ("json.a..b:1", "not known"),
            ("host.name:", "no value"),
            ("@timestamp:1", "--after"),
            ("-", "no letter"),
            ("\"\"", "no letter"),
            ("...", "no letter"),
        ] {
            let error = parse(query).expect_err(query).to_string();
            assert!(error.contains(says), "{query}: {error}");
        }
        assert_eq!(parse(&"a ".repeat(TERMS_MAX + 1)), Err(QueryError::TooLong));
        assert_eq!(parse(&"a".repeat(QUERY_BYTES_MAX + 1)), Err(QueryError::TooLong));
    }

    #[test]
    fn times_are_absolute_or_ago() {
        for (text, expected) in [
            ("2026-11-20T10:00:00+02:00", "2026-11-20T08:00:00Z"),
            ("2026-11-20", "2026-11-20T00:00:00Z"),
            ("2026-11-20T10:30", "2026-11-20T10:30:00Z"),
            ("90s", "2026-11-21T11:58:30Z"),
            ("15m", "2026-11-21T11:45:00Z"),
            ("2h", "2026-11-21T10:00:00Z"),
            ("3d", "2026-11-18T12:00:00Z"),
            ("1w", "2026-11-14T12:00:00Z"),
        ] {
            let query = Query::new(&args(Some(text), None), now()).expect(text);
            assert_eq!(query.after, Some(expected.parse().expect("a time")), "{text}");
        }
        for text in ["", "m", "yesterday", "-3d", "99999999999999999d", "3é"] {
            let query = Query::new(&args(Some(text), None), now());
            assert_eq!(query, Err(QueryError::BadTime(text.to_owned())));
        }
        let reversed = Query::new(&args(Some("1h"), Some("2h")), now());
        assert_eq!(reversed, Err(QueryError::EmptyRange));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in any::<String>(), time in any::<String>()) {
            let _ = parse(&text);
            let _ = parse_time(&time, now());
        }

        #[test]
        fn every_text_can_be_searched_as_a_phrase(text in any::<String>()) {
            let quoted = format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
            match parse(&quoted) {
                Ok(terms) => prop_assert_eq!(terms, [words(&text)]),
                Err(error) => prop_assert_eq!(error, QueryError::NoWord(text)),
            }
        }

        #[test]
        fn syntax_soup_makes_no_panic(text in r#"[-":\\. a@é_0]{0,40}"#) {
            let _ = parse(&text);
        }
    }
}

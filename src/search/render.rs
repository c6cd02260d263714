//! What a search found, as text for a person or JSON for a program.
//!
//! Called by `waybill search`. A logged byte must never act on the terminal (I8): control
//! characters, those that turn the direction of writing and invisible ones are written as escapes,
//! in JSON too.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};

use serde_json::Value;

use super::{Answer, Hit};

const DIM: &str = "\x1b[2m";
const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";

/// Writes one line per hit: `TIME HOST PATH:OFFSET message`, `-` for what is not known, with colours; give a stream that
/// takes them away where it is no terminal.
pub fn write_lines(hits: &[Hit], out: &mut impl Write) -> io::Result<()> {
    for hit in hits {
        // A document that is no JSON is shown as it is.
        let document = serde_json::from_str(&hit.document)
            .unwrap_or_else(|_| serde_json::json!({ "message": hit.document }));
        let text = |name: &str| match field(&document, name) {
            absent if absent.is_empty() => "-".to_owned(),
            text => escape(&text).into_owned(),
        };
        let (time, host) = (text("@timestamp"), text("host.name"));
        let (path, offset) = (text("log.file.path"), text("log.offset"));
        let message = text("message");
        writeln!(
            out,
            "{DIM}{time}{PLAIN} {BOLD}{host}{PLAIN} {DIM}{path}:{offset}{PLAIN} {message}"
        )?;
    }
    Ok(())
}

/// Writes one JSON object per line: `_id`, `_index`, then the document's own fields.
pub fn write_json(hits: &[Hit], out: &mut impl Write) -> io::Result<()> {
    for hit in hits {
        let (id, index) = (Value::from(hit.id.as_str()), Value::from(hit.index.as_str()));
        let fields = hit.document.trim().strip_prefix('{').unwrap_or("}");
        let comma = if fields.trim_start().starts_with('}') { "" } else { "," };
        let line = format!("{{\"_id\":{id},\"_index\":{index}{comma}{fields}");
        writeln!(out, "{}", escape_json(&line))?;
    }
    Ok(())
}

/// What was found, in one line, and how to see more.
///
/// `limit` is how many lines were asked for at most.
pub fn summary(answer: &Answer, limit: usize) -> String {
    let shown = answer.hits.len() as u64;
    let lines =
        |count: u64| if count == 1 { "1 line".to_owned() } else { format!("{count} lines") };
    let found = match (answer.total, answer.total_is_exact) {
        (0, true) => "nothing found".to_owned(),
        (total, true) if total <= shown => format!("{} found", lines(total)),
        (total, true) => {
            format!(
                "{} found, the newest {shown} shown; see all with --limit {total}",
                lines(total)
            )
        }
        (_, false) if answer.hits.len() < limit => format!("{} found", lines(shown)),
        (total, false) => format!(
            "more than {} found, the newest {shown} shown; see more with a larger --limit or narrow \
             the search with --after and --before",
            lines(total)
        ),
    };
    match &answer.incomplete {
        Some(reason) => format!("{found}; lines may be missing: {}", escape(reason)),
        None => found,
    }
}

/// A field's text; empty where there is none.
fn field<'v>(document: &'v Value, name: &str) -> Cow<'v, str> {
    match name.split('.').try_fold(document, |value, part| value.get(part)) {
        Some(Value::String(text)) => Cow::Borrowed(text),
        Some(Value::Null) | None => Cow::Borrowed(""),
        Some(other) => Cow::Owned(other.to_string()),
    }
}

/// Text that a terminal only shows: newlines and tabs as `\n` and `\t`, other characters that act
/// as `\u{…}`.
fn escape(text: &str) -> Cow<'_, str> {
    if !text.chars().any(acts) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if acts(character) {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    Cow::Owned(escaped)
}

/// The same JSON, whose strings hold such characters as `\uXXXX`. Outside strings JSON has none
/// but white space, which becomes a space.
fn escape_json(json: &str) -> Cow<'_, str> {
    if !json.chars().any(acts) {
        return Cow::Borrowed(json);
    }
    let mut escaped = String::with_capacity(json.len() + 16);
    for character in json.chars() {
        match character {
            '\t' | '\n' | '\r' => escaped.push(' '),
            _ if acts(character) => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _ = write!(escaped, "\\u{unit:04x}");
                }
            }
            _ => escaped.push(character),
        }
    }
    Cow::Owned(escaped)
}

/// Whether a terminal does something else than show it: C0, DEL, C1, the marks that change the
/// direction of writing, and what is not to be seen (Unicode's category Cf, blank letters).
fn acts(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}'
            | '\u{890}'..='\u{891}' | '\u{8e2}' | '\u{115f}'..='\u{1160}'
            | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hit(document: &str) -> Hit {
        Hit { id: "id".to_owned(), index: "i".to_owned(), document: document.to_owned() }
    }

    fn lines(document: &str) -> String {
        let mut out = anstream::StripStream::new(Vec::new());
        write_lines(&[hit(document)], &mut out).expect("memory is no device");
        String::from_utf8(out.into_inner()).expect("text")
    }

    fn json(document: &str) -> String {
        let mut out = Vec::new();
        write_json(&[hit(document)], &mut out).expect("memory is no device");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn a_line_reads_time_host_place_message() {
        let document = r#"{"@timestamp":"T","message":"m","host":{"name":"h"},"log":{"file":{"path":"/p"},"offset":7}}"#;
        assert_eq!(lines(document), "T h /p:7 m\n");
        assert_eq!(lines(r#"{"log":{"offset":0}}"#), "- - -:0 -\n");
        assert_eq!(lines("no JSON"), "- - -:- no JSON\n");
    }

    #[test]
    fn a_logged_escape_sequence_does_not_reach_the_terminal() {
        let document =
            "{\"message\":\"\\u001b[2J\u{9b}31m\u{7f}\u{202e}\",\"host\":{\"name\":\"\\u0007\"}}";
        let mut out = Vec::new();
        write_lines(&[hit(document)], &mut out).expect("memory is no device");
        let text = String::from_utf8(out).expect("text");
        let own = text.replace(DIM, "").replace(BOLD, "").replace(PLAIN, "");
        assert_eq!(own.trim_end_matches('\n').chars().filter(|&c| acts(c)).count(), 0, "{own:?}");
        let text = json(document);
        assert_eq!(text.trim_end_matches('\n').chars().filter(|&c| acts(c)).count(), 0, "{text:?}");
        let read: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(read["message"], "\u{1b}[2J\u{9b}31m\u{7f}\u{202e}");
    }

    #[test]
    fn what_cannot_be_seen_is_written_as_an_escape() {
        let document = "{\"message\":\"a\u{feff}\u{200b}\u{ad}\u{e0041}b\"}";
        assert!(lines(document).ends_with(" a\\u{feff}\\u{200b}\\u{ad}\\u{e0041}b\n"));
        let text = json(document);
        assert!(text.contains("a\\ufeff\\u200b\\u00ad\\udb40\\udc41b"), "{text}");
        let read: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(read["message"], "a\u{feff}\u{200b}\u{ad}\u{e0041}b");
    }

    #[test]
    fn json_lines_carry_id_and_index() {
        assert_eq!(
            json(r#"{"message":"m"}"#),
            "{\"_id\":\"id\",\"_index\":\"i\",\"message\":\"m\"}\n"
        );
        assert_eq!(json("{}"), "{\"_id\":\"id\",\"_index\":\"i\"}\n");
    }

    #[test]
    fn the_summary_says_how_to_see_more() {
        let answer = |shown: usize, total, total_is_exact| {
            let hits = vec![hit("{}"); shown];
            summary(&Answer { hits, total, total_is_exact, incomplete: None }, 3)
        };
        assert_eq!(answer(0, 0, true), "nothing found");
        assert_eq!(answer(1, 1, true), "1 line found");
        assert!(answer(2, 9, true).contains("--limit 9"));
        assert!(answer(3, 10_000, false).starts_with("more than 10000 lines"));
        assert_eq!(answer(2, 1, false), "2 lines found", "fewer than asked for are all");
    }

    proptest! {
        #[test]
        fn whatever_was_logged_is_one_line(text in any::<String>()) {
            let document = serde_json::json!({ "message": text, "host": { "name": text } }).to_string();
            prop_assert_eq!(lines(&document).matches('\n').count(), 1);
            let line = json(&document);
            prop_assert_eq!(line.matches('\n').count(), 1);
            let read: Value = serde_json::from_str(&line).expect("JSON");
            prop_assert_eq!(&read["message"], &Value::from(text));
        }
    }
}

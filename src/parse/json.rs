//! A JSON line: one pass that validates it and finds its members, one that writes those that no
//! ECS field takes.
//!
//! No tree is built. What is written has no duplicate key at any level, no number that a double
//! cannot hold, and no key that is an object in one place and a scalar in another of the same line.

use std::borrow::Cow;

use super::ecs::{Fields, Held, lift};
use super::escape::{unescape, write_escaped, write_string};
use super::timestamp::Zone;

/// Objects and arrays below this level become strings.
const DEPTH_MAX: usize = 5;
/// Keys of one line under `json`, over all levels.
const KEYS_MAX: usize = 100;
/// Bytes of one key.
const KEY_BYTES_MAX: usize = 128;
/// Elements of one array.
const ELEMENTS_MAX: usize = 1000;
/// Characters of one number.
const NUMBER_BYTES_MAX: usize = 64;
/// A line with deeper nesting is raw, since it would be read by recursion (I8).
const NESTING_MAX: usize = 128;
/// Where members go that cannot be fields.
const REST: &str = "_rest";

/// The members of a JSON line that no ECS field took.
pub type Members<'a> = Vec<(JsonStr<'a>, Value<'a>)>;

/// Reads a line that is one JSON object: known keys into `fields`, the others into `others`.
/// `None`, with both partly filled, where it is not one.
pub fn read<'a>(
    text: &'a str,
    zone: &Zone,
    fields: &mut Fields<'a>,
    others: &mut Members<'a>,
) -> Option<()> {
    let mut scanner = Scanner { text, at: 0 };
    scanner.expect(b'{')?;
    scanner.members(1, |key, value| {
        let known = lift(&key.text()).is_some_and(|lift| fields.put(lift, &value, zone));
        if !known {
            others.push((key, value));
        }
        Some(())
    })?;
    scanner.skip_space();
    (scanner.at == text.len()).then_some(())
}

/// Appends `,"json":{…}` unless there are no members.
pub fn write(members: &Members<'_>, out: &mut Vec<u8>) {
    if members.is_empty() {
        return;
    }
    out.extend_from_slice(b",\"json\":{");
    let mut writer = Writer { keys_left: KEYS_MAX };
    let mut names: Vec<Cow<'_, str>> = Vec::with_capacity(members.len().min(KEYS_MAX));
    let mut rest = String::new();
    for (key, value) in members {
        let mark = out.len();
        let budget = writer.keys_left;
        if writer.member(*key, *value, 1, &mut names, out).is_none() {
            out.truncate(mark);
            writer.keys_left = budget;
            rest.push(if rest.is_empty() { '{' } else { ',' });
            rest.push('"');
            rest.push_str(key.raw);
            rest.push_str("\":");
            value.push_source(&mut rest);
        }
    }
    if !rest.is_empty() {
        rest.push('}');
        if !names.is_empty() {
            out.push(b',');
        }
        write_string(REST, out);
        out.push(b':');
        write_string(&rest, out);
    }
    out.push(b'}');
}

/// The inside of a valid JSON string.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JsonStr<'a> {
    raw: &'a str,
    escaped: bool,
}

impl<'a> JsonStr<'a> {
    /// The text it stands for.
    pub fn text(self) -> Cow<'a, str> {
        if self.escaped { unescape(self.raw) } else { Cow::Borrowed(self.raw) }
    }

    /// As a field holds it.
    pub fn held(self) -> Held<'a> {
        if self.escaped { Held::Text(unescape(self.raw)) } else { Held::Plain(self.raw) }
    }

    fn write(self, out: &mut Vec<u8>) {
        out.push(b'"');
        if self.escaped {
            // Not as it stands: half a surrogate pair must not reach the destination.
            write_escaped(&unescape(self.raw), out);
        } else {
            out.extend_from_slice(self.raw.as_bytes());
        }
        out.push(b'"');
    }
}

/// A valid JSON value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Value<'a> {
    String(JsonStr<'a>),
    /// As it is written.
    Number(&'a str),
    /// `true`, `false` or `null`.
    Literal(&'a str),
    /// As it is written, with its braces.
    Object(&'a str),
    /// As it is written, with its brackets.
    Array(&'a str),
}

impl<'a> Value<'a> {
    /// The text of a string or number.
    pub fn text(&self) -> Option<Cow<'a, str>> {
        match self {
            Value::String(text) => Some(text.text()),
            Value::Number(text) => Some(Cow::Borrowed(text)),
            _ => None,
        }
    }

    fn push_source(&self, to: &mut String) {
        match self {
            Value::String(text) => {
                to.push('"');
                to.push_str(text.raw);
                to.push('"');
            }
            Value::Number(text)
            | Value::Literal(text)
            | Value::Object(text)
            | Value::Array(text) => to.push_str(text),
        }
    }
}

/// Writes values within the bounds of a line.
struct Writer {
    keys_left: usize,
}

impl Writer {
    /// Appends one member, with a comma unless it is the first of its object. `None`, with a part
    /// of it written, where it must go to the rest.
    fn member<'a>(
        &mut self,
        key: JsonStr<'a>,
        value: Value<'a>,
        depth: usize,
        names: &mut Vec<Cow<'a, str>>,
        out: &mut Vec<u8>,
    ) -> Option<()> {
        self.keys_left = self.keys_left.checked_sub(1)?;
        let name = field_name(key).filter(|name| name != REST && !names.contains(name))?;
        if !names.is_empty() {
            out.push(b',');
        }
        write_string(&name, out);
        out.push(b':');
        self.value(value, depth, out)?;
        names.push(name);
        Some(())
    }

    fn value(&mut self, value: Value<'_>, depth: usize, out: &mut Vec<u8>) -> Option<()> {
        match value {
            Value::String(text) => text.write(out),
            Value::Number(text) if fits_double(text) => out.extend_from_slice(text.as_bytes()),
            Value::Literal(text) => out.extend_from_slice(text.as_bytes()),
            Value::Object(text) if depth < DEPTH_MAX => return self.object(text, depth + 1, out),
            Value::Array(text) if is_flat(text) => write_flat(text, out),
            Value::Number(text) | Value::Object(text) | Value::Array(text) => {
                write_string(text, out);
            }
        }
        Some(())
    }

    fn object(&mut self, text: &str, depth: usize, out: &mut Vec<u8>) -> Option<()> {
        let mut names = Vec::new();
        out.push(b'{');
        let mut scanner = Scanner { text, at: 1 };
        scanner.members(depth, |key, value| self.member(key, value, depth, &mut names, out))?;
        out.push(b'}');
        Some(())
    }
}

/// A key as a field's name: no dots, which would make objects of it, nothing that Elasticsearch
/// refuses. `None` where it is too long.
fn field_name(key: JsonStr<'_>) -> Option<Cow<'_, str>> {
    let text = key.text();
    let is_bad = |byte: u8| byte == b'.' || byte < 0x20 || byte == 0x7f;
    if text.len() > KEY_BYTES_MAX {
        return None;
    }
    if text.trim().is_empty() {
        return Some(Cow::Borrowed("_"));
    }
    if !text.bytes().any(is_bad) {
        return Some(text);
    }
    let clean = |c: char| if c.is_ascii() && is_bad(c as u8) { '_' } else { c };
    Some(Cow::Owned(text.chars().map(clean).collect()))
}

fn fits_double(number: &str) -> bool {
    // Up to 15 characters without an exponent there is nothing that could be too large.
    let is_short = number.len() <= 15 && !number.contains(['e', 'E']);
    is_short
        || (number.len() <= NUMBER_BYTES_MAX && number.parse::<f64>().is_ok_and(f64::is_finite))
}

/// Whether an array can be written as one: few elements, none an object or an array, which could
/// disagree about a key.
fn is_flat(array: &str) -> bool {
    let mut count = 0;
    let all = elements(array, |value| {
        count += 1;
        let flat = !matches!(value, Value::Object(_) | Value::Array(_));
        (flat && count <= ELEMENTS_MAX).then_some(())
    });
    all.is_some()
}

fn write_flat(array: &str, out: &mut Vec<u8>) {
    out.push(b'[');
    let first = out.len();
    let written = elements(array, |value| {
        if out.len() > first {
            out.push(b',');
        }
        match value {
            Value::String(text) => text.write(out),
            Value::Number(text) if !fits_double(text) => write_string(text, out),
            Value::Number(text)
            | Value::Literal(text)
            | Value::Object(text)
            | Value::Array(text) => out.extend_from_slice(text.as_bytes()),
        }
        Some(())
    });
    debug_assert!(written.is_some(), "the array was validated with its line");
    out.push(b']');
}

fn elements<'a>(array: &'a str, mut visit: impl FnMut(Value<'a>) -> Option<()>) -> Option<()> {
    Scanner { text: array, at: 1 }.elements(1, &mut visit)
}

/// Walks over JSON text (RFC 8259); every method is `None` where it is not valid.
struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    #[inline]
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    #[inline]
    fn skip_space(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    #[inline]
    fn expect(&mut self, byte: u8) -> Option<()> {
        (self.peek() == Some(byte)).then(|| self.at += 1)
    }

    /// What follows a `{`, to its `}`.
    #[inline]
    fn members(
        &mut self,
        depth: usize,
        mut visit: impl FnMut(JsonStr<'a>, Value<'a>) -> Option<()>,
    ) -> Option<()> {
        self.skip_space();
        if self.expect(b'}').is_some() {
            return Some(());
        }
        loop {
            self.skip_space();
            self.expect(b'"')?;
            let key = self.string()?;
            self.skip_space();
            self.expect(b':')?;
            let value = self.value(depth)?;
            visit(key, value)?;
            self.skip_space();
            if self.expect(b',').is_none() {
                return self.expect(b'}');
            }
        }
    }

    /// What follows a `[`, to its `]`.
    fn elements(
        &mut self,
        depth: usize,
        visit: &mut dyn FnMut(Value<'a>) -> Option<()>,
    ) -> Option<()> {
        self.skip_space();
        if self.expect(b']').is_some() {
            return Some(());
        }
        loop {
            let value = self.value(depth)?;
            visit(value)?;
            self.skip_space();
            if self.expect(b',').is_none() {
                return self.expect(b']');
            }
        }
    }

    #[inline]
    fn value(&mut self, depth: usize) -> Option<Value<'a>> {
        self.skip_space();
        let start = self.at;
        match self.peek()? {
            b'"' => {
                self.at += 1;
                self.string().map(Value::String)
            }
            b'-' | b'0'..=b'9' => self.number().map(Value::Number),
            b't' => self.literal("true"),
            b'f' => self.literal("false"),
            b'n' => self.literal("null"),
            b'{' if depth < NESTING_MAX => {
                self.skip_object(depth + 1)?;
                Some(Value::Object(&self.text[start..self.at]))
            }
            b'[' if depth < NESTING_MAX => {
                self.at += 1;
                self.elements(depth + 1, &mut |_| Some(()))?;
                Some(Value::Array(&self.text[start..self.at]))
            }
            _ => None,
        }
    }

    /// Of its own, so that the recursion does not take `members` with its visitor into itself.
    #[inline(never)]
    fn skip_object(&mut self, depth: usize) -> Option<()> {
        self.at += 1;
        self.members(depth, |_, _| Some(()))
    }

    fn literal(&mut self, word: &'static str) -> Option<Value<'a>> {
        self.text[self.at..].starts_with(word).then(|| {
            self.at += word.len();
            Value::Literal(word)
        })
    }

    fn number(&mut self) -> Option<&'a str> {
        let start = self.at;
        let _ = self.expect(b'-');
        match self.peek()? {
            b'0' => self.at += 1,
            b'1'..=b'9' => self.digits()?,
            _ => return None,
        }
        if self.expect(b'.').is_some() {
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Some(&self.text[start..self.at])
    }

    fn digits(&mut self) -> Option<()> {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        (self.at > start).then_some(())
    }

    /// What follows a `"`, to the next that is not escaped.
    #[inline]
    fn string(&mut self) -> Option<JsonStr<'a>> {
        let start = self.at;
        let mut escaped = false;
        loop {
            self.at += ordinary(&self.text.as_bytes()[self.at..]);
            match self.peek()? {
                b'"' => {
                    let raw = &self.text[start..self.at];
                    self.at += 1;
                    return Some(JsonStr { raw, escaped });
                }
                b'\\' => {
                    escaped = true;
                    self.escape()?;
                }
                _ => return None,
            }
        }
    }

    fn escape(&mut self) -> Option<()> {
        self.at += 1;
        let kind = self.peek()?;
        self.at += 1;
        match kind {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Some(()),
            b'u' => {
                let digits = self.text.as_bytes().get(self.at..self.at + 4)?;
                self.at += 4;
                digits.iter().all(u8::is_ascii_hexdigit).then_some(())
            }
            _ => None,
        }
    }
}

/// How many bytes come before the next quote, backslash or control character: eight at a time.
#[inline]
fn ordinary(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = ONES << 7;
    let mut at = 0;
    while let Some(chunk) = bytes[at..].first_chunk::<8>() {
        let word = u64::from_le_bytes(*chunk);
        let quote = word ^ (ONES * b'"' as u64);
        let backslash = word ^ (ONES * b'\\' as u64);
        // In each term the lowest set high bit is exact; borrows only reach upward.
        let hits = (quote.wrapping_sub(ONES) & !quote)
            | (backslash.wrapping_sub(ONES) & !backslash)
            | (word.wrapping_sub(ONES * 0x20) & !word);
        let hits = hits & HIGH;
        if hits != 0 {
            return at + (hits.trailing_zeros() / 8) as usize;
        }
        at += 8;
    }
    let is_special = |&byte: &u8| byte < 0x20 || byte == b'"' || byte == b'\\';
    at + bytes[at..].iter().position(is_special).unwrap_or(bytes.len() - at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn is_object(text: &str) -> bool {
        read(text, &Zone::Fixed(0), &mut Fields::default(), &mut Vec::new()).is_some()
    }

    fn written(text: &str) -> String {
        let (mut fields, mut others) = (Fields::default(), Vec::new());
        read(text, &Zone::Fixed(0), &mut fields, &mut others).expect(text);
        let mut out = Vec::new();
        write(&others, &mut out);
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn valid_is_what_rfc_8259_says() {
        for good in [
            "{}",
            " {}".trim_start(),
            "{ \"a\" : [ 1 , -0.5e+3 , true , null , \"\\u00e9\\n\" , [ ] , { } ] } \r",
            "{\"a\":0}",
            "{\"\":\"\"}",
            "{\"a\":\"\\ud800\"}",
        ] {
            assert!(is_object(good), "{good}");
        }
        for bad in [
            "",
            "{",
            "{}x",
            "{,}",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{\"a\":01}",
            "{\"a\":1.}",
            "{\"a\":-}",
            "{\"a\":1e}",
            "{\"a\":+1}",
            "{\"a\":NaN}",
            "{\"a\":tru}",
            "{\"a\":[1,]}",
            "{\"a\":[1}",
            "{a:1}",
            "{\"a\":\"\\x22\"}",
            "{\"a\":\"\\u12g4\"}",
            "{\"a\":\"\t\"}",
            "{\"a\":\"",
            "{\"a\":\"\\",
            "[1]",
        ] {
            assert!(!is_object(bad), "{bad}");
        }
        let deep =
            |levels: usize| format!("{{\"a\":{}{}}}", "[".repeat(levels), "]".repeat(levels));
        assert!(is_object(&deep(100)));
        assert!(!is_object(&deep(100_000)));
    }

    #[test]
    fn names_that_collide_go_to_the_rest() {
        assert_eq!(
            written(
                r#"{"a":1,"a":2,"b.c":3,"b":{"c":4},"b_c":5,"":6," ":7,"_rest":8,"\u0061":9,"x\ny":10}"#
            ),
            r#","json":{"a":1,"b_c":3,"b":{"c":4},"_":6,"x_y":10,"_rest":"{\"a\":2,\"b_c\":5,\" \":7,\"_rest\":8,\"\\u0061\":9}"}"#
        );
        assert_eq!(
            written(r#"{"a":{"b":1,"b":2}}"#),
            r#","json":{"_rest":"{\"a\":{\"b\":1,\"b\":2}}"}"#
        );
        let long = "k".repeat(KEY_BYTES_MAX + 1);
        assert_eq!(
            written(&format!("{{\"{long}\":1}}")),
            format!(r#","json":{{"_rest":"{{\"{long}\":1}}"}}"#)
        );
    }

    #[test]
    fn values_stay_within_what_a_mapping_takes() {
        assert_eq!(
            written(
                r#"{"n":1e999,"m":12345678901234567890123,"o":[1,{"a":1}],"p":[1,"\ud800",1e400],"q":-0.0}"#
            ),
            r#","json":{"n":"1e999","m":12345678901234567890123,"o":"[1,{\"a\":1}]","p":[1,"�","1e400"],"q":-0.0}"#
        );
        assert_eq!(
            written(r#"{"a":{"b":{"c":{"d":{"e":{"f":1}}}}}}"#),
            r#","json":{"a":{"b":{"c":{"d":{"e":"{\"f\":1}"}}}}}"#
        );
    }

    #[test]
    fn keys_are_counted_over_all_levels() {
        let members = |from: usize, to: usize| {
            (from..to).map(|n| format!("\"k{n}\":{n}")).collect::<Vec<_>>().join(",")
        };
        let text =
            written(&format!(r#"{{"a":{{{}}},"b":{{{}}},"c":1}}"#, members(0, 60), members(0, 60)));
        let expected = format!(
            r#","json":{{"a":{{{}}},"c":1,"_rest":{}}}"#,
            members(0, 60),
            serde_json::to_string(&format!(r#"{{"b":{{{}}}}}"#, members(0, 60))).expect("text")
        );
        assert_eq!(text, expected);
    }

    proptest! {
        /// The scanner and serde_json must agree on what is JSON, but for what only serde_json refuses: half
        /// surrogate pairs and numbers beyond a double.
        #[test]
        fn the_scanner_agrees_with_serde_json(text in r#"\{[ \{\}\[\],:"\\aute0-9.\-EfnlrsTu]{0,40}\}?"#) {
            if serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok() {
                prop_assert!(is_object(&text));
            } else {
                prop_assert!(!is_object(&text));
            }
        }

        #[test]
        fn ordinary_stops_where_a_byte_loop_does(bytes in proptest::collection::vec(prop_oneof![
            4 => any::<u8>(), 1 => Just(b'"'), 1 => Just(b'\\'), 1 => Just(0x1f), 8 => 0x20_u8..0x30,
        ], 0..40)) {
            let is_special = |&byte: &u8| byte < 0x20 || byte == b'"' || byte == b'\\';
            let expected = bytes.iter().position(is_special).unwrap_or(bytes.len());
            prop_assert_eq!(ordinary(&bytes), expected);
        }
    }
}

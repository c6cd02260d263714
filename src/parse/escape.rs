//! JSON strings: escaping on the way out, unescaping where a value must be understood.
//!
//! Every byte of every line goes through [`write_escaped`], so it is written for lines that need
//! no escape, and for JSON texts whose quotes all need one. What it writes is always the inside of
//! a valid JSON string.

use std::borrow::Cow;

const CHUNK: usize = 32;

/// Appends `"text"`.
pub fn write_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    write_escaped(text, out);
    out.push(b'"');
}

/// Appends the inside of a JSON string.
#[inline]
pub fn write_escaped(text: &str, out: &mut Vec<u8>) {
    let bytes = text.as_bytes();
    // The common line has nothing to escape: found out without a branch per byte, copied at once.
    let clean = clean_prefix(bytes);
    out.extend_from_slice(&bytes[..clean]);
    if clean < bytes.len() {
        write_dirty(&bytes[clean..], out);
    }
}

/// Whether a byte must be escaped (RFC 8259 §7).
#[inline]
fn is_special(byte: u8) -> bool {
    (byte < 0x20) | (byte == b'"') | (byte == b'\\')
}

/// The length of a prefix, in whole chunks or all of it, without anything to escape.
#[inline]
fn clean_prefix(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(chunk) = bytes[at..].first_chunk::<CHUNK>() {
        if any_special(chunk) {
            return at;
        }
        at += CHUNK;
    }
    if bytes[at..].iter().any(|&byte| is_special(byte)) { at } else { bytes.len() }
}

/// Without an early exit, so that it compiles to a few vector instructions.
#[inline]
fn any_special(chunk: &[u8; CHUNK]) -> bool {
    chunk.iter().fold(false, |any, &byte| any | is_special(byte))
}

/// Eight bytes at a time through a buffer on the stack: a quote costs a store and no call.
fn write_dirty(bytes: &[u8], out: &mut Vec<u8>) {
    let mut buffer = [0; BUFFER];
    let mut filled = 0;
    let mut words = bytes.chunks_exact(WORD);
    for chunk in words.by_ref() {
        if filled > BUFFER - 3 * WORD {
            out.extend_from_slice(&buffer[..filled]);
            filled = 0;
        }
        let mut word = u64::from_le_bytes(chunk.try_into().expect("chunks have 8 bytes"));
        if controls(word) != 0 {
            out.extend_from_slice(&buffer[..filled]);
            filled = 0;
            write_bytes(chunk, out);
            continue;
        }
        let mut hits = equal(word, b'"') | equal(word, b'\\');
        let mut left = WORD;
        store(&mut buffer, filled, word);
        while hits != 0 {
            // What comes before it stands already; the backslash, then it and the rest again.
            let before = (hits.trailing_zeros() / 8) as usize;
            word >>= 8 * before;
            hits >>= 8 * before;
            filled += before + 1;
            buffer[filled - 1] = b'\\';
            store(&mut buffer, filled, word);
            filled += 1;
            left -= before + 1;
            word >>= 8;
            hits >>= 8;
        }
        filled += left;
    }
    out.extend_from_slice(&buffer[..filled]);
    write_bytes(words.remainder(), out);
}

const WORD: usize = 8;
const BUFFER: usize = 256;
const ONES: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = ONES << 7;

/// The high bit of each byte that is `byte`; exact in all of them.
#[inline]
fn equal(word: u64, byte: u8) -> u64 {
    let zero = word ^ (ONES * u64::from(byte));
    !(((zero & !HIGH) + !HIGH) | zero) & HIGH
}

/// The high bit of each byte below 0x20; exact in all of them.
#[inline]
fn controls(word: u64) -> u64 {
    !(((word & !HIGH) + ONES * 0x60) | word) & HIGH
}

#[inline]
fn store(buffer: &mut [u8; BUFFER], at: usize, word: u64) {
    buffer[at..at + WORD].copy_from_slice(&word.to_le_bytes());
}

fn write_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    for &byte in bytes {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            0x20.. => out.push(byte),
            _ => write_control(byte, out),
        }
    }
}

#[cold]
fn write_control(byte: u8, out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let short = match byte {
        b'\n' => b'n',
        b'\r' => b'r',
        b'\t' => b't',
        0x08 => b'b',
        0x0c => b'f',
        _ => {
            let digits = [HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]];
            out.extend_from_slice(b"\\u00");
            return out.extend_from_slice(&digits);
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}

/// Appends a decimal number.
pub fn write_integer(number: impl itoa::Integer, out: &mut Vec<u8>) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// The text that the inside of a valid JSON string stands for. Half of a surrogate pair, which no
/// UTF-8 can hold, becomes U+FFFD.
pub fn unescape(raw: &str) -> Cow<'_, str> {
    let Some(first) = raw.find('\\') else {
        return Cow::Borrowed(raw);
    };
    let mut text = String::with_capacity(raw.len());
    text.push_str(&raw[..first]);
    let mut rest = &raw[first..];
    while let Some(escape) = rest.strip_prefix('\\') {
        let mut characters = escape.chars();
        let plain = match characters.next() {
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('u') => {
                let (character, length) = unescape_unicode(escape);
                characters = escape[length..].chars();
                character
            }
            Some(other) => other,
            None => break,
        };
        text.push(plain);
        let tail = characters.as_str();
        let next = tail.find('\\').unwrap_or(tail.len());
        text.push_str(&tail[..next]);
        rest = &tail[next..];
    }
    Cow::Owned(text)
}

/// Reads `uXXXX` or `uXXXX\uXXXX`; answers the character and how many bytes it took.
fn unescape_unicode(escape: &str) -> (char, usize) {
    let Some(unit) = hex_unit(escape) else {
        return (char::REPLACEMENT_CHARACTER, 1);
    };
    if let 0xd800..=0xdbff = unit
        && let Some(low) = escape.get(5..).and_then(|tail| tail.strip_prefix('\\'))
        && let Some(low @ 0xdc00..=0xdfff) = hex_unit(low)
    {
        let code = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
        return (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 11);
    }
    (char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER), 5)
}

fn hex_unit(escape: &str) -> Option<u32> {
    let digits = escape.strip_prefix('u')?.get(..4)?;
    let hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    hex.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn surrogates_pair_or_become_replacements() {
        assert_eq!(unescape(r"a\ud83d\ude00b"), "a😀b");
        assert_eq!(unescape(r"\ud83d"), "\u{fffd}");
        assert_eq!(unescape(r"\ude00\ud83dx"), "\u{fffd}\u{fffd}x");
        assert_eq!(unescape(r"\ud83d\ud83d\ude00"), "\u{fffd}😀");
        assert_eq!(unescape(r#"\u00e9\"\\\/\n"#), "é\"\\/\n");
    }

    fn texts() -> impl Strategy<Value = String> {
        let pieces = prop_oneof![
            3 => "[ -~]{0,40}",
            1 => Just("\"\\\"".to_owned()),
            1 => "\\PC{0,10}",
            1 => any::<char>().prop_map(|c| c.to_string()),
            1 => (0_u8..0x20).prop_map(|c| char::from(c).to_string()),
        ];
        proptest::collection::vec(pieces, 0..6).prop_map(|all| all.concat())
    }

    proptest! {
        #[test]
        fn what_is_escaped_reads_back(text in texts()) {
            let mut out = Vec::new();
            write_string(&text, &mut out);
            prop_assert_eq!(&serde_json::from_slice::<String>(&out).expect("a JSON string"), &text);
            let inside = std::str::from_utf8(&out[1..out.len() - 1]).expect("UTF-8");
            prop_assert_eq!(unescape(inside), text);
        }
    }
}

//! The lines that are sent: numbered, so that no two are the same, and the same in every run.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::bail;

/// Length of a plain line with its newline, in bytes.
const LINE_BYTES: usize = 200;

const WORDS: [&str; 16] = [
    "accepted", "request", "from", "upstream", "cache", "miss", "for", "session", "user", "loaded",
    "config", "worker", "finished", "in", "queue", "retry",
];

/// What lines look like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// 200 bytes of text that nothing is made of but a message.
    Plain,
    /// nginx's access log in the usual JSON form.
    Nginx,
    /// A header as RFC 3164 §4.1 has it, and text.
    Syslog,
}

impl Kind {
    /// As typed.
    pub fn parse(name: &str) -> anyhow::Result<Kind> {
        Ok(match name {
            "plain" => Kind::Plain,
            "nginx" => Kind::Nginx,
            "syslog" => Kind::Syslog,
            _ => bail!("unknown kind of lines {name:?}: plain, nginx or syslog"),
        })
    }
}

/// Writes so many lines into a file.
pub fn write(kind: Kind, lines: u64, path: &Path) -> anyhow::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut line = Vec::new();
    for number in 0..lines {
        line.clear();
        match kind {
            Kind::Plain => {
                write!(line, "line {number:07} id={:016x}", random.next())?;
                words(&mut random, LINE_BYTES - 1, &mut line);
            }
            Kind::Nginx => nginx(number, &mut random, &mut line)?,
            Kind::Syslog => {
                let (second, process) = (number / 100 % 60, random.next() % 30_000 + 300);
                write!(line, "<134>Nov 21 08:15:{second:02} web1 app[{process}]: {number:07}")?;
                words(&mut random, LINE_BYTES - 1, &mut line);
            }
        }
        line.push(b'\n');
        out.write_all(&line)?;
    }
    Ok(out.flush()?)
}

fn words(random: &mut Random, length: usize, line: &mut Vec<u8>) {
    while line.len() < length {
        line.push(b' ');
        line.extend_from_slice(WORDS[random.next() as usize % WORDS.len()].as_bytes());
    }
    line.truncate(length);
}

fn nginx(number: u64, random: &mut Random, line: &mut Vec<u8>) -> std::io::Result<()> {
    let bits = random.next();
    let (b, c, d) = (bits >> 8 & 0xff, bits >> 16 & 0xff, bits >> 24 & 0xff);
    write!(
        line,
        "{{\"ip\":\"10.{b}.{c}.{d}\",\"host\":\"shop.example.com\",\"path\":\"/products/{number}?page={}\",\
         \"status\":\"200\",\"referrer\":\"https://shop.example.com/list\",\"user_agent\":\"Mozilla/5.0 \
         (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\",\"length\":\"{}\",\
         \"generation_time_milli\":\"0.0{}\",\"date\":\"2026-11-21T08:15:{:02}+00:00\"}}",
        bits >> 32 & 0x3f,
        bits >> 40 & 0xffff,
        bits >> 56 & 0x1f | 0x20,
        number / 100 % 60,
    )
}

/// xorshift64: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

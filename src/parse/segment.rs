//! What all documents of a segment share, prepared once, and the way from a record to its document.

use std::borrow::Cow;
use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::access_log;
use super::ecs::{Field, Fields, Held, count};
use super::escape::{write_escaped, write_integer, write_string};
use super::json::{self, Members};
use super::syslog::{self, Clock, Header};
use super::timestamp::{self, Millis, Zone};
use crate::record::{Day, Format, IdPrefix, Record, Row, SenderId};

/// The version of ECS whose names are used.
const ECS_VERSION: &str = "8.17.0";

/// A segment as the receiver knows it: its row, and what follows from it for every document.
#[derive(Debug)]
pub struct Segment {
    /// As it came with `open`.
    pub row: Row,
    /// The authenticated sender.
    pub sender: SenderId,
    /// The sender's name in the tokens file.
    pub sender_name: String,
    /// Index of its documents, but for records with a key: see [`Segment::index_on`].
    pub index: String,
    /// What its document ids have in common.
    pub ids: IdPrefix,
    zone: Zone,
    /// The row's day in days since 1970.
    near: i64,
    pieces: Pieces,
}

/// Text that is the same in all its documents, in the order in which they have it.
#[derive(Debug)]
struct Pieces {
    /// `,"host":{"name":"web1"}`, or nothing.
    host: Vec<u8>,
    /// `,"log":{"file":{"path":"/var/log/x"},"offset":`
    log: Vec<u8>,
    /// `,"labels":{…}`, or nothing.
    labels: Vec<u8>,
    /// `"a","b"`: the inside of an array.
    tags: Vec<u8>,
    /// `,"waybill":{"sender":…` without the closing brace.
    waybill: Vec<u8>,
    /// Host, log and all that follows the offset of a line without anything special.
    plain_head: Vec<u8>,
    plain_tail: Vec<u8>,
}

/// The two clocks of a frame, in milliseconds since 1970, and their text. Made once per frame.
#[derive(Clone, Copy, Debug)]
pub struct FrameTimes {
    /// When the sender read it: `@timestamp` of a line that has none of its own.
    pub read_at: u64,
    /// When the receiver wrote it: `event.ingested`.
    pub ingested_at: u64,
    read_text: [u8; timestamp::TEXT_LEN],
    ingested_text: [u8; timestamp::TEXT_LEN],
}

impl FrameTimes {
    /// The sender's and the receiver's clock, in milliseconds since 1970.
    pub fn new(read_at: u64, ingested_at: u64) -> FrameTimes {
        FrameTimes {
            read_at,
            ingested_at,
            read_text: timestamp::format(millis(read_at)),
            ingested_text: timestamp::format(millis(ingested_at)),
        }
    }
}

fn millis(time: u64) -> Millis {
    Millis::try_from(time).unwrap_or(Millis::MAX)
}

/// How much of a line becomes fields.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// Parsed, all fields.
    Full,
    /// After the destination refused the full form: the line as one string, and a tag.
    Reduced,
}

/// What a line's first bytes say that it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Shape {
    Raw,
    Json,
    /// `<PRI>…`
    Priority,
    /// A time first; whether any word after it may be the host.
    Stamped {
        any_word: bool,
    },
    NginxError,
    /// An access log whose `[` stands there.
    AccessLog(usize),
}

impl Shape {
    #[inline]
    fn of(line: &str, format: Format) -> Shape {
        let bytes = line.as_bytes();
        let Some(&first) = bytes.first() else {
            return Shape::Raw;
        };
        match (format, first) {
            (Format::Auto | Format::Json, b'{') => Shape::Json,
            (Format::Auto | Format::Syslog, b'<') => Shape::Priority,
            (Format::Syslog, b'0'..=b'9' | b'A'..=b'Z') => Shape::Stamped { any_word: true },
            (Format::Auto, b'0'..=b'9') if bytes.get(4) == Some(&b'-') => {
                Shape::Stamped { any_word: false }
            }
            (Format::Auto, b'0'..=b'9') if bytes.get(4) == Some(&b'/') => Shape::NginxError,
            (Format::Auto, b'A'..=b'Z') if matches!(bytes.get(3), Some(b' ')) => {
                Shape::Stamped { any_word: false }
            }
            (Format::Auto, _) => access_log::time_at(line).map_or(Shape::Raw, Shape::AccessLog),
            _ => Shape::Raw,
        }
    }
}

/// A line, understood.
#[derive(Debug, Default)]
struct Parsed<'a> {
    fields: Fields<'a>,
    header: Option<Header<'a>>,
    process_id: Option<i64>,
    others: Members<'a>,
}

impl Segment {
    /// Prepares a segment of an authenticated sender; `index` is what the row's rule makes of it.
    pub fn new(row: Row, sender: SenderId, sender_name: String, index: String) -> Segment {
        let ids = IdPrefix::new(sender, row.segment);
        let zone = Zone::of(&row.timezone);
        let pieces = Pieces::new(&row, sender, &sender_name, zone.is_some());
        let date = row.day.0;
        let (year, month, day) = (date.year(), date.month(), date.day());
        let near = timestamp::days_from_civil(year.into(), month.into(), day.into());
        let zone = zone.unwrap_or(Zone::Fixed(0));
        Segment { row, sender, sender_name, index, ids, zone, near, pieces }
    }

    /// The index of its documents of a day. A record with a key has the day of its time of origin,
    /// so that its repeat in another segment is the same document of the same index (I3).
    #[inline]
    pub fn index_on(&self, day: Day) -> Cow<'_, str> {
        match &self.row.rule {
            Some(rule) if day != self.row.day => Cow::Owned(rule.name(&self.row.type_name, day)),
            _ => Cow::Borrowed(&self.index),
        }
    }

    /// Appends the document of one record to `out`: one JSON object without a newline.
    pub fn write_document(
        &self,
        record: &Record<'_>,
        times: &FrameTimes,
        form: Form,
        out: &mut Vec<u8>,
    ) {
        let payload = record.payload.strip_suffix(b"\r").unwrap_or(record.payload);
        let (line, bytes) = match std::str::from_utf8(payload) {
            Ok(line) => (Cow::Borrowed(line), None),
            Err(_) => (String::from_utf8_lossy(payload), Some(record.payload)),
        };
        let envelope = Envelope { segment: self, record, times, form, bytes };
        if form == Form::Full && !record.continues {
            let shape = Shape::of(&line, self.row.format);
            if shape != Shape::Raw {
                let mut parsed = Parsed::default();
                if self.parse(&line, shape, &mut parsed).is_some() {
                    return envelope.write_parsed(&line, &parsed, out);
                }
            }
        }
        envelope.write_raw(&line, out);
    }

    /// `None`, with some of it filled, where the line is not what its first bytes promised.
    fn parse<'a>(&self, line: &'a str, shape: Shape, parsed: &mut Parsed<'a>) -> Option<()> {
        let clock = Clock { zone: &self.zone, near: self.near };
        let Parsed { fields, others, .. } = parsed;
        match shape {
            Shape::Raw => None,
            Shape::Json => json::read(line, &self.zone, fields, others),
            Shape::Priority => {
                self.take_header(syslog::with_priority(line, clock)?, parsed);
                Some(())
            }
            Shape::Stamped { any_word } => {
                self.take_header(syslog::without_priority(line, clock, any_word)?, parsed);
                Some(())
            }
            Shape::NginxError => {
                let (pid, message) = access_log::read_nginx_error(line, &self.zone, fields)?;
                parsed.process_id = Some(pid);
                parsed.fields.message = Held::Text(Cow::Borrowed(message));
                Some(())
            }
            Shape::AccessLog(time_at) => access_log::read(line, time_at, fields),
        }
    }

    /// A header's message may be JSON or an error log's line in turn: that is what nginx sends.
    fn take_header<'a>(&self, header: Header<'a>, parsed: &mut Parsed<'a>) {
        if header.message.starts_with('{') {
            let Parsed { fields, others, .. } = parsed;
            if json::read(header.message, &self.zone, fields, others).is_none() {
                *parsed = Parsed::default();
            }
        } else if let Some((pid, message)) =
            access_log::read_nginx_error(header.message, &self.zone, &mut parsed.fields)
        {
            parsed.process_id = Some(pid);
            parsed.fields.message = Held::Text(Cow::Borrowed(message));
            // A header may tell the zone, which nginx does not.
            parsed.fields.timestamp = header.timestamp.or(parsed.fields.timestamp);
        }
        let Parsed { fields, .. } = parsed;
        fields.timestamp = fields.timestamp.or(header.timestamp);
        if fields.message == Held::Absent {
            fields.message = Held::Text(Cow::Borrowed(header.message));
        }
        let digits = |text: &&str| text.len() <= 10;
        parsed.process_id = header.procid.filter(digits).and_then(count).or(parsed.process_id);
        parsed.header = Some(header);
    }
}

impl Pieces {
    fn new(row: &Row, sender: SenderId, sender_name: &str, zone_known: bool) -> Pieces {
        let mut host = Vec::new();
        if !row.host.is_empty() {
            host.extend_from_slice(b",\"host\":{\"name\":");
            write_string(&row.host, &mut host);
            host.push(b'}');
        }

        let mut log = b",\"log\":{".to_vec();
        if !row.path.is_empty() {
            log.extend_from_slice(b"\"file\":{\"path\":");
            write_string(&row.path, &mut log);
            log.extend_from_slice(b"},");
        }
        log.extend_from_slice(b"\"offset\":");

        let mut labels = Vec::new();
        for (name, value) in distinct_labels(&row.labels) {
            labels.extend_from_slice(if labels.is_empty() { b",\"labels\":{" } else { b"," });
            write_string(&name, &mut labels);
            labels.push(b':');
            write_string(value, &mut labels);
        }
        if !labels.is_empty() {
            labels.push(b'}');
        }

        let mut tags = Vec::new();
        for tag in &row.tags {
            push_tag(tag, &mut tags);
        }
        if !zone_known {
            push_tag("waybill_timezone_unknown", &mut tags);
        }

        let mut waybill = Vec::new();
        for (before, text) in [
            (",\"ecs\":{\"version\":", ECS_VERSION),
            ("},\"waybill\":{\"sender\":", &sender.to_string()),
            (",\"sender_name\":", sender_name),
            (",\"segment\":", &row.segment.to_string()),
            (",\"type\":", row.type_name.as_str()),
        ] {
            waybill.extend_from_slice(before.as_bytes());
            write_string(text, &mut waybill);
        }

        let plain_head = [&b"\"}"[..], &host, &log].concat();
        let mut plain_tail = [&b"}"[..], &labels].concat();
        write_tags(&tags, &mut plain_tail);
        plain_tail.extend_from_slice(&waybill);
        plain_tail.extend_from_slice(b"}}");
        Pieces { host, log, labels, tags, waybill, plain_head, plain_tail }
    }
}

/// Names without dots, which would make objects of them, and each only once.
fn distinct_labels(labels: &BTreeMap<String, String>) -> BTreeMap<String, &str> {
    let mut distinct = BTreeMap::new();
    for (name, value) in labels {
        let clean = match name.trim() {
            "" => "_".to_owned(),
            _ => name.replace(|c: char| c == '.' || c.is_control(), "_"),
        };
        distinct.entry(clean).or_insert(value.as_str());
    }
    distinct
}

fn push_tag(tag: &str, tags: &mut Vec<u8>) {
    if !tags.is_empty() {
        tags.push(b',');
    }
    write_string(tag, tags);
}

fn write_tags(tags: &[u8], out: &mut Vec<u8>) {
    if !tags.is_empty() {
        out.extend_from_slice(b",\"tags\":[");
        out.extend_from_slice(tags);
        out.push(b']');
    }
}

/// What surrounds a line's own fields.
struct Envelope<'a> {
    segment: &'a Segment,
    record: &'a Record<'a>,
    times: &'a FrameTimes,
    form: Form,
    /// The payload, where it is not UTF-8.
    bytes: Option<&'a [u8]>,
}

impl Envelope<'_> {
    /// The line as one string.
    fn write_raw(&self, line: &str, out: &mut Vec<u8>) {
        let pieces = &self.segment.pieces;
        // The text of a line, its escapes aside, and about as much again around it: one growth.
        out.reserve(line.len() + pieces.plain_head.len() + pieces.plain_tail.len() + 160);
        self.write_timestamp(None, out);
        out.extend_from_slice(b"\",\"message\":\"");
        write_escaped(line, out);
        out.extend_from_slice(b"\",\"event\":{\"ingested\":\"");
        out.extend_from_slice(&self.times.ingested_text);
        out.extend_from_slice(&pieces.plain_head);
        write_integer(self.record.offset, out);
        if self.is_plain() {
            out.extend_from_slice(&pieces.plain_tail);
        } else {
            self.write_flags(out);
            out.push(b'}');
            self.write_tail(out);
        }
    }

    /// The line's fields, and what every document has.
    fn write_parsed(&self, line: &str, parsed: &Parsed<'_>, out: &mut Vec<u8>) {
        let Parsed { fields, header, process_id, others } = parsed;
        let pieces = &self.segment.pieces;
        out.reserve(2 * line.len() + pieces.plain_head.len() + pieces.plain_tail.len() + 512);
        self.write_timestamp(fields.timestamp, out);
        out.extend_from_slice(b"\",\"message\":\"");
        let message_start = out.len();
        match &fields.message {
            Held::Absent => write_escaped(line, out),
            message => message.write_inside(out),
        }
        let message_end = out.len();
        out.extend_from_slice(b"\",\"event\":{\"ingested\":\"");
        out.extend_from_slice(&self.times.ingested_text);
        match &fields.message {
            Held::Absent => {}
            // A part of its line that is as long as the line is all of it.
            Held::Text(message) if line.len() == message.len() => {}
            Held::Text(message) if line.ends_with(&**message) => {
                // Escaped once, just above: only what stands before it is new.
                out.extend_from_slice(b"\",\"original\":\"");
                write_escaped(&line[..line.len() - message.len()], out);
                out.extend_from_within(message_start..message_end);
            }
            _ => {
                out.extend_from_slice(b"\",\"original\":\"");
                write_escaped(line, out);
            }
        }
        out.push(b'"');
        fields.write_one(Field::EventDuration, "duration", out);
        out.push(b'}');

        match header.as_ref().and_then(|header| header.hostname) {
            Some(host) => {
                out.extend_from_slice(b",\"host\":{\"name\":");
                write_string(host, out);
                out.push(b'}');
            }
            None => out.extend_from_slice(&pieces.host),
        }
        out.extend_from_slice(&pieces.log);
        write_integer(self.record.offset, out);
        self.write_flags(out);
        fields.write_one(Field::LogLevel, "level", out);
        fields.write_one(Field::LogLogger, "logger", out);
        if let Some(header) = header {
            header.write(out);
        }
        out.push(b'}');
        write_process(header.as_ref().and_then(|header| header.appname), *process_id, out);
        fields.write(out);
        json::write(others, out);
        self.write_tail(out);
    }

    /// `{"@timestamp":"…`
    fn write_timestamp(&self, own: Option<Millis>, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"@timestamp\":\"");
        match own.or(self.record.time.map(millis)) {
            Some(time) => out.extend_from_slice(&timestamp::format(time)),
            None => out.extend_from_slice(&self.times.read_text),
        }
    }

    fn is_plain(&self) -> bool {
        let Record { continues, cut, .. } = *self.record;
        self.form == Form::Full && self.bytes.is_none() && !continues && !cut
    }

    fn write_flags(&self, out: &mut Vec<u8>) {
        let flags: &[u8] = match (self.record.continues, self.record.cut) {
            (false, false) => return,
            (true, false) => b",\"flags\":[\"continues\"]",
            (false, true) => b",\"flags\":[\"cut\"]",
            (true, true) => b",\"flags\":[\"continues\",\"cut\"]",
        };
        out.extend_from_slice(flags);
    }

    /// Labels, tags and `waybill`, to the document's last brace.
    fn write_tail(&self, out: &mut Vec<u8>) {
        let pieces = &self.segment.pieces;
        out.extend_from_slice(&pieces.labels);
        if self.bytes.is_none() && self.form == Form::Full {
            write_tags(&pieces.tags, out);
        } else {
            let mut tags = pieces.tags.clone();
            if self.bytes.is_some() {
                push_tag("invalid_utf8", &mut tags);
            }
            if self.form == Form::Reduced {
                push_tag("waybill_reduced", &mut tags);
            }
            write_tags(&tags, out);
        }
        out.extend_from_slice(&pieces.waybill);
        if let Some(bytes) = self.bytes {
            out.extend_from_slice(b",\"bytes\":\"");
            out.extend_from_slice(STANDARD.encode(bytes).as_bytes());
            out.push(b'"');
        }
        out.extend_from_slice(b"}}");
    }
}

fn write_process(name: Option<&str>, id: Option<i64>, out: &mut Vec<u8>) {
    if name.is_none() && id.is_none() {
        return;
    }
    out.extend_from_slice(b",\"process\":{");
    if let Some(name) = name {
        out.extend_from_slice(b"\"name\":");
        write_string(name, out);
    }
    if let Some(id) = id {
        out.extend_from_slice(if name.is_some() { b",\"pid\":" } else { b"\"pid\":" });
        write_integer(id, out);
    }
    out.push(b'}');
}

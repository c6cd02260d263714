//! Chunks of output to lines: what an event means for the spool, and what is left of it; no I/O.
//!
//! supervisor hands over what one read gave, which ends anywhere. The rest of a chunk waits for
//! the next one of the same process and channel. Planning changes nothing, so that an event that
//! is sent again under the same partial lines gives the same records.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use jiff::Timestamp;
use memchr::memchr_iter;
use serde::{Deserialize, Serialize};

use super::event::Event;
use crate::record::RECORD_BYTES_MAX;

/// The longest header that we write before a line, in bytes; names are cut to fit.
const HEADER_BYTES_MAX: usize = 1 << 10;

/// The longest line in one record, in bytes; a longer one is cut.
const LINE_BYTES_MAX: usize = RECORD_BYTES_MAX - HEADER_BYTES_MAX;

/// Bytes of unfinished lines, of all processes together (I7). Beyond it the newest are sent as
/// they are.
const PARTIAL_BYTES_MAX: usize = 16 << 20;

/// user.info (RFC 5424 §6.2.1): a channel tells nothing about how severe a line is.
const PRIORITY_OUTPUT: u8 = 14;

/// daemon.notice, for what supervisor says about a process.
const PRIORITY_EVENT: u8 = 29;

/// One channel of one process.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub(super) struct Channel {
    pub group: String,
    pub process: String,
    pub channel: String,
}

/// A line without its end, and who wrote it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Partial {
    pid: String,
    bytes: Vec<u8>,
}

/// The unfinished lines of all channels.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Partials {
    channels: BTreeMap<Channel, Partial>,
}

/// What an event does to the unfinished line of a channel.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Change {
    #[serde(flatten)]
    pub channel: Channel,
    pub pid: String,
    /// `tail` continues what was there; else it replaces it.
    pub keep: bool,
    /// Base64.
    pub tail: String,
}

/// What an event comes to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Plan {
    /// Payloads for the spool, in order.
    pub records: Vec<Vec<u8>>,
    /// To be applied once the records are synced.
    pub changes: Vec<Change>,
}

impl Partials {
    /// Bytes of all unfinished lines.
    pub fn bytes(&self) -> usize {
        self.channels.values().map(|partial| partial.bytes.len()).sum()
    }

    /// What `event`, which came at `time_ms`, makes of them. `gap`: events before it were lost, so
    /// that no line may be continued.
    pub fn plan(&self, event: &Event, time_ms: u64, gap: bool) -> Plan {
        let mut plan = Plan::default();
        if gap {
            self.end(&mut plan, time_ms, |_| true);
        }
        if event.is_log() {
            self.plan_output(event, time_ms, gap, &mut plan);
        } else {
            if event.is_end() && !gap {
                let (group, process) = (&event.group, &event.process);
                self.end(&mut plan, time_ms, |channel| {
                    channel.group == *group && channel.process == *process
                });
            }
            plan.records.push(announcement(event, time_ms));
        }
        plan
    }

    fn plan_output(&self, event: &Event, time_ms: u64, gap: bool, plan: &mut Plan) {
        let channel = Channel {
            group: event.group.clone(),
            process: event.process.clone(),
            channel: event.channel.clone(),
        };
        let none = Partial::default();
        let mut before = self.channels.get(&channel).filter(|_| !gap).unwrap_or(&none);
        if before.pid != event.pid {
            // A successor does not finish its predecessor's line.
            push_line(plan, &header(&channel, &before.pid, time_ms), &before.bytes);
            before = &none;
        }
        let header = header(&channel, &event.pid, time_ms);
        let mut line = before.bytes.clone();
        let mut start = 0;
        for newline in memchr_iter(b'\n', &event.data) {
            line.extend_from_slice(&event.data[start..newline]);
            push_line(plan, &header, &line);
            line.clear();
            start = newline + 1;
        }
        let mut keep = start == 0 && !before.bytes.is_empty();
        let mut tail = &event.data[start..];
        line.extend_from_slice(tail);
        let others = self.bytes() - self.channels.get(&channel).map_or(0, |own| own.bytes.len());
        let cut = if others + line.len() > PARTIAL_BYTES_MAX {
            line.len()
        } else {
            // Full records only: what is left may still get its end.
            line.len() / LINE_BYTES_MAX * LINE_BYTES_MAX
        };
        if cut > 0 {
            push_line(plan, &header, &line[..cut]);
            keep = false;
            tail = &line[cut..];
        }
        plan.changes.push(Change {
            channel,
            pid: event.pid.clone(),
            keep,
            tail: STANDARD_NO_PAD.encode(tail),
        });
    }

    /// Sends the unfinished lines of these channels as they are.
    fn end(&self, plan: &mut Plan, time_ms: u64, which: impl Fn(&Channel) -> bool) {
        for (channel, partial) in self.channels.iter().filter(|(channel, _)| which(channel)) {
            push_line(plan, &header(channel, &partial.pid, time_ms), &partial.bytes);
            plan.changes.push(Change {
                channel: channel.clone(),
                pid: String::new(),
                keep: false,
                tail: String::new(),
            });
        }
    }

    /// Does what was planned.
    pub fn apply(&mut self, changes: &[Change]) {
        for change in changes {
            let partial = self.channels.entry(change.channel.clone()).or_default();
            if !change.keep {
                partial.bytes.clear();
            }
            partial.pid.clone_from(&change.pid);
            // The checksum of the journal stands for this text.
            partial.bytes.extend(STANDARD_NO_PAD.decode(&change.tail).unwrap_or_default());
            if partial.bytes.is_empty() {
                self.channels.remove(&change.channel);
            }
        }
    }

    /// The changes that make these partial lines out of none.
    pub fn snapshot(&self) -> Vec<Change> {
        let change = |(channel, partial): (&Channel, &Partial)| Change {
            channel: channel.clone(),
            pid: partial.pid.clone(),
            keep: false,
            tail: STANDARD_NO_PAD.encode(&partial.bytes),
        };
        self.channels.iter().map(change).collect()
    }
}

/// One record per line, several for one that is too long, none for an empty one.
fn push_line(plan: &mut Plan, header: &[u8], line: &[u8]) {
    for piece in line.chunks(LINE_BYTES_MAX) {
        plan.records.push([header, piece].concat());
    }
}

/// The RFC 5424 header of a process's line, with the space before the message.
fn header(channel: &Channel, pid: &str, time_ms: u64) -> Vec<u8> {
    let Channel { group, process, channel } = channel;
    let params = [("group", group), ("process", process), ("channel", channel)];
    let mut header =
        format!("<{PRIORITY_OUTPUT}>1 {} - {} {} - ", time(time_ms), word(process), word(pid));
    push_structured_data(&mut header, &params);
    header.push(' ');
    header.into_bytes()
}

/// A record of an event that carries no output: its name is the MSGID.
fn announcement(event: &Event, time_ms: u64) -> Vec<u8> {
    let mut record = format!(
        "<{PRIORITY_EVENT}>1 {} - supervisord - {} ",
        time(time_ms),
        word(event.name.get(..32).unwrap_or(&event.name)),
    );
    push_structured_data(
        &mut record,
        &[("group", &event.group), ("process", &event.process), ("pid", &event.pid)],
    );
    record.push(' ');
    record.push_str(event.name.get(..200).unwrap_or(&event.name));
    let mut record = record.into_bytes();
    let data = event.data.strip_suffix(b"\n").unwrap_or(&event.data);
    if !data.is_empty() {
        record.push(b' ');
        record.extend_from_slice(&data[..data.len().min(LINE_BYTES_MAX)]);
    }
    // One record, whatever an event says.
    for byte in record.iter_mut().filter(|byte| **byte == b'\n') {
        *byte = b' ';
    }
    record
}

fn time(time_ms: u64) -> String {
    let millisecond = i64::try_from(time_ms).unwrap_or(i64::MAX);
    Timestamp::from_millisecond(millisecond).map_or_else(|_| "-".to_owned(), |t| format!("{t:.3}"))
}

/// A header's word (RFC 5424 §6: PRINTUSASCII, 48 bytes); the exact name is in the structured data.
fn word(text: &str) -> String {
    let mark = |c: char| if c.is_ascii_graphic() { c } else { '_' };
    let word: String = text.chars().take(48).map(mark).collect();
    if word.is_empty() { "-".to_owned() } else { word }
}

/// `[supervisor@32473 …]`: 32473 is the enterprise number kept for what has none (RFC 5612).
fn push_structured_data(out: &mut String, params: &[(&str, &String)]) {
    out.push_str("[supervisor@32473");
    for (name, value) in params.iter().filter(|(_, value)| !value.is_empty()) {
        out.push_str(&format!(" {name}=\""));
        // The three escapes of RFC 5424 §6.3.3.
        for character in value.chars().take(80) {
            if matches!(character, '"' | '\\' | ']') {
                out.push('\\');
            }
            out.push(character);
        }
        out.push('"');
    }
    out.push(']');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(process: &str, pid: &str, data: &[u8]) -> Event {
        Event {
            name: "PROCESS_LOG_STDOUT".to_owned(),
            serial: 1,
            pool_serial: 1,
            process: process.to_owned(),
            group: "g".to_owned(),
            pid: pid.to_owned(),
            channel: "stdout".to_owned(),
            data: data.to_vec(),
        }
    }

    fn state(name: &str, process: &str) -> Event {
        let data = format!("processname:{process} groupname:g from_state:RUNNING").into_bytes();
        Event { name: name.to_owned(), channel: String::new(), ..output(process, "", &data) }
    }

    fn feed(partials: &mut Partials, event: &Event, gap: bool) -> Vec<String> {
        let plan = partials.plan(event, 1_700_000_000_000, gap);
        assert_eq!(plan, partials.plan(event, 1_700_000_000_000, gap), "planning changes nothing");
        partials.apply(&plan.changes);
        let message = |record: &Vec<u8>| {
            let text = String::from_utf8_lossy(record).into_owned();
            text.split_once("] ").expect("a header").1.to_owned()
        };
        plan.records.iter().map(message).collect()
    }

    #[test]
    fn partial_lines_are_joined_per_process() {
        let mut partials = Partials::default();
        assert_eq!(feed(&mut partials, &output("a", "1", b"one\ntw"), false), ["one"]);
        assert_eq!(feed(&mut partials, &output("b", "2", b"other"), false), [""; 0]);
        assert_eq!(feed(&mut partials, &output("a", "1", b"o and "), false), [""; 0]);
        assert_eq!(feed(&mut partials, &output("a", "1", b"more\n\n\nx"), false), ["two and more"]);
        // A snapshot is the whole of it.
        let mut copy = Partials::default();
        copy.apply(&partials.snapshot());
        assert_eq!(copy, partials);
        assert_eq!(feed(&mut partials, &output("b", "3", b" pid\n"), false), ["other", " pid"]);
        let said = feed(&mut partials, &state("PROCESS_STATE_EXITED", "a"), false);
        assert_eq!(said[0], "x");
        assert!(said[1].starts_with("PROCESS_STATE_EXITED processname:a"), "{said:?}");
        assert_eq!(partials, Partials::default());
    }

    #[test]
    fn after_a_gap_no_line_is_continued() {
        let mut partials = Partials::default();
        feed(&mut partials, &output("a", "1", b"half"), false);
        feed(&mut partials, &output("b", "2", b"half too"), false);
        assert_eq!(
            feed(&mut partials, &output("a", "1", b" rest\nnew"), true),
            ["half", "half too", " rest"]
        );
        assert_eq!(feed(&mut partials, &output("a", "1", b"est\n"), false), ["newest"]);
        assert_eq!(partials.bytes(), 0);
    }

    #[test]
    fn an_endless_line_is_cut_and_held_in_bounded_memory() {
        let mut partials = Partials::default();
        let chunk = vec![b'x'; 128 << 10];
        let mut sent = 0;
        for _ in 0..64 {
            let plan = partials.plan(&output("a", "1", &chunk), 0, false);
            assert!(plan.records.iter().all(|record| record.len() <= RECORD_BYTES_MAX));
            sent += plan.records.iter().map(Vec::len).sum::<usize>();
            partials.apply(&plan.changes);
            assert!(partials.bytes() < RECORD_BYTES_MAX);
        }
        assert!(sent > 7 << 20);
        // Many processes that never end a line share one bound.
        for process in 0..200 {
            let event = output(&process.to_string(), "1", &chunk);
            partials.apply(&partials.plan(&event, 0, false).changes);
        }
        assert!(partials.bytes() <= PARTIAL_BYTES_MAX);
    }

    #[test]
    fn the_header_is_one_that_our_own_parser_reads() {
        let mut partials = Partials::default();
        let plan = partials.plan(&output("we\"b]", "77", b"hi\n"), 1_700_000_000_123, false);
        assert_eq!(
            String::from_utf8_lossy(&plan.records[0]),
            "<14>1 2023-11-14T22:13:20.123Z - we\"b] 77 - [supervisor@32473 group=\"g\" \
             process=\"we\\\"b\\]\" channel=\"stdout\"] hi"
        );
        partials.apply(&plan.changes);
        assert_eq!(partials.bytes(), 0);
    }
}

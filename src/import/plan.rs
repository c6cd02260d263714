//! What becomes of each file and of each position: rows to write, and a line for a person.

use std::io;
use std::path::Path;
use std::time::SystemTime;

use super::files::{Candidate, Files, find, source_of};
use super::{Identity, Position};
use crate::config::{SourceConfig, Start as FirstStart};
use crate::record::{Framing, SegmentId, escape_path};
use crate::sender::{open_file_row, pass_over_row};
use crate::source::files::fingerprint::{Match, matches};
use crate::source::files::tail::{OpenError, Tail};
use crate::state::{Entry, Progress};

/// One file of the report.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// Its path, as [`escape_path`] writes it.
    pub path: String,
    /// Where a sender will start; `None` where the position was passed over.
    pub start: Option<Start>,
    /// What a person should know of it.
    pub note: Option<String>,
}

/// Where a sender will start in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Start {
    /// Offset in (decompressed) bytes.
    pub position: u64,
    /// Size in (decompressed) bytes.
    pub size: u64,
}

/// What is to be done.
pub(super) struct Plan {
    pub rows: Vec<(Entry, Progress)>,
    /// Rows of rotated files that are left alone, with the number of their source.
    pub passed: Vec<(usize, Entry)>,
    /// Rows that passed over what now has a position.
    pub dropped: Vec<SegmentId>,
    pub lines: Vec<Line>,
    /// How many files have a position of their own.
    pub taken: usize,
    pub failed: bool,
}

/// A file whose row is to be written.
struct Opening {
    candidate: usize,
    position: u64,
    changed: SystemTime,
}

/// Goes through all files and positions; nothing is written.
pub(super) fn make(
    sources: &[&SourceConfig],
    positions: &[Position],
    known: &[(Entry, Progress)],
) -> io::Result<Plan> {
    let Files { candidates, unreadable } = find(sources, positions)?;
    let mut planner = Planner {
        sources,
        positions,
        known,
        openings: Vec::new(),
        passed: Vec::new(),
        dropped: Vec::new(),
        lines: Vec::new(),
        taken: 0,
        failed: false,
    };
    for (folder, error) in unreadable {
        planner.fail(&folder, &OpenError::from(error));
    }
    let mut found = vec![false; positions.len()];
    for (number, candidate) in candidates.iter().enumerate() {
        let mut own = Vec::new();
        for (at, position) in positions.iter().enumerate() {
            match candidate.has(position, sources) {
                Ok(true) if !found[at] => {
                    found[at] = true;
                    own.push(position);
                }
                Ok(_) => {}
                Err(error) => planner.fail(&candidate.path, &error),
            }
        }
        planner.file(number, candidate, &own);
    }
    for (position, _) in positions.iter().zip(found).filter(|(_, found)| !found) {
        planner.pass_over(position, &candidates);
    }
    planner.finish(&candidates)
}

struct Planner<'a> {
    sources: &'a [&'a SourceConfig],
    positions: &'a [Position],
    known: &'a [(Entry, Progress)],
    openings: Vec<Opening>,
    passed: Vec<(usize, Entry)>,
    dropped: Vec<SegmentId>,
    lines: Vec<Line>,
    taken: usize,
    failed: bool,
}

impl Planner<'_> {
    /// One file, and the positions that are its own.
    fn file(&mut self, number: usize, candidate: &Candidate, own: &[&Position]) {
        // A sibling that the registry does not know is a generation that its shipper missed, if it
        // changed after all that the shipper has seen of its family.
        let missed = own.is_empty() && !candidate.wanted;
        if missed
            && self.newest_of_family(candidate).is_none_or(|newest| candidate.modified <= newest)
        {
            return self.leave(candidate);
        }
        let looked = candidate.open(self.sources).and_then(|mut tail| {
            let known = self.known(&mut tail)?;
            Ok((known, look(&mut tail, candidate, own)?))
        });
        let (Known { position, only_passed }, look) = match looked {
            Ok(looked) => looked,
            Err(error) => return self.fail(&candidate.path, &error),
        };
        if let Some(position) = position {
            if !own.is_empty() {
                let note = format!("passed over: Waybill is at {position} itself");
                self.say(&candidate.path, None, note);
            }
            return;
        }
        if own.is_empty() && !only_passed.is_empty() {
            return;
        }
        self.dropped.extend(only_passed);
        let start = Start { position: look.position, size: look.size };
        let mut notes = look.notes;
        if missed {
            notes.push("rotated since, and not in the registry: from its first byte".to_owned());
        } else if own.is_empty() {
            let source = self.sources[candidate.source];
            if source.start == FirstStart::End {
                let note = "not in the registry: passed over by start = \"end\"".to_owned();
                return self.say(&candidate.path, None, note);
            }
            notes.push("not in the registry: from its first byte".to_owned());
        }
        // A file that nobody knows needs no row: a sender starts at its first byte by itself. But
        // its rotated siblings are found by its row.
        if !own.is_empty() || self.newest_of_family(candidate).is_some() {
            let changed = own.iter().map(|position| position.changed).max();
            let changed = changed.unwrap_or(candidate.modified);
            self.openings.push(Opening { candidate: number, position: look.position, changed });
        }
        self.taken += usize::from(!own.is_empty());
        self.say(&candidate.path, Some(start), notes.join("; "));
    }

    /// When the newest position was changed that belongs to this name or one rotated from or to it.
    fn newest_of_family(&self, candidate: &Candidate) -> Option<SystemTime> {
        let related = |position: &&Position| {
            position.path.as_deref().is_some_and(|path| candidate.is_related(path))
        };
        self.positions.iter().filter(related).map(|position| position.changed).max()
    }

    /// A rotated file that is of before: a sender leaves it alone too.
    fn leave(&mut self, candidate: &Candidate) {
        let row = candidate.open(self.sources).and_then(|mut tail| {
            let known = self.known(&mut tail)?;
            if known.position.is_some() || !known.only_passed.is_empty() {
                return Ok(None);
            }
            Ok(Some(pass_over_row(self.sources[candidate.source], tail)?))
        });
        match row {
            Ok(row) => self.passed.extend(row.map(|row| (candidate.source, row))),
            Err(error) => self.fail(&candidate.path, &error),
        }
    }

    /// What Waybill knows of this file by itself.
    fn known(&self, tail: &mut Tail) -> io::Result<Known> {
        let mut known = Known::default();
        for (entry, progress) in self.known {
            let is_file = matches!(entry.row.framing, Framing::Lines { .. });
            if !is_file || matches(tail, progress)? != Match::Whole {
                continue;
            }
            if !entry.only_passes_over(progress) {
                known.position = known.position.max(Some(progress.position));
            } else if progress.place.inode == tail.inode().inode {
                known.only_passed.push(entry.row.segment);
            }
        }
        Ok(known)
    }

    /// A position that no file has.
    fn pass_over(&mut self, position: &Position, candidates: &[Candidate]) {
        let Some(path) = &position.path else {
            let note = "passed over: no file of the sources has this inode".to_owned();
            let name = match &position.identity {
                Identity::Inode { inode, .. } => format!("inode {inode}"),
                _ => "a file without a name".to_owned(),
            };
            return self.lines.push(Line { path: name, start: None, note: Some(note) });
        };
        let there = candidates.iter().find(|candidate| candidate.path == *path);
        let note = match &position.identity {
            _ if source_of(path, self.sources).is_none() => "no source reads it".to_owned(),
            Identity::Unknown(name) => format!("it was known by {name:?}, which is not known here"),
            _ => match there {
                Some(there) if there.is_younger(position) => {
                    "the file of this name is younger than the position".to_owned()
                }
                Some(_) => "another file has this name now".to_owned(),
                None => "the file is gone; if it was compressed since, what was unread is not sent"
                    .to_owned(),
            },
        };
        self.say(path, None, format!("passed over: {note}"));
    }

    fn say(&mut self, path: &Path, start: Option<Start>, note: String) {
        let note = (!note.is_empty()).then_some(note);
        self.lines.push(Line { path: escape_path(path), start, note });
    }

    fn fail(&mut self, path: &Path, error: &OpenError) {
        self.failed = true;
        self.say(path, None, format!("passed over: {error}"));
    }

    /// Makes the rows, those of the oldest generations first, as a sender would have.
    fn finish(mut self, candidates: &[Candidate]) -> io::Result<Plan> {
        self.openings.sort_by_key(|opening| opening.changed);
        let mut rows = Vec::new();
        for opening in &self.openings {
            let candidate = &candidates[opening.candidate];
            let tail = candidate.open(self.sources).map_err(io::Error::other)?;
            let source = self.sources[candidate.source];
            rows.push(open_file_row(source, tail, opening.position)?);
        }
        self.lines.sort_by(|a, b| a.path.cmp(&b.path));
        self.lines.dedup();
        Ok(Plan {
            rows,
            passed: self.passed,
            dropped: self.dropped,
            lines: self.lines,
            taken: self.taken,
            failed: self.failed,
        })
    }
}

/// What Waybill knows of a file.
#[derive(Default)]
struct Known {
    /// How far it has come.
    position: Option<u64>,
    /// Rows that pass over what is there.
    only_passed: Vec<SegmentId>,
}

/// What a look into a file says of its positions.
struct Look {
    position: u64,
    size: u64,
    notes: Vec<String>,
}

/// Where to start: at the lowest position, if it lies behind a whole line.
fn look(tail: &mut Tail, candidate: &Candidate, own: &[&Position]) -> io::Result<Look> {
    if tail.is_compressed() {
        // Its size is known only after it was read to its end.
        tail.read_at(u64::MAX - 1, &mut [0])?;
    }
    let size = tail.size()?;
    let mut notes = Vec::new();
    let offset = |position: &&Position| {
        let all =
            tail.is_compressed() && position.counts_stored && position.offset == candidate.stored;
        if all { size } else { position.offset }
    };
    let live = own.iter().copied().filter(|position| !position.stale);
    let mut offsets: Vec<u64> = live.map(|position| offset(&position)).collect();
    if offsets.is_empty() {
        offsets = own.iter().map(offset).collect();
    }
    let Some(lowest) = offsets.iter().copied().min() else {
        return Ok(Look { position: 0, size, notes });
    };
    let renamed = own.iter().filter_map(|position| position.path.as_ref());
    if let Some(path) = renamed.clone().find(|path| **path != candidate.path)
        && !renamed.clone().any(|path| *path == candidate.path)
    {
        notes.push(format!("was {}", escape_path(path)));
    }
    if offsets.iter().any(|offset| *offset != lowest) {
        notes.push(format!("the lowest of its {} positions", offsets.len()));
    }
    let mut position = lowest;
    if lowest > size {
        notes.push(format!(
            "{lowest} lies behind its end, so it was truncated since: from its first byte"
        ));
        position = 0;
    } else if !is_behind_a_line(tail, lowest, size)? {
        notes.push(format!(
            "{lowest} lies within a line, so it is not the file that was read: from its first byte"
        ));
        position = 0;
    }
    Ok(Look { position, size, notes })
}

/// Both shippers count whole lines. But for a last one without a newline, which Logstash takes with
/// the file's end in `read` mode.
fn is_behind_a_line(tail: &mut Tail, offset: u64, size: u64) -> io::Result<bool> {
    if offset == 0 || offset == size {
        return Ok(true);
    }
    let mut before = [0];
    Ok(tail.read_at(offset - 1, &mut before)? == 1 && before[0] == b'\n')
}

//! What outlives the process: kept copies, files at rest, runs that have vanished.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::time::Instant;

use tracing::{error, warn};
use uuid::Uuid;

use super::{FileSource, Follower, Resting, SEEN_INTERVAL, rows_of};
use crate::descriptors;
use crate::record::unescape_path;
use crate::sender::kept::{self, Kept};
use crate::sender::metrics::Counters;
use crate::sender::origin::Origin;
use crate::sender::stream::{Parts, Stream};
use crate::source::files::siblings::has_rotated_name;
use crate::source::files::tail::{Compression, Inode};

impl Follower {
    /// Streams for the copies of files that were deleted before they were receipted.
    pub(super) fn take_up_copies(&mut self) {
        let mut runs: HashMap<Uuid, (u64, String)> = HashMap::new();
        for (entry, _) in self.context.state.entries() {
            if let Some(from) = entry.kept_from {
                runs.insert(entry.run, (from, entry.row.source.clone()));
            }
        }
        let named: Vec<(Uuid, u64)> = runs.iter().map(|(run, (from, _))| (*run, *from)).collect();
        kept::sweep(self.context.state.dir(), &named);
        for (run, (from, source)) in runs {
            let of_source = |known: &&FileSource| known.attributes.source.name == source;
            let Some(source) = self.sources.iter().find(of_source) else { continue };
            let opened = Kept::open(self.context.state.dir(), run, from);
            let started = opened.and_then(|(kept, origin)| {
                let size = kept.length();
                self.context.kept_bytes.fetch_add(size, Ordering::Relaxed);
                self.context.total_bytes.fetch_add(size, Ordering::Relaxed);
                Stream::attach(Parts {
                    context: self.context.clone(),
                    attributes: source.attributes.clone(),
                    run,
                    origin: Origin::Kept(origin),
                    known: rows_of(&self.context, run),
                    until: None,
                    start: from,
                    kept: Some(kept),
                })
            });
            match started {
                Ok(stream) => {
                    stream.report_short_copy();
                    self.kept.insert(run);
                    let task = self.tasks.spawn(stream.run());
                    self.runs.insert(task.id(), run);
                }
                Err(error) => match descriptors::advice(&error) {
                    Some(advice) => warn!(%run, %error,
                        "the copy of a deleted file waits for the next start; {advice}"),
                    None => error!(%run, %error, "lost: the copy of a deleted file is unreadable"),
                },
            }
        }
    }

    /// Old generations that were wholly receipted need no stream before they change.
    pub(super) fn take_up_resting(&mut self) {
        for (entry, progress) in self.context.state.entries() {
            let Some(source) = self.sources.iter().find(|source| source.is_of(&entry)) else {
                continue;
            };
            let path = unescape_path(&progress.place.path);
            let is_old = has_rotated_name(&path) || Compression::of(&path).is_some();
            if let Some(stamp) = progress.rest.filter(|_| is_old)
                && source.attributes.agree(&entry.row)
            {
                let inode = Inode { device: progress.place.device, inode: progress.place.inode };
                let resting = Resting { stamp, may_grow: false, run: entry.run, path };
                self.resting.insert(inode, resting);
            }
        }
    }

    /// `start = end` is spent once the rows of its first run are durable.
    pub(super) fn mark_followed(&self) {
        for source in &self.sources {
            let name = &source.attributes.source.name;
            if let Err(error) = self.context.state.mark_followed(name) {
                warn!(%error, "the state directory cannot be written");
            }
        }
    }

    /// Tells the state which files are there, so that it can forget the others in the end.
    pub(super) fn note_seen(&mut self) {
        if !self.is_noting_due() {
            return;
        }
        let present = self.streams.keys().chain(&self.at_rest).copied();
        match self.context.state.saw(&present.collect::<BTreeSet<Uuid>>()) {
            Ok(()) => self.seen_at = Some(Instant::now()),
            Err(error) => warn!(%error, "the state directory cannot be written"),
        }
    }

    /// A run that turned up nowhere lost what was not receipted (I9).
    pub(super) fn report_missing(&mut self) {
        for (run, ended) in std::mem::take(&mut self.missing) {
            if ended.seen > ended.position {
                report_loss(
                    &ended.counters,
                    &ended.path,
                    ended.position,
                    ended.seen,
                    "lost: the file was truncated or replaced before these bytes were receipted",
                );
            }
            self.context.state.forget_size(run);
        }
    }

    /// Runs of former processes that were found nowhere: what is known of their bytes and has no
    /// receipt is lost, unless the file comes back (I9). Said once.
    pub(super) fn report_vanished(&mut self) {
        for (entry, progress) in self.context.state.entries() {
            let Some(source) = self.sources.iter().find(|source| source.is_of(&entry)) else {
                continue;
            };
            if self.is_held(entry.run) || entry.kept_from.is_some() {
                continue;
            }
            let to = entry.row.end.map_or(progress.size, |end| end.min(progress.size));
            if to > progress.position {
                report_loss(
                    &source.attributes.counters,
                    &progress.place.path,
                    progress.position,
                    to,
                    "lost: the file was moved away or deleted before these bytes were receipted; \
                     name the place of rotated files with `rotated`",
                );
                self.context.state.forget_size(entry.run);
            }
        }
    }

    pub(super) fn is_noting_due(&self) -> bool {
        self.seen_at.is_none_or(|at| at.elapsed() >= SEEN_INTERVAL)
    }
}

fn report_loss(counters: &Counters, path: &str, from: u64, to: u64, why: &str) {
    error!(path, from, to, bytes = to - from, "{why}");
    counters.lost_bytes.add(to - from);
}

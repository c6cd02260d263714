//! What happens to a stream's file: it grows, a day ends, it is renamed, truncated, deleted.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tracing::{info, warn};

use super::{End, FINISHED_AFTER, Stream};
use crate::record::END_MAX;
use crate::sender::kept::Kept;
use crate::sender::origin::Origin;
use crate::source::files::fingerprint::prefix;
use crate::state::Entry;

impl Stream {
    /// Looks at size, day and names, where somebody said that they may have changed.
    pub(super) async fn look(&mut self) -> Option<End> {
        if !self.flags.look.swap(false, Ordering::Relaxed) {
            return None;
        }
        self.ready = true;
        self.retry_at = None;
        if !matches!(self.origin.as_deref(), Some(Origin::File(_))) {
            self.note_lag();
            return None;
        }
        let looked = self.look_at_file().await;
        self.note_lag();
        match looked {
            Ok(end) => end,
            Err(error) => {
                warn!(%error, "looking at a followed file failed: it is tried again");
                None
            }
        }
    }

    pub(super) async fn look_at_file(&mut self) -> io::Result<Option<End>> {
        let newest = self.segments.back().expect("a stream has a segment");
        let (frontier, row_day) = (newest.window.frontier(), newest.entry.row.day);
        let before = newest.before.clone();
        let Some(Origin::File(file)) = self.origin.as_deref_mut() else { return Ok(None) };
        if file.tail.is_compressed() {
            return Ok(None);
        }
        let size = file.tail.size()?;
        // A file only shrinks when it is truncated, whatever it holds now.
        if size < frontier.max(self.size_seen.unwrap_or(0)) {
            return Ok(Some(End::Lost));
        }
        // What is seen of another file must not count as this one's.
        if !file.agrees(frontier, frontier, &before)? {
            return Ok(Some(End::Lost));
        }
        if file.tail.day()? > row_day && size > frontier {
            // What was there when the day was still the row's belongs to the row.
            let until = self.size_seen.unwrap_or(size).clamp(frontier, size);
            let boundary = file.tail.last_boundary(frontier, until)?;
            self.split(boundary).await?;
        }
        if self.size_seen != Some(size) {
            self.changed_at = Instant::now();
        }
        self.size_seen = Some(size);
        if self.flags.moved.load(Ordering::Relaxed) {
            self.keep(size.min(END_MAX))?;
        }
        self.note_progress();
        Ok(None)
    }

    /// Copies what is not receipted of a file without a name.
    pub(super) fn keep(&mut self, size: u64) -> io::Result<()> {
        let Some(Origin::File(file)) = self.origin.as_deref_mut() else { return Ok(()) };
        if file.tail.links()? > 0 || file.tail.is_compressed() {
            return Ok(());
        }
        let position = self.segments.front().map_or(size, |segment| segment.window.position());
        if position >= size {
            return Ok(());
        }
        if self.kept.is_none() {
            self.kept = Some(Kept::create(&self.context, self.run, position)?);
        }
        let Some(kept) = &mut self.kept else { return Ok(()) };
        let complete = kept.copy(&self.context, &mut file.tail, size)?;
        let (from, until) = (kept.position(), kept.until());
        let short_of = (!complete).then_some(size);
        let marked: Vec<Entry> = self
            .segments
            .iter()
            .map(|segment| Entry {
                kept_from: Some(from),
                kept_short_of: short_of,
                ..segment.entry.clone()
            })
            .collect();
        if self.segments.iter().zip(&marked).all(|(segment, marked)| segment.entry == *marked) {
            return Ok(());
        }
        self.context.state.commit(&marked.iter().collect::<Vec<_>>(), &[])?;
        let path = &marked[0].row.path;
        if self.segments.iter().all(|segment| segment.entry.kept_from.is_none()) {
            info!(%path, position, size, "deleted before it was receipted: a copy is kept");
        }
        if !complete {
            warn!(%path, from = until, to = size, "the budget for copies is full: these bytes are \
                lost if this process ends before they are receipted; raise --kept-bytes-max");
        }
        for (segment, marked) in self.segments.iter_mut().zip(marked) {
            segment.entry = marked;
        }
        Ok(())
    }

    /// Whether the last line will not get its newline any more.
    pub(super) fn is_finished(&self) -> bool {
        if self.context.config.once {
            return true;
        }
        match self.origin.as_deref() {
            Some(Origin::File(file)) if file.tail.is_compressed() => true,
            Some(Origin::File(file)) => {
                let left = self.flags.succeeded.load(Ordering::Relaxed)
                    || file.tail.links().is_ok_and(|links| links == 0);
                left && self.changed_at.elapsed() >= FINISHED_AFTER
            }
            Some(Origin::Kept(_)) => true,
            _ => false,
        }
    }

    /// What the copy of a deleted file lacks is lost: the process that could read it ended (I9).
    pub fn report_short_copy(&self) {
        let Some(until) = self.kept.as_ref().map(Kept::until) else { return };
        let short_of = self.segments.iter().filter_map(|s| s.entry.kept_short_of).max();
        let position = self.segments.front().map_or(0, |segment| segment.window.position());
        let from = until.max(position);
        if let Some(to) = short_of.filter(|to| *to > from) {
            self.report_loss(0, from, to, "the budget for copies of deleted files was full");
        }
    }

    /// A file that was empty when its row opened can be recognised by its inode alone, which a
    /// rotation that compresses does not keep: its first bytes are durable before they are sent.
    pub(super) async fn learn_first_bytes(&mut self, number: usize) -> io::Result<()> {
        let Some(Origin::File(file)) = self.origin.as_deref() else { return Ok(()) };
        let segment = &self.segments[number];
        if segment.entry.row.first_bytes.length > 0 {
            return Ok(());
        }
        let mut entry = segment.entry.clone();
        entry.row.first_bytes = prefix(file.first());
        self.commit(vec![entry.clone()], Vec::new()).await?;
        let segment = &mut self.segments[number];
        segment.progress.prefix = entry.row.first_bytes.clone();
        segment.entry = entry;
        Ok(())
    }
}

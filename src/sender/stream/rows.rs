//! A stream's rows: made to fit at the start, split where something changes, forgotten when done.
//!
//! Every change is durable before anything is sent under it.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use tracing::{debug, info, warn};

use super::{FINISHED_AFTER, Parts, Segment, Stream, place};
use crate::record::{Day, Framing, SegmentId};
use crate::sender::link::Link;
use crate::sender::origin::{Origin, fingerprint_or_short};
use crate::sender::rows::{Misfit, Opening, complete, misfit, progress_at_start};
use crate::spool::Spool;
use crate::state::{Entry, Fingerprint, Progress, State};

impl Stream {
    /// Makes the rows fit today's file and configuration, durably. Blocking.
    pub fn attach(parts: Parts) -> io::Result<Stream> {
        let Parts { context, attributes, run, mut origin, mut known, until, start, kept } = parts;
        known.sort_by_key(|(entry, _)| (entry.row.start, entry.row.segment));
        let mut segments = VecDeque::new();
        let mut changed = Vec::new();
        let mut dropped = Vec::new();
        for (mut entry, mut progress) in known {
            if let Some(until) = until {
                if entry.row.start >= until {
                    dropped.push(entry.row.segment);
                    continue;
                }
                let end = until.max(progress.position);
                entry.row.end = Some(entry.row.end.map_or(end, |known| known.min(end)));
                changed.push(entry.clone());
            }
            if let Origin::File(file) = &origin {
                progress.place = place(&file.tail);
                progress.rest = None;
            }
            if let (Origin::Kept(_), Some(kept)) = (&origin, entry.kept_from) {
                // The copy lacks what was receipted when it was made, whatever was saved since.
                let at = kept.min(entry.row.end.unwrap_or(kept));
                if at > progress.position {
                    progress.advance(fingerprint_at(&mut origin, at)?);
                }
            }
            if entry.row.end.is_some_and(|end| progress.position >= end) {
                dropped.push(entry.row.segment);
                continue;
            }
            let end = entry.row.end;
            // What is behind a lost tail cannot be read any more.
            if until.is_some_and(|until| end.is_some_and(|end| end > until)) {
                dropped.push(entry.row.segment);
                continue;
            }
            if entry.refused && !attributes.agree(&entry.row) {
                info!(path = %entry.row.whence(), former_type = entry.row.type_name.as_str(),
                    "refused under the former settings: sent under those of now");
                dropped.push(entry.row.segment);
                entry = attributes.replaced(&entry, progress.position.max(entry.row.start));
                changed.push(entry.clone());
            }
            segments.push_back(Segment::new(entry, progress, &mut origin)?);
        }
        let (size_seen, changed_at) = match &origin {
            Origin::File(file) if !file.tail.is_compressed() => {
                (Some(file.tail.size()?), instant_of_change(file.tail.modified()?))
            }
            _ => (None, Instant::now()),
        };
        let enough = size_seen.filter(|_| context.config.once);
        let lag = attributes.counters.lags.open();
        let mut stream = Stream {
            context,
            attributes,
            run,
            origin: Some(Box::new(origin)),
            segments,
            mailbox: Arc::default(),
            flags: Arc::default(),
            kept,
            link: None,
            leaves: false,
            ready: true,
            size_seen,
            enough,
            changed_at,
            unfinished: false,
            retry_at: None,
            failed: false,
            is_past_end: false,
            refusal: None,
            lag,
        };
        changed.retain(|entry| !dropped.contains(&entry.row.segment));
        let newest_is_open =
            stream.segments.back().is_some_and(|segment| segment.window.end().is_none());
        let kept = matches!(stream.origin.as_deref(), Some(Origin::Kept(_)));
        if newest_is_open || (kept && !stream.segments.is_empty()) {
            // A file that goes on as it was costs no write.
            if !changed.is_empty() || !dropped.is_empty() {
                stream.context.state.commit(&changed.iter().collect::<Vec<_>>(), &dropped)?;
            }
            stream.follow_configuration()?;
        } else {
            let start = until
                .or_else(|| stream.segments.back().and_then(|segment| segment.window.end()))
                .unwrap_or(start);
            stream.open_row(start, changed, dropped, None)?;
        }
        for segment in &stream.segments {
            stream.context.state.set_progress(segment.id(), segment.progress.clone());
        }
        stream.note_lag();
        Ok(stream)
    }

    /// Where the newest row no longer says what a new one would say, it ends at the last record
    /// boundary.
    pub(super) fn follow_configuration(&mut self) -> io::Result<()> {
        let newest = self.segments.back().expect("a stream has a segment");
        // Nothing new comes into the copy of a deleted file.
        let kept = matches!(self.origin.as_deref(), Some(Origin::Kept(_)));
        if kept || self.attributes.agree(&newest.entry.row) {
            return Ok(());
        }
        let boundary = self.boundary()?;
        self.split_now(boundary, None)
    }

    /// The last record boundary in the run at this moment.
    pub(super) fn boundary(&mut self) -> io::Result<u64> {
        let newest = self.segments.back().expect("a stream has a segment");
        let frontier = newest.window.frontier();
        match self.origin.as_deref_mut() {
            Some(Origin::File(file)) if !file.tail.is_compressed() => {
                let size = file.tail.size()?;
                file.tail.last_boundary(frontier, size.max(frontier))
            }
            // What is there may have been sent under the old row by a process before this one.
            Some(Origin::Spool { spool, segment }) => {
                Ok(spool.end_of(*segment).unwrap_or(0).max(frontier))
            }
            _ => Ok(frontier),
        }
    }

    pub(super) async fn split(&mut self, at: u64) -> io::Result<()> {
        let link = self.link.clone();
        self.split_now(at, link.as_deref())
    }

    /// Ends the newest row at a boundary and opens the next one there, in one durable write.
    pub(super) fn split_now(&mut self, at: u64, link: Option<&Link>) -> io::Result<()> {
        let newest = self.segments.back_mut().expect("a stream has a segment");
        let mut ended = newest.entry.clone();
        ended.row.end = Some(at);
        let empty = at == ended.row.start && newest.window.frontier() == at;
        let id = newest.id();
        let (changed, dropped) =
            if empty { (vec![], vec![id]) } else { (vec![ended.clone()], vec![]) };
        self.open_row(at, changed, dropped, link)?;
        let number = self.segments.len() - 2;
        if empty {
            self.segments.remove(number);
        } else {
            let segment = &mut self.segments[number];
            segment.entry = ended;
            segment.window.set_end(at);
        }
        Ok(())
    }

    /// Opens a row at `start`, together with other changes, in one durable write.
    pub(super) fn open_row(
        &mut self,
        start: u64,
        mut changed: Vec<Entry>,
        dropped: Vec<SegmentId>,
        link: Option<&Link>,
    ) -> io::Result<()> {
        let origin = self.origin.as_deref_mut().expect("no read is under way");
        let opening = match origin {
            Origin::File(file) => Opening::in_file(self.run, file, start)?,
            _ => Opening {
                run: self.run,
                path: self.context.path_of(&self.attributes.source),
                inode: None,
                born: 0,
                start,
                day: Day::today(),
                framing: Framing::SPOOL,
                first_bytes: Default::default(),
            },
        };
        let entry = self.attributes.open(opening, link.map(|link| &link.welcome));
        let segment_before = origin.before(start)?;
        let progress = match origin {
            Origin::File(file) => progress_at_start(&entry.row, &file.tail, &segment_before),
            _ => Progress::at_start(&entry.row, 0),
        };
        let mut segment = Segment::new(entry.clone(), progress, origin)?;
        (segment.before, segment.untried) = (segment_before, true);
        changed.push(entry);
        self.context.state.commit(&changed.iter().collect::<Vec<_>>(), &dropped)?;
        self.context.state.set_progress(segment.id(), segment.progress.clone());
        self.segments.push_back(segment);
        Ok(())
    }

    /// Fits the rows to a receiver: completes what only it can tell, renews what belongs to
    /// another sender, and ends the newest row where new lines would go elsewhere.
    pub(super) async fn complete(&mut self, link: &Link) -> io::Result<()> {
        let welcome = &link.welcome;
        let mut changed = Vec::new();
        let mut dropped = Vec::new();
        for segment in &mut self.segments {
            let foreign = segment.entry.row.sender.is_some_and(|sender| sender != welcome.sender);
            let mut entry = segment.entry.clone();
            if foreign {
                warn!(path = %entry.row.whence(), "the token is another sender's: what was sent under \
                    the old one and has no receipt is sent anew");
                dropped.push(segment.id());
                entry = entry.renewed(segment.window.position());
            }
            complete(&mut entry, welcome);
            if entry != segment.entry {
                changed.push((segment.id(), entry));
            }
        }
        if !changed.is_empty() {
            let entries = changed.iter().map(|(_, entry)| entry.clone()).collect();
            self.commit(entries, dropped).await?;
        }
        for (id, entry) in changed {
            let Some(number) = self.segments.iter().position(|s| s.id() == id) else { continue };
            if entry.row.segment == id {
                self.segments[number].entry = entry;
            } else {
                let renewed = self.renewed(number, entry)?;
                self.put_in_place(number, renewed);
            }
        }
        let newest = self.segments.back().expect("a stream has a segment");
        let kept = matches!(self.origin.as_deref(), Some(Origin::Kept(_)));
        let misfit = misfit(&newest.entry, welcome);
        if let Some(misfit) = misfit.filter(|_| !kept && newest.window.end().is_none()) {
            let path = newest.entry.row.whence().to_string();
            let boundary = self.boundary()?;
            match misfit {
                Misfit::Rule => info!(
                    %path, offset = boundary,
                    "the receiver names indices in another way now: a new row"
                ),
                Misfit::Destination => warn!(
                    %path, offset = boundary,
                    "the receiver writes into another store than the one before: a search in either \
                     finds a part of these lines"
                ),
            }
            self.split_now(boundary, Some(link))?;
        }
        Ok(())
    }

    /// The segment of a row that renews this one's.
    fn renewed(&mut self, number: usize, entry: Entry) -> io::Result<Segment> {
        let origin = self.origin.as_deref_mut().expect("no read is under way");
        let former = &self.segments[number];
        let progress = Progress { position: former.window.position(), ..former.progress.clone() };
        let segment = Segment::new(entry, progress, origin)?;
        Ok(Segment { untried: true, ..segment })
    }

    /// Puts a segment, whose row is durable by now, in the place of the one that it renews.
    fn put_in_place(&mut self, number: usize, segment: Segment) {
        self.context.state.set_progress(segment.id(), segment.progress.clone());
        self.segments[number] = segment;
        // What was read of it before is read again.
        self.ready = true;
    }

    /// A refused row that no receiver can have accepted, of a day that lies ahead of its file's last
    /// change by now (of today, where there is no file), gives way to one of that day: the clock
    /// that gave it was wrong. Tells whether it did.
    pub(super) async fn take_back_day(&mut self, number: usize, link: &Link) -> io::Result<bool> {
        let day = match self.origin.as_deref() {
            Some(Origin::File(file)) => file.tail.day()?,
            _ => Day::today(),
        };
        let segment = &self.segments[number];
        let former_day = segment.entry.row.day;
        if !segment.untried || day >= former_day {
            return Ok(false);
        }
        let mut entry = segment.entry.renewed(segment.window.position());
        entry.row.day = day;
        info!(path = %entry.row.whence(), %former_day, %day,
            "refused for a day that lies ahead: sent under the day of now");
        complete(&mut entry, &link.welcome);
        let refused = segment.id();
        let renewed = self.renewed(number, entry.clone())?;
        self.commit(vec![entry], vec![refused]).await?;
        self.put_in_place(number, renewed);
        Ok(true)
    }

    /// Records, durably, that the last line ends here without a newline.
    pub(super) async fn cut(&mut self, number: usize, at: u64) -> io::Result<()> {
        let mut entry = self.segments[number].entry.clone();
        info!(path = %entry.row.whence(), offset = at, "last line without a newline");
        entry.row.cuts.push(at);
        self.commit(vec![entry.clone()], Vec::new()).await?;
        self.segments[number].entry = entry;
        Ok(())
    }

    pub(super) async fn commit(
        &self,
        changed: Vec<Entry>,
        dropped: Vec<SegmentId>,
    ) -> io::Result<()> {
        let state = self.context.state.clone();
        let commit = move || state.commit(&changed.iter().collect::<Vec<_>>(), &dropped);
        tokio::task::spawn_blocking(commit).await.map_err(io::Error::other)?
    }

    /// Forgets rows whose end is receipted, except the newest.
    pub(super) async fn drop_finished(&mut self) {
        while self.segments.len() > 1
            && self.segments.front().is_some_and(|segment| segment.window.is_finished())
        {
            let segment = self.segments.pop_front().expect("there is one");
            if let (Some(link), Some(handle)) = (&self.link, segment.handle) {
                link.unregister(handle, 0, 0);
            }
            if let Err(error) = self.commit(Vec::new(), vec![segment.id()]).await {
                // Its row stays on disk, finished: the next start drops it.
                debug!(%error, "a finished row stays for now");
            }
        }
    }

    /// Everything of this run is receipted and its bytes are gone. Of a spool, so are its rows;
    /// those of a file stay, since the same bytes may turn up again, compressed by a rotation.
    pub(super) async fn forget(&mut self) {
        if let Some(Origin::Spool { spool, segment }) = self.origin.as_deref() {
            let (spool, segment) = (spool.clone(), *segment);
            let rows = self.segments.iter().map(Segment::id).collect();
            let state = self.context.state.clone();
            let forget = move || forget_spooled(&state, &spool, segment, rows);
            let forgotten = tokio::task::spawn_blocking(forget).await;
            if let Err(error) = forgotten.unwrap_or_else(|error| Err(io::Error::other(error))) {
                warn!(%error, "a finished spool file and its rows stay for now");
            }
            return;
        }
        let kept = self.segments.iter().filter(|segment| segment.entry.kept_from.is_some());
        let freed: Vec<Entry> = kept
            .map(|segment| Entry { kept_from: None, kept_short_of: None, ..segment.entry.clone() })
            .collect();
        if !freed.is_empty()
            && let Err(error) = self.commit(freed, Vec::new()).await
        {
            warn!(%error, "the state directory cannot be written: finished rows stay for now");
            return;
        }
        if let Some(kept) = self.kept.take()
            && let Err(error) = kept.remove(&self.context)
        {
            warn!(%error, "the copy of a deleted file stays for now");
        }
    }
}

/// Positions first, then the bytes, then the rows: a spool file that a crash leaves without its
/// rows would be sent again under new ids (I3), and one that is gone before its position is
/// durable would be reported as a loss. Rows without bytes are forgotten at the next start.
fn forget_spooled(
    state: &State,
    spool: &Spool,
    segment: SegmentId,
    rows: Vec<SegmentId>,
) -> io::Result<()> {
    state.save()?;
    spool.release(segment, u64::MAX)?;
    state.commit(&[], &rows)
}

/// When a file changed last before it was opened, as far back as its last line needs to know. A
/// change in the future, by another machine's clock, is now.
fn instant_of_change(modified: SystemTime) -> Instant {
    let now = Instant::now();
    let unchanged = SystemTime::now().duration_since(modified).unwrap_or_default();
    now.checked_sub(unchanged.min(FINISHED_AFTER)).unwrap_or(now)
}

/// What recognises an offset of a copy; where the copy lacks its bytes, nothing does.
fn fingerprint_at(origin: &mut Origin, offset: u64) -> io::Result<Fingerprint> {
    let before = origin.before(offset)?;
    Ok(fingerprint_or_short(offset, &before))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::spool::Budget;
    use crate::state::tests::entry;

    /// A crash between the two steps must find the rows where it finds the bytes.
    #[tokio::test(flavor = "multi_thread")]
    async fn rows_are_forgotten_after_their_spool_file_is_gone() {
        let dir = tempfile::tempdir().expect("a folder");
        let state = State::open(&dir.path().join("state"), "machine").expect("state");
        let folder = dir.path().join("spool");
        let spool = Spool::open(&folder, Arc::new(Budget::new(1 << 20))).expect("spool");
        spool.append(0, b"", b"line").await;
        spool.flush().await.expect("synced");
        let segment = spool.watermark().segment;
        spool.end_segment();
        let mut mark = spool.subscribe();
        mark.wait_for(|mark| mark.segment != segment).await.expect("ended");
        let mut row = entry("");
        row.row.segment = segment;
        state.commit(&[&row], &[]).expect("commit");

        // Something that cannot be unlinked stands in the file's place.
        let file = fs::read_dir(&folder).expect("list").next().expect("one").expect("entry").path();
        fs::rename(&file, dir.path().join("aside")).expect("rename");
        fs::create_dir(&file).expect("a folder");
        forget_spooled(&state, &spool, segment, vec![segment]).expect_err("cannot unlink");
        assert_eq!(state.entries().len(), 1, "its rows stay");
        fs::remove_dir(&file).expect("remove");
        forget_spooled(&state, &spool, segment, vec![segment]).expect("forgotten");
        assert!(state.entries().is_empty());
    }
}

//! Frames from all connections, waiting for a destination's next free slot.
//!
//! Senders share the destination by bytes, and so do the segments of a sender: what one has to say does not wait for
//! all that the others have queued before. A segment's own frames stay in order.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::Frame;
use crate::record::{SegmentId, SenderId};

/// Bounded in bytes by the memory permit that each frame carries: whoever pushes has waited for
/// that permit first.
#[derive(Debug, Default)]
pub struct Queue {
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct State {
    senders: Shares<SenderId, Shares<SegmentId, VecDeque<Frame>>>,
    frames: usize,
    closed: bool,
}

impl State {
    fn add(&mut self, frame: Frame, add: impl FnOnce(&mut VecDeque<Frame>, Frame)) {
        let (sender, segment) = (frame.segment.sender, frame.segment.row.segment);
        self.frames += 1;
        self.senders.change(sender, |segments| {
            segments.change(segment, |frames| add(frames, frame));
        });
    }

    fn pop(&mut self) -> Option<Frame> {
        let frame = self.senders.pop()?;
        self.frames -= 1;
        Some(frame)
    }
}

impl Queue {
    /// Adds a frame.
    pub fn push(&self, frame: Frame) {
        self.lock().add(frame, VecDeque::push_back);
        self.arrived.notify_one();
    }

    /// Puts back what is left of a frame: before its segment's next one, so that records are written
    /// in order, without which the segment's position could not move.
    pub fn push_rest(&self, rest: Frame) {
        self.lock().add(rest, VecDeque::push_front);
        self.arrived.notify_one();
    }

    /// No more frames will come: [`Queue::pop`] answers `None` once it is empty.
    pub fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_waiters();
    }

    /// The next frame if there is one right now.
    pub fn try_pop(&self) -> Option<Frame> {
        self.lock().pop()
    }

    /// Waits for the next frame; `None` when the queue is closed and empty. Dropping the future
    /// loses nothing.
    pub async fn pop(&self) -> Option<Frame> {
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            // Registered before looking, so that neither a push nor a close in between is missed.
            arrived.as_mut().enable();
            {
                let mut state = self.lock();
                if let Some(frame) = state.pop() {
                    if state.frames > 0 {
                        self.arrived.notify_one();
                    }
                    return Some(frame);
                }
                if state.closed {
                    return None;
                }
            }
            arrived.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Frames of which one comes next.
trait Lane: Default {
    /// Length in bytes of the frame that [`Lane::pop`] gives.
    fn next(&self) -> Option<usize>;

    fn pop(&mut self) -> Option<Frame>;
}

impl Lane for VecDeque<Frame> {
    fn next(&self) -> Option<usize> {
        self.front().map(|frame| frame.records.len())
    }

    fn pop(&mut self) -> Option<Frame> {
        self.pop_front()
    }
}

/// Lanes that share by bytes: start-time fair queueing (Goyal, Vin and Cheng, 1996). Each lane
/// stands at the bytes that it has had, the one that has had the fewest comes next, and one that is
/// new starts where that one stands: it neither waits for the others nor catches up with them.
#[derive(Debug)]
struct Shares<K, L> {
    lanes: BTreeMap<Place<K>, L>,
    places: HashMap<K, Place<K>>,
    /// Where the lane stood whose frame was popped last; no lane stands before it.
    now: u64,
}

/// Bytes had; of lanes that are level, the one whose next frame is shortest comes first. A lane that
/// is empty keeps its place until that is reached, else it would come back to a better one.
type Place<K> = (u64, Option<usize>, K);

impl<K, L> Default for Shares<K, L> {
    fn default() -> Shares<K, L> {
        Shares { lanes: BTreeMap::new(), places: HashMap::new(), now: 0 }
    }
}

impl<K: Copy + Ord + Hash, L: Lane> Shares<K, L> {
    /// Changes what waits in a lane.
    fn change(&mut self, key: K, change: impl FnOnce(&mut L)) {
        let place = self.places.get(&key);
        let known = place.and_then(|place| self.lanes.remove_entry(place));
        let (had, mut lane) = match known {
            Some(((had, ..), lane)) => (had, lane),
            None => (self.now, L::default()),
        };
        change(&mut lane);
        self.put(had, key, lane);
    }

    fn put(&mut self, had: u64, key: K, lane: L) {
        let place = (had, lane.next(), key);
        self.places.insert(key, place);
        self.lanes.insert(place, lane);
    }
}

impl<K: Copy + Ord + Hash, L: Lane> Lane for Shares<K, L> {
    fn next(&self) -> Option<usize> {
        self.lanes.keys().find_map(|(_, next, _)| *next)
    }

    fn pop(&mut self) -> Option<Frame> {
        while let Some(((had, next, key), mut lane)) = self.lanes.pop_first() {
            let Some(length) = next else {
                self.places.remove(&key);
                continue;
            };
            self.now = had;
            let frame = lane.pop();
            self.put(had + length as u64, key, lane);
            return frame;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::embedded::tests::Peer;
    use crate::protocol::{FRAME_BYTES_MAX, FRAME_BYTES_TARGET};
    use crate::record::Framing;

    /// Pushes frames one behind the other.
    fn push(queue: &Queue, peer: &Peer, lengths: &[usize]) {
        let mut offset = 0;
        for length in lengths {
            queue.push(peer.frame(offset, vec![b'\n'; *length]));
            offset += *length as u64;
        }
    }

    fn peers(count: usize) -> Vec<Peer> {
        (0..count).map(|_| Peer::new(Framing::LINES)).collect()
    }

    fn is_of(frame: &Frame, peer: &Peer) -> bool {
        frame.segment.row.segment == peer.segment.row.segment
    }

    /// Bytes that are popped before the first frame of `peer`.
    fn bytes_before(queue: &Queue, peer: &Peer) -> usize {
        let others = std::iter::from_fn(|| queue.try_pop()).take_while(|frame| !is_of(frame, peer));
        others.map(|frame| frame.records.len()).sum()
    }

    #[test]
    fn a_line_does_not_wait_for_all_that_another_sender_has_queued() {
        let queue = Queue::default();
        let (backfill, live) = (&peers(1)[0], &peers(1)[0]);
        push(&queue, backfill, &[FRAME_BYTES_TARGET; 32]);
        push(&queue, live, &[100]);
        assert_eq!(bytes_before(&queue, live), 0);
    }

    #[test]
    fn a_line_does_not_wait_for_other_files_of_its_sender() {
        let queue = Queue::default();
        let (backfill, mut live) = (&peers(1)[0], Peer::new(Framing::LINES));
        live.of_sender(backfill);
        push(&queue, backfill, &[FRAME_BYTES_TARGET; 32]);
        push(&queue, &live, &[100]);
        assert_eq!(bytes_before(&queue, &live), 0);
    }

    #[test]
    fn a_line_does_not_wait_for_a_frame_of_each_of_very_many_senders() {
        let queue = Queue::default();
        let (senders, live) = (peers(128), &peers(1)[0]);
        // In the middle of things.
        senders.iter().for_each(|sender| push(&queue, sender, &[FRAME_BYTES_TARGET; 4]));
        (0..100).for_each(|_| drop(queue.try_pop()));
        push(&queue, live, &[100]);
        assert_eq!(bytes_before(&queue, live), 0);
    }

    /// Neither the number of a sender's files nor the size of its frames gives it more.
    #[test]
    fn each_sender_has_the_same_share_of_bytes() {
        let queue = Queue::default();
        let (large, small, mut many) = (&peers(1)[0], &peers(1)[0], peers(50));
        let (first, others) = many.split_first_mut().expect("50");
        others.iter_mut().for_each(|peer| peer.of_sender(first));
        push(&queue, large, &[FRAME_BYTES_MAX; 20]);
        push(&queue, small, &[1000; 20_000]);
        many.iter().for_each(|peer| push(&queue, peer, &[FRAME_BYTES_TARGET; 2]));
        let mut shares = [0; 3];
        while shares.iter().sum::<usize>() < 30 << 20 {
            let frame = queue.try_pop().expect("more");
            let whose = [large, small].iter().position(|peer| is_of(&frame, peer)).unwrap_or(2);
            shares[whose] += frame.records.len();
        }
        let fair = (9 << 20)..=(11 << 20);
        assert!(shares.iter().all(|share| fair.contains(share)), "{shares:?}");
    }

    /// One that comes back each time with a short frame has no more than its share either.
    #[test]
    fn who_comes_back_again_and_again_holds_up_nobody() {
        let queue = Queue::default();
        let (backfill, eager) = (&peers(1)[0], &peers(1)[0]);
        push(&queue, backfill, &[FRAME_BYTES_TARGET; 2]);
        let mut shares = [0; 2];
        while shares[0] < 2 * FRAME_BYTES_TARGET {
            push(&queue, eager, &[1000]);
            let frame = queue.try_pop().expect("a frame");
            shares[usize::from(is_of(&frame, eager))] += frame.records.len();
        }
        assert!(shares[1] <= FRAME_BYTES_TARGET + 1000, "{shares:?}");
    }

    #[test]
    fn every_frame_comes_once_and_those_of_a_segment_in_order() {
        let queue = Queue::default();
        let mut peers = peers(6);
        let (first, others) = peers.split_at_mut(3);
        others.iter_mut().for_each(|peer| peer.of_sender(&first[0]));
        let lengths = [1, 4096, FRAME_BYTES_MAX, 4097, 7, FRAME_BYTES_TARGET];
        let mut next = vec![0; peers.len()];
        let mut popped = 0;
        let mut take = |count: usize| {
            for frame in std::iter::from_fn(|| queue.try_pop()).take(count) {
                let whose = peers.iter().position(|peer| is_of(&frame, peer)).expect("a peer");
                assert_eq!(frame.offset, next[whose]);
                next[whose] += frame.records.len() as u64;
                popped += 1;
            }
        };
        let mut offset = 0;
        for length in lengths.iter().cycle().take(70) {
            peers.iter().for_each(|peer| queue.push(peer.frame(offset, vec![b'\n'; *length])));
            offset += *length as u64;
            // Now and then none is left.
            take(if length % 2 == 0 { 3 } else { 8 });
        }
        take(usize::MAX);
        assert_eq!(popped, 70 * peers.len());
        assert_eq!(next, vec![offset; peers.len()]);
        assert!(queue.lock().senders.lanes.is_empty(), "nothing is kept of who has nothing");
    }
}

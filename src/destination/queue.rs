//! Frames from all connections, waiting for a destination's next free slot.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::Frame;

/// First in, first out. Bounded in bytes by the memory permit that each frame carries: whoever
/// pushes has waited for that permit first.
#[derive(Debug, Default)]
pub struct Queue {
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct State {
    frames: VecDeque<Frame>,
    closed: bool,
}

impl Queue {
    /// Adds a frame.
    pub fn push(&self, frame: Frame) {
        self.lock().frames.push_back(frame);
        self.arrived.notify_one();
    }

    /// Puts back what is left of a frame: in the place of its segment's next one, which takes the
    /// place of the one after it, and the last one goes to the end. So a segment's records are
    /// written in order, without which its position could not move, and others come between.
    pub fn push_rest(&self, mut rest: Frame) {
        let mut state = self.lock();
        for frame in &mut state.frames {
            if Arc::ptr_eq(&frame.segment, &rest.segment) {
                std::mem::swap(frame, &mut rest);
            }
        }
        state.frames.push_back(rest);
        drop(state);
        self.arrived.notify_one();
    }

    /// No more frames will come: [`Queue::pop`] answers `None` once it is empty.
    pub fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_waiters();
    }

    /// The next frame if there is one right now.
    pub fn try_pop(&self) -> Option<Frame> {
        self.lock().frames.pop_front()
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
                if let Some(frame) = state.frames.pop_front() {
                    if !state.frames.is_empty() {
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

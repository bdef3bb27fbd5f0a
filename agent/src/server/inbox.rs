//! Input on its way to a process or a port, bounded by bytes.
//!
//! What a client sends piece by piece is joined, so that neither many small pieces nor one large one holds more memory
//! than the limit.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;

/// What one stream holds before its connection waits for the stream's reader.
pub const LIMIT: usize = 256 * 1024;

/// The end that puts input in. Dropping it ends the input.
pub struct Feed(Arc<Shared>);

/// The end that takes input out. Dropping it says that nothing more is wanted.
pub struct Inbox(Arc<Shared>);

struct Shared {
    limit: usize,
    state: Mutex<State>,
    /// There is input, or no more will come.
    filled: Notify,
    /// There is room, or nothing more is wanted.
    emptied: Notify,
}

#[derive(Default)]
struct State {
    data: BytesMut,
    ended: bool,
    unwanted: bool,
}

/// A stream's input that holds no more than `limit` bytes.
pub fn inbox(limit: usize) -> (Feed, Inbox) {
    let shared = Arc::new(Shared {
        limit: limit.max(1),
        state: Mutex::default(),
        filled: Notify::new(),
        emptied: Notify::new(),
    });
    (Feed(shared.clone()), Inbox(shared))
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Feed {
    /// Puts `data` in, waiting for room; `false` when nothing more is wanted.
    pub async fn push(&self, mut data: Bytes) -> bool {
        while !data.is_empty() {
            {
                let mut state = self.0.state();
                if state.unwanted {
                    return false;
                }
                let room = self.0.limit.saturating_sub(state.data.len()).min(data.len());
                state.data.extend_from_slice(&data.split_to(room));
            }
            self.0.filled.notify_one();
            if !data.is_empty() {
                // A permit is kept for us if the room came meanwhile.
                self.0.emptied.notified().await;
            }
        }
        true
    }
}

impl Inbox {
    /// All that has come in; `None` when nothing more will.
    pub async fn recv(&mut self) -> Option<Bytes> {
        loop {
            {
                let mut state = self.0.state();
                if !state.data.is_empty() {
                    let data = std::mem::take(&mut state.data);
                    drop(state);
                    self.0.emptied.notify_one();
                    return Some(data.freeze());
                }
                if state.ended {
                    return None;
                }
            }
            self.0.filled.notified().await;
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.0.state().ended = true;
        self.0.filled.notify_one();
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.unwanted = true;
        state.data = BytesMut::new();
        drop(state);
        self.0.emptied.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn no_more_than_the_limit_waits_for_a_reader_however_it_is_cut() {
        let (feed, mut inbox) = inbox(10);
        for _ in 0..10 {
            assert!(feed.push(Bytes::from_static(b"x")).await);
        }
        let large = Bytes::from(vec![b'y'; 25]);
        let reading = async {
            let mut sizes = Vec::new();
            while let Some(data) = inbox.recv().await {
                sizes.push(data.len());
            }
            sizes
        };
        let writing = async move {
            assert!(feed.push(Bytes::from_static(b"z")).now_or_never().is_none());
            assert!(feed.push(large).await);
        };
        let ((), sizes) = tokio::join!(writing, reading);
        assert!(sizes.iter().all(|size| *size <= 10), "{sizes:?}");
        assert_eq!(sizes.iter().sum::<usize>(), 35, "a push that is dropped put nothing in");
    }

    #[tokio::test]
    async fn either_end_learns_that_the_other_is_gone() {
        let (feed, mut inbox) = super::inbox(4);
        assert!(feed.push(Bytes::from_static(b"last")).await);
        drop(feed);
        assert_eq!(inbox.recv().await.as_deref(), Some(&b"last"[..]));
        assert_eq!(inbox.recv().await, None);
        let (feed, inbox) = super::inbox(4);
        let (pushed, ()) = tokio::join!(feed.push(Bytes::from_static(b"too long")), async {
            tokio::task::yield_now().await;
            drop(inbox);
        });
        assert!(!pushed);
    }
}

//! Those who watch what one container prints, as it comes.
//!
//! The log comes first and the container never waits long: whoever takes nothing for a while is let go.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncBufRead, AsyncWrite, AsyncWriteExt, Lines};
use tokio::sync::{Semaphore, mpsc};

use super::frame::{Frame, Stream};

/// Pieces of output that wait for one watcher; then the container waits, too.
const QUEUE: usize = 16;
/// A client that was suspended must not hold its container up for longer than this.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// The watchers of one container.
pub(super) struct Attached {
    /// `None` when it prints no more.
    watchers: RefCell<Option<Vec<Watcher>>>,
    patience: Duration,
}

#[derive(Clone)]
struct Watcher {
    frames: mpsc::UnboundedSender<Bytes>,
    /// What may still be queued. Closed when nobody shall wait for it any more.
    room: Rc<Semaphore>,
    too_slow: Rc<Cell<bool>>,
}

/// What one watcher gets.
pub(super) struct Watch {
    frames: mpsc::UnboundedReceiver<Bytes>,
    room: Rc<Semaphore>,
    too_slow: Rc<Cell<bool>>,
}

impl Attached {
    pub(super) fn new(patience: Duration) -> Self {
        Self { watchers: RefCell::new(Some(Vec::new())), patience }
    }

    /// A copy of everything that is printed from now on; `None` when nothing will be.
    pub(super) fn watch(&self) -> Option<Watch> {
        let (sender, frames) = mpsc::unbounded_channel();
        let (room, too_slow) = (Rc::new(Semaphore::new(QUEUE)), Rc::new(Cell::new(false)));
        let watch = Watch { frames, room: Rc::clone(&room), too_slow: Rc::clone(&too_slow) };
        let watcher = Watcher { frames: sender, room, too_slow };
        self.watchers.borrow_mut().as_mut()?.push(watcher);
        Some(watch)
    }

    /// Gives `data` to every watcher, at the speed of the slowest that still moves.
    pub(super) async fn send(&self, stream: Stream, data: &[u8]) {
        let watchers = self.watchers.borrow().clone().unwrap_or_default();
        if watchers.is_empty() {
            return;
        }
        let frame = Frame::Output(stream, Bytes::copy_from_slice(data)).encode();
        for watcher in watchers {
            match tokio::time::timeout(self.patience, watcher.room.acquire()).await {
                Ok(Ok(permit)) => permit.forget(),
                // The container has ended: what it left is no more than a pipe holds.
                Ok(Err(_)) => {}
                Err(_) => watcher.too_slow.set(true),
            }
            if watcher.too_slow.get() || watcher.frames.send(frame.clone()).is_err() {
                self.remove(&watcher);
            }
        }
    }

    /// The log must be whole soon: from now on nobody is waited for.
    pub(super) fn hurry(&self) {
        for watcher in self.watchers.borrow().iter().flatten() {
            watcher.room.close();
        }
    }

    /// Nothing more will be printed.
    pub(super) fn end(&self) {
        self.watchers.borrow_mut().take();
    }

    fn remove(&self, gone: &Watcher) {
        if let Some(watchers) = self.watchers.borrow_mut().as_mut() {
            watchers.retain(|watcher| !watcher.frames.same_channel(&gone.frames));
        }
    }
}

/// Sends frames until the container's output ends or the client hangs up. Without a `watch` that is at once.
pub(super) async fn serve(
    watch: Option<Watch>,
    mut from: Lines<impl AsyncBufRead + Unpin>,
    mut to: impl AsyncWrite + Unpin,
) {
    let send = async {
        if let Some(mut watch) = watch {
            to.write_all(&Frame::Attached.encode()).await?;
            while let Some(frame) = watch.frames.recv().await {
                to.write_all(&frame).await?;
                watch.room.add_permits(1);
            }
            if watch.too_slow.get() {
                return to.write_all(&Frame::TooSlow.encode()).await;
            }
        }
        to.write_all(&Frame::Ended.encode()).await
    };
    tokio::select! {
        // It says nothing more: this is its end.
        _ = from.next_line() => {}
        // Nor can anything be done about one that went.
        _ = send => {}
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixStream;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_watcher_that_takes_nothing_is_let_go_and_the_others_get_everything() {
        let attached = Attached::new(Duration::from_millis(1));
        let (mut good, stuck) = (attached.watch().unwrap(), attached.watch().unwrap());
        let taking = async {
            let mut taken = 0;
            while let Some(frame) = good.frames.recv().await {
                good.room.add_permits(1);
                taken += frame.len() - 5;
            }
            taken
        };
        let sending = async {
            for _ in 0..3 * QUEUE {
                attached.send(Stream::Stdout, b"0123456789").await;
            }
            attached.end();
        };
        let (taken, ()) = tokio::join!(taking, sending);
        assert_eq!(taken, 3 * QUEUE * 10);
        assert!(stuck.too_slow.get() && !good.too_slow.get());
        assert_eq!(stuck.frames.len(), QUEUE);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn after_the_containers_end_its_log_waits_for_nobody() {
        let attached = Attached::new(Duration::MAX);
        let stuck = attached.watch().unwrap();
        let sending = async {
            for _ in 0..=QUEUE {
                attached.send(Stream::Stderr, b"x").await;
            }
        };
        tokio::join!(sending, async { attached.hurry() });
        assert_eq!(stuck.frames.len(), QUEUE + 1);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_client_is_told_when_there_is_nothing_to_come() {
        let attached = Attached::new(Duration::MAX);
        attached.end();
        let (mut near, far) = UnixStream::pair().unwrap();
        let (reading, writing) = far.into_split();
        serve(attached.watch(), BufReader::new(reading).lines(), writing).await;
        assert_eq!(Frame::read(&mut near).await.unwrap(), Frame::Ended);
    }
}

//! Reads a log and, where asked for, goes on as it grows.
//!
//! A rotated log keeps its open file, so the follower first reads the old file to its end and then
//! goes on with the file that came after it, however many rotations happened meanwhile. The folder is
//! watched, and the container's end is told by the runtime.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::folder::Folder;
use super::options::LogOptions;
use super::reader::Log;
use super::watch::{Changes, Folders};

/// The container's end and its last lines come on two ways. When the log's writer has not closed
/// the file by then, it never will.
const LAST_LINES: Duration = Duration::from_secs(2);
/// Logs that are sent at a time.
const SESSIONS: usize = 512;
/// Threads that read logs at a time: a disk that hangs takes no more with it.
const READS: usize = 16;

/// All logs that are being sent.
pub struct Logs {
    folders: Folders,
    sessions: Arc<Semaphore>,
    reads: Arc<Semaphore>,
}

/// Why a log cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("this node sends {0} logs at the moment, which is the limit; try again later")]
    TooMany(usize),
    #[error("cannot read the log {}: {error}", path.display())]
    Unreadable { path: PathBuf, error: io::Error },
}

/// A log that is there and can be sent.
pub struct Session {
    log: Log,
    /// `None` when it ends at the end of the file.
    changes: Option<Changes>,
    reads: Arc<Semaphore>,
    _permit: OwnedSemaphorePermit,
}

impl Default for Logs {
    fn default() -> Self {
        Self {
            folders: Folders::default(),
            sessions: Arc::new(Semaphore::new(SESSIONS)),
            reads: Arc::new(Semaphore::new(READS)),
        }
    }
}

impl Logs {
    /// Opens the log at `path`.
    ///
    /// # Errors
    /// When there are too many already, or it cannot be read.
    pub async fn open(&self, path: PathBuf, options: LogOptions) -> Result<Session, OpenError> {
        let permit = self.sessions.clone().try_acquire_owned();
        let permit = permit.map_err(|_| OpenError::TooMany(SESSIONS))?;
        let (folders, log_path) = (self.folders.clone(), path.clone());
        let open = move || {
            let folder = Folder::of(&log_path)?;
            // Watched before the first look, so that no change falls between the two.
            let changes = options.follow.then(|| folders.changes(&folder.path()));
            Ok((Log::open(folder, options)?, changes))
        };
        let opened = blocking(&self.reads, open).await;
        let (log, changes) = opened.map_err(|error| OpenError::Unreadable { path, error })?;
        Ok(Session { log, changes, reads: self.reads.clone(), _permit: permit })
    }
}

impl Session {
    /// Sends the log piece by piece to `to` until it ends: at its end or, when following, when `ended` is
    /// done and the last lines are through. Stops as soon as nobody takes the pieces.
    ///
    /// # Errors
    /// When the log cannot be read (any more).
    pub async fn send(
        self,
        ended: BoxFuture<'static, ()>,
        to: &mpsc::Sender<io::Result<Bytes>>,
    ) -> io::Result<()> {
        let Self { log, changes, reads, _permit } = self;
        let work = async {
            match changes {
                None => rest(log, &reads, to).await.map(drop),
                Some(changes) => follow(log, changes, &reads, ended, to).await,
            }
        };
        tokio::select! {
            result = work => result,
            // The client left: nothing is written any more that could notice it.
            () = to.closed() => Ok(()),
        }
    }
}

async fn follow(
    mut log: Log,
    mut changes: Changes,
    reads: &Arc<Semaphore>,
    mut ended: BoxFuture<'static, ()>,
    to: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    let own = log.name();
    let (mut over, mut closed) = (false, false);
    loop {
        log = rest(log, reads, to).await?;
        if log.full || (over && closed) {
            return Ok(());
        }
        let next;
        (log, next) = with(log, reads, Log::open_next).await?;
        if next {
            closed = false;
            continue;
        }
        // Cancelling any of these loses nothing: the loop looks at the file again.
        tokio::select! {
            own_closed = changes.next(&own) => closed |= own_closed,
            () = &mut ended, if !over => over = true,
            () = tokio::time::sleep(LAST_LINES), if over => closed = true,
        }
    }
}

/// Sends what there is of the file; ends also when the client is gone.
async fn rest(
    mut log: Log,
    reads: &Arc<Semaphore>,
    to: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<Log> {
    loop {
        let piece;
        (log, piece) = with(log, reads, Log::next_piece).await?;
        let Some(piece) = piece else { return Ok(log) };
        if !piece.is_empty() && to.send(Ok(piece)).await.is_err() {
            return Ok(log);
        }
    }
}

async fn with<T: Send + 'static>(
    mut log: Log,
    reads: &Arc<Semaphore>,
    work: impl FnOnce(&mut Log) -> io::Result<T> + Send + 'static,
) -> io::Result<(Log, T)> {
    blocking(reads, move || work(&mut log).map(|result| (log, result))).await
}

/// Runs what waits for the disk on a thread that may; the place is held until it is done, also when
/// the client does not wait for it.
async fn blocking<T: Send + 'static>(
    reads: &Arc<Semaphore>,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let permit = reads.clone().acquire_owned().await.map_err(io::Error::other)?;
    let work = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        keelson_supervise::catch("log reader", work)
    });
    work.await.map_err(io::Error::other)?.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;

    use tokio::sync::oneshot;

    use super::*;

    fn line(text: &str) -> String {
        format!("2026-01-02T15:04:05Z stdout F {text}\n")
    }

    struct Follower {
        dir: tempfile::TempDir,
        pieces: mpsc::Receiver<io::Result<Bytes>>,
        end: Option<oneshot::Sender<()>>,
        writer: File,
    }

    impl Follower {
        async fn start(first: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("0.log");
            let mut writer = File::create(&path).unwrap();
            writer.write_all(first.as_bytes()).unwrap();
            let (to, pieces) = mpsc::channel(64);
            let (end, ended) = oneshot::channel::<()>();
            let options = LogOptions { follow: true, ..LogOptions::default() };
            let ended = Box::pin(async move { drop(ended.await) });
            let session = Logs::default().open(path, options).await.unwrap();
            tokio::spawn(async move { session.send(ended, &to).await.unwrap() });
            Self { dir, pieces, end: Some(end), writer }
        }

        fn write(&mut self, text: &str) {
            self.writer.write_all(line(text).as_bytes()).unwrap();
        }

        fn rotate(&mut self, suffix: &str) {
            let path = self.dir.path().join("0.log");
            fs::rename(&path, self.dir.path().join(format!("0.log.{suffix}"))).unwrap();
            self.writer = File::create(&path).unwrap();
        }

        async fn expect(&mut self, want: &str) {
            let mut got = String::new();
            let deadline = Duration::from_secs(10);
            while got.len() < want.len() {
                let piece = tokio::time::timeout(deadline, self.pieces.recv()).await;
                let piece = piece.unwrap_or_else(|_| panic!("only {got:?} of {want:?}"));
                got += std::str::from_utf8(&piece.expect("ended early").unwrap()).unwrap();
            }
            assert_eq!(got, want);
        }
    }

    #[tokio::test]
    async fn new_lines_arrive_and_the_end_of_the_container_ends_it() {
        let mut follower = Follower::start(&line("a")).await;
        follower.expect("a\n").await;
        follower.write("b");
        follower.expect("b\n").await;
        follower.end.take().unwrap().send(()).unwrap();
        follower.write("last words");
        follower.writer = File::create(follower.dir.path().join("other")).unwrap();
        follower.expect("last words\n").await;
        assert!(follower.pieces.recv().await.is_none());
    }

    #[tokio::test]
    async fn nothing_is_lost_over_several_rotations_at_once() {
        let mut follower = Follower::start(&line("a")).await;
        follower.expect("a\n").await;
        for i in 0..4 {
            follower.write(&format!("before {i}"));
            follower.rotate(&format!("2026010{i}-000000"));
        }
        follower.write("after");
        follower.expect("before 0\nbefore 1\nbefore 2\nbefore 3\nafter\n").await;
    }

    #[tokio::test]
    async fn a_line_in_two_writes_is_sent_once_and_whole() {
        let mut follower = Follower::start("").await;
        follower.writer.write_all(b"2026-01-02T15:04:05Z stdout F ha").unwrap();
        follower.writer.write_all(b"lf\n").unwrap();
        follower.expect("half\n").await;
    }

    #[tokio::test]
    async fn a_log_that_is_rotated_and_compressed_all_the_time_is_followed_without_a_gap() {
        let mut follower = Follower::start("").await;
        let dir = follower.dir.path().to_owned();
        let writing = std::thread::spawn(move || {
            let path = dir.join("0.log");
            for round in 0..200 {
                let mut file = File::options().append(true).create(true).open(&path).unwrap();
                file.write_all(line(&format!("{round:03}")).as_bytes()).unwrap();
                let rotated = dir.join(format!("0.log.20260101-{round:06}"));
                fs::rename(&path, &rotated).unwrap();
                let packed = File::create(rotated.with_extension("tmp")).unwrap();
                let mut packer = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
                packer.write_all(&fs::read(&rotated).unwrap()).unwrap();
                packer.finish().unwrap();
                let name = format!("0.log.20260101-{round:06}.gz");
                fs::rename(rotated.with_extension("tmp"), dir.join(name)).unwrap();
                fs::remove_file(&rotated).unwrap();
            }
            File::create(&path).unwrap();
        });
        let want: String = (0..200).map(|round| format!("{round:03}\n")).collect();
        follower.expect(&want).await;
        writing.join().unwrap();
    }

    #[tokio::test]
    async fn more_logs_than_the_limit_are_refused_before_anything_is_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(&path, "").unwrap();
        let logs = Logs::default();
        let options = LogOptions { follow: true, ..LogOptions::default() };
        let mut open = Vec::new();
        for _ in 0..SESSIONS {
            open.push(logs.open(path.clone(), options.clone()).await.unwrap());
        }
        let refused = logs.open(path.clone(), options.clone()).await;
        assert!(matches!(refused, Err(OpenError::TooMany(SESSIONS))));
        open.pop();
        logs.open(path, options.clone()).await.unwrap();
        let missing = logs.open(dir.path().join("1.log"), options).await;
        assert!(matches!(missing, Err(OpenError::Unreadable { .. })));
    }

    #[tokio::test]
    async fn without_following_the_file_is_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(&path, (0..5000).map(|i| line(&i.to_string())).collect::<String>()).unwrap();
        let (to, mut pieces) = mpsc::channel(64);
        let options = LogOptions { tail_lines: Some(2), ..LogOptions::default() };
        let session = Logs::default().open(path, options).await.unwrap();
        session.send(Box::pin(std::future::pending()), &to).await.unwrap();
        drop(to);
        assert_eq!(pieces.recv().await.unwrap().unwrap(), "4998\n4999\n");
        assert!(pieces.recv().await.is_none());
    }
}

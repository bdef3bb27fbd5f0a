//! Reads a log and, where asked for, goes on as it grows.
//!
//! A rotated log keeps its open file, so the follower first reads the old file to its end and then
//! goes on with the file that came after it, however many rotations happened meanwhile. Nothing is
//! polled: the folder is watched with inotify, and the container's end is told by the runtime.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use flate2::read::GzDecoder;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use inotify::{EventMask, Inotify, WatchMask};
use tokio::sync::mpsc;

use super::line::Printer;
use super::options::LogOptions;
use super::tail;

const READ_SIZE: usize = 64 * 1024;
/// The container's end and its last lines come on two ways. When the log's writer has not closed
/// the file by then, it never will.
const LAST_LINES: Duration = Duration::from_secs(2);

/// Sends the log at `path` piece by piece to `to` until it ends: at its end or, when following,
/// when `ended` is done and the last lines are through. Stops as soon as nobody takes the pieces.
///
/// # Errors
/// When the log cannot be read.
pub async fn send(
    path: PathBuf,
    options: LogOptions,
    ended: BoxFuture<'static, ()>,
    to: mpsc::Sender<Bytes>,
) -> io::Result<()> {
    let follow = options.follow;
    // Watched before the first look, so that no change falls between the two.
    let changes = if follow { Some(watch(&path)?) } else { None };
    let mut log = Log::open(path, options)?;
    let Some(changes) = changes else {
        while let Some(piece) = log.next_piece()? {
            if to.send(piece).await.is_err() {
                return Ok(());
            }
        }
        return Ok(());
    };
    tokio::select! {
        result = log.follow(changes, ended, &to) => result,
        // The client left: nothing is written any more that could notice it.
        () = to.closed() => Ok(()),
    }
}

fn watch(path: &Path) -> io::Result<inotify::EventStream<[u8; 4096]>> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let inotify = Inotify::init()?;
    let mask = WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::CLOSE_WRITE;
    inotify.watches().add(folder, mask)?;
    inotify.into_event_stream([0; 4096])
}

struct Log {
    path: PathBuf,
    /// The file that is being read; a rotated one may be compressed.
    source: Source,
    printer: Printer,
    /// The beginning of a line whose rest has not been read yet.
    line: Vec<u8>,
    /// Nothing more may be sent.
    full: bool,
}

enum Source {
    Plain(File),
    Packed { reader: Box<GzDecoder<File>>, path: PathBuf },
}

impl Log {
    fn open(path: PathBuf, options: LogOptions) -> io::Result<Self> {
        let mut file = File::open(&path)?;
        if let Some(lines) = options.tail_lines {
            let start = tail::offset(&mut file, lines)?;
            file.seek(SeekFrom::Start(start))?;
        }
        let (source, printer) = (Source::Plain(file), Printer::new(options));
        Ok(Self { path, source, printer, line: Vec::new(), full: false })
    }

    async fn follow(
        &mut self,
        mut changes: inotify::EventStream<[u8; 4096]>,
        mut ended: BoxFuture<'static, ()>,
        to: &mpsc::Sender<Bytes>,
    ) -> io::Result<()> {
        let (mut over, mut closed) = (false, false);
        loop {
            while let Some(piece) = self.next_piece()? {
                if to.send(piece).await.is_err() {
                    return Ok(());
                }
            }
            if self.full || (over && closed) {
                return Ok(());
            }
            if self.open_next()? {
                closed = false;
                continue;
            }
            // Cancelling any of these loses nothing: the loop looks at the file again.
            tokio::select! {
                event = changes.next() => match event {
                    Some(event) => {
                        let event = event?;
                        let own = event.name.as_deref() == self.path.file_name();
                        closed |= own && event.mask.contains(EventMask::CLOSE_WRITE);
                    }
                    None => return Ok(()),
                },
                () = &mut ended, if !over => over = true,
                () = tokio::time::sleep(LAST_LINES), if over => closed = true,
            }
        }
    }

    /// What can be sent of the next block of the file; `None` at its end. May be empty.
    fn next_piece(&mut self) -> io::Result<Option<Bytes>> {
        if self.full {
            return Ok(None);
        }
        let mut block = vec![0; READ_SIZE];
        loop {
            let read = match &mut self.source {
                Source::Plain(file) => file.read(&mut block)?,
                Source::Packed { reader, .. } => reader.read(&mut block)?,
            };
            let mut out = BytesMut::new();
            if read == 0 {
                return Ok(None);
            }
            for part in block.get(..read).unwrap_or_default().split_inclusive(|byte| *byte == b'\n')
            {
                self.line.extend_from_slice(part);
                if part.ends_with(b"\n") {
                    self.full |= !self.printer.print(&self.line, &mut out);
                    self.line.clear();
                }
                if self.full {
                    break;
                }
            }
            if !out.is_empty() || self.full {
                return Ok(Some(out.freeze()));
            }
        }
    }

    /// Goes on with the file that came after the one that was read to its end, if there is one.
    fn open_next(&mut self) -> io::Result<bool> {
        let own = match &self.source {
            Source::Plain(file) => {
                let current = match std::fs::metadata(&self.path) {
                    Ok(current) => current,
                    // Between the two steps of a rotation.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                    Err(error) => return Err(error),
                };
                let read = file.metadata()?;
                if (read.dev(), read.ino()) == (current.dev(), current.ino()) {
                    return Ok(false);
                }
                // The kernel knows what the file is called now.
                std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?
            }
            Source::Packed { path, .. } => path.clone(),
        };
        let next = successor(&own, &self.path, &rotated(&self.path)?);
        let file = File::open(&next)?;
        self.source = if next.extension().is_some_and(|extension| extension == "gz") {
            Source::Packed { reader: Box::new(GzDecoder::new(file)), path: next }
        } else {
            Source::Plain(file)
        };
        Ok(true)
    }
}

/// The rotated files of a log, oldest first: their names end in the time of their rotation.
fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned() + ".";
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let file = entry.file_name();
        // A half-written compressed file has its plain twin still beside it.
        if file.to_string_lossy().starts_with(&name) && !file.to_string_lossy().ends_with(".tmp") {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// The file that was begun after `own`: the next rotated one, or the log itself.
fn successor(own: &Path, log: &Path, rotated: &[PathBuf]) -> PathBuf {
    let own = stem(own);
    // Replaced without a rotation: what came after it is whatever is there now.
    if own == stem(log) {
        return log.to_owned();
    }
    let next = rotated.iter().find(|file| stem(file) > own);
    next.cloned().unwrap_or_else(|| log.to_owned())
}

/// The name without what compression or removal put at its end.
fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(" (deleted)").unwrap_or(&name);
    name.strip_suffix(".gz").unwrap_or(name).to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use tokio::sync::oneshot;

    use super::*;

    fn line(text: &str) -> String {
        format!("2026-01-02T15:04:05Z stdout F {text}\n")
    }

    struct Follower {
        dir: tempfile::TempDir,
        pieces: mpsc::Receiver<Bytes>,
        end: Option<oneshot::Sender<()>>,
        writer: File,
    }

    impl Follower {
        fn start(first: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("0.log");
            let mut writer = File::create(&path).unwrap();
            writer.write_all(first.as_bytes()).unwrap();
            let (to, pieces) = mpsc::channel(64);
            let (end, ended) = oneshot::channel::<()>();
            let options = LogOptions { follow: true, ..LogOptions::default() };
            let ended = Box::pin(async move { drop(ended.await) });
            tokio::spawn(async move { send(path, options, ended, to).await.unwrap() });
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
                got += std::str::from_utf8(&piece.expect("ended early")).unwrap();
            }
            assert_eq!(got, want);
        }
    }

    #[tokio::test]
    async fn new_lines_arrive_and_the_end_of_the_container_ends_it() {
        let mut follower = Follower::start(&line("a"));
        follower.expect("a\n").await;
        follower.write("b");
        follower.expect("b\n").await;
        follower.end.take().unwrap().send(()).unwrap();
        follower.write("last words");
        follower.writer = File::create(follower.dir.path().join("other")).unwrap();
        follower.expect("last words\n").await;
        assert_eq!(follower.pieces.recv().await, None);
    }

    #[tokio::test]
    async fn nothing_is_lost_over_several_rotations_at_once() {
        let mut follower = Follower::start(&line("a"));
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
        let mut follower = Follower::start("");
        follower.writer.write_all(b"2026-01-02T15:04:05Z stdout F ha").unwrap();
        follower.writer.write_all(b"lf\n").unwrap();
        follower.expect("half\n").await;
    }

    #[test]
    fn a_compressed_file_follows_its_elder() {
        let files = ["l.20260101", "l.20260102.gz", "l.20260103"].map(PathBuf::from);
        let next = |own: &str| successor(Path::new(own), Path::new("l"), &files);
        assert_eq!(next("l.20260101"), files[1]);
        assert_eq!(next("l.20260102.gz"), files[2]);
        assert_eq!(next("l.20260101 (deleted)"), files[1]);
        assert_eq!(next("l.20260103"), Path::new("l"));
        assert_eq!(next("l (deleted)"), Path::new("l"));
    }

    #[tokio::test]
    async fn without_following_the_file_is_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(&path, (0..5000).map(|i| line(&i.to_string())).collect::<String>()).unwrap();
        let (to, mut pieces) = mpsc::channel(64);
        let options = LogOptions { tail_lines: Some(2), ..LogOptions::default() };
        send(path, options, Box::pin(std::future::pending()), to).await.unwrap();
        assert_eq!(pieces.recv().await.unwrap(), "4998\n4999\n");
        assert_eq!(pieces.recv().await, None);
    }
}

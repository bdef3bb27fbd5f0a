//! The log writer itself: one thread, asleep unless a container prints.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result};
use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinHandle, LocalSet, spawn_local};

use super::attached::{self, Attached};
use super::format::LineCutter;
use super::frame::Stream;
use super::log_file::LogFile;
use super::{DONE, LogSpec, Order, folder, socket};

/// A pipe holds 64 KiB.
const READ_SIZE: usize = 64 << 10;

/// The streams that are being read, by container.
type Open = Rc<RefCell<HashMap<String, Container>>>;

struct Container {
    /// How many of its streams have not ended.
    streams: watch::Receiver<usize>,
    /// One reader per stream.
    readers: Vec<JoinHandle<()>>,
    attached: Rc<Attached>,
}

/// What the readers of a container's streams share.
struct Sink {
    log: RefCell<LogFile>,
    attached: Rc<Attached>,
    /// How many streams have not ended.
    left: watch::Sender<usize>,
}

/// Reads and writes logs for the node of `run_dir` until SIGTERM.
///
/// # Errors
/// When the socket cannot be made.
pub fn serve(run_dir: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, run(run_dir))
}

async fn run(run_dir: &Path) -> Result<()> {
    let path = socket(run_dir);
    let lock = fs::File::create(run_dir.join("logd.lock"))?;
    // Two readers of one pipe would each get a part of the lines. Held until this process ends, however it does.
    let Ok(_lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
        wait_for_other(&path).await;
        println!("running already");
        return Ok(());
    };
    drop(fs::remove_file(&path));
    let listener = UnixListener::bind(&path)
        .with_context(|| format!("cannot listen on {}", path.display()))?;
    let open: Open = Rc::default();
    for entry in fs::read_dir(run_dir.join("io")).into_iter().flatten().flatten() {
        let id = entry.file_name().to_string_lossy().into_owned();
        if let Err(error) = read_container(run_dir, &id, &open) {
            tracing::warn!(container = id, %error, "A container's output cannot be read");
        }
    }
    println!("ready");
    let mut stop = signal(SignalKind::terminate())?;
    loop {
        tokio::select! {
            _ = stop.recv() => break,
            accepted = listener.accept() => {
                match accepted {
                    Ok((stream, _)) => {
                        spawn_local(serve_client(run_dir.to_owned(), stream, Rc::clone(&open)));
                    }
                    // Most likely no file descriptor is free. All containers' output goes through here: it goes on.
                    Err(error) => {
                        tracing::warn!(%error, "Cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
    }
    Ok(fs::remove_file(&path)?)
}

/// The wait after an error that does not pass at once.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// Another one holds the lock and is about to listen.
async fn wait_for_other(path: &Path) {
    for _ in 0..100 {
        if UnixStream::connect(path).await.is_ok() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

async fn serve_client(run_dir: PathBuf, stream: UnixStream, open: Open) {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match serde_json::from_str(&line) {
            Ok(Order::Open(id)) => {
                if let Err(error) = read_container(&run_dir, &id, &open) {
                    tracing::warn!(container = id, %error, "A container's output cannot be read");
                }
            }
            Ok(Order::Drain(id)) => {
                let streams = open.borrow().get(&id).map(|container| {
                    container.attached.hurry();
                    container.streams.clone()
                });
                if let Some(mut streams) = streams {
                    // The sender goes with the last stream: that is the end, too.
                    drop(streams.wait_for(|left| *left == 0).await);
                }
            }
            Ok(Order::Forget(id)) => {
                if let Some(container) = open.borrow_mut().remove(&id) {
                    container.readers.iter().for_each(JoinHandle::abort);
                }
            }
            Ok(Order::Attach(id)) => {
                let watch = open.borrow().get(&id).and_then(|container| container.attached.watch());
                return attached::serve(watch, lines, writer).await;
            }
            Err(error) => tracing::warn!(%error, "An order was not understood"),
        }
        if writer.write_all(DONE.as_bytes()).await.is_err() {
            return;
        }
    }
}

fn read_container(run_dir: &Path, id: &str, open: &Open) -> io::Result<()> {
    if open.borrow().contains_key(id) {
        return Ok(());
    }
    let folder = folder(run_dir, id);
    let spec: LogSpec = serde_json::from_slice(&fs::read(folder.join("log.json"))?)?;
    let log = LogFile::new(spec);
    let mut pipes = Vec::new();
    for stream in [Stream::Stdout, Stream::Stderr] {
        let path = folder.join(stream.name());
        if path.exists() {
            pipes.push((stream, pipe::OpenOptions::new().open_receiver(&path)?));
        }
    }
    let (left, streams) = watch::channel(pipes.len());
    let attached = Rc::new(Attached::new(attached::PATIENCE));
    let sink = Rc::new(Sink { log: log.into(), attached: Rc::clone(&attached), left });
    let read = |(stream, pipe)| spawn_local(copy(stream, pipe, Rc::clone(&sink)));
    let readers = pipes.into_iter().map(read).collect();
    open.borrow_mut().insert(id.to_owned(), Container { streams, readers, attached });
    Ok(())
}

/// Copies one stream to the log, and to those who are attached, until every writer has closed it.
async fn copy(stream: Stream, mut pipe: pipe::Receiver, sink: Rc<Sink>) {
    let mut cutter = LineCutter::default();
    let mut out = Vec::new();
    loop {
        // A buffer only while there is something to read: hundreds of containers are silent most of the time.
        if pipe.readable().await.is_err() {
            break;
        }
        let mut buffer = vec![0; READ_SIZE];
        let data = match pipe.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(length) => &buffer[..length],
        };
        cutter.feed(stream.name(), data, Timestamp::now(), &mut out);
        sink.log.borrow_mut().append(&out);
        out = Vec::new();
        sink.attached.send(stream, data).await;
    }
    cutter.finish(stream.name(), Timestamp::now(), &mut out);
    sink.log.borrow_mut().append(&out);
    sink.left.send_modify(|left| *left -= 1);
    if *sink.left.borrow() == 0 {
        sink.attached.end();
    }
}

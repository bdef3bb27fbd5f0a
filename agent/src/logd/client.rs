//! The agent's side: makes a container's pipes and has the log writer read them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tokio::net::unix::pipe;

use super::frame::{Frame, Stream};
use super::{LogSpec, Order, folder, socket};
use crate::runtime::RuntimeError;

/// After a container's end its pipes are empty at once, unless a process that it left behind still holds them.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// The way to the log writer of a node, which is started when it is not there.
#[derive(Debug, Clone)]
pub struct Client {
    run_dir: PathBuf,
}

/// Paths for containerd; empty where there is no such stream.
#[derive(Debug, Clone, Default)]
pub struct Pipes {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
}

/// What a container prints from the moment of attaching on.
#[derive(Debug)]
pub(crate) struct Attachment {
    client: Client,
    id: String,
    frames: tokio::net::UnixStream,
}

impl Client {
    /// The log writer of `run_dir`, which may not run yet.
    pub fn new(run_dir: &Path) -> Client {
        Client { run_dir: run_dir.to_owned() }
    }

    /// Starts the log writer unless it runs already.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self) -> Result<(), RuntimeError> {
        self.connect().map(drop)
    }

    /// Makes the pipes of container `id`; when this returns, they are being read.
    ///
    /// # Errors
    /// When the pipes cannot be made or the log writer does not answer.
    pub(crate) async fn open(
        &self,
        id: &str,
        spec: LogSpec,
        tty: bool,
        stdin: bool,
    ) -> Result<Pipes, RuntimeError> {
        let (client, id) = (self.clone(), id.to_owned());
        crate::runtime::blocking(move || {
            let folder = folder(&client.run_dir, &id);
            fs::create_dir_all(&folder).map_err(RuntimeError::system("create", &folder))?;
            let mut pipes = Pipes::default();
            if stdin {
                pipes.stdin = fifo(&folder, "stdin")?;
            }
            pipes.stdout = fifo(&folder, "stdout")?;
            if !tty {
                pipes.stderr = fifo(&folder, "stderr")?;
            }
            let text =
                serde_json::to_vec(&spec).map_err(|e| RuntimeError::invalid(e.to_string()))?;
            let path = folder.join("log.json");
            fs::write(&path, text).map_err(RuntimeError::system("write", &path))?;
            client.order(&Order::Open(id), None)?;
            Ok(pipes)
        })
        .await
    }

    /// Waits until everything that container `id` printed is in its log.
    pub(crate) async fn drain(&self, id: &str) {
        let (client, id) = (self.clone(), id.to_owned());
        let result =
            crate::runtime::blocking(move || client.order(&Order::Drain(id), Some(DRAIN_LIMIT)))
                .await;
        if let Err(error) = result {
            tracing::warn!(%error, "The end of a container's log may be missing");
        }
    }

    /// Removes the pipes of container `id`, which prints no more or never did.
    pub(crate) async fn close(&self, id: &str) {
        let (client, id) = (self.clone(), id.to_owned());
        let result = crate::runtime::blocking(move || {
            let folder = folder(&client.run_dir, &id);
            if !folder.exists() {
                return Ok(());
            }
            client.order(&Order::Forget(id), Some(DRAIN_LIMIT))?;
            match fs::remove_dir_all(&folder) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    Err(RuntimeError::system("remove", &folder)(e))
                }
                _ => Ok(()),
            }
        })
        .await;
        if let Err(error) = result {
            tracing::warn!(%error, "The pipes of a container's log are not removed");
        }
    }

    /// Begins to follow what container `id` prints.
    ///
    /// # Errors
    /// When it prints no more, or the log writer does not answer.
    pub(crate) async fn attach(&self, id: &str) -> Result<Attachment, RuntimeError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let frames = self.ask_for_frames(id).await?;
            let mut attachment = Attachment { client: self.clone(), id: id.to_owned(), frames };
            match Frame::read(&mut attachment.frames).await {
                Ok(Frame::Attached) => return Ok(attachment),
                Ok(_) => {
                    let (what, id) = ("output of container", id.to_owned());
                    return Err(RuntimeError::NotFound { what, id });
                }
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    return Err(RuntimeError::invalid(
                        "the log writer of this node was started by an older keelson and cannot attach; \
                         hint: end the process `keelson logd`, the next one goes on where it stopped",
                    ));
                }
                // One that is about to be gone still lets clients connect.
                Err(_) if attempt < 3 => {}
                Err(error) => return Err(self.no_talk(error)),
            }
        }
    }

    async fn ask_for_frames(&self, id: &str) -> Result<tokio::net::UnixStream, RuntimeError> {
        let (client, order) = (self.clone(), Order::Attach(id.to_owned()));
        let stream = crate::runtime::blocking(move || {
            let mut stream = client.connect()?;
            // What could not be written is not answered either.
            drop(write_order(&mut stream, &order));
            stream.set_nonblocking(true).map_err(|error| client.no_talk(error))?;
            Ok(stream)
        });
        tokio::net::UnixStream::from_std(stream.await?).map_err(|error| self.no_talk(error))
    }

    fn no_talk(&self, error: std::io::Error) -> RuntimeError {
        RuntimeError::system("talk to the log writer on", socket(&self.run_dir))(error)
    }

    /// The way into container `id`; `None` when it takes no input (any more).
    ///
    /// # Errors
    /// When its pipe cannot be opened.
    pub(crate) fn stdin(&self, id: &str) -> Result<Option<pipe::Sender>, RuntimeError> {
        let path = folder(&self.run_dir, id).join("stdin");
        match pipe::OpenOptions::new().open_sender(&path) {
            Ok(sender) => Ok(Some(sender)),
            // Made for a container with input, whose shim has closed its end.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(error) => Err(RuntimeError::system("open", path)(error)),
        }
    }

    fn order(&self, order: &Order, limit: Option<Duration>) -> Result<(), RuntimeError> {
        let mut stream = self.connect()?;
        let talk = |stream: &mut UnixStream| {
            stream.set_read_timeout(limit)?;
            write_order(stream, order)?;
            BufReader::new(stream).read_line(&mut String::new())
        };
        match talk(&mut stream) {
            Ok(_) => Ok(()),
            // A drain that takes too long is given up: the log has what there was.
            Err(e) if limit.is_some() && e.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            Err(e) => Err(self.no_talk(e)),
        }
    }

    fn connect(&self) -> Result<UnixStream, RuntimeError> {
        let path = socket(&self.run_dir);
        if let Ok(stream) = UnixStream::connect(&path) {
            return Ok(stream);
        }
        self.spawn().map_err(RuntimeError::system("start the log writer for", &self.run_dir))?;
        UnixStream::connect(&path)
            .map_err(RuntimeError::system("connect to the log writer on", &path))
    }

    /// Starts `keelson logd`, which says that it listens by closing its standard output.
    fn spawn(&self) -> std::io::Result<()> {
        fs::create_dir_all(&self.run_dir)?;
        let log =
            fs::OpenOptions::new().create(true).append(true).open(self.run_dir.join("logd.log"))?;
        let mut command = Command::new(program()?);
        command.arg("logd").arg("--run-dir").arg(&self.run_dir);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .current_dir("/");
        let mut child = command.spawn()?;
        if let Some(stdout) = child.stdout.take() {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line)?;
        }
        // It outlives us; while we live, somebody must take its exit status when it ends.
        std::thread::Builder::new().name("logd-reaper".into()).spawn(move || child.wait())?;
        Ok(())
    }
}

impl Attachment {
    /// The next piece; `None` when the container has printed everything. A log writer that died has left what was not
    /// read in the pipes: the next one goes on from there. Not to be cancelled.
    pub(crate) async fn next(&mut self) -> Result<Option<(Stream, Bytes)>, RuntimeError> {
        loop {
            match Frame::read(&mut self.frames).await {
                Ok(Frame::Output(stream, data)) => return Ok(Some((stream, data))),
                Ok(Frame::Ended) => return Ok(None),
                Ok(Frame::TooSlow) => {
                    return Err(RuntimeError::invalid(
                        "the container printed more than was taken from it; hint: kubectl logs has the rest",
                    ));
                }
                Ok(Frame::Attached) | Err(_) => match self.client.attach(&self.id).await {
                    Ok(again) => *self = again,
                    Err(RuntimeError::NotFound { .. }) => return Ok(None),
                    Err(error) => return Err(error),
                },
            }
        }
    }
}

fn write_order(to: &mut UnixStream, order: &Order) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(order)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Ourselves, even when the file was replaced by an upgrade. `KEELSON_PROGRAM` names it where "ourselves" is a test.
fn program() -> std::io::Result<PathBuf> {
    if let Some(program) = std::env::var_os("KEELSON_PROGRAM") {
        return Ok(PathBuf::from(program));
    }
    let own = std::env::current_exe()?;
    Ok(if own.exists() { own } else { PathBuf::from("/proc/self/exe") })
}

fn fifo(folder: &Path, name: &str) -> Result<String, RuntimeError> {
    let path = folder.join(name);
    match mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(path.display().to_string()),
        Err(errno) => Err(RuntimeError::system("create", &path)(errno.into())),
    }
}

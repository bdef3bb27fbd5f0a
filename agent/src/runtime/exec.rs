//! Further processes in a running container, with their streams.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::{
    CloseIoRequest, DeleteProcessRequest, ExecProcessRequest, GetContainerRequest, KillRequest,
    ResizePtyRequest, StartRequest, WaitRequest,
};
use futures_util::future::BoxFuture;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use prost_types::Any;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use super::{Inner, RuntimeError, container};

/// A process to run in a container, and which of its streams somebody wants.
#[derive(Debug, Clone, Default)]
pub struct ExecRequest {
    pub command: Vec<String>,
    pub tty: bool,
    pub stdin: bool,
    pub stdout: bool,
    /// Never together with `tty`: a terminal has one output.
    pub stderr: bool,
    /// The process is killed after this time.
    pub timeout: Option<Duration>,
}

/// A process that runs, with the ends of its streams.
pub struct ExecSession {
    /// Dropping it closes the process's standard input.
    pub stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    pub stdout: Option<Box<dyn AsyncRead + Send + Unpin>>,
    pub stderr: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// New sizes for the terminal.
    pub resize: mpsc::Sender<TerminalSize>,
    /// The exit code; also cleans up, so it must be awaited (dropping it leaves the process running unobserved).
    pub exit: BoxFuture<'static, Result<i32, RuntimeError>>,
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

/// The FIFOs of one exec; the folder goes with the value.
struct Pipes {
    folder: PathBuf,
}

impl Pipes {
    fn make(inner: &Inner, exec_id: &str) -> Result<Pipes, RuntimeError> {
        let folder = inner.options.run_dir.join("exec").join(exec_id);
        fs::create_dir_all(&folder).map_err(RuntimeError::system("create", &folder))?;
        Ok(Pipes { folder })
    }

    fn fifo(&self, name: &str) -> Result<PathBuf, RuntimeError> {
        let path = self.folder.join(name);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|e| RuntimeError::system("create", &path)(e.into()))?;
        Ok(path)
    }
}

impl Drop for Pipes {
    fn drop(&mut self) {
        // In the run directory: what stays is gone with the next boot.
        drop(fs::remove_dir_all(&self.folder));
    }
}

pub(crate) async fn run(
    inner: &Arc<Inner>,
    id: &str,
    request: ExecRequest,
) -> Result<ExecSession, RuntimeError> {
    if request.command.is_empty() {
        return Err(RuntimeError::invalid(
            "you must specify at least one command for the container",
        ));
    }
    let exec_id = container::new_id(&[id, "exec"]);
    let spec = process_spec(inner, id, &request).await?;
    let pipes = Pipes::make(inner, &exec_id)?;
    let mut exec = ExecProcessRequest {
        container_id: id.to_owned(),
        exec_id: exec_id.clone(),
        terminal: request.tty,
        spec: Some(spec),
        ..ExecProcessRequest::default()
    };
    let mut session = Streams::default();
    if request.stdin {
        let path = pipes.fifo("stdin")?;
        // Opened for reading, too, so that it opens before the shim does.
        let sender = pipe::OpenOptions::new().read_write(true).open_sender(&path);
        session.stdin = Some(sender.map_err(RuntimeError::system("open", &path))?);
        exec.stdin = text(&path);
    }
    if request.stdout || request.tty {
        let path = pipes.fifo("stdout")?;
        session.stdout = Some(receiver(&path)?);
        exec.stdout = text(&path);
    }
    if request.stderr && !request.tty {
        let path = pipes.fifo("stderr")?;
        session.stderr = Some(receiver(&path)?);
        exec.stderr = text(&path);
    }
    let mut tasks = inner.connection.tasks();
    tasks.exec(exec).await.map_err(|status| not_running(id, status))?;
    let start = StartRequest { container_id: id.to_owned(), exec_id: exec_id.clone() };
    if let Err(status) = tasks.start(start).await {
        let delete = DeleteProcessRequest { container_id: id.to_owned(), exec_id };
        drop(tasks.delete_process(delete).await);
        return Err(RuntimeError::Start { message: status.message().to_owned() });
    }
    Ok(session.into_session(inner, id, &exec_id, pipes, request.timeout))
}

#[derive(Default)]
struct Streams {
    stdin: Option<pipe::Sender>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
}

impl Streams {
    fn into_session(
        self,
        inner: &Arc<Inner>,
        id: &str,
        exec_id: &str,
        pipes: Pipes,
        timeout: Option<Duration>,
    ) -> ExecSession {
        let (resize, sizes) = mpsc::channel(4);
        tokio::spawn(resize_terminal(Arc::clone(inner), id.to_owned(), exec_id.to_owned(), sizes));
        let stdin = self.stdin.map(|sender| stdin_that_closes(inner, id, exec_id, sender));
        let exit = {
            let (inner, id, exec_id) = (Arc::clone(inner), id.to_owned(), exec_id.to_owned());
            Box::pin(async move {
                let result = wait(&inner, &id, &exec_id, timeout).await;
                drop(pipes);
                result
            })
        };
        ExecSession {
            stdin,
            stdout: self.stdout.map(|r| Box::new(r) as Box<dyn AsyncRead + Send + Unpin>),
            stderr: self.stderr.map(|r| Box::new(r) as Box<dyn AsyncRead + Send + Unpin>),
            resize,
            exit,
        }
    }
}

/// The shim holds both ends of the FIFO, so closing ours is not enough: containerd must be told, too.
fn stdin_that_closes(
    inner: &Arc<Inner>,
    id: &str,
    exec_id: &str,
    mut sender: pipe::Sender,
) -> Box<dyn AsyncWrite + Send + Unpin> {
    let (writer, mut reader) = tokio::io::duplex(16 << 10);
    let (inner, id, exec_id) = (Arc::clone(inner), id.to_owned(), exec_id.to_owned());
    tokio::spawn(async move {
        // The process may have gone; then there is nobody to write to.
        drop(tokio::io::copy(&mut reader, &mut sender).await);
        drop(sender.flush().await);
        drop(sender);
        let close = CloseIoRequest { container_id: id, exec_id, stdin: true };
        drop(inner.connection.tasks().close_io(close).await);
    });
    Box::new(writer)
}

async fn wait(
    inner: &Inner,
    id: &str,
    exec_id: &str,
    timeout: Option<Duration>,
) -> Result<i32, RuntimeError> {
    let mut tasks = inner.connection.tasks();
    let request = WaitRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
    let mut killer = inner.connection.tasks();
    let ended = async { tasks.wait(request).await };
    tokio::pin!(ended);
    let status = match timeout {
        None => ended.await,
        Some(limit) => match tokio::time::timeout(limit, &mut ended).await {
            Ok(result) => result,
            Err(_) => {
                let kill = KillRequest {
                    container_id: id.to_owned(),
                    exec_id: exec_id.to_owned(),
                    signal: libc::SIGKILL.cast_unsigned(),
                    all: false,
                };
                drop(killer.kill(kill).await);
                drop(ended.await);
                let delete = DeleteProcessRequest {
                    container_id: id.to_owned(),
                    exec_id: exec_id.to_owned(),
                };
                drop(killer.delete_process(delete).await);
                return Err(RuntimeError::invalid(format!("command timed out after {limit:?}")));
            }
        },
    };
    let code =
        status.map_err(RuntimeError::call("wait for a process in", id))?.into_inner().exit_status;
    let delete = DeleteProcessRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
    drop(killer.delete_process(delete).await);
    Ok(i32::try_from(code).unwrap_or(255))
}

/// Without an `exec_id`, the terminal is that of the first process.
pub(super) async fn resize_terminal(
    inner: Arc<Inner>,
    id: String,
    exec_id: String,
    mut sizes: mpsc::Receiver<TerminalSize>,
) {
    while let Some(size) = sizes.recv().await {
        let request = ResizePtyRequest {
            container_id: id.clone(),
            exec_id: exec_id.clone(),
            width: size.width.into(),
            height: size.height.into(),
        };
        // A process that has just ended has no terminal any more.
        drop(inner.connection.tasks().resize_pty(request).await);
    }
}

/// The container's own process description with another command.
async fn process_spec(inner: &Inner, id: &str, request: &ExecRequest) -> Result<Any, RuntimeError> {
    let get = GetContainerRequest { id: id.to_owned() };
    let reply =
        inner.connection.containers().get(get).await.map_err(|status| not_running(id, status))?;
    let spec =
        reply.into_inner().container.and_then(|container| container.spec).unwrap_or_default();
    let mut spec: Value = serde_json::from_slice(&spec.value).map_err(|e| {
        RuntimeError::invalid(format!("container {id} has no readable specification: {e}"))
    })?;
    let mut process = spec["process"].take();
    process["args"] = request.command.clone().into();
    process["terminal"] = request.tty.into();
    if request.tty
        && let Some(env) = process["env"].as_array_mut()
    {
        env.push("TERM=xterm".into());
    }
    let value = serde_json::to_vec(&process).map_err(|e| RuntimeError::invalid(e.to_string()))?;
    Ok(Any { type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(), value })
}

fn receiver(path: &Path) -> Result<pipe::Receiver, RuntimeError> {
    pipe::OpenOptions::new().open_receiver(path).map_err(RuntimeError::system("open", path))
}

fn not_running(id: &str, status: tonic::Status) -> RuntimeError {
    match status.code() {
        tonic::Code::NotFound => {
            RuntimeError::NotFound { what: "running container", id: id.to_owned() }
        }
        _ => RuntimeError::call("run a process in", id)(status),
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

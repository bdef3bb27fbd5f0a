//! The streams of a container's first process, for somebody who comes later.

use std::sync::Arc;

use bytes::Bytes;
use containerd_client::services::v1::CloseIoRequest;
use containerd_client::types::v1::Status as TaskStatus;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;

use super::exec::resize_terminal;
use super::{Inner, RuntimeError, TerminalSize, container};
use crate::logd::{Attachment, Stream};

/// A piece of output, or why there will be no more although the container prints.
pub type Output = Result<(Stream, Bytes), RuntimeError>;

/// The ends of a running container's streams. Dropping it changes nothing for the container.
pub struct AttachSession {
    /// `None` where the container takes no input (any more).
    pub stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Ends the container's input for good, where the first who brought some shall be the last; `stdin` must have been
    /// dropped.
    pub close_stdin: Option<BoxFuture<'static, ()>>,
    /// What is printed from now on; ends when the container prints no more.
    pub output: BoxStream<'static, Output>,
    /// New sizes for the terminal.
    pub resize: mpsc::Sender<TerminalSize>,
}

pub(crate) async fn open(
    inner: &Arc<Inner>,
    id: &str,
    with_stdin: bool,
) -> Result<AttachSession, RuntimeError> {
    let record = container::record(inner, id).await?;
    let state = container::task_of(inner, id).await?.map(|task| task.status());
    if let Some(state) = not_running(state) {
        return Err(RuntimeError::invalid(format!("container is in {state} state")));
    }
    let attachment = inner.logs.attach(id).await?;
    let stdin = if with_stdin && record.stdin { inner.logs.stdin(id)? } else { None };
    // A terminal stays open for the next one, as containerd's CRI has it.
    let closes = stdin.is_some() && record.stdin_once && !record.tty;
    let (resize, sizes) = mpsc::channel(4);
    if record.tty {
        tokio::spawn(resize_terminal(Arc::clone(inner), id.to_owned(), String::new(), sizes));
    }
    Ok(AttachSession {
        stdin: stdin.map(|sender| Box::new(sender) as _),
        close_stdin: closes.then(|| close_stdin(Arc::clone(inner), id.to_owned()).boxed()),
        output: stream::unfold(Some(attachment), next).boxed(),
        resize,
    })
}

/// The CRI's name of a state in which nobody can attach.
fn not_running(state: Option<TaskStatus>) -> Option<&'static str> {
    match state {
        Some(TaskStatus::Running | TaskStatus::Paused | TaskStatus::Pausing) => None,
        Some(TaskStatus::Created) => Some("CONTAINER_CREATED"),
        Some(TaskStatus::Unknown) => Some("CONTAINER_UNKNOWN"),
        Some(TaskStatus::Stopped) | None => Some("CONTAINER_EXITED"),
    }
}

async fn next(attachment: Option<Attachment>) -> Option<(Output, Option<Attachment>)> {
    let mut attachment = attachment?;
    match attachment.next().await {
        Ok(Some(piece)) => Some((Ok(piece), Some(attachment))),
        Ok(None) => None,
        Err(error) => Some((Err(error), None)),
    }
}

/// The shim holds an end of the pipe open for whoever comes; it must be told that nobody will.
async fn close_stdin(inner: Arc<Inner>, id: String) {
    let close = CloseIoRequest { container_id: id, exec_id: String::new(), stdin: true };
    // A container that has just ended has no input to close.
    drop(inner.connection.tasks().close_io(close).await);
}

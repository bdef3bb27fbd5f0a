//! The seam between the HTTPS API and what runs the containers, so that the API can be tested
//! without any.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use k8s_openapi::api::core::v1::Pod;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

pub use crate::logd::Stream;

/// What the HTTPS API needs of the node's pods. Errors are texts for the person at the other end.
pub trait Containers: Send + Sync + 'static {
    /// All pods of this node with their newest status.
    fn pods(&self) -> Vec<Arc<Pod>>;

    /// Resolves once those are all: an agent that has just started does not know them yet.
    fn settled(&self) -> BoxFuture<'static, ()>;

    /// Where a container's log is; `container_id` is the runtime's id without any prefix.
    fn log_path(
        &self,
        pod_uid: &str,
        container_id: &str,
    ) -> BoxFuture<'static, Result<PathBuf, String>>;

    /// Resolves when the container does not run (any more).
    fn ended(&self, pod_uid: &str, container_id: &str) -> BoxFuture<'static, ()>;

    /// Starts a process in a running container.
    fn exec(
        &self,
        container_id: &str,
        request: ExecRequest,
    ) -> BoxFuture<'static, Result<Process, String>>;

    /// Connects to the first process of a running container.
    fn attach(
        &self,
        container_id: &str,
        with_stdin: bool,
    ) -> BoxFuture<'static, Result<Attached, String>>;

    /// The cgroup of a pod, below the mount point of every hierarchy; its containers are in it, by id.
    fn pod_cgroup(&self, pod: &Pod) -> Option<String>;

    /// The network namespace of a pod; `None` is the agent's own.
    fn network(&self, pod_uid: &str) -> BoxFuture<'static, Result<Option<PathBuf>, String>>;
}

/// A process to start in a container, and which of its streams somebody wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// Empty when attaching.
    pub command: Vec<String>,
    pub tty: bool,
    pub stdin: bool,
    pub stdout: bool,
    /// Never together with `tty`: a terminal has one output.
    pub stderr: bool,
}

/// A process that runs, with the ends of its streams.
pub struct Process {
    /// Dropping it closes the process's standard input.
    pub stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    pub stdout: Option<Box<dyn AsyncRead + Send + Unpin>>,
    pub stderr: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// New sizes for the terminal.
    pub resize: Option<mpsc::Sender<TerminalSize>>,
    /// The exit code, or why it will never be known.
    pub exit: BoxFuture<'static, Result<i32, String>>,
}

/// The ends of a running container's streams. Dropping it changes nothing for the container.
pub struct Attached {
    /// `None` where the container takes no input: what a client sends is thrown away.
    pub stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Ends the container's input for good when the client's has ended (`stdinOnce`); without it the end of the
    /// client's input is the end of the session.
    pub close_stdin: Option<BoxFuture<'static, ()>>,
    /// What the container prints from now on, or why that is not known any more.
    pub output: BoxStream<'static, Result<(Stream, Bytes), String>>,
    /// New sizes for the terminal.
    pub resize: Option<mpsc::Sender<TerminalSize>>,
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

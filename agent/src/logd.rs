//! The log writer: one process per node that reads what all containers print and writes it in the CRI's log format.
//!
//! It is a process of its own so that neither a restart of the agent nor one of containerd stops a container that
//! prints: the shims keep the pipes open, this process reads them, and when it dies itself the next one opens the same
//! pipes again. It knows its containers from folders, one each:
//!
//! ```text
//!   <run dir>/io/<container id>/{stdout,stderr}   pipes
//!   <run dir>/io/<container id>/log.json          where the log goes and when it is rotated
//! ```
//!
//! Whoever attaches to a container gets a copy of what it prints from here, so that the pipes keep their one reader.
//! What somebody types goes straight into the container's `stdin` pipe, of which its shim keeps the other end.

mod attached;
mod client;
pub(crate) mod format;
pub(crate) mod frame;
mod log_file;
mod server;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub(crate) use client::Attachment;
pub use client::{Client, Pipes};
pub use frame::Stream;
pub use server::serve;

/// How one container's output is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LogSpec {
    pub(crate) path: PathBuf,
    pub(crate) max_bytes: u64,
    pub(crate) max_files: u32,
}

/// One line of the socket's protocol; the answer to each is [`DONE`], but for [`Order::Attach`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Order {
    /// Open the pipes of this container's folder.
    Open(String),
    /// Answer when everything that it printed is in its log.
    Drain(String),
    /// Do not read its pipes any more.
    Forget(String),
    /// Send [frames](frame) of what it prints from now on, until it ends or the connection does.
    Attach(String),
}

pub(crate) const DONE: &str = "done\n";

pub(crate) fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("logd.sock")
}

pub(crate) fn folder(run_dir: &Path, id: &str) -> PathBuf {
    run_dir.join("io").join(id)
}

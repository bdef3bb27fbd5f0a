//! What can go wrong between the agent and containerd.

use std::io;
use std::path::PathBuf;

use tonic::{Code, Status};

/// A request to the runtime that was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Nothing answers on containerd's socket.
    #[error("containerd does not answer on {} (is it installed and running?)", socket.display())]
    Unreachable {
        socket: PathBuf,
        #[source]
        source: tonic::transport::Error,
    },
    /// containerd refused a call.
    #[error("containerd cannot {action} {object}: {}", status.message())]
    Call { action: &'static str, object: String, status: Box<Status> },
    /// The kernel or the file system refused something.
    #[error("cannot {action} {}", path.display())]
    System {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The sandbox's pause process could not be started.
    #[error("the sandbox cannot be started")]
    Pause {
        #[source]
        source: super::pause::PauseError,
    },
    /// The kernel refused a cgroup for the sandbox, or this machine has none.
    #[error("cgroup of the sandbox")]
    Cgroup {
        #[source]
        source: crate::cgroup::CgroupError,
    },
    /// The pod network could not be set up or taken down.
    #[error("network of pod {pod}: {message}")]
    Network { pod: String, message: String },
    /// The container's configuration cannot be turned into a container; reason `CreateContainerConfigError`.
    #[error("{message}")]
    Invalid { message: String },
    /// The container's process could not be started; reason `StartError`.
    #[error("{message}")]
    Start { message: String },
    /// The image is not here or could not be brought here.
    #[error("{message}")]
    Image { message: String },
    /// There is no such container, sandbox or image.
    #[error("{what} {id} does not exist")]
    NotFound { what: &'static str, id: String },
}

impl RuntimeError {
    pub(crate) fn invalid(message: impl Into<String>) -> RuntimeError {
        RuntimeError::Invalid { message: message.into() }
    }

    /// For `map_err` on a gRPC call.
    pub(crate) fn call(action: &'static str, object: &str) -> impl FnOnce(Status) -> RuntimeError {
        let object = object.to_owned();
        move |status| RuntimeError::Call { action, object, status: Box::new(status) }
    }

    /// For `map_err` on an operation on `path`.
    pub(crate) fn system(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> RuntimeError {
        let path = path.into();
        move |source| RuntimeError::System { action, path, source }
    }
}

/// Reads "it is not there" as a success: what shall be gone is gone.
pub(crate) fn gone_is_fine<T: Default>(result: Result<T, Status>) -> Result<T, Status> {
    match result {
        Err(status) if status.code() == Code::NotFound => Ok(T::default()),
        other => other,
    }
}

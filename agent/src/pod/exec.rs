//! Commands of probes and hooks, run inside a container.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};

use super::shared::Node;
use crate::runtime::{ExecRequest, RuntimeError};

/// Output that is kept for events; the rest is read and dropped, so that the command does not block on it.
const MAX_OUTPUT: usize = 10 * 1024;
/// How long output is waited for after the command has ended: a child of it may hold the pipe open for ever.
const DRAIN: Duration = Duration::from_millis(200);

/// How a command ended.
#[derive(Debug)]
pub(super) struct Outcome {
    pub code: i32,
    pub output: String,
}

/// Why there is no outcome.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExecError {
    #[error("the command took too long and was killed")]
    TimedOut,
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

/// Runs a command to its end; after `limit` it is killed.
///
/// # Errors
/// When it could not be run or took too long.
pub(super) async fn run(
    node: &Node,
    container_id: &str,
    command: &[String],
    limit: Duration,
) -> Result<Outcome, ExecError> {
    let request = ExecRequest {
        command: command.to_vec(),
        stdout: true,
        stderr: true,
        timeout: Some(limit),
        ..ExecRequest::default()
    };
    let session = node.runtime.exec(container_id, request).await?;
    let (stdout, stderr) = (tokio::spawn(read(session.stdout)), tokio::spawn(read(session.stderr)));
    // The runtime kills at the limit; the margin is for it to say so.
    let exit = tokio::time::timeout(limit + Duration::from_secs(2), session.exit).await;
    let mut output = String::new();
    for stream in [stdout, stderr] {
        if let Ok(Ok(bytes)) = tokio::time::timeout(DRAIN, stream).await {
            output.push_str(&String::from_utf8_lossy(&bytes));
        }
    }
    match exit {
        Ok(Ok(code)) => Ok(Outcome { code, output: output.trim_end().to_owned() }),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(ExecError::TimedOut),
    }
}

async fn read(stream: Option<Box<dyn AsyncRead + Send + Unpin>>) -> Vec<u8> {
    let (mut kept, mut chunk) = (Vec::new(), [0; 1024]);
    let Some(mut stream) = stream else { return kept };
    while let Ok(count @ 1..) = stream.read(&mut chunk).await {
        let room = MAX_OUTPUT.saturating_sub(kept.len()).min(count);
        kept.extend_from_slice(&chunk[..room]);
    }
    kept
}

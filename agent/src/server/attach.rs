//! Connects a remote client with the first process of a container that somebody else started.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tracing::debug;

use super::containers::{Attached, Stream};
use super::exec::{self, Ending};
use super::inbox::Inbox;
use super::remote::{Output, RemoteIo};

/// How long the container may take to read what a client sent before it left.
const LAST_INPUT: Duration = Duration::from_secs(5);

/// Runs until the container prints no more, the client leaves, or the client's input ends where that is the end (see
/// [`Attached::close_stdin`]). The container runs on, and when this future is dropped it notices nothing at all.
pub async fn run(attached: Attached, mut io: RemoteIo) {
    let Attached { stdin, close_stdin, output, resize } = attached;
    let sizes = exec::pump_sizes(io.resize.take(), resize);
    let (from, gone) = (io.stdin.take(), io.gone.clone());
    let left = async {
        // Without a way in, the client's input is dropped, so that it does not hold its connection up.
        if let (Some(from), Some(to)) = (from, stdin) {
            let client_ended = pump_in(from, to).await;
            match close_stdin {
                Some(close_stdin) => close_stdin.await,
                None if client_ended => return,
                None => {}
            }
        }
        gone.cancelled().await;
    };
    // A process that does not read its input must not hide that the client has left.
    let left_behind = async {
        io.gone.cancelled().await;
        tokio::time::sleep(LAST_INPUT).await;
    };
    let all = pump_out(output, io.stdout.clone(), io.stderr.clone());
    let ended = tokio::select! {
        ended = all => ended,
        () = left => Ok(()),
        () = left_behind => Ok(()),
        () = async { sizes.await; std::future::pending().await } => Ok(()),
    };
    let ending = ended.map_or_else(Ending::Failed, |()| Ending::Exited(0));
    exec::finish(io, &ending).await;
}

/// Passes input on; `false` when it was the container that ended it.
async fn pump_in(mut from: Inbox, mut to: Box<dyn AsyncWrite + Send + Unpin>) -> bool {
    while let Some(data) = from.recv().await {
        if let Err(error) = to.write_all(&data).await {
            debug!(%error, "Container takes no more input");
            return false;
        }
    }
    true
}

async fn pump_out(
    mut from: BoxStream<'static, Result<(Stream, Bytes), String>>,
    stdout: Option<Output>,
    stderr: Option<Output>,
) -> Result<(), String> {
    while let Some(piece) = from.next().await {
        let (stream, data) = piece?;
        let to = match stream {
            Stream::Stdout => &stdout,
            Stream::Stderr => &stderr,
        };
        if let Some(to) = to {
            // One that cannot get it any more is gone, which ends the session.
            to.send(&data).await;
        }
    }
    Ok(())
}

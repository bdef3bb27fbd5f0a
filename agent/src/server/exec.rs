//! Runs a process for a remote client: pumps its streams and tells how it ended.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::containers::{Process, TerminalSize};
use super::inbox::Inbox;
use super::remote::{Output, RemoteIo};

/// A process that left children behind keeps its outputs open; they are given up when nothing has
/// come for this long after its end.
const QUIET_AFTER_EXIT: Duration = Duration::from_secs(1);

/// How a remote command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    Exited(i32),
    /// It could not be run, or nobody knows how it ended.
    Failed(String),
}

/// Connects `process` with the client until it ends; then tells the client how and hangs up. The
/// process runs on when the client leaves, as with the kubelet; then nothing of the client is kept.
pub async fn run(process: Process, mut io: RemoteIo) {
    let Process { stdin, stdout, stderr, resize, exit } = process;
    let gone = io.gone.clone();
    let (exited_send, exited) = watch::channel(false);
    let stdin = pump_in(io.stdin.take(), stdin);
    let resize = pump_sizes(io.resize.take(), resize);
    let inputs = tokio::spawn(async move {
        tokio::join!(stdin, resize);
    });
    let ended = async {
        let ended = exit.await;
        exited_send.send_replace(true);
        ended
    };
    let stdout = pump_out(stdout, io.stdout.clone(), exited.clone(), gone.clone());
    let stderr = pump_out(stderr, io.stderr.clone(), exited, gone.clone());
    let outputs = async { tokio::join!(ended, stdout, stderr) };
    tokio::pin!(outputs);
    let ended = tokio::select! {
        (ended, (), ()) = &mut outputs => ended,
        () = gone.cancelled() => {
            drop(io);
            let (_ended, (), ()) = outputs.await;
            return inputs.abort();
        }
    };
    inputs.abort();
    finish(io, &ended.map_or_else(Ending::Failed, Ending::Exited)).await;
}

/// Tells the client how it ended and hangs up.
pub async fn finish(io: RemoteIo, ending: &Ending) {
    let message = if io.json_status {
        Bytes::from(status(ending).to_string())
    } else {
        Bytes::from(plain_status(ending))
    };
    // The first version of the protocol says "well" by saying nothing.
    if !message.is_empty() {
        io.error.send(&message).await;
    }
    io.close().await;
}

/// The status object of version 4 and later.
fn status(ending: &Ending) -> Value {
    match ending {
        Ending::Exited(0) => json!({"metadata": {}, "status": "Success"}),
        Ending::Exited(code) => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Ending::Failed(why) => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("Internal error occurred: {why}"),
            "reason": "InternalError",
            "details": {"causes": [{"message": why}]},
            "code": 500,
        }),
    }
}

fn plain_status(ending: &Ending) -> String {
    match ending {
        Ending::Exited(0) => String::new(),
        Ending::Exited(code) => format!("command terminated with non-zero exit code: {code}"),
        Ending::Failed(why) => why.clone(),
    }
}

async fn pump_in(from: Option<Inbox>, to: Option<Box<dyn AsyncWrite + Send + Unpin>>) {
    let (Some(mut from), Some(mut to)) = (from, to) else { return };
    while let Some(data) = from.recv().await {
        let written = async {
            to.write_all(&data).await?;
            to.flush().await
        };
        if let Err(error) = written.await {
            return debug!(%error, "Process takes no more input");
        }
    }
    drop(to.shutdown().await);
}

async fn pump_out(
    from: Option<Box<dyn AsyncRead + Send + Unpin>>,
    mut to: Option<Output>,
    mut exited: watch::Receiver<bool>,
    gone: CancellationToken,
) {
    let Some(mut from) = from else { return };
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(16 * 1024);
        let quiet = async {
            // The sender outlives every pump, so this waits for the process itself.
            drop(exited.wait_for(|exited| *exited).await);
            tokio::time::sleep(QUIET_AFTER_EXIT).await;
        };
        // Reading is cancellation-safe; data that is there wins over giving up.
        let read = tokio::select! {
            biased;
            read = from.read_buf(&mut buffer) => read,
            () = quiet => return,
            () = gone.cancelled(), if to.is_some() => {
                to = None;
                continue;
            }
        };
        match read {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let data = buffer.split().freeze();
        // A client that left does not stop the process, so its output is read all the same.
        if let Some(client) = &to
            && !client.send(&data).await
        {
            to = None;
        }
    }
}

pub(super) async fn pump_sizes(from: Option<Inbox>, to: Option<mpsc::Sender<TerminalSize>>) {
    let (Some(mut from), Some(to)) = (from, to) else { return };
    while let Some(data) = from.recv().await {
        for size in terminal_sizes(&data) {
            if to.send(size).await.is_err() {
                return;
            }
        }
    }
}

/// The sizes in a message: JSON objects one after the other.
pub(crate) fn terminal_sizes(data: &[u8]) -> Vec<TerminalSize> {
    serde_json::Deserializer::from_slice(data)
        .into_iter::<Value>()
        .map_while(Result::ok)
        .filter_map(|value| {
            let number = |name: &str| value.get(name)?.as_u64()?.try_into().ok();
            Some(TerminalSize { width: number("Width")?, height: number("Height")? })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_a_terminal_are_read() {
        let sizes =
            terminal_sizes(b"{\"Width\":80,\"Height\":24}\n{\"Width\":100,\"Height\":30}\n");
        let want = [(80, 24), (100, 30)].map(|(width, height)| TerminalSize { width, height });
        assert_eq!(sizes, want);
        assert!(terminal_sizes(b"{\"Width\":70000,\"Height\":1}{").is_empty());
    }

    #[test]
    fn the_exit_code_is_where_kubectl_looks_for_it() {
        let failed = status(&Ending::Exited(3));
        assert_eq!(failed["reason"], "NonZeroExitCode");
        assert_eq!(failed["details"]["causes"][0]["message"], "3");
        assert_eq!(status(&Ending::Exited(0))["status"], "Success");
        assert_eq!(plain_status(&Ending::Exited(0)), "");
    }
}

//! One child process with a time limit that holds whatever the child or its children do.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

/// What the child wrote.
#[derive(Debug, Default)]
pub(super) struct Output {
    pub(super) stdout: Vec<u8>,
    stderr: Vec<u8>,
    status: String,
}

impl Output {
    /// For an error text: how it ended and the end of what it said.
    pub(super) fn describe(&self) -> String {
        let mut text = self.status.clone();
        for (name, bytes) in [("output", &self.stdout), ("error output", &self.stderr)] {
            let said = String::from_utf8_lossy(bytes);
            let said = said.trim();
            if !said.is_empty() {
                let from = said.char_indices().rev().nth(499).map_or(0, |(position, _)| position);
                text.push_str(&format!(", {name}: {}", &said[from..]));
            }
        }
        text
    }
}

/// How a run ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// With exit code 0.
    Success(Output),
    /// With another exit code or by a signal.
    Failure(Output),
    /// It was killed because its time was up.
    TimedOut,
}

/// Runs `path` with `input` on its standard input.
pub(super) fn run(
    path: &Path,
    variables: &[(&str, String)],
    input: &[u8],
    limit: Duration,
) -> io::Result<Ended> {
    let deadline = Instant::now() + limit;
    let mut child = Command::new(path)
        .envs(variables.iter().map(|(name, value)| (*name, value.as_str())))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let result = talk(&mut child, input, deadline);
    if !matches!(result, Ok(Some(_))) {
        // Not reaped yet, so the id is still the child's own.
        child.kill()?;
    }
    let status = child.wait()?;
    match result? {
        None => Ok(Ended::TimedOut),
        Some(output) if status.success() => Ok(Ended::Success(output)),
        Some(output) => Ok(Ended::Failure(Output { status: status.to_string(), ..output })),
    }
}

/// Exchanges input and output until the child has ended (`None`: the time was up first). The end is seen by a thread
/// that waits without reaping and then closes a pipe, so a grandchild that keeps the output open cannot hold us.
fn talk(child: &mut Child, input: &[u8], deadline: Instant) -> io::Result<Option<Output>> {
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let (ended, ended_writer) = io::pipe()?;
    let waiter = std::thread::Builder::new().name("cni-wait".to_owned());
    // Not joined: it ends when the child does, at the latest when it is killed or reaped.
    waiter.spawn(move || {
        let _ended = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        drop(ended_writer);
    })?;
    let mut streams = Streams {
        stdin: nonblocking(child.stdin.take().map(OwnedFd::from))?,
        stdout: nonblocking(child.stdout.take().map(OwnedFd::from))?,
        stderr: nonblocking(child.stderr.take().map(OwnedFd::from))?,
        input,
        output: Output::default(),
    };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let has_ended = streams.wait(&ended, left)?;
        streams.exchange()?;
        if has_ended {
            return Ok(Some(streams.output));
        }
    }
}

struct Streams<'a> {
    stdin: Option<File>,
    stdout: Option<File>,
    stderr: Option<File>,
    input: &'a [u8],
    output: Output,
}

impl Streams<'_> {
    /// Waits until something can be read or written; true when the child has ended.
    fn wait(&self, ended: &io::PipeReader, left: Duration) -> io::Result<bool> {
        let mut polled = vec![PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        for file in [&self.stdout, &self.stderr].into_iter().flatten() {
            polled.push(PollFd::new(file.as_fd(), PollFlags::POLLIN));
        }
        if let Some(stdin) = &self.stdin {
            polled.push(PollFd::new(stdin.as_fd(), PollFlags::POLLOUT));
        }
        // A millisecond more than rounding down gives, or the last one would be spent spinning.
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(polled[0].revents().is_some_and(|events| !events.is_empty()))
    }

    fn exchange(&mut self) -> io::Result<()> {
        write_some(&mut self.stdin, &mut self.input)?;
        read_some(&mut self.stdout, &mut self.output.stdout)?;
        read_some(&mut self.stderr, &mut self.output.stderr)
    }
}

fn nonblocking(end: Option<OwnedFd>) -> io::Result<Option<File>> {
    let Some(end) = end else { return Ok(None) };
    fcntl(&end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(Some(File::from(end)))
}

/// Closes the input when all is written; a child that does not read it is no error.
fn write_some(stdin: &mut Option<File>, input: &mut &[u8]) -> io::Result<()> {
    while let Some(file) = stdin {
        if input.is_empty() {
            *stdin = None;
            break;
        }
        match file.write(input) {
            Ok(written) => *input = &input[written..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => *stdin = None,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn read_some(stream: &mut Option<File>, into: &mut Vec<u8>) -> io::Result<()> {
    if let Some(file) = stream {
        match file.read_to_end(into) {
            Ok(_) => *stream = None,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A script must not be started while another thread's new child still holds its file open for writing.
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

    fn script(text: &str, limit: Duration) -> io::Result<Ended> {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plugin");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let input = vec![b'x'; 300_000];
        run(&path, &[("WORD", "hello".to_owned())], &input, limit)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn input_and_output_larger_than_a_pipe_go_through() {
        let Ended::Success(output) = script("cat; echo $WORD", LONG).unwrap() else { panic!() };
        assert_eq!(output.stdout.len(), 300_006);
    }

    #[test]
    fn a_failure_keeps_what_was_said() {
        let Ended::Failure(output) = script("echo why >&2; exit 3", LONG).unwrap() else {
            panic!()
        };
        assert_eq!(output.describe(), "exit status: 3, error output: why");
    }

    #[test]
    fn a_child_that_hangs_is_stopped() {
        let ended = script("exec sleep 1000", Duration::from_millis(50)).unwrap();
        assert!(matches!(ended, Ended::TimedOut), "{ended:?}");
    }

    #[test]
    fn a_grandchild_that_keeps_the_output_open_does_not_hold_us() {
        let start = Instant::now();
        let Ended::Success(output) = script("sleep 5 & echo done", LONG).unwrap() else { panic!() };
        assert_eq!(output.stdout, b"done\n");
        assert!(start.elapsed() < Duration::from_secs(4));
    }
}

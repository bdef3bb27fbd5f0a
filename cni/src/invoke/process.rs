//! One child process with a time limit that holds whatever the child or its children do.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

/// More of a plugin's output is thrown away; an answer that is so long cannot be read, then.
const MAX_OUTPUT: usize = 4 << 20;
/// A pipe cannot be made larger (`/proc/sys/fs/pipe-max-size` as it comes).
const LARGEST_PIPE: usize = 1 << 20;
/// For a process that has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

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
                text.push_str(&format!(", {name}: {}", said.get(from..).unwrap_or_default()));
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

/// Runs `path` with `input` on its standard input. Of our own environment it sees `PATH` only: the rest is no business of
/// a plugin's, and may be secret. When its time is up its children are killed with it.
pub(super) fn run(
    path: &Path,
    variables: &[(&str, String)],
    input: &[u8],
    limit: Duration,
) -> io::Result<Ended> {
    let deadline = Instant::now() + limit;
    let mut child = Command::new(path)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()))
        .process_group(0)
        .envs(variables.iter().map(|(name, value)| (*name, value.as_str())))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let result = talk(&mut child, input, deadline);
    if !matches!(result, Ok(Some(_))) {
        // Not reaped yet, so the id is still that of the child and its group.
        let group = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        killpg(group, Signal::SIGKILL)?;
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
        let has_ended = polled.first().and_then(PollFd::revents);
        Ok(has_ended.is_some_and(|events| !events.is_empty()))
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
            Ok(written) => *input = input.get(written..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => *stdin = None,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Reads what is there, but no more than a pipe can hold, so that a child that never stops writing cannot keep us from
/// looking at the clock. What is too long is read and thrown away.
fn read_some(stream: &mut Option<File>, into: &mut Vec<u8>) -> io::Result<()> {
    let mut part = [0; 16 << 10];
    for _ in 0..LARGEST_PIPE / part.len() {
        let Some(file) = stream else { break };
        match file.read(&mut part) {
            Ok(0) => *stream = None,
            Ok(length) => {
                let room = MAX_OUTPUT.saturating_sub(into.len()).min(length);
                into.extend(part.get(..room).unwrap_or_default());
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
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

    #[test]
    fn a_child_that_never_stops_writing_is_stopped_in_time_and_fills_no_memory() {
        let ended = script("exec yes", Duration::from_millis(300)).unwrap();
        assert!(matches!(ended, Ended::TimedOut), "{ended:?}");
        let Ended::Success(output) = script("yes | head -c 20000000", LONG).unwrap() else {
            panic!()
        };
        assert_eq!(output.stdout.len(), MAX_OUTPUT);
    }

    #[test]
    fn a_grandchild_that_never_stops_writing_does_not_hold_us() {
        let text = "yes & echo $! >&2";
        let Ended::Success(output) = script(text, LONG).unwrap() else { panic!() };
        let id = String::from_utf8(output.stderr).unwrap().trim().parse().unwrap();
        // Its output is closed: it has ended, or is about to.
        nix::sys::signal::kill(Pid::from_raw(id), Signal::SIGKILL).ok();
    }

    #[test]
    fn the_children_of_a_child_that_hangs_are_stopped_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut options = std::fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, OFlag::O_NONBLOCK.bits());
        let mut reader = options.read(true).open(&fifo).unwrap();
        // The grandchild holds the pipe open as long as it lives.
        let text = format!("sleep 1000 > {} & echo yes > {0}; wait", fifo.display());
        let ended = script(&text, Duration::from_millis(300)).unwrap();
        assert!(matches!(ended, Ended::TimedOut), "{ended:?}");
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        reader.read_to_end(&mut Vec::new()).unwrap();
    }

    #[test]
    fn a_plugin_sees_nothing_of_our_environment_but_the_path() {
        let Ended::Success(output) = script("exec env", LONG).unwrap() else { panic!() };
        let text = String::from_utf8(output.stdout).unwrap();
        let names = text.lines().filter_map(|line| Some(line.split_once('=')?.0));
        let mut names: Vec<&str> =
            names.filter(|n| !["PWD", "SHLVL", "_", "OLDPWD"].contains(n)).collect();
        names.sort_unstable();
        assert_eq!(names, ["PATH", "WORD"]);
    }
}

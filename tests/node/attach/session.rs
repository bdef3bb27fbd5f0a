//! A kubectl that somebody talks with.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Instant;

use keelson_tests::node::{Node, PATIENCE};
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Which kubectl, and what it speaks with the API server.
#[derive(Debug, Clone)]
pub(super) struct Kubectl {
    program: String,
    websockets: bool,
}

impl Kubectl {
    /// The machine's kubectl over WebSocket.
    pub(super) fn usual() -> Kubectl {
        Kubectl { program: "kubectl".into(), websockets: true }
    }

    /// The machine's kubectl over WebSocket and over SPDY, and Debian's old one where it is at hand.
    pub(super) fn all() -> Vec<Kubectl> {
        let mut all =
            vec![Kubectl::usual(), Kubectl { program: "kubectl".into(), websockets: false }];
        if let Ok(program) = std::env::var("KEELSON_KUBECTL_120") {
            all.push(Kubectl { program, websockets: false });
        }
        all
    }

    fn command(&self, node: &Node, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--kubeconfig").arg(node.kubeconfig()).args(args).env("HOME", node.scratch());
        command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", self.websockets.to_string());
        command
    }

    /// Starts it with pipes.
    pub(super) fn talk(&self, node: &Node, args: &[&str]) -> Session {
        let mut command = self.command(node, args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdin = child.stdin.take().map(|stdin| File::from(OwnedFd::from(stdin)));
        let stdout = read_all(File::from(OwnedFd::from(child.stdout.take().unwrap())));
        let stderr = read_all(File::from(OwnedFd::from(child.stderr.take().unwrap())));
        Session { child, stdin, stdout, stderr: Some(stderr), seen: String::new() }
    }

    /// Starts it on a terminal of 24 rows and 80 columns.
    pub(super) fn talk_on_terminal(&self, node: &Node, args: &[&str]) -> Session {
        let (terminal, slave) = terminal();
        let slave = || Stdio::from(slave.try_clone().unwrap());
        let mut command = self.command(node, args);
        command.stdin(slave()).stdout(slave()).stderr(slave()).process_group(0);
        let child = command.spawn().unwrap();
        let stdout = read_all(terminal.try_clone().unwrap());
        Session { child, stdin: Some(terminal), stdout, stderr: None, seen: String::new() }
    }
}

/// A running kubectl; killed with the value.
pub(super) struct Session {
    child: Child,
    stdin: Option<File>,
    stdout: Receiver<Vec<u8>>,
    stderr: Option<Receiver<Vec<u8>>>,
    /// What came and was not asked for yet.
    seen: String,
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Session {
    pub(super) fn say(&mut self, text: &str) {
        self.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Ends the input.
    pub(super) fn hang_up(&mut self) {
        self.stdin = None;
    }

    /// Reads until `text` has come and returns what came before it.
    #[track_caller]
    pub(super) fn hear(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut searched = 0;
        loop {
            if let Some(at) = self.seen[searched..].find(text).map(|at| searched + at) {
                let rest = self.seen.split_off(at + text.len());
                let mut before = std::mem::replace(&mut self.seen, rest);
                before.truncate(at);
                return before;
            }
            searched = self.seen.len().saturating_sub(text.len());
            match self.stdout.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(data) => self.seen.push_str(&String::from_utf8_lossy(&data)),
                Err(why) => {
                    let stderr = self.errors();
                    panic!("{text:?} does not come ({why}) after {:?}\n{stderr}", self.seen)
                }
            }
        }
    }

    /// Waits for its end; returns the exit code, the rest of its output and its errors.
    #[track_caller]
    pub(super) fn end(mut self) -> (Option<i32>, String, String) {
        loop {
            match self.stdout.recv_timeout(PATIENCE) {
                Ok(data) => self.seen.push_str(&String::from_utf8_lossy(&data)),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("kubectl does not end: {}", self.seen),
            }
        }
        let code = self.child.wait().unwrap().code();
        let stderr = self.errors();
        (code, std::mem::take(&mut self.seen), stderr)
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Gives the terminal another size, as a window that somebody drags.
    pub(super) fn resize(&self, rows: u16, columns: u16) {
        set_size(self.stdin.as_ref().unwrap(), rows, columns);
        // Only the foreground group of a controlling terminal is told by the kernel.
        self.signal(Signal::SIGWINCH);
    }

    fn errors(&mut self) -> String {
        let _unless_killed = self.child.kill();
        let stderr: Vec<u8> = self.stderr.take().iter().flatten().flatten().collect();
        String::from_utf8_lossy(&stderr).into_owned()
    }
}

/// Both ends of a new terminal, which no process inherits that another test starts: it would never hang up.
fn terminal() -> (File, File) {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = posix_openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let mut options = File::options();
    let slave = options.read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits());
    let slave = slave.open(ptsname_r(&master).unwrap()).unwrap();
    let master = File::from(OwnedFd::from(master));
    set_size(&slave, 24, 80);
    (master, slave)
}

fn set_size(terminal: &File, rows: u16, columns: u16) {
    let size = ["rows", &rows.to_string(), "cols", &columns.to_string()];
    let terminal = terminal.try_clone().unwrap();
    assert!(Command::new("stty").args(size).stdin(terminal).status().unwrap().success());
}

fn read_all(mut from: File) -> Receiver<Vec<u8>> {
    let (to, output) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 16 << 10];
        // A terminal whose other end is closed gives EIO.
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if to.send(buffer[..length].to_vec()).is_err() {
                break;
            }
        }
    });
    output
}

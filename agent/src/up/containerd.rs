//! The node's own containerd: started, watched and started again, and left running when keelson goes.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use inotify::{Inotify, WatchMask};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::layout::Layout;
use super::process;

/// How long containerd may take until its socket answers.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A containerd that died sooner than this after its start is not restarted at once.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// Finds the node's running containerd or starts one, and keeps it running from a thread of its own.
///
/// # Errors
/// When containerd is not installed or does not come up; the error holds the end of its log.
pub(crate) fn ensure(layout: &Layout) -> Result<()> {
    let socket = layout.containerd_socket();
    let running = if UnixStream::connect(&socket).is_ok() {
        Running::Adopted(read_pid(layout)?)
    } else {
        let child = start(layout)?;
        wait_for_socket(&socket).with_context(|| log_tail(layout))?;
        Running::Child(child)
    };
    let layout = layout.clone();
    std::thread::Builder::new()
        .name("containerd-keeper".into())
        .spawn(move || keep(&layout, running))
        .context("cannot start a thread")?;
    Ok(())
}

enum Running {
    Child(Child),
    /// An earlier keelson started it.
    Adopted(i32),
}

fn keep(layout: &Layout, mut running: Running) {
    let mut started = Instant::now();
    loop {
        let ended = match &mut running {
            Running::Child(child) => child.wait().map(|status| status.to_string()),
            Running::Adopted(pid) => process::wait_end(*pid).map(|()| "unknown status".to_owned()),
        };
        match ended {
            Ok(status) => tracing::warn!(status, "containerd ended; starting it again"),
            Err(error) => tracing::error!(%error, "cannot watch containerd; starting it again"),
        }
        if let Some(pause) = RESTART_PAUSE.checked_sub(started.elapsed()) {
            std::thread::park_timeout(pause);
        }
        started = Instant::now();
        running = match start(layout) {
            Ok(child) => Running::Child(child),
            Err(error) => {
                tracing::error!("cannot start containerd again: {error:#}");
                std::thread::park_timeout(RESTART_PAUSE);
                continue;
            }
        };
    }
}

fn start(layout: &Layout) -> Result<Child> {
    let run_dir = layout.containerd_run_dir();
    for dir in [&run_dir, &layout.containerd_state_dir()] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let config = run_dir.join("config.toml");
    keelson_durable::write(&config, config_text(layout).as_bytes(), 0o600)?;
    let log = fs::OpenOptions::new().create(true).append(true).open(log_path(layout))?;
    let mut command = Command::new("containerd");
    // It would tell whoever waits for us that it is ready itself.
    command.env_remove("NOTIFY_SOCKET");
    command.arg("--config").arg(&config).stdin(Stdio::null());
    command.stdout(log.try_clone()?).stderr(log);
    // A Ctrl-C in keelson's terminal must not reach it: pods live longer than keelson.
    command.process_group(0);
    let child = command.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            anyhow::anyhow!("containerd is not installed (Debian: apt-get install containerd runc)")
        }
        _ => anyhow::Error::new(e).context("cannot run containerd"),
    })?;
    keelson_durable::write(&pid_path(layout), child.id().to_string().as_bytes(), 0o600)?;
    Ok(child)
}

/// No CRI (keelson speaks containerd's own API), and none of the snapshotters that only a special disk can serve.
fn config_text(layout: &Layout) -> String {
    format!(
        r#"version = 2
root = "{root}"
state = "{state}"
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.tracing",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
  address = "{socket}"
[debug]
  level = "warn"
"#,
        root = layout.containerd_state_dir().display(),
        state = layout.containerd_run_dir().join("state").display(),
        socket = layout.containerd_socket().display(),
    )
}

/// Waits, woken by the kernel, until something listens on `socket`.
fn wait_for_socket(socket: &Path) -> Result<()> {
    let folder = socket.parent().context("the socket has no folder")?;
    let mut inotify = Inotify::init()?;
    inotify.watches().add(folder, WatchMask::CREATE | WatchMask::ATTRIB)?;
    let mut events = [0; 4096];
    let deadline = Instant::now() + START_LIMIT;
    while UnixStream::connect(socket).is_err() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("containerd did not answer on {} within {START_LIMIT:?}", socket.display());
        }
        // The file appears a moment before its owner listens on it: look again soon after an event, too.
        let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(left.min(Duration::from_millis(20)))?)?;
        drop(inotify.read_events(&mut events));
    }
    Ok(())
}

fn read_pid(layout: &Layout) -> Result<i32> {
    let path = pid_path(layout);
    let text = fs::read_to_string(&path).with_context(|| {
        format!(
            "a containerd answers on {} but {} does not say which process it is",
            layout.containerd_socket().display(),
            path.display()
        )
    })?;
    text.trim().parse().with_context(|| format!("{} holds no process id", path.display()))
}

fn log_tail(layout: &Layout) -> String {
    let text = fs::read_to_string(log_path(layout)).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!(
        "containerd does not start; the end of its log:\n{}",
        lines[lines.len().saturating_sub(10)..].join("\n")
    )
}

fn pid_path(layout: &Layout) -> PathBuf {
    layout.containerd_run_dir().join("containerd.pid")
}

fn log_path(layout: &Layout) -> PathBuf {
    layout.containerd_run_dir().join("containerd.log")
}

//! Sockets in a node's network namespace, without a program that opens them.

use std::fs::File;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

/// Runs `work` on a thread of its own in the network namespace called `name`. Sockets stay in that namespace wherever
/// they are used later.
pub fn spawn_in<T, F>(name: &str, work: F) -> JoinHandle<Result<T>>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    let path = format!("/run/netns/{name}");
    std::thread::spawn(move || {
        let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {path}"))?;
        work()
    })
}

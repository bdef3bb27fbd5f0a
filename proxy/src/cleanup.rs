//! `--cleanup`: removes what any mode of ours has ever made, and what kube-proxy left behind.
//!
//! Both are known by their names alone; nothing else is touched, and nothing of kube-proxy's is touched
//! in any other case.

mod kube_proxy;

use keelson_netlink::netns::Netns;

use crate::backend::Mode;
use crate::ebpf::EbpfConfig;
use crate::localhost::{self, LocalhostError};
use crate::switch::{Refused, clean, with_sources};

pub use kube_proxy::{clean as kube_proxy, traces as kube_proxy_traces};

/// Something that could not be removed.
#[derive(Debug, thiserror::Error)]
#[error("not everything could be removed: {0}")]
pub struct CleanupError(String);

fn give_back_localhost() -> Result<(), LocalhostError> {
    localhost::give_back(&Netns::current()?)
}

/// Removes everything of keelson-proxy and of kube-proxy from the calling thread's network namespace.
pub fn everything(ebpf: &EbpfConfig) -> Result<(), CleanupError> {
    let mut failures = Vec::new();
    // Before the rules that keep strangers from 127.0.0.1 go.
    if let Err(error) = give_back_localhost() {
        failures.push(with_sources(&error));
    }
    for mode in Mode::ALL {
        match clean(mode, ebpf) {
            Ok(()) => tracing::info!(%mode, "Removed everything of this mode"),
            Err(Refused::Absent(error)) => {
                tracing::info!(%mode, error = with_sources(&error), "Nothing to clean up");
            }
            Err(Refused::Failed(error)) => {
                failures.push(format!("{mode}: {}", with_sources(&error)));
            }
        }
    }
    if let Err(CleanupError(failed)) = kube_proxy() {
        failures.push(failed);
    }
    if failures.is_empty() { Ok(()) } else { Err(CleanupError(failures.join("; "))) }
}

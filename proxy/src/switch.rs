//! Which mode is used, and how the node leaves the one it was in before.
//!
//! The new mode is put in force first, then what the other modes left is removed. While both are there
//! a connection is translated by whichever sees it first, to the same endpoints; connections that exist
//! are kept by connection tracking and do not depend on either.

use crate::backend::{BackendConfig, BackendError, Mode};
use crate::ebpf::{Ebpf, EbpfConfig};
use crate::iptables::Iptables;
use crate::ipvs::Ipvs;

/// None of the modes that may be used works here.
#[derive(Debug, thiserror::Error)]
#[error("no proxy mode works here: {0}")]
pub struct NoMode(String);

/// The first mode that this kernel can do; of the two variants of iptables, that of the node first.
pub fn choose(modes: &[Mode]) -> Result<Mode, NoMode> {
    let mut reasons = Vec::new();
    for mode in in_order(modes) {
        match mode.probe() {
            Ok(()) if reasons.is_empty() => {
                tracing::info!(%mode, "Programming Services");
                return Ok(mode);
            }
            Ok(()) => {
                let reasons = reasons.join("; ");
                tracing::warn!(%mode, %reasons, "Programming Services in another mode than the preferred one");
                return Ok(mode);
            }
            Err(error) => reasons.push(format!("{mode}: {}", with_sources(&error))),
        }
    }
    Err(NoMode(reasons.join("; ")))
}

fn in_order(modes: &[Mode]) -> Vec<Mode> {
    let mut modes = modes.to_vec();
    let variants = modes.iter().filter(|mode| matches!(mode, Mode::Iptables(_))).count();
    if variants > 1 && modes.first().is_some_and(|first| matches!(first, Mode::Iptables(_))) {
        match Iptables::usual_variant() {
            Ok(usual) => modes.sort_by_key(|mode| *mode != Mode::Iptables(usual)),
            Err(error) => tracing::debug!(%error, "Cannot tell which iptables the node uses"),
        }
    }
    modes
}

/// Removes what all other modes left, now that `current` is in force.
///
/// What cannot be removed stays and is named: Services work all the same.
pub fn leave_others(current: Mode, ebpf: &EbpfConfig) {
    if current == Mode::Ebpf
        && let Err(error) = crate::ebpf::keep_translating()
    {
        tracing::warn!(error = with_sources(&error), "Connections of earlier modes may break");
    }
    for other in Mode::ALL.into_iter().filter(|mode| *mode != current) {
        match leave(other, ebpf) {
            Ok(()) => tracing::debug!(mode = %other, "Nothing of this mode is left"),
            Err(Refused::Absent(error)) => {
                tracing::debug!(mode = %other, error = with_sources(&error), "Was never used here");
            }
            Err(Refused::Failed(error)) => {
                tracing::error!(
                    mode = %other,
                    error = with_sources(&error),
                    "Cannot remove what an earlier mode left; run keelson-proxy --cleanup later"
                );
            }
        }
    }
}

/// Tells whoever reads the log that kube-proxy's rules are in force beside ours. They are not touched:
/// kube-proxy may still run.
pub fn look_for_kube_proxy() {
    let traces = crate::cleanup::kube_proxy_traces();
    if !traces.is_empty() {
        tracing::warn!(
            found = traces.join(", "),
            "kube-proxy's rules are in force, too: stop kube-proxy, then run keelson-proxy --cleanup=kube-proxy"
        );
    }
}

/// Why a mode's state could not be removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// The mode does not work here, so nothing of it can be there.
    #[error(transparent)]
    Absent(BackendError),
    #[error(transparent)]
    Failed(BackendError),
}

/// Removes what a mode left while another one is in force: what connections need may stay until they end.
fn leave(mode: Mode, ebpf: &EbpfConfig) -> Result<(), Refused> {
    match mode {
        Mode::Ipvs => Ipvs::leave().map_err(Refused::Failed),
        Mode::Ebpf => Ebpf::leave(ebpf).map_err(|error| Refused::Failed(error.into())),
        other => clean(other, ebpf),
    }
}

/// Removes everything of one mode.
pub(crate) fn clean(mode: Mode, ebpf: &EbpfConfig) -> Result<(), Refused> {
    if let Mode::Iptables(variant) = mode {
        // To probe the old interface would make its tables.
        return Iptables::remove(variant).map_err(|error| Refused::Failed(error.into()));
    }
    if mode == Mode::Ipvs {
        // To probe would load its modules.
        return Ipvs::remove().map_err(Refused::Failed);
    }
    if mode == Mode::Ebpf {
        // Its state is files in a folder.
        let removed = Ebpf::remove(ebpf);
        return removed.map_err(|error| Refused::Failed(error.into()));
    }
    mode.probe().map_err(Refused::Absent)?;
    let mut backend = mode.open(BackendConfig::default()).map_err(Refused::Failed)?;
    backend.cleanup().map_err(Refused::Failed)
}

/// The error with its sources, for a log line.
#[must_use]
pub fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

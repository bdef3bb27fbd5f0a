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

/// The first mode that does everything here, else the first that works; of the two variants of iptables, that of the
/// node first. Says in one line which, and what those before it lack.
pub fn choose(modes: &[Mode], ebpf: &EbpfConfig) -> Result<Mode, NoMode> {
    let works = |mode: Mode| mode.probe().map_err(|error| with_sources(&error));
    let choice = weigh(&in_order(modes), |mode| mode.gaps(ebpf), works)?;
    let Choice { mode, lacks, passed_over } = choice;
    let lacks = lacks.map(tracing::field::display);
    if passed_over.is_empty() {
        tracing::info!(%mode, lacks, "Programming Services");
    } else {
        let reasons = passed_over.join("; ");
        tracing::warn!(%mode, lacks, %reasons, "Programming Services in another mode than the preferred one");
    }
    Ok(mode)
}

/// The mode that is taken.
#[derive(Debug, PartialEq, Eq)]
struct Choice {
    mode: Mode,
    /// What it will not do, if there was no better one.
    lacks: Option<String>,
    /// Those that were preferred, and why they are not taken.
    passed_over: Vec<String>,
}

/// Pure. `gaps` tells what a mode would not do, `works` tries it: that takes longer, and is done only as far as needed.
fn weigh(
    modes: &[Mode],
    gaps: impl Fn(Mode) -> Vec<String>,
    mut works: impl FnMut(Mode) -> Result<(), String>,
) -> Result<Choice, NoMode> {
    let (mut passed_over, mut lacking) = (Vec::new(), Vec::new());
    for mode in modes.iter().copied() {
        let lacks = gaps(mode).join(", ");
        if !lacks.is_empty() {
            passed_over.push(format!("{mode}: {lacks}"));
            lacking.push((mode, lacks));
            continue;
        }
        match works(mode) {
            Ok(()) => return Ok(Choice { mode, lacks: None, passed_over }),
            Err(why) => passed_over.push(format!("{mode}: {why}")),
        }
    }
    for (mode, lacks) in lacking {
        let this = |line: &String| line.starts_with(&format!("{mode}: "));
        match works(mode) {
            Ok(()) => {
                let before = passed_over.iter().position(this).unwrap_or(0);
                passed_over.truncate(before);
                return Ok(Choice { mode, lacks: Some(lacks), passed_over });
            }
            Err(why) => passed_over.push(format!("{mode}: {why}")),
        }
    }
    Err(NoMode(passed_over.join("; ")))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iptables::Variant;

    /// The machine has these modes, and mode ebpf there lacks something.
    fn chosen(modes: &[Mode], has: &[Mode], lacks: &str) -> Result<Choice, String> {
        let gaps = |mode| match mode {
            Mode::Ebpf if !lacks.is_empty() => vec![lacks.to_owned()],
            _ => Vec::new(),
        };
        let works = |mode| if has.contains(&mode) { Ok(()) } else { Err("not here".to_owned()) };
        weigh(modes, gaps, works).map_err(|error| error.to_string())
    }

    #[test]
    fn auto_takes_the_first_that_does_everything_and_says_what_the_others_lack() {
        use Mode::{Ebpf, Ipvs, Nftables};
        let nft = Mode::Iptables(Variant::Nft);
        let gap = "no bpf_set_retval";
        for (has, gaps, mode, lacks, passed_over) in [
            (&[Ebpf, Nftables][..], "", Ebpf, None, ""),
            (&[Ebpf, Nftables], gap, Nftables, None, "ebpf: no bpf_set_retval"),
            (&[Nftables], "", Nftables, None, "ebpf: not here"),
            (&[Ebpf, nft], gap, nft, None, "ebpf: no bpf_set_retval; nftables: not here"),
            (
                &[Ipvs],
                "",
                Ipvs,
                None,
                "ebpf: not here; nftables: not here; iptables-nft: not here; iptables-legacy: not here",
            ),
            // Better than nothing.
            (&[Ebpf], gap, Ebpf, Some(gap), ""),
        ] {
            let choice = chosen(&Mode::AUTO, has, gaps).unwrap();
            let found = (choice.mode, choice.lacks.as_deref(), &*choice.passed_over.join("; "));
            assert_eq!(found, (mode, lacks, passed_over));
        }
        for gaps in ["", gap] {
            let error = chosen(&Mode::AUTO, &[], gaps).unwrap_err();
            assert!(error.starts_with("no proxy mode works here: ebpf: "), "{error}");
            assert!(error.contains("ebpf: not here"), "{error}");
        }
    }

    #[test]
    fn who_names_a_mode_gets_it_with_what_it_lacks() {
        let choice = chosen(&[Mode::Ebpf], &[Mode::Ebpf], "no bpf_set_retval").unwrap();
        assert_eq!((choice.mode, choice.passed_over), (Mode::Ebpf, Vec::new()));
        assert_eq!(choice.lacks.as_deref(), Some("no bpf_set_retval"));
        assert_eq!(chosen(&[Mode::Ebpf], &[Mode::Nftables], "").ok(), None);
    }
}

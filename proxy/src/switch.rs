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
    let Choice { mode, lacks, passed_over } = weigh(&in_order(modes), |mode| try_out(mode, ebpf))?;
    let (lacks, reasons) = (lacks.map(tracing::field::display), passed_over.join("; "));
    if reasons.is_empty() {
        tracing::info!(%mode, lacks, "Programming Services");
    } else {
        tracing::warn!(%mode, lacks, %reasons, "Programming Services in another mode than the preferred one");
    }
    Ok(mode)
}

/// How a mode was found.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Trial {
    Whole,
    /// It works, but for this.
    Lacking(String),
    Impossible(String),
}

/// Tries a mode, and leaves nothing behind.
fn try_out(mode: Mode, ebpf: &EbpfConfig) -> Trial {
    if let Err(error) = mode.probe() {
        return Trial::Impossible(with_sources(&error));
    }
    match &*mode.gaps(ebpf) {
        [] => Trial::Whole,
        gaps => Trial::Lacking(gaps.join(", ")),
    }
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

/// Pure. Modes are tried only as far as it takes.
fn weigh(modes: &[Mode], mut try_out: impl FnMut(Mode) -> Trial) -> Result<Choice, NoMode> {
    let (mut passed_over, mut best) = (Vec::new(), None);
    for mode in modes {
        match try_out(*mode) {
            Trial::Whole => return Ok(Choice { mode: *mode, lacks: None, passed_over }),
            Trial::Impossible(why) => passed_over.push(format!("{mode}: {why}")),
            Trial::Lacking(what) => {
                best.get_or_insert((*mode, what.clone(), passed_over.clone()));
                passed_over.push(format!("{mode}: {what}"));
            }
        }
    }
    match best {
        Some((mode, lacks, passed_over)) => Ok(Choice { mode, lacks: Some(lacks), passed_over }),
        None => Err(NoMode(passed_over.join("; "))),
    }
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

    /// What the machine has of each mode: everything, all but something, or nothing.
    fn chosen(modes: &[Mode], has: &[(Mode, Trial)]) -> Result<Choice, String> {
        let found = |mode| has.iter().find(|(of, _)| *of == mode).map(|(_, trial)| trial.clone());
        let nothing = || Trial::Impossible("not here".to_owned());
        weigh(modes, |mode| found(mode).unwrap_or_else(nothing)).map_err(|error| error.to_string())
    }

    #[test]
    fn auto_takes_the_first_that_does_everything_and_says_what_the_others_lack() {
        use Mode::{Ebpf, Ipvs, Nftables};
        let nft = Mode::Iptables(Variant::Nft);
        let lacking = || Trial::Lacking("no bpf_set_retval".to_owned());
        let whole = || Trial::Whole;
        for (has, mode, lacks, passed_over) in [
            (vec![(Ebpf, whole()), (Nftables, whole())], Ebpf, None, &[][..]),
            (
                vec![(Ebpf, lacking()), (Nftables, whole())],
                Nftables,
                None,
                &["ebpf: no bpf_set_retval"],
            ),
            (vec![(Nftables, whole())], Nftables, None, &["ebpf: not here"]),
            (
                vec![(Ebpf, lacking()), (nft, whole())],
                nft,
                None,
                &["ebpf: no bpf_set_retval", "nftables: not here"],
            ),
            (
                vec![(Ipvs, whole())],
                Ipvs,
                None,
                &[
                    "ebpf: not here",
                    "nftables: not here",
                    "iptables-nft: not here",
                    "iptables-legacy: not here",
                ],
            ),
            // Better than nothing.
            (vec![(Ebpf, lacking())], Ebpf, Some("no bpf_set_retval"), &[]),
        ] {
            let choice = chosen(&Mode::AUTO, &has).unwrap();
            let wanted = (mode, lacks, Vec::from(passed_over));
            let passed_over = choice.passed_over.iter().map(String::as_str).collect();
            assert_eq!((choice.mode, choice.lacks.as_deref(), passed_over), wanted);
        }
        let error = chosen(&Mode::AUTO, &[]).unwrap_err();
        assert!(
            error.starts_with("no proxy mode works here: ebpf: not here; nftables: "),
            "{error}"
        );
    }

    #[test]
    fn who_names_a_mode_gets_it_with_what_it_lacks() {
        let lacking = Trial::Lacking("no bpf_set_retval".to_owned());
        let choice = chosen(&[Mode::Ebpf], &[(Mode::Ebpf, lacking)]).unwrap();
        assert_eq!(choice.mode, Mode::Ebpf);
        assert_eq!(choice.lacks.as_deref(), Some("no bpf_set_retval"));
        assert_eq!(chosen(&[Mode::Ebpf], &[(Mode::Nftables, Trial::Whole)]).ok(), None);
    }
}

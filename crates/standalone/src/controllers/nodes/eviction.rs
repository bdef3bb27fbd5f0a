//! When a pod must leave a node with NoExecute taints: pure.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, Taint};

use super::health::{NOT_READY, UNREACHABLE};
use crate::controllers::pods::is_deleting;
use crate::scheduler::tolerates;

/// How long a pod without a word about it stays on a node that is not ready or cannot be reached (the API server's
/// DefaultTolerationSeconds).
const DEFAULT_PATIENCE: Duration = Duration::from_secs(300);

/// A taint, and for how long this control plane has seen it. The taint's own `timeAdded` decides nothing, as in
/// kube-controller-manager: a clock that steps forward must not evict every pod of a node.
pub(crate) type Held<'a> = (&'a Taint, Duration);

/// How much longer the pod may stay: zero to go now, `None` for good.
pub(crate) fn stays_for(pod: &Pod, taints: &[Held<'_>]) -> Option<Duration> {
    let annotations = pod.metadata.annotations.as_ref();
    // A mirror pod comes from a file on the node: deleting it would not end it.
    let is_mirror = annotations.is_some_and(|all| all.contains_key("kubernetes.io/config.mirror"));
    if is_deleting(pod) || is_mirror {
        return None;
    }
    taints
        .iter()
        .filter(|(taint, _)| taint.effect == "NoExecute")
        .filter_map(|(taint, held)| Some(patience(pod, taint)?.saturating_sub(*held)))
        .min()
}

/// How long the pod tolerates the taint, `None` for ever.
fn patience(pod: &Pod, taint: &Taint) -> Option<Duration> {
    let tolerations = pod.spec.iter().flat_map(|spec| spec.tolerations.iter().flatten());
    let mut covering = tolerations.filter(|toleration| tolerates(toleration, taint)).peekable();
    if covering.peek().is_none() {
        let has_default = [NOT_READY, UNREACHABLE].contains(&&*taint.key);
        return Some(if has_default { DEFAULT_PATIENCE } else { Duration::ZERO });
    }
    // The shortest of those that cover it counts; one without a limit does not shorten.
    let limits = covering.filter_map(|toleration| toleration.toleration_seconds);
    limits.map(|secs| Duration::from_secs(u64::try_from(secs).unwrap_or(0))).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_pod_leaves_when_its_toleration_ends() {
        let minute = Duration::from_secs(60);
        let taint = |key: &str, effect: &str| -> Taint {
            serde_json::from_value(
                // A clock that stepped has made the taint seem old.
                json!({"key": key, "effect": effect, "timeAdded": "1970-01-01T00:00:00Z"}),
            )
            .unwrap()
        };
        let check = |tolerations: Value, taint: &Taint| {
            let pod = json!({"spec": {"containers": [], "tolerations": tolerations}});
            let pod = serde_json::from_value(pod).unwrap();
            stays_for(&pod, &[(taint, minute)]).map(|left| left.as_secs())
        };
        let (mine, lost) = (taint("mine", "NoExecute"), taint(UNREACHABLE, "NoExecute"));
        assert_eq!(check(json!([]), &mine), Some(0));
        assert_eq!(check(json!([]), &lost), Some(240));
        assert_eq!(check(json!([]), &taint("mine", "NoSchedule")), None);
        assert_eq!(check(json!([{"operator": "Exists"}]), &mine), None);
        assert_eq!(
            check(json!([{"key": "mine", "operator": "Exists", "tolerationSeconds": 90}]), &mine),
            Some(30)
        );
        assert_eq!(
            check(
                json!([{"key": UNREACHABLE, "operator": "Exists", "tolerationSeconds": 10}]),
                &lost
            ),
            Some(0)
        );
    }
}

//! The pod that is started again and again.

use serde_json::{Value, json};

use crate::api::NewObject;

pub(crate) const NAMESPACE: &str = "default";
pub(crate) const COLLECTION: &str = "/api/v1/namespaces/default/pods";
pub(crate) const LABEL: &str = "keelson-bench";

/// Ends at once when told to: process 1 of a container has no default action for SIGTERM. A shell that is told before
/// it has run its first line, on a busy machine, takes the whole grace period.
const SCRIPT: &str = "trap 'exit 0' TERM; sleep 2147483647 & wait $!";

/// A pod with one container. `node` keeps the scheduler out of the path.
pub(crate) fn pod(name: &str, image: &str, node: Option<&str>) -> NewObject {
    let mut body = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "labels": { LABEL: "yes" } },
        "spec": {
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 2,
            "containers": [{
                "name": "main", "image": image, "imagePullPolicy": "Never",
                "command": ["sh", "-c", SCRIPT],
            }],
        },
    });
    if let Some(node) = node {
        body["spec"]["nodeName"] = Value::from(node);
    }
    NewObject { collection: COLLECTION, body }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_pod_without_a_node_goes_through_the_scheduler() {
        assert_eq!(pod("a", "i", Some("node")).body["spec"]["nodeName"], "node");
        assert_eq!(pod("a", "i", None).body["spec"].get("nodeName"), None);
    }
}

//! Isolation that a pod asks for is given, or the pod does not run.

use keelson_tests::node::{BUSYBOX, Node, until};

fn pod(name: &str, pod_fields: &str, container_fields: &str) -> String {
    format!(
        r#"
---
apiVersion: v1
kind: Pod
metadata: {{ name: {name} }}
spec:
  {pod_fields}
  terminationGracePeriodSeconds: 0
  containers: [{{ name: main, image: "{BUSYBOX}", command: ["sleep", "1000"], {container_fields} }}]
"#
    )
}

#[test]
fn pods_that_ask_for_what_the_node_cannot_give_are_refused_and_say_why() {
    let node = Node::start().unwrap();
    let armor = "securityContext: { appArmorProfile: { type: RuntimeDefault } }";
    let masked = "securityContext: { procMount: Unmasked }";
    let manifests = [
        pod("users", "hostUsers: false", ""),
        pod("armor", "", armor),
        pod("masked", "", masked),
        pod("class", "runtimeClassName: kata", ""),
        pod(
            "usual",
            "securityContext: { supplementalGroupsPolicy: Strict }",
            "securityContext: { runAsUser: 1000 }",
        ),
    ];
    node.apply(
        &(manifests.concat()
            + "\n---\napiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: { name: kata }\nhandler: kata\n"),
    )
    .unwrap();
    let reason = "jsonpath={.status.reason}";
    let mut refused =
        vec![("users", "UnexpectedAdmissionError"), ("masked", "UnexpectedAdmissionError")];
    // Where the kernel has AppArmor, the pod is refused as well: with the same reason.
    refused.push(("armor", "AppArmor"));
    for (pod, want) in refused {
        node.wait_for(&format!("pod/{pod}"), &format!("{reason}={want}")).unwrap();
    }
    until("the class without a runtime does not run in runc", || {
        let text = node.kubectl(&["describe", "pod", "class"]).map_err(|e| e.to_string())?;
        let says = text.contains("FailedCreatePodSandBox") && text.contains("kata");
        if says && !text.contains("Started container") { Ok(()) } else { Err(text) }
    });
    node.wait_for("pod/usual", "condition=Ready").unwrap();
    // The image's group file has the user in `staff` (50): a strict pod does not get that.
    let id = node.kubectl(&["exec", "usual", "--", "id", "-G"]).unwrap();
    assert_eq!(id.trim(), "1000", "{id}");
}

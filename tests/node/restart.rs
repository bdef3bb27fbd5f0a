//! keelson comes and goes; pods stay.

use keelson_tests::leak;
use keelson_tests::node::{BUSYBOX, Node};
use nix::sys::signal::Signal;

const POD: &str = "jsonpath={.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}";

#[test]
fn killing_keelson_leaves_pods_running_and_the_next_start_adopts_them() {
    let mut node = Node::start().unwrap();
    node.apply(&format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: stays }}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{{ name: main, image: "{BUSYBOX}", command: ["sleep", "1000"] }}]
"#
    ))
    .unwrap();
    node.wait_for("pod/stays", "condition=Ready").unwrap();
    let before = node.kubectl(&["get", "pod", "stays", "-o", POD]).unwrap();
    node.end_keelson(Signal::SIGKILL).unwrap();
    node.launch().unwrap();
    node.wait_for("pod/stays", "condition=Ready").unwrap();
    assert_eq!(node.kubectl(&["get", "pod", "stays", "-o", POD]).unwrap(), before);
    assert_eq!(node.kubectl(&["exec", "stays", "--", "echo", "alive"]).unwrap(), "alive\n");
    node.kubectl(&["delete", "pod", "stays"]).unwrap();
    leak::no_pods_left(&node);
}

//! Pods as a user writes them.

use keelson_tests::leak;
use keelson_tests::node::{BUSYBOX, Node};

#[test]
fn a_pod_runs_prints_and_is_gone_without_a_trace() {
    let node = Node::start().unwrap();
    node.apply(&format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: hello }}
spec:
  terminationGracePeriodSeconds: 1
  initContainers:
    - name: prepare
      image: {BUSYBOX}
      command: ["sh", "-c", "echo prepared > /shared/note"]
      volumeMounts: [{{ name: shared, mountPath: /shared }}]
  containers:
    - name: main
      image: {BUSYBOX}
      command: ["sh", "-c", "cat /shared/note; echo $GREETING; hostname; sleep 1000"]
      env:
        - {{ name: WHO, value: world }}
        - {{ name: GREETING, value: "hello $(WHO)" }}
      volumeMounts: [{{ name: shared, mountPath: /shared }}]
    - name: side
      image: {BUSYBOX}
      command: ["sleep", "1000"]
  volumes: [{{ name: shared, emptyDir: {{}} }}]
"#
    ))
    .unwrap();
    node.wait_for("pod/hello", "condition=Ready").unwrap();
    assert_eq!(
        node.kubectl(&["logs", "hello", "-c", "main"]).unwrap(),
        "prepared\nhello world\nhello\n"
    );
    assert_eq!(
        node.kubectl(&["exec", "hello", "-c", "side", "--", "echo", "inside"]).unwrap(),
        "inside\n"
    );
    node.kubectl(&["delete", "pod", "hello"]).unwrap();
    leak::no_pods_left(&node);
}

#[test]
fn a_failing_container_is_restarted_with_back_off_and_says_so() {
    let node = Node::start().unwrap();
    node.apply(&format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: crash }}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{{ name: main, image: "{BUSYBOX}", command: ["sh", "-c", "echo dying; exit 3"] }}]
"#
    ))
    .unwrap();
    let waiting = "jsonpath={.status.containerStatuses[0].state.waiting.reason}=CrashLoopBackOff";
    node.wait_for("pod/crash", waiting).unwrap();
    let code = "jsonpath={.status.containerStatuses[0].lastState.terminated.exitCode}";
    assert_eq!(node.kubectl(&["get", "pod", "crash", "-o", code]).unwrap(), "3");
    assert_eq!(node.kubectl(&["logs", "crash", "--previous"]).unwrap(), "dying\n");
    node.kubectl(&["delete", "pod", "crash"]).unwrap();
    leak::no_pods_left(&node);
}

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

#[test]
fn last_words_come_from_the_file_or_for_a_failed_container_from_its_log() {
    let node = Node::start().unwrap();
    node.apply(&format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: words }}
spec:
  restartPolicy: Never
  securityContext: {{ runAsUser: 1000 }}
  containers:
    - name: file
      image: {BUSYBOX}
      command: ["sh", "-c", "echo noise; echo -n farewell > /dev/termination-log"]
    - name: elsewhere
      image: {BUSYBOX}
      command: ["sh", "-c", "echo -n there > /tmp/words; exit 1"]
      terminationMessagePath: /tmp/words
    - name: log
      image: {BUSYBOX}
      command: ["sh", "-c", "echo first; echo 'no such thing' >&2; exit 2"]
      terminationMessagePolicy: FallbackToLogsOnError
    - name: silent
      image: {BUSYBOX}
      command: ["sh", "-c", "echo all is well"]
      terminationMessagePolicy: FallbackToLogsOnError
"#
    ))
    .unwrap();
    node.wait_for("pod/words", "jsonpath={.status.phase}=Failed").unwrap();
    let message = |name: &str| {
        let status = format!(".status.containerStatuses[?(@.name==\"{name}\")]");
        let path = format!("jsonpath={{{status}.state.terminated.message}}");
        node.kubectl(&["get", "pod", "words", "-o", &path]).unwrap()
    };
    assert_eq!(message("file"), "farewell");
    assert_eq!(message("elsewhere"), "there");
    let log = message("log");
    assert!(log.contains("first\n") && log.contains("no such thing\n"), "{log}");
    assert_eq!(message("silent"), "");
    node.kubectl(&["delete", "pod", "words"]).unwrap();
    leak::no_pods_left(&node);
}

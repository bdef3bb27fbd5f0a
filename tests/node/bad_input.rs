//! What a user gets wrong is named, and nothing else suffers.

use std::fs;
use std::process::Command;

use keelson_tests::node::{BUSYBOX, Node, program, until};

fn pod(name: &str, image: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: {name} }}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{{ name: main, image: "{image}", command: ["sleep", "1000"] }}]
"#
    )
}

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name} }}\nspec: {{ type: NodePort, \
         ports: [{{ port: 80, nodePort: {port} }}] }}\n"
    )
}

#[track_caller]
fn refused(result: anyhow::Result<String>, words: &[&str]) {
    let error = format!("{:#}", result.unwrap_err());
    for word in words {
        assert!(error.contains(word), "{word:?} is not in: {error}");
    }
}

#[test]
fn wrong_objects_are_refused_with_the_field_that_is_wrong() {
    let node = Node::start().unwrap();
    let unknown = pod("odd", BUSYBOX).replace("containers:", "containerz: 1\n  containers:");
    refused(node.apply(&unknown), &["containerz"]);
    let no_image = pod("odd", BUSYBOX).replace(&format!("image: \"{BUSYBOX}\","), "");
    refused(node.apply(&no_image), &["spec.containers[0].image", "Required value"]);
    refused(node.apply(&pod("Not A Name", BUSYBOX)), &["Not A Name", "metadata.name"]);
    refused(node.apply("apiVersion: v1\nkind: Gadget\nmetadata: { name: x }\n"), &["Gadget"]);
    node.apply(&service("first", 30200)).unwrap();
    refused(node.apply(&service("second", 30200)), &["30200", "already allocated"]);
    refused(node.apply(&service("third", 99)), &["99", "valid"]);
}

#[test]
fn a_pod_that_cannot_run_says_why_and_the_others_run() {
    let node = Node::start().unwrap();
    node.apply(&pod("good", BUSYBOX)).unwrap();
    node.apply(&pod("gone", "localhost:1/nothing/here:1")).unwrap();
    node.apply(&pod("name", "UPPER/case")).unwrap();
    node.wait_for("pod/good", "condition=Ready").unwrap();
    let reason = |name: &str| {
        let path = "jsonpath={.status.containerStatuses[0].state.waiting.reason}: \
                    {.status.containerStatuses[0].state.waiting.message}";
        node.kubectl(&["get", "pod", name, "-o", path]).unwrap()
    };
    until("the image cannot be pulled", || {
        let text = reason("gone");
        (text.contains("Pull") && text.contains("localhost:1/nothing/here:1"))
            .then_some(())
            .ok_or(text)
    });
    until("the name is none", || {
        let text = reason("name");
        text.contains("InvalidImageName").then_some(()).ok_or(text)
    });
}

#[test]
fn a_bad_static_manifest_is_named_and_the_good_one_runs() {
    let node = Node::start().unwrap();
    let manifests = node.state_dir().join("manifests");
    fs::write(manifests.join("bad.yaml"), "apiVersion: v1\nkind: Pod\nspec: {containers: 7}\n")
        .unwrap();
    fs::write(manifests.join("good.yaml"), pod("static", BUSYBOX)).unwrap();
    until("the static pod's mirror is Ready", || {
        let pods = node
            .kubectl(&["get", "pod", "static-node", "--no-headers"])
            .map_err(|e| format!("{e:#}"))?;
        pods.contains("1/1").then_some(()).ok_or(pods)
    });
    until("the bad manifest is in the log", || {
        let log = node.log();
        log.contains("bad.yaml").then_some(()).ok_or(log)
    });
    fs::remove_file(manifests.join("good.yaml")).unwrap();
    until("the static pod is gone", || {
        let pods = node.kubectl(&["get", "pods", "--no-headers"]).map_err(|e| format!("{e:#}"))?;
        pods.is_empty().then_some(()).ok_or(pods)
    });
}

#[test]
fn an_exhausted_address_pool_is_an_event_and_heals() {
    let node = Node::start_with_flags(&["--pod-cidrs", "10.9.0.0/30"]).unwrap();
    for name in ["one", "two", "three"] {
        node.apply(&pod(name, BUSYBOX)).unwrap();
    }
    until("one pod waits for an address", || {
        let events = node.kubectl(&["get", "events"]).unwrap();
        events.contains("no free address is left in 10.9.0.0/30").then_some(()).ok_or(events)
    });
    let running = |wanted: usize| {
        until("pods run", || {
            let pods = node.kubectl(&["get", "pods", "--no-headers"]).unwrap();
            (pods.matches("Running").count() == wanted).then_some(()).ok_or(pods)
        });
    };
    running(2);
    let pods = node.kubectl(&["get", "pods", "--no-headers"]).unwrap();
    let victim =
        pods.lines().find(|line| line.contains("Running")).and_then(|line| line.split(' ').next());
    node.kubectl(&["delete", "pod", victim.unwrap()]).unwrap();
    running(2);
}

#[test]
fn a_second_node_of_the_same_name_or_port_is_told_who_is_first() {
    let node = Node::start().unwrap();
    let keelson = program("keelson").unwrap();
    let output = Command::new(&keelson).args(["up", "--name", node.name()]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("running already"), "{text}");
    let output = Command::new(&keelson).args(["up", "--name", "Bad/Name"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("lower-case"), "{text}");
}

//! Services as a user sees them, from a pod, from the node and from outside.

use std::process::Command;

use keelson_tests::leak;
use keelson_tests::node::{BUSYBOX, Node, read, until};
use nix::sys::signal::Signal;

#[test]
fn a_cluster_ip_and_a_node_port_answer_from_everywhere() {
    let node = Node::start().unwrap();
    let httpd = httpd("hostname");
    node.apply(&format!(
        r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: web }}
spec:
  replicas: 2
  selector: {{ matchLabels: {{ app: web }} }}
  template:
    metadata: {{ labels: {{ app: web }} }}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{httpd}]
---
apiVersion: v1
kind: Service
metadata: {{ name: web }}
spec:
  type: NodePort
  ipFamilyPolicy: PreferDualStack
  selector: {{ app: web }}
  ports: [{{ port: 80, targetPort: http, nodePort: 30123 }}]
---
apiVersion: v1
kind: Pod
metadata: {{ name: client }}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{{ name: main, image: "{BUSYBOX}", command: ["sleep", "1000"] }}]
"#
    ))
    .unwrap();
    node.kubectl(&["rollout", "status", "deployment/web", "--timeout=90s"]).unwrap();
    node.wait_for("pod/client", "condition=Ready").unwrap();
    let cluster_ips =
        node.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIPs[*]}"]).unwrap();
    let addresses = r#"jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}"#;
    let node_ips = node.kubectl(&["get", "nodes", "-o", addresses]).unwrap();
    for ip in cluster_ips.split(' ') {
        let fetch = fetch(ip, 80);
        answers(&mut node.kubectl_command(&["exec", "client", "--", "sh", "-c", &fetch]));
        answers(node.on_node("busybox").args(["sh", "-c", &fetch]));
    }
    for ip in node_ips.split(' ') {
        let fetch = fetch(ip, 30123);
        answers(&mut node.kubectl_command(&["exec", "client", "--", "sh", "-c", &fetch]));
        answers(node.on_node("busybox").args(["sh", "-c", &fetch]));
        answers(node.outside("busybox").args(["sh", "-c", &fetch]));
    }
}

/// What the proxy of a node says on `/metrics`, as soon as it runs.
fn metrics(node: &Node) -> String {
    let ask = fetch_path("127.0.0.1", 10249, "/metrics");
    let mut text = String::new();
    until("the proxy has all Services in force", || {
        text =
            read(node.on_node("busybox").args(["sh", "-c", &ask])).map_err(|e| format!("{e:#}"))?;
        let in_force = text.contains("kubeproxy_sync_proxy_rules_last_timestamp_seconds{");
        // The server may end a connection early whose client has said everything.
        if in_force && text.ends_with("# EOF\n") { Ok(()) } else { Err(text.clone()) }
    });
    text
}

/// What the proxy has counted of the Service `web`: connections, packets.
fn traffic(node: &Node) -> [u64; 2] {
    let text = metrics(node);
    ["connections", "packets"].map(|what| {
        let start =
            format!("keelson_proxy_service_{what}_total{{namespace=\"default\",service=\"web\"");
        let line = text.lines().find(|line| line.starts_with(&start));
        line.map_or(0, |line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
    })
}

#[test]
fn in_mode_ebpf_a_pod_can_have_its_sockets_left_alone() {
    let mut node = Node::start_with_flags(&[
        "--proxy-mode",
        "ebpf",
        "--socket-exempt-runtime-classes",
        "vm,other",
    ])
    .unwrap();
    let client = |name: &str, annotations: &str, class: &str| {
        format!(
            r#"
---
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, annotations: {{ {annotations} }} }}
spec:
  {class}
  terminationGracePeriodSeconds: 0
  containers: [{{ name: main, image: "{BUSYBOX}", command: ["sleep", "1000"] }}]
"#
        )
    };
    let httpd = httpd("echo web-1");
    node.apply(
        &(format!(
            r#"
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {{ name: vm }}
handler: runc
---
apiVersion: v1
kind: Pod
metadata: {{ name: web, labels: {{ app: web }} }}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{httpd}]
---
apiVersion: v1
kind: Service
metadata: {{ name: web }}
spec:
  selector: {{ app: web }}
  clusterIP: 10.96.0.77
  ports: [{{ port: 80, targetPort: http }}]
"#
        ) + &client("usual", "", "")
            + &client("asked", "keelson.io/socket-lb: disabled", "")
            + &client("classed", "", "runtimeClassName: vm")),
    )
    .unwrap();
    let pods = ["web", "usual", "asked", "classed"];
    for pod in pods {
        node.wait_for(&format!("pod/{pod}"), "condition=Ready").unwrap();
    }
    let fetch = fetch("10.96.0.77", 80);
    until("the Service is in force", || {
        let page = read(&mut node.kubectl_command(&["exec", "usual", "--", "sh", "-c", &fetch]));
        page.map(drop).map_err(|error| error.to_string())
    });
    let ask = |node: &Node, pod: &str| {
        let [connections, packets] = traffic(node);
        answers(&mut node.kubectl_command(&["exec", pod, "--", "sh", "-c", &fetch]));
        let [more_connections, more_packets] = traffic(node);
        assert_eq!(more_connections, connections + 1, "{pod}");
        more_packets > packets
    };
    let by_packets = |node: &Node| ["usual", "asked", "classed"].map(|pod| ask(node, pod));
    assert_eq!(by_packets(&node), [false, true, true]);
    // It outlives both who asked for it and who knows of it.
    node.end_keelson(Signal::SIGKILL).unwrap();
    node.launch().unwrap();
    assert_eq!(by_packets(&node), [false, true, true]);
    let marks = node.run_dir().join("socket-exempt");
    assert_eq!(std::fs::read_dir(&marks).unwrap().count(), 2);
    for pod in pods {
        node.kubectl(&["delete", "pod", pod]).unwrap();
    }
    leak::no_pods_left(&node);
    assert_eq!(std::fs::read_dir(&marks).unwrap().count(), 0);
    let name = node.name().to_owned();
    node.stop().unwrap();
    leak::nothing_left_of(&name).unwrap();
}

/// A container that serves what `page` prints, at its port `http`.
fn httpd(page: &str) -> String {
    format!(
        r#"{{ name: httpd, image: "{BUSYBOX}", ports: [{{ name: http, containerPort: 8080 }}],
          command: ["sh", "-c", "{page} > /www/index.html; exec httpd -f -p 8080 -h /www"],
          readinessProbe: {{ httpGet: {{ path: /, port: http }}, periodSeconds: 1 }} }}"#
    )
}

fn answers(command: &mut Command) {
    let page = read(command).unwrap();
    assert!(page.contains("\r\n\r\nweb-"), "{page}");
}

fn fetch(host: &str, port: u16) -> String {
    fetch_path(host, port, "/")
}

/// Debian's static busybox has a wget that crashes on answers; its nc does not.
fn fetch_path(host: &str, port: u16, path: &str) -> String {
    format!(r"printf 'GET {path} HTTP/1.0\r\n\r\n' | busybox nc -w 5 {host} {port}")
}

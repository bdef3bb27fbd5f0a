//! Services as a user sees them, from a pod, from the node and from outside.

use std::process::Command;

use keelson_tests::node::{BUSYBOX, Node, read};

#[test]
fn a_cluster_ip_and_a_node_port_answer_from_everywhere() {
    let node = Node::start().unwrap();
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
      containers:
        - name: httpd
          image: {BUSYBOX}
          command: ["sh", "-c", "hostname > /www/index.html; exec httpd -f -p 8080 -h /www"]
          ports: [{{ name: http, containerPort: 8080 }}]
          readinessProbe: {{ httpGet: {{ path: /, port: http }}, periodSeconds: 1 }}
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

fn answers(command: &mut Command) {
    let page = read(command).unwrap();
    assert!(page.contains("\r\n\r\nweb-"), "{page}");
}

/// Debian's static busybox has a wget that crashes on answers; its nc does not.
fn fetch(host: &str, port: u16) -> String {
    format!(r"printf 'GET / HTTP/1.0\r\n\r\n' | busybox nc -w 5 {host} {port}")
}

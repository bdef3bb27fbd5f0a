//! What an honest user runs on the node, and what it must not lose.

use keelson_tests::node::{BUSYBOX, Node};
use keelson_tests::probe::Probe;

use crate::yaml_text;

/// A web server of two replicas behind a Service, a pod that asks it through its ClusterIP, and a caller outside that
/// asks through its node port.
pub(crate) struct Ordinary {
    caller: Probe,
}

const NODE_PORT: &str = "198.18.0.2:30123";

impl Ordinary {
    pub(crate) fn start(node: &Node) -> Ordinary {
        node.apply(&manifest()).unwrap();
        node.kubectl(&["rollout", "status", "deployment/web", "--timeout=90s"]).unwrap();
        node.wait_for("pod/client", "condition=Ready").unwrap();
        let outside = format!("{}-outside", node.name());
        let address = NODE_PORT.parse().unwrap();
        Ordinary { caller: Probe::of_new_connections(&outside, address, "ordinary") }
    }

    /// The node still does its work: a pod that comes now gets its turn.
    pub(crate) fn a_new_pod_starts(&self, node: &Node) {
        node.apply(&pod("late", "exec sleep 1000")).unwrap();
        node.wait_for("pod/late", "condition=Ready").unwrap();
        assert_eq!(node.kubectl(&["exec", "late", "--", "echo", "works"]).unwrap(), "works\n");
    }

    pub(crate) fn lost_nothing(self, node: &Node) {
        let seen = self.caller.end().unwrap();
        println!("node port, from outside: {seen:?}");
        assert!(seen.answered > 100 && seen.lost == 0, "{seen:?}");
        let counts = node.kubectl(&["exec", "client", "--", "cat", "/tmp/counts"]).unwrap();
        println!("ClusterIP, from a pod: {counts}");
        assert!(counts.trim_end().ends_with(" 0 lost"), "{counts}");
        let restarts = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
        let restarts =
            node.kubectl(&["get", "pods", "-l", "kind=ordinary", "-o", restarts]).unwrap();
        assert_eq!(restarts, "0 0 0 0");
    }
}

fn pod(name: &str, script: &str) -> String {
    let script = yaml_text(script);
    format!(
        r#"
---
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, labels: {{ kind: ordinary }} }}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{{ name: main, image: "{BUSYBOX}", command: ["sh", "-c", {script}] }}]
"#
    )
}

fn manifest() -> String {
    let web = format!(
        r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: web }}
spec:
  replicas: 2
  selector: {{ matchLabels: {{ app: web }} }}
  template:
    metadata: {{ labels: {{ app: web, kind: ordinary }} }}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: httpd
          image: {BUSYBOX}
          ports: [{{ name: http, containerPort: 8080 }}]
          command: ["sh", "-c", "echo ordinary > /www/index.html; exec httpd -f -p 8080 -h /www"]
          readinessProbe: {{ httpGet: {{ path: /, port: http }}, periodSeconds: 1 }}
          livenessProbe: {{ httpGet: {{ path: /, port: http }}, periodSeconds: 2, timeoutSeconds: 10 }}
---
apiVersion: v1
kind: Service
metadata: {{ name: web }}
spec:
  type: NodePort
  clusterIP: 10.96.0.80
  selector: {{ app: web }}
  ports: [{{ port: 80, targetPort: http, nodePort: 30123 }}]
"#
    );
    // The first answer may come before the Service is in force; requests count from then on.
    let ask = r#"
      ask() { printf "GET / HTTP/1.0\r\n\r\n" | nc -w 10 10.96.0.80 80 | grep -q ordinary; }
      until ask; do usleep 100000; done
      good=0; lost=0
      while :; do
        if ask; then good=$((good+1)); else lost=$((lost+1)); fi
        echo "$good answered, $lost lost" > /tmp/counts.new; mv /tmp/counts.new /tmp/counts
        usleep 20000
      done"#;
    web + &pod("client", ask)
}

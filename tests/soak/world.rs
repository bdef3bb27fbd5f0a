//! What runs on the node while things go wrong.

use anyhow::{Context, Result};
use keelson_tests::leak;
use keelson_tests::node::{BUSYBOX, Node, until};
use keelson_tests::probe::{Counts, Probe};

use crate::faults::Random;

const PAGES: &str = "198.18.0.2:30123";
const ECHO: &str = "198.18.0.2:30124";

/// The steady pods, which must notice nothing, and their callers.
pub(crate) struct World {
    new: Probe,
    kept: Probe,
    containers: String,
}

/// What was lost.
pub(crate) struct Lost {
    /// Connections from outside through a node port, a new one each time.
    pub(crate) new: Counts,
    /// One connection from outside through a node port.
    pub(crate) kept: Counts,
    /// Connections of a pod through a ClusterIP, a new one each time.
    pub(crate) cluster_ip: Counts,
    /// Restarted or replaced containers of pods that nothing was done to.
    pub(crate) restarts: u64,
    /// Whether something of deleted pods was left.
    pub(crate) leaks: u64,
}

impl Lost {
    pub(crate) fn sum(&self) -> u64 {
        self.new.lost + self.kept.lost + self.cluster_ip.lost + self.restarts + self.leaks
    }
}

impl World {
    pub(crate) fn start(node: &Node) -> Result<World> {
        node.apply(&manifest())?;
        for name in ["web", "echo", "client", "victim"] {
            let deployment = format!("deployment/{name}");
            node.kubectl(&["rollout", "status", &deployment, "--timeout=90s"])?;
        }
        let outside = format!("{}-outside", node.name());
        let new = Probe::of_new_connections(&outside, PAGES.parse()?, "steady");
        let kept = Probe::of_one_connection(&outside, ECHO.parse()?);
        Ok(World { new, kept, containers: containers(node)? })
    }

    /// Connections from outside that were lost until now.
    pub(crate) fn lost_outside(&self) -> u64 {
        self.new.counts().lost + self.kept.counts().lost
    }

    /// Pods come and go.
    pub(crate) fn change(&self, node: &Node, random: &mut Random) -> Result<()> {
        let text = churn(random.below(4), random.below(3));
        // Without a control plane, or on a full disk, the change is lost, as it would be for a user.
        drop(node.apply(&text));
        Ok(())
    }

    pub(crate) fn end(self, node: &Node) -> Result<Lost> {
        let last = node.kubectl(&["delete", "deployment", "churn", "victim", "--ignore-not-found"]);
        last.context("the node does not answer at the end")?;
        until("only the steady pods are left", || {
            let pods = node.kubectl(&["get", "pods", "--no-headers"]).map_err(|e| e.to_string())?;
            let steady = pods.lines().filter(|l| l.contains("1/1") && l.contains("Running"));
            if steady.count() == 4 && pods.lines().count() == 4 { Ok(()) } else { Err(pods) }
        });
        let (new, kept) = (self.new.end()?, self.kept.end()?);
        let mut counts = String::new();
        until("exec works at the end", || {
            let read = ["exec", "deployment/client", "--", "cat", "/tmp/counts"];
            counts = node.kubectl(&read).map_err(|error| format!("{error:#}"))?;
            Ok(())
        });
        let cluster_ip = parse(&counts);
        let restarts = u64::from(containers(node)? != self.containers);
        node.kubectl(&["delete", "deployment,service", "--all"])?;
        until("no pods", || {
            let pods = node.kubectl(&["get", "pods", "--no-headers"]).map_err(|e| e.to_string())?;
            if pods.is_empty() { Ok(()) } else { Err(pods) }
        });
        let left = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            leak::no_pods_left(node);
        }));
        Ok(Lost { new, kept, cluster_ip, restarts, leaks: u64::from(left.is_err()) })
    }
}

/// The steady pods' containers with their restarts.
fn containers(node: &Node) -> Result<String> {
    let path = "jsonpath={range .items[*]}{.metadata.name} \
        {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}{\"\\n\"}{end}";
    node.kubectl(&["get", "pods", "-l", "kind=steady", "-o", path])
}

fn parse(counts: &str) -> Counts {
    let mut numbers = counts.split_whitespace().filter_map(|word| word.parse().ok());
    Counts { answered: numbers.next().unwrap_or(0), lost: numbers.next().unwrap_or(1) }
}

fn deployment(name: &str, replicas: u64, labels: &str, container: &str) -> String {
    format!(
        r#"
---
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: {name} }}
spec:
  replicas: {replicas}
  selector: {{ matchLabels: {{ app: {name} }} }}
  template:
    metadata: {{ labels: {{ app: {name}, {labels} }} }}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{{ name: main, image: "{BUSYBOX}", {container} }}]
"#
    )
}

fn shell(script: &str) -> String {
    format!(r#"command: ["sh", "-c", {}]"#, serde_json::Value::from(script))
}

fn churn(replicas: u64, version: u64) -> String {
    deployment("churn", replicas, &format!("version: v{version}"), &shell("exec sleep 100000"))
}

fn service(name: &str, address: &str, port: u16, node_port: u16) -> String {
    format!(
        r#"
---
apiVersion: v1
kind: Service
metadata: {{ name: {name} }}
spec:
  type: NodePort
  clusterIP: {address}
  selector: {{ app: {name} }}
  ports: [{{ port: {port}, nodePort: {node_port} }}]
"#
    )
}

fn manifest() -> String {
    let steady = "kind: steady";
    let probe = "readinessProbe: { tcpSocket: { port: 80 }, periodSeconds: 1 }";
    let web = shell("echo steady > /www/index.html; exec httpd -f -p 80 -h /www");
    let echo = shell("exec nc -ll -p 80 -e cat");
    let ask = r#"
      ask() { printf "GET / HTTP/1.0\r\n\r\n" | nc -w 10 10.96.0.80 80 | grep -q steady; }
      until ask; do usleep 100000; done
      good=0; lost=0
      while :; do
        if ask; then good=$((good+1)); else lost=$((lost+1)); fi
        echo "$good $lost" > /tmp/counts.new; mv /tmp/counts.new /tmp/counts
        usleep 20000
      done"#;
    [
        deployment("web", 2, steady, &format!("{web}, {probe}")),
        // One replica: a kept connection stays where it is.
        deployment("echo", 1, steady, &echo),
        deployment("client", 1, steady, &shell(ask)),
        deployment("victim", 1, "kind: victim", &shell("exec sleep 100000")),
        service("web", "10.96.0.80", 80, 30123),
        service("echo", "10.96.0.81", 80, 30124),
    ]
    .concat()
}

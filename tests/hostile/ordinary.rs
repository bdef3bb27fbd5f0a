//! What an honest user runs on the node, and what it must not lose.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use keelson_tests::netns;
use keelson_tests::node::{BUSYBOX, Node};

use crate::yaml_text;

/// A web server of two replicas behind a Service, a pod that asks it through its ClusterIP, and a caller outside that
/// asks through its node port.
pub(crate) struct Ordinary {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    lost: Arc<AtomicU64>,
    caller: JoinHandle<Result<()>>,
}

const NODE_PORT: &str = "198.18.0.2:30123";
const LIMIT: Duration = Duration::from_secs(10);

impl Ordinary {
    pub(crate) fn start(node: &Node) -> Ordinary {
        node.apply(&manifest()).unwrap();
        node.kubectl(&["rollout", "status", "deployment/web", "--timeout=90s"]).unwrap();
        node.wait_for("pod/client", "condition=Ready").unwrap();
        let (stop, answered, lost) = (Arc::default(), Arc::default(), Arc::default());
        let caller = {
            let (stop, answered, lost) =
                (Arc::clone(&stop), Arc::clone(&answered), Arc::clone(&lost));
            netns::spawn_in(&format!("{}-outside", node.name()), move || {
                ask_until(&stop, &answered, &lost);
                Ok(())
            })
        };
        Ordinary { stop, answered, lost, caller }
    }

    /// The node still does its work: a pod that comes now gets its turn.
    pub(crate) fn a_new_pod_starts(&self, node: &Node) {
        node.apply(&pod("late", "exec sleep 1000")).unwrap();
        node.wait_for("pod/late", "condition=Ready").unwrap();
        assert_eq!(node.kubectl(&["exec", "late", "--", "echo", "works"]).unwrap(), "works\n");
    }

    pub(crate) fn lost_nothing(self, node: &Node) {
        self.stop.store(true, Ordering::Relaxed);
        self.caller.join().unwrap().unwrap();
        let (answered, lost) =
            (self.answered.load(Ordering::Relaxed), self.lost.load(Ordering::Relaxed));
        println!("node port, from outside: {answered} requests answered, {lost} lost");
        assert!(answered > 100 && lost == 0, "{answered} answered, {lost} lost");
        let counts = node.kubectl(&["exec", "client", "--", "cat", "/tmp/counts"]).unwrap();
        println!("ClusterIP, from a pod: {counts}");
        assert!(counts.trim_end().ends_with(" 0 lost"), "{counts}");
        let restarts = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
        let restarts =
            node.kubectl(&["get", "pods", "-l", "kind=ordinary", "-o", restarts]).unwrap();
        assert_eq!(restarts, "0 0 0 0");
    }
}

fn ask_until(stop: &AtomicBool, answered: &AtomicU64, lost: &AtomicU64) {
    let address: SocketAddr = NODE_PORT.parse().unwrap();
    while !stop.load(Ordering::Relaxed) {
        let counter = if page(&address).is_ok_and(|page| page.contains("ordinary")) {
            answered
        } else {
            lost
        };
        counter.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn page(address: &SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
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

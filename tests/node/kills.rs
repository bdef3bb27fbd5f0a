//! keelson, containerd and shims are killed at any moment; the state asked for is reached all the same.

use std::fs;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use keelson_tests::leak;
use keelson_tests::node::{BUSYBOX, Node, read, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A few by default, so that the lane stays short; `KEELSON_KILL_ROUNDS=200` is the long run.
fn rounds() -> u32 {
    std::env::var("KEELSON_KILL_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12)
}

/// Small and seeded by the clock; the seed is printed with a failure.
struct Random(u64);

impl Random {
    fn new() -> Random {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let seed = u64::try_from(now % u128::from(u64::MAX)).unwrap() | 1;
        eprintln!("seed {seed}");
        Random(seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn deployment(replicas: u64, version: u64) -> String {
    format!(
        r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: app }}
spec:
  replicas: {replicas}
  selector: {{ matchLabels: {{ app: app }} }}
  template:
    metadata: {{ labels: {{ app: app, version: "v{version}" }} }}
    spec:
      terminationGracePeriodSeconds: 0
      initContainers: [{{ name: init, image: "{BUSYBOX}", command: ["true"] }}]
      containers: [{{ name: main, image: "{BUSYBOX}", command: ["sleep", "100000"] }}]
"#
    )
}

#[test]
fn keelson_is_killed_at_random_moments_of_start_update_and_delete() {
    let mut node = Node::start().unwrap();
    let mut random = Random::new();
    for round in 0..rounds() {
        let (replicas, version) = (random.below(4), random.below(3));
        node.apply(&deployment(replicas, version)).unwrap();
        // Anything from before the first action to after the last.
        std::thread::sleep(Duration::from_millis(random.below(600)));
        node.end_keelson(Signal::SIGKILL).unwrap();
        node.launch().unwrap_or_else(|e| panic!("round {round}: {e:#}"));
    }
    node.apply(&deployment(3, 9)).unwrap();
    node.kubectl(&["rollout", "status", "deployment/app", "--timeout=120s"]).unwrap();
    until("three pods of the last version", || {
        let pods = node.kubectl(&["get", "pods", "--no-headers", "-L", "version"]).unwrap();
        let good = pods
            .lines()
            .filter(|l| l.contains("1/1") && l.contains("Running") && l.ends_with("v9"))
            .count();
        (good == 3 && pods.lines().count() == 3).then_some(()).ok_or(pods)
    });
    node.kubectl(&["delete", "deployment", "app"]).unwrap();
    until("no pods", || {
        let pods = node.kubectl(&["get", "pods", "--no-headers"]).unwrap();
        if pods.is_empty() { Ok(()) } else { Err(pods) }
    });
    leak::no_pods_left(&node);
}

#[test]
fn a_killed_containerd_comes_back_and_its_containers_never_stopped() {
    let node = Node::start().unwrap();
    node.apply(&deployment(2, 1)).unwrap();
    node.kubectl(&["rollout", "status", "deployment/app", "--timeout=90s"]).unwrap();
    let ids = "jsonpath={.items[*].status.containerStatuses[0].containerID}";
    let before = node.kubectl(&["get", "pods", "-o", ids]).unwrap();
    let pid_file = node.run_dir().join("containerd/containerd.pid");
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    // A pod made now needs the new containerd.
    node.apply(&deployment(3, 1)).unwrap();
    node.kubectl(&["rollout", "status", "deployment/app", "--timeout=90s"]).unwrap();
    let after = node.kubectl(&["get", "pods", "-o", ids]).unwrap();
    for id in before.split(' ') {
        assert!(after.contains(id), "{id} is not among {after}");
    }
    let restarts = "jsonpath={.items[*].status.containerStatuses[0].restartCount}";
    assert_eq!(node.kubectl(&["get", "pods", "-o", restarts]).unwrap(), "0 0 0");
}

#[test]
fn a_killed_shim_costs_one_restart_of_its_pod_and_nothing_else() {
    let node = Node::start().unwrap();
    node.apply(&deployment(1, 1)).unwrap();
    node.kubectl(&["rollout", "status", "deployment/app", "--timeout=90s"]).unwrap();
    let socket = node.containerd_socket().display().to_string();
    let shims =
        read(Command::new("pgrep").args(["-f", &format!("containerd-shim.*{socket}")])).unwrap();
    for pid in shims.lines() {
        kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
    }
    until("the pod runs again", || {
        let pods = node.kubectl(&["get", "pods", "--no-headers"]).unwrap();
        let again = pods
            .lines()
            .any(|l| l.contains("1/1") && l.contains("Running") && !l.contains("  0  "));
        if again { Ok(()) } else { Err(pods) }
    });
    node.kubectl(&["delete", "deployment", "app"]).unwrap();
    leak::no_pods_left(&node);
}

//! What all containers of a pod share, and the process that holds it.

use std::fs;

use keelson_tests::leak;
use keelson_tests::node::{BUSYBOX, Node, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The pause processes of the node's pods.
fn pauses(node: &Node) -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
            read("comm").is_ok_and(|name| name.trim() == "pause")
                && read("cgroup").is_ok_and(|cgroup| cgroup.contains(node.name()))
        })
        .collect()
}

fn pod(name: &str, spec: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: {name} }}
spec:
  terminationGracePeriodSeconds: 0
  containers:
    - {{ name: one, image: "{BUSYBOX}", command: ["sleep", "1111"] }}
    - {{ name: two, image: "{BUSYBOX}", command: ["sleep", "2222"] }}
{spec}
"#
    )
}

#[test]
fn pause_holds_the_pods_namespaces_without_any_privilege() {
    let node = Node::start().unwrap();
    node.apply(&pod("plain", "")).unwrap();
    node.wait_for("pod/plain", "condition=Ready").unwrap();
    let pids = pauses(&node);
    let [pid] = pids[..] else { panic!("{pids:?}") };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!((field("Uid:"), field("Gid:")), ("65535".to_owned(), "65535".to_owned()));
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!((field("NoNewPrivs:").as_str(), field("SigBlk:").len()), ("1", 16));
    // Its own root, in which there is nothing else; nothing of the agent's is open.
    let names = |folder: &str| {
        let entries = fs::read_dir(format!("/proc/{pid}/{folder}")).unwrap().flatten();
        let mut names: Vec<_> = entries.map(|e| e.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!((names("root"), names("fd").len()), (vec!["pause".to_owned()], 3));

    for (namespace, shared) in [("net", true), ("ipc", true), ("uts", true), ("pid", false)] {
        let path = format!("/proc/self/ns/{namespace}");
        let inside =
            node.kubectl(&["exec", "plain", "-c", "one", "--", "readlink", &path]).unwrap();
        let held = fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_eq!(inside.trim() == held.to_str().unwrap(), shared, "{namespace}");
    }
    node.kubectl(&["delete", "pod", "plain"]).unwrap();
    leak::no_pods_left(&node);
    assert_eq!(pauses(&node), [0; 0]);
}

#[test]
fn with_a_shared_process_namespace_all_containers_live_under_pause() {
    let node = Node::start().unwrap();
    node.apply(&pod("shared", "  shareProcessNamespace: true")).unwrap();
    node.wait_for("pod/shared", "condition=Ready").unwrap();
    let exec = |command: &str| {
        node.kubectl(&["exec", "shared", "-c", "one", "--", "sh", "-c", command]).unwrap()
    };
    assert_eq!(exec("cat /proc/1/comm"), "pause\n");
    let processes = exec("ps");
    assert!(processes.contains("sleep 1111") && processes.contains("sleep 2222"), "{processes}");
    // An orphan becomes pause's child, and is reaped when it ends.
    exec("sh -c 'sleep 0.1 & exit' ; sleep 0.5");
    let zombies = exec("grep -l 'State:.Z' /proc/[0-9]*/status || true");
    assert_eq!(zombies, "");
    node.kubectl(&["delete", "pod", "shared"]).unwrap();
    leak::no_pods_left(&node);
}

#[test]
fn a_killed_pause_costs_one_restart_of_its_pod() {
    let node = Node::start().unwrap();
    node.apply(&pod("app", "")).unwrap();
    node.wait_for("pod/app", "condition=Ready").unwrap();
    let before = pauses(&node);
    kill(Pid::from_raw(before[0]), Signal::SIGKILL).unwrap();
    let restarts = "jsonpath={.status.containerStatuses[*].restartCount} {.status.phase}";
    until("the pod runs again", || {
        let state = node.kubectl(&["get", "pod", "app", "-o", restarts]).unwrap();
        if state == "1 1 Running" { Ok(()) } else { Err(state) }
    });
    node.wait_for("pod/app", "condition=Ready").unwrap();
    assert!(pauses(&node).len() == 1 && pauses(&node) != before);
    node.kubectl(&["delete", "pod", "app"]).unwrap();
    leak::no_pods_left(&node);
}

#[test]
fn sysctls_are_the_pods_own_and_those_of_the_node_are_refused() {
    let node = Node::start().unwrap();
    let with = |name: &str, value: &str| {
        format!("  securityContext: {{ sysctls: [{{ name: {name}, value: \"{value}\" }}] }}")
    };
    node.apply(&pod("tuned", &with("net.ipv4.ip_local_port_range", "20000 30000"))).unwrap();
    node.apply(&pod("greedy", &with("kernel.core_pattern", "/x"))).unwrap();
    node.apply(&pod("unsafe", &with("net.core.somaxconn", "4096"))).unwrap();
    node.wait_for("pod/unsafe", "jsonpath={.status.reason}=SysctlForbidden").unwrap();
    node.wait_for("pod/tuned", "condition=Ready").unwrap();
    let path = "/proc/sys/net/ipv4/ip_local_port_range";
    let inside = node.kubectl(&["exec", "tuned", "-c", "one", "--", "cat", path]).unwrap();
    assert_eq!(inside.split_whitespace().collect::<Vec<_>>(), ["20000", "30000"]);
    until("the other is refused", || {
        let pod = node.kubectl(&["describe", "pod", "greedy"]).unwrap();
        if pod.contains("kernel.core_pattern") && !pod.contains("Started container") {
            Ok(())
        } else {
            Err(pod)
        }
    });
    assert_ne!(fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap().trim(), "/x");
}

#[test]
fn a_pod_ends_wholly_although_its_network_was_renamed_or_removed_meanwhile() {
    let node = Node::start().unwrap();
    let folder = node.state_dir().join("cni/net.d");
    let list = fs::read_dir(&folder).unwrap().flatten().next().unwrap().path();
    let text = fs::read_to_string(&list).unwrap();
    let addresses = node.state_dir().join("cni/data");
    let held = || {
        let mut held = 0;
        for network in fs::read_dir(&addresses).unwrap().flatten() {
            let journal = fs::read_to_string(network.path().join("journal")).unwrap();
            held += journal.matches(r#""op":"take""#).count();
            held -= journal.matches(r#""op":"free""#).count();
        }
        held
    };
    for renamed in [true, false] {
        node.apply(&pod("app", "")).unwrap();
        node.wait_for("pod/app", "condition=Ready").unwrap();
        assert_eq!(held(), 1);
        fs::remove_file(&list).unwrap();
        if renamed {
            let other = text.replacen(r#""name": "keelson""#, r#""name": "other""#, 1);
            assert_ne!(other, text);
            fs::write(folder.join("00-other.conflist"), other).unwrap();
        }
        node.kubectl(&["delete", "pod", "app"]).unwrap();
        leak::no_pods_left(&node);
        assert_eq!(held(), 0, "renamed: {renamed}");
        fs::write(&list, &text).unwrap();
        if renamed {
            fs::remove_file(folder.join("00-other.conflist")).unwrap();
        }
    }
}

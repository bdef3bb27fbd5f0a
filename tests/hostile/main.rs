//! The hostile lane: pods, images, registries and callers that try to take a node down or to get out of a container, all
//! at once, while ordinary pods and Services do their work. At the end the ordinary ones have lost nothing, the node's
//! processes are the same with the memory of before, and no file of the machine has changed.
#![allow(clippy::unwrap_used, reason = "a test ends where something that it needs does not hold")]

mod callers;
mod host_files;
mod ordinary;
mod pods;
mod registry;

use std::fs;
use std::path::Path;

use keelson_tests::leak;
use keelson_tests::node::{Node, until};

/// The node's process may hold so much more at the end than before the attacks.
const MORE_MEMORY_KIB: u64 = 10 * 1024;

#[test]
fn hostile_pods_registries_and_callers_cost_the_others_nothing() {
    callers::raise_descriptor_limit();
    let node = Node::start().unwrap();
    let files_before = host_files::manifest();
    let ordinary = ordinary::Ordinary::start(&node);
    let before = Process::of(&node);

    let registry = registry::Hostile::start();
    let pulls = registry::Pulls::start(&node, &registry);
    let pods = pods::start(&node);
    callers::wrong_bodies(&node);
    callers::patch_bombs(&node);
    let silent = callers::SilentConnections::open(&node);
    callers::vanishing_streams(&node);
    pods::config_changes_reach(&node);
    ordinary.a_new_pod_starts(&node);
    pulls.an_ordinary_pull_is_not_delayed(&node);
    silent.leave_the_node_usable(&node);
    pods.end(&node);
    pulls.end(&node);

    ordinary.lost_nothing(&node);
    before.is_still_there_with_its_memory(&node);
    assert_eq!(host_files::changes(&files_before), Vec::<String>::new());
    node.kubectl(&["delete", "deployment,pod,service", "--all", "--wait"]).unwrap();
    leak::no_pods_left(&node);
    node.stop().unwrap();
}

/// keelson's own process.
struct Process {
    pid: u32,
    resident_kib: u64,
}

impl Process {
    fn of(node: &Node) -> Process {
        let pid = node.pid().unwrap();
        Process { pid, resident_kib: resident_kib(pid) }
    }

    fn is_still_there_with_its_memory(&self, node: &Node) {
        assert_eq!(node.pid(), Some(self.pid));
        until("the node's memory is that of before", || {
            let now = resident_kib(self.pid);
            let text = format!("{} KiB before, {now} KiB now", self.resident_kib);
            if now <= self.resident_kib + MORE_MEMORY_KIB { Ok(()) } else { Err(text) }
        });
        let log = node.whole_log();
        assert!(!log.contains("Internal error"), "a task panicked:\n{log}");
    }
}

fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"));
    let status = status.unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A script as one scalar of a manifest: what JSON quotes, YAML reads.
fn yaml_text(script: &str) -> String {
    serde_json::Value::from(script).to_string()
}

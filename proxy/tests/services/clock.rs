//! The node's clock is set while the proxy runs. What the proxy decides is tested with made-up clocks beside
//! its engine; here it is the kernel's, with what the kernel makes of it.

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::stage::*;
use crate::world::{endpoint, eventually, node_object, service, spec, with_proxy};

rows![setting_the_nodes_clock_changes_nothing,];

/// Sets the clock, and sets it back in the end.
struct Clock {
    moved: i64,
}

impl Clock {
    fn jump(&mut self, secs: i64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let to = i64::try_from(now).unwrap() + secs;
        assert!(Command::new("date").args(["-s", &format!("@{to}")]).status().unwrap().success());
        self.moved += secs;
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.jump(-self.moved);
    }
}

fn setting_the_nodes_clock_changes_nothing(mode: Mode) {
    const DAY: i64 = 24 * 60 * 60;
    if std::env::var_os("KEELSON_TEST_OWN_MACHINE").is_none() {
        skip("this machine's clock is not ours to set");
    }
    let mut node = Node::new(mode);
    node.backend = None;
    let client = node.pod("client", 10);
    let _pods: Vec<Pod> =
        (2..6).map(|number| node.pod(&format!("p{number}"), number).serving("TCP", 8080)).collect();
    let folder = tempfile::tempdir().unwrap();
    let sticky = with(spec("10.96.0.1", 30080), json!({"sessionAffinity": "ClientIP"}));
    let mut four = endpoint("web", "10.66.0.2");
    four["endpoints"] = (2..6)
        .map(|number| json!({"addresses": [format!("10.66.0.{number}")], "nodeName": "here"}))
        .collect();
    let lists = json!({
        "services": [service("web", sticky), service("other", spec("10.96.0.2", 30081))],
        "endpointslices": [four, endpoint("other", "10.66.0.2")],
        "nodes": [node_object()],
    });
    with_proxy(&node, lists, folder.path(), |world| {
        let first = servers(&client.namespace, "10.96.0.1:80", 3);
        assert_eq!(first.len(), 1);
        let mut clock = Clock { moved: 0 };
        for (round, jump) in [DAY, -2 * DAY, DAY].into_iter().enumerate() {
            clock.jump(jump);
            assert_eq!(servers(&client.namespace, "10.96.0.1:80", 8), first, "still sticks");
            for path in ["/healthz", "/livez", "/readyz"] {
                let answer = node.namespace.get("127.0.0.1:10256", path);
                assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
            }
            let name = format!("p{}", round + 3);
            let moved = endpoint("other", &format!("10.66.0.{}", round + 3));
            world.tell("endpointslices", "MODIFIED", moved);
            eventually("a change is in force", || {
                let answer = client.namespace.tcp("10.96.0.2:80").unwrap();
                (answer.server == name).then_some(())
            });
        }
        let text = node.namespace.get("127.0.0.1:10249", "/metrics");
        for line in text.lines().filter(|line| line.contains("duration_seconds_sum")) {
            assert!(!line.contains(" -"), "{line}");
        }
        assert!(text.contains("keelson_proxy_repairs_total 0"), "{text}");
        assert!(text.contains("keelson_proxy_sync_failures_total 0"), "{text}");
    });
}

//! What outlasts a restart, an upgrade, or a Service: who sticks to what, and the flows that are under way.

use std::collections::BTreeSet;

use aya::maps::{HashMap, Map, MapData};
use keelson_ebpf_abi::{Affinity, AffinityKey, VERSION};
use keelson_netlink::conntrack::{Conntrack, Flow};
use serde_json::{Value, json};

use crate::stage::*;
use crate::world::{endpoint, eventually, node_object, service, with_proxy};

rows![
    each_new_connection_prolongs_affinity,
    a_client_of_a_service_that_is_gone_is_not_taken_for_one_of_another,
    a_chain_that_another_version_placed_elsewhere_moves_and_clients_stay,
    a_restart_leaves_udp_flows_alone_except_stale_ones,
];

fn sticky(spec: Value) -> Value {
    with(spec, json!({"sessionAffinity": "ClientIP"}))
}

/// How fresh the kernel's memory of the only client is: a number that a new connection makes greater.
fn freshness(node: &Node) -> u64 {
    let table = match node.mode {
        Mode::Iptables(_) => return node.namespace.run(last_seen),
        Mode::Ebpf => return last_used(node),
        Mode::Ipvs => "keelson-proxy-ipvs",
        Mode::Nftables => "keelson-proxy",
    };
    let listing = node.namespace.output("nft", &["list", "map", "inet", table, "affinity4"]);
    let rest = listing.split_once("expires ").unwrap_or_else(|| panic!("{listing}")).1;
    milliseconds(rest.split_whitespace().next().unwrap())
}

/// From `2h59m59s996ms`.
fn milliseconds(text: &str) -> u64 {
    let (mut sum, mut rest) = (0, text);
    for (unit, length) in [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)] {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (number, behind) = rest.split_at(digits);
        let is_unit =
            behind.strip_prefix(unit).filter(|_| unit != "m" || !behind.starts_with("ms"));
        if let (Ok(number), Some(behind)) = (number.parse::<u64>(), is_unit) {
            (sum, rest) = (sum + number * length, behind);
        }
    }
    sum
}

/// The kernel's clock when `recent` last saw somebody.
fn last_seen() -> u64 {
    let lists = std::fs::read_dir("/proc/thread-self/net/xt_recent").unwrap();
    let texts = lists.map(|list| std::fs::read_to_string(list.unwrap().path()).unwrap());
    let seen = texts.filter_map(|text| {
        let rest = text.split_once("last_seen: ")?.1;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    });
    seen.max().unwrap()
}

/// The kernel's clock when a BPF program last saw somebody.
fn last_used(node: &Node) -> u64 {
    let path = node.config.ebpf.pins.join(format!("maps-v{VERSION}/affinity"));
    let map = Map::LruHashMap(MapData::from_pin(path).unwrap());
    let map = HashMap::<_, AffinityKey, Affinity>::try_from(map).unwrap();
    map.iter().map(|entry| entry.unwrap().1.last_used_ns).max().unwrap()
}

/// Case 41.
fn each_new_connection_prolongs_affinity(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", sticky(cluster_ip(1, "TCP", 80)));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    let connect = || client.namespace.tcp("10.96.0.1:80").unwrap();
    connect();
    let first = freshness(&node);
    // `recent` keeps the moment, nf_tables what is left.
    let before = match mode {
        Mode::Iptables(_) | Mode::Ebpf => first,
        _ => eventually("time goes by", || Some(freshness(&node)).filter(|now| *now < first)),
    };
    eventually("a new connection counts", || {
        connect();
        (freshness(&node) > before).then_some(())
    });
}

/// Case 56.
fn a_client_of_a_service_that_is_gone_is_not_taken_for_one_of_another(mode: Mode) {
    let mut node = Node::new(mode);
    let clients: Vec<Pod> =
        (10..18).map(|number| node.pod(&format!("c{number}"), number)).collect();
    let _pods: Vec<Pod> =
        (2..8).map(|number| node.pod(&format!("p{number}"), number).serving("TCP", 8080)).collect();
    let seen = || -> BTreeSet<String> {
        clients.iter().map(|pod| pod.namespace.tcp("10.96.0.1:80").unwrap().server).collect()
    };
    for (round, restart) in [(1, false), (2, true)] {
        node.service("old", sticky(cluster_ip(1, "TCP", 80)));
        node.ready("old", "TCP", 8080, &[2]);
        node.apply();
        assert_eq!(seen().len(), 1);
        node.delete_service("old");
        if restart {
            node.apply();
            node.restart();
        }
        let new = format!("new{round}");
        node.service(&new, sticky(cluster_ip(1, "TCP", 80)));
        node.ready(&new, "TCP", 8080, &[3, 4, 5, 6, 7]);
        node.apply();
        // Whoever was remembered under the same number would be led to the same place.
        assert!(seen().len() > 1, "{:?}", seen());
        node.delete_service(&new);
        node.apply();
    }
}

/// Case 55.
fn a_chain_that_another_version_placed_elsewhere_moves_and_clients_stay(mode: Mode) {
    let table = match mode {
        Mode::Nftables => "inet keelson-proxy",
        Mode::Ipvs => "inet keelson-proxy-ipvs",
        _ => skip("the kernel places its chains"),
    };
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _pods: Vec<Pod> =
        (2..8).map(|number| node.pod(&format!("p{number}"), number).serving("TCP", 8080)).collect();
    node.service("web", sticky(cluster_ip(1, "TCP", 80)));
    node.ready("web", "TCP", 8080, &[2, 3, 4, 5, 6, 7]);
    node.apply();
    let first = servers(&client.namespace, "10.96.0.1:80", 5);
    assert_eq!(first.len(), 1);
    let nft = |command: &str| node.namespace.output("nft", &[command]);
    let priority = |chain: &str| {
        let listing = nft(&format!("list chain {table} {chain}"));
        let line = listing.lines().find(|line| line.contains("priority")).map(str::to_owned);
        line.unwrap_or_else(|| panic!("{listing}"))
    };
    let before = ["prerouting", "postrouting"].map(priority);
    for (chain, hook) in [("prerouting", "prerouting"), ("postrouting", "postrouting")] {
        nft(&format!("delete chain {table} {chain}"));
        nft(&format!("add chain {table} {chain} {{ type nat hook {hook} priority 50; }}"));
    }
    assert_ne!(["prerouting", "postrouting"].map(priority), before);
    assert!(node.restart() > 0);
    let nft = |command: &str| node.namespace.output("nft", &[command]);
    let listing = nft(&format!("list chain {table} prerouting"));
    assert!(listing.contains(before[0].trim()), "{listing}");
    let listing = nft(&format!("list chain {table} postrouting"));
    assert!(listing.contains(before[1].trim()), "{listing}");
    assert_eq!(servers(&client.namespace, "10.96.0.1:80", 20), first);
    assert_eq!(node.restart(), 0);
}

/// Case 51.
fn a_restart_leaves_udp_flows_alone_except_stale_ones(mode: Mode) {
    if mode == Mode::Ebpf {
        skip("connection tracking knows nothing of its flows");
    }
    let mut node = Node::new(mode);
    node.backend = None;
    let client = node.pod("client", 10);
    let _pods = [2, 3].map(|n| node.pod(&format!("p{n}"), n).serving("UDP", 8080));
    let stranger = node.pod("stranger", 5).serving("UDP", 53);
    let folder = tempfile::tempdir().unwrap();
    let lists = |changing: &str| {
        let dns = |address: &str| {
            json!({
                "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address],
                "ports": [{"port": 53, "protocol": "UDP"}],
            })
        };
        let udp = |service: &str, address: &str| {
            let mut slice = endpoint(service, address);
            slice["ports"][0]["protocol"] = json!("UDP");
            slice
        };
        json!({
            "services": [service("stays", dns("10.96.0.1")), service("changes", dns("10.96.0.2"))],
            "endpointslices": [udp("stays", "10.66.0.2"), udp("changes", changing)],
            "nodes": [node_object()],
        })
    };
    let to_stranger = format!("{}:53", stranger.v4);
    let sockets =
        ["10.96.0.1:53", "10.96.0.2:53", &to_stranger].map(|to| client.namespace.udp_socket(to));
    let ask = || sockets.each_ref().map(|socket| udp_exchange(socket, silence()).unwrap().server);
    with_proxy(&node, lists("10.66.0.2"), folder.path(), |_| {
        assert_eq!(ask(), ["p2", "p2", "stranger"]);
    });
    let kept =
        |flow: &Flow| flow.protocol == 17 && flow.destination != "10.96.0.2:53".parse().unwrap();
    let flows = || node.namespace.run(|| Conntrack::open().unwrap().select(0, kept).unwrap().flows);
    let before = flows();
    assert!(before.len() >= 2, "{before:?}");
    // While nobody looked, one Service got another endpoint.
    with_proxy(&node, lists("10.66.0.3"), folder.path(), |_| {
        let walked = "conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv4\"} 1";
        eventually("the walk at the start is over", || {
            let text = node.namespace.get("127.0.0.1:10249", "/metrics");
            text.contains(walked).then_some(())
        });
        // The same entries: their numbers are part of what is compared.
        assert_eq!(flows(), before);
        assert_eq!(ask(), ["p2", "p3", "stranger"]);
    });
}

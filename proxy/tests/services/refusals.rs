//! What the kernel refuses of the node itself is left out and named; all else goes on.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use aya::programs::SchedClassifier;
use aya::programs::links::LinkOrder;
use aya::programs::tc::{TcAttachOptions, TcAttachType};
use keelson_proxy::ebpf::EbpfConfig;
use keelson_proxy::{NodePortAddresses, ProxyConfig};
use serde_json::json;

use crate::growth::{next_event, packets_only};
use crate::stage::*;
use crate::world::{endpoint, eventually, node_object, service, with_configured_proxy};

rows![
    an_interface_that_takes_no_program_is_left_out_and_named,
    interfaces_that_vanish_while_they_are_served_end_nothing,
    a_cgroup_that_is_gone_leaves_its_sockets_to_packets,
    addresses_of_the_node_that_do_not_fit_are_named,
];

fn only_ebpf(mode: Mode) {
    if mode != Mode::Ebpf {
        skip("only eBPF follows the node's interfaces");
    }
}

/// A pinned program of the node.
fn program(node: &Node, name: &str) -> PathBuf {
    let mut folders = std::fs::read_dir(&node.config.ebpf.pins).unwrap().flatten();
    let is_wanted = |path: &Path| path.to_string_lossy().contains("/programs-");
    folders
        .find_map(|folder| Some(folder.path()).filter(|path| is_wanted(path)))
        .unwrap()
        .join(name)
}

/// As when the kernel has no room for another one: it takes no program twice.
fn an_interface_that_takes_no_program_is_left_out_and_named(mode: Mode) {
    only_ebpf(mode);
    let mut node = Node::new(mode);
    if !node.config.ebpf.pins.join("links/ingress-2").exists() {
        skip("this kernel has filters instead, and makes room for any number of them");
    }
    let mut strangers = SchedClassifier::from_pin(program(&node, "ingress")).unwrap();
    let client = node.pod("client", 10);
    let order = || TcAttachOptions::TcxOrder(LinkOrder::default());
    let attach = || strangers.attach_with_options("pod10", TcAttachType::Ingress, order());
    let link = node.namespace.run(attach).unwrap();
    let server = node.pod("server", 2).serving("TCP", 8080);
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    let troubles = |node: &mut Node| {
        let backend = node.backend.as_mut().unwrap();
        assert!(!backend.disturbed().unwrap());
        backend.take_troubles()
    };
    let told = troubles(&mut node);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("interface pod10, ingress: cannot attach"), "{told:?}");
    // All else is in force, also after a restart, and it is told once.
    node.apply();
    let ask = |node: &Node| node.outside.tcp(&format!("{NODE4}:30080")).unwrap().server;
    assert_eq!(ask(&node), "server");
    assert_eq!(troubles(&mut node), Vec::<String>::new());
    node.restart();
    let backend = node.backend.as_mut().unwrap();
    assert_eq!(backend.take_troubles(), told);
    assert_eq!(ask(&node), "server");
    // It is tried again when something happens.
    node.namespace.run(|| strangers.detach(link)).unwrap();
    let _another = node.pod("another", 3);
    assert_eq!(troubles(&mut node), Vec::<String>::new());
    node.assert_as_planned();
    assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().server, "server");
    drop(server);
}

fn interfaces_that_vanish_while_they_are_served_end_nothing(mode: Mode) {
    only_ebpf(mode);
    const TIMES: u32 = 30;
    let mut node = Node::new(mode);
    let (client, _one) = (node.pod("client", 10), node.pod("one", 2).serving("TCP", 8080));
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    let mut backend = node.backend.take().unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (namespace, done) = (&node.namespace, &done);
        scope.spawn(move || {
            let other = Namespace::new();
            for time in 0..TIMES {
                let names = [0, 1, 2].map(|n| format!("brief{}", time * 3 + n));
                names.iter().for_each(|name| namespace.connect(name, &other, name));
                let mut rtnl = namespace.rtnl();
                names.iter().for_each(|name| assert!(rtnl.delete_link(&**name).unwrap()));
            }
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            // The engine answers a missing link by adopting.
            if backend.disturbed().unwrap() {
                backend.adopt(&node.plans).unwrap();
            }
            assert_eq!(backend.take_troubles(), Vec::<String>::new());
        }
    });
    assert!(!backend.disturbed().unwrap());
    node.backend = Some(backend);
    node.assert_as_planned();
    assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().server, "one");
}

fn a_cgroup_that_is_gone_leaves_its_sockets_to_packets(mode: Mode) {
    only_ebpf(mode);
    let mut node = Node::new(mode);
    let (client, _one) = (node.pod("client", 10), node.pod("one", 2).serving("TCP", 8080));
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    let cgroup = node.config.ebpf.cgroup.clone().unwrap().join("inner");
    let create = || {
        std::fs::create_dir(&cgroup).unwrap();
        std::fs::write(cgroup.join("cgroup.type"), "threaded").unwrap();
    };
    create();
    let ebpf = EbpfConfig { cgroup: Some(cgroup.clone()), ..node.config.ebpf.clone() };
    node.config = BackendConfig { ebpf, ..node.config.clone() };
    node.restart();
    assert_eq!(node.backend.as_mut().unwrap().take_troubles(), Vec::<String>::new());
    std::fs::remove_dir(&cgroup).unwrap();
    let backend = node.backend.as_mut().unwrap();
    let told = eventually("it is noticed", || {
        if backend.disturbed().unwrap() {
            backend.adopt(&node.plans).unwrap();
        }
        Some(backend.take_troubles()).filter(|told| !told.is_empty())
    });
    assert!(told[0].starts_with("sockets that connect: cannot read"), "{told:?}");
    // Once, and not every second.
    assert!(!backend.disturbed().unwrap());
    node.service("later", cluster_ip(2, "TCP", 80));
    node.ready("later", "TCP", 8080, &[2]);
    node.apply();
    for to in ["10.96.0.1:80", "10.96.0.2:80"] {
        assert_eq!(client.namespace.tcp(to).unwrap().server, "one");
    }
    // It is back.
    create();
    let _another = node.pod("another", 3);
    node.apply();
    node.assert_as_planned();
    std::fs::remove_dir(&cgroup).unwrap();
}

fn addresses_of_the_node_that_do_not_fit_are_named(mode: Mode) {
    only_ebpf(mode);
    let mut node = Node::with(mode, packets_only(1 << 16));
    node.backend = None;
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let more: Vec<String> = (10..30).map(|last| format!("203.0.113.{last}")).collect();
    let lists = json!({
        "services": [service("web", node_port(cluster_ip(1, "TCP", 80), 30080))],
        "endpointslices": [endpoint("web", "10.66.0.2")],
        "nodes": [node_object()],
    });
    // Room for 16 addresses, Services' among them.
    let folder = tempfile::tempdir().unwrap();
    let configure = |config: ProxyConfig| ProxyConfig {
        ebpf: EbpfConfig { max_endpoints: 128, ..config.ebpf },
        node_port_addresses: NodePortAddresses::All,
        ..config
    };
    with_configured_proxy(&node, lists, folder.path(), configure, |world| {
        for address in &more {
            node.namespace.address("eth0", &format!("{address}/24"));
        }
        let event = next_event(world, "KernelRefused");
        assert_eq!(
            (&event["regarding"]["kind"], &event["regarding"]["name"]),
            (&json!("Node"), &json!("here"))
        );
        let note = event["note"].as_str().unwrap();
        assert!(note.contains("the BPF map addresses is full: it has room for 16"), "{note}");
        assert!(note.starts_with("203.0.113."), "{note}");
        assert_eq!(node.outside.tcp(&format!("{NODE4}:30080")).unwrap().server, "one");
        // Services change meanwhile.
        let mut other = service("web", node_port(cluster_ip(1, "TCP", 80), 30090));
        other["metadata"]["resourceVersion"] = json!("9");
        world.tell("services", "MODIFIED", other);
        eventually("another port", || node.outside.tcp(&format!("{NODE4}:30090")).ok());
        let metrics = node.namespace.get("127.0.0.1:10249", "/metrics");
        assert!(!metrics.contains("keelson_proxy_sync_failures_total 0"), "{metrics}");
        // As soon as there is room the others are served.
        let (index, mut rtnl) = (node.namespace.index("eth0"), node.namespace.rtnl());
        let (last, gone) = more.split_last().unwrap();
        for address in gone {
            rtnl.delete_address(index, format!("{address}/24").parse().unwrap()).unwrap();
        }
        eventually("the one that is left", || node.outside.tcp(&format!("{last}:30090")).ok());
    });
}

//! Mode ebpf: frames that are forwarded at XDP, and how the program comes to interfaces and goes.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use aya::programs::{Xdp, XdpMode};
use keelson_proxy::ebpf::{EbpfConfig, XdpChoice};
use serde_json::json;

use crate::stage::*;
use crate::transfer::both_ways;

rows![
    known_connections_to_other_nodes_are_forwarded_at_xdp,
    the_program_comes_changes_and_goes,
    the_program_is_where_the_default_route_is,
    somebody_elses_program_is_left_alone,
];

/// Only a failure takes so long.
const PATIENCE: Duration = Duration::from_secs(20);
const BULK: usize = 1 << 20;
/// A pod of another node, which is the host outside here.
const POD: &str = "10.77.0.5";

fn node(mode: Mode, xdp: XdpChoice) -> Node {
    if mode != Mode::Ebpf {
        skip("this is about eBPF");
    }
    let pods = PodSources::Ranges(vec!["10.66.0.0/16".parse().unwrap()]);
    let ebpf = EbpfConfig { xdp, ..EbpfConfig::default() };
    let mut node = Node::with(mode, BackendConfig { ebpf, pods, ..BackendConfig::default() });
    node.outside.address("eth0", POD);
    node.outside.finish_checksums("eth0");
    node.namespace.route("10.77.0.0/16", OUTSIDE4);
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.slice(json!({
        "metadata": {
            "namespace": "default",
            "name": "web-1",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": [POD], "nodeName": "there", "conditions": {"ready": true}},
        ],
        "ports": [{"name": "", "protocol": "TCP", "port": 8080}],
    }));
    node.apply();
    node
}

/// Sends much to the node port and back.
fn transfer(node: &Node) {
    let listener = node.outside.run(|| TcpListener::bind(format!("{POD}:8080")).unwrap());
    let to: SocketAddr = format!("{NODE4}:30080").parse().unwrap();
    let near = node.outside.run(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap());
    let (far, peer) = listener.accept().unwrap();
    both_ways(near, far, BULK);
    assert_eq!(peer.ip().to_string(), NODE4);
}

fn known_connections_to_other_nodes_are_forwarded_at_xdp(mode: Mode) {
    let node = node(mode, XdpChoice::Generic);
    transfer(&node);
    // More than a thousand packets; the kernel saw the first ones.
    let forwarded = node.namespace.forwarded();
    assert!(forwarded < 200, "the kernel forwarded {forwarded} packets");
}

/// The modes in which the program is attached.
fn pins(node: &Node) -> Vec<String> {
    let entries = std::fs::read_dir(node.namespace.pins().join("links")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let index = node.namespace.index("eth0");
    let ours = names.filter_map(|name| {
        let name = name.strip_suffix(&format!("-{index}"))?;
        name.starts_with("xdp_").then(|| name.to_owned())
    });
    ours.collect()
}

fn the_program_comes_changes_and_goes(mode: Mode) {
    let mut node = node(mode, XdpChoice::Native);
    assert_eq!(pins(&node), ["xdp_native"]);
    assert_eq!(node.restart(), 0);
    node.assert_as_planned();
    // It is mended, as everything is.
    let pin = format!("links/xdp_native-{}", node.namespace.index("eth0"));
    std::fs::remove_file(node.namespace.pins().join(pin)).unwrap();
    assert!(node.backend.as_mut().unwrap().disturbed().unwrap());
    node.adopt();
    assert_eq!(pins(&node), ["xdp_native"]);
    // A veth's driver is not taken unless it is asked for.
    for (choice, expected) in [
        (XdpChoice::Generic, &["xdp_generic"][..]),
        (XdpChoice::Native, &["xdp_native"]),
        (XdpChoice::Auto, &["xdp_generic"]),
    ] {
        node.config.ebpf.xdp = choice;
        node.restart();
        assert_eq!(pins(&node), expected);
        node.assert_as_planned();
    }
    transfer(&node);
    node.config.ebpf.xdp = XdpChoice::Off;
    node.restart();
    assert_eq!(pins(&node), [] as [String; 0]);
    transfer(&node);
    node.config.ebpf.xdp = XdpChoice::Native;
    node.restart();
    let backend = node.backend.as_mut().unwrap();
    backend.cleanup().unwrap();
    assert!(!node.namespace.pins().join("links").exists() || pins(&node).is_empty());
}

fn the_program_is_where_the_default_route_is(mode: Mode) {
    let mut node = node(mode, XdpChoice::Generic);
    let mut rtnl = node.namespace.rtnl();
    let mut defaults = rtnl.routes().unwrap();
    defaults.retain(|route| route.destination.prefix() == 0);
    for (are_there, expected) in [(false, &[][..]), (true, &["xdp_generic"])] {
        for route in &defaults {
            match are_there {
                true => rtnl.ensure_route(route).unwrap(),
                false => assert!(rtnl.delete_route(route).unwrap()),
            }
        }
        assert!(!node.backend.as_mut().unwrap().disturbed().unwrap(), "there is nothing to mend");
        assert_eq!(pins(&node), expected);
        node.assert_as_planned();
    }
    transfer(&node);
}

fn somebody_elses_program_is_left_alone(mode: Mode) {
    let mut node = node(mode, XdpChoice::Native);
    node.config.ebpf.xdp = XdpChoice::Off;
    node.restart();
    let mut theirs = aya::Ebpf::load(keelson_ebpf_objects::XDP).unwrap();
    let program = theirs.program_mut("forward").unwrap();
    keelson_ebpf_objects::load(program).unwrap();
    let program: &mut Xdp = program.try_into().unwrap();
    node.namespace.run(|| program.attach("eth0", XdpMode::Skb).unwrap());
    for choice in [XdpChoice::Generic, XdpChoice::Native, XdpChoice::Auto] {
        node.config.ebpf.xdp = choice;
        node.restart();
        assert_eq!(pins(&node), [] as [String; 0]);
        node.assert_as_planned();
    }
    transfer(&node);
}

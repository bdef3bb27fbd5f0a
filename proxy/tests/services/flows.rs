//! Flows that are under way when Services change, and the state after restarts and foreign hands.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use crate::stage::*;
use crate::world::eventually;
use ipnetwork::IpNetwork;
use keelson_proxy::diff::advance;
use keelson_proxy::model::{At, ServicePlan};
use serde_json::json;

rows![
    a_udp_client_with_one_port_moves_to_the_new_endpoint,
    udp_that_began_before_the_endpoint_came_arrives,
    a_connection_that_began_before_the_endpoint_came_arrives,
    a_flow_to_a_strangers_port_that_equals_a_node_port_is_left_alone,
    an_established_connection_outlives_its_service,
    an_endpoint_that_goes_keeps_its_connections_and_gets_no_new_ones,
    a_service_that_changes_its_address_leaves_nothing_at_the_old_one,
    two_services_with_the_same_external_address_take_turns,
    a_restart_changes_nothing_and_damage_is_mended,
    a_clean_up_leaves_nothing,
    nft_lists_the_table_and_other_tables_do_not_matter,
    a_service_that_the_kernel_refuses_does_not_hold_up_the_others,
];

fn a_udp_client_with_one_port_moves_to_the_new_endpoint(mode: Mode) {
    // Case 43.
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _a = node.pod("a", 2).serving("UDP", 8080).serving("UDP", 9090);
    let _b = node.pod("b", 3).serving("UDP", 8080);
    let _other = node.pod("other", 4).serving("UDP", 8080);
    node.service("dns", node_port(cluster_ip(1, "UDP", 53), 30053));
    node.service("other", cluster_ip(2, "UDP", 53));
    node.ready("dns", "UDP", 8080, &[2]);
    node.ready("other", "UDP", 8080, &[4]);
    node.apply();
    let sockets = ["10.96.0.1:53", "[fd96::1]:53", &format!("{NODE4}:30053")]
        .map(|to| (to.to_owned(), client.namespace.udp_socket(to)));
    let bystander = client.namespace.udp_socket("10.96.0.2:53");
    assert_eq!(udp_exchange(&bystander, silence()).unwrap().server, "other");
    let mut sockets = sockets;
    let mut all = |name: &str| {
        for (to, socket) in &mut sockets {
            if mode == Mode::Ebpf {
                // Case 58: a socket that was connected to the endpoint is ended, and its program connects anew.
                eventually("the socket is ended", || match udp_exchange(socket, silence()) {
                    Ok(answer) => (answer.server == name).then_some(()),
                    Err(_) => {
                        *socket = client.namespace.udp_socket(to);
                        None
                    }
                });
            }
            assert_eq!(udp_exchange(socket, silence()).unwrap().server, name);
        }
    };
    all("a");
    node.flows_removed = 0;
    node.ready("dns", "UDP", 8080, &[3]);
    node.apply();
    all("b");
    // Exactly the stale ones; those that go with IPVS's own connections are gone before anybody looks.
    let removed = |node: &Node, count| match mode {
        Mode::Ipvs => assert!(node.flows_removed <= count),
        // Its flows are not the kernel's.
        Mode::Ebpf => {}
        _ => assert_eq!(node.flows_removed, count),
    };
    removed(&node, 3);
    // The same pod, another target port.
    node.ready("dns", "UDP", 9090, &[2]);
    node.apply();
    all("a");
    assert_eq!(udp_exchange(&bystander, silence()).unwrap().server, "other");
    removed(&node, 6);
    let before = node.flows_removed;
    // Case 45: an endpoint that terminates but serves keeps its flows.
    let going = json!({"ready": false, "serving": true, "terminating": true});
    node.endpoints("dns", "UDP", 9090, &[(2, "here", going), (3, "here", json!({}))]);
    node.apply();
    all("a");
    assert_eq!(node.flows_removed, before);
}

fn udp_that_began_before_the_endpoint_came_arrives(mode: Mode) {
    // Case 44.
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _a = node.pod("a", 2).serving("UDP", 8080);
    let socket = client.namespace.udp_socket("10.96.0.1:53");
    assert!(udp_exchange(&socket, silence()).is_err());
    node.service("dns", cluster_ip(1, "UDP", 53));
    node.apply();
    assert!(udp_exchange(&socket, silence()).is_err());
    node.ready("dns", "UDP", 8080, &[2]);
    node.apply();
    assert_eq!(udp_exchange(&socket, silence()).unwrap().server, "a");
}

/// Its first packet went elsewhere, and connection tracking would send the others the same way.
fn a_connection_that_began_before_the_endpoint_came_arrives(mode: Mode) {
    // Longer than a client waits until it tries again.
    const PATIENCE: Duration = Duration::from_secs(15);
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _a = node.pod("a", 2).serving("TCP", 8080);
    let stranger = node.pod("stranger", 5).serving("TCP", 8080);
    // Who has something to translate tracks connections.
    node.service("other", cluster_ip(2, "TCP", 80));
    node.ready("other", "TCP", 8080, &[5]);
    node.apply();
    let kept = stranger.namespace.run(|| TcpListener::bind("0.0.0.0:9090").unwrap());
    let near = client.namespace.run(|| TcpStream::connect((stranger.v4, 9090)).unwrap());
    let (_far, _) = kept.accept().unwrap();
    let before = node.namespace.forwarded();
    thread::scope(|scope| {
        let inside = &client.namespace;
        let asker = scope.spawn(|| inside.ask_for("TCP", "10.96.0.1:80", PATIENCE));
        eventually("its first packet is gone", || {
            (node.namespace.forwarded() > before).then_some(())
        });
        node.flows_removed = 0;
        node.service("web", cluster_ip(1, "TCP", 80));
        node.ready("web", "TCP", 8080, &[2]);
        node.apply();
        assert_eq!(asker.join().unwrap().unwrap().server, "a");
    });
    // Nothing else.
    let removed = if mode == Mode::Ebpf { 0 } else { 1 };
    assert_eq!(node.flows_removed, removed);
    drop(near);
}

fn a_flow_to_a_strangers_port_that_equals_a_node_port_is_left_alone(mode: Mode) {
    // Case 46.
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let stranger = node.pod("stranger", 5).serving("UDP", 30053);
    let _pods = (node.pod("a", 2), node.pod("b", 3));
    node.service("dns", node_port(cluster_ip(1, "UDP", 53), 30053));
    node.ready("dns", "UDP", 8080, &[2]);
    node.apply();
    let socket = client.namespace.udp_socket(&format!("{}:30053", stranger.v4));
    assert!(udp_exchange(&socket, silence()).is_ok());
    node.flows_removed = 0;
    node.ready("dns", "UDP", 8080, &[3]);
    node.apply();
    assert_eq!(node.flows_removed, 0);
}

fn an_established_connection_outlives_its_service(mode: Mode) {
    // Case 28 and 49.
    let mut node = Node::new(mode);
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    let listener = server.namespace.run(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    let mut stream = client.namespace.run(|| TcpStream::connect("10.96.0.1:80").unwrap());
    let (mut accepted, _) = listener.accept().unwrap();
    node.ready("web", "TCP", 8080, &[]);
    node.apply();
    assert_eq!(client.namespace.tcp("10.96.0.1:80"), Err(ErrorKind::ConnectionRefused));
    node.delete_service("web");
    node.apply();
    stream.write_all(b"ping").unwrap();
    let mut buffer = [0; 4];
    accepted.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"ping");
}

fn an_endpoint_that_goes_keeps_its_connections_and_gets_no_new_ones(mode: Mode) {
    let mut node = Node::new(mode);
    let (client, a) = (node.pod("client", 10), node.pod("a", 2));
    let _b = node.pod("b", 3).serving("TCP", 8080);
    let listener = a.namespace.run(|| TcpListener::bind("[::]:8080").unwrap());
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    let to = ["10.96.0.1:80", "[fd96::1]:80", &format!("{NODE4}:30080")].map(str::to_owned);
    let mut pairs: Vec<_> = to
        .iter()
        .map(|to| client.namespace.run(|| TcpStream::connect(to).unwrap()))
        .map(|stream| (stream, listener.accept().unwrap().0))
        .collect();
    let mut go_on = || {
        for (near, far) in &mut pairs {
            let mut buffer = [0; 4];
            near.write_all(b"ping").unwrap();
            far.read_exact(&mut buffer).unwrap();
        }
    };
    let _server = Server::on(listener, &a.name);
    node.ready("web", "TCP", 8080, &[3]);
    node.apply();
    to.iter().for_each(|to| assert_eq!(servers(&client.namespace, to, 12), ["b"]));
    go_on();
    assert_eq!(node.restart(), 0);
    go_on();
    // It comes back before its connections have ended.
    node.ready("web", "TCP", 8080, &[2, 3]);
    node.apply();
    to.iter().for_each(|to| assert_eq!(servers(&client.namespace, to, 40), ["a", "b"]));
    go_on();
    assert_eq!(node.restart(), 0);
}

fn a_service_that_changes_its_address_leaves_nothing_at_the_old_one(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    // Case 20: recreated between two looks.
    node.service("web", cluster_ip(2, "TCP", 80));
    node.apply();
    assert!(client.namespace.tcp("10.96.0.1:80").is_err());
    assert!(client.namespace.tcp("10.96.0.2:80").is_ok());
    // Case 19: an ExternalName with a cluster IP left in it is no Service of ours.
    node.service("web", with(cluster_ip(2, "TCP", 80), json!({"type": "ExternalName"})));
    node.apply();
    assert!(client.namespace.tcp("10.96.0.2:80").is_err());
    node.service("web", cluster_ip(2, "TCP", 80));
    node.apply();
    assert!(client.namespace.tcp("10.96.0.2:80").is_ok());
    // Case 39: handed to another proxy.
    let object = json!({
        "metadata": {
            "namespace": "default", "name": "web",
            "labels": {"service.kubernetes.io/service-proxy-name": "other"},
        },
        "spec": cluster_ip(2, "TCP", 80),
    });
    node.service_object(object);
    node.apply();
    assert!(client.namespace.tcp("10.96.0.2:80").is_err());
}

fn two_services_with_the_same_external_address_take_turns(mode: Mode) {
    let mut node = Node::new(mode);
    let _a = node.pod("a", 2).serving("TCP", 8080);
    let _b = node.pod("b", 3).serving("TCP", 8080);
    let external = json!({"externalIPs": ["198.51.100.1"]});
    node.service("one", with(cluster_ip(1, "TCP", 80), external.clone()));
    let second = serde_json::from_value(json!({
        "metadata": {"namespace": "default", "name": "two", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": with(cluster_ip(2, "TCP", 80), external),
    }));
    node.model.apply_service(&second.unwrap());
    assert_eq!(node.model.take_problems().len(), 1);
    node.ready("one", "TCP", 8080, &[2]);
    node.ready("two", "TCP", 8080, &[3]);
    node.apply();
    assert_eq!(servers(&node.outside, "198.51.100.1:80", 5), ["a"]);
    node.delete_service("one");
    node.apply();
    assert_eq!(servers(&node.outside, "198.51.100.1:80", 5), ["b"]);
}

/// Case 52.
fn a_restart_changes_nothing_and_damage_is_mended(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    many_kinds(&mut node);
    node.apply();
    assert_eq!(node.restart(), 0);
    node.assert_as_planned();
    for damage in damages(mode) {
        let name = &damage.name;
        assert!(!node.backend.as_mut().unwrap().disturbed().unwrap());
        damage.inflict(&node.namespace);
        assert!(node.backend.as_mut().unwrap().disturbed().unwrap(), "{name}");
        assert_ne!(node.backend.as_mut().unwrap().verify(&node.plans).unwrap(), [], "{name}");
        assert!(node.adopt() > 0, "{name}");
        assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().server, "one", "{name}");
        assert_eq!(node.restart(), 0, "{name}");
        node.assert_as_planned();
    }
    // A change just after somebody flushed everything.
    damages(mode)[0].inflict(&node.namespace);
    node.service("late", cluster_ip(99, "TCP", 80));
    node.ready("late", "TCP", 8080, &[2]);
    node.apply();
    assert!(node.backend.as_mut().unwrap().disturbed().unwrap());
    node.adopt();
    assert_eq!(client.namespace.tcp("10.96.0.99:80").unwrap().server, "one");
    assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().server, "one");
}

fn a_clean_up_leaves_nothing(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    many_kinds(&mut node);
    node.apply();
    assert!(client.namespace.tcp("10.96.0.1:80").is_ok());
    // Also by a process that has programmed nothing itself.
    let ebpf = node.config.ebpf.clone();
    let config = BackendConfig { ebpf, ..BackendConfig::default() };
    let mut other = node.namespace.run(|| mode.open(config).unwrap());
    other.cleanup().unwrap();
    other.cleanup().unwrap();
    assert!(client.namespace.tcp("10.96.0.1:80").is_err());
    let mut fresh = Node::new(mode);
    let of = |node: &mut Node| node.backend.as_mut().unwrap().verify(&node.plans).unwrap();
    fresh.backend.as_mut().unwrap().cleanup().unwrap();
    node.plans.clear();
    // As on a node where there has never been a proxy.
    assert_eq!(of(&mut node), of(&mut fresh));
}

/// Services of every kind that there is.
fn many_kinds(node: &mut Node) {
    for last in 1..=20 {
        let name = format!("web{last}");
        let sticky = json!({"sessionAffinity": if last % 3 == 0 { "ClientIP" } else { "None" }});
        let spec = with(node_port(cluster_ip(last, "TCP", 80), 30000 + u16::from(last)), sticky);
        let policy = if last % 4 == 0 { "Local" } else { "Cluster" };
        node.service(&name, with(spec, json!({"externalTrafficPolicy": policy})));
        let pods: Vec<u8> = (2..2 + last % 5).collect();
        node.ready(&name, "TCP", 8080, &pods);
    }
    node.ready("web1", "TCP", 8080, &[2]);
}

/// Case 53.
fn nft_lists_the_table_and_other_tables_do_not_matter(mode: Mode) {
    let (table, chains) = match mode {
        Mode::Nftables => (
            "keelson-proxy",
            ["service4-hide-others-sticky10800-of-", "node-port6-hide-of-", "-inside-of-"],
        ),
        Mode::Ipvs => {
            ("keelson-proxy-ipvs", ["ipvs4-hide-others", "loopback-port4-hide-of-", "-inside-of-"])
        }
        Mode::Iptables(_) | Mode::Ebpf => skip("it has no such table"),
    };
    let mut node = Node::new(mode);
    many_kinds(&mut node);
    node.apply();
    // Debian's nft can list every kind of chain.
    let listing = node.namespace.output("nft", &["list", "table", "inet", table]);
    for chain in chains {
        assert!(listing.contains(chain), "{chain} is not in {listing}");
    }
    assert!(!node.backend.as_mut().unwrap().disturbed().unwrap());
    node.namespace.output("nft", &["add", "table", "inet", "other"]);
    assert!(!node.backend.as_mut().unwrap().disturbed().unwrap());
    node.backend.as_mut().unwrap().cleanup().unwrap();
    assert!(!node.namespace.output("nft", &["list", "tables"]).contains("keelson"));
}

fn a_service_that_the_kernel_refuses_does_not_hold_up_the_others(mode: Mode) {
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    for last in 1..=3 {
        node.service(&format!("web{last}"), cluster_ip(last, "TCP", 80));
        node.ready(&format!("web{last}"), "TCP", 8080, &[2]);
    }
    let dirty = node.model.take_dirty();
    let mut changes = advance(&mut node.plans, dirty, |key| node.model.plan(key));
    // Such a plan cannot come from the model.
    let bad = changes.iter_mut().find(|change| change.service.to_string() == "default/web2");
    let bad = bad.unwrap();
    let mut plan = ServicePlan::clone(bad.plan.as_ref().unwrap());
    let mut ports = plan.ports.to_vec();
    match mode {
        // More ranges than there is room for.
        Mode::Ebpf => {
            let range = |number: u32| IpNetwork::from(IpAddr::from(number.to_be_bytes()));
            ports[0].frontends[0].sources =
                Some((1 << 24..(1 << 24) + 70_000).map(range).collect());
        }
        // An IPv6 address in an IPv4 map.
        _ => ports[0].frontends[0].key.at = At::Address("fd96::99".parse().unwrap()),
    }
    plan.ports = ports.into();
    bad.plan = Some(plan.into());
    node.plans.insert(bad.service.clone(), bad.plan.clone().unwrap());
    let backend = node.backend.as_mut().unwrap();
    for applied in
        [backend.apply(&changes, &node.plans).unwrap(), backend.adopt(&node.plans).unwrap()]
    {
        let names: Vec<_> =
            applied.refused.iter().map(|(service, _)| service.to_string()).collect();
        assert_eq!(names, ["default/web2"]);
        assert!(client.namespace.tcp("10.96.0.1:80").is_ok());
        assert!(client.namespace.tcp("10.96.0.3:80").is_ok());
        // It is no reason to repair everything again and again.
        assert!(!node.backend.as_mut().unwrap().disturbed().unwrap());
    }
}

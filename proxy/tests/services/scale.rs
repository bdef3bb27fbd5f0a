//! More Services at once than fit into one transaction of some kernel interfaces.

use serde_json::json;

use crate::stage::{Mode, Node, cluster_ip, rows, slice, with};

rows![many_services_come_and_go_at_once, a_service_with_very_many_endpoints_is_one_like_others];

fn many_services_come_and_go_at_once(mode: Mode) {
    const SERVICES: u16 = 500;
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let address = |number: u16| format!("10.96.{}.{}", 1 + number / 250, 1 + number % 250);
    for number in 0..SERVICES {
        let name = format!("s{number}");
        let address = address(number);
        let addresses = json!({"clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack"});
        node.service(&name, with(cluster_ip(1, "TCP", 80), addresses));
        node.ready(&name, "TCP", 8080, &[2]);
    }
    assert!(node.apply() > usize::from(SERVICES));
    let disturbed = |node: &mut Node| node.backend.as_mut().unwrap().disturbed().unwrap();
    // What we do ourselves is nobody's interference.
    assert!(!disturbed(&mut node));
    for number in (0..SERVICES).step_by(41) {
        let to = format!("{}:80", address(number));
        assert_eq!(client.namespace.tcp(&to).unwrap().server, "one", "{to}");
    }
    assert_eq!(node.restart(), 0);
    assert!(!disturbed(&mut node));
    for number in 1..SERVICES {
        node.delete_service(&format!("s{number}"));
    }
    node.apply();
    assert!(!disturbed(&mut node));
    node.assert_as_planned();
    assert!(client.namespace.tcp(&format!("{}:80", address(0))).is_ok());
    assert!(client.namespace.tcp(&format!("{}:80", address(1))).is_err());
}

/// Case 5: it is split over as many slices as it takes.
fn a_service_with_very_many_endpoints_is_one_like_others(mode: Mode) {
    const IN_A_SLICE: u32 = 1000;
    // Under emulation everything takes tens of times as long, and the programs of iptables take long anywhere.
    let emulated = std::env::var_os("KEELSON_TEST_OWN_MACHINE").is_some();
    let slices = match mode {
        _ if emulated => 2,
        Mode::Iptables(_) => 20,
        _ => 100,
    };
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", cluster_ip(1, "TCP", 80));
    node.service("other", cluster_ip(2, "TCP", 80));
    node.ready("other", "TCP", 8080, &[2]);
    node.apply();
    // Nobody is at any of these addresses.
    let part = |number: u32, count: u32| {
        let first = number * IN_A_SLICE;
        let addresses: Vec<String> = (first..first + count)
            .map(|endpoint| {
                let [_, high, middle, low] = (endpoint + 1).to_be_bytes();
                format!("10.{}.{middle}.{low}", 70 + high)
            })
            .collect();
        let endpoints: Vec<_> = addresses.iter().map(|address| (&**address, "other")).collect();
        let mut slice = slice("web", "IPv4", &endpoints, "", 8080);
        slice["metadata"]["name"] = json!(format!("web-{number}"));
        slice
    };
    (0..slices).for_each(|number| node.slice(part(number, IN_A_SLICE)));
    assert!(node.apply() >= (slices * IN_A_SLICE) as usize);
    node.assert_as_planned();
    assert_eq!(node.restart(), 0);
    assert_eq!(client.namespace.tcp("10.96.0.2:80").unwrap().server, "one");
    // One slice is shorter by one.
    node.slice(part(slices / 2, IN_A_SLICE - 1));
    node.apply();
    node.assert_as_planned();
    (0..slices).for_each(|number| node.slice(part(number, 0)));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    node.assert_as_planned();
    assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().server, "one");
    assert_eq!(node.restart(), 0);
}

//! More Services at once than fit into one transaction of some kernel interfaces.

use serde_json::json;

use crate::stage::{Mode, Node, cluster_ip, rows, with};

rows![many_services_come_and_go_at_once];

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

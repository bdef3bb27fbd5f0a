use super::*;

fn network(v6: bool) -> Allocator {
    Allocator::new(ServiceNetwork {
        v4: Some("10.96.0.0/28".parse().unwrap()),
        v6: v6.then(|| "fd00:96::/112".parse().unwrap()),
        node_ports: 30000..=30002,
    })
}

fn service(spec: Value) -> Value {
    json!({"metadata": {"name": "web"}, "spec": spec})
}

#[test]
fn addresses_are_given_once_and_given_back() {
    let allocator = network(false);
    let mut seen = BTreeSet::new();
    for _ in 0..13 {
        let mut one = service(json!({"type": "ClusterIP"}));
        allocator.reserve(None, &mut one).unwrap().keep();
        assert!(seen.insert(one["spec"]["clusterIP"].as_str().unwrap().to_owned()));
    }
    let mut one_more = service(json!({"type": "ClusterIP"}));
    let full = allocator.reserve(None, &mut one_more).err().unwrap();
    assert!(full.message.contains("range 10.96.0.0/28 is full"), "{full}");
    allocator.release(&service(json!({"clusterIP": "10.96.0.5"})));
    let mut again = service(json!({"type": "ClusterIP"}));
    allocator.reserve(None, &mut again).unwrap().keep();
    assert_eq!(again["spec"]["clusterIPs"], json!(["10.96.0.5"]));
}

#[test]
fn a_taken_node_port_is_refused_with_its_field() {
    let allocator = network(false);
    let spec =
        json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30001}]});
    let mut first = service(spec.clone());
    allocator.reserve(None, &mut first).unwrap().keep();
    let error = allocator.reserve(None, &mut service(spec)).err().unwrap();
    assert_eq!(
        error.message,
        "Service \"web\" is invalid: spec.ports[0].nodePort: Invalid value: 30001: provided port is already allocated"
    );
    // The failed one holds nothing: two more ports and no address are in use.
    for _ in 0..2 {
        let mut other =
            service(json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP"}]}));
        allocator.reserve(None, &mut other).unwrap().keep();
        assert_ne!(other["spec"]["ports"][0]["nodePort"], 30001);
    }
    let outside =
        json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 80}]});
    let error = allocator.reserve(None, &mut service(outside)).err().unwrap();
    assert!(error.message.contains("The range of valid ports is 30000-30002"), "{error}");
}

#[test]
fn an_update_keeps_what_stays_and_frees_what_goes() {
    let allocator = network(false);
    let mut old = service(
        json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30000}]}),
    );
    allocator.reserve(None, &mut old).unwrap().keep();
    let mut new = old.clone();
    new["spec"]["type"] = "ClusterIP".into();
    new["spec"]["ports"][0].as_object_mut().unwrap().remove("nodePort");
    allocator.reserve(Some(&old), &mut new).unwrap().keep();
    assert_eq!(new["spec"]["clusterIP"], old["spec"]["clusterIP"]);
    let mut other = service(
        json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30000}]}),
    );
    assert!(allocator.reserve(None, &mut other).is_ok());
}

#[test]
fn families() {
    let allocator = network(true);
    let mut dual = service(json!({"type": "ClusterIP", "ipFamilyPolicy": "PreferDualStack"}));
    allocator.reserve(None, &mut dual).unwrap().keep();
    assert_eq!(dual["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
    let mut six = service(json!({"type": "ClusterIP", "ipFamilies": ["IPv6"]}));
    allocator.reserve(None, &mut six).unwrap().keep();
    assert!(six["spec"]["clusterIP"].as_str().unwrap().starts_with("fd00:96::"));
    let mut headless = service(json!({"type": "ClusterIP", "clusterIP": "None"}));
    allocator.reserve(None, &mut headless).unwrap().keep();
    assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
    let mut impossible = service(json!({"ipFamilyPolicy": "RequireDualStack"}));
    let error = network(false).reserve(None, &mut impossible).err().unwrap();
    assert!(error.message.contains("not configured for dual-stack"), "{error}");
}

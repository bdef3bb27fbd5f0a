//! Hints, health checks and guards: cases 8 to 11 and 14 to 20 of the reference, as far as they need no
//! packets.

use super::*;

fn hinted(address: &str, zones: &[&str], nodes: &[&str]) -> Value {
    let names = |all: &[&str]| all.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
    json!({"addresses": [address], "hints": {"forZones": names(zones), "forNodes": names(nodes)}})
}

fn to(addresses: &[&str]) -> String {
    let all: Vec<String> = addresses.iter().map(|address| format!("{address}:8080")).collect();
    format!("10.96.0.1:80/tcp -> {} UnlessPod", all.join(" "))
}

#[test]
fn zone_hints_are_followed_when_all_have_them_and_one_is_mine() {
    let (mine, other) = (hinted("10.0.0.1", &["a"], &[]), hinted("10.0.0.2", &["b"], &[]));
    check(plain(), json!([mine, other]), http(), &to(&["10.0.0.1"]));
    // One for several zones.
    let both = hinted("10.0.0.3", &["b", "a"], &[]);
    check(plain(), json!([mine, both, other]), http(), &to(&["10.0.0.1", "10.0.0.3"]));
    // A zone whose name contains mine is another one.
    let longer = hinted("10.0.0.4", &["aa"], &[]);
    check(plain(), json!([mine, longer]), http(), &to(&["10.0.0.1"]));
}

#[test]
fn case_8_one_endpoint_without_a_hint_switches_hints_off() {
    let endpoints = json!([hinted("10.0.0.1", &["a"], &[]), at("10.0.0.2")]);
    check(plain(), endpoints, http(), &to(&["10.0.0.1", "10.0.0.2"]));
}

#[test]
fn case_9_without_an_endpoint_for_this_zone_all_are_used() {
    let endpoints = json!([hinted("10.0.0.1", &["b"], &[]), hinted("10.0.0.2", &["c"], &[])]);
    check(plain(), endpoints.clone(), http(), &to(&["10.0.0.1", "10.0.0.2"]));
    let mut model = model_with(plain(), endpoints, http());
    model.set_node(NodeFacts { zone: None, ..node() });
    assert_eq!(render(&model, "web"), to(&["10.0.0.1", "10.0.0.2"]));
}

#[test]
fn case_10_node_hints_come_before_zone_hints() {
    let here = hinted("10.0.0.1", &["a"], &["here"]);
    let near = hinted("10.0.0.2", &["a"], &["other"]);
    check(plain(), json!([here, near]), http(), &to(&["10.0.0.1"]));
    // None is for this node: the zone counts.
    let far = hinted("10.0.0.3", &["b"], &["third"]);
    check(plain(), json!([near, far]), http(), &to(&["10.0.0.2"]));
    // One has no node hint: the zone counts.
    let without = hinted("10.0.0.4", &["a"], &[]);
    check(plain(), json!([here, without]), http(), &to(&["10.0.0.1", "10.0.0.4"]));
}

#[test]
fn case_11_only_ready_endpoints_decide_and_the_last_resort_ignores_hints() {
    let going = |mut endpoint: Value| {
        endpoint["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
        endpoint
    };
    let mine = going(hinted("10.0.0.1", &["a"], &[]));
    let other = hinted("10.0.0.2", &["b"], &[]);
    check(plain(), json!([mine, other]), http(), &to(&["10.0.0.2"]));
    // One that terminates and has no hint does not switch hints off.
    let bare = going(at("10.0.0.3"));
    let near = hinted("10.0.0.4", &["a"], &[]);
    check(plain(), json!([bare, near, other]), http(), &to(&["10.0.0.4"]));
    check(plain(), json!([mine, going(other)]), http(), &to(&["10.0.0.1", "10.0.0.2"]));
}

#[test]
fn case_15_a_new_zone_of_the_node_plans_all_services_anew() {
    let endpoints = json!([hinted("10.0.0.1", &["a"], &[]), hinted("10.0.0.2", &["b"], &[])]);
    let mut model = model_with(plain(), endpoints, http());
    model.take_dirty();
    model.set_node(NodeFacts { zone: Some("b".to_owned()), ..node() });
    assert_eq!(model.take_dirty().len(), 1);
    assert_eq!(render(&model, "web"), to(&["10.0.0.2"]));
}

#[test]
fn hints_do_not_matter_to_the_local_list() {
    let mut spec = plain();
    spec["internalTrafficPolicy"] = json!("Local");
    let mut here = hinted("10.0.0.1", &["b"], &[]);
    here["nodeName"] = json!("here");
    check(spec, json!([here, hinted("10.0.0.2", &["a"], &[])]), http(), &to(&["10.0.0.1"]));
}

#[test]
fn each_endpoint_has_a_reason() {
    let mut unready = at("10.0.0.3");
    unready["conditions"] = json!({"ready": false, "serving": false});
    let mut going = at("10.0.0.4");
    going["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
    let endpoints =
        json!([hinted("10.0.0.1", &["a"], &[]), hinted("10.0.0.2", &["b"], &[]), unready, going,]);
    let model = model_with(plain(), endpoints, http());
    let verdicts = model.explain_endpoints(&ServiceKey::new("ns", "web"));
    let reasons: Vec<Reason> = verdicts.iter().map(|verdict| verdict.reason).collect();
    use Reason::{NotReady, OtherZone, Ready, Terminating};
    assert_eq!(reasons, [Ready, OtherZone, NotReady, Terminating]);
}

fn balanced() -> Model {
    let mut model = Model::new(node());
    let mut spec = plain();
    spec["type"] = json!("LoadBalancer");
    spec["externalTrafficPolicy"] = json!("Local");
    spec["healthCheckNodePort"] = json!(32000);
    model.apply_service(&service("web", spec));
    model
}

#[test]
fn cases_14_and_16_health_checks_count_ready_addresses_here() {
    let mut model = balanced();
    let key = ServiceKey::new("ns", "web");
    assert_eq!(model.health_check(&key), Some(HealthCheck { port: 32000, ready_here: [0, 0] }));
    let here = |address: &str| json!({"addresses": [address], "nodeName": "here"});
    let mut going = here("10.0.0.3");
    going["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
    let endpoints = json!([here("10.0.0.1"), here("10.0.0.2"), at("10.0.0.9"), going]);
    // Two ports on the same addresses.
    model.apply_slice(&slice("web-1", "web", endpoints.clone(), http()));
    model.apply_slice(&slice("web-2", "web", endpoints, json!([{"name": "b", "port": 9}])));
    assert_eq!(model.health_check(&key), Some(HealthCheck { port: 32000, ready_here: [2, 0] }));
    model.apply_slice(&slice("web-1", "web", json!([going]), http()));
    model.delete_slice(&ServiceKey::new("ns", "web-2"));
    assert_eq!(model.health_check(&key), Some(HealthCheck { port: 32000, ready_here: [0, 0] }));
    // Only externalTrafficPolicy Local has such a port.
    let mut spec = plain();
    spec["type"] = json!("LoadBalancer");
    spec["healthCheckNodePort"] = json!(32000);
    model.apply_service(&service("web", spec));
    assert_eq!(model.health_check(&key), None);
}

#[test]
fn case_18_an_endpoint_with_the_nodes_own_address_is_one_like_others() {
    let mut host = at("192.168.0.2");
    host["nodeName"] = json!("here");
    let model = model_with(plain(), json!([host]), http());
    assert_eq!(render(&model, "web"), to(&["192.168.0.2"]));
    let plan = model.plan(&ServiceKey::new("ns", "web")).unwrap();
    assert_eq!(*plan.ports[0].here, [IpAddr::from([192, 168, 0, 2])]);
}

#[test]
fn case_20_a_service_that_comes_back_with_another_address_gives_up_the_old_one() {
    let mut model = model_with(plain(), json!([at("10.0.0.1")]), http());
    let mut spec = plain();
    spec["clusterIP"] = json!("10.96.0.7");
    spec["clusterIPs"] = json!(["10.96.0.7"]);
    model.apply_service(&service("web", spec));
    assert_eq!(render(&model, "web"), "10.96.0.7:80/tcp -> 10.0.0.1:8080 UnlessPod");
    let plan = model.plan(&ServiceKey::new("ns", "web")).unwrap();
    assert_eq!(*plan.guarded, [IpAddr::from([10, 96, 0, 7])]);
    // The old address is free for others.
    model.apply_service(&service("other", plain()));
    assert_eq!(model.take_problems(), []);
}

#[test]
fn an_address_that_two_services_have_is_guarded_once() {
    let mut model = model_with(plain(), json!([at("10.0.0.1")]), http());
    let mut second = plain();
    second["ports"] = json!([{"port": 81}]);
    model.apply_service(&service("zwei", second));
    let guarded = |name| model.plan(&ServiceKey::new("ns", name)).unwrap().guarded.len();
    assert_eq!((guarded("web"), guarded("zwei")), (1, 0));
    // It is said once, and both ports work.
    assert_eq!(model.problems.len(), 1);
    assert!(render(&model, "zwei").starts_with("10.96.0.1:81/tcp"));
}

#[test]
fn cases_30_and_45_a_thousand_ports_and_udp_that_drains() {
    let ports: Vec<Value> =
        (1..=1000).map(|port| json!({"name": format!("p{port}"), "port": port})).collect();
    let model = model_with(json!({"clusterIP": "10.96.0.1", "ports": ports}), json!([]), http());
    assert_eq!(model.plan(&ServiceKey::new("ns", "web")).unwrap().ports.len(), 1000);

    let spec = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 53, "protocol": "UDP"}]});
    let udp = json!([{"name": "", "port": 53, "protocol": "UDP"}]);
    let endpoints = json!([hinted("10.0.0.1", &["a"], &[]), hinted("10.0.0.2", &["b"], &[])]);
    let model = model_with(spec, endpoints, udp);
    let plan = model.plan(&ServiceKey::new("ns", "web")).unwrap();
    // Kept from new flows by topology, it keeps those that it has.
    assert_eq!(plan.ports[0].draining.len(), 1);
}

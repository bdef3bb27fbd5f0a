//! The cases of kube-proxy's corner that need no packets, each with its number in the reference.

mod topology;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn node() -> NodeFacts {
    NodeFacts {
        name: "here".to_owned(),
        addresses: vec![[192, 168, 0, 2].into()],
        zone: Some("a".to_owned()),
        knows_pods: true,
        masquerade_all: false,
    }
}

fn service(name: &str, spec: Value) -> Service {
    let object = json!({"metadata": {"namespace": "ns", "name": name}, "spec": spec});
    serde_json::from_value(object).unwrap()
}

fn plain() -> Value {
    json!({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ports": [{"port": 80}]})
}

fn slice(name: &str, owner: &str, endpoints: Value, ports: Value) -> EndpointSlice {
    let object = json!({
        "metadata": {"namespace": "ns", "name": name, "labels": {"kubernetes.io/service-name": owner}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": ports,
    });
    serde_json::from_value(object).unwrap()
}

fn at(address: &str) -> Value {
    json!({"addresses": [address], "conditions": {"ready": true}})
}

fn http() -> Value {
    json!([{"name": "", "port": 8080, "protocol": "TCP"}])
}

/// One line for each frontend: where, what, and to whom.
fn render(model: &Model, name: &str) -> String {
    let Some(plan) = model.plan(&ServiceKey::new("ns", name)) else { return "none".to_owned() };
    let list = |endpoints: &[Endpoint]| {
        endpoints.iter().map(Endpoint::to_string).collect::<Vec<_>>().join(" ")
    };
    let mut lines = Vec::new();
    for port in &plan.ports {
        let target = |target| match target {
            Target::Forward(scope) => list(port.pool(scope)),
            Target::Reject => "reject".to_owned(),
            Target::Drop => "drop".to_owned(),
        };
        for frontend in &port.frontends {
            let route = match frontend.route {
                Route::Same { target: to, masquerade } => format!("{} {masquerade:?}", target(to)),
                Route::BySource { inside, outside } => {
                    format!("inside {} outside {}", target(inside), target(outside))
                }
            };
            lines.push(format!("{} -> {route}", frontend.key));
        }
    }
    lines.join("\n")
}

/// A model with Service `web` and one slice.
fn model_with(spec: Value, endpoints: Value, ports: Value) -> Model {
    let mut model = Model::new(node());
    model.apply_service(&service("web", spec));
    model.apply_slice(&slice("web-1", "web", endpoints, ports));
    model
}

#[track_caller]
fn check(spec: Value, endpoints: Value, ports: Value, want: &str) {
    assert_eq!(render(&model_with(spec, endpoints, ports), "web"), want);
}

const REFUSED: &str = "10.96.0.1:80/tcp -> reject UnlessPod";
const SERVED: &str = "10.96.0.1:80/tcp -> 10.0.0.1:8080 UnlessPod";

#[test]
fn case_1_a_slice_port_without_a_number_means_no_port() {
    for port in [json!(null), json!(0), json!(70_000)] {
        check(plain(), json!([at("10.0.0.1")]), json!([{"name": "", "port": port}]), REFUSED);
    }
}

#[test]
fn case_2_conditions_that_are_absent_mean_ready() {
    for conditions in [json!(null), json!({}), json!({"serving": false, "terminating": false})] {
        let endpoint = json!({"addresses": ["10.0.0.1"], "conditions": conditions});
        check(plain(), json!([endpoint]), http(), SERVED);
    }
    let unready = json!({"addresses": ["10.0.0.1"], "conditions": {"ready": false}});
    check(plain(), json!([unready]), http(), REFUSED);
}

#[test]
fn case_3_only_the_first_address_of_an_endpoint_counts() {
    check(plain(), json!([{"addresses": ["10.0.0.1", "10.0.0.9"]}]), http(), SERVED);
}

#[test]
fn case_4_of_two_entries_for_one_address_the_living_one_counts() {
    let dying = json!({
        "addresses": ["10.0.0.1"],
        "conditions": {"ready": false, "serving": true, "terminating": true},
    });
    check(plain(), json!([dying, at("10.0.0.1")]), http(), SERVED);
    check(plain(), json!([at("10.0.0.1"), dying]), http(), SERVED);
}

#[test]
fn case_5_slices_are_merged_and_may_move_to_another_service() {
    let mut model = model_with(plain(), json!([at("10.0.0.1")]), http());
    model.apply_slice(&slice("web-2", "web", json!([at("10.0.0.2")]), http()));
    assert_eq!(render(&model, "web"), "10.96.0.1:80/tcp -> 10.0.0.1:8080 10.0.0.2:8080 UnlessPod");
    model.take_dirty();
    let other = json!({"clusterIP": "10.96.0.2", "ports": [{"port": 80}]});
    model.apply_service(&service("other", other));
    model.apply_slice(&slice("web-2", "other", json!([at("10.0.0.2")]), http()));
    assert_eq!(render(&model, "web"), SERVED);
    assert_eq!(render(&model, "other"), "10.96.0.2:80/tcp -> 10.0.0.2:8080 UnlessPod");
    assert_eq!(model.take_dirty().len(), 2);
}

#[test]
fn case_6_slices_of_another_address_type_are_ignored() {
    let mut model = model_with(plain(), json!([at("10.0.0.1")]), http());
    for kind in ["FQDN", "IPv6"] {
        let mut foreign = slice("web-2", "web", json!([at("fd00::1")]), http());
        kind.clone_into(&mut foreign.address_type);
        model.apply_slice(&foreign);
        assert_eq!(render(&model, "web"), SERVED);
    }
}

#[test]
fn case_7_service_and_slice_may_come_in_any_order() {
    let mut model = Model::new(node());
    model.apply_slice(&slice("web-1", "web", json!([at("10.0.0.1")]), http()));
    assert_eq!(model.pending(), 0);
    model.apply_service(&service("web", plain()));
    assert_eq!(render(&model, "web"), SERVED);
}

#[test]
fn case_10_headless_slices_are_ignored() {
    let mut headless = slice("web-1", "web", json!([at("10.0.0.1")]), http());
    headless
        .metadata
        .labels
        .as_mut()
        .unwrap()
        .insert("service.kubernetes.io/headless".to_owned(), String::new());
    let mut model = Model::new(node());
    model.apply_service(&service("web", plain()));
    model.apply_slice(&headless);
    assert_eq!(render(&model, "web"), REFUSED);
}

#[test]
fn case_12_and_13_terminating_endpoints_serve_only_when_alone() {
    let going = |serving: bool| {
        json!({
            "addresses": ["10.0.0.1"],
            "conditions": {"ready": false, "serving": serving, "terminating": true},
        })
    };
    check(plain(), json!([going(true)]), http(), SERVED);
    check(plain(), json!([going(false)]), http(), REFUSED);
    let with_ready = json!([going(true), at("10.0.0.2")]);
    check(plain(), with_ready, http(), "10.96.0.1:80/tcp -> 10.0.0.2:8080 UnlessPod");
}

#[test]
fn headless_external_name_and_foreign_services_are_ignored() {
    let mut foreign = service("web", plain());
    foreign.metadata.labels =
        Some([("service.kubernetes.io/service-proxy-name".to_owned(), "x".to_owned())].into());
    let mut model = Model::new(node());
    model.apply_service(&foreign);
    assert_eq!(render(&model, "web"), "none");
    for spec in [
        json!({"clusterIP": "None", "ports": [{"port": 80}]}),
        json!({"clusterIP": "", "ports": [{"port": 80}]}),
        json!({"ports": [{"port": 80}]}),
        json!({"type": "ExternalName", "clusterIP": "10.96.0.1", "ports": [{"port": 80}]}),
    ] {
        model.apply_service(&service("web", plain()));
        assert_eq!(render(&model, "web"), REFUSED);
        model.apply_service(&service("web", spec));
        assert_eq!(render(&model, "web"), "none");
    }
}

#[test]
fn case_21_one_number_serves_tcp_and_udp() {
    let spec = json!({"clusterIP": "10.96.0.1", "ports": [
        {"name": "t", "port": 80, "nodePort": 30080, "protocol": "TCP"},
        {"name": "u", "port": 80, "nodePort": 30080, "protocol": "UDP"},
        {"name": "s", "port": 80, "protocol": "SCTP"},
    ]});
    let ports = json!([{"name": "t", "port": 1}, {"name": "u", "port": 2, "protocol": "UDP"}]);
    check(
        spec,
        json!([at("10.0.0.1")]),
        ports,
        "10.96.0.1:80/tcp -> 10.0.0.1:1 UnlessPod\n\
         node port 30080/tcp -> 10.0.0.1:1 Always\n\
         10.96.0.1:80/udp -> 10.0.0.1:2 UnlessPod\n\
         node port 30080/udp -> 10.0.0.1:2 Always\n\
         10.96.0.1:80/sctp -> reject UnlessPod",
    );
}

#[test]
fn cases_22_to_27_traffic_policies() {
    let local = |address: &str| json!({"addresses": [address], "nodeName": "here"});
    let spec = |field: &str| {
        let mut spec = plain();
        spec[field] = json!("Local");
        spec["ports"][0]["nodePort"] = json!(30080);
        spec
    };
    let (external, internal) = (spec("externalTrafficPolicy"), spec("internalTrafficPolicy"));
    let both = json!([local("10.0.0.1"), at("10.0.0.2")]);
    check(
        external.clone(),
        both.clone(),
        http(),
        "10.96.0.1:80/tcp -> 10.0.0.1:8080 10.0.0.2:8080 UnlessPod\n\
         node port 30080/tcp -> inside 10.0.0.1:8080 10.0.0.2:8080 outside 10.0.0.1:8080",
    );
    check(
        external.clone(),
        json!([at("10.0.0.2")]),
        http(),
        "10.96.0.1:80/tcp -> 10.0.0.2:8080 UnlessPod\n\
         node port 30080/tcp -> inside 10.0.0.2:8080 outside drop",
    );
    check(
        external,
        json!([]),
        http(),
        "10.96.0.1:80/tcp -> reject UnlessPod\nnode port 30080/tcp -> reject Never",
    );
    check(
        internal.clone(),
        both,
        http(),
        "10.96.0.1:80/tcp -> 10.0.0.1:8080 UnlessPod\n\
         node port 30080/tcp -> 10.0.0.1:8080 10.0.0.2:8080 Always",
    );
    check(
        internal,
        json!([at("10.0.0.2")]),
        http(),
        "10.96.0.1:80/tcp -> drop UnlessPod\nnode port 30080/tcp -> 10.0.0.2:8080 Always",
    );
}

#[test]
fn the_local_list_falls_back_to_terminating_endpoints_by_itself() {
    let going = json!({
        "addresses": ["10.0.0.1"], "nodeName": "here",
        "conditions": {"ready": false, "serving": true, "terminating": true},
    });
    let mut spec = plain();
    spec["internalTrafficPolicy"] = json!("Local");
    check(spec, json!([going, at("10.0.0.2")]), http(), SERVED);
}

#[test]
fn cases_28_and_31_to_33_load_balancers_and_their_ranges() {
    let balancer = |ranges: Value| {
        let mut service = service("web", plain());
        service.spec.kind = Some("LoadBalancer".to_owned());
        service.spec.load_balancer_source_ranges = serde_json::from_value(ranges).unwrap();
        service.status = serde_json::from_value(json!({"loadBalancer": {"ingress": [
            {"ip": "1.2.3.4"}, {"ip": "1.2.3.5", "ipMode": "Proxy"}, {"hostname": "x"},
        ]}}))
        .unwrap();
        let mut model = Model::new(node());
        model.apply_service(&service);
        assert_eq!(
            render(&model, "web"),
            "10.96.0.1:80/tcp -> reject UnlessPod\n1.2.3.4:80/tcp -> reject Always"
        );
        let plan = model.plan(&ServiceKey::new("ns", "web")).unwrap();
        let sources = plan.ports[0].frontends[1].sources.clone();
        sources.map(|list| list.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    assert_eq!(balancer(json!([" 9.0.0.0/8 "])), Some(vec!["9.0.0.0/8".to_owned()]));
    assert_eq!(balancer(json!(["9.0.0.0/8", "0.0.0.0/0"])), None);
    assert_eq!(balancer(json!(["fd00::/8"])), None);
    // What cannot be read closes, never opens.
    assert_eq!(balancer(json!(["10.0.0.0/33"])), Some(vec![]));
    assert_eq!(balancer(json!(["fd00::/8", "x"])), Some(vec![]));
    assert_eq!(balancer(json!(["10.0.0.0/33", "9.0.0.0/8"])), Some(vec!["9.0.0.0/8".to_owned()]));
    let with_itself = Some(vec!["1.2.3.4/32".to_owned(), "192.168.0.0/16".to_owned()]);
    assert_eq!(balancer(json!(["192.168.0.0/16"])), with_itself);
}

#[test]
fn case_34_addresses_with_leading_zeros_are_read_as_decimal() {
    for (text, want) in [
        ("172.030.0.01", Some("172.30.0.1")),
        ("::ffff:1.2.3.4", Some("1.2.3.4")),
        ("1.2.3", None),
        ("1.2.3.999", None),
        ("1.2.3.+4", None),
    ] {
        let found = parse_address(text).map(|address| address.to_string());
        assert_eq!(found.as_deref(), want, "{text}");
    }
}

#[test]
fn case_35_without_cluster_ips_the_single_one_counts() {
    let spec = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]});
    check(spec, json!([at("10.0.0.1")]), http(), SERVED);
}

#[test]
fn bad_fields_are_named_and_the_rest_works() {
    let mut spec = plain();
    spec["externalIPs"] = json!(["nonsense", "1.2.3.4"]);
    spec["ports"] = json!([{"port": 80}, {"port": 99_999}, {"port": 81, "protocol": "ICMP"}]);
    let mut model = model_with(spec, json!([{"addresses": ["x"]}, at("10.0.0.1")]), http());
    let problems: Vec<String> = model.take_problems().into_iter().map(|p| p.what).collect();
    assert_eq!(
        problems,
        [
            "spec.externalIPs[0]: \"nonsense\" is not an IP address",
            "spec.ports[1].port: 99999 is not a port (1-65535)",
            "spec.ports[2].protocol: \"ICMP\" is not TCP, UDP or SCTP",
            "endpoints[0].addresses: \"x\" is not an IP address",
        ]
    );
    assert_eq!(render(&model, "web"), format!("{SERVED}\n1.2.3.4:80/tcp -> 10.0.0.1:8080 Always"));
}

#[test]
fn a_change_marks_only_the_services_that_it_concerns() {
    let mut model = model_with(plain(), json!([at("10.0.0.1")]), http());
    let other = json!({"clusterIP": "10.96.0.2", "ports": [{"port": 80}]});
    model.apply_service(&service("other", other.clone()));
    model.take_dirty();
    model.apply_service(&service("other", other));
    model.apply_slice(&slice("web-1", "web", json!([at("10.0.0.1")]), http()));
    assert_eq!(model.pending(), 0);
    model.apply_slice(&slice("web-1", "web", json!([at("10.0.0.2")]), http()));
    assert_eq!(model.take_dirty(), HashSet::from([ServiceKey::new("ns", "web")]));
}

#[derive(Clone, Debug)]
enum Step {
    Service(u8, u8, bool),
    DeleteService(u8),
    Slice(u8, u8, Vec<u8>),
    DeleteSlice(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u8..4, 1u8..4, any::<bool>()).prop_map(|(n, ip, ext)| Step::Service(n, ip, ext)),
        (0u8..4).prop_map(Step::DeleteService),
        (0u8..6, 0u8..4, proptest::collection::vec(0u8..5, 0..4))
            .prop_map(|(n, owner, of)| Step::Slice(n, owner, of)),
        (0u8..6).prop_map(Step::DeleteSlice),
    ]
}

fn make_service(number: u8, ip: u8, external: bool) -> Service {
    let mut spec = json!({
        "clusterIP": format!("10.96.{number}.{ip}"), "ports": [{"port": 80, "nodePort": 30080}],
    });
    if external {
        spec["externalIPs"] = json!(["1.2.3.4"]);
    }
    service(&format!("s{number}"), spec)
}

fn make_slice(number: u8, owner: u8, of: &[u8]) -> EndpointSlice {
    let endpoints = of.iter().map(|n| at(&format!("10.0.0.{n}"))).collect();
    slice(&format!("slice{number}"), &format!("s{owner}"), endpoints, http())
}

proptest! {
    /// Whatever happened before: what counts is what is there now.
    #[test]
    fn any_history_ends_in_the_same_plans_as_starting_anew(
        steps in proptest::collection::vec(step(), 0..40),
    ) {
        let mut model = Model::new(node());
        let mut plans = crate::diff::Plans::new();
        let (mut services, mut slices) = (HashMap::new(), HashMap::new());
        for step in steps {
            match step {
                Step::Service(n, ip, external) => {
                    model.apply_service(&make_service(n, ip, external));
                    services.insert(n, make_service(n, ip, external));
                }
                Step::DeleteService(n) => {
                    model.delete_service(&ServiceKey::new("ns", &format!("s{n}")));
                    services.remove(&n);
                }
                Step::Slice(n, owner, of) => {
                    model.apply_slice(&make_slice(n, owner, &of));
                    slices.insert(n, make_slice(n, owner, &of));
                }
                Step::DeleteSlice(n) => {
                    model.delete_slice(&ServiceKey::new("ns", &format!("slice{n}")));
                    slices.remove(&n);
                }
            }
            let dirty = model.take_dirty();
            crate::diff::advance(&mut plans, dirty, |key| model.plan(key));
        }
        let mut fresh = Model::new(node());
        slices.values().for_each(|slice| fresh.apply_slice(slice));
        services.values().for_each(|service| fresh.apply_service(service));
        let mut fresh_plans = crate::diff::Plans::new();
        let dirty = fresh.take_dirty();
        crate::diff::advance(&mut fresh_plans, dirty, |key| fresh.plan(key));
        prop_assert_eq!(plans, fresh_plans);
    }
}

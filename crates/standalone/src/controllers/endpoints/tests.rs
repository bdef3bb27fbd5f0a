use super::desired::{endpoints, families};
use super::slices::compare;
use super::*;
use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

fn service(spec: &Value) -> Service {
    let mut all = json!({"clusterIP": "10.96.0.9", "ipFamilies": ["IPv4"], "selector": {"app": "web"},
        "ports": [{"name": "http", "port": 80, "targetPort": 8080}]});
    json_patch::merge(&mut all, spec);
    serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "n", "uid": "svc", "labels": {"team": "x"}}, "spec": all})).unwrap()
}

fn pod(name: &str, change: &Value) -> Arc<Pod> {
    let number: u32 = name.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(1);
    let mut pod = json!({"metadata": {"name": name, "namespace": "n", "uid": name, "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIP": format!("10.1.{}.{}", number / 250, number % 250),
            "podIPs": [{"ip": format!("10.1.{}.{}", number / 250, number % 250)}, {"ip": format!("fd00::{number:x}")}],
            "conditions": [{"type": "Ready", "status": "True"}]}});
    json_patch::merge(&mut pod, change);
    Arc::new(serde_json::from_value(pod).unwrap())
}

fn node(_: &str) -> Option<Arc<Node>> {
    let node = json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z1"}}});
    Some(Arc::new(serde_json::from_value(node).unwrap()))
}

fn wanted(service: &Service, pods: &[Arc<Pod>]) -> BTreeMap<String, desired::ByPorts> {
    families(service)
        .into_iter()
        .map(|family| {
            let found = endpoints(service, &family, pods, node);
            (family, found)
        })
        .collect()
}

/// Applies the writes as the API server would.
fn sync(
    service: &Service,
    pods: &[Arc<Pod>],
    held: &mut Vec<Arc<EndpointSlice>>,
) -> (usize, usize, usize) {
    let writes = compare(service, wanted(service, pods), held, None);
    let counts = (writes.create.len(), writes.update.len(), writes.delete.len());
    for gone in &writes.delete {
        held.retain(|slice| slice.metadata.name != gone.metadata.name);
    }
    for changed in writes.update {
        let at =
            held.iter().position(|slice| slice.metadata.name == changed.metadata.name).unwrap();
        held[at] = Arc::new(changed);
    }
    for mut new in writes.create {
        new.metadata.name = Some(format!("web-{}", held.len() + 100 * counts.0));
        held.push(Arc::new(new));
    }
    counts
}

fn addresses(slices: &[Arc<EndpointSlice>]) -> Vec<String> {
    let all = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
    let mut all: Vec<String> = all.flat_map(|endpoint| endpoint.addresses.clone()).collect();
    all.sort();
    all
}

#[test]
fn conditions_follow_the_pod() {
    let leaving = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    let table = [
        (json!({}), json!({}), Some((true, true, false))),
        (json!({}), unready.clone(), Some((false, false, false))),
        (json!({}), leaving.clone(), Some((false, true, true))),
        (json!({"publishNotReadyAddresses": true}), unready, Some((true, false, false))),
        (json!({"publishNotReadyAddresses": true}), leaving, Some((true, true, true))),
        (json!({}), json!({"status": {"phase": "Failed"}}), None),
        (json!({}), json!({"status": {"podIP": null, "podIPs": null}}), None),
        (json!({}), json!({"metadata": {"labels": {"app": "other"}}}), None),
    ];
    for (spec, change, want) in table {
        let found = endpoints(&service(&spec), "IPv4", &[pod("p1", &change)], node);
        let found = found.values().flatten().next().map(|endpoint| {
            let conditions = endpoint.conditions.clone().unwrap();
            (
                conditions.ready.unwrap(),
                conditions.serving.unwrap(),
                conditions.terminating.unwrap(),
            )
        });
        assert_eq!(found, want, "{spec} {change}");
    }
}

#[test]
fn named_ports_with_different_numbers_make_several_slices() {
    let service = service(&json!({"ports": [{"name": "http", "port": 80, "targetPort": "web"}]}));
    let other = json!({"spec": {"containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 9090}]}]}});
    let without = json!({"spec": {"containers": [{"name": "c"}]}});
    let pods = [pod("p1", &json!({})), pod("p2", &other), pod("p3", &without)];
    let mut held = Vec::new();
    assert_eq!(sync(&service, &pods, &mut held), (2, 0, 0));
    let mut ports: Vec<_> =
        held.iter().map(|slice| slice.ports.as_ref().unwrap()[0].port.unwrap()).collect();
    ports.sort_unstable();
    assert_eq!(ports, [8080, 9090]);
    assert_eq!(addresses(&held), ["10.1.0.1", "10.1.0.2"]);
}

#[test]
fn a_slice_says_whose_it_is_and_where_its_endpoints_are() {
    let service = service(&json!({"trafficDistribution": "PreferClose"}));
    let mut held = Vec::new();
    sync(&service, &[pod("p1", &json!({}))], &mut held);
    let slice = &held[0];
    let labels = slice.metadata.labels.as_ref().unwrap();
    assert_eq!(labels["kubernetes.io/service-name"], "web");
    assert_eq!(labels["endpointslice.kubernetes.io/managed-by"], MANAGED_BY);
    assert_eq!(labels["team"], "x");
    assert_eq!(slice.metadata.owner_references.as_ref().unwrap()[0].uid, "svc");
    assert_eq!(slice.metadata.generate_name.as_deref(), Some("web-"));
    let endpoint = &slice.endpoints.as_ref().unwrap()[0];
    assert_eq!(endpoint.node_name.as_deref(), Some("n1"));
    assert_eq!(endpoint.zone.as_deref(), Some("z1"));
    assert_eq!(endpoint.target_ref.as_ref().unwrap().name.as_deref(), Some("p1"));
    assert_eq!(endpoint.hints.as_ref().unwrap().for_zones.as_ref().unwrap()[0].name, "z1");
}

#[test]
fn dual_stack_has_slices_of_both_families_and_losing_one_removes_them() {
    let both = service(&json!({"ipFamilies": ["IPv4", "IPv6"]}));
    let mut held = Vec::new();
    assert_eq!(sync(&both, &[pod("p1", &json!({}))], &mut held), (2, 0, 0));
    assert_eq!(addresses(&held), ["10.1.0.1", "fd00::1"]);
    assert_eq!(sync(&service(&json!({})), &[pod("p1", &json!({}))], &mut held), (0, 0, 1));
    assert_eq!(addresses(&held), ["10.1.0.1"]);
}

#[test]
fn headless_services_need_no_ports() {
    let headless = service(&json!({"clusterIP": "None", "ports": null}));
    let mut held = Vec::new();
    sync(
        &headless,
        &[pod("p1", &json!({"spec": {"hostname": "one", "subdomain": "web"}}))],
        &mut held,
    );
    assert_eq!(addresses(&held), ["10.1.0.1"]);
    assert_eq!(held[0].endpoints.as_ref().unwrap()[0].hostname.as_deref(), Some("one"));
    assert_eq!(held[0].metadata.labels.as_ref().unwrap()["service.kubernetes.io/headless"], "");
}

#[test]
fn slices_hold_a_hundred_and_one_change_touches_one() {
    let service = service(&json!({}));
    let mut pods: Vec<Arc<Pod>> = (1..=250).map(|n| pod(&format!("p{n}"), &json!({}))).collect();
    let mut held = Vec::new();
    assert_eq!(sync(&service, &pods, &mut held), (3, 0, 0));
    let sizes = |held: &[Arc<EndpointSlice>]| -> Vec<usize> {
        held.iter().map(|slice| slice.endpoints.as_ref().unwrap().len()).collect()
    };
    assert_eq!(sizes(&held), [100, 100, 50]);
    assert_eq!(sync(&service, &pods, &mut held), (0, 0, 0));
    pods[149] = pod("p150", &json!({"status": {"conditions": []}}));
    assert_eq!(sync(&service, &pods, &mut held), (0, 1, 0));
    pods.remove(0);
    assert_eq!(sync(&service, &pods, &mut held), (0, 1, 0));
    pods.push(pod("p999", &json!({})));
    assert_eq!(sync(&service, &pods, &mut held), (0, 1, 0));
    assert_eq!(addresses(&held).len(), 250);
    pods.clear();
    let (created, updated, deleted) = sync(&service, &pods, &mut held);
    assert_eq!((created, updated + deleted), (0, 3));
    assert_eq!(sizes(&held), [0]);
}

#[test]
fn nobody_behind_a_service_is_said_once() {
    let service = service(&json!({}));
    let mut held = Vec::new();
    assert_eq!(sync(&service, &[], &mut held), (1, 0, 0));
    assert_eq!(sync(&service, &[], &mut held), (0, 0, 0));
    // The first pod rewrites the empty slice.
    assert_eq!(sync(&service, &[pod("p1", &json!({}))], &mut held), (0, 1, 0));
    assert_eq!(addresses(&held), ["10.1.0.1"]);
}

#[test]
fn legacy_endpoints_split_ready_from_not_ready() {
    let service = service(&json!({}));
    let pods = [
        pod("p2", &json!({})),
        pod("p1", &json!({})),
        pod("p3", &json!({"status": {"conditions": []}})),
        pod("p4", &json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})),
    ];
    let found = legacy::endpoints(&service, &pods, None, None).unwrap();
    let subset = &found.subsets.as_ref().unwrap()[0];
    let ips = |list: &Option<Vec<k8s_openapi::api::core::v1::EndpointAddress>>| -> Vec<String> {
        list.iter().flatten().map(|address| address.ip.clone()).collect()
    };
    assert_eq!(ips(&subset.addresses), ["10.1.0.1", "10.1.0.2"]);
    assert_eq!(ips(&subset.not_ready_addresses), ["10.1.0.3"]);
    assert_eq!(subset.ports.as_ref().unwrap()[0].port, 8080);
    assert_eq!(legacy::endpoints(&service, &pods, Some(&found), None), None);
    let empty = legacy::endpoints(&service, &[], Some(&found), None).unwrap();
    assert_eq!(empty.subsets, None);
}

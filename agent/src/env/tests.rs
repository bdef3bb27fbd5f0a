use serde_json::json;

use super::*;

fn check(container: serde_json::Value, want: Result<&[(&str, &str)], &str>) {
    let container: Container = serde_json::from_value(container).unwrap();
    let pod: Pod = serde_json::from_value(json!({
        "metadata": { "name": "web", "namespace": "shop", "labels": { "a": "1", "b": "x\"y" } },
        "spec": { "containers": [container] },
    }))
    .unwrap();
    let keys = |list: &[(&str, &str)]| {
        let pairs = list.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec()));
        Some(Arc::new(pairs.collect::<Keys>()))
    };
    let objects = Objects {
        config_maps: [("cm".to_owned(), keys(&[("K", "from-cm"), ("L", "l")]))].into(),
        secrets: [("s".to_owned(), keys(&[("K", "secret")])), ("gone".to_owned(), None)].into(),
    };
    let allocatable = [(
        "memory".to_owned(),
        k8s_openapi::apimachinery::pkg::api::resource::Quantity("2Gi".into()),
    )]
    .into();
    let fields = FieldContext {
        pod_ips: &["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
        host_ips: &["192.0.2.1".parse().unwrap()],
        node_name: "n1",
        allocatable: &allocatable,
    };
    let services = [("DB_SERVICE_HOST".to_owned(), "10.96.0.9".to_owned())].into();
    let context = EnvContext { pod: &pod, objects: &objects, fields: &fields, services: &services };
    let got = build(&container, &context).map_err(|e| e.to_string());
    let got = got.map(|list| list.into_iter().filter(|(k, _)| k != "DB_SERVICE_HOST").collect());
    let want = want
        .map(|list| {
            list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Vec<_>>()
        })
        .map_err(str::to_owned);
    assert_eq!(got, want);
}

fn with_env(env: serde_json::Value) -> serde_json::Value {
    json!({ "name": "c", "env": env })
}

#[test]
fn references_are_expanded_from_what_came_before() {
    check(
        with_env(json!([
            { "name": "A", "value": "1" },
            { "name": "B", "value": "$(A)-$(DB_SERVICE_HOST)-$(C)-$$(A)-$" },
            { "name": "C", "value": "late" },
            { "name": "A", "value": "2" },
        ])),
        Ok(&[("A", "1"), ("B", "1-10.96.0.9-$(C)-$(A)-$"), ("C", "late"), ("A", "2")]),
    );
}

#[test]
fn variables_that_double_each_other_do_not_take_all_memory() {
    let mut env = vec![json!({ "name": "V0", "value": "0123456789" })];
    env.extend((1..40).map(|n| {
        let before = format!("$(V{0})$(V{0})", n - 1);
        json!({ "name": format!("V{n}"), "value": before })
    }));
    let too_long =
        "env V14 is longer than 131072 bytes, which is the most that a program can be given";
    check(with_env(env.into()), Err(too_long));
    // Each of them could be given, but not all together.
    let mut env = vec![json!({ "name": "V", "value": "x".repeat(100_000) })];
    env.extend((0..100).map(|n| json!({ "name": format!("W{n}"), "value": "$(V)" })));
    let too_much = "env W61: all variables together are longer than 6291456 bytes";
    check(with_env(env.into()), Err(too_much));
}

#[test]
fn env_wins_over_env_from() {
    check(
        json!({
            "name": "c",
            "envFrom": [
                { "configMapRef": { "name": "cm" } },
                { "prefix": "P_", "secretRef": { "name": "s" } },
                { "secretRef": { "name": "gone", "optional": true } },
            ],
            "env": [{ "name": "K", "value": "own $(L)" }],
        }),
        Ok(&[("L", "l"), ("P_K", "secret"), ("K", "own l")]),
    );
}

#[test]
fn missing_objects_and_keys_are_named() {
    let secret = |name: &str, key: &str, optional: bool| {
        with_env(json!([{ "name": "X", "valueFrom": { "secretKeyRef": {
            "name": name, "key": key, "optional": optional } } }]))
    };
    check(secret("s", "K", false), Ok(&[("X", "secret")]));
    check(secret("s", "no", true), Ok(&[]));
    check(secret("s", "no", false), Err("couldn't find key no in secret shop/s"));
    check(secret("gone", "K", false), Err("secret \"gone\" not found"));
    check(secret("gone", "K", true), Ok(&[]));
}

#[test]
fn fields_and_resources() {
    let field = |path: &str| {
        with_env(json!([{ "name": "X", "valueFrom": { "fieldRef": { "fieldPath": path } } }]))
    };
    check(field("metadata.labels['a']"), Ok(&[("X", "1")]));
    check(field("metadata.labels"), Ok(&[("X", "a=\"1\"\nb=\"x\\\"y\"")]));
    check(field("status.podIPs"), Ok(&[("X", "10.1.0.2,fd00::2")]));
    check(field("status.hostIP"), Ok(&[("X", "192.0.2.1")]));
    check(field("spec.nodeName"), Ok(&[("X", "n1")]));
    let resource = |name: &str, divisor: &str| {
        json!({
            "name": "c",
            "resources": { "limits": { "cpu": "1500m" }, "requests": { "cpu": "200m" } },
            "env": [{ "name": "X", "valueFrom": { "resourceFieldRef": { "resource": name, "divisor": divisor } } }],
        })
    };
    check(resource("limits.cpu", "1"), Ok(&[("X", "2")]));
    check(resource("limits.cpu", "1m"), Ok(&[("X", "1500")]));
    check(resource("requests.cpu", "0"), Ok(&[("X", "1")]));
    check(resource("limits.memory", "1Mi"), Ok(&[("X", "2048")]));
}

#[test]
fn services_make_link_variables() {
    let service = |namespace: &str, name: &str, ip: &str| services::ServiceLink {
        namespace: namespace.into(),
        name: name.into(),
        cluster_ip: ip.into(),
        ports: vec![("http".into(), 80, "TCP".into())],
    };
    let all = [
        service("default", "kubernetes", "10.96.0.1"),
        service("shop", "my-db", "10.96.0.9"),
        service("shop", "headless", "None"),
        service("other", "x", "10.96.0.8"),
    ];
    let variables = services::variables(&all, "shop", true);
    let shown: Vec<_> = variables.iter().filter(|(k, _)| k.starts_with("MY_DB")).collect();
    expect_test::expect![[r#"
        [
            (
                "MY_DB_PORT",
                "tcp://10.96.0.9:80",
            ),
            (
                "MY_DB_PORT_80_TCP",
                "tcp://10.96.0.9:80",
            ),
            (
                "MY_DB_PORT_80_TCP_ADDR",
                "10.96.0.9",
            ),
            (
                "MY_DB_PORT_80_TCP_PORT",
                "80",
            ),
            (
                "MY_DB_PORT_80_TCP_PROTO",
                "tcp",
            ),
            (
                "MY_DB_SERVICE_HOST",
                "10.96.0.9",
            ),
            (
                "MY_DB_SERVICE_PORT",
                "80",
            ),
            (
                "MY_DB_SERVICE_PORT_HTTP",
                "80",
            ),
        ]
    "#]]
    .assert_debug_eq(&shown);
    assert!(variables.contains_key("KUBERNETES_SERVICE_HOST"));
    assert!(!variables.keys().any(|k| k.starts_with("HEADLESS") || k.starts_with("X_")));
    let without = services::variables(&all, "shop", false);
    assert!(without.keys().all(|k| k.starts_with("KUBERNETES")));
}

use super::*;

#[test]
fn a_pod_gets_what_kubernetes_gives() {
    let mut pod = json!({"spec": {
        "containers": [{
            "name": "a", "image": "registry:5000/web", "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": "1"}}, "livenessProbe": {"httpGet": {"port": 80}},
        }],
        "volumes": [{"name": "v"}, {"name": "c", "configMap": {"name": "x"}}],
    }});
    apply(&kinds::POD, &mut pod);
    let once = pod.clone();
    apply(&kinds::POD, &mut pod);
    assert_eq!(pod, once, "defaults are set once");
    let container = &pod["spec"]["containers"][0];
    assert_eq!(container["imagePullPolicy"], "Always");
    assert_eq!(container["resources"]["requests"]["cpu"], "1");
    assert_eq!(container["livenessProbe"]["periodSeconds"], 10);
    assert_eq!(
        container["livenessProbe"]["httpGet"],
        json!({"port": 80, "path": "/", "scheme": "HTTP"})
    );
    assert_eq!(pod["spec"]["volumes"][0]["emptyDir"], json!({}));
    assert_eq!(pod["spec"]["volumes"][1]["configMap"]["defaultMode"], 420);
    assert_eq!(qos_class(&pod["spec"]), "Burstable");
}

#[test]
fn image_tags_decide_the_pull_policy() {
    for (image, policy) in [
        ("web", "Always"),
        ("web:latest", "Always"),
        ("web:1", "IfNotPresent"),
        ("h:5000/web", "Always"),
        ("web@sha256:00", "IfNotPresent"),
    ] {
        let mut pod = json!({"spec": {"containers": [{"name": "a", "image": image}]}});
        apply(&kinds::POD, &mut pod);
        assert_eq!(pod["spec"]["containers"][0]["imagePullPolicy"], policy, "{image}");
    }
}

#[test]
fn plain_text_of_a_secret_becomes_data() {
    let mut secret = json!({"stringData": {"a": "b"}});
    apply(&kinds::SECRET, &mut secret);
    assert_eq!(secret, json!({"type": "Opaque", "data": {"a": "Yg=="}}));
}

#[test]
fn a_service_update_keeps_addresses_and_ports() {
    let old = json!({"spec": {"type": "NodePort", "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"],
        "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}]}});
    let mut new =
        json!({"spec": {"type": "NodePort", "ports": [{"port": 80, "targetPort": 8080}]}});
    apply(&kinds::SERVICE, &mut new);
    keep_service_allocation(&old, &mut new);
    assert_eq!(new["spec"]["clusterIP"], "10.96.0.9");
    assert_eq!(new["spec"]["ports"][0]["nodePort"], 30080);
}

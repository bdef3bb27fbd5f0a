use super::*;
use crate::defaults;
use crate::error::ApiError;

/// What Kubernetes would say, after defaulting.
#[track_caller]
fn check(kind: &Kind, mut value: Value, want: &[&str]) {
    value["metadata"]["name"] = json!("x");
    defaults::apply(kind, &mut value);
    let causes: Vec<_> =
        create(kind, &value).iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
    assert_eq!(causes, want);
}

fn pod(container: Value) -> Value {
    let mut all = json!({"name": "a", "image": "i"});
    json_patch::merge(&mut all, &container);
    json!({"spec": {"containers": [all]}})
}

#[test]
fn pods() {
    check(&kinds::POD, pod(json!({})), &[]);
    check(&kinds::POD, json!({"spec": {}}), &["spec.containers: Required value"]);
    check(&kinds::POD, pod(json!({"image": null})), &["spec.containers[0].image: Required value"]);
    check(
        &kinds::POD,
        pod(json!({"volumeMounts": [{"name": "v", "mountPath": "/a"}]})),
        &["spec.containers[0].volumeMounts[0].name: Not found: \"v\""],
    );
    check(
        &kinds::POD,
        pod(json!({"ports": [{"containerPort": 70000}]})),
        &[
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
        ],
    );
    check(
        &kinds::POD,
        pod(json!({"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}})),
        &[
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
        ],
    );
    check(
        &kinds::POD,
        pod(json!({"livenessProbe": {"periodSeconds": 3}})),
        &["spec.containers[0].livenessProbe: Required value: must specify a handler type"],
    );
    let mut policy = pod(json!({}));
    policy["spec"]["restartPolicy"] = json!("Sometimes");
    check(
        &kinds::POD,
        policy,
        &[
            "spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"OnFailure\", \"Never\"",
        ],
    );
}

#[test]
fn several_causes_are_one_sentence() {
    let pod = json!({"metadata": {"name": "x"}, "spec": {"containers": [{}]}});
    let error = ApiError::invalid(&kinds::POD, "x", &create(&kinds::POD, &pod));
    assert_eq!(
        error.message,
        "Pod \"x\" is invalid: [spec.containers[0].name: Required value, spec.containers[0].image: Required value]"
    );
    assert_eq!(error.details["causes"][0]["field"], "spec.containers[0].name");
}

#[test]
fn a_running_pod_may_only_change_its_images() {
    let mut old = pod(json!({}));
    defaults::apply(&kinds::POD, &mut old);
    let mut image = old.clone();
    image["spec"]["containers"][0]["image"] = json!("j");
    assert_eq!(update(&kinds::POD, &old, &image), []);
    let mut command = old.clone();
    command["spec"]["containers"][0]["command"] = json!(["x"]);
    assert!(
        update(&kinds::POD, &old, &command)[0]
            .message
            .starts_with("Forbidden: pod updates may not change")
    );
    let mut more = old.clone();
    more["spec"]["tolerations"] = json!([{"key": "a", "operator": "Exists"}]);
    assert_eq!(update(&kinds::POD, &old, &more), []);
}

#[test]
fn services() {
    check(&kinds::SERVICE, json!({"spec": {}}), &["spec.ports: Required value"]);
    check(
        &kinds::SERVICE,
        json!({"spec": {"ports": [{"port": 80}, {"port": 81, "name": "b"}]}}),
        &["spec.ports[0].name: Required value"],
    );
    check(&kinds::SERVICE, json!({"spec": {"clusterIP": "None"}}), &[]);
    let old = json!({"spec": {"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"]}});
    let new = json!({"spec": {"clusterIP": "10.0.0.2", "clusterIPs": ["10.0.0.2"]}});
    let causes = update(&kinds::SERVICE, &old, &new);
    assert_eq!(causes[0].message, "Invalid value: [\"10.0.0.2\"]: may not change once set");
}

#[test]
fn deployments() {
    let template = json!({"metadata": {"labels": {"app": "b"}}, "spec": {"containers": [{"name": "a", "image": "i"}]}});
    let selector = json!({"matchLabels": {"app": "a"}});
    check(
        &kinds::DEPLOYMENT,
        json!({"spec": {"selector": selector, "template": template}}),
        &[
            "spec.template.metadata.labels: Invalid value: {\"app\":\"b\"}: `selector` does not match template `labels`",
        ],
    );
    let old = json!({"spec": {"selector": selector}});
    let new = json!({"spec": {"selector": {"matchLabels": {"app": "b"}}}});
    assert_eq!(
        update(&kinds::DEPLOYMENT, &old, &new)[0].message,
        "Invalid value: {\"matchLabels\":{\"app\":\"b\"}}: field is immutable"
    );
}

#[test]
fn names_and_labels() {
    let causes = create(
        &kinds::CONFIG_MAP,
        &json!({"metadata": {"name": "Big", "labels": {"a b": "c/d"}}, "data": {"a/b": ""}}),
    );
    let fields: Vec<_> = causes.iter().map(|c| c.field.as_str()).collect();
    assert_eq!(fields, ["metadata.name", "metadata.labels", "metadata.labels", "data[a/b]"]);
    assert!(causes[0].message.contains("a lowercase RFC 1123 subdomain must consist of"));
    assert!(names::label_1035("1a").is_some() && names::label("1a").is_none());
}

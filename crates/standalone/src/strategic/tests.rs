use serde_json::json;

use super::*;

#[track_caller]
fn check(mut target: Value, patch: &Value, want: &Value) {
    merge(&mut target, patch).unwrap();
    assert_eq!(target, *want);
}

#[test]
fn lists_merge_by_key() {
    let pod = json!({"spec": {"containers": [{"name": "a", "image": "x:1", "env": [{"name": "K", "value": "1"}]}, {"name": "b", "image": "y"}]}});
    check(
        pod.clone(),
        &json!({"spec": {"containers": [{"name": "a", "image": "x:2"}]}}),
        &json!({"spec": {"containers": [{"name": "a", "image": "x:2", "env": [{"name": "K", "value": "1"}]}, {"name": "b", "image": "y"}]}}),
    );
    check(
        pod.clone(),
        &json!({"spec": {"containers": [{"name": "b", "$patch": "delete"}], "$setElementOrder/containers": [{"name": "a"}]}}),
        &json!({"spec": {"containers": [{"name": "a", "image": "x:1", "env": [{"name": "K", "value": "1"}]}]}}),
    );
    check(
        pod,
        &json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "c", "image": "z"}]}}),
        &json!({"spec": {"containers": [{"name": "c", "image": "z"}]}}),
    );
}

#[test]
fn order_of_elements() {
    check(
        json!({"containers": [{"name": "a"}, {"name": "b"}]}),
        &json!({"$setElementOrder/containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}], "containers": [{"name": "c", "image": "i"}]}),
        &json!({"containers": [{"name": "c", "image": "i"}, {"name": "b"}, {"name": "a"}]}),
    );
}

#[test]
fn primitives_nulls_and_atomic_lists() {
    check(
        json!({"metadata": {"finalizers": ["a", "b"], "labels": {"x": "1", "y": "2"}}, "spec": {"args": ["1"], "tolerations": [{"key": "a"}]}}),
        &json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"], "labels": {"x": null}}, "spec": {"args": ["2", "3"], "tolerations": [{"key": "b"}]}}),
        &json!({"metadata": {"finalizers": ["b", "c"], "labels": {"y": "2"}}, "spec": {"args": ["2", "3"], "tolerations": [{"key": "b"}]}}),
    );
}

#[test]
fn ports_have_the_key_of_their_owner() {
    check(
        json!({"spec": {"ports": [{"port": 80, "nodePort": 30080, "targetPort": 1}]}}),
        &json!({"spec": {"ports": [{"port": 80, "targetPort": 2}]}}),
        &json!({"spec": {"ports": [{"port": 80, "nodePort": 30080, "targetPort": 2}]}}),
    );
}

#[test]
fn unions_retain_keys() {
    check(
        json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}),
        &json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
        &json!({"spec": {"strategy": {"type": "Recreate"}}}),
    );
}

#[test]
fn an_element_without_its_key_is_refused() {
    let error =
        merge(&mut json!({}), &json!({"spec": {"containers": [{"image": "x"}]}})).unwrap_err();
    assert!(error.message.contains("does not contain declared merge key: name"), "{error}");
}

use super::*;
use crate::kinds::{DEPLOYMENT, POD};

fn map(name: &str, data: Value) -> Value {
    json!({"metadata": {"name": name}, "data": data})
}

#[track_caller]
fn applied(live: &Value, wanted: &Value, manager: &str, force: bool) -> Value {
    apply(&DEPLOYMENT, live, wanted, manager, force).unwrap()
}

#[test]
fn what_a_manager_drops_is_removed_and_the_rest_stays() {
    let live = map("a", json!({"other": "1"}));
    let first = applied(&live, &map("a", json!({"x": "1", "y": "1"})), "me", false);
    assert_eq!(first["data"], json!({"other": "1", "x": "1", "y": "1"}));
    let second = applied(&first, &map("a", json!({"y": "2"})), "me", false);
    assert_eq!(second["data"], json!({"other": "1", "y": "2"}));
    let again = applied(&second, &map("a", json!({"y": "2"})), "me", false);
    assert_eq!(again, second, "applying twice changes nothing");
}

#[test]
fn another_managers_value_is_a_conflict_unless_forced() {
    let first = applied(&map("a", json!({})), &map("a", json!({"x": "1"})), "me", false);
    let error = apply(&DEPLOYMENT, &first, &map("a", json!({"x": "2"})), "you", false).unwrap_err();
    assert_eq!(error.message, "Apply failed with 1 conflict: conflict with \"me\": .data.x");
    assert_eq!((error.code, error.reason), (409, "Conflict"));
    let shared = applied(&first, &map("a", json!({"x": "1"})), "you", false);
    let kept = applied(&shared, &map("a", json!({})), "you", false);
    assert_eq!(kept["data"]["x"], "1", "the other manager still applies it");
    let forced = applied(&first, &map("a", json!({"x": "2"})), "you", true);
    assert_eq!(forced["data"]["x"], "2");
    assert_eq!(forced["metadata"]["managedFields"].as_array().unwrap().len(), 1);
}

#[test]
fn lists_are_merged_by_their_keys() {
    let pod =
        |containers: Value| json!({"metadata": {"name": "p"}, "spec": {"containers": containers}});
    let live = pod(
        json!([{"name": "a", "image": "1", "ports": [{"containerPort": 80, "protocol": "TCP"}]}]),
    );
    let wanted = pod(
        json!([{"name": "a", "ports": [{"containerPort": 80, "name": "web"}]}, {"name": "b", "image": "2"}]),
    );
    let both = apply(&POD, &live, &wanted, "me", false).unwrap();
    assert_eq!(
        both["spec"]["containers"],
        json!([
            {"name": "a", "image": "1", "ports": [{"containerPort": 80, "protocol": "TCP", "name": "web"}]},
            {"name": "b", "image": "2"},
        ])
    );
    let less = apply(&POD, &both, &pod(json!([{"name": "a"}])), "me", false).unwrap();
    assert_eq!(less["spec"]["containers"].as_array().unwrap().len(), 1);
}

#[test]
fn a_manager_needs_a_name() {
    let error = apply(&POD, &json!({}), &map("a", json!({})), "", false).unwrap_err();
    assert!(error.message.contains("fieldManager: Required value"), "{error}");
}

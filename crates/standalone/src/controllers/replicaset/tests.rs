use super::*;
use k8s_openapi::api::apps::v1::ReplicaSetStatus;
use serde_json::{Value, json};

const NOW: &str = "2026-01-01T00:10:00Z";

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

fn set(replicas: i32) -> ReplicaSet {
    serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "n", "uid": "rs", "generation": 3},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}, "annotations": {"a": "b"}},
                "spec": {"containers": [{"name": "c", "image": "i"}]}}}}))
    .unwrap()
}

fn pod(name: &str, change: Value) -> Arc<Pod> {
    let mut pod = json!({
        "metadata": {"name": name, "namespace": "n", "uid": name, "labels": {"app": "web"},
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs", "controller": true}]},
        "spec": {"nodeName": "n1", "containers": []},
        "status": {"phase": "Running", "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
    json_patch::merge(&mut pod, &change);
    Arc::new(serde_json::from_value(pod).unwrap())
}

fn names(pods: &[Arc<Pod>]) -> Vec<&str> {
    pods.iter().filter_map(|pod| pod.metadata.name.as_deref()).collect()
}

#[test]
fn only_active_pods_count() {
    let pods = [
        pod("running", json!({})),
        pod("ended", json!({"status": {"phase": "Succeeded"}})),
        pod("failed", json!({"status": {"phase": "Failed"}})),
        pod("leaving", json!({"metadata": {"deletionTimestamp": NOW}})),
    ];
    let plan = plan(&set(3), &pods, now());
    assert_eq!((plan.create, plan.delete.len()), (2, 0));
    assert_eq!(plan.claimed.len(), 4);
}

#[test]
fn orphans_are_adopted_and_strangers_released() {
    let pods = [
        pod("orphan", json!({"metadata": {"ownerReferences": null}})),
        pod("relabelled", json!({"metadata": {"labels": {"app": "other"}}})),
        pod(
            "foreign",
            json!({"metadata": {"ownerReferences": [
            {"apiVersion": "v1", "kind": "X", "name": "x", "uid": "x", "controller": true}]}}),
        ),
        pod(
            "ended-orphan",
            json!({"metadata": {"ownerReferences": null}, "status": {"phase": "Failed"}}),
        ),
    ];
    let plan = plan(&set(2), &pods, now());
    assert_eq!(names(&plan.adopt), ["orphan"]);
    assert_eq!(names(&plan.release), ["relabelled"]);
    assert_eq!(plan.create, 1);
}

#[test]
fn a_set_that_is_being_deleted_changes_nothing() {
    let mut set = set(5);
    set.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now()));
    let plan = plan(&set, &[pod("a", json!({}))], now());
    assert_eq!((plan.create, plan.delete.len(), plan.claimed.len()), (0, 0, 1));
}

#[test]
fn what_is_missed_least_goes_first() {
    let cost =
        json!({"metadata": {"annotations": {"controller.kubernetes.io/pod-deletion-cost": "-5"}}});
    let mut pods = vec![
        pod("g-old", json!({"spec": {"nodeName": "n2"}})),
        pod(
            "f-young",
            json!({"spec": {"nodeName": "n2"}, "metadata": {"creationTimestamp": "2026-01-01T00:09:59Z"}}),
        ),
        pod(
            "e-restarted",
            json!({"spec": {"nodeName": "n3"}, "status": {"containerStatuses":
            [{"name": "c", "restartCount": 7, "image": "", "imageID": "", "ready": true}]}}),
        ),
        pod("d-cheap", cost),
        pod("c-unready", json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}})),
        pod("b-pending", json!({"status": {"phase": "Pending", "conditions": []}})),
        pod(
            "a-unplaced",
            json!({"spec": {"nodeName": null}, "status": {"phase": "Pending", "conditions": []}}),
        ),
    ];
    rank(&mut pods, now());
    let order = names(&pods);
    assert_eq!(order[..4], ["a-unplaced", "b-pending", "c-unready", "d-cheap"]);
    // f and g share a node, so they go before e, which is alone on its own.
    assert_eq!(order[4..], ["f-young", "g-old", "e-restarted"]);
}

#[test]
fn batches_double() {
    assert_eq!(batches(10).collect::<Vec<_>>(), [1, 2, 4, 3]);
    assert_eq!(batches(0).count(), 0);
}

#[test]
fn a_pod_from_the_template_belongs_to_the_set() {
    let pod = pod_from_template(&set(1));
    assert_eq!(pod.metadata.generate_name.as_deref(), Some("web-"));
    assert_eq!(pod.metadata.labels.unwrap()["app"], "web");
    assert_eq!(pod.metadata.owner_references.unwrap()[0].block_owner_deletion, Some(true));
}

#[test]
fn status_counts_ready_and_available_apart() {
    let mut set = set(3);
    set.spec.as_mut().unwrap().min_ready_seconds = Some(30);
    let pods = [
        pod("long", json!({})),
        pod(
            "short",
            json!({"status": {"conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:09:40Z"}]}}),
        ),
        pod("unready", json!({"status": {"conditions": []}})),
        pod("leaving", json!({"metadata": {"deletionTimestamp": NOW}})),
    ];
    let (status, again) = status(&set, &pods, None, now());
    let want = ReplicaSetStatus {
        replicas: 3,
        fully_labeled_replicas: Some(3),
        ready_replicas: Some(2),
        available_replicas: Some(1),
        terminating_replicas: Some(1),
        observed_generation: Some(3),
        conditions: None,
    };
    assert_eq!(status, want);
    assert_eq!(again.map(|wait| wait.as_secs()), Some(10));
}

#[test]
fn a_failure_shows_as_a_condition_until_it_is_over() {
    let mut set = set(1);
    let failure = Failure { reason: "FailedCreate", message: "quota".into() };
    set.status = Some(status(&set, &[], Some(&failure), now()).0);
    let conditions = set.status.as_ref().unwrap().conditions.as_ref().unwrap();
    assert_eq!(conditions[0].reason.as_deref(), Some("FailedCreate"));
    // The same failure again changes nothing, whatever its text: no write, no wake-up.
    let later = now() + k8s_openapi::jiff::SignedDuration::from_secs(5);
    let again = Failure { message: "other words".into(), ..failure };
    assert_eq!(status(&set, &[], Some(&again), later).0, set.status.clone().unwrap());
    assert_eq!(status(&set, &[], None, later).0.conditions, None);
}

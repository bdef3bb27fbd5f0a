use serde_json::json;

use super::pod::summarize;
use super::*;

#[test]
fn ages() {
    for (secs, want) in [
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (600, "10m"),
        (10_800, "3h"),
        (11_000, "3h3m"),
        (30_000, "8h"),
        (172_800, "2d"),
        (180_000, "2d2h"),
        (700_000, "8d"),
        (-5, "<invalid>"),
        (63_072_000, "2y"),
        (70_000_000, "2y80d"),
    ] {
        assert_eq!(human(secs), want, "{secs}");
    }
}

#[track_caller]
fn status(pod: &Value, ready: &str, want: &str, restarts: i64) {
    let summary = summarize(pod);
    assert_eq!(format!("{}/{}", summary.ready, summary.total), ready);
    assert_eq!((summary.status.as_str(), summary.restarts), (want, restarts));
}

#[test]
fn pod_states() {
    let pod = |status: Value| json!({"metadata": {}, "spec": {"containers": [{"name": "a"}], "initContainers": [{"name": "i"}]}, "status": status});
    status(&pod(json!({"phase": "Pending"})), "0/1", "Pending", 0);
    status(
        &pod(
            json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"running": {}}}]}),
        ),
        "0/1",
        "Init:0/1",
        0,
    );
    status(
        &pod(
            json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}),
        ),
        "0/1",
        "Init:CrashLoopBackOff",
        2,
    );
    let through =
        json!([{"name": "i", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}]);
    status(
        &pod(
            json!({"phase": "Running", "initContainerStatuses": through, "containerStatuses": [{"name": "a", "ready": true, "restartCount": 1, "state": {"running": {}}}]}),
        ),
        "1/1",
        "Running",
        1,
    );
    status(
        &pod(
            json!({"phase": "Pending", "initContainerStatuses": through, "containerStatuses": [{"name": "a", "state": {"waiting": {"reason": "ErrImagePull"}}}]}),
        ),
        "0/1",
        "ErrImagePull",
        0,
    );
    status(
        &pod(
            json!({"phase": "Failed", "containerStatuses": [{"name": "a", "state": {"terminated": {"exitCode": 3}}}]}),
        ),
        "0/1",
        "ExitCode:3",
        0,
    );
    let mut going = pod(json!({"phase": "Running"}));
    going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    status(&going, "0/1", "Terminating", 0);
}

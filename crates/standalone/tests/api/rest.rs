//! What REST clients meet: objects, errors, parts of objects, lists, rights.

use serde_json::{Value, json};

use crate::plane;

const PODS: &str = "/api/v1/namespaces/default/pods";
const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn pod(name: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"containers": [{"name": "a", "image": "i:1"}]}})
}

fn map(name: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"n": name}}, "data": {"a": "1"}})
}

#[track_caller]
fn refused(answer: &(u16, Value), code: u16, reason: &str, text: &str) {
    let (status, body) = answer;
    assert_eq!((*status, body["reason"].as_str()), (code, Some(reason)), "{body}");
    let message = body["message"].as_str().unwrap();
    assert!(message.contains(text), "{message:?} says {text:?}");
    assert_eq!(body["kind"], "Status");
}

#[tokio::test]
async fn objects_come_change_and_go() {
    let plane = plane::start().await;
    let client = &plane.client;
    let (status, made) = client.post(MAPS, &map("a")).await;
    assert_eq!(status, 201);
    assert!(
        made["metadata"]["uid"].is_string() && made["metadata"]["creationTimestamp"].is_string()
    );
    refused(
        &client.post(MAPS, &map("a")).await,
        409,
        "AlreadyExists",
        "configmaps \"a\" already exists",
    );
    let mut newer = made.clone();
    newer["data"]["a"] = json!("2");
    assert_eq!(client.put(&format!("{MAPS}/a"), &newer).await.0, 200);
    refused(
        &client.put(&format!("{MAPS}/a"), &newer).await,
        409,
        "Conflict",
        "Operation cannot be fulfilled on configmaps \"a\": the object has been modified; please apply your changes to the latest version and try again",
    );
    let unconditional = json!({"metadata": {"name": "a"}, "data": {"a": "3"}});
    let (status, third) = client.put(&format!("{MAPS}/a"), &unconditional).await;
    assert_eq!((status, &third["data"]["a"]), (200, &json!("3")));
    assert_eq!(third["metadata"]["uid"], made["metadata"]["uid"]);
    let (_, same) = client.put(&format!("{MAPS}/a"), &third).await;
    assert_eq!(same, third, "a write that changes nothing has no new version");
    assert_eq!(client.delete(&format!("{MAPS}/a"), &Value::Null).await.0, 200);
    refused(&client.get(&format!("{MAPS}/a")).await, 404, "NotFound", "configmaps \"a\" not found");
    let elsewhere = client.post("/api/v1/namespaces/nowhere/configmaps", &map("a")).await;
    refused(&elsewhere, 404, "NotFound", "namespaces \"nowhere\" not found");
}

#[tokio::test]
async fn bad_input_is_named() {
    let plane = plane::start().await;
    let client = &plane.client;
    let nothing = json!({"metadata": {"name": "x"}, "spec": {"containers": [{"name": "a"}]}});
    let answer = client.post(PODS, &nothing).await;
    refused(
        &answer,
        422,
        "Invalid",
        "Pod \"x\" is invalid: spec.containers[0].image: Required value",
    );
    assert_eq!(answer.1["details"]["causes"][0]["field"], "spec.containers[0].image");
    let mut unknown = pod("x");
    unknown["spec"]["foo"] = json!(1);
    let answer = client.post(&format!("{PODS}?fieldValidation=Strict"), &unknown).await;
    refused(&answer, 400, "BadRequest", "strict decoding error: unknown field \"spec.foo\"");
    let mut wrong = pod("x");
    wrong["spec"]["containers"][0]["ports"] = json!([{"containerPort": "http"}]);
    let answer = client.post(PODS, &wrong).await;
    refused(&answer, 400, "BadRequest", "spec.containers[0].ports[0].containerPort");
    let other = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}});
    refused(&client.post(PODS, &other).await, 400, "BadRequest", "needs kind Pod");
    refused(
        &client.get("/apis/apps/v1/daemonsets").await,
        404,
        "NotFound",
        "the server could not find the requested resource",
    );
    refused(
        &client.get(&format!("{PODS}?fieldSelector=spec.colour%3Dred")).await,
        400,
        "BadRequest",
        "field label not supported: spec.colour",
    );
    let broken = client
        .try_json("POST", PODS, &[("content-type", "application/json")], Some(&json!("{")))
        .await;
    assert_eq!(broken.unwrap().0, 400);
}

#[tokio::test]
async fn yaml_is_read_and_unknown_fields_warn() {
    let plane = plane::start().await;
    let mut unknown = map("y");
    unknown["colour"] = json!("red");
    // JSON is YAML.
    let headers = [("content-type", "application/yaml")];
    let response = plane.client.try_send("POST", MAPS, &headers, Some(&unknown)).await.unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(response.headers()["warning"], "299 - \"unknown field \\\"colour\\\"\"");
}

#[tokio::test]
async fn three_kinds_of_patch() {
    let plane = plane::start().await;
    let client = &plane.client;
    client.post(PODS, &pod("p")).await;
    let path = format!("{PODS}/p");
    let strategic = json!({"spec": {"containers": [{"name": "a", "image": "i:2"}]}});
    let (status, value) = client.patch(&path, "strategic-merge", &strategic).await;
    assert_eq!((status, &value["spec"]["containers"][0]["image"]), (200, &json!("i:2")));
    let merge = json!({"metadata": {"labels": {"x": "1"}}});
    assert_eq!(client.patch(&path, "merge", &merge).await.1["metadata"]["labels"]["x"], "1");
    let steps = json!([{"op": "remove", "path": "/metadata/labels/x"}]);
    assert_eq!(client.patch(&path, "json", &steps).await.1["metadata"]["labels"], json!({}));
    refused(&client.patch(&path, "json", &steps).await, 422, "Invalid", "error in our request");
    let stale = json!({"metadata": {"resourceVersion": "1", "labels": {"x": "1"}}});
    refused(&client.patch(&path, "merge", &stale).await, 409, "Conflict", "has been modified");
    let command = json!({"spec": {"containers": [{"name": "a", "command": ["x"]}]}});
    let answer = client.patch(&path, "strategic-merge", &command).await;
    refused(&answer, 422, "Invalid", "pod updates may not change fields other than");
    refused(&client.patch(&path, "odd", &merge).await, 415, "UnsupportedMediaType", "odd-patch");
}

#[tokio::test]
async fn status_and_spec_are_written_apart() {
    let plane = plane::start().await;
    let client = &plane.client;
    client.post(PODS, &pod("p")).await;
    let (_, with_status) = client
        .patch(
            &format!("{PODS}/p/status"),
            "merge",
            &json!({"status": {"phase": "Running"}, "spec": {"hostname": "x"}}),
        )
        .await;
    assert_eq!(with_status["status"]["phase"], "Running");
    assert!(with_status["spec"]["hostname"].is_null());
    let (_, same) =
        client.patch(&format!("{PODS}/p"), "merge", &json!({"status": {"phase": "Failed"}})).await;
    assert_eq!(same["status"]["phase"], "Running");
}

#[tokio::test]
async fn a_bound_pod_waits_for_its_node_to_let_go() {
    let plane = plane::start().await;
    let client = &plane.client;
    let path = format!("{PODS}/p");
    client.post(PODS, &pod("p")).await;
    let binding = json!({"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n1"}});
    assert_eq!(client.post(&format!("{path}/binding"), &binding).await.0, 201);
    refused(
        &client.post(&format!("{path}/binding"), &binding).await,
        409,
        "Conflict",
        "is already assigned to node \"n1\"",
    );
    let (_, list) = client.get(&format!("{PODS}?fieldSelector=spec.nodeName%3Dn1")).await;
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    let (status, going) = client.delete(&path, &Value::Null).await;
    assert_eq!((status, &going["metadata"]["deletionGracePeriodSeconds"]), (200, &json!(30)));
    let wrong = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": "other"}});
    refused(&client.delete(&path, &wrong).await, 409, "Conflict", "UID in precondition: other");
    assert_eq!(client.delete(&path, &json!({"gracePeriodSeconds": 0})).await.0, 200);
    assert_eq!(client.get(&path).await.0, 404);
}

#[tokio::test]
async fn finalizers_hold_until_they_are_removed() {
    let plane = plane::start().await;
    let client = &plane.client;
    let mut held = map("f");
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    client.post(MAPS, &held).await;
    let path = format!("{MAPS}/f");
    client.delete(&path, &Value::Null).await;
    assert!(client.get(&path).await.1["metadata"]["deletionTimestamp"].is_string());
    let more = json!({"metadata": {"finalizers": ["example.com/hold", "example.com/more"]}});
    refused(
        &client.patch(&path, "merge", &more).await,
        422,
        "Invalid",
        "no new finalizers can be added",
    );
    client.patch(&path, "merge", &json!({"metadata": {"finalizers": null}})).await;
    assert_eq!(client.get(&path).await.0, 404);
}

#[tokio::test]
async fn pages_show_one_moment() {
    let plane = plane::start().await;
    let client = &plane.client;
    for name in ["a", "b", "c", "d"] {
        client.post(MAPS, &map(name)).await;
    }
    let (_, first) = client.get(&format!("{MAPS}?limit=2")).await;
    assert_eq!(first["metadata"]["remainingItemCount"], 2);
    client.post(MAPS, &map("ba")).await;
    client.delete(&format!("{MAPS}/d"), &Value::Null).await;
    let next = first["metadata"]["continue"].as_str().unwrap();
    let (_, second) = client.get(&format!("{MAPS}?limit=2&continue={next}")).await;
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().unwrap();
        items.iter().map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!([names(&first), names(&second)].concat(), ["a", "b", "c", "d"]);
    let version = first["metadata"]["resourceVersion"].as_str().unwrap();
    assert_eq!(second["metadata"]["resourceVersion"], version);
    let exact = format!("{MAPS}?resourceVersion={version}&resourceVersionMatch=Exact");
    assert_eq!(names(&client.get(&exact).await.1), ["a", "b", "c", "d"]);
    assert_eq!(names(&client.get(MAPS).await.1), ["a", "b", "ba", "c"]);
    let future = client.get(&format!("{MAPS}?resourceVersion=999999")).await;
    refused(&future, 504, "Timeout", "Too large resource version");
}

#[tokio::test]
async fn services_get_addresses_and_ports() {
    let plane = plane::start().await;
    let client = &plane.client;
    let services = "/api/v1/namespaces/default/services";
    let service = |name: &str, spec: Value| json!({"metadata": {"name": name}, "spec": spec});
    let spec = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]});
    let (status, made) = client.post(services, &service("a", spec.clone())).await;
    assert_eq!(status, 201);
    assert!(made["spec"]["clusterIP"].as_str().unwrap().starts_with("10.96."));
    let taken = client.post(services, &service("b", spec.clone())).await;
    refused(
        &taken,
        422,
        "Invalid",
        "spec.ports[0].nodePort: Invalid value: 30080: provided port is already allocated",
    );
    let moved = json!({"spec": {"clusterIP": "10.96.7.7", "clusterIPs": ["10.96.7.7"]}});
    let answer = client.patch(&format!("{services}/a"), "merge", &moved).await;
    refused(&answer, 422, "Invalid", "may not change once set");
    client.delete(&format!("{services}/a"), &Value::Null).await;
    assert_eq!(client.post(services, &service("b", spec)).await.0, 201);
    let (_, api) = client.get(&format!("{services}/kubernetes")).await;
    assert_eq!(api["spec"]["clusterIP"], "10.96.0.1");
}

#[tokio::test]
async fn dry_runs_change_nothing() {
    let plane = plane::start().await;
    let client = &plane.client;
    assert_eq!(client.post(&format!("{MAPS}?dryRun=All"), &map("a")).await.0, 201);
    assert_eq!(client.get(&format!("{MAPS}/a")).await.0, 404);
    client.post(MAPS, &map("a")).await;
    client.delete(&format!("{MAPS}/a?dryRun=All"), &Value::Null).await;
    assert_eq!(client.get(&format!("{MAPS}/a")).await.0, 200);
}

#[tokio::test]
async fn scale_eviction_and_tokens() {
    let plane = plane::start().await;
    let client = &plane.client;
    let deployments = "/apis/apps/v1/namespaces/default/deployments";
    let deployment = json!({"metadata": {"name": "d"}, "spec": {
        "selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "a", "image": "i"}]}},
    }});
    let (_, made) = client.post(deployments, &deployment).await;
    assert_eq!(
        (&made["spec"]["replicas"], &made["metadata"]["generation"]),
        (&json!(1), &json!(1))
    );
    let scale = format!("{deployments}/d/scale");
    client.patch(&scale, "merge", &json!({"spec": {"replicas": 3}})).await;
    let (_, shown) = client.get(&scale).await;
    assert_eq!(
        (&shown["spec"]["replicas"], &shown["status"]["selector"]),
        (&json!(3), &json!("a=b"))
    );
    assert_eq!(client.get(&format!("{deployments}/d")).await.1["metadata"]["generation"], 2);

    client.post(PODS, &pod("p")).await;
    let token_path = "/api/v1/namespaces/default/serviceaccounts/default/token";
    let bound = json!({"spec": {"boundObjectRef": {"kind": "Pod", "name": "p"}}});
    let (status, token) = client.post(token_path, &bound).await;
    assert_eq!(status, 201, "{token}");
    let token = token["status"]["token"].as_str().unwrap();
    let account = client.anonymous(plane.plane.ca_pem()).with_token(token);
    let me = account.post("/apis/authentication.k8s.io/v1/selfsubjectreviews", &json!({})).await.1;
    assert_eq!(me["status"]["userInfo"]["username"], "system:serviceaccount:default:default");
    refused(
        &account.get(PODS).await,
        403,
        "Forbidden",
        "pods is forbidden: User \"system:serviceaccount:default:default\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\"",
    );
    let review = json!({"spec": {"token": token}});
    let reviewed = client.post("/apis/authentication.k8s.io/v1/tokenreviews", &review).await.1;
    assert_eq!(reviewed["status"]["authenticated"], true);
    // The token ends with its pod.
    let eviction =
        json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "p"}});
    assert_eq!(client.post(&format!("{PODS}/p/eviction"), &eviction).await.0, 201);
    assert_eq!(account.get("/api").await.0, 401);
}

#[tokio::test]
async fn strangers_see_health_and_version_only() {
    let plane = plane::start().await;
    let stranger = plane.client.anonymous(plane.plane.ca_pem());
    assert_eq!(stranger.get("/healthz").await, (200, json!("ok")));
    assert!(stranger.get("/version").await.1["gitVersion"].as_str().unwrap().starts_with("v1.36."));
    assert_eq!(stranger.get(PODS).await.0, 401);
    assert_eq!(stranger.get("/apis").await.0, 403);
    assert_eq!(stranger.with_token("a.b.c").get("/version").await.0, 401);
}

#[tokio::test]
async fn tables_and_metadata() {
    let plane = plane::start().await;
    let client = &plane.client;
    client.post(PODS, &pod("p")).await;
    let accept = |media: &'static str| [("accept", media)];
    let table = accept("application/json;as=Table;v=v1;g=meta.k8s.io,application/json");
    let (_, shown) = client.try_json("GET", PODS, &table, None).await.unwrap();
    assert_eq!(shown["kind"], "Table");
    assert_eq!(shown["rows"][0]["cells"][0], "p");
    assert_eq!(shown["rows"][0]["cells"][2], "Pending");
    let meta = accept("application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io");
    let (_, shown) = client.try_json("GET", PODS, &meta, None).await.unwrap();
    assert_eq!(shown["kind"], "PartialObjectMetadataList");
    assert!(shown["items"][0]["spec"].is_null());
    // Who prefers protobuf gets JSON.
    let protobuf = accept("application/vnd.kubernetes.protobuf,application/json");
    let (status, shown) = client.try_json("GET", PODS, &protobuf, None).await.unwrap();
    assert_eq!((status, &shown["kind"]), (200, &json!("PodList")));
}

#[tokio::test]
async fn secrets_of_the_state_folder_are_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let plane = plane::start().await;
    let mode = |path: &str| {
        std::fs::metadata(plane.dir.path().join(path)).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode("kubeconfig"), 0o700);
    for file in [
        "kubeconfig/admin.yaml",
        "kubeconfig/node.yaml",
        "kubeconfig/proxy.yaml",
        "pki/ca.key",
        "pki/sa.key",
    ] {
        assert_eq!(mode(file), 0o600, "{file}");
    }
}

#[tokio::test]
async fn events_have_two_views() {
    let plane = plane::start().await;
    let client = &plane.client;
    let new = "/apis/events.k8s.io/v1/namespaces/default/events";
    let event = json!({
        "metadata": {"name": "e"}, "note": "hello", "reason": "R", "type": "Normal",
        "regarding": {"kind": "Pod", "name": "p", "namespace": "default"},
    });
    assert_eq!(client.post(new, &event).await.0, 201);
    let (_, core) =
        client.get("/api/v1/namespaces/default/events?fieldSelector=involvedObject.name%3Dp").await;
    assert_eq!(core["items"][0]["message"], "hello");
    let (_, back) = client.get(new).await;
    assert_eq!(
        (&back["items"][0]["note"], &back["apiVersion"]),
        (&json!("hello"), &json!("events.k8s.io/v1"))
    );
}

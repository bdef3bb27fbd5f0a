//! What an attacker sends.

use serde_json::{Value, json};

use crate::plane;

#[tokio::test]
async fn bodies_of_another_shape_are_refused_and_the_server_goes_on() {
    let plane = plane::start().await;
    let client = &plane.client;
    let paths = [
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        "/apis/authorization.k8s.io/v1/subjectaccessreviews",
        "/apis/authentication.k8s.io/v1/selfsubjectreviews",
        "/apis/authentication.k8s.io/v1/tokenreviews",
        "/api/v1/namespaces/default/serviceaccounts/default/token",
        "/api/v1/namespaces/default/pods",
    ];
    for path in paths {
        for body in [json!([]), json!(1), json!("x"), json!(true), json!({"metadata": 5})] {
            let (status, answer) = client.post(path, &body).await;
            assert_eq!(status, 400, "POST {path} of {body}: {answer}");
        }
    }
    let token = "/api/v1/namespaces/default/serviceaccounts/default/token";
    for spec in [json!([]), json!(7), json!("x")] {
        assert_eq!(client.post(token, &json!({"spec": spec})).await.0, 400);
    }
    assert_eq!(client.get("/version").await.0, 200);
}

#[tokio::test]
async fn patches_that_would_become_huge_objects_are_refused() {
    let plane = plane::start().await;
    let client = &plane.client;
    let all = "/api/v1/namespaces/default/configmaps";
    let made = json!({"metadata": {"name": "bomb", "annotations": {"a": "b"}}});
    assert_eq!(client.post(all, &made).await.0, 201);
    let one = format!("{all}/bomb");
    let copy = |to: String| json!({"op": "copy", "from": "/metadata/annotations", "path": to});
    let doubling: Value = (0..40).map(|n| copy(format!("/metadata/annotations/k{n}"))).collect();
    let nesting: Value = (0..8000).map(|_| copy("/metadata/annotations/x".into())).collect();
    for bomb in [doubling, nesting] {
        assert_eq!(client.patch(&one, "json", &bomb).await.0, 413);
    }
    for (media, patch) in [("merge", json!([])), ("merge", json!({"metadata": 5}))] {
        assert_eq!(client.patch(&one, media, &patch).await.0, 400);
    }
    assert_eq!(client.get(&one).await.0, 200);
}

#[tokio::test]
async fn silent_connections_shut_no_caller_out_and_are_closed() {
    let plane = plane::start().await;
    let client = &plane.client;
    let mut silent = Vec::new();
    for _ in 0..1000 {
        silent.push(tokio::net::TcpStream::connect(&client.address).await.unwrap());
    }
    assert_eq!(client.get("/version").await.0, 200);
    let mut closed = 0;
    for stream in &mut silent[..700] {
        let mut byte = [0];
        let read = tokio::io::AsyncReadExt::read(stream, &mut byte).await;
        closed += usize::from(!matches!(read, Ok(1..)));
    }
    assert_eq!(closed, 700, "the oldest gave way");
    assert_eq!(client.get("/version").await.0, 200);
}

#[tokio::test]
async fn nothing_is_done_as_the_caller_that_was_asked_for_as_another_user() {
    let plane = plane::start().await;
    let client = &plane.client;
    let headers = [("impersonate-user", "nobody")];
    let path = "/api/v1/namespaces/default/configmaps";
    let (status, _) = client.try_json("GET", path, &headers, None).await.unwrap();
    assert_eq!(status, 403);
}

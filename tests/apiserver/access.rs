//! Who may use the agent's own API: decided by reviews that the API server answers.

use std::path::Path;

use anyhow::Result;
use keelson_tests::apiserver::{NODE_ADDRESS, inside};
use keelson_tests::node::read;

use crate::cluster::Cluster;

#[test]
fn tokens_and_permissions_are_reviewed_by_the_api_server() {
    let Some(cluster) = Cluster::with_node() else { return };
    let server = &cluster.server;
    for name in ["reader", "nobody"] {
        server.kubectl(&["create", "serviceaccount", name]).unwrap();
    }
    server
        .kubectl(&["create", "clusterrole", "reader", "--verb=get", "--resource=nodes/metrics"])
        .unwrap();
    server
        .kubectl(&[
            "create",
            "clusterrolebinding",
            "reader",
            "--clusterrole=reader",
            "--serviceaccount=default:reader",
        ])
        .unwrap();
    let token = |name: &str| token_of(&cluster, name);
    let (reader, nobody) = (token("reader"), token("nobody"));
    assert!(ask(&cluster, Some(&reader), "/metrics").unwrap().contains("# TYPE"));
    refused(ask(&cluster, Some(&reader), "/pods"), "403");
    refused(ask(&cluster, Some(&nobody), "/metrics"), "403");
    refused(ask(&cluster, Some("made-up"), "/metrics"), "401");
    refused(ask(&cluster, None, "/metrics"), "401");
    cluster.finish();
}

fn token_of(cluster: &Cluster, account: &str) -> String {
    let file = cluster.node.scratch().join("token-request.json");
    let request = r#"{"apiVersion":"authentication.k8s.io/v1","kind":"TokenRequest","spec":{}}"#;
    std::fs::write(&file, request).unwrap();
    let path = format!("/api/v1/namespaces/default/serviceaccounts/{account}/token");
    let file = file.display().to_string();
    let answer = cluster.server.kubectl(&["create", "--raw", &path, "-f", &file]).unwrap();
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    answer["status"]["token"].as_str().unwrap().to_owned()
}

/// The first line holds the status.
fn ask(cluster: &Cluster, token: Option<&str>, path: &str) -> Result<String> {
    let mut curl = inside(cluster.node.name(), Path::new("curl"));
    curl.args(["--silent", "--show-error", "--insecure", "--include", "--max-time", "30"]);
    if let Some(token) = token {
        curl.arg("--header").arg(format!("Authorization: Bearer {token}"));
    }
    read(curl.arg(format!("https://{NODE_ADDRESS}:10250{path}")))
}

#[track_caller]
fn refused(answer: Result<String>, status: &str) {
    let answer = answer.unwrap();
    let first = answer.lines().next().unwrap_or_default();
    assert!(first.contains(status), "{answer}");
}

//! A node that has nothing but a bootstrap token.

use std::process::Command;

use keelson_tests::node::{read, until};

use crate::cluster::{Cluster, flag};

#[test]
fn a_node_asks_for_its_certificate_and_joins_with_it() {
    let Some(mut cluster) = Cluster::start() else { return };
    cluster
        .server
        .kubectl(&[
            "create",
            "clusterrolebinding",
            "bootstrap",
            "--clusterrole=system:node-bootstrapper",
            "--group=system:bootstrappers",
        ])
        .unwrap();
    let bootstrap = cluster.server.kubeconfig_with_token("bootstrap", "bootstrap").unwrap();
    let kubeconfig = cluster.node.scratch().join("kubelet.yaml");
    cluster
        .run_agent(&[&flag("bootstrap-kubeconfig", &bootstrap), &flag("kubeconfig", &kubeconfig)])
        .unwrap();
    let name = wait_for_request(&cluster);
    let spec = "jsonpath={.spec.signerName} {.spec.username}";
    assert_eq!(
        cluster.server.kubectl(&["get", &name, "-o", spec]).unwrap(),
        "kubernetes.io/kube-apiserver-client-kubelet bootstrap"
    );
    approve(&cluster, &name);
    cluster.wait_for_node();
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&kubeconfig).unwrap());
    assert_eq!(mode & 0o777, 0o600);
    cluster.finish();
}

fn wait_for_request(cluster: &Cluster) -> String {
    let mut name = String::new();
    until("a certificate request", || {
        name = cluster.server.kubectl(&["get", "csr", "-o", "name"]).map_err(|e| e.to_string())?;
        name = name.trim().to_owned();
        if name.is_empty() { Err(cluster.log_of("agent")) } else { Ok(()) }
    });
    name
}

/// What an administrator and the signing controller of a cluster do.
fn approve(cluster: &Cluster, name: &str) {
    let server = &cluster.server;
    let id = name.rsplit('/').next().unwrap();
    server.kubectl(&["certificate", "approve", id]).unwrap();
    let pem = "go-template={{.spec.request | base64decode}}";
    let request = server.kubectl(&["get", name, "-o", pem]).unwrap();
    let certificate = cluster.node.scratch().join("signed.crt");
    std::fs::write(&certificate, server.sign(&request).unwrap()).unwrap();
    let base64 = read(Command::new("base64").arg("-w0").arg(&certificate)).unwrap();
    let object = server.kubectl(&["get", name, "-o", "json"]).unwrap();
    let mut object: serde_json::Value = serde_json::from_str(&object).unwrap();
    object["status"]["certificate"] = base64.into();
    let file = cluster.node.scratch().join("csr.json");
    std::fs::write(&file, object.to_string()).unwrap();
    let path = format!("/apis/certificates.k8s.io/v1/certificatesigningrequests/{id}/status");
    server.kubectl(&["replace", "--raw", &path, "-f", &file.display().to_string()]).unwrap();
}

//! Pods under the node authorizer and the NodeRestriction admission plugin.

use keelson_tests::node::BUSYBOX;

use crate::cluster::{Cluster, flag};

/// The node may read only what its pods refer to, and watch it only one by one.
#[test]
fn a_pod_gets_its_volumes_and_is_looked_into_through_the_api_server() {
    let Some(cluster) = Cluster::with_node() else { return };
    cluster
        .server
        .apply(&format!(
            r#"
apiVersion: v1
kind: ConfigMap
metadata: {{ name: page }}
data: {{ text: from-the-config-map }}
---
apiVersion: v1
kind: Secret
metadata: {{ name: word }}
stringData: {{ text: from-the-secret }}
---
apiVersion: v1
kind: Pod
metadata: {{ name: reader }}
spec:
  nodeName: node
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: {BUSYBOX}
      command: ["sh", "-c", "echo $WORD; cat /page/text; echo; exec sleep 1000"]
      env: [{{ name: WORD, valueFrom: {{ secretKeyRef: {{ name: word, key: text }} }} }}]
      volumeMounts: [{{ name: page, mountPath: /page }}]
  volumes: [{{ name: page, configMap: {{ name: page }} }}]
"#
        ))
        .unwrap();
    cluster.wait_for("pod/reader", "condition=Ready");
    let logs = cluster.server.kubectl(&["logs", "reader"]).unwrap();
    assert_eq!(logs, "from-the-secret\nfrom-the-config-map\n");
    let token = "/var/run/secrets/kubernetes.io/serviceaccount/token";
    let exec = |script: &str| {
        cluster.server.kubectl(&["exec", "reader", "--", "sh", "-c", script]).unwrap()
    };
    assert_eq!(exec(&format!("cut -c1-2 {token}")), "ey\n", "a JSON web token begins like this");
    assert_eq!(exec("grep -c BEGIN /var/run/secrets/kubernetes.io/serviceaccount/ca.crt"), "1\n");
    let reasons = "jsonpath={.items[*].reason}";
    cluster.until_prints(
        "events",
        &["get", "events", "--field-selector=involvedObject.name=reader", "-o", reasons],
        "Pulled Created Started",
    );
    cluster.server.kubectl(&["get", "--namespace=kube-node-lease", "lease", "node"]).unwrap();
    cluster.finish();
}

#[test]
fn a_static_pod_has_a_mirror_that_comes_back() {
    let Some(mut cluster) = Cluster::start() else { return };
    let manifests = cluster.node.scratch().join("manifests");
    std::fs::create_dir(&manifests).unwrap();
    std::fs::write(
        manifests.join("static.yaml"),
        format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{ name: static }}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{{ name: main, image: "{BUSYBOX}", command: [sleep, "1000"] }}]
"#
        ),
    )
    .unwrap();
    let kubeconfig = cluster.node_kubeconfig();
    cluster
        .run_agent(&[&flag("kubeconfig", &kubeconfig), &flag("pod-manifest-path", &manifests)])
        .unwrap();
    cluster.wait_for_node();
    let started =
        ["get", "pod", "static-node", "-o", "jsonpath={.status.containerStatuses[*].ready}"];
    cluster.until_prints("the mirror is ready", &started, "true");
    cluster.server.kubectl(&["delete", "pod", "static-node", "--wait=false"]).unwrap();
    cluster.until_prints("the mirror is back", &started, "true");
    std::fs::remove_file(manifests.join("static.yaml")).unwrap();
    cluster.until_prints("no pod is left", &["get", "pods", "-o", "name"], "");
    cluster.finish();
}

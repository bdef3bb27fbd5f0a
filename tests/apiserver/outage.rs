//! The API server goes away and comes back.

use keelson_tests::node::{BUSYBOX, read, until};

use crate::cluster::Cluster;

#[test]
fn pods_run_on_without_the_api_server_and_what_happened_is_told_afterwards() {
    let Some(mut cluster) = Cluster::with_node() else { return };
    cluster
        .server
        .apply(&format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{ name: steady }}
spec:
  nodeName: node
  terminationGracePeriodSeconds: 0
  containers: [{{ name: main, image: "{BUSYBOX}", command: ["sh", "-c", "echo $$ && exec sleep 1000"] }}]
---
apiVersion: v1
kind: Pod
metadata: {{ name: restless }}
spec:
  nodeName: node
  terminationGracePeriodSeconds: 0
  volumes: [{{ name: flag, hostPath: {{ path: {scratch} }} }}]
  containers:
    - name: main
      image: {BUSYBOX}
      command: ["sh", "-c", "echo started >> /flag/starts; while [ ! -e /flag/end ]; do sleep 0.1; done; rm /flag/end"]
      volumeMounts: [{{ name: flag, mountPath: /flag }}]
"#,
            scratch = cluster.node.scratch().display()
        ))
        .unwrap();
    for pod in ["pod/steady", "pod/restless"] {
        cluster.wait_for(pod, "condition=Ready");
    }
    let id = ["get", "pod", "steady", "-o", "jsonpath={.status.containerStatuses[0].containerID}"];
    let before = cluster.server.kubectl(&id).unwrap();
    cluster.server.go_away().unwrap();
    std::fs::write(cluster.node.scratch().join("end"), "").unwrap();
    until("the container is restarted meanwhile", || {
        let starts =
            read(std::process::Command::new("cat").arg(cluster.node.scratch().join("starts")));
        match starts {
            Ok(text) if text.lines().count() == 2 => Ok(()),
            answer => Err(format!("{answer:?}")),
        }
    });
    cluster.server.launch().unwrap();
    cluster.until_prints(
        "the restart is counted",
        &["get", "pod", "restless", "-o", "jsonpath={.status.containerStatuses[0].restartCount}"],
        "1",
    );
    assert_eq!(cluster.server.kubectl(&id).unwrap(), before);
    cluster.finish();
}

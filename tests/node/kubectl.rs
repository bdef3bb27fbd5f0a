//! What people do with kubectl all day, with real pods behind it.

use keelson_tests::node::{BUSYBOX, Node, until};

fn web(replicas: u32) -> String {
    format!(
        r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: web }}
spec:
  replicas: {replicas}
  selector: {{ matchLabels: {{ app: web }} }}
  template:
    metadata: {{ labels: {{ app: web }} }}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: main
          image: "{BUSYBOX}"
          command: ["sh", "-c", "echo $VERSION; sleep 100000"]
          env: [{{ name: VERSION, value: one }}]
          ports: [{{ containerPort: 80 }}]
"#
    )
}

fn rolled_out(node: &Node) {
    node.kubectl(&["rollout", "status", "deployment/web", "--timeout=90s"]).unwrap();
}

/// `VERSION` of the Deployment's template.
fn version(node: &Node) -> String {
    let path = "jsonpath={.spec.template.spec.containers[0].env[0].value}";
    node.kubectl(&["get", "deployment", "web", "-o", path]).unwrap()
}

#[test]
fn a_deployment_is_rolled_out_paused_resumed_undone_restarted_and_scaled() {
    let node = Node::start().unwrap();
    node.apply(&web(2)).unwrap();
    rolled_out(&node);
    node.kubectl(&["set", "env", "deployment/web", "VERSION=two"]).unwrap();
    rolled_out(&node);
    let history = node.kubectl(&["rollout", "history", "deployment/web"]).unwrap();
    assert!(history.contains("\n1 ") && history.contains("\n2 "), "{history}");
    let of_one = node.kubectl(&["rollout", "history", "deployment/web", "--revision=1"]).unwrap();
    assert!(of_one.contains("one"), "{of_one}");

    node.kubectl(&["rollout", "undo", "deployment/web"]).unwrap();
    rolled_out(&node);
    assert_eq!(version(&node), "one");
    node.kubectl(&["rollout", "undo", "deployment/web", "--to-revision=2"]).unwrap();
    rolled_out(&node);
    assert_eq!(version(&node), "two");

    node.kubectl(&["rollout", "pause", "deployment/web"]).unwrap();
    let sets = || node.kubectl(&["get", "replicasets", "--no-headers"]).unwrap().lines().count();
    let before = sets();
    node.kubectl(&["set", "env", "deployment/web", "VERSION=three"]).unwrap();
    // A paused Deployment is scaled all the same, which shows that its controller has seen it.
    node.kubectl(&["scale", "deployment/web", "--replicas=3"]).unwrap();
    until("three pods", || {
        let ready = "jsonpath={.status.readyReplicas}";
        let ready = node.kubectl(&["get", "deployment", "web", "-o", ready]).unwrap();
        if ready == "3" { Ok(()) } else { Err(ready) }
    });
    assert_eq!(sets(), before);
    node.kubectl(&["rollout", "resume", "deployment/web"]).unwrap();
    rolled_out(&node);
    assert_eq!(sets(), before + 1);
    let logs = node.kubectl(&["logs", "deployment/web"]).unwrap();
    assert_eq!(logs, "three\n");

    let uids = "jsonpath={.items[*].metadata.uid}";
    let pods = || node.kubectl(&["get", "pods", "-l", "app=web", "-o", uids]).unwrap();
    let before = pods();
    node.kubectl(&["rollout", "restart", "deployment/web"]).unwrap();
    rolled_out(&node);
    until("only new pods", || {
        let now = pods();
        let old = now.split(' ').any(|uid| before.contains(uid));
        if old { Err(now) } else { Ok(()) }
    });
}

#[test]
fn a_service_is_exposed_described_and_deleted() {
    let node = Node::start().unwrap();
    node.apply(&web(2)).unwrap();
    rolled_out(&node);
    node.kubectl(&["expose", "deployment", "web", "--port=8080", "--target-port=80"]).unwrap();
    let kubectl = |args: &[&str]| node.kubectl(args).unwrap();
    until("both pods are endpoints", || {
        let service = kubectl(&["describe", "service", "web"]);
        let endpoints = service.lines().find(|line| line.starts_with("Endpoints:")).unwrap_or("");
        if endpoints.matches(":80").count() == 2 { Ok(()) } else { Err(service.clone()) }
    });
    let services = kubectl(&["get", "services"]);
    assert!(services.contains("ClusterIP") && services.contains("8080/TCP"), "{services}");
    let deployment = kubectl(&["describe", "deployment", "web"]);
    for part in ["2 desired | 2 updated | 2 total | 2 available", "ScalingReplicaSet", "VERSION:"] {
        assert!(deployment.contains(part), "{part}: {deployment}");
    }
    let name = kubectl(&["get", "pods", "-o", "jsonpath={.items[0].metadata.name}"]);
    let pod = kubectl(&["describe", "pod", &name]);
    for part in ["Controlled By:  ReplicaSet/web-", "Started", "Scheduled", "QoS Class:"] {
        assert!(pod.contains(part), "{part}: {pod}");
    }
    kubectl(&["delete", "service", "web"]);
    let error = node.kubectl(&["get", "service", "web"]).unwrap_err().to_string();
    assert!(error.contains(r#"services "web" not found"#), "{error}");
    let all = kubectl(&["get", "all"]);
    assert!(all.contains("deployment.apps/web") && all.contains("replicaset.apps/web-"), "{all}");
}

#[test]
fn a_cordoned_node_gets_no_pods_until_it_is_uncordoned() {
    let node = Node::start().unwrap();
    node.kubectl(&["cordon", "node"]).unwrap();
    let nodes = node.kubectl(&["get", "nodes"]).unwrap();
    assert!(nodes.contains("Ready,SchedulingDisabled"), "{nodes}");
    node.kubectl(&["run", "late", "--image", BUSYBOX, "--", "sleep", "1000"]).unwrap();
    until("the scheduler says why", || {
        let pod = node.kubectl(&["describe", "pod", "late"]).unwrap();
        if pod.contains("FailedScheduling") && pod.contains("unschedulable") {
            Ok(())
        } else {
            Err(pod)
        }
    });
    node.kubectl(&["uncordon", "node"]).unwrap();
    node.wait_for("pod/late", "condition=Ready").unwrap();
    let described = node.kubectl(&["describe", "node", "node"]).unwrap();
    for part in ["Unschedulable:      false", "default                     late", "KubeletReady"] {
        assert!(described.contains(part), "{part}: {described}");
    }
    node.kubectl(&["delete", "pod", "late", "--grace-period=0", "--force"]).unwrap();
}

#[test]
fn a_token_from_kubectl_names_its_service_account_and_what_it_may_do() {
    let node = Node::start().unwrap();
    node.kubectl(&["create", "serviceaccount", "robot"]).unwrap();
    let token = node.kubectl(&["create", "token", "robot"]).unwrap();
    assert_eq!(token.trim().split('.').count(), 3, "{token}");
    let review = |token: &str, path: &str| {
        let file = node.scratch().join("review.yaml");
        let kind = "apiVersion: authentication.k8s.io/v1\nkind: TokenReview";
        std::fs::write(&file, format!("{kind}\nspec: {{ token: \"{token}\" }}\n")).unwrap();
        let file = file.to_str().unwrap();
        node.kubectl(&["create", "-f", file, "-o", &format!("jsonpath={{.status.{path}}}")])
            .unwrap()
    };
    let user = review(token.trim(), "user.username");
    assert_eq!(user, "system:serviceaccount:default:robot");
    assert_ne!(review("forged.token.x", "authenticated"), "true");
}

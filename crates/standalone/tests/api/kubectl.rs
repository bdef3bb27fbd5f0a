//! The real kubectl: a current one, and Debian's 1.20.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::plane;

const WEB: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: web}
data: {index.html: hello}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: web, image: "web:1", ports: [{containerPort: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, nodePort: 30080}]
---
apiVersion: v1
kind: Pod
metadata: {name: lone, labels: {app: lone}}
spec:
  containers: [{name: a, image: busybox}]
"#;

struct Kubectl<'a> {
    program: PathBuf,
    kubeconfig: PathBuf,
    cache: &'a Path,
}

struct Said {
    ok: bool,
    text: String,
}

impl Kubectl<'_> {
    /// Runs kubectl; arguments are separated by spaces.
    fn run(&self, args: &str, stdin: &str) -> Said {
        let mut child = Command::new(&self.program)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--cache-dir")
            .arg(self.cache)
            .args(args.split(' '))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        Said { ok: output.status.success(), text: String::from_utf8(text).unwrap() }
    }

    #[track_caller]
    fn says(&self, args: &str, stdin: &str, wants: &[&str]) -> String {
        let said = self.run(args, stdin);
        assert!(said.ok, "kubectl {args}: {}", said.text);
        for want in wants {
            assert!(said.text.contains(want), "kubectl {args} says {want:?}: {}", said.text);
        }
        said.text
    }

    #[track_caller]
    fn fails(&self, args: &str, stdin: &str, wants: &[&str]) {
        let said = self.run(args, stdin);
        assert!(!said.ok, "kubectl {args} fails: {}", said.text);
        for want in wants {
            assert!(said.text.contains(want), "kubectl {args} says {want:?}: {}", said.text);
        }
    }
}

fn current() -> Option<PathBuf> {
    let named = std::env::var_os("KEELSON_KUBECTL").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    named.or_else(|| std::env::split_paths(&path).map(|p| p.join("kubectl")).find(|p| p.is_file()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn current_kubectl_does_what_people_do() {
    scenario("kubectl (KEELSON_KUBECTL or in PATH)", current()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn debians_kubectl_does_what_people_do() {
    let program = std::env::var_os("KEELSON_KUBECTL_120").map(PathBuf::from);
    scenario("kubectl 1.20 (KEELSON_KUBECTL_120)", program).await;
}

async fn scenario(name: &str, program: Option<PathBuf>) {
    let Some(program) = program.filter(|p| p.is_file()) else {
        // Written past the test harness's capture, so that a skip is never silent.
        let text = format!("SKIPPED: {name} is not there\n");
        std::io::stderr().write_all(text.as_bytes()).unwrap();
        return;
    };
    let plane = plane::start_with(true).await;
    let cache = tempfile::tempdir().unwrap();
    let kubeconfig = plane.plane.admin_kubeconfig();
    tokio::task::spawn_blocking(move || {
        let kubectl = Kubectl { program, kubeconfig, cache: cache.path() };
        apply_and_look(&kubectl);
        change(&kubectl);
        errors(&kubectl);
        namespaces(&kubectl);
    })
    .await
    .unwrap();
    plane.plane.shutdown().await;
}

fn apply_and_look(kubectl: &Kubectl<'_>) {
    let made = [
        "configmap/web created",
        "deployment.apps/web created",
        "service/web created",
        "pod/lone created",
    ];
    kubectl.says("apply -f -", WEB, &made);
    let same = [
        "configmap/web unchanged",
        "deployment.apps/web unchanged",
        "service/web unchanged",
        "pod/lone unchanged",
    ];
    kubectl.says("apply -f -", WEB, &same);
    kubectl.says(
        "get pods lone",
        "",
        &["NAME", "READY", "STATUS", "RESTARTS", "AGE", "0/1", "Pending"],
    );
    kubectl.says("get pods lone -o wide", "", &["NODE", "<none>"]);
    kubectl.says("get svc web", "", &["NodePort", "80:30080/TCP"]);
    kubectl.says("get deploy web -o wide", "", &["CONTAINERS", "web:1", "app=web"]);
    kubectl.says("get all -A", "", &["service/kubernetes", "pod/lone"]);
    kubectl.says("get pod lone -o yaml", "", &["kind: Pod", "imagePullPolicy: Always"]);
    kubectl.says("get pod lone -o json", "", &["\"kind\": \"Pod\""]);
    let names =
        kubectl.says("get pods -l app=lone --field-selector=status.phase=Pending -o name", "", &[]);
    assert_eq!(names, "pod/lone\n");
    kubectl.says("describe svc web", "", &["Selector:", "app=web", "NodePort:"]);
    kubectl.says("describe pod lone", "", &["Status:", "Pending", "busybox"]);
    kubectl.says("describe deploy web", "", &["StrategyType:", "RollingUpdate"]);
    kubectl.says("get configmap web -o jsonpath={.data}", "", &["hello"]);
    kubectl
        .run("get pods --watch --request-timeout=1s", "")
        .text
        .find("lone")
        .expect("a watch shows pods");
    kubectl.says("api-resources", "", &["deployments", "endpointslices"]);
}

fn change(kubectl: &Kubectl<'_>) {
    kubectl.says("scale deploy/web --replicas=3", "", &["deployment.apps/web scaled"]);
    kubectl.says("get deploy web -o jsonpath={.spec.replicas}", "", &["3"]);
    kubectl.says("label svc web tier=front", "", &["service/web labeled"]);
    kubectl.says("annotate svc web note=x", "", &["service/web annotated"]);
    kubectl.says(
        "patch svc web -p {\"spec\":{\"ports\":[{\"port\":80,\"targetPort\":8080}]}}",
        "",
        &["patched"],
    );
    kubectl.says(
        "get svc web -o jsonpath={.spec.ports[0].nodePort}-{.spec.ports[0].targetPort}",
        "",
        &["30080-8080"],
    );
    kubectl.says("patch deploy web --type=json -p [{\"op\":\"replace\",\"path\":\"/spec/replicas\",\"value\":1}]", "", &["patched"]);
    kubectl.says(
        "patch deploy web --type=merge -p {\"spec\":{\"minReadySeconds\":1}}",
        "",
        &["patched"],
    );
    kubectl.says("set image deploy/web web=web:2", "", &["image updated"]);
    kubectl.says("rollout history deploy/web", "", &["REVISION"]);
    kubectl.says("rollout restart deploy/web", "", &["restarted"]);
    let service = kubectl.says("get svc web -o json", "", &[]);
    kubectl.says("replace -f -", &service, &["service/web replaced"]);
    kubectl.says(
        "apply --server-side --force-conflicts -f -",
        WEB,
        &["deployment.apps/web serverside-applied"],
    );
    kubectl.says("create configmap c --from-literal=a=b", "", &["configmap/c created"]);
    kubectl.says("create secret generic s --from-literal=a=b", "", &["secret/s created"]);
    kubectl.says("create serviceaccount bob", "", &["serviceaccount/bob created"]);
    kubectl.says("create deployment d2 --image=x", "", &["deployment.apps/d2 created"]);
    kubectl.says("auth can-i delete nodes", "", &["yes"]);
    kubectl.says("delete pod lone --grace-period=1", "", &["pod \"lone\" deleted"]);
}

fn errors(kubectl: &Kubectl<'_>) {
    kubectl.fails("get pod gone", "", &["Error from server (NotFound): pods \"gone\" not found"]);
    kubectl.fails(
        "create configmap c --from-literal=a=b",
        "",
        &["configmaps \"c\" already exists"],
    );
    let invalid = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [{"name": "a"}]}}"#;
    kubectl.fails(
        "create -f -",
        invalid,
        &["The Pod \"x\" is invalid: spec.containers[0].image: Required value"],
    );
    let unknown = r#"{"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "x"}}"#;
    kubectl.fails(
        "create -f -",
        unknown,
        &["no matches for kind \"DaemonSet\" in version \"apps/v1\""],
    );
    let taken = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"type": "NodePort", "ports": [{"port": 1, "nodePort": 30080}]}}"#;
    kubectl.fails(
        "create -f -",
        taken,
        &["Invalid value: 30080: provided port is already allocated"],
    );
    kubectl.fails(
        "patch deploy web -p {\"spec\":{\"selector\":{\"matchLabels\":{\"app\":\"q\"}}}}",
        "",
        &["field is immutable"],
    );
}

fn namespaces(kubectl: &Kubectl<'_>) {
    kubectl.says("create namespace shop", "", &["namespace/shop created"]);
    kubectl.says("-n shop create configmap c --from-literal=a=b", "", &["created"]);
    kubectl.says("delete namespace shop --timeout=60s", "", &["namespace \"shop\" deleted"]);
    kubectl.fails("get namespace shop", "", &["NotFound"]);
    kubectl.says(
        "delete deploy,svc,configmap --all --timeout=60s",
        "",
        &["deployment.apps \"web\" deleted"],
    );
}

//! Pods on a real containerd: from a manifest and from the API to processes and back.
//!
//! The test makes a network namespace with a containerd of its own and runs itself again inside it, since a process
//! must be in its namespace before its threads start. Needs root, containerd and runc; the leak check is the last step.

#![allow(clippy::unwrap_used, reason = "a failure in a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::{Node, Pod};
use keelson_agent::config::CgroupDriver;
use keelson_agent::events::EventRecorder;
use keelson_agent::pod::{self, PodRegistry, Pods, PodsConfig};
use keelson_agent::runtime::{Runtime, RuntimeOptions};
use keelson_supervise::Heartbeats;
use keelson_tests::image;
use kube::api::{Api, DeleteParams, PostParams, WatchEvent, WatchParams};
use serde_json::json;
use tokio_util::sync::CancellationToken;

const IMAGE: &str = "localhost/test/busybox:1";
const PATIENCE: Duration = Duration::from_secs(60);

/// What one node of the test owns; dropping it removes everything.
struct Lab {
    netns: String,
    dir: tempfile::TempDir,
    containerd: Option<Child>,
}

impl Lab {
    fn new() -> Self {
        let netns = format!("kpods{}", std::process::id());
        run("ip", &["netns", "add", &netns]);
        let mut lab = Self { netns, dir: tempfile::tempdir().unwrap(), containerd: None };
        lab.inside("ip", &["link", "set", "lo", "up"]);
        lab.inside("ip", &["link", "add", "up0", "type", "veth", "peer", "name", "up1"]);
        lab.inside("ip", &["addr", "add", "10.88.0.1/24", "dev", "up0"]);
        for link in ["up0", "up1"] {
            lab.inside("ip", &["link", "set", link, "up"]);
        }
        lab.inside("ip", &["route", "add", "default", "via", "10.88.0.2"]);
        lab.start_containerd();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn inside_command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns)).arg(program).args(args);
        command
    }

    fn inside(&self, program: &str, args: &[&str]) {
        assert!(
            self.inside_command(program, args).status().unwrap().success(),
            "{program} {args:?}"
        );
    }

    fn start_containerd(&mut self) {
        let dir = self.dir.path().display();
        let config = format!(
            "version = 2\nroot = \"{dir}/c-root\"\nstate = \"{dir}/c-state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{dir}/containerd.sock\"\n"
        );
        fs::write(self.path("containerd.toml"), config).unwrap();
        fs::create_dir_all(self.path("cni")).unwrap();
        let conflist = json!({ "cniVersion": "0.4.0", "name": "lab", "plugins": [{
            "type": "ptp",
            "ipam": { "type": "host-local", "dataDir": self.path("ipam"),
                "ranges": [[{ "subnet": "10.88.1.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] },
        }] });
        fs::write(self.path("cni/10-lab.conflist"), conflist.to_string()).unwrap();
        let log = fs::File::create(self.path("containerd.log")).unwrap();
        let config = self.path("containerd.toml").display().to_string();
        let mut command = self.inside_command("containerd", &["-c", &config]);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.containerd = Some(command.spawn().unwrap());
        let (socket, deadline) =
            (self.path("containerd.sock"), std::time::Instant::now() + PATIENCE);
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(std::time::Instant::now() < deadline, "containerd does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn cgroup(&self) -> String {
        self.netns.clone()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut containerd) = self.containerd.take() {
            drop(containerd.kill());
            drop(containerd.wait());
        }
        for process in processes_with(&self.dir.path().display().to_string()) {
            drop(Command::new("kill").args(["-9", &process]).status());
        }
        let mounts = mounts_below(self.dir.path());
        mounts.iter().rev().for_each(|mount| run("umount", &["-l", &mount.display().to_string()]));
        for cgroup in pod_cgroups(&self.cgroup(), "") {
            drop(fs::remove_dir(cgroup));
        }
        run("ip", &["netns", "del", &self.netns]);
    }
}

fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status();
    assert!(status.is_ok_and(|s| s.success()) || std::thread::panicking(), "{program} {args:?}");
}

fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let mounts = keelson_procfs::own_mounts().unwrap();
    let points = mounts.into_iter().map(|mount| mount.point);
    points.filter(|point| point.starts_with(dir)).collect()
}

/// Processes (the log writer, shims) whose command line names the test's folder.
fn processes_with(text: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|e| e.file_name().into_string().ok());
    pids.filter(|pid| {
        pid.bytes().all(|b| b.is_ascii_digit()) && *pid != std::process::id().to_string()
    })
    .filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    })
    .collect()
}

/// cgroups of the lab whose last name begins with `prefix`, deepest first.
fn pod_cgroups(root: &str, prefix: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                walk(&entry.path(), found);
                found.push(entry.path());
            }
        }
    }
    let mut found = Vec::new();
    for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let top = hierarchy.path().join(root);
        walk(&top, &mut found);
        if top.is_dir() {
            found.push(top);
        }
    }
    let top = Path::new("/sys/fs/cgroup").join(root);
    walk(&top, &mut found);
    found.retain(|dir| dir.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)));
    found
}

#[test]
fn pods_of_both_sources_start_restart_with_the_agent_and_leave_nothing() {
    let lab = Lab::new();
    let own = std::env::current_exe().unwrap();
    let status = lab
        .inside_command(
            &own.display().to_string(),
            &["--exact", "inside_the_node", "--ignored", "--nocapture"],
        )
        .env("KEELSON_PROGRAM", env!("CARGO_BIN_EXE_keelson"))
        .env("PODS_LAB", lab.dir.path())
        .env("PODS_CGROUP", lab.cgroup())
        .status()
        .unwrap();
    assert!(status.success(), "see above");
    let left = mounts_below(&lab.path("root"));
    assert!(left.is_empty(), "left mounted: {left:?}");
    assert_eq!(fs::read_dir(lab.path("root/pods")).unwrap().count(), 0, "pod folders left");
    assert_eq!(fs::read_dir(lab.path("logs")).unwrap().count(), 0, "log folders left");
    let cgroups = pod_cgroups(&lab.cgroup(), "pod");
    assert!(cgroups.is_empty(), "cgroups left: {cgroups:?}");
}

/// Not a test of its own: the part that runs in the node's network namespace.
#[test]
#[ignore = "run by the test above inside its network namespace"]
fn inside_the_node() {
    let Some(dir) = std::env::var_os("PODS_LAB").map(PathBuf::from) else { return };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.unwrap().block_on(async {
        tokio::time::timeout(PATIENCE * 2, scenario(&dir)).await.unwrap();
    });
}

async fn scenario(dir: &Path) {
    drop(rustls::crypto::ring::default_provider().install_default());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = keelson_standalone::StandaloneConfig::new(dir.join("api"), vec![listener]);
    config.controllers = false;
    let plane = keelson_standalone::start(config).await.unwrap();
    let kubeconfig = kube::config::Kubeconfig::read_from(plane.admin_kubeconfig()).unwrap();
    let options = kube::config::KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
    let client = kube::Client::try_from(config).unwrap();
    create::<Node>(Api::all(client.clone()), json!({ "metadata": { "name": "node" } })).await;
    prepare_namespace(&client).await;
    let archive = dir.join("busybox.tar");
    let spec = image::ImageSpec { name: IMAGE.into(), ..image::ImageSpec::default() };
    image::write_busybox_archive(&spec, &archive).unwrap();

    let first = start_agent(dir, client.clone(), Some(&archive)).await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    create(pods.clone(), web_pod()).await;
    let before = wait_for(&pods, "web", is_ready).await;
    fs::write(dir.join("manifests/static.yaml"), static_manifest()).unwrap();
    fs::write(dir.join("manifests/broken.yaml"), "kind: [").unwrap();
    wait_for(&pods, "static-node", is_ready).await;

    // The agent goes away and another comes: nothing is touched, nothing becomes unready.
    first.stop().await;
    let second = start_agent(dir, client.clone(), None).await;
    create(pods.clone(), job_pod()).await;
    let job = wait_for(&pods, "job", |pod| phase(pod) == "Succeeded").await;
    assert_eq!(first_container(&job)["state"]["terminated"]["exitCode"], 0);
    let after = pods.get("web").await.unwrap();
    assert_eq!(first_container(&before), first_container(&after));

    fs::remove_file(dir.join("manifests/static.yaml")).unwrap();
    wait_gone(&pods, "static-node").await;
    for name in ["web", "job"] {
        pods.delete(name, &DeleteParams::default()).await.unwrap();
        wait_gone(&pods, name).await;
    }
    second.stop().await;
    plane.shutdown().await;
}

struct Agent {
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    registry: PodRegistry,
}

impl Agent {
    async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap();
        // It has looked at every pod.
        assert!(self.registry.settled().now_or_never().is_some());
    }
}

async fn start_agent(dir: &Path, client: kube::Client, archive: Option<&Path>) -> Agent {
    fs::create_dir_all(dir.join("manifests")).unwrap();
    let options = RuntimeOptions {
        socket: dir.join("containerd.sock"),
        namespace: "keelson".into(),
        root_dir: dir.join("root"),
        run_dir: dir.join("run"),
        cni_conf_dir: dir.join("cni"),
        cni_bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
        cgroup_driver: CgroupDriver::Cgroupfs,
        pull_netns: None,
        registry_config_dir: dir.join("certs.d"),
        default_runtime: String::new(),
        log_max_bytes: 1 << 20,
        log_max_files: 3,
    };
    let runtime = Runtime::connect(options).await.unwrap();
    if let Some(archive) = archive {
        runtime.import_image(archive).await.unwrap();
    }
    let (cancel, registry) = (CancellationToken::new(), PodRegistry::new());
    let events = EventRecorder::start(client.clone(), "node", cancel.clone());
    let config = PodsConfig {
        node_name: "node".into(),
        node_ips: vec![[10, 88, 0, 1].into()],
        root_dir: dir.join("root"),
        pod_logs_dir: dir.join("logs"),
        static_pod_path: Some(dir.join("manifests")),
        cgroup_root: std::env::var("PODS_CGROUP").unwrap(),
        ..PodsConfig::default()
    };
    let pods = Pods {
        config,
        runtime,
        client: Some(client),
        events,
        registry: registry.clone(),
        heartbeats: Heartbeats::default(),
    };
    let token = cancel.clone();
    let task = tokio::spawn(async move { pod::run(pods, token).await.unwrap() });
    Agent { cancel, task, registry }
}

async fn prepare_namespace(client: &kube::Client) {
    let account = json!({ "metadata": { "name": "default" } });
    let api =
        Api::<k8s_openapi::api::core::v1::ServiceAccount>::namespaced(client.clone(), "default");
    create(api, account).await;
    let api = Api::<k8s_openapi::api::core::v1::ConfigMap>::namespaced(client.clone(), "default");
    create(
        api.clone(),
        json!({ "metadata": { "name": "kube-root-ca.crt" }, "data": { "ca.crt": "x" } }),
    )
    .await;
    create(api, json!({ "metadata": { "name": "page" }, "data": { "index.html": "hello" } })).await;
}

/// Creates an object; one that is there already will do.
async fn create<K>(api: Api<K>, object: serde_json::Value)
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned + serde::Serialize,
{
    let object: K = serde_json::from_value(object).unwrap();
    match api.create(&PostParams::default(), &object).await {
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        other => drop(other.unwrap()),
    }
}

fn web_pod() -> serde_json::Value {
    json!({
        "metadata": { "name": "web" },
        "spec": {
            "nodeName": "node",
            "terminationGracePeriodSeconds": 1,
            "initContainers": [{ "name": "init", "image": IMAGE,
                "command": ["sh", "-c", "cp /page/index.html /www/index.html"],
                "volumeMounts": [{ "name": "page", "mountPath": "/page" }, { "name": "www", "mountPath": "/www" }] }],
            "containers": [{ "name": "web", "image": IMAGE,
                "command": ["httpd", "-f", "-p", "8080", "-h", "/srv"],
                "readinessProbe": { "httpGet": { "path": "/index.html", "port": 8080 }, "periodSeconds": 1 },
                "livenessProbe": { "exec": { "command": ["test", "-e", "/srv/index.html"] }, "periodSeconds": 1 },
                "volumeMounts": [{ "name": "www", "mountPath": "/srv" }],
                "resources": { "requests": { "cpu": "10m" }, "limits": { "memory": "64Mi" } } }],
            "volumes": [{ "name": "page", "configMap": { "name": "page" } },
                { "name": "www", "emptyDir": { "medium": "Memory", "sizeLimit": "1Mi" } }],
        },
    })
}

fn job_pod() -> serde_json::Value {
    json!({
        "metadata": { "name": "job" },
        "spec": { "nodeName": "node", "restartPolicy": "Never",
            "initContainers": [{ "name": "side", "image": IMAGE, "restartPolicy": "Always",
                "command": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"] }],
            "containers": [{ "name": "job", "image": IMAGE, "command": ["true"] }] },
    })
}

fn static_manifest() -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: static}}\nspec:\n  hostNetwork: true\n  \
         terminationGracePeriodSeconds: 1\n  containers:\n  - {{name: c, image: \"{IMAGE}\", command: [sleep, \"1000\"]}}\n"
    )
}

fn is_ready(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let conditions = status.and_then(|s| s.conditions.as_ref()).into_iter().flatten();
    conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default()
}

fn first_container(pod: &Pod) -> serde_json::Value {
    let statuses =
        pod.status.as_ref().and_then(|s| s.container_statuses.clone()).unwrap_or_default();
    serde_json::to_value(&statuses[0]).unwrap()
}

async fn wait_for(api: &Api<Pod>, name: &str, holds: impl Fn(&Pod) -> bool) -> Pod {
    let found = tokio::time::timeout(PATIENCE, async {
        let list = api.list(&kube::api::ListParams::default()).await.unwrap();
        if let Some(pod) =
            list.items.iter().find(|p| p.metadata.name.as_deref() == Some(name) && holds(p))
        {
            return pod.clone();
        }
        let version = list.metadata.resource_version.unwrap();
        let mut events = api.watch(&WatchParams::default(), &version).await.unwrap().boxed();
        loop {
            let event = events.next().await.unwrap().unwrap();
            if let WatchEvent::Added(pod) | WatchEvent::Modified(pod) = event
                && pod.metadata.name.as_deref() == Some(name)
                && holds(&pod)
            {
                return pod;
            }
        }
    });
    match found.await {
        Ok(pod) => pod,
        Err(_) => panic!("{name} did not get there: {:#?}", api.get_opt(name).await),
    }
}

async fn wait_gone(api: &Api<Pod>, name: &str) {
    let list = api.list(&kube::api::ListParams::default()).await.unwrap();
    if !list.items.iter().any(|p| p.metadata.name.as_deref() == Some(name)) {
        return;
    }
    let version = list.metadata.resource_version.unwrap();
    let mut events = api.watch(&WatchParams::default(), &version).await.unwrap().boxed();
    let gone = tokio::time::timeout(PATIENCE, async {
        loop {
            if let WatchEvent::Deleted(pod) = events.next().await.unwrap().unwrap()
                && pod.metadata.name.as_deref() == Some(name)
            {
                return;
            }
        }
    });
    assert!(gone.await.is_ok(), "{name} does not go away: {:#?}", api.get_opt(name).await);
}

//! The CNI plugin under another runtime: containerd's own CRI gives its pods addresses through `keelson-cni`.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use containerd_client::tonic::client::Grpc;
use containerd_client::tonic::codegen::http::uri::PathAndQuery;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Request, Status};
use keelson_tests::image::{ImageSpec, write_busybox_archive};
use keelson_tests::node::{program, read, until};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message;
use tonic_prost::ProstCodec;

/// containerd brings every pod's loopback up with this plugin (Debian: containernetworking-plugins).
const LOOPBACK: &str = "/usr/lib/cni/loopback";

const SANDBOX_IMAGE: &str = "localhost/test/sandbox:1";

/// The parts of the CRI's messages (runtime.v1) that this test uses.
#[derive(Clone, PartialEq, Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodSandboxMetadata>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPodSandboxConfig {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
}

/// Every request and answer that is nothing but a sandbox's id.
#[derive(Clone, PartialEq, Message)]
struct SandboxId {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxStatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<PodSandboxStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxStatus {
    #[prost(message, optional, tag = "5")]
    network: Option<PodSandboxNetworkStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxNetworkStatus {
    #[prost(string, tag = "1")]
    ip: String,
    #[prost(message, repeated, tag = "2")]
    additional_ips: Vec<PodIp>,
}

#[derive(Clone, PartialEq, Message)]
struct PodIp {
    #[prost(string, tag = "1")]
    ip: String,
}

/// A containerd with its CRI, in a network namespace of its own.
struct Containerd {
    name: String,
    folder: tempfile::TempDir,
    process: Child,
}

impl Containerd {
    fn start() -> Self {
        let name = format!("kcri{}", std::process::id());
        read(Command::new("ip").args(["netns", "add", &name])).unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("net.d")).unwrap();
        let network = serde_json::json!({
            "cniVersion": "1.0.0", "name": "cri",
            "plugins": [{ "type": "keelson-cni", "dataDir": folder.path().join("addresses"),
                "podCIDRs": ["10.98.0.0/24", "fd00:98::/64"],
                "capabilities": { "portMappings": true } }],
        });
        fs::write(folder.path().join("net.d/10-keelson.conflist"), network.to_string()).unwrap();
        fs::write(folder.path().join("config.toml"), config(folder.path())).unwrap();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let process = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{name}"))
            .args(["containerd", "--config"])
            .arg(folder.path().join("config.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let containerd = Containerd { name, folder, process };
        until("containerd's CRI answers", || {
            read(&mut containerd.ctr(&["plugins", "ls", "id==cri"]))
                .map_err(|e| format!("{e:#}"))
                .and_then(|list| if list.contains("ok") { Ok(()) } else { Err(list) })
        });
        containerd.import_sandbox_image();
        containerd
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("c.sock")
    }

    fn ctr(&self, args: &[&str]) -> Command {
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(self.socket()).args(["--namespace", "k8s.io"]).args(args);
        ctr
    }

    fn import_sandbox_image(&self) {
        let archive = self.folder.path().join("sandbox.tar");
        let spec = ImageSpec {
            name: SANDBOX_IMAGE.into(),
            cmd: vec!["sleep".into(), "100000".into()],
            ..ImageSpec::default()
        };
        write_busybox_archive(&spec, &archive).unwrap();
        read(&mut self.ctr(&["images", "import", archive.to_str().unwrap()])).unwrap();
    }

    fn links(&self) -> String {
        read(Command::new("ip").args(["-n", &self.name, "-o", "link"])).unwrap()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // A test that failed may have left containers: their tasks go first, then who looks after them.
        let tasks = read(&mut self.ctr(&["tasks", "list", "-q"])).unwrap_or_default();
        for task in tasks.lines() {
            drop(read(&mut self.ctr(&["tasks", "delete", "--force", task])));
        }
        let pid = Pid::from_raw(self.process.id().cast_signed());
        kill(pid, Signal::SIGTERM).unwrap();
        self.process.wait().unwrap();
        let mounts = keelson_procfs::own_mounts().unwrap();
        let points = mounts.iter().map(|mount| &mount.point);
        for point in points.filter(|point| point.starts_with(self.folder.path())) {
            umount2(point, MntFlags::MNT_DETACH).ok();
        }
        drop(read(Command::new("ip").args(["netns", "delete", &self.name])));
        // The parent of the pods' cgroups, in every hierarchy.
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            fs::remove_dir(hierarchy.path().join(&self.name)).ok();
        }
    }
}

fn config(folder: &Path) -> String {
    let bin = folder.join("bin");
    fs::create_dir(&bin).unwrap();
    symlink(program("keelson-cni").unwrap(), bin.join("keelson-cni")).unwrap();
    symlink(LOOPBACK, bin.join("loopback")).unwrap();
    format!(
        r#"version = 2
root = "{folder}/root"
state = "{folder}/state"
[grpc]
  address = "{folder}/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{SANDBOX_IMAGE}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{folder}/net.d"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
"#,
        folder = folder.display(),
        bin = bin.display(),
    )
}

async fn call<Q, A>(channel: &Channel, method: &str, request: Q) -> Result<A, Status>
where
    Q: Message + Send + Sync + 'static,
    A: Message + Default + Send + Sync + 'static,
{
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let path: PathAndQuery = format!("/runtime.v1.RuntimeService/{method}").parse().unwrap();
    let codec: ProstCodec<Q, A> = ProstCodec::default();
    Ok(grpc.unary(Request::new(request), path, codec).await?.into_inner())
}

async fn run_sandbox(channel: &Channel, name: &str, cgroup: &str) -> (SandboxId, Vec<IpAddr>) {
    let metadata =
        PodSandboxMetadata { name: name.into(), uid: name.into(), namespace: "default".into() };
    let config = PodSandboxConfig {
        metadata: Some(metadata),
        linux: Some(LinuxPodSandboxConfig { cgroup_parent: cgroup.into() }),
    };
    let request = RunPodSandboxRequest { config: Some(config) };
    let sandbox: SandboxId = call(channel, "RunPodSandbox", request).await.unwrap();
    let status: PodSandboxStatusResponse =
        call(channel, "PodSandboxStatus", sandbox.clone()).await.unwrap();
    let network = status.status.unwrap().network.unwrap();
    let ips = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|p| p.ip));
    (sandbox, ips.map(|ip| ip.parse().unwrap()).collect())
}

#[test]
fn containerds_own_cri_gets_addresses_from_the_plugin_and_gives_them_back() {
    let containerd = Containerd::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = containerd_client::connect(containerd.socket()).await.unwrap();
        let cgroup = format!("/{}", containerd.name);
        let one = run_sandbox(&channel, "one", &cgroup).await;
        let two = run_sandbox(&channel, "two", &cgroup).await;
        for (_, ips) in [&one, &two] {
            let families: Vec<bool> = ips.iter().map(IpAddr::is_ipv4).collect();
            assert_eq!(families, [true, false], "{ips:?}");
            let route =
                ["-n", &containerd.name, "route", "get", &ips[0].to_string()].map(str::to_owned);
            assert!(read(Command::new("ip").args(route)).unwrap().contains("dev keel"));
        }
        assert_ne!(one.1, two.1);
        for (sandbox, _) in [one, two] {
            let _: SandboxId = call(&channel, "StopPodSandbox", sandbox.clone()).await.unwrap();
            let _: SandboxId = call(&channel, "RemovePodSandbox", sandbox).await.unwrap();
        }
    });
    until("no link is left", || {
        let links = containerd.links();
        if links.contains("keel") { Err(links) } else { Ok(()) }
    });
}

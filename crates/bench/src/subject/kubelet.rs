//! The kubelet with containerd's CRI, as the packages of a distribution set them up.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use keelson_tests::image::{ImageSpec, write_busybox_archive};
use keelson_tests::node::{BUSYBOX, Node, read};
use serde_json::json;

use super::node::NODE_NAME;
use super::version_label;
use crate::cluster::{Ground, NODE_ADDRESS};
use crate::process::{Daemon, in_netns};

/// What the sandboxes run: nothing can be pulled here, so busybox stands in for the pause image.
const PAUSE: &str = "localhost/bench/pause:1";

/// Where Debian and others put the reference plugins.
const CNI_FOLDERS: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];

/// A kubelet to measure, with its files prepared.
pub(crate) struct PeerKubelet {
    pub(crate) label: String,
    program: PathBuf,
    /// Below the node's state folder, so that removing the node removes it and its mounts.
    folder: PathBuf,
}

impl PeerKubelet {
    /// Writes the configuration of kubelet, containerd and CNI.
    ///
    /// # Errors
    /// When a program or plugin is missing.
    pub(crate) fn prepare(ground: &Ground<'_>, program: &Path) -> Result<PeerKubelet> {
        if !program.is_file() {
            bail!("--peer-kubelet: there is no file {}", program.display());
        }
        let folder = ground.node().state_dir().join("peer");
        fs::create_dir_all(folder.join("net.d"))?;
        let list = serde_json::to_vec_pretty(&conflist(&folder))?;
        fs::write(folder.join("net.d/10-bench.conflist"), list)?;
        let state = ground.node().run_dir().join("peer-containerd");
        fs::write(folder.join("containerd.toml"), containerd_config(&folder, &state)?)?;
        let config = kubelet_config(ground.node(), &folder);
        fs::write(folder.join("kubelet.json"), serde_json::to_vec_pretty(&config)?)?;
        make_cgroups(ground.node().name())?;
        let label = version_label("kubelet", program);
        Ok(PeerKubelet { label, program: program.to_owned(), folder })
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("containerd.sock")
    }

    /// # Errors
    /// When it cannot be started.
    pub(crate) fn start_containerd(&self, ground: &Ground<'_>) -> Result<Daemon> {
        let mut command = in_netns(&ground.netns(), Path::new("containerd"));
        command.arg("--config").arg(self.folder.join("containerd.toml"));
        let group = format!("{}-bench-containerd", ground.node().name());
        Daemon::start("containerd", command, &self.folder.join("containerd.log"), &group)
    }

    /// # Errors
    /// When containerd does not answer or refuses.
    pub(crate) async fn import_images(&self, ground: &Ground<'_>) -> Result<()> {
        self.wait_for_containerd().await?;
        let sleeps = vec!["sleep".to_owned(), "2147483647".to_owned()];
        for (name, entrypoint) in [(BUSYBOX, Vec::new()), (PAUSE, sleeps)] {
            let archive = ground.node().scratch().join("image.tar");
            let spec = ImageSpec { name: name.into(), entrypoint, ..ImageSpec::default() };
            write_busybox_archive(&spec, &archive)?;
            read(self.ctr().args(["images", "import"]).arg(&archive))?;
        }
        Ok(())
    }

    async fn wait_for_containerd(&self) -> Result<()> {
        let deadline = tokio::time::Instant::now() + crate::api::PATIENCE;
        while let Err(error) = read(self.ctr().arg("version")) {
            if tokio::time::Instant::now() > deadline {
                return Err(error.context("containerd does not answer"));
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        Ok(())
    }

    fn ctr(&self) -> std::process::Command {
        let mut command = std::process::Command::new("ctr");
        command.arg("--address").arg(self.socket()).args(["--namespace", "k8s.io"]);
        command
    }

    /// # Errors
    /// When it cannot be started.
    pub(crate) fn start(&self, ground: &Ground<'_>) -> Result<Daemon> {
        let mut command = in_netns(&ground.netns(), &self.program);
        let path = |flag: &str, path: PathBuf| format!("--{flag}={}", path.display());
        command.args([
            path("config", self.folder.join("kubelet.json")),
            path("kubeconfig", ground.kubeconfig("node")?),
            path("root-dir", self.folder.join("kubelet")),
            path("cert-dir", self.folder.join("pki")),
            format!("--hostname-override={NODE_NAME}"),
            format!("--node-ip={NODE_ADDRESS}"),
        ]);
        let group = format!("{}-bench-agent", ground.node().name());
        Daemon::start("kubelet", command, &ground.node().scratch().join("kubelet.log"), &group)
    }
}

/// bridge with host-local, the reference plugins.
fn conflist(folder: &Path) -> serde_json::Value {
    json!({
        "cniVersion": "0.4.0", "name": "bench",
        "plugins": [
            {
                "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
                "ipam": {
                    "type": "host-local", "dataDir": folder.join("ipam"),
                    "ranges": [[{ "subnet": "10.244.0.0/24" }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            },
            { "type": "loopback" },
        ],
    })
}

fn containerd_config(folder: &Path, state: &Path) -> Result<String> {
    let has_bridge = |dir: &&&str| Path::new(dir).join("bridge").is_file();
    let bin = CNI_FOLDERS.iter().find(has_bridge).context(
        "the kubelet needs the reference CNI plugins (Debian: apt-get install containernetworking-plugins)",
    )?;
    let (folder, state) = (folder.display(), state.display());
    Ok(format!(
        r#"version = 2
root = "{folder}/containerd"
state = "{state}"
[grpc]
  address = "{folder}/containerd.sock"
[debug]
  level = "warn"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{folder}/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"#
    ))
}

fn kubelet_config(node: &Node, folder: &Path) -> serde_json::Value {
    let socket = format!("unix://{}", folder.join("containerd.sock").display());
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "address": "127.0.0.1", "healthzPort": 0, "port": 10250,
        "containerRuntimeEndpoint": socket,
        "cgroupDriver": "cgroupfs", "cgroupRoot": format!("/{}", node.name()),
        "failCgroupV1": false, "failSwapOn": false,
        "podLogsDir": folder.join("logs"),
        "staticPodPath": "", "resolvConf": "",
        "imageGCHighThresholdPercent": 100,
        "evictionHard": { "memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%" },
        "registerNode": true,
    })
}

/// The kubelet does not make its `cgroupRoot` itself; it wants it in every hierarchy.
fn make_cgroups(name: &str) -> Result<()> {
    let mounts = keelson_procfs::own_mounts().context("cannot list the mounts")?;
    for mount in mounts.iter().filter(|mount| mount.kind.starts_with("cgroup")) {
        let folder = mount.point.join(name);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make the cgroup {}", folder.display()))?;
        copy_cpuset(&mount.point, &folder);
    }
    Ok(())
}

/// A cgroup v1 cpuset begins empty, and nothing can run in an empty one. Other hierarchies have no such files.
fn copy_cpuset(parent: &Path, child: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(value) = fs::read(parent.join(file)) {
            drop(fs::write(child.join(file), value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_from_a_folder_of_this_run() {
        let list = conflist(Path::new("/var/lib/bench1"));
        assert_eq!(list["plugins"][0]["ipam"]["dataDir"], "/var/lib/bench1/ipam");
    }
}

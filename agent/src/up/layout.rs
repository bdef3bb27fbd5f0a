//! Where one all-in-one node keeps its things. Everything follows from its name, so that several can live on one
//! machine and each can be removed without a trace.

use std::path::PathBuf;

/// The places of one node.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The node's name on this machine: `keelson` unless there are several.
    pub name: String,
    /// What must survive a reboot.
    pub state_dir: PathBuf,
    /// What must not: sockets, pinned namespaces, locks.
    pub run_dir: PathBuf,
}

impl Layout {
    /// The usual places for a node called `name`.
    pub fn named(name: &str) -> Layout {
        Layout {
            name: name.to_owned(),
            state_dir: PathBuf::from("/var/lib").join(name),
            run_dir: PathBuf::from("/run").join(name),
        }
    }

    /// The pinned network namespace that the whole node lives in.
    pub fn netns(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// The namespace at the other end of the node's cable: what is outside the cluster.
    pub fn outside_netns(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(format!("{}-outside", self.name))
    }

    /// Held, and holding the process id, while the node's process runs.
    pub fn lock_file(&self) -> PathBuf {
        self.run_dir.join("up.lock")
    }

    /// The node's own containerd: its folder below the run directory.
    pub fn containerd_run_dir(&self) -> PathBuf {
        self.run_dir.join("containerd")
    }

    /// Where its own containerd answers.
    pub fn containerd_socket(&self) -> PathBuf {
        self.containerd_run_dir().join("containerd.sock")
    }

    /// Images, snapshots and metadata of its own containerd.
    pub fn containerd_state_dir(&self) -> PathBuf {
        self.state_dir.join("containerd")
    }

    /// A BPF file system of the node's own, for the proxy's mode ebpf.
    pub fn bpf_dir(&self) -> PathBuf {
        self.run_dir.join("bpf")
    }

    /// The control plane's store, certificates and kubeconfigs.
    pub fn control_plane_dir(&self) -> PathBuf {
        self.state_dir.clone()
    }

    /// One of the kubeconfigs that the control plane wrote: `admin`, `node` or `proxy`.
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.control_plane_dir().join("kubeconfig").join(format!("{user}.yaml"))
    }

    /// CNI configuration lists.
    pub fn cni_conf_dir(&self) -> PathBuf {
        self.state_dir.join("cni/net.d")
    }

    /// Address pool and attachment records of the CNI plugin.
    pub fn cni_data_dir(&self) -> PathBuf {
        self.state_dir.join("cni/data")
    }

    /// The folder of all pods' logs.
    pub fn pod_logs_dir(&self) -> PathBuf {
        self.state_dir.join("log/pods")
    }

    /// Static pods.
    pub fn manifest_dir(&self) -> PathBuf {
        self.state_dir.join("manifests")
    }

    /// The cgroup below which all pods of this node live, in each hierarchy.
    pub fn cgroup_root(&self) -> String {
        format!("/{}", self.name)
    }
}

//! A node agent with its container runtime, as one thing to measure: keelson's or the kubelet.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use futures_util::TryStreamExt;
use k8s_openapi::api::core::v1::Node as NodeObject;
use keelson_tests::node::{BUSYBOX, program};
use kube::Client;
use kube::api::Api;
use kube::runtime::{WatchStreamExt, watcher};

use super::kubelet::PeerKubelet;
use crate::api::PATIENCE;
use crate::cluster::{Ground, NODE_ADDRESS};
use crate::cpu::CpuGroup;
use crate::process::{Daemon, Memory, in_netns, own_cpu};

/// The name of the Node object.
pub(crate) const NODE_NAME: &str = "node";

/// A running agent and the containerd that it uses.
pub(crate) struct NodeUnderTest {
    /// The column in the report.
    pub(crate) label: String,
    pub(crate) node_name: &'static str,
    pub(crate) image: &'static str,
    pub(crate) agent: Daemon,
    runtime: Runtime,
    /// The group above the cgroups of all pods.
    pods: CpuGroup,
}

/// Whose containerd it is.
enum Runtime {
    /// `keelson up` started it and looks after it.
    Keelsons {
        pid: u32,
        cpu: CpuGroup,
    },
    Own(Box<Daemon>),
}

/// CPU seconds so far, by who used them.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct CpuParts {
    /// The agent and everything that it started, such as CNI plugins.
    pub(crate) agent: f64,
    pub(crate) agent_own: f64,
    /// containerd and everything that it started: shims, runc.
    pub(crate) runtime: f64,
    pub(crate) containerd: f64,
    /// What runs in the pods' cgroups.
    pub(crate) pods: f64,
}

impl CpuParts {
    pub(crate) fn since(&self, before: &CpuParts) -> CpuParts {
        CpuParts {
            agent: self.agent - before.agent,
            agent_own: self.agent_own - before.agent_own,
            runtime: self.runtime - before.runtime,
            containerd: self.containerd - before.containerd,
            pods: self.pods - before.pods,
        }
    }
}

impl NodeUnderTest {
    /// Starts `keelson agent` as a process of its own and waits until its node is Ready.
    ///
    /// # Errors
    /// When it does not become Ready; with the end of its log.
    pub(crate) async fn keelson(ground: &Ground<'_>, client: &Client) -> Result<NodeUnderTest> {
        let node = ground.node();
        let pid_file = node.run_dir().join("containerd/containerd.pid");
        let pid = std::fs::read_to_string(&pid_file)
            .with_context(|| format!("cannot read {}", pid_file.display()))?;
        let pid = pid.trim().parse().context("containerd's pid file holds no number")?;
        let cpu = CpuGroup::create(&format!("{}-bench-containerd", node.name()))?;
        cpu.adopt(pid)?;
        let mut command = in_netns(&ground.netns(), &program("keelson")?);
        command.arg("agent").args(agent_flags(ground)?);
        let log = node.scratch().join("agent.log");
        let group = format!("{}-bench-agent", node.name());
        let agent = Daemon::start("keelson agent", command, &log, &group)?;
        let mut this = NodeUnderTest {
            label: "keelson".into(),
            node_name: NODE_NAME,
            image: BUSYBOX,
            agent,
            runtime: Runtime::Keelsons { pid, cpu },
            pods: CpuGroup::of_others(node.name())?,
        };
        this.wait_ready(client).await?;
        Ok(this)
    }

    /// Starts a kubelet with a containerd of its own and waits until its node is Ready.
    ///
    /// # Errors
    /// As [`NodeUnderTest::keelson`].
    pub(crate) async fn kubelet(
        ground: &Ground<'_>,
        client: &Client,
        kubelet: &PeerKubelet,
    ) -> Result<NodeUnderTest> {
        let containerd = kubelet.start_containerd(ground)?;
        kubelet.import_images(ground).await?;
        let agent = kubelet.start(ground)?;
        let mut this = NodeUnderTest {
            label: kubelet.label.clone(),
            node_name: NODE_NAME,
            image: BUSYBOX,
            agent,
            runtime: Runtime::Own(Box::new(containerd)),
            pods: CpuGroup::of_others(&format!("{}/kubepods", ground.node().name()))?,
        };
        this.wait_ready(client).await?;
        Ok(this)
    }

    async fn wait_ready(&mut self, client: &Client) -> Result<()> {
        let nodes: Api<NodeObject> = Api::all(client.clone());
        let ready = async {
            let mut states = std::pin::pin!(
                watcher(nodes, watcher::Config::default()).default_backoff().applied_objects()
            );
            while let Some(node) = states.try_next().await? {
                if is_ready(&node) {
                    return Ok(());
                }
            }
            bail!("the watch on nodes ended")
        };
        let outcome = tokio::time::timeout(PATIENCE, ready).await;
        self.agent.must_run()?;
        match outcome {
            Ok(result) => result,
            Err(_) => bail!("{} is not Ready:\n{}", self.label, self.agent.log_tail()),
        }
    }

    /// CPU seconds of everybody until now.
    pub(crate) fn cpu(&self) -> CpuParts {
        let (runtime, containerd) = match &self.runtime {
            Runtime::Keelsons { pid, cpu } => (cpu.used(), own_cpu(*pid)),
            Runtime::Own(daemon) => (daemon.cpu(), own_cpu(daemon.pid())),
        };
        CpuParts {
            agent: self.agent.cpu(),
            agent_own: own_cpu(self.agent.pid()),
            runtime,
            containerd,
            pods: self.pods.used(),
        }
    }

    /// containerd's memory, and the sum of what its shims use in proportion.
    pub(crate) fn runtime_memory(&self) -> (Memory, f64) {
        let (pid, others) = match &self.runtime {
            Runtime::Keelsons { pid, cpu } => {
                (*pid, cpu.processes().into_iter().filter(|p| p != pid).collect())
            }
            Runtime::Own(daemon) => (daemon.pid(), daemon.companions()),
        };
        let share = |pid: &u32| {
            let memory = Memory::of(*pid);
            memory.proportional.unwrap_or(memory.resident)
        };
        (Memory::of(pid), others.iter().map(share).sum())
    }

    /// The end of the agent's log, as the context of an error.
    pub(crate) fn log_tail(&self) -> String {
        format!("the log of {} ends with:\n{}\n", self.label, self.agent.log_tail())
    }

    /// Ends the agent, and containerd where it is ours.
    ///
    /// # Errors
    /// When one had to be killed.
    pub(crate) async fn stop(self) -> Result<()> {
        let stopped = self.agent.stop().await.map(drop);
        if let Runtime::Own(containerd) = self.runtime {
            containerd.stop().await?;
        }
        stopped
    }
}

fn is_ready(node: &NodeObject) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// What `keelson up` gives its own agent.
fn agent_flags(ground: &Ground<'_>) -> Result<Vec<String>> {
    let node = ground.node();
    let (state, run) = (node.state_dir(), node.run_dir());
    let path = |flag: &str, path: PathBuf| format!("--{flag}={}", path.display());
    Ok(vec![
        path("kubeconfig", ground.kubeconfig("node")?),
        format!("--hostname-override={NODE_NAME}"),
        format!("--node-ip={NODE_ADDRESS}"),
        format!("--container-runtime-endpoint=unix://{}", node.containerd_socket().display()),
        format!("--cgroup-root=/{}", node.name()),
        path("cert-dir", state.join("kubelet-pki")),
        path("pod-logs-dir", state.join("log/pods")),
        path("cni-conf-dir", state.join("cni/net.d")),
        path("root-dir", state),
        path("run-dir", run),
    ])
}

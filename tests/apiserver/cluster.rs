//! A kube-apiserver, and the node under test in its network namespace.

use std::path::{Path, PathBuf};
use std::process::Child;

use anyhow::{Context, Result};
use keelson_tests::apiserver::{ApiServer, Assets, NODE_ADDRESS, inside, spawn};
use keelson_tests::leak::no_pods_left;
use keelson_tests::node::{Node, program, tail, until};

/// Dropped from the top: first the programs that use what is below.
pub(crate) struct Cluster {
    programs: Programs,
    pub(crate) server: ApiServer,
    pub(crate) node: Node,
}

impl Cluster {
    /// A cluster without nodes; `None`, said aloud, where there is no kube-apiserver.
    pub(crate) fn start() -> Option<Cluster> {
        let Some(assets) = Assets::from_env() else {
            println!("SKIPPED: KUBEBUILDER_ASSETS is not set");
            return None;
        };
        let node = Node::start_control_plane("ka").unwrap();
        let folder = node.scratch().join("apiserver");
        let server = ApiServer::start(assets, node.name(), folder, &[]).unwrap();
        let cluster = Cluster { programs: Programs(Vec::new()), server, node };
        cluster.prepare().unwrap();
        Some(cluster)
    }

    /// A cluster with a node that has its certificate already.
    pub(crate) fn with_node() -> Option<Cluster> {
        let mut cluster = Cluster::start()?;
        let kubeconfig = cluster.node_kubeconfig();
        cluster.run_agent(&[&flag("kubeconfig", &kubeconfig)]).unwrap();
        cluster.wait_for_node();
        Some(cluster)
    }

    /// The credentials that a node gets.
    pub(crate) fn node_kubeconfig(&self) -> PathBuf {
        self.server.kubeconfig_for("system:node:node", Some("system:nodes")).unwrap()
    }

    /// What the controllers of a cluster would have made.
    fn prepare(&self) -> Result<()> {
        let ca = format!("--from-file=ca.crt={}", self.server.ca_file().display());
        self.server.kubectl(&["create", "serviceaccount", "default"])?;
        self.server.kubectl(&["create", "configmap", "kube-root-ca.crt", &ca])?;
        self.server.kubectl(&[
            "create",
            "clusterrolebinding",
            "kubelet-api",
            "--clusterrole=system:kubelet-api-admin",
            "--user=kube-apiserver-kubelet-client",
        ])?;
        Ok(())
    }

    /// Starts the agent with `flags` and those that every test needs.
    pub(crate) fn run_agent(&mut self, flags: &[&str]) -> Result<()> {
        let (state, run) = (self.node.state_dir(), self.node.run_dir());
        let mut command = inside(self.node.name(), &program("keelson")?);
        command.arg("agent").args(flags).args([
            "--hostname-override=node".to_owned(),
            format!("--node-ip={NODE_ADDRESS}"),
            format!(
                "--container-runtime-endpoint=unix://{}",
                self.node.containerd_socket().display()
            ),
            format!("--cgroup-root=/{}", self.node.name()),
            flag("cert-dir", &state.join("kubelet-pki")),
            flag("pod-logs-dir", &state.join("log/pods")),
            flag("cni-conf-dir", &state.join("cni/net.d")),
            flag("client-ca-file", &self.server.ca_file()),
            flag("root-dir", &state),
            flag("run-dir", &run),
            "-v=2".to_owned(),
        ]);
        self.programs.0.push(spawn(command, &self.log("agent"))?);
        Ok(())
    }

    /// Starts the proxy as the user that kubeadm gives kube-proxy's rights to.
    pub(crate) fn run_proxy(&mut self) -> Result<()> {
        let kubeconfig = self.server.kubeconfig_for("system:kube-proxy", None)?;
        let mut command = inside(self.node.name(), &program("keelson-proxy")?);
        command.args([
            flag("kubeconfig", &kubeconfig),
            "--hostname-override=node".to_owned(),
            "--cluster-cidr=10.244.0.0/16".to_owned(),
            flag("state-file", &self.node.scratch().join("last-known.json")),
        ]);
        self.programs.0.push(spawn(command, &self.log("proxy"))?);
        Ok(())
    }

    pub(crate) fn wait_for_node(&self) {
        self.until_prints(
            "the node is Ready",
            &[
                "get",
                "nodes",
                "-o",
                r#"jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}"#,
            ],
            "True",
        );
    }

    pub(crate) fn wait_for(&self, object: &str, condition: &str) {
        self.server
            .kubectl(&["wait", object, &format!("--for={condition}"), "--timeout=90s"])
            .with_context(|| {
                let described = self.server.kubectl(&["describe", object]).unwrap_or_default();
                format!("{described}\nthe agent's log:\n{}", self.log_of("agent"))
            })
            .unwrap();
    }

    /// Asks kubectl until it prints `want`.
    #[track_caller]
    pub(crate) fn until_prints(&self, what: &str, args: &[&str], want: &str) {
        until(what, || match self.server.kubectl(args) {
            Ok(text) if text.trim() == want => Ok(()),
            answer => Err(format!("{answer:?}\nthe agent's log:\n{}", self.log_of("agent"))),
        });
    }

    /// Deletes all pods, ends the programs and checks that nothing is left of them.
    pub(crate) fn finish(self) {
        self.server
            .kubectl(&["delete", "pods", "--all", "--all-namespaces", "--timeout=90s"])
            .unwrap();
        no_pods_left(&self.node);
        drop(self.programs);
        drop(self.server);
        self.node.stop().unwrap();
    }

    fn log(&self, program: &str) -> PathBuf {
        self.node.scratch().join(format!("{program}.log"))
    }

    pub(crate) fn log_of(&self, program: &str) -> String {
        tail(&self.log(program))
    }
}

/// The agent and the proxy.
struct Programs(Vec<Child>);

impl Drop for Programs {
    fn drop(&mut self) {
        for child in &mut self.0 {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

pub(crate) fn flag(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}

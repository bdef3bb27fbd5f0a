//! The ground that everybody is measured on: a network namespace with containerd and an API server in it.
//!
//! ```text
//!   netns <name>: agent or kubelet, proxy, containerd, the bench's own client ── eth0 ══ netns <name>-outside
//!                 198.18.0.2, where the API server answers                                198.18.0.1
//! ```

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use keelson_tests::apiserver::{ApiServer, Assets};
use keelson_tests::node::Node;
use kube::Client;
use nix::sched::{CloneFlags, setns};
use tokio::signal::unix::{SignalKind, signal};

use crate::api;
use crate::report::Report;
use crate::subject::version_label;

/// The node's address in its namespace, and that of the other end of its cable.
pub(crate) const NODE_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 2));
pub(crate) const OUTSIDE_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1));

/// Nobody makes the default ServiceAccount here.
const FLAGS: &[&str] = &["--disable-admission-plugins=ServiceAccount"];

/// Which API server to use.
#[derive(Debug, Clone, Args)]
pub(crate) struct ServerOptions {
    /// A kube-apiserver to use instead of keelson's embedded control plane
    #[arg(long, value_name = "PATH")]
    apiserver: Option<PathBuf>,
    /// The etcd for --apiserver [default: `etcd` beside it, then on the PATH]
    #[arg(long, value_name = "PATH", requires = "apiserver")]
    etcd: Option<PathBuf>,
}

/// The ground, while it exists.
pub(crate) struct Cluster {
    /// Dropped before the node, whose namespace it is in.
    real: Option<RealServer>,
    node: Node,
}

/// A kube-apiserver and how it is named in the report.
struct RealServer {
    label: String,
    server: ApiServer,
}

/// The ground as the work sees it, with the API server that it uses.
pub(crate) struct Ground<'a> {
    node: &'a Node,
    /// Where the API server answers in the namespace.
    pub(crate) server: String,
    admin: PathBuf,
    real: Option<&'a RealServer>,
}

impl Cluster {
    /// Makes the namespace and starts containerd and the API server there.
    ///
    /// # Errors
    /// When keelson or the API server does not come up.
    pub(crate) fn start(options: &ServerOptions) -> Result<Cluster> {
        let node = Node::start_control_plane("bench")?;
        let real = match &options.apiserver {
            Some(program) => Some(RealServer::start(&node, program, options.etcd.as_deref())?),
            None => None,
        };
        Ok(Cluster { real, node })
    }

    /// Runs `work` on a thread that lives in the namespace, with a client of the API server.
    ///
    /// # Errors
    /// Those of `work`, with the end of keelson's log.
    pub(crate) fn inside<F>(&self, work: F) -> Result<()>
    where
        F: AsyncFnOnce(&Ground<'_>, &Client) -> Result<()> + Send,
    {
        let outcome = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(&netns(self.node.name()))?;
                // Threads inherit the namespace of the one that starts them.
                let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
                runtime.block_on(self.interruptible(work))
            });
            thread.join().unwrap_or_else(|_| Err(anyhow!("the bench panicked")))
        });
        outcome.with_context(|| format!("keelson's log ends with:\n{}\n", self.node.log()))
    }

    /// Ctrl-C and SIGTERM end the work, not the process: the node has to be removed.
    async fn interruptible<F>(&self, work: F) -> Result<()>
    where
        F: AsyncFnOnce(&Ground<'_>, &Client) -> Result<()>,
    {
        let ground = self.ground()?;
        let client = api::client(&ground.admin, &ground.server).await?;
        let mut terminated = signal(SignalKind::terminate())?;
        tokio::select! {
            result = work(&ground, &client) => result,
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
            _ = terminated.recv() => bail!("terminated"),
        }
    }

    fn ground(&self) -> Result<Ground<'_>> {
        let (server, admin) = match &self.real {
            Some(real) => (real.server.url(), real.server.admin()),
            None => {
                let own = self.node.state_dir().join("kubeconfig/admin.yaml");
                let (host, node) = ("127.0.0.1", NODE_ADDRESS.to_string());
                (api::server_of(&own)?.replace(host, &node), own)
            }
        };
        Ok(Ground { node: &self.node, server, admin, real: self.real.as_ref() })
    }

    /// Removes everything; what is left is a note, not a failure: the figures are there already.
    ///
    /// # Errors
    /// None today.
    pub(crate) fn stop(self, report: &mut Report) -> Result<()> {
        drop(self.real);
        if let Err(error) = self.node.stop() {
            report.notes.push(format!("removing the node: {error:#}"));
        }
        Ok(())
    }
}

impl Ground<'_> {
    pub(crate) fn node(&self) -> &Node {
        self.node
    }

    pub(crate) fn netns(&self) -> PathBuf {
        netns(self.node.name())
    }

    pub(crate) fn outside_netns(&self) -> PathBuf {
        netns(&format!("{}-outside", self.node.name()))
    }

    /// Whether pods without a node find one.
    pub(crate) fn has_scheduler(&self) -> bool {
        self.real.is_none()
    }

    /// Which API server everybody talked to.
    pub(crate) fn describe(&self) -> String {
        match self.real {
            Some(real) => format!("API server: {}", real.label),
            None => "API server: keelson's embedded control plane".into(),
        }
    }

    /// A file with the credentials of `user` (`node` or `proxy`) for the server as the namespace sees it.
    ///
    /// # Errors
    /// When there is none for that user.
    pub(crate) fn kubeconfig(&self, user: &str) -> Result<PathBuf> {
        if self.real.is_some() {
            return Ok(self.admin.clone());
        }
        let own = self.node.state_dir().join(format!("kubeconfig/{user}.yaml"));
        let text = fs::read_to_string(&own)
            .with_context(|| format!("cannot read the kubeconfig {}", own.display()))?;
        let inside = self.node.scratch().join(format!("{user}.yaml"));
        let text = text.replace(&api::server_of(&own)?, &self.server);
        fs::write(&inside, text).with_context(|| format!("cannot write {}", inside.display()))?;
        Ok(inside)
    }
}

impl RealServer {
    fn start(node: &Node, program: &Path, etcd: Option<&Path>) -> Result<RealServer> {
        let assets = Assets { apiserver: program.to_owned(), etcd: etcd_program(program, etcd) };
        let folder = node.scratch().join("apiserver");
        let server = ApiServer::start(assets, node.name(), folder, FLAGS)?;
        Ok(RealServer { label: version_label("kube-apiserver", program), server })
    }
}

fn etcd_program(apiserver: &Path, etcd: Option<&Path>) -> PathBuf {
    let beside = apiserver.with_file_name("etcd");
    match etcd {
        Some(path) => path.to_owned(),
        None if beside.is_file() => beside,
        None => PathBuf::from("etcd"),
    }
}

fn netns(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Moves this thread into a pinned network namespace.
///
/// # Errors
/// When it is not there.
pub(crate) fn enter(netns: &Path) -> Result<()> {
    let file = fs::File::open(netns).with_context(|| format!("cannot open {}", netns.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("cannot enter {}", netns.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcd_is_the_given_one_then_the_one_beside_then_that_of_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let apiserver = folder.path().join("kube-apiserver");
        assert_eq!(etcd_program(&apiserver, Some(Path::new("/x"))), Path::new("/x"));
        assert_eq!(etcd_program(&apiserver, None), Path::new("etcd"));
        fs::write(folder.path().join("etcd"), "").unwrap();
        assert_eq!(etcd_program(&apiserver, None), folder.path().join("etcd"));
    }
}

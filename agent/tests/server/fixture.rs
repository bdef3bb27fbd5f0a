//! A node's HTTPS API whose containers are processes of this machine, and a stand-in for the API
//! server that passes kubectl's requests on to it.
#![allow(dead_code, reason = "each test binary uses its own part of the fixture")]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use keelson_agent::config::{Authorization, ServerConfig};
use keelson_agent::server;
use keelson_agent::server::auth::Access;
use keelson_agent::server::containers::{
    Attached, Containers, ExecRequest, Process, Stream, TerminalSize,
};
use keelson_agent::server::logs::follow::Logs;
use keelson_agent::server::metrics::Metrics;
use keelson_agent::server::routes::{Routes, Settings};
use keelson_agent::server::tls::Certificates;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_util::io::ReaderStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub struct Node {
    pub address: SocketAddr,
    pub healthz: SocketAddr,
    pub dir: tempfile::TempDir,
    /// The container runs as long as this is true.
    pub running: watch::Sender<bool>,
    /// Whether the pod is known.
    pub known: watch::Sender<bool>,
    /// What runs in the container that clients attach to.
    pub attached: watch::Sender<&'static str>,
    pub routes: Arc<Routes>,
    pub certificates: Arc<Certificates>,
    cancel: CancellationToken,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl Node {
    pub async fn start(change: impl FnOnce(&mut ServerConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("0.log"), "").unwrap();
        let mut config = ServerConfig {
            anonymous: true,
            authorization: Authorization::AlwaysAllow,
            streaming_idle_timeout: std::time::Duration::from_secs(60),
            ..ServerConfig::default()
        };
        change(&mut config);
        let streaming_idle_timeout = config.streaming_idle_timeout;
        let certificates = Certificates::load(&config, dir.path(), "n1", &[]).unwrap();
        let certificates = Arc::new(certificates);
        let running = watch::Sender::new(true);
        let cancel = CancellationToken::new();
        let known = watch::Sender::new(true);
        let attached = watch::Sender::new("cat");
        let containers: Arc<dyn Containers> = Arc::new(Local {
            log: dir.path().join("0.log"),
            running: running.subscribe(),
            known: known.subscribe(),
            attached: attached.subscribe(),
        });
        let routes = Arc::new(Routes {
            access: Access::new(config, "n1".to_owned(), None),
            containers: containers.clone(),
            logs: Logs::default(),
            settings: Settings {
                streaming_idle_timeout,
                debugging_handlers: true,
                configz: json!({}),
            },
            health: Box::new(|| None),
            metrics: Metrics::new("n1".to_owned(), containers),
            sessions: TaskTracker::new(),
            cancel: cancel.clone(),
        });
        let listener = server::bind(Ipv4Addr::LOCALHOST.into(), 0).await.unwrap();
        let address = listener.local_addr().unwrap();
        let healthz = server::bind(Ipv4Addr::LOCALHOST.into(), 0).await.unwrap();
        let healthz_address = healthz.local_addr().unwrap();
        tokio::spawn(server::serve(listener, certificates.clone(), routes.clone(), cancel.clone()));
        tokio::spawn(server::serve_healthz(healthz, routes.clone(), cancel.clone()));
        Self {
            address,
            healthz: healthz_address,
            dir,
            running,
            known,
            attached,
            routes,
            certificates,
            cancel,
        }
    }

    pub fn log(&self, line: &str) {
        use std::io::Write;
        let path = self.dir.path().join("0.log");
        let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
        writeln!(file, "2026-01-02T15:04:05.000000001Z stdout F {line}").unwrap();
    }

    /// Starts a stand-in for the API server: pods by name, and raw upgrades to this node.
    pub async fn api_server<F>(
        &self,
        serve: impl FnOnce(TcpListener, SocketAddr) -> F,
    ) -> SocketAddr
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let kubelet = self.address;
        tokio::spawn(serve(listener, kubelet));
        address
    }
}

/// The one pod of the node, with a container that is waiting beside the one that runs.
pub fn pod() -> Pod {
    let status = |name: &str, state: serde_json::Value, id: &str| {
        json!({"name": name, "state": state, "containerID": id, "ready": true, "started": true,
            "restartCount": 0, "image": "local", "imageID": "local"})
    };
    serde_json::from_value(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web", "namespace": "default", "uid": "u-1",
            "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"nodeName": "n1", "containers": [
            {"name": "main", "image": "local", "stdin": true, "tty": true},
            {"name": "slow", "image": "local"},
            {"name": "broken", "image": "local"},
        ]},
        "status": {"phase": "Running", "containerStatuses": [
            status("main", json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}), "containerd://c-1"),
            status("broken", json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}), "containerd://c-2"),
            status("slow", json!({"waiting": {"reason": "ContainerCreating"}}), ""),
        ]},
    }))
    .unwrap()
}

/// Containers whose log is at `log` and which run for ever.
pub fn containers(log: &std::path::Path) -> Arc<dyn Containers> {
    let always = watch::Sender::new(true).subscribe();
    let attached = watch::Sender::new("cat").subscribe();
    Arc::new(Local { log: log.to_owned(), running: always.clone(), known: always, attached })
}

struct Local {
    log: PathBuf,
    running: watch::Receiver<bool>,
    known: watch::Receiver<bool>,
    attached: watch::Receiver<&'static str>,
}

impl Containers for Local {
    fn pods(&self) -> Vec<Arc<Pod>> {
        if *self.known.borrow() { vec![Arc::new(pod())] } else { Vec::new() }
    }

    fn settled(&self) -> BoxFuture<'static, ()> {
        let mut known = self.known.clone();
        async move { drop(known.wait_for(|known| *known).await) }.boxed()
    }

    fn log_path(&self, uid: &str, id: &str) -> BoxFuture<'static, Result<PathBuf, String>> {
        assert_eq!((uid, id), ("u-1", "c-1"), "as a mistake in the agent would");
        let log = self.log.clone();
        async move { Ok(log) }.boxed()
    }

    fn ended(&self, _: &str, _: &str) -> BoxFuture<'static, ()> {
        let mut running = self.running.clone();
        async move { drop(running.wait_for(|running| !running).await) }.boxed()
    }

    fn exec(&self, id: &str, request: ExecRequest) -> BoxFuture<'static, Result<Process, String>> {
        assert_eq!(id, "c-1");
        assert_ne!(request.command, ["panic"], "as a mistake in the agent would");
        async move { if request.tty { on_terminal(&request) } else { on_pipes(&request) } }.boxed()
    }

    fn attach(&self, id: &str, stdin: bool) -> BoxFuture<'static, Result<Attached, String>> {
        let request = ExecRequest {
            command: ["sh", "-c", *self.attached.borrow()].map(str::to_owned).to_vec(),
            stdin,
            stdout: true,
            ..ExecRequest::default()
        };
        let cat = self.exec(id, request);
        async move {
            let Process { stdin, stdout, exit, .. } = cat.await?;
            let output = ReaderStream::new(stdout.unwrap())
                .map(|read| read.map(|data| (Stream::Stdout, data)).map_err(|e| e.to_string()));
            tokio::spawn(exit);
            Ok(Attached { stdin, close_stdin: None, output: output.boxed(), resize: None })
        }
        .boxed()
    }

    fn pod_cgroup(&self, _: &Pod) -> Option<String> {
        None
    }

    fn network(&self, _: &str) -> BoxFuture<'static, Result<Option<PathBuf>, String>> {
        async { Ok(None) }.boxed()
    }
}

fn command(request: &ExecRequest) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(&request.command[0]);
    command.args(&request.command[1..]).kill_on_drop(true);
    command
}

fn on_pipes(request: &ExecRequest) -> Result<Process, String> {
    let pipe = |wanted| if wanted { Stdio::piped() } else { Stdio::null() };
    let mut child = command(request)
        .stdin(pipe(request.stdin))
        .stdout(pipe(request.stdout))
        .stderr(pipe(request.stderr))
        .spawn()
        .map_err(|error| format!("cannot start {}: {error}", request.command[0]))?;
    Ok(Process {
        stdin: child.stdin.take().map(|stdin| Box::new(stdin) as _),
        stdout: child.stdout.take().map(|stdout| Box::new(stdout) as _),
        stderr: child.stderr.take().map(|stderr| Box::new(stderr) as _),
        resize: None,
        exit: async move { Ok(child.wait().await.unwrap().code().unwrap_or(137)) }.boxed(),
    })
}

/// A terminal whose size can be asked for with `stty size`.
fn on_terminal(request: &ExecRequest) -> Result<Process, String> {
    let terminal = nix::pty::openpty(None, None).map_err(|error| error.to_string())?;
    let slave = || Stdio::from(terminal.slave.try_clone().unwrap());
    let mut child = command(request)
        .stdin(slave())
        .stdout(slave())
        .stderr(slave())
        .spawn()
        .map_err(|error| error.to_string())?;
    drop(terminal.slave);
    let master = std::fs::File::from(terminal.master);
    let sizes_of = master.try_clone().unwrap();
    let (resize, mut sizes) = mpsc::channel::<TerminalSize>(4);
    tokio::spawn(async move {
        while let Some(size) = sizes.recv().await {
            let fd = std::os::fd::AsFd::as_fd(&sizes_of);
            let stty = tokio::process::Command::new("stty")
                .args(["rows", &size.height.to_string(), "cols", &size.width.to_string()])
                .stdin(fd.try_clone_to_owned().unwrap())
                .status();
            stty.await.unwrap();
        }
    });
    let stdin = tokio::fs::File::from_std(master.try_clone().unwrap());
    let stdout = tokio::fs::File::from_std(master);
    Ok(Process {
        stdin: request.stdin.then(|| Box::new(stdin) as _),
        stdout: Some(Box::new(stdout) as _),
        stderr: None,
        resize: Some(resize),
        exit: async move { Ok(child.wait().await.unwrap().code().unwrap_or(137)) }.boxed(),
    })
}

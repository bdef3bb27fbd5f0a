//! What the HTTPS API sees of the pods that run here: the registry says which there are, the runtime
//! does the rest.

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;

use super::describe;
use crate::cgroup::CgroupTree;
use crate::pod::PodRegistry;
use crate::runtime::types::{ContainerState, ObservedContainer, RuntimeEvent};
use crate::runtime::{self, Runtime};
use crate::server::containers::{Attached, Containers, ExecRequest, Process, TerminalSize};

/// The pods of this node and the way to their containers.
pub(super) struct NodeContainers {
    pub(super) registry: PodRegistry,
    pub(super) runtime: Runtime,
    /// `None` on machines without cgroups, where no pods run either.
    pub(super) cgroups: Option<CgroupTree>,
    /// Below it the runtime pins the namespaces of sandboxes.
    pub(super) run_dir: PathBuf,
}

impl Containers for NodeContainers {
    fn pods(&self) -> Vec<Arc<Pod>> {
        self.registry.pods()
    }

    fn settled(&self) -> BoxFuture<'static, ()> {
        self.registry.settled().boxed()
    }

    fn log_path(&self, uid: &str, id: &str) -> BoxFuture<'static, Result<PathBuf, String>> {
        let (runtime, uid, id) = (self.runtime.clone(), uid.to_owned(), id.to_owned());
        async move {
            let container = find(&runtime, &uid, &id).await?;
            container
                .map(|container| container.log_path)
                .ok_or_else(|| format!("container {id} does not exist any more, nor does its log"))
        }
        .boxed()
    }

    fn ended(&self, uid: &str, id: &str) -> BoxFuture<'static, ()> {
        // Subscribed before the first look, so that no end falls between the two.
        let mut events = self.runtime.events();
        let (runtime, uid, id) = (self.runtime.clone(), uid.to_owned(), id.to_owned());
        async move {
            loop {
                match find(&runtime, &uid, &id).await {
                    Ok(Some(container)) if is_running(&container) => {}
                    Ok(_) => return,
                    // containerd is away: it cannot tell, and what comes back says Resync.
                    Err(_) => {}
                }
                loop {
                    match events.recv().await {
                        Ok(RuntimeEvent::Pod { uid: changed }) if changed != uid => {}
                        Ok(_) | Err(RecvError::Lagged(_)) => break,
                        Err(RecvError::Closed) => return,
                    }
                }
            }
        }
        .boxed()
    }

    fn exec(&self, id: &str, request: ExecRequest) -> BoxFuture<'static, Result<Process, String>> {
        let (runtime, id) = (self.runtime.clone(), id.to_owned());
        async move {
            let request = runtime::ExecRequest {
                command: request.command,
                tty: request.tty,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                timeout: None,
            };
            let session = runtime.exec(&id, request).await.map_err(|error| describe(&error))?;
            Ok(process(session))
        }
        .boxed()
    }

    fn attach(&self, id: &str, stdin: bool) -> BoxFuture<'static, Result<Attached, String>> {
        let (runtime, id) = (self.runtime.clone(), id.to_owned());
        async move {
            let session = runtime.attach(&id, stdin).await.map_err(|error| describe(&error))?;
            let output = session.output.map(|piece| piece.map_err(|error| describe(&error)));
            Ok(Attached {
                stdin: session.stdin,
                close_stdin: session.close_stdin,
                output: output.boxed(),
                resize: Some(sizes(session.resize)),
            })
        }
        .boxed()
    }

    fn pod_cgroup(&self, pod: &Pod) -> Option<String> {
        self.cgroups.as_ref().map(|cgroups| cgroups.pod_path(pod))
    }

    fn network(&self, uid: &str) -> BoxFuture<'static, Result<Option<PathBuf>, String>> {
        let (runtime, uid, run_dir) = (self.runtime.clone(), uid.to_owned(), self.run_dir.clone());
        async move {
            let observed = runtime.observe(&uid).await.map_err(|error| describe(&error))?;
            let sandboxes = observed.map(|pod| pod.sandboxes).unwrap_or_default();
            let sandbox = sandboxes.into_iter().find(|sandbox| sandbox.ready);
            let sandbox = sandbox.ok_or("the pod's sandbox does not run")?;
            let netns = run_dir.join("sandboxes").join(&sandbox.id).join("ns/net");
            Ok((!sandbox.host_network).then_some(netns))
        }
        .boxed()
    }
}

async fn find(runtime: &Runtime, uid: &str, id: &str) -> Result<Option<ObservedContainer>, String> {
    let observed = runtime.observe(uid).await.map_err(|error| describe(&error))?;
    let containers = observed.map(|pod| pod.containers).unwrap_or_default();
    Ok(containers.into_iter().find(|container| container.id == id))
}

fn is_running(container: &ObservedContainer) -> bool {
    matches!(container.state, ContainerState::Running { .. } | ContainerState::Created)
}

/// The API's sizes of a terminal, turned into the runtime's.
fn sizes(to_runtime: mpsc::Sender<runtime::TerminalSize>) -> mpsc::Sender<TerminalSize> {
    let (resize, mut sizes) = mpsc::channel::<TerminalSize>(1);
    tokio::spawn(async move {
        while let Some(TerminalSize { width, height }) = sizes.recv().await {
            let size = runtime::TerminalSize { width, height };
            if to_runtime.send(size).await.is_err() {
                break;
            }
        }
    });
    resize
}

fn process(session: runtime::ExecSession) -> Process {
    let exit = session.exit;
    Process {
        stdin: session.stdin,
        stdout: session.stdout,
        stderr: session.stderr,
        resize: Some(sizes(session.resize)),
        exit: async move { exit.await.map_err(|error| describe(&error)) }.boxed(),
    }
}

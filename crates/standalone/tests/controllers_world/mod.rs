//! A control plane with a node that runs no containers: it reports what an agent would.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::TcpListener;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use keelson_standalone::{
    Api, ApiError, ControlPlane, DeleteOptions, EventType, Registry, StandaloneConfig,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Ends a test that hangs. Nothing is measured by it.
const DEADLINE: Duration = Duration::from_secs(60);
/// A pod with this image never becomes ready.
pub(crate) const BROKEN: &str = "broken";

/// A running control plane in a folder of its own.
pub(crate) struct World {
    pub(crate) registry: Registry,
    plane: ControlPlane,
    node: tokio::task::JoinHandle<()>,
    _data: tempfile::TempDir,
}

impl World {
    /// Starts everything, runs `test`, stops everything.
    pub(crate) async fn run<F: Future<Output = World>>(test: impl FnOnce(World) -> F) {
        let data = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = StandaloneConfig::new(data.path().to_owned(), vec![listener]);
        let plane = keelson_standalone::start(config).await.unwrap();
        let registry = plane.registry().clone();
        registry.api::<Node>().unwrap().create(&node("n1", "4")).await.unwrap();
        let node = tokio::spawn(run_node(registry.clone()));
        let world = World { registry, plane, node, _data: data };
        let world = tokio::time::timeout(DEADLINE, test(world)).await.unwrap();
        world.node.abort();
        world.plane.shutdown().await;
    }

    /// The objects of a type.
    pub(crate) fn api<T: k8s_openapi::Resource>(&self) -> Api<T> {
        self.registry.api().unwrap()
    }

    /// Makes an object from JSON.
    pub(crate) async fn make<T: Kind>(&self, value: Value) -> T {
        let object = serde_json::from_value(value).unwrap();
        self.api::<T>().create(&object).await.unwrap()
    }

    /// Waits until `look` finds something among the objects of a type in a namespace.
    pub(crate) async fn until<T: Kind, R>(
        &self,
        namespace: &str,
        look: impl Fn(&BTreeMap<String, T>) -> Option<R>,
    ) -> R {
        let api = self.api::<T>();
        loop {
            let (objects, revision) = api.list(namespace).unwrap();
            let by_name = |object: T| (object.metadata().name.clone().unwrap(), object);
            if let Some(found) = look(&objects.into_iter().map(by_name).collect()) {
                return found;
            }
            let mut watch = api.watch(namespace, revision).unwrap();
            watch.next().await.unwrap();
        }
    }
}

/// What all kinds in these tests are.
pub(crate) trait Kind:
    k8s_openapi::Metadata<Ty = k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta>
    + Serialize
    + DeserializeOwned
{
}
impl<T> Kind for T where
    T: k8s_openapi::Metadata<Ty = k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta>
        + Serialize
        + DeserializeOwned
{
}

pub(crate) fn node(name: &str, cpu: &str) -> Node {
    serde_json::from_value(json!({
        "metadata": {"name": name},
        "status": {
            "allocatable": {"cpu": cpu, "memory": "8Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]}}))
    .unwrap()
}

/// What an agent does, without containers: pods that are bound run, pods that are deleted go.
async fn run_node(registry: Registry) {
    let pods: Api<Pod> = registry.api().unwrap();
    let (listed, revision) = pods.list("").unwrap();
    let mut watch = pods.watch("", revision).unwrap();
    let mut number = 0_u32;
    for pod in listed {
        act(&pods, pod, &mut number).await;
    }
    loop {
        let event = watch.next().await.unwrap();
        if event.event != EventType::Deleted {
            act(&pods, event.object, &mut number).await;
        }
    }
}

async fn act(pods: &Api<Pod>, mut pod: Pod, number: &mut u32) {
    let spec = pod.spec.clone().unwrap();
    if spec.node_name.is_none() {
        return;
    }
    let (namespace, name) =
        (pod.metadata.namespace.clone().unwrap(), pod.metadata.name.clone().unwrap());
    let result: Result<(), ApiError> = if pod.metadata.deletion_timestamp.is_some() {
        let now = DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
        pods.delete(&namespace, &name, &now).await.map(drop)
    } else if pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Pending") {
        *number += 1;
        let ready = spec.containers[0].image.as_deref() != Some(BROKEN);
        let mut conditions = pod.status.unwrap().conditions.unwrap_or_default();
        conditions.retain(|condition| condition.type_ != "Ready");
        let condition = json!({"type": "Ready", "status": if ready { "True" } else { "False" },
            "lastTransitionTime": "2026-01-01T00:00:00Z"});
        conditions.push(serde_json::from_value(condition).unwrap());
        let ip = format!("10.1.{}.{}", *number / 250, *number % 250 + 1);
        pod.status = Some(
            serde_json::from_value(json!({"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions}))
                .unwrap(),
        );
        pod.metadata.resource_version = None;
        pods.update_status(&pod).await.map(drop)
    } else {
        Ok(())
    };
    if let Err(error) = result {
        assert!(error.is_not_found() || error.is_conflict(), "{error}");
    }
}

//! Follows Services, EndpointSlices and the own Node at the API server.

use std::borrow::Cow;
use std::fmt::Debug;

use futures_util::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;

use crate::engine::Mailbox;
use crate::model::objects::{EndpointSlice, Node, Service, ServiceCidr};

/// Services that another proxy handles, and headless slices, do not even cross the wire. One whose
/// label changes comes as a deletion or an addition.
pub(crate) const SERVICE_SELECTOR: &str = "!service.kubernetes.io/service-proxy-name";
pub(crate) const SLICE_SELECTOR: &str =
    "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";
/// Pages of the first list: small enough that a page in memory does not matter.
const PAGE_SIZE: u32 = 250;

/// Something that a watch told.
pub(crate) enum Wake {
    Service(Event<Service>),
    Slice(Event<EndpointSlice>),
    Node(Event<Node>),
    Cidr(Event<ServiceCidr>),
    Stop,
}

/// Follows all of them until the mailbox is closed. Never gives up: errors are logged and retried.
pub(crate) async fn follow(client: Client, node_name: &str, mailbox: &Mailbox) {
    let config = || watcher::Config::default().page_size(PAGE_SIZE);
    let services = Api::<Service>::all(client.clone());
    let slices = Api::<EndpointSlice>::all(client.clone());
    let nodes = Api::<Node>::all(client.clone());
    let cidrs = Api::<ServiceCidr>::all(client);
    let own_node = config().fields(&format!("metadata.name={node_name}"));
    tokio::join!(
        follow_kind(services, config().labels(SERVICE_SELECTOR), mailbox, Wake::Service),
        follow_kind(slices, config().labels(SLICE_SELECTOR), mailbox, Wake::Slice),
        follow_kind(nodes, own_node, mailbox, Wake::Node),
        follow_kind(cidrs, config(), mailbox, Wake::Cidr),
    );
}

async fn follow_kind<K>(
    api: Api<K>,
    config: watcher::Config,
    mailbox: &Mailbox,
    wake: impl Fn(Event<K>) -> Wake,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let kind = K::kind(&());
    let mut events = std::pin::pin!(watcher(api, config).default_backoff());
    let mut complaining = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                if std::mem::take(&mut complaining) {
                    tracing::info!(%kind, "The API server answers again");
                }
                if !mailbox.send(wake(event)) {
                    return;
                }
            }
            // Before 1.33 there are no ServiceCIDRs: nothing is lost but the guard for unused addresses.
            Err(error) if is_unknown_kind(&error) && kind == "ServiceCIDR" => {
                tracing::info!("This API server has no ServiceCIDRs");
                return;
            }
            // Repeated at every attempt: only the first is news.
            Err(error) if complaining => tracing::debug!(%kind, %error, "Cannot watch, retrying"),
            Err(error) => {
                complaining = true;
                tracing::warn!(%kind, %error, "Cannot watch, serving the last known state and retrying");
            }
        }
    }
}

/// The API server does not know, or does not let us see, this kind of object.
fn is_unknown_kind(error: &watcher::Error) -> bool {
    let watcher::Error::InitialListFailed(kube::Error::Api(status)) = error else { return false };
    matches!(status.code, 403 | 404)
}

impl Resource for Service {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Service".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "services".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Resource for EndpointSlice {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "EndpointSlice".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "discovery.k8s.io".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "endpointslices".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Resource for Node {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Node".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "nodes".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Resource for ServiceCidr {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "ServiceCIDR".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "networking.k8s.io".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "servicecidrs".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

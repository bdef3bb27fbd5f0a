//! The channel to containerd: one HTTP/2 connection, made again when it breaks, every call in our namespace.

use std::path::Path;

use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::version_client::VersionClient;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::RuntimeError;

/// containerd itself accepts 16 MiB; tonic's own limit of 4 MiB is too small for a list of many containers.
const MAX_MESSAGE: usize = 16 << 20;

/// Puts every call into a containerd namespace, and what it creates under a lease.
#[derive(Clone)]
pub(crate) struct Scope {
    namespace: AsciiMetadataValue,
    lease: Option<AsciiMetadataValue>,
}

impl Interceptor for Scope {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        Ok(request)
    }
}

type Scoped = InterceptedService<Channel, Scope>;

/// containerd's services, as we use them.
#[derive(Clone)]
pub(crate) struct Connection {
    channel: Channel,
    scope: Scope,
}

macro_rules! service {
    ($name:ident, $client:ident) => {
        pub(crate) fn $name(&self) -> $client<Scoped> {
            $client::with_interceptor(self.channel.clone(), self.scope.clone())
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE)
        }
    };
}

impl Connection {
    /// Connects to containerd's socket.
    pub(crate) async fn open(socket: &Path, namespace: &str) -> Result<Connection, RuntimeError> {
        let channel = containerd_client::connect(socket)
            .await
            .map_err(|source| RuntimeError::Unreachable { socket: socket.to_owned(), source })?;
        let namespace = namespace.parse().map_err(|_| {
            RuntimeError::invalid(format!("containerd namespace {namespace:?} is not plain text"))
        })?;
        Ok(Connection { channel, scope: Scope { namespace, lease: None } })
    }

    /// The same connection; what is created through it belongs to `lease` until that is deleted.
    pub(crate) fn under_lease(&self, lease: &str) -> Connection {
        let scope = Scope { namespace: self.scope.namespace.clone(), lease: lease.parse().ok() };
        Connection { channel: self.channel.clone(), scope }
    }

    service!(containers, ContainersClient);
    service!(content, ContentClient);
    service!(diff, DiffClient);
    service!(events, EventsClient);
    service!(images, ImagesClient);
    service!(introspection, IntrospectionClient);
    service!(leases, LeasesClient);
    service!(namespaces, NamespacesClient);
    service!(snapshots, SnapshotsClient);
    service!(tasks, TasksClient);
    service!(version, VersionClient);
}

//! The table of kinds: everything the server knows about a kind that is not behaviour.

use k8s_openapi::api;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A kind that the server stores.
#[derive(Debug)]
pub struct Kind {
    /// Place in [`all`], and in the store's tables.
    pub id: usize,
    /// API group, empty for the core group.
    pub group: &'static str,
    /// API version within the group.
    pub version: &'static str,
    /// e.g. `Pod`.
    pub kind: &'static str,
    /// e.g. `pods`.
    pub plural: &'static str,
    /// e.g. `pod`.
    pub singular: &'static str,
    /// What kubectl accepts instead, e.g. `po`.
    pub short: &'static [&'static str],
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Whether `status` is a subresource.
    pub has_status: bool,
    /// Whether `metadata.generation` counts changes of `spec`.
    pub has_generation: bool,
    /// Whether `kubectl get all` shows it.
    pub in_all: bool,
    /// Reads an object as its type: the canonical form, and the unknown fields.
    pub(crate) decode: fn(&Value) -> Result<Decoded, DecodeError>,
}

/// An object as its type understands it.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub(crate) value: Value,
    pub(crate) unknown: Vec<String>,
}

impl Kind {
    /// `v1` or `apps/v1`.
    #[must_use]
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `pods` or `deployments.apps`, as error texts name it.
    #[must_use]
    pub fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.plural.to_owned()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

fn decode<T: DeserializeOwned + Serialize>(value: &Value) -> Result<Decoded, DecodeError> {
    let mut unknown = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| {
        unknown.push(crate::decode::path_text(&path.to_string()));
    };
    let typed: T =
        serde_path_to_error::deserialize(serde_ignored::Deserializer::new(value, &mut note))?;
    let value = serde_json::to_value(&typed)
        .map_err(|e| DecodeError::new(serde_path_to_error::Track::new().path(), e))?;
    Ok(Decoded { value, unknown })
}

/// The field that cannot be read, and why.
pub(crate) type DecodeError = serde_path_to_error::Error<serde_json::Error>;

/// Whether the kind has a status subresource and a generation, in the table below.
struct Traits {
    namespaced: bool,
    has_status: bool,
    has_generation: bool,
    in_all: bool,
}

const PLAIN: Traits =
    Traits { namespaced: true, has_status: false, has_generation: false, in_all: false };
const GLOBAL: Traits = Traits { namespaced: false, ..PLAIN };
const WITH_STATUS: Traits = Traits { has_status: true, ..PLAIN };
const WORKLOAD: Traits = Traits { has_generation: true, in_all: true, ..WITH_STATUS };

macro_rules! kinds {
    ($($constant:ident: $type:ty, $plural:literal, $singular:literal, $short:expr, $traits:expr;)*) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms, reason = "only counts")]
        enum Index { $($constant,)* }
        $(
            #[doc = concat!("`", $plural, "`")]
            pub static $constant: Kind = Kind {
                id: Index::$constant as usize,
                group: <$type as k8s_openapi::Resource>::GROUP,
                version: <$type as k8s_openapi::Resource>::VERSION,
                kind: <$type as k8s_openapi::Resource>::KIND,
                plural: $plural,
                singular: $singular,
                short: &$short,
                namespaced: $traits.namespaced,
                has_status: $traits.has_status,
                has_generation: $traits.has_generation,
                in_all: $traits.in_all,
                decode: decode::<$type>,
            };
        )*
        static ALL: &[&Kind] = &[$(&$constant,)*];
    };
}

kinds! {
    NAMESPACE: api::core::v1::Namespace, "namespaces", "namespace", ["ns"], Traits { has_status: true, ..GLOBAL };
    NODE: api::core::v1::Node, "nodes", "node", ["no"], Traits { has_status: true, ..GLOBAL };
    POD: api::core::v1::Pod, "pods", "pod", ["po"], Traits { in_all: true, has_generation: true, ..WITH_STATUS };
    SERVICE: api::core::v1::Service, "services", "service", ["svc"], Traits { in_all: true, ..WITH_STATUS };
    ENDPOINTS: api::core::v1::Endpoints, "endpoints", "endpoints", ["ep"], PLAIN;
    ENDPOINT_SLICE: api::discovery::v1::EndpointSlice, "endpointslices", "endpointslice", [], Traits { has_generation: true, ..PLAIN };
    CONFIG_MAP: api::core::v1::ConfigMap, "configmaps", "configmap", ["cm"], PLAIN;
    SECRET: api::core::v1::Secret, "secrets", "secret", [], PLAIN;
    SERVICE_ACCOUNT: api::core::v1::ServiceAccount, "serviceaccounts", "serviceaccount", ["sa"], PLAIN;
    EVENT: api::core::v1::Event, "events", "event", ["ev"], PLAIN;
    EVENT_NEW: api::events::v1::Event, "events", "event", ["ev"], PLAIN;
    LEASE: api::coordination::v1::Lease, "leases", "lease", [], PLAIN;
    DEPLOYMENT: api::apps::v1::Deployment, "deployments", "deployment", ["deploy"], WORKLOAD;
    REPLICA_SET: api::apps::v1::ReplicaSet, "replicasets", "replicaset", ["rs"], WORKLOAD;
    PERSISTENT_VOLUME: api::core::v1::PersistentVolume, "persistentvolumes", "persistentvolume", ["pv"], Traits { has_status: true, ..GLOBAL };
    PERSISTENT_VOLUME_CLAIM: api::core::v1::PersistentVolumeClaim, "persistentvolumeclaims", "persistentvolumeclaim", ["pvc"], WITH_STATUS;
    LIMIT_RANGE: api::core::v1::LimitRange, "limitranges", "limitrange", ["limits"], PLAIN;
    RESOURCE_QUOTA: api::core::v1::ResourceQuota, "resourcequotas", "resourcequota", ["quota"], WITH_STATUS;
    RUNTIME_CLASS: api::node::v1::RuntimeClass, "runtimeclasses", "runtimeclass", [], GLOBAL;
    CSI_NODE: api::storage::v1::CSINode, "csinodes", "csinode", [], GLOBAL;
    CSI_DRIVER: api::storage::v1::CSIDriver, "csidrivers", "csidriver", [], GLOBAL;
    STORAGE_CLASS: api::storage::v1::StorageClass, "storageclasses", "storageclass", ["sc"], GLOBAL;
    PRIORITY_CLASS: api::scheduling::v1::PriorityClass, "priorityclasses", "priorityclass", ["pc"], Traits { has_generation: true, ..GLOBAL };
    SERVICE_CIDR: api::networking::v1::ServiceCIDR, "servicecidrs", "servicecidr", [], Traits { has_status: true, ..GLOBAL };
    IP_ADDRESS: api::networking::v1::IPAddress, "ipaddresses", "ipaddress", ["ip"], GLOBAL;
}

/// Every kind, by [`Kind::id`].
#[must_use]
pub fn all() -> &'static [&'static Kind] {
    ALL
}

/// The kind behind a URL.
#[must_use]
pub fn by_path(group: &str, version: &str, plural: &str) -> Option<&'static Kind> {
    ALL.iter().copied().find(|k| k.group == group && k.version == version && k.plural == plural)
}

/// The kind of a type of `k8s-openapi`.
#[must_use]
pub fn of<T: k8s_openapi::Resource>() -> Option<&'static Kind> {
    ALL.iter()
        .copied()
        .find(|k| k.group == T::GROUP && k.version == T::VERSION && k.kind == T::KIND)
}

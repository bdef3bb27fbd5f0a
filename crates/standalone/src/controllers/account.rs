//! What every namespace has: the ServiceAccount `default` and the ConfigMap `kube-root-ca.crt`.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::cluster::{Change, Cluster, Key};
use super::queue::Outcome;
use super::worker::Controller;
use crate::{Api, ApiError, Registry};

const ROOT_CA: &str = "kube-root-ca.crt";
const WHAT_FOR: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of Kubernetes clusters.";

/// Makes both, and makes them again when they are changed or deleted. Keys are namespaces.
pub(crate) struct Accounts {
    cluster: Arc<Cluster>,
    accounts: Api<ServiceAccount>,
    config_maps: Api<ConfigMap>,
    root_ca: String,
}

impl Accounts {
    pub(crate) fn new(
        registry: &Registry,
        cluster: &Arc<Cluster>,
        root_ca: String,
    ) -> Result<Self, ApiError> {
        let (accounts, config_maps) = (registry.api()?, registry.api()?);
        Ok(Self { cluster: cluster.clone(), accounts, config_maps, root_ca })
    }

    async fn ensure_account(&self, namespace: &str) -> Result<(), ApiError> {
        if self.cluster.accounts.get(&Key::new(namespace, "default")).is_some() {
            return Ok(());
        }
        let account =
            ServiceAccount { metadata: named(namespace, "default"), ..ServiceAccount::default() };
        exists_is_fine(self.accounts.create(&account).await)
    }

    async fn ensure_root_ca(&self, namespace: &str) -> Result<(), ApiError> {
        if self.root_ca.is_empty() {
            return Ok(());
        }
        let wanted = root_ca(namespace, &self.root_ca);
        match self.cluster.root_cas.get(&Key::new(namespace, ROOT_CA)) {
            Some(held) if held.data == wanted.data => Ok(()),
            Some(_) => self.config_maps.update(&wanted).await.map(drop),
            None => exists_is_fine(self.config_maps.create(&wanted).await),
        }
    }
}

/// Whether a ConfigMap is the one that this controller keeps.
pub(crate) fn is_root_ca(object: &crate::Object) -> bool {
    &*object.name == ROOT_CA
}

fn root_ca(namespace: &str, pem: &str) -> ConfigMap {
    let mut metadata = named(namespace, ROOT_CA);
    let about = ("kubernetes.io/description".to_owned(), WHAT_FOR.to_owned());
    metadata.annotations = Some(BTreeMap::from([about]));
    let data = BTreeMap::from([("ca.crt".to_owned(), pem.to_owned())]);
    ConfigMap { metadata, data: Some(data), ..ConfigMap::default() }
}

fn named(namespace: &str, name: &str) -> ObjectMeta {
    ObjectMeta {
        namespace: Some(namespace.to_owned()),
        name: Some(name.to_owned()),
        ..ObjectMeta::default()
    }
}

fn exists_is_fine<T>(result: Result<T, ApiError>) -> Result<(), ApiError> {
    match result {
        Err(error) if !error.is_already_exists() => Err(error),
        _ => Ok(()),
    }
}

impl Controller for Accounts {
    const NAME: &'static str = "account";
    type Key = Key;

    fn affected(&self, change: &Change, add: &mut dyn FnMut(Key)) {
        match change {
            Change::Namespace(delta) if delta.old.is_none() => {
                if let Some(namespace) = &delta.new {
                    add(Key::of(&namespace.metadata));
                }
            }
            Change::ServiceAccount(delta) if delta.new.is_none() => {
                if let Some(account) = delta.latest() {
                    add(Key::new("", account.metadata.namespace.as_deref().unwrap_or_default()));
                }
            }
            Change::RootCa(delta) if delta.old.is_some() => {
                if let Some(map) = delta.latest() {
                    add(Key::new("", map.metadata.namespace.as_deref().unwrap_or_default()));
                }
            }
            _ => {}
        }
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, ApiError> {
        let namespace = self.cluster.namespaces.get(key);
        let lives = namespace.is_some_and(|held| held.metadata.deletion_timestamp.is_none());
        if lives {
            self.ensure_account(&key.name).await?;
            self.ensure_root_ca(&key.name).await?;
        }
        Ok(Outcome::Done)
    }
}

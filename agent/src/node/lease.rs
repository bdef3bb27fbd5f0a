//! The node's Lease: the cheap sign of life that the control plane watches.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::PostParams;
use kube::{Api, Client};
use tracing::warn;

use super::reconcile::describe;
use super::{NodeShared, backoff};
use crate::config::AgentConfig;

const NAMESPACE: &str = "kube-node-lease";

/// Renews the Lease every quarter of its duration; a failure is tried again sooner.
pub(super) async fn renew_for_ever(config: &AgentConfig, client: &Client, shared: &NodeShared) {
    let api: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
    let duration = config.node.lease_duration;
    let mut last: Option<Lease> = None;
    let mut failures = 0_u32;
    loop {
        let owner = owner(config, shared);
        match renew(&api, config, duration, owner, last.take()).await {
            Ok(lease) => {
                last = Some(lease);
                failures = 0;
                tokio::time::sleep(duration / 4).await;
            }
            Err(error) => {
                if failures == 5 {
                    warn!(
                        lease = config.node_name,
                        error = describe(&error),
                        "Cannot renew the node's Lease, trying on"
                    );
                }
                tokio::time::sleep(backoff(failures)).await;
                failures = failures.saturating_add(1);
            }
        }
    }
}

/// One renewal: over the Lease that was written last, or whatever is there now.
async fn renew(
    api: &Api<Lease>,
    config: &AgentConfig,
    duration: Duration,
    owner: Option<OwnerReference>,
    last: Option<Lease>,
) -> Result<Lease, kube::Error> {
    let current = match last {
        Some(lease) => Some(lease),
        None => api.get_opt(&config.node_name).await?,
    };
    let params = PostParams::default();
    let lease = renewed(&config.node_name, duration, owner, current.clone(), Timestamp::now());
    match current {
        Some(_) => api.replace(&config.node_name, &params, &lease).await,
        None => api.create(&params, &lease).await,
    }
}

/// The Lease as it shall be, given the one that is there.
fn renewed(
    node: &str,
    duration: Duration,
    owner: Option<OwnerReference>,
    current: Option<Lease>,
    now: Timestamp,
) -> Lease {
    let mut lease = current.unwrap_or_else(|| Lease {
        metadata: ObjectMeta {
            name: Some(node.to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        spec: None,
    });
    // Only the Lease of a Node that is known can be collected with it.
    if let Some(owner) = owner {
        lease.metadata.owner_references = Some(vec![owner]);
    }
    let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
    spec.holder_identity = Some(node.to_owned());
    spec.lease_duration_seconds = i32::try_from(duration.as_secs()).ok();
    spec.renew_time = Some(MicroTime(now));
    lease
}

fn owner(config: &AgentConfig, shared: &NodeShared) -> Option<OwnerReference> {
    let uid = shared.node.borrow().as_ref()?.metadata.uid.clone()?;
    Some(OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: config.node_name.clone(),
        uid,
        ..OwnerReference::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_renewal_changes_only_the_time() {
        let secs = Duration::from_secs(40);
        let first = renewed("n1", secs, None, None, Timestamp::from_second(1).unwrap());
        assert_eq!(first.spec.as_ref().unwrap().lease_duration_seconds, Some(40));
        let mut second =
            renewed("n1", secs, None, Some(first.clone()), Timestamp::from_second(11).unwrap());
        assert_ne!(second, first);
        let time = first.spec.as_ref().unwrap().renew_time.clone();
        second.spec.as_mut().unwrap().renew_time = time;
        assert_eq!(second, first);
    }
}

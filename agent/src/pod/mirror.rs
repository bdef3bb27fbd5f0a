//! Mirror pods: what the API shows of static pods.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node as ApiNode, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, PostParams};

use super::spec;
use super::worker::delete_now;

/// Whether a mirror shows this static pod as it is now.
pub(super) fn matches(mirror: &Pod, static_pod: &Pod) -> bool {
    mirror.metadata.deletion_timestamp.is_none()
        && spec::annotation(mirror, spec::CONFIG_MIRROR)
            == spec::annotation(static_pod, spec::CONFIG_HASH)
}

/// Makes the mirror of a static pod. One that exists already is a success.
pub(super) async fn create(
    client: kube::Client,
    node: &str,
    static_pod: &Pod,
) -> Result<(), kube::Error> {
    let nodes: Api<ApiNode> = Api::all(client.clone());
    let owner = nodes.get_opt(node).await?.and_then(|found| found.metadata.uid);
    let api: Api<Pod> = Api::namespaced(client, spec::namespace(static_pod));
    match api.create(&PostParams::default(), &mirror_of(static_pod, node, owner)).await {
        Err(kube::Error::Api(answer)) if answer.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

/// Removes a mirror at once: nothing runs under its name.
pub(super) async fn delete(client: kube::Client, mirror: &Arc<Pod>) -> Result<(), kube::Error> {
    let uid = mirror.metadata.uid.clone();
    delete_now(client, spec::namespace(mirror), spec::name(mirror), uid).await
}

fn mirror_of(static_pod: &Pod, node: &str, owner: Option<String>) -> Pod {
    let mut mirror = static_pod.clone();
    let hash = spec::annotation(static_pod, spec::CONFIG_HASH).unwrap_or_default().to_owned();
    mirror.metadata.uid = None;
    mirror.metadata.generation = None;
    mirror.metadata.annotations.get_or_insert_default().insert(spec::CONFIG_MIRROR.into(), hash);
    mirror.metadata.owner_references = owner.map(|uid| {
        vec![OwnerReference {
            api_version: "v1".into(),
            kind: "Node".into(),
            name: node.to_owned(),
            uid,
            controller: Some(true),
            block_owner_deletion: None,
        }]
    });
    mirror.status = None;
    mirror
}

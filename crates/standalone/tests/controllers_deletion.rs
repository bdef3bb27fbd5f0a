//! Deletion of namespaces and by owner reference over the real registry.
#![allow(clippy::unwrap_used, reason = "tests")]

mod controllers_world;

use std::collections::BTreeMap;

use controllers_world::World;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ServiceAccount};
use keelson_standalone::{DeleteOptions, PatchType, Propagation};
use serde_json::{Value, json};

fn deployment(namespace: &str) -> Value {
    json!({"metadata": {"name": "web", "namespace": namespace}, "spec": {
        "replicas": 2, "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c", "image": "v1"}]}}}})
}

async fn two_running(world: &World, namespace: &str) {
    world
        .until(namespace, |pods: &BTreeMap<String, Pod>| {
            let phase =
                |pod: &&Pod| pod.status.as_ref().unwrap().phase.as_deref() == Some("Running");
            (pods.values().filter(phase).count() == 2).then_some(())
        })
        .await;
}

async fn delete_web(world: &World, propagation: Propagation) {
    let options = DeleteOptions { propagation: Some(propagation), ..DeleteOptions::default() };
    world.api::<Deployment>().delete("default", "web", &options).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_goes_with_all_that_is_in_it() {
    World::run(|world| async move {
        world.make::<Namespace>(json!({"metadata": {"name": "shop"}})).await;
        world.until("shop", |all: &BTreeMap<String, ConfigMap>| all.get("kube-root-ca.crt").map(drop)).await;
        world.until("shop", |all: &BTreeMap<String, ServiceAccount>| all.get("default").map(drop)).await;
        world.make::<Deployment>(deployment("shop")).await;
        let held = json!({"metadata": {"name": "held", "namespace": "shop", "finalizers": ["example.com/hold"]}});
        world.make::<ConfigMap>(held).await;
        two_running(&world, "shop").await;
        let namespaces = world.api::<Namespace>();
        namespaces.delete("", "shop", &DeleteOptions::default()).await.unwrap();
        let reason = world
            .until("", |all: &BTreeMap<String, Namespace>| {
                let status = all["shop"].status.as_ref()?;
                assert_eq!(status.phase.as_deref(), Some("Terminating"));
                let remaining = |c: &&k8s_openapi::api::core::v1::NamespaceCondition| {
                    c.type_ == "NamespaceFinalizersRemaining" && c.status == "True"
                };
                status.conditions.iter().flatten().find(remaining)?.message.clone()
            })
            .await;
        assert!(reason.contains("example.com/hold in 1 resource instances"), "{reason}");
        let free = json!({"metadata": {"finalizers": null}});
        world.api::<ConfigMap>().patch("shop", "held", PatchType::Merge, &free).await.unwrap();
        world.until("", |all: &BTreeMap<String, Namespace>| (!all.contains_key("shop")).then_some(())).await;
        let (pods, _) = world.api::<Pod>().list("shop").unwrap();
        assert!(pods.is_empty());
        world
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dependents_go_after_their_owner_in_the_background() {
    World::run(|world| async move {
        world.make::<Deployment>(deployment("default")).await;
        two_running(&world, "default").await;
        delete_web(&world, Propagation::Background).await;
        world
            .until("default", |all: &BTreeMap<String, ReplicaSet>| all.is_empty().then_some(()))
            .await;
        world.until("default", |all: &BTreeMap<String, Pod>| all.is_empty().then_some(())).await;
        world
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_foreground_the_owner_goes_last() {
    World::run(|world| async move {
        world.make::<Deployment>(deployment("default")).await;
        two_running(&world, "default").await;
        delete_web(&world, Propagation::Foreground).await;
        world
            .until("default", |all: &BTreeMap<String, Deployment>| all.is_empty().then_some(()))
            .await;
        assert!(world.api::<ReplicaSet>().list("default").unwrap().0.is_empty());
        assert!(world.api::<Pod>().list("default").unwrap().0.is_empty());
        world
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orphans_stay_and_are_taken_by_the_next_owner() {
    World::run(|world| async move {
        world.make::<Deployment>(deployment("default")).await;
        two_running(&world, "default").await;
        delete_web(&world, Propagation::Orphan).await;
        world
            .until("default", |all: &BTreeMap<String, Deployment>| all.is_empty().then_some(()))
            .await;
        let names = |world: &World| -> Vec<String> {
            let (pods, _) = world.api::<Pod>().list("default").unwrap();
            pods.into_iter().map(|pod| pod.metadata.name.unwrap()).collect()
        };
        let (sets, _) = world.api::<ReplicaSet>().list("default").unwrap();
        assert!(sets[0].metadata.owner_references.as_ref().is_none_or(Vec::is_empty));
        let before = names(&world);
        assert_eq!(before.len(), 2);
        let owner = world.make::<Deployment>(deployment("default")).await;
        world
            .until("default", |all: &BTreeMap<String, ReplicaSet>| {
                let owners = all.values().next()?.metadata.owner_references.as_ref()?;
                owners.iter().find(|held| Some(&held.uid) == owner.metadata.uid.as_ref()).map(drop)
            })
            .await;
        world
            .until("default", |all: &BTreeMap<String, Deployment>| {
                let status = all["web"].status.as_ref()?;
                (status.available_replicas == Some(2)).then_some(())
            })
            .await;
        assert_eq!(names(&world), before, "the pods were taken over, not replaced");
        world
    })
    .await;
}

//! Deployments, ReplicaSets, Services and the scheduler over the real registry, with a node that runs no containers.
#![allow(clippy::unwrap_used, reason = "tests")]

mod controllers_world;

use std::collections::BTreeMap;

use controllers_world::{BROKEN, World, node};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Endpoints, Event, Pod};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use keelson_standalone::{Api, EventType, PatchType};
use serde_json::{Value, json};

fn deployment(replicas: i32) -> Value {
    json!({"metadata": {"name": "web", "namespace": "default"}, "spec": {
        "replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c", "image": "v1"}]}}}})
}

fn image(image: &str) -> Value {
    json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": image}]}}}})
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
        && pod.metadata.deletion_timestamp.is_none()
}

fn image_of(pod: &Pod) -> String {
    pod.spec.as_ref().unwrap().containers[0].image.clone().unwrap()
}

/// Waits for what `kubectl rollout status` waits for. Returns the revision.
async fn rolled_out(world: &World) -> String {
    world
        .until("default", |all: &BTreeMap<String, Deployment>| {
            let held = &all["web"];
            let (wanted, status) = (held.spec.as_ref()?.replicas, held.status.as_ref()?);
            let done = status.observed_generation == held.metadata.generation
                && [status.replicas, status.updated_replicas, status.available_replicas]
                    .iter()
                    .all(|count| *count == wanted);
            let revision =
                held.metadata.annotations.as_ref()?.get("deployment.kubernetes.io/revision");
            revision.filter(|_| done).cloned()
        })
        .await
}

/// Follows all pods of the Deployment and remembers the most that were there and the fewest that were available.
async fn follow(
    pods: Api<Pod>,
    replicas: usize,
    done: tokio_util::sync::CancellationToken,
) -> (usize, usize) {
    let (listed, revision) = pods.list("default").unwrap();
    let mut all: BTreeMap<String, Pod> =
        listed.into_iter().map(|pod| (pod.metadata.name.clone().unwrap(), pod)).collect();
    let (mut most, mut fewest) = (0, replicas);
    let mut watch = pods.watch("default", revision).unwrap();
    loop {
        let event = tokio::select! {
            event = watch.next() => event.unwrap(),
            () = done.cancelled() => return (most, fewest),
        };
        let name = event.object.metadata.name.clone().unwrap();
        match event.event {
            EventType::Deleted => drop(all.remove(&name)),
            _ => drop(all.insert(name, event.object)),
        }
        let active = all.values().filter(|pod| pod.metadata.deletion_timestamp.is_none());
        most = most.max(active.count());
        fewest = fewest.min(all.values().filter(|pod| is_ready(pod)).count());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_comes_up_rolls_and_goes_back_within_its_bounds() {
    World::run(|world| async move {
        world.make::<Deployment>(deployment(4)).await;
        assert_eq!(rolled_out(&world).await, "1");
        let done = tokio_util::sync::CancellationToken::new();
        let watching = tokio::spawn(follow(world.api(), 4, done.clone()));
        let api = world.api::<Deployment>();
        for (version, revision) in [("v2", "2"), ("v1", "3")] {
            let patch = image(version);
            api.patch("default", "web", PatchType::Strategic, &patch).await.unwrap();
            assert_eq!(rolled_out(&world).await, revision);
            world
                .until("default", |pods: &BTreeMap<String, Pod>| {
                    (pods.len() == 4 && pods.values().all(|pod| image_of(pod) == version))
                        .then_some(())
                })
                .await;
        }
        done.cancel();
        let (most, fewest) = watching.await.unwrap();
        // 25 % of 4: one more, one fewer.
        assert!(most <= 5, "{most} pods at once");
        assert!(fewest >= 3, "only {fewest} were available");
        let (sets, _) = world.api::<ReplicaSet>().list("default").unwrap();
        assert_eq!(sets.len(), 2, "going back uses the old set");
        world
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forty_pods_are_made_exactly_once() {
    World::run(|world| async move {
        world.make::<Deployment>(deployment(40)).await;
        rolled_out(&world).await;
        let created = |events: &BTreeMap<String, Event>| {
            let made =
                events.values().filter(|event| event.reason.as_deref() == Some("SuccessfulCreate"));
            let made = made.count();
            (made >= 40).then_some(made)
        };
        assert_eq!(world.until("default", created).await, 40);
        let (pods, _) = world.api::<Pod>().list("default").unwrap();
        assert_eq!(pods.len(), 40);
        world
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_update_leaves_the_old_pods_serving_and_scaling_works_meanwhile() {
    World::run(|world| async move {
        world.make::<Deployment>(deployment(4)).await;
        rolled_out(&world).await;
        let api = world.api::<Deployment>();
        api.patch("default", "web", PatchType::Strategic, &image(BROKEN)).await.unwrap();
        let counts = |pods: &BTreeMap<String, Pod>| {
            let ready = pods.values().filter(|pod| is_ready(pod)).count();
            (ready, pods.len() - ready)
        };
        // One old pod may go, and two new ones come in its place and as surge.
        world.until("default", |pods| (counts(pods) == (3, 2)).then_some(())).await;
        api.patch("default", "web", PatchType::Strategic, &image("v1")).await.unwrap();
        rolled_out(&world).await;
        api.patch("default", "web", PatchType::Merge, &json!({"spec": {"replicas": 1}}))
            .await
            .unwrap();
        rolled_out(&world).await;
        world.until("default", |pods| (counts(pods) == (1, 0)).then_some(())).await;
        world
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_waits_with_a_reason_and_starts_when_there_is_room() {
    World::run(|world| async move {
        let big = json!({"metadata": {"name": "big", "namespace": "default"}, "spec": {"containers": [
            {"name": "c", "image": "v1", "resources": {"requests": {"cpu": "6"}}}]}});
        world.make::<Pod>(big).await;
        let reason = world
            .until("default", |pods: &BTreeMap<String, Pod>| {
                let conditions = pods["big"].status.as_ref()?.conditions.as_ref()?;
                let found = conditions.iter().find(|c| c.type_ == "PodScheduled")?;
                (found.status == "False").then(|| found.message.clone().unwrap())
            })
            .await;
        assert_eq!(reason, "0/1 nodes are available: 1 Insufficient cpu.");
        world
            .until("default", |events: &BTreeMap<String, Event>| {
                let told = |event: &&Event| event.reason.as_deref() == Some("FailedScheduling");
                events.values().find(told).map(drop)
            })
            .await;
        world.api().create(&node("n2", "8")).await.unwrap();
        let placed = world
            .until("default", |pods: &BTreeMap<String, Pod>| pods["big"].spec.as_ref()?.node_name.clone())
            .await;
        assert_eq!(placed, "n2");
        world
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_follow_the_pods_of_a_service() {
    World::run(|world| async move {
        let service = json!({"metadata": {"name": "web", "namespace": "default"}, "spec": {
            "selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}});
        world.make::<k8s_openapi::api::core::v1::Service>(service).await;
        world.make::<Deployment>(deployment(3)).await;
        let ready = |slices: &BTreeMap<String, EndpointSlice>| -> usize {
            let ours = slices.values().filter(|slice| {
                let labels = slice.metadata.labels.as_ref();
                labels
                    .and_then(|all| all.get("kubernetes.io/service-name"))
                    .is_some_and(|name| name == "web")
            });
            let endpoints = ours.flat_map(|slice| slice.endpoints.iter().flatten());
            endpoints.filter(|e| e.conditions.as_ref().and_then(|c| c.ready) == Some(true)).count()
        };
        world.until("default", |slices| (ready(slices) == 3).then_some(())).await;
        let legacy = |wanted: usize| {
            move |all: &BTreeMap<String, Endpoints>| {
                let subsets = all.get("web")?.subsets.as_ref();
                let count = subsets
                    .into_iter()
                    .flatten()
                    .flat_map(|s| s.addresses.iter().flatten())
                    .count();
                (count == wanted).then_some(())
            }
        };
        world.until("default", legacy(3)).await;
        let scale = json!({"spec": {"replicas": 1}});
        world.api::<Deployment>().patch("default", "web", PatchType::Merge, &scale).await.unwrap();
        world.until("default", |slices| (ready(slices) == 1).then_some(())).await;
        world.until("default", legacy(1)).await;
        let services = world.api::<k8s_openapi::api::core::v1::Service>();
        services
            .delete("default", "web", &keelson_standalone::DeleteOptions::default())
            .await
            .unwrap();
        world
            .until("default", |all: &BTreeMap<String, Endpoints>| {
                (!all.contains_key("web")).then_some(())
            })
            .await;
        world.until("default", |slices| (ready(slices) == 0).then_some(())).await;
        world
    })
    .await;
}

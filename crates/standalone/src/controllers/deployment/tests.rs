//! The Deployment and ReplicaSet plans together over a small model of the API and of a node.

use std::collections::BTreeMap;

use super::revision::{HASH_LABEL, revision, template_hash};
use super::*;
use crate::controllers::replicaset;
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::SignedDuration;
use proptest::prelude::*;

/// The API, the node and the clock, as far as these two controllers see them.
struct World {
    deployment: Deployment,
    sets: BTreeMap<String, ReplicaSet>,
    pods: BTreeMap<String, Pod>,
    now: Timestamp,
    next: u32,
    events: Vec<String>,
}

impl World {
    fn new(spec: serde_json::Value) -> Self {
        let mut deployment: Deployment = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "n", "uid": "d", "generation": 1},
            "spec": {"replicas": 3, "progressDeadlineSeconds": 600, "revisionHistoryLimit": 10,
                "selector": {"matchLabels": {"app": "web"}},
                "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "v1"}]}}}}))
        .unwrap();
        let mut value = serde_json::to_value(&deployment).unwrap();
        json_patch::merge(&mut value["spec"], &spec);
        deployment = serde_json::from_value(value).unwrap();
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        Self {
            deployment,
            sets: BTreeMap::new(),
            pods: BTreeMap::new(),
            now,
            next: 0,
            events: vec![],
        }
    }

    fn change(&mut self, spec: serde_json::Value) {
        let mut value = serde_json::to_value(&self.deployment).unwrap();
        json_patch::merge(&mut value["spec"], &spec);
        self.deployment = serde_json::from_value(value).unwrap();
        self.deployment.metadata.generation = self.deployment.metadata.generation.map(|g| g + 1);
    }

    fn image(&mut self, image: &str) {
        self.change(json!({"template": {"spec": {"containers": [{"name": "c", "image": image}]}}}));
    }

    fn sets(&self) -> Vec<Arc<ReplicaSet>> {
        self.sets.values().cloned().map(Arc::new).collect()
    }

    fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.values().cloned().map(Arc::new).collect()
    }

    fn plan(&self) -> super::plan::Plan {
        plan(&self.deployment, &Observed { sets: &self.sets(), pods: &self.pods() }, self.now)
    }

    /// One step of the Deployment controller. Returns whether it did anything.
    fn step_deployment(&mut self) -> bool {
        self.now += SignedDuration::from_secs(1);
        let actions = self.plan().actions;
        let busy = !actions.is_empty();
        for action in actions {
            match action {
                Action::Create(mut set) => {
                    let name = set.metadata.name.clone().unwrap();
                    assert!(!self.sets.contains_key(&name), "{name} exists");
                    set.metadata.uid = Some(format!("uid-{name}"));
                    set.metadata.creation_timestamp = Some(Time(self.now));
                    set.metadata.generation = Some(1);
                    self.sets.insert(name, *set);
                }
                Action::Update(mut set) => {
                    let name = set.metadata.name.clone().unwrap();
                    set.metadata.generation = set.metadata.generation.map(|g| g + 1);
                    self.sets.insert(name, *set);
                }
                Action::Delete(set) => {
                    self.sets.remove(set.metadata.name.as_ref().unwrap());
                }
                Action::Revision(number) => {
                    let annotations = self.deployment.metadata.annotations.get_or_insert_default();
                    annotations.insert(super::revision::REVISION.into(), number.to_string());
                }
                Action::Status(status) => self.deployment.status = Some(*status),
                Action::Scaled(text) => self.events.push(text),
                Action::Adopt(_) | Action::Release(_) => panic!("nothing to adopt here"),
            }
        }
        busy
    }

    /// One step of the ReplicaSet controller for one set.
    fn step_set(&mut self, name: &str) -> bool {
        let Some(set) = self.sets.get(name).cloned() else { return false };
        let plan = replicaset::plan(&set, &self.pods(), self.now);
        for _ in 0..plan.create {
            self.next += 1;
            let mut pod = replicaset::pod_from_template(&set);
            let pod_name = format!("{name}-{}", self.next);
            pod.metadata.name = Some(pod_name.clone());
            pod.metadata.uid = Some(pod_name.clone());
            pod.metadata.creation_timestamp = Some(Time(self.now));
            self.pods.insert(pod_name, pod);
        }
        for pod in &plan.delete {
            self.pods.remove(pod.metadata.name.as_ref().unwrap());
        }
        if !plan.delete.is_empty() {
            return true;
        }
        let (status, _) = replicaset::status(&set, &plan.claimed, None, self.now);
        let changed = set.status.as_ref() != Some(&status);
        self.sets.get_mut(name).unwrap().status = Some(status);
        changed || plan.create > 0
    }

    fn set_ready(&mut self, name: &str, ready: bool) {
        let condition = PodCondition {
            type_: "Ready".into(),
            status: if ready { "True" } else { "False" }.into(),
            last_transition_time: Some(Time(self.now)),
            ..PodCondition::default()
        };
        let status = self.pods.get_mut(name).unwrap().status.get_or_insert_default();
        status.phase = Some("Running".into());
        status.conditions = Some(vec![condition]);
    }

    fn step_all_sets(&mut self) -> bool {
        let names: Vec<String> = self.sets.keys().cloned().collect();
        let mut busy = false;
        for name in &names {
            busy |= self.step_set(name);
        }
        busy
    }

    /// Lets everything run until nothing changes; the node makes every pod ready at once.
    fn settle(&mut self) {
        for _ in 0..200 {
            let unready: Vec<String> = self
                .pods
                .iter()
                .filter(|(_, pod)| !crate::controllers::pods::is_ready(pod))
                .map(|(name, _)| name.clone())
                .collect();
            let mut busy = !unready.is_empty();
            for name in unready {
                self.set_ready(&name, true);
            }
            busy |= self.step_all_sets();
            busy |= self.step_deployment();
            if !busy {
                return;
            }
        }
        panic!("does not settle: {:?}", self.plan().actions);
    }

    fn images(&self) -> BTreeMap<String, usize> {
        let mut images = BTreeMap::new();
        for pod in self.pods.values() {
            let image = pod.spec.as_ref().unwrap().containers[0].image.clone().unwrap();
            *images.entry(image).or_default() += 1;
        }
        images
    }

    fn available(&self) -> usize {
        self.pods.values().filter(|pod| crate::controllers::pods::is_ready(pod)).count()
    }

    fn condition(&self, kind: &str) -> (String, String) {
        let conditions = self.deployment.status.as_ref().unwrap().conditions.as_ref().unwrap();
        let found = conditions.iter().find(|condition| condition.type_ == kind).unwrap();
        (found.status.clone(), found.reason.clone().unwrap())
    }
}

#[test]
fn a_new_deployment_comes_up_and_is_complete() {
    let mut world = World::new(json!({}));
    world.settle();
    assert_eq!(world.images(), BTreeMap::from([("v1".into(), 3)]));
    let status = world.deployment.status.clone().unwrap();
    assert_eq!(
        (
            status.replicas,
            status.updated_replicas,
            status.available_replicas,
            status.unavailable_replicas
        ),
        (Some(3), Some(3), Some(3), None)
    );
    assert_eq!(world.condition("Available"), ("True".into(), "MinimumReplicasAvailable".into()));
    assert_eq!(world.condition("Progressing"), ("True".into(), "NewReplicaSetAvailable".into()));
    assert_eq!(revision(&world.deployment.metadata), 1);
    let name = world.sets.keys().next().unwrap();
    assert_eq!(world.events, [format!("Scaled up replica set {name} from 0 to 3")]);
    let set = &world.sets[name];
    let hash = &set.metadata.labels.as_ref().unwrap()[HASH_LABEL];
    assert_eq!(name, &format!("web-{hash}"));
    assert_eq!(
        set.spec.as_ref().unwrap().selector.match_labels.as_ref().unwrap()[HASH_LABEL],
        *hash
    );
}

#[test]
fn update_and_undo_number_the_revisions_as_kubectl_expects() {
    let mut world = World::new(json!({}));
    world.settle();
    world.image("v2");
    world.settle();
    assert_eq!(world.images(), BTreeMap::from([("v2".into(), 3)]));
    assert_eq!(revision(&world.deployment.metadata), 2);
    // `rollout undo` writes the old template: its set becomes the newest revision.
    world.image("v1");
    world.settle();
    assert_eq!(world.images(), BTreeMap::from([("v1".into(), 3)]));
    assert_eq!(revision(&world.deployment.metadata), 3);
    let mut revisions: Vec<i64> = world.sets.values().map(|set| revision(&set.metadata)).collect();
    revisions.sort_unstable();
    assert_eq!(revisions, [2, 3]);
    let first = world.sets.values().find(|set| revision(&set.metadata) == 3).unwrap();
    assert_eq!(
        first.metadata.annotations.as_ref().unwrap()["deployment.kubernetes.io/revision-history"],
        "1"
    );
}

#[test]
fn recreate_waits_until_the_old_pods_are_gone() {
    let mut world = World::new(json!({"strategy": {"type": "Recreate"}}));
    world.settle();
    world.image("v2");
    while world.step_deployment() {}
    assert_eq!(world.sets.len(), 1, "no new set while old pods run");
    assert_eq!(world.images(), BTreeMap::from([("v1".into(), 3)]));
    world.settle();
    assert_eq!(world.images(), BTreeMap::from([("v2".into(), 3)]));
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll() {
    let mut world = World::new(json!({}));
    world.settle();
    world.change(json!({"paused": true, "replicas": 5}));
    world.image("v2");
    world.settle();
    assert_eq!(world.images(), BTreeMap::from([("v1".into(), 5)]));
    assert_eq!(world.condition("Progressing"), ("Unknown".into(), "DeploymentPaused".into()));
    world.change(json!({"paused": null}));
    world.settle();
    assert_eq!(world.images(), BTreeMap::from([("v2".into(), 5)]));
    assert_eq!(world.condition("Progressing").1, "NewReplicaSetAvailable");
}

#[test]
fn history_is_kept_to_its_limit() {
    let mut world = World::new(json!({"revisionHistoryLimit": 2}));
    for version in 1..=5 {
        world.image(&format!("v{version}"));
        world.settle();
    }
    let mut revisions: Vec<i64> = world.sets.values().map(|set| revision(&set.metadata)).collect();
    revisions.sort_unstable();
    assert_eq!(revisions, [3, 4, 5]);
}

#[test]
fn a_rollout_without_progress_times_out_and_recovers() {
    let mut world = World::new(json!({"progressDeadlineSeconds": 60}));
    world.settle();
    world.image("broken");
    for _ in 0..5 {
        world.step_deployment();
        world.step_all_sets();
    }
    assert_eq!(world.condition("Progressing").0, "True");
    let again = world.plan().again.unwrap();
    assert!(again.as_secs() > 30 && again.as_secs() <= 60, "{again:?}");
    world.now += SignedDuration::from_secs(61);
    world.step_deployment();
    assert_eq!(world.condition("Progressing"), ("False".into(), "ProgressDeadlineExceeded".into()));
    assert_eq!(world.available(), 3, "the old pods keep serving");
    world.settle();
    assert_eq!(world.condition("Progressing"), ("True".into(), "NewReplicaSetAvailable".into()));
}

#[test]
fn the_hash_does_not_see_itself_and_moves_with_collisions() {
    let world = World::new(json!({}));
    let mut template = world.deployment.spec.clone().unwrap().template;
    let plain = template_hash(&template, None);
    template
        .metadata
        .get_or_insert_default()
        .labels
        .get_or_insert_default()
        .insert(HASH_LABEL.into(), "x".into());
    assert_eq!(template_hash(&template, None), plain);
    assert_ne!(template_hash(&template, Some(1)), plain);
}

#[test]
fn an_undo_that_leaves_zero_values_away_finds_its_old_set() {
    let with = |container: serde_json::Value, spec: serde_json::Value| {
        let mut template =
            json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [container]}});
        json_patch::merge(&mut template["spec"], &spec);
        json!({"template": template})
    };
    let spelled_out = json!({"name": "c", "image": "v1", "stdin": false, "tty": false, "env": [], "resources": {},
        "ports": [{"containerPort": 80, "hostPort": 0}]});
    let mut world =
        World::new(with(spelled_out, json!({"hostNetwork": false, "nodeSelector": {}})));
    world.settle();
    world.image("v2");
    world.settle();
    let short =
        json!({"name": "c", "image": "v1", "resources": {}, "ports": [{"containerPort": 80}]});
    world.change(with(short, json!({"hostNetwork": null, "nodeSelector": null})));
    world.settle();
    assert_eq!(world.sets.len(), 2);
    // What is a pointer upstream is another template when it is set.
    let strict = json!({"name": "c", "image": "v1", "securityContext": {"privileged": false}});
    world.change(with(strict, json!({})));
    world.settle();
    assert_eq!(world.sets.len(), 3);
}

/// What may happen between two steps of the controllers.
#[derive(Debug, Clone)]
enum Happens {
    Ready(usize),
    Unready(usize),
    PodLost(usize),
    StepSet(usize),
    StepDeployment,
    Image(u8),
    Scale(i32),
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        4 => any::<usize>().prop_map(Happens::Ready),
        1 => any::<usize>().prop_map(Happens::Unready),
        1 => any::<usize>().prop_map(Happens::PodLost),
        6 => any::<usize>().prop_map(Happens::StepSet),
        6 => Just(Happens::StepDeployment),
        1 => (0_u8..3).prop_map(Happens::Image),
    ]
}

impl World {
    fn nth_pod(&self, n: usize) -> Option<String> {
        self.pods.keys().nth(n % self.pods.len().max(1)).cloned()
    }

    fn happen(&mut self, what: &Happens) {
        match what {
            Happens::Ready(n) => {
                if let Some(name) = self.nth_pod(*n) {
                    self.set_ready(&name, true)
                }
            }
            Happens::Unready(n) => {
                if let Some(name) = self.nth_pod(*n) {
                    self.set_ready(&name, false)
                }
            }
            Happens::PodLost(n) => {
                if let Some(name) = self.nth_pod(*n) {
                    self.pods.remove(&name);
                }
            }
            Happens::StepSet(n) => {
                if let Some(name) = self.sets.keys().nth(n % self.sets.len().max(1)).cloned() {
                    self.step_set(&name);
                }
            }
            Happens::StepDeployment => {
                self.step_deployment();
            }
            Happens::Image(version) => self.image(&format!("v{version}")),
            Happens::Scale(replicas) => self.change(json!({"replicas": replicas})),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever happens and in whatever order the controllers get to run: never more pods than replicas + maxSurge,
    /// a controller never takes an available pod away when that leaves too few, and all ends as wished.
    #[test]
    fn rollouts_keep_their_bounds_and_converge(
        steps in proptest::collection::vec(happens(), 1..150),
        replicas in 1_i32..6, surge in 0_i32..3, unavailable in 0_i32..3,
    ) {
        let mut world = World::new(json!({"replicas": replicas, "strategy": {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}}));
        let unavailable = if surge + unavailable == 0 { 1 } else { unavailable.min(replicas) };
        world.settle();
        for (number, step) in steps.iter().enumerate() {
            let before = world.available();
            world.happen(step);
            prop_assert!(world.pods.len() <= (replicas + surge) as usize, "{} pods after {:?}", world.pods.len(), step);
            let ours = matches!(step, Happens::StepDeployment | Happens::StepSet(_));
            let after = world.available();
            if ours && after < before {
                prop_assert!(after as i32 >= replicas - unavailable - lost(&steps[..number]), "{after} available after {step:?}");
            }
        }
        world.settle();
        prop_assert_eq!(world.pods.len(), replicas as usize);
        prop_assert_eq!(world.images().len(), 1);
        let wanted = world.deployment.spec.clone().unwrap().template.spec.unwrap().containers[0].image.clone().unwrap();
        prop_assert!(world.images().contains_key(&wanted));
    }

    /// As long as no pod fails by itself, there are never fewer available pods than allowed, however late the
    /// controllers see what the other did.
    #[test]
    fn rollouts_of_healthy_pods_never_undercut_the_floor(
        steps in proptest::collection::vec(prop_oneof![
            4 => any::<usize>().prop_map(Happens::Ready),
            3 => any::<usize>().prop_map(Happens::StepSet),
            6 => Just(Happens::StepDeployment),
            1 => (0_u8..3).prop_map(Happens::Image),
        ], 1..150),
        replicas in 1_i32..6, surge in 0_i32..3, unavailable in 0_i32..3,
    ) {
        let mut world = World::new(json!({"replicas": replicas, "strategy": {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}}));
        let unavailable = if surge + unavailable == 0 { 1 } else { unavailable.min(replicas) };
        world.settle();
        for step in &steps {
            world.happen(step);
            prop_assert!(world.available() as i32 >= replicas - unavailable, "{} available after {step:?}", world.available());
        }
    }

    /// Scaling at any moment ends in the new size too.
    #[test]
    fn scaling_in_the_midst_of_a_rollout_converges(
        steps in proptest::collection::vec(prop_oneof![8 => happens(), 1 => (0_i32..8).prop_map(Happens::Scale)], 1..100),
    ) {
        let mut world = World::new(json!({}));
        for step in &steps {
            world.happen(step);
        }
        world.settle();
        let replicas = world.deployment.spec.as_ref().unwrap().replicas.unwrap();
        prop_assert_eq!(world.pods.len(), replicas as usize);
        prop_assert!(world.images().len() <= 1);
    }
}

/// Pods that fail or vanish by themselves may undercut the floor before a controller's status shows it: at most as many
/// as did so.
fn lost(steps: &[Happens]) -> i32 {
    let gone = |step: &&Happens| matches!(step, Happens::Unready(_) | Happens::PodLost(_));
    i32::try_from(steps.iter().filter(gone).count()).unwrap()
}

//! The worker's volumes: objects subscribed to, tokens requested, files written and kept up to date.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount, ServiceAccountTokenProjection};
use kube::api::{Api, PostParams};

use super::{Desired, Worker, retry_at};
use crate::env::{self, FieldContext, Objects};
use crate::events::Severity;
use crate::pod::image;
use crate::pod::objects::{ObjectKey, ObjectKind};
use crate::pod::spec;
use crate::runtime::types::ContainerState;
use crate::volume::{ContentContext, Mounted, PodVolumes, Tokens, content};

/// kubelet refreshes at 80 % of a token's life, or after 24 h.
const MAX_TOKEN_AGE: SignedDuration = SignedDuration::from_hours(24);

#[derive(Debug, Default)]
pub(super) struct VolumeState {
    /// `None`: not mounted yet by this agent.
    pub mounted: Option<Mounted>,
    pub objects: Objects,
    subscribed: bool,
    tokens: Tokens,
    /// When the content must be made anew although no object has changed.
    pub refresh_at: Option<Timestamp>,
    /// An object has changed since the content was made.
    pub dirty: bool,
    pub failures: u32,
    /// What the pod was told of itself: changes when its labels or annotations do.
    told: u64,
}

impl Worker {
    pub(super) fn pod_volumes(&self, pod: &Pod) -> PodVolumes {
        PodVolumes::new(&self.node.config.root_dir, spec::uid(pod))
    }

    /// Subscribes to everything that the pod refers to.
    pub(super) fn subscribe(&mut self, pod: &Pod) {
        if self.volumes.subscribed {
            return;
        }
        let keys = object_keys(pod);
        self.node.objects.subscribe(spec::uid(pod), &keys, &self.bell);
        self.volumes.subscribed = true;
    }

    /// Makes all volumes. The error is the event's message.
    pub(super) async fn mount(&mut self, desired: &Desired) -> Result<(), String> {
        let pod = &desired.pod;
        self.subscribe(pod);
        self.fetch_objects(pod).await?;
        self.request_tokens(pod).await?;
        let volumes = self.pod_volumes(pod);
        let (pod, objects) = (pod.clone(), self.volumes.objects.clone());
        let (tokens, node) = (self.volumes.tokens.clone(), self.node.clone());
        // Blocking: a big fsGroup volume takes its time.
        let made = tokio::task::spawn_blocking(move || {
            let fields = FieldContext {
                pod_ips: &[],
                host_ips: &node.config.node_ips,
                node_name: &node.config.node_name,
                allocatable: &node.config.allocatable,
            };
            let context = ContentContext { objects: &objects, fields: &fields, tokens: &tokens };
            volumes.ensure(&pod, &context)
        });
        let mounted = made.await.map_err(|e| e.to_string())?.map_err(|e| image::chain(&e))?;
        self.volumes.mounted = Some(mounted);
        self.volumes.dirty = false;
        self.volumes.failures = 0;
        self.volumes.told = told(&desired.pod);
        Ok(())
    }

    /// Brings the content up to date when an object, the pod's labels or annotations, or a token's age asks for it.
    pub(super) async fn refresh_volumes(&mut self, desired: &Desired) {
        let now = Timestamp::now();
        let token_due = self.volumes.refresh_at.is_some_and(|at| at <= now);
        let has_volumes = spec::spec(&desired.pod).is_some_and(|s| s.volumes.is_some());
        let pod_changed = self.volumes.told != told(&desired.pod);
        // Before that the volumes are made when the containers are started.
        let adopted = self.volumes.mounted.is_none() && self.runs();
        if !has_volumes || !(adopted || self.volumes.dirty || token_due || pod_changed) {
            return;
        }
        if token_due {
            self.volumes.tokens.clear();
            self.volumes.refresh_at = None;
        }
        if let Err(message) = self.mount(desired).await {
            self.volumes.failures += 1;
            self.volumes.refresh_at = Some(retry_at(now, self.volumes.failures));
            self.node.events.pod(&desired.pod, Severity::Warning, "FailedMount", message);
        }
    }

    fn runs(&self) -> bool {
        let mut containers = self.observed.iter().flat_map(|o| &o.containers);
        containers.any(|c| matches!(c.state, ContainerState::Running { .. }))
    }

    async fn fetch_objects(&mut self, pod: &Pod) -> Result<(), String> {
        let secrets_for_pull = image::secret_keys(pod);
        for key in object_keys(pod) {
            if secrets_for_pull.contains(&key) {
                continue;
            }
            let found = self.node.objects.get(&key).await.map_err(|e| e.to_string())?;
            match key.kind {
                ObjectKind::ConfigMap => self.volumes.objects.config_maps.insert(key.name, found),
                ObjectKind::Secret => self.volumes.objects.secrets.insert(key.name, found),
            };
        }
        Ok(())
    }

    async fn request_tokens(&mut self, pod: &Pod) -> Result<(), String> {
        for (volume, wanted) in token_projections(pod) {
            let key = (volume, wanted.path.clone());
            if self.volumes.tokens.contains_key(&key) {
                continue;
            }
            let (token, expires) = self.request_token(pod, wanted).await?;
            self.volumes.tokens.insert(key, token);
            let refresh = refresh_time(Timestamp::now(), expires);
            let sooner = self.volumes.refresh_at.map_or(refresh, |at| at.min(refresh));
            self.volumes.refresh_at = Some(sooner);
        }
        Ok(())
    }

    async fn request_token(
        &self,
        pod: &Pod,
        wanted: &ServiceAccountTokenProjection,
    ) -> Result<(String, Timestamp), String> {
        let account =
            spec::spec(pod).and_then(|s| s.service_account_name.as_deref()).unwrap_or("default");
        let client =
            self.node.client.clone().ok_or("a service account token needs an API server")?;
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: wanted.audience.clone().map(|audience| vec![audience]),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: pod.metadata.name.clone(),
                    uid: pod.metadata.uid.clone(),
                }),
                expiration_seconds: Some(wanted.expiration_seconds.unwrap_or(3600)),
            }),
            ..TokenRequest::default()
        };
        let api: Api<ServiceAccount> = Api::namespaced(client, spec::namespace(pod));
        let answer = api
            .create_token_request(account, &PostParams::default(), &request)
            .await
            .map_err(|e| format!("cannot get a token of service account {account}: {e}"))?;
        let status = answer.status.ok_or("the API server answered without a token")?;
        let token = status.token.ok_or("the API server answered without a token")?;
        let in_an_hour = || {
            Timestamp::now().checked_add(SignedDuration::from_hours(1)).unwrap_or(Timestamp::MAX)
        };
        Ok((token, status.expiration_timestamp.map_or_else(in_an_hour, |at| at.0)))
    }

    /// Objects that a container's environment refers to; those of volumes are the same list.
    pub(super) async fn objects_for_env(&mut self, pod: &Arc<Pod>) -> Result<(), String> {
        self.subscribe(pod);
        self.fetch_objects(pod).await
    }
}

fn told(pod: &Pod) -> u64 {
    let meta = &pod.metadata;
    let text = |map: &Option<_>| serde_json::to_vec(map).unwrap_or_default();
    spec::fnv1a(&[&text(&meta.labels), b"\0", &text(&meta.annotations)])
}

fn refresh_time(now: Timestamp, expires: Timestamp) -> Timestamp {
    let life = expires.duration_since(now);
    let wait = (life * 4 / 5).min(MAX_TOKEN_AGE).max(SignedDuration::from_secs(10));
    now.checked_add(wait).unwrap_or(expires)
}

fn token_projections(pod: &Pod) -> Vec<(String, &ServiceAccountTokenProjection)> {
    let volumes = spec::spec(pod).and_then(|s| s.volumes.as_deref()).unwrap_or_default();
    let mut found = Vec::new();
    for volume in volumes {
        let sources = volume.projected.iter().flat_map(|p| p.sources.iter().flatten());
        let tokens = sources.filter_map(|s| s.service_account_token.as_ref());
        found.extend(tokens.map(|token| (volume.name.clone(), token)));
    }
    found
}

/// Everything that the pod refers to by name: volumes, environment, pull secrets.
fn object_keys(pod: &Pod) -> BTreeSet<ObjectKey> {
    let key =
        |kind, name: String| ObjectKey { kind, namespace: spec::namespace(pod).to_owned(), name };
    let (mut config_maps, mut secrets) = content::references(pod);
    for container in spec::main_containers(pod).iter().chain(spec::init_containers(pod)) {
        let (more_config_maps, more_secrets) = env::references(container);
        config_maps.extend(more_config_maps);
        secrets.extend(more_secrets);
    }
    let mut keys: BTreeSet<ObjectKey> = image::secret_keys(pod).into_iter().collect();
    keys.extend(config_maps.into_iter().map(|name| key(ObjectKind::ConfigMap, name)));
    keys.extend(secrets.into_iter().map(|name| key(ObjectKind::Secret, name)));
    keys
}

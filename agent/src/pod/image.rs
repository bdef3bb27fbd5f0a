//! Images for containers: pull policy, credentials, back-off.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use base64::Engine as _;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod};
use serde::Deserialize;

use super::objects::{ObjectKey, ObjectKind};
use super::plan::Waiting;
use super::shared::Node;
use super::spec;
use crate::env::Keys;
use crate::events::Severity;
use crate::image::Reference;
use crate::runtime::types::ImageRef;

const INITIAL: Duration = Duration::from_secs(10);
const MAX: Duration = Duration::from_secs(300);
/// Bytes of an error.
const LONGEST_TEXT: usize = 1024;

/// When a container's image may be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

/// Why there is no image, and when to look again.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ImageFailure {
    pub waiting: Waiting,
    pub retry_at: Timestamp,
}

/// The waits between failed pulls of one pod: 10 s, doubled up to 300 s per image.
#[derive(Debug, Default)]
pub(super) struct PullBackoff {
    failed: HashMap<String, (Duration, Timestamp, String)>,
}

impl PullBackoff {
    fn blocked(&self, image: &str, now: Timestamp) -> Option<(Timestamp, &str)> {
        let (_, until, error) = self.failed.get(image)?;
        (*until > now).then_some((*until, error.as_str()))
    }

    fn note_failure(&mut self, image: &str, now: Timestamp, error: &str) {
        let delay = self.failed.get(image).map_or(INITIAL, |(delay, ..)| (*delay * 2).min(MAX));
        let until = later(now, delay);
        self.failed.insert(image.to_owned(), (delay, until, error.to_owned()));
    }

    /// The secrets have changed: what failed may work now.
    pub(super) fn clear(&mut self) {
        self.failed.clear();
    }
}

fn later(now: Timestamp, delay: Duration) -> Timestamp {
    let delay = SignedDuration::try_from(delay).unwrap_or(SignedDuration::MAX);
    now.checked_add(delay).unwrap_or(Timestamp::MAX)
}

/// Returns the image that a container shall run, fetching it when the policy says so.
pub(super) async fn ensure(
    node: &Node,
    pod: &Pod,
    container: &Container,
    field: &str,
    backoff: &mut PullBackoff,
) -> Result<ImageRef, ImageFailure> {
    let image = container.image.as_deref().unwrap_or_default();
    let now = Timestamp::now();
    let fail = |reason: &str, message: String, after: Duration| ImageFailure {
        waiting: Waiting { reason: reason.into(), message },
        retry_at: later(now, after),
    };
    if let Err(error) = Reference::parse(image) {
        let message = format!("Failed to apply default image tag \"{image}\": {error}");
        node.events.container(pod, field, Severity::Warning, "InspectFailed", message.clone());
        return Err(fail("InvalidImageName", message, INITIAL));
    }
    let policy = pull_policy(container);
    let present = node.runtime.image_status(image).await.map_err(|error| {
        let message = format!("Failed to inspect image \"{image}\": {error}");
        node.events.container(pod, field, Severity::Warning, "InspectFailed", message.clone());
        fail("ImageInspectError", message, INITIAL)
    })?;
    match (present, policy) {
        (Some(present), PullPolicy::Never | PullPolicy::IfNotPresent) => {
            let message = format!("Container image \"{image}\" already present on machine");
            node.events.container(pod, field, Severity::Normal, "Pulled", message);
            return Ok(present);
        }
        (None, PullPolicy::Never) => {
            let message =
                format!("Container image \"{image}\" is not present with pull policy of Never");
            node.events.container(
                pod,
                field,
                Severity::Warning,
                "ErrImageNeverPull",
                message.clone(),
            );
            return Err(fail("ErrImageNeverPull", message, INITIAL));
        }
        _ => {}
    }
    if let Some((until, error)) = backoff.blocked(image, now) {
        let message = format!("Back-off pulling image \"{image}\": {error}");
        node.events.container(
            pod,
            field,
            Severity::Normal,
            "BackOff",
            format!("Back-off pulling image \"{image}\""),
        );
        let waiting = Waiting { reason: "ImagePullBackOff".into(), message };
        return Err(ImageFailure { waiting, retry_at: until });
    }
    pull(node, pod, image, field).await.map_err(|error| {
        backoff.note_failure(image, Timestamp::now(), &error);
        let message = format!("Failed to pull image \"{image}\": {error}");
        node.events.container(pod, field, Severity::Warning, "Failed", message.clone());
        node.events.container(pod, field, Severity::Warning, "Failed", "Error: ErrImagePull");
        // Soon again, only to be told to wait: `ErrImagePull` shows first, then `ImagePullBackOff`, as everywhere.
        fail("ErrImagePull", error, Duration::from_secs(1))
    })
}

async fn pull(node: &Node, pod: &Pod, image: &str, field: &str) -> Result<ImageRef, String> {
    let credentials = credentials(node, pod).await;
    let started = std::time::Instant::now();
    node.events.container(
        pod,
        field,
        Severity::Normal,
        "Pulling",
        format!("Pulling image \"{image}\""),
    );
    let host = Reference::parse(image).map(|image| image.registry().to_owned()).unwrap_or_default();
    let _slot = node.pulls.take(&host).await;
    let pulled =
        node.runtime.pull_image(image, &credentials).await.map_err(|e| shortened(chain(&e)))?;
    let message =
        format!("Successfully pulled image \"{image}\" in {:.3}s", started.elapsed().as_secs_f64());
    node.events.container(pod, field, Severity::Normal, "Pulled", message);
    Ok(pulled)
}

/// A registry chooses parts of the text, which goes into the pod's status: the API server must be able to take that.
fn shortened(mut text: String) -> String {
    if text.len() > LONGEST_TEXT {
        text.truncate(text.floor_char_boundary(LONGEST_TEXT));
        text.push('…');
    }
    text
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn pull_policy(container: &Container) -> PullPolicy {
    match container.image_pull_policy.as_deref() {
        Some("Always") => return PullPolicy::Always,
        Some("IfNotPresent") => return PullPolicy::IfNotPresent,
        Some("Never") => return PullPolicy::Never,
        _ => {}
    }
    let image = container.image.as_deref().unwrap_or_default();
    let last = image.rsplit('/').next().unwrap_or_default();
    match last.split_once(':') {
        _ if image.contains('@') => PullPolicy::IfNotPresent,
        Some((_, tag)) if tag != "latest" => PullPolicy::IfNotPresent,
        _ => PullPolicy::Always,
    }
}

/// The pull secrets that a pod names, as keys of the object cache.
pub(super) fn secret_keys(pod: &Pod) -> Vec<ObjectKey> {
    let secrets = spec::spec(pod).and_then(|s| s.image_pull_secrets.as_deref()).unwrap_or_default();
    let named = secrets.iter().filter(|secret| !secret.name.is_empty());
    named
        .map(|secret| ObjectKey {
            kind: ObjectKind::Secret,
            namespace: spec::namespace(pod).to_owned(),
            name: secret.name.clone(),
        })
        .collect()
}

async fn credentials(node: &Node, pod: &Pod) -> Vec<crate::image::RegistryCredentials> {
    let mut found = Vec::new();
    for key in secret_keys(pod) {
        match node.objects.get(&key).await {
            Ok(Some(keys)) => found.extend(parse_secret(&keys)),
            // The pull may work without it; if not, the event tells why it did not help.
            missing => {
                let problem = missing.err().map_or_else(|| "not found".into(), |e| e.to_string());
                let message = format!(
                    "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed: {problem}",
                    key.name
                );
                node.events.pod(pod, Severity::Warning, "FailedToRetrieveImagePullSecret", message);
            }
        }
    }
    found.into_iter().map(Login::into_credentials).collect()
}

#[derive(Debug, Deserialize)]
struct DockerConfig {
    auths: BTreeMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
struct DockerAuth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
}

// Passwords must not reach logs.
impl std::fmt::Debug for DockerAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DockerAuth").finish_non_exhaustive()
    }
}

/// One registry login.
#[derive(PartialEq, Eq)]
pub(crate) struct Login {
    registry: String,
    username: String,
    password: String,
}

impl Login {
    fn into_credentials(self) -> crate::image::RegistryCredentials {
        let Self { registry, username, password } = self;
        crate::image::RegistryCredentials { registry, username, password }
    }
}

pub(crate) fn parse_secret(keys: &Keys) -> Vec<Login> {
    let auths = if let Some(json) = keys.get(".dockerconfigjson") {
        serde_json::from_slice::<DockerConfig>(json).map(|config| config.auths)
    } else if let Some(json) = keys.get(".dockercfg") {
        serde_json::from_slice(json)
    } else {
        return Vec::new();
    };
    auths
        .unwrap_or_default()
        .into_iter()
        // One entry that cannot be read takes none of the others away.
        .filter_map(|(registry, auth)| login(&registry, serde_json::from_value(auth).ok()?))
        .collect()
}

fn login(registry: &str, auth: DockerAuth) -> Option<Login> {
    let registry = registry.trim_start_matches("https://").trim_start_matches("http://");
    let registry = registry.trim_end_matches('/').to_owned();
    if !auth.username.is_empty() {
        let (username, password) = (auth.username, auth.password);
        return Some(Login { registry, username, password });
    }
    let decoded = base64::engine::general_purpose::STANDARD.decode(auth.auth.trim()).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (username, password) = text.split_once(':')?;
    Some(Login { registry, username: username.to_owned(), password: password.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_follows_the_tag() {
        for (image, want) in [
            ("web", PullPolicy::Always),
            ("web:latest", PullPolicy::Always),
            ("host:5000/web", PullPolicy::Always),
            ("web:1", PullPolicy::IfNotPresent),
            ("web@sha256:0", PullPolicy::IfNotPresent),
        ] {
            let container = Container { image: Some(image.into()), ..Container::default() };
            assert_eq!(pull_policy(&container), want, "{image}");
        }
    }

    #[test]
    fn both_kinds_of_pull_secrets_are_read() {
        let new = br#"{"auths":{"https://reg.example/v1/":{"auth":"dTpw"}}}"#;
        let old = br#"{"reg2":{"username":"u2","password":"p2"}}"#;
        let logins = parse_secret(&[(".dockerconfigjson".to_owned(), new.to_vec())].into());
        let one = &logins[0];
        assert_eq!((&*one.registry, &*one.username, &*one.password), ("reg.example/v1", "u", "p"));
        let logins = parse_secret(&[(".dockercfg".to_owned(), old.to_vec())].into());
        assert_eq!(logins[0].username, "u2");
        let mixed = br#"{"auths":{"a":{"auth":null},"b":7,"c":{"auth":"dTpw"}}}"#;
        let logins = parse_secret(&[(".dockerconfigjson".to_owned(), mixed.to_vec())].into());
        assert_eq!(logins.iter().map(|l| &*l.registry).collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn a_registrys_long_text_is_cut_at_a_character() {
        assert_eq!(shortened("short".into()), "short");
        assert_eq!(shortened("ä".repeat(5000)).len(), LONGEST_TEXT + '…'.len_utf8());
    }

    #[test]
    fn failed_pulls_wait_longer_each_time() {
        let (mut backoff, now) = (PullBackoff::default(), Timestamp::UNIX_EPOCH);
        let wait = |b: &PullBackoff| {
            b.blocked("i", now).map(|(until, _)| until.duration_since(now).as_secs())
        };
        assert_eq!(wait(&backoff), None);
        for want in [10, 20, 40, 80, 160, 300, 300] {
            backoff.note_failure("i", now, "x");
            assert_eq!(wait(&backoff), Some(want));
        }
    }
}

//! Static pods: manifests in a folder, run without asking an API server.
//!
//! inotify tells about changes; a slow rescan is the safety net. A file that cannot be used is reported with its path and what
//! is wrong; all other pods go on, and so does the pod that the file described before.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use inotify::{Inotify, WatchMask};
use k8s_openapi::api::core::v1::{Pod, PodStatus, Toleration};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::{SourceKind, Update};
use crate::pod::spec;

const RESCAN: Duration = Duration::from_secs(60);
/// Editors write in several steps: wait until they are done.
const SETTLE: Duration = Duration::from_millis(50);

/// A manifest that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("{file}: cannot be read: {problem}")]
    Read { file: String, problem: String },
    #[error("{file}: {problem}")]
    Parse { file: String, problem: String },
    #[error("{file}: {field}: {problem}")]
    Field { file: String, field: &'static str, problem: String },
}

/// Follows the folder until the receiver is gone.
pub(in crate::pod) async fn follow(folder: PathBuf, node: String, updates: mpsc::Sender<Update>) {
    let mut scanner = Scanner { folder, node, good: BTreeMap::new(), told: BTreeMap::new() };
    let mut events = watch(&scanner.folder);
    loop {
        let pods = scanner.scan();
        if updates.send(Update::All(SourceKind::Manifests, pods)).await.is_err() {
            return;
        }
        // Either arm only says "scan again".
        tokio::select! {
            event = next_event(&mut events) => if !event {
                events = None;
            },
            () = tokio::time::sleep(RESCAN) => {
                if events.is_none() {
                    events = watch(&scanner.folder);
                }
            }
        }
        tokio::time::sleep(SETTLE).await;
    }
}

type Events = inotify::EventStream<Vec<u8>>;

fn watch(folder: &Path) -> Option<Events> {
    let mask = WatchMask::CLOSE_WRITE | WatchMask::MOVE | WatchMask::DELETE | WatchMask::CREATE;
    let started = Inotify::init().and_then(|inotify| {
        inotify.watches().add(folder, mask)?;
        inotify.into_event_stream(vec![0; 4096])
    });
    match started {
        Ok(events) => Some(events),
        Err(error) => {
            let folder = folder.display();
            tracing::warn!(%folder, %error, "Manifest folder cannot be watched, it is only read every minute");
            None
        }
    }
}

async fn next_event(events: &mut Option<Events>) -> bool {
    match events {
        Some(stream) => matches!(stream.next().await, Some(Ok(_))),
        None => std::future::pending().await,
    }
}

struct Scanner {
    folder: PathBuf,
    node: String,
    /// The last usable content of each file.
    good: BTreeMap<String, Arc<Pod>>,
    /// Errors that have been reported, by file: each once.
    told: BTreeMap<String, ManifestError>,
}

impl Scanner {
    fn scan(&mut self) -> Vec<Arc<Pod>> {
        let files = match list(&self.folder) {
            Ok(files) => files,
            Err(error) => {
                let folder = self.folder.display();
                tracing::warn!(%folder, %error, "Manifest folder cannot be read, its pods stay as they are");
                return self.good.values().cloned().collect();
            }
        };
        let mut names = BTreeSet::new();
        for path in files {
            let file = path.display().to_string();
            names.insert(file.clone());
            match read(&path, &file, &self.node) {
                Ok(pod) => {
                    self.told.remove(&file);
                    self.keep(file, pod);
                }
                Err(error) => self.report(file, error),
            }
        }
        self.good.retain(|file, _| names.contains(file));
        self.told.retain(|file, _| names.contains(file));
        self.without_duplicates()
    }

    /// The same content keeps the same object, so that its "seen" time does not change.
    fn keep(&mut self, file: String, pod: Pod) {
        let same = self.good.get(&file).is_some_and(|known| known.metadata.uid == pod.metadata.uid);
        if !same {
            self.good.insert(file, Arc::new(pod));
        }
    }

    fn report(&mut self, file: String, error: ManifestError) {
        if self.told.get(&file) != Some(&error) {
            tracing::error!(%error, "Manifest not usable; hint: correct the file, all other pods go on");
            self.told.insert(file, error);
        }
    }

    fn without_duplicates(&self) -> Vec<Arc<Pod>> {
        let (mut names, mut pods) = (BTreeSet::new(), Vec::new());
        for (file, pod) in &self.good {
            if names.insert(spec::key(pod)) {
                pods.push(pod.clone());
            } else {
                tracing::error!(
                    file,
                    pod = spec::key(pod),
                    "Another manifest has this name already, this one is left out"
                );
            }
        }
        pods
    }
}

fn list(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        // Follows links: config management likes them.
        if !hidden && entry.path().is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path, file: &str, node: &str) -> Result<Pod, ManifestError> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| ManifestError::Read { file: file.to_owned(), problem: e.to_string() })?;
    parse(&text, file, node)
}

/// Turns a manifest into the pod that this node runs.
///
/// # Errors
/// What is wrong with it, with file and field.
pub fn parse(text: &str, file: &str, node: &str) -> Result<Pod, ManifestError> {
    let parse_error = |problem: String| ManifestError::Parse { file: file.to_owned(), problem };
    // YAML is a superset of JSON: one reader for both.
    let value: serde_json::Value =
        serde_saphyr::from_str(text).map_err(|e| parse_error(e.to_string().trim().to_owned()))?;
    let kind = value.get("kind").and_then(|k| k.as_str()).unwrap_or_default();
    let version = value.get("apiVersion").and_then(|k| k.as_str()).unwrap_or_default();
    if (kind, version) != ("Pod", "v1") {
        return Err(ManifestError::Field {
            file: file.to_owned(),
            field: "kind",
            problem: format!("is {version:?} {kind:?}, only \"v1\" \"Pod\" can be a static pod"),
        });
    }
    let mut unknown = Vec::new();
    let pod: Pod = serde_json::from_value(value.clone()).map_err(|e| parse_error(e.to_string()))?;
    unknown_fields(&value, &serde_json::to_value(&pod).unwrap_or_default(), "", &mut unknown);
    for field in unknown {
        tracing::warn!(
            file,
            field,
            "Manifest has a field that a pod does not have; it is left out"
        );
    }
    check(&pod, file)?;
    Ok(complete(pod, text, file, node))
}

fn unknown_fields(
    given: &serde_json::Value,
    known: &serde_json::Value,
    path: &str,
    out: &mut Vec<String>,
) {
    use serde_json::Value;
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (key, value) in given.iter().filter(|(_, value)| !value.is_null()) {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match known.get(key) {
                    Some(known) => unknown_fields(value, known, &path, out),
                    None => out.push(path),
                }
            }
        }
        (Value::Array(given), Value::Array(known)) => {
            for (index, (given, known)) in given.iter().zip(known).enumerate() {
                unknown_fields(given, known, &format!("{path}[{index}]"), out);
            }
        }
        _ => {}
    }
}

fn check(pod: &Pod, file: &str) -> Result<(), ManifestError> {
    let fail = |field, problem: &str| {
        Err(ManifestError::Field { file: file.to_owned(), field, problem: problem.to_owned() })
    };
    if spec::name(pod).is_empty() {
        return fail("metadata.name", "is missing");
    }
    let Some(spec) = &pod.spec else { return fail("spec", "is missing") };
    if spec.containers.is_empty() {
        return fail("spec.containers", "needs at least one container");
    }
    for container in &spec.containers {
        if container.name.is_empty() {
            return fail("spec.containers[].name", "is missing");
        }
        if container.image.as_deref().unwrap_or_default().is_empty() {
            return fail("spec.containers[].image", "is missing");
        }
    }
    if spec.service_account_name.as_deref().is_some_and(|name| !name.is_empty()) {
        return fail(
            "spec.serviceAccountName",
            "is not possible: a static pod may not refer to API objects",
        );
    }
    let (config_maps, secrets) = crate::volume::content::references(pod);
    if !config_maps.is_empty() || !secrets.is_empty() {
        return fail(
            "spec.volumes",
            "refer to a config map or secret: a static pod may not refer to API objects",
        );
    }
    Ok(())
}

fn complete(mut pod: Pod, text: &str, file: &str, node: &str) -> Pod {
    let meta = &mut pod.metadata;
    let digest = Sha256::digest(format!("{text}\0{node}\0{file}").as_bytes());
    let hash: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    meta.uid = meta.uid.take().filter(|uid| !uid.is_empty()).or_else(|| Some(hash.clone()));
    meta.name = meta.name.take().map(|name| format!("{name}-{node}"));
    meta.namespace =
        meta.namespace.take().filter(|ns| !ns.is_empty()).or_else(|| Some("default".into()));
    let annotations = meta.annotations.get_or_insert_default();
    annotations.insert(spec::CONFIG_SOURCE.into(), "file".into());
    annotations.insert(spec::CONFIG_HASH.into(), hash);
    annotations.insert(spec::CONFIG_SEEN.into(), jiff::Timestamp::now().to_string());
    meta.generation = Some(1);
    if let Some(spec) = &mut pod.spec {
        spec.node_name = Some(node.to_owned());
        // Taints that throw pods out do not apply: nobody would put it back.
        let stay = Toleration {
            effect: Some("NoExecute".into()),
            operator: Some("Exists".into()),
            ..Toleration::default()
        };
        let tolerations = spec.tolerations.get_or_insert_default();
        if !tolerations.contains(&stay) {
            tolerations.push(stay);
        }
        spec.restart_policy.get_or_insert_with(|| "Always".into());
        spec.termination_grace_period_seconds.get_or_insert(30);
        spec.dns_policy.get_or_insert_with(|| "ClusterFirst".into());
        spec.enable_service_links.get_or_insert(true);
    }
    pod.status = Some(PodStatus::default());
    pod
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  containers:\n  - {name: c, image: i}\n";

    #[test]
    fn a_manifest_becomes_a_pod_of_this_node() {
        let pod = parse(GOOD, "/m/web.yaml", "n1").unwrap();
        assert_eq!(spec::key(&pod), "default/web-n1");
        assert!(spec::is_static(&pod) && !spec::is_mirror(&pod));
        assert_eq!(pod.metadata.uid.as_deref(), spec::annotation(&pod, spec::CONFIG_HASH));
        let other = parse(&GOOD.replace("image: i", "image: j"), "/m/web.yaml", "n1").unwrap();
        assert_ne!(pod.metadata.uid, other.metadata.uid);
        assert_eq!(parse(GOOD, "/m/web.yaml", "n1").unwrap().metadata.uid, pod.metadata.uid);
    }

    #[test]
    fn what_is_wrong_is_named_with_file_and_field() {
        for (text, want) in [
            (GOOD.replace("Pod", "Job"), "/m/x: kind: is \"v1\" \"Job\""),
            (GOOD.replace("name: web", "x: y"), "/m/x: metadata.name: is missing"),
            (GOOD.replace("image: i", "x: i"), "/m/x: spec.containers[].image: is missing"),
            (GOOD.replace("spec:", "spec: {"), "/m/x: "),
            (GOOD.replace("spec:\n", "spec:\n  restartPolicy: 7\n"), "/m/x: "),
            (
                GOOD.replace("spec:\n", "spec:\n  serviceAccountName: sa\n"),
                "/m/x: spec.serviceAccountName: is not possible",
            ),
        ] {
            let error = parse(&text, "/m/x", "n").unwrap_err().to_string();
            assert!(error.starts_with(want), "{error}");
        }
    }

    #[test]
    fn a_broken_file_leaves_its_pod_and_all_others_running() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let folder = dir.path().to_owned();
        let mut scanner =
            Scanner { folder, node: "n".into(), good: BTreeMap::new(), told: BTreeMap::new() };
        write("a.yaml", GOOD);
        write("b.yaml", &GOOD.replace("web", "db"));
        write(".hidden.yaml", GOOD);
        let names =
            |pods: Vec<Arc<Pod>>| pods.iter().map(|p| spec::name(p).to_owned()).collect::<Vec<_>>();
        assert_eq!(names(scanner.scan()), ["web-n", "db-n"]);
        write("a.yaml", "kind: [");
        assert_eq!(names(scanner.scan()), ["web-n", "db-n"]);
        assert_eq!(scanner.told.len(), 1);
        std::fs::remove_file(dir.path().join("a.yaml")).unwrap();
        assert_eq!(names(scanner.scan()), ["db-n"]);
        assert!(scanner.told.is_empty());
    }
}

//! The last known state on disk: after a reboot Services work before the API server answers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::backend::BackendConfig;
use crate::clock::Now;
use crate::diff::Plans;
use crate::model::{ServiceKey, ServicePlan};

/// How long a change may wait to be written: what is lost by a power cut is this much.
const DELAY: Duration = Duration::from_secs(10);
const VERSION: u32 = 1;

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    boot: &'a str,
    node: &'a str,
    config: &'a BackendConfig,
    services: Vec<(String, &'a ServicePlan)>,
}

#[derive(Deserialize)]
struct Found {
    version: u32,
    boot: String,
    node: String,
    config: BackendConfig,
    services: Vec<(String, ServicePlan)>,
}

pub(crate) struct LastKnown {
    path: Option<PathBuf>,
    boot: String,
    node: String,
    due: Option<Instant>,
    /// Ten thousand Services take a while to write, and changes must not wait for that.
    writer: Option<JoinHandle<()>>,
}

impl LastKnown {
    pub(crate) fn new(path: Option<PathBuf>, node: &str) -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let (boot, node) = (boot.trim().to_owned(), node.to_owned());
        LastKnown { path, boot, node, due: None, writer: None }
    }

    /// What is on disk, if an earlier boot wrote it. What this boot wrote is in the kernel already.
    pub(crate) fn read_after_reboot(&self) -> Option<(Plans, BackendConfig)> {
        let path = self.path.as_deref()?;
        match read(path) {
            Ok(found) if found.version != VERSION || found.boot == self.boot => None,
            Ok(found) if found.node != self.node => {
                let (path, other) = (path.display(), found.node);
                tracing::warn!(%path, %other, "The last known state is that of another node");
                None
            }
            Ok(found) => {
                let plans = found.services.into_iter().map(|(name, plan)| {
                    let (namespace, name) = name.split_once('/').unwrap_or(("", &name));
                    (ServiceKey::new(namespace, name), Arc::new(plan))
                });
                Some((plans.collect(), found.config))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "Cannot use the last known state");
                None
            }
        }
    }

    pub(crate) fn note_change(&mut self, now: Now) {
        if self.path.is_some() {
            self.due.get_or_insert(now.steady + DELAY);
        }
    }

    /// When there is something to write.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Starts to write when it is time. The plans are shared, not copied.
    pub(crate) fn write_if_due(&mut self, now: Now, plans: &Plans, config: &BackendConfig) {
        if self.due.is_none_or(|due| due > now.steady) {
            return;
        }
        if self.writer.as_ref().is_some_and(|writer| !writer.is_finished()) {
            self.due = Some(now.steady + DELAY);
            return;
        }
        self.due = None;
        let Some(path) = self.path.clone() else { return };
        let (boot, node) = (self.boot.clone(), self.node.clone());
        let (plans, config) = (plans.clone(), config.clone());
        let thread = std::thread::Builder::new().name("proxy-last-known".to_owned());
        match thread.spawn(move || write_or_warn(&path, (&boot, &node), &plans, &config)) {
            Ok(writer) => self.writer = Some(writer),
            Err(error) => tracing::warn!(%error, "Cannot start to keep the last known state"),
        }
    }

    /// Writes what waits to be written, and returns when it is on disk.
    pub(crate) fn write_now(&mut self, plans: &Plans, config: &BackendConfig) {
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("The thread that keeps the last known state panicked");
        }
        let (Some(path), Some(_)) = (&self.path, self.due.take()) else { return };
        write_or_warn(path, (&self.boot, &self.node), plans, config);
    }
}

fn write_or_warn(path: &Path, whose: (&str, &str), plans: &Plans, config: &BackendConfig) {
    if let Err(error) = write(path, whose, plans, config) {
        tracing::warn!(path = %path.display(), %error, "Cannot keep the last known state");
    }
}

fn read(path: &Path) -> std::io::Result<Found> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

fn write(
    path: &Path,
    (boot, node): (&str, &str),
    plans: &Plans,
    config: &BackendConfig,
) -> anyhow::Result<()> {
    let mut services: Vec<_> =
        plans.iter().map(|(service, plan)| (service.to_string(), &**plan)).collect();
    services.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    let text = serde_json::to_vec(&Written { version: VERSION, boot, node, config, services })?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    Ok(keelson_durable::write(path, &text, 0o600)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::{Model, NodeFacts};

    fn plans() -> Plans {
        let mut model = Model::new(NodeFacts::default());
        let service = json!({
            "metadata": {"namespace": "ns", "name": "web"},
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.0.0.1", "externalTrafficPolicy": "Local",
                "ports": [{"port": 80, "nodePort": 30080}],
                "loadBalancerSourceRanges": ["192.0.2.0/24"],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}]}},
        });
        model.apply_service(&serde_json::from_value(service).unwrap());
        let key = ServiceKey::new("ns", "web");
        Plans::from([(key.clone(), Arc::new(model.plan(&key).unwrap()))])
    }

    #[test]
    fn it_is_read_by_the_next_boot_and_not_by_this_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper/state");
        let config = BackendConfig::default();
        let mut this = LastKnown::new(Some(path.clone()), "n");
        assert!(this.read_after_reboot().is_none());
        this.write_now(&plans(), &config);
        assert!(!path.exists(), "nothing has changed");
        this.note_change(Now::read());
        this.write_now(&plans(), &config);
        assert!(this.read_after_reboot().is_none());
        let next = LastKnown { boot: "next".to_owned(), ..LastKnown::new(Some(path.clone()), "n") };
        assert_eq!(next.read_after_reboot(), Some((plans(), config)));
        let other = LastKnown { node: "m".to_owned(), ..LastKnown::new(Some(path.clone()), "m") };
        let other = LastKnown { boot: "next".to_owned(), ..other };
        assert!(other.read_after_reboot().is_none());
        std::fs::write(&path, "{").unwrap();
        assert!(next.read_after_reboot().is_none());
    }
}

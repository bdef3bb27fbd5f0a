//! The last known state on disk: after a reboot Services work before the API server answers.
//!
//! A file of lines, each JSON: first whose it is, then a Service with its plan per line. What changes later is
//! appended, so that it costs as much as the change; a line counts more than those before it, and one without
//! a plan says that the Service is gone. When half of the lines are outdated the file is written anew.

pub(crate) mod file;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::BackendConfig;
use crate::clock::Now;
use crate::diff::{Change, Plans};
use crate::model::{ServiceKey, ServicePlan};
use file::Owner;

/// How long a change may wait to be written: what is lost by a power cut is this much.
const DELAY: Duration = Duration::from_secs(10);
/// As many lines may be outdated, however few others there are.
const OUTDATED: usize = 1000;

type Changed = HashMap<ServiceKey, Option<Arc<ServicePlan>>>;

/// What a write consists of.
enum Content {
    Appended(Changed),
    Whole(Owner, Box<BackendConfig>, Plans),
}

pub(crate) struct LastKnown {
    path: Option<PathBuf>,
    owner: Owner,
    due: Option<Instant>,
    /// Since the last write; nothing when the file has to be written anew.
    changed: Option<Changed>,
    /// What the file has.
    config: Option<BackendConfig>,
    lines: usize,
    /// Ten thousand Services take a while to write, and changes must not wait for that. Tells whether all went
    /// well.
    writer: Option<JoinHandle<bool>>,
}

impl LastKnown {
    pub(crate) fn new(path: Option<PathBuf>, node: &str) -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let owner = Owner { boot: boot.trim().to_owned(), node: node.to_owned() };
        LastKnown { path, owner, due: None, changed: None, config: None, lines: 0, writer: None }
    }

    /// What is on disk, if an earlier boot wrote it. What this boot wrote is in the kernel already.
    pub(crate) fn read_after_reboot(&self) -> Option<(Plans, BackendConfig)> {
        let path = self.path.as_deref()?;
        match file::read(path, &self.owner) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "Cannot use the last known state");
                None
            }
        }
    }

    pub(crate) fn note_changes(&mut self, now: Now, changes: &[Change]) {
        if self.path.is_none() {
            return;
        }
        match &mut self.changed {
            Some(changed) => {
                let plans = changes.iter().map(|c| (c.service.clone(), c.plan.clone()));
                changed.extend(plans);
                self.due.get_or_insert(now.steady + DELAY);
            }
            // All Services of a start have come at once: there is nothing to wait for.
            None => self.due = Some(self.due.unwrap_or(now.steady)),
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
        self.join();
        let Some(write) = self.next_write(plans, config) else { return };
        let thread = std::thread::Builder::new().name("proxy-last-known".to_owned());
        match thread.spawn(write) {
            Ok(writer) => self.writer = Some(writer),
            Err(error) => {
                tracing::warn!(%error, "Cannot start to keep the last known state");
                self.changed = None;
            }
        }
    }

    /// Writes what waits to be written, and returns when it is on disk.
    pub(crate) fn write_now(&mut self, plans: &Plans, config: &BackendConfig) {
        self.join();
        if self.due.is_some()
            && let Some(write) = self.next_write(plans, config)
        {
            write();
        }
    }

    /// Nobody knows what a write that failed has left: then everything has to be written.
    fn join(&mut self) {
        let Some(writer) = self.writer.take() else { return };
        if !writer.join().unwrap_or(false) {
            self.changed = None;
        }
    }

    /// What has to be done now.
    fn next_write(
        &mut self,
        plans: &Plans,
        config: &BackendConfig,
    ) -> Option<impl FnOnce() -> bool + Send + 'static> {
        self.due = None;
        let path = self.path.clone()?;
        let appended = self.changed.replace(HashMap::new()).filter(|changed| {
            let lines = self.lines + changed.len();
            self.config.as_ref() == Some(config) && lines <= 2 * plans.len() + OUTDATED
        });
        let content = match appended {
            Some(changed) if changed.is_empty() => return None,
            Some(changed) => {
                self.lines += changed.len();
                Content::Appended(changed)
            }
            None => {
                self.lines = plans.len();
                self.config = Some(config.clone());
                Content::Whole(self.owner.clone(), Box::new(config.clone()), plans.clone())
            }
        };
        Some(move || {
            let written = match &content {
                Content::Appended(changed) => file::append(&path, changed),
                Content::Whole(owner, config, plans) => file::write(&path, owner, config, plans),
            };
            if let Err(error) = &written {
                tracing::warn!(path = %path.display(), %error, "Cannot keep the last known state");
            }
            written.is_ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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

    fn at(path: &Path, boot: &str, node: &str) -> LastKnown {
        let owner = Owner { boot: boot.to_owned(), node: node.to_owned() };
        LastKnown { owner, ..LastKnown::new(Some(path.to_owned()), node) }
    }

    fn change(service: &str, plan: Option<&Arc<ServicePlan>>) -> Change {
        let service = ServiceKey::new("ns", service);
        Change { service, before: None, plan: plan.cloned() }
    }

    #[test]
    fn it_is_read_by_the_next_boot_and_not_by_this_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper/state");
        let config = BackendConfig::default();
        let mut this = at(&path, "this", "n");
        assert!(this.read_after_reboot().is_none());
        this.write_now(&plans(), &config);
        assert!(!path.exists(), "nothing has changed");
        this.note_changes(Now::read(), &[]);
        this.write_now(&plans(), &config);
        assert!(this.read_after_reboot().is_none());
        let next = at(&path, "next", "n");
        assert_eq!(next.read_after_reboot(), Some((plans(), config)));
        assert!(at(&path, "next", "m").read_after_reboot().is_none());
        std::fs::write(&path, "{").unwrap();
        assert!(next.read_after_reboot().is_none());
    }

    #[test]
    fn a_change_is_appended_and_a_torn_line_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let (config, mut plans) = (BackendConfig::default(), plans());
        let plan = plans.values().next().unwrap().clone();
        let mut this = at(&path, "this", "n");
        let mut write = |plans: &Plans, changes: &[Change]| {
            this.note_changes(Now::read(), changes);
            this.write_now(plans, &config);
        };
        write(&plans, &[]);
        let first = std::fs::read(&path).unwrap();
        let (web, new) = (ServiceKey::new("ns", "web"), ServiceKey::new("ns", "new"));
        plans.insert(new, Arc::clone(&plan));
        write(&plans, &[change("new", Some(&plan))]);
        let second = std::fs::read(&path).unwrap();
        assert!(second.starts_with(&first) && second.len() > first.len());
        let next = at(&path, "next", "n");
        let read = || next.read_after_reboot().map(|(plans, _)| plans);
        assert_eq!(read(), Some(plans.clone()));
        let both = plans.clone();
        plans.remove(&web);
        write(&plans, &[change("web", None)]);
        assert_eq!(read(), Some(plans));
        // The power went off in the middle of a line.
        let third = std::fs::read(&path).unwrap();
        for length in second.len()..third.len() {
            std::fs::write(&path, &third[..length]).unwrap();
            assert_eq!(read().as_ref(), Some(&both), "{length}");
        }
    }

    #[test]
    fn a_damaged_line_costs_its_own_service_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let (config, plans) = (BackendConfig::default(), plans());
        let plan = plans.values().next().unwrap();
        let mut this = at(&path, "this", "n");
        let mut write = |changes: &[Change]| {
            this.note_changes(Now::read(), changes);
            this.write_now(&plans, &config);
        };
        write(&[]);
        write(&[change("lost", Some(plan))]);
        write(&[change("last", Some(plan))]);
        let mut text = std::fs::read(&path).unwrap();
        let at_name = text.windows(7).position(|part| part == b"ns/lost").unwrap();
        // As a bad sector leaves it, and no UTF-8 either.
        text[at_name - 3..at_name + 4].fill(0xff);
        std::fs::write(&path, text).unwrap();
        let (found, _) = at(&path, "next", "n").read_after_reboot().unwrap();
        let mut names: Vec<_> = found.keys().map(ToString::to_string).collect();
        names.sort();
        assert_eq!(names, ["ns/last", "ns/web"]);
    }

    #[test]
    fn outdated_lines_and_another_configuration_make_it_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let plans = plans();
        let plan = plans.values().next().unwrap();
        let mut this = at(&path, "this", "n");
        let mut write = |changes: &[Change], masquerade_bit| {
            this.note_changes(Now::read(), changes);
            let config = BackendConfig { masquerade_bit, ..BackendConfig::default() };
            this.write_now(&plans, &config);
            std::fs::read_to_string(&path).unwrap().lines().count()
        };
        assert_eq!(write(&[], 14), 2);
        let again = [change("web", Some(plan))];
        assert_eq!(write(&again, 14), 3);
        assert_eq!(write(&again, 15), 2);
        for lines in 3..=OUTDATED + 3 {
            assert_eq!(write(&again, 15), lines);
        }
        assert_eq!(write(&again, 15), 2);
    }

    #[test]
    fn after_a_write_that_failed_everything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let (config, plans) = (BackendConfig::default(), plans());
        let mut this = at(&path, "this", "n");
        let mut write = || {
            let now = Now::read();
            this.note_changes(now, &[change("web", plans.values().next())]);
            let due = Now { steady: now.steady + DELAY, ..now };
            this.write_if_due(due, &plans, &config);
            this.join();
        };
        write();
        // Nobody can append to a folder, nor put a file in its place.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        write();
        std::fs::remove_dir(&path).unwrap();
        write();
        assert!(at(&path, "next", "n").read_after_reboot().is_some());
    }
}

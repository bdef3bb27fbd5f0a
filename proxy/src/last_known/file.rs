//! The file: how it is written, appended to, and read.

use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Changed;
use crate::backend::BackendConfig;
use crate::diff::Plans;
use crate::model::{ServiceKey, ServicePlan};

const VERSION: u32 = 2;

/// Who wrote it, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner {
    pub(crate) boot: String,
    pub(crate) node: String,
}

#[derive(Serialize)]
struct Header<'a> {
    version: u32,
    #[serde(flatten)]
    owner: &'a Owner,
    config: &'a BackendConfig,
}

/// A version that is not ours may have anything else.
#[derive(Deserialize)]
struct HeaderFound {
    version: u32,
    #[serde(flatten)]
    owner: Option<Owner>,
    config: Option<BackendConfig>,
}

#[derive(Serialize)]
struct Line<'a> {
    service: &'a str,
    plan: Option<&'a ServicePlan>,
}

#[derive(Deserialize)]
struct LineFound {
    service: String,
    plan: Option<ServicePlan>,
}

/// Replaces the file.
pub(super) fn write(
    path: &Path,
    owner: &Owner,
    config: &BackendConfig,
    plans: &Plans,
) -> anyhow::Result<()> {
    let mut text = Vec::new();
    serde_json::to_writer(&mut text, &Header { version: VERSION, owner, config })?;
    text.push(b'\n');
    for (service, plan) in plans {
        push_line(&mut text, service, Some(plan))?;
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    Ok(keelson_durable::write(path, &text, 0o600)?)
}

/// Appends to the file; returns when that is on disk.
pub(super) fn append(path: &Path, changed: &Changed) -> anyhow::Result<()> {
    let mut text = Vec::new();
    for (service, plan) in changed {
        push_line(&mut text, service, plan.as_deref())?;
    }
    let mut file = OpenOptions::new().append(true).open(path)?;
    file.write_all(&text)?;
    Ok(file.sync_data()?)
}

fn push_line(
    text: &mut Vec<u8>,
    service: &ServiceKey,
    plan: Option<&ServicePlan>,
) -> serde_json::Result<()> {
    let (service, plan) = (&*service.to_string(), plan);
    serde_json::to_writer(&mut *text, &Line { service, plan })?;
    text.push(b'\n');
    Ok(())
}

/// What an earlier boot of the same node wrote.
pub(super) fn read(path: &Path, reader: &Owner) -> io::Result<Option<(Plans, BackendConfig)>> {
    match std::fs::File::open(path) {
        Ok(file) => read_from(BufReader::new(file), reader),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) fn read_from(
    mut lines: impl BufRead,
    reader: &Owner,
) -> io::Result<Option<(Plans, BackendConfig)>> {
    let mut line = Vec::new();
    lines.read_until(b'\n', &mut line)?;
    let header: HeaderFound = serde_json::from_slice(&line)?;
    let (VERSION, Some(owner), Some(config)) = (header.version, header.owner, header.config) else {
        return Ok(None);
    };
    if owner.boot == reader.boot {
        return Ok(None);
    }
    if owner.node != reader.node {
        tracing::warn!(other = owner.node, "The last known state is that of another node");
        return Ok(None);
    }
    let mut plans = Plans::new();
    let mut unreadable = 0_usize;
    loop {
        line.clear();
        // The last line may be a part of one, if the power went off while it was written.
        if lines.read_until(b'\n', &mut line)? == 0 || !line.ends_with(b"\n") {
            break;
        }
        // A line that the disk has damaged costs its own Service only.
        let Ok(LineFound { service, plan }) = serde_json::from_slice(&line) else {
            unreadable += 1;
            continue;
        };
        let (namespace, name) = service.split_once('/').unwrap_or(("", &service));
        let service = ServiceKey::new(namespace, name);
        match plan {
            Some(plan) => plans.insert(service, Arc::new(plan)),
            None => plans.remove(&service),
        };
    }
    if unreadable > 0 {
        tracing::warn!(
            lines = unreadable,
            "The last known state is damaged; the rest of it is used"
        );
    }
    Ok(Some((plans, config)))
}

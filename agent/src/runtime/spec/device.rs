//! Device nodes and who may use them.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use serde_json::{Value, json};

use super::super::RuntimeError;

/// Character devices that every container has: null, zero, full, random, urandom, tty, console, ptmx and ptys.
const USUAL: &[(i64, Option<i64>)] = &[
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

/// What a container may use: everything if it is privileged, else the usual ones.
pub(super) fn rules(privileged: bool) -> Vec<Value> {
    if privileged {
        return vec![json!({ "allow": true, "access": "rwm" })];
    }
    let mut rules = vec![
        json!({ "allow": false, "access": "rwm" }),
        json!({ "allow": true, "type": "c", "access": "m" }),
        json!({ "allow": true, "type": "b", "access": "m" }),
    ];
    rules.extend(USUAL.iter().map(|(major, minor)| {
        let mut rule = json!({ "allow": true, "type": "c", "major": major, "access": "rwm" });
        if let Some(minor) = minor {
            rule["minor"] = (*minor).into();
        }
        rule
    }));
    rules
}

/// One device of the node: its node in the container and the rule that allows it.
pub(super) fn one(path: &Path) -> Result<(Value, Value), RuntimeError> {
    let node = node(path).ok_or_else(|| {
        RuntimeError::invalid(format!("{} is not a device of this node", path.display()))
    })?;
    let rule = json!({ "allow": true, "type": node["type"], "major": node["major"], "minor": node["minor"],
        "access": "rwm" });
    Ok((node, rule))
}

/// All devices of the node, for a privileged container.
pub(super) fn all() -> Vec<Value> {
    let mut found = Vec::new();
    collect(Path::new("/dev"), &mut found);
    found
}

fn collect(folder: &Path, found: &mut Vec<Value>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            // Mounts of the container's own.
            if !["pts", "shm", "mqueue", "fd", ".udev"].iter().any(|own| name == *own) {
                collect(&path, found);
            }
        } else if name != "console" && (kind.is_char_device() || kind.is_block_device()) {
            found.extend(node(&path));
        }
    }
}

fn node(path: &Path) -> Option<Value> {
    let metadata = fs::metadata(path).ok()?;
    let kind = match metadata.file_type() {
        t if t.is_char_device() => "c",
        t if t.is_block_device() => "b",
        _ => return None,
    };
    let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    Some(json!({ "path": path, "type": kind, "major": major, "minor": minor,
        "fileMode": metadata.mode() & 0o7777, "uid": metadata.uid(), "gid": metadata.gid() }))
}

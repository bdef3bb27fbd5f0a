//! The machine's files: none may be made or changed by what runs in a pod.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Folders that a program with root's rights would be planted in.
const WATCHED: [&str; 7] =
    ["/boot", "/etc", "/home", "/opt", "/srv", "/usr/lib/systemd", "/var/spool"];
/// Single folders whose own entries matter, without those below.
const SHALLOW: [&str; 6] = ["/", "/root", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/var/lib"];

/// What is known of a file: size, mode, owner, group, time of its last change in nanoseconds.
type Facts = (u64, u32, u32, u32, i128);

/// Every watched file with its facts.
pub(crate) fn manifest() -> BTreeMap<PathBuf, Facts> {
    let mut files = BTreeMap::new();
    for folder in WATCHED {
        add(Path::new(folder), true, &mut files);
    }
    for folder in SHALLOW {
        add(Path::new(folder), false, &mut files);
    }
    files
}

/// What differs from `before`: made, changed and removed files.
pub(crate) fn changes(before: &BTreeMap<PathBuf, Facts>) -> Vec<String> {
    let now = manifest();
    let mut changes = Vec::new();
    for (path, facts) in &now {
        match before.get(path) {
            None => changes.push(format!("made: {}", path.display())),
            Some(old) if old != facts => changes.push(format!("changed: {}", path.display())),
            Some(_) => {}
        }
    }
    let gone = before.keys().filter(|path| !now.contains_key(*path));
    changes.extend(gone.map(|path| format!("removed: {}", path.display())));
    changes
}

fn add(folder: &Path, deep: bool, files: &mut BTreeMap<PathBuf, Facts>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.is_dir() {
            if deep {
                add(&path, true, files);
            }
            // The entries of a folder say what changed in it; nodes come and go in /var/lib.
            continue;
        }
        let time = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        let facts = (metadata.size(), metadata.mode(), metadata.uid(), metadata.gid(), time);
        files.insert(path, facts);
    }
}

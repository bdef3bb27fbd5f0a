//! Which network namespaces there are.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Netns;

/// Every network namespace that a process of this machine lives in or that is pinned in one of `folders`,
/// once, opened when it is its turn. What comes or goes meanwhile may be missed. A namespace that only a
/// thread or an open file holds is not seen.
pub fn existing(folders: &[&Path]) -> impl Iterator<Item = Netns> {
    let pinned = folders.iter().flat_map(|folder| entries(folder));
    let of_processes = entries(Path::new("/proc"))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            name.iter().all(u8::is_ascii_digit)
        })
        .map(|process| process.join("ns/net"));
    let mut seen = HashSet::new();
    let candidates: Vec<PathBuf> = of_processes
        .chain(pinned)
        .filter(|path| {
            let identity = fs::metadata(path).map(|file| (file.dev(), file.ino()));
            identity.is_ok_and(|identity| seen.insert(identity))
        })
        .collect();
    candidates.into_iter().filter_map(|path| Netns::open(&path).ok())
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

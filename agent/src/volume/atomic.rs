//! Files that change all at once while they are being read.
//!
//! ```text
//! config/..2026_11_20_10_00_00.123456789/app.conf
//! config/..data -> ..2026_11_20_10_00_00.123456789      replaced by rename: the switch
//! config/app.conf -> ..data/app.conf                     what the container opens
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use super::ownership;

const DATA: &str = "..data";
const DATA_TEMP: &str = "..data_tmp";

/// One file: its content and mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    pub mode: u32,
    pub data: Vec<u8>,
}

/// Relative path to file.
pub type Files = BTreeMap<String, File>;

/// A step that the file system refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {path}")]
pub struct AtomicError {
    pub step: &'static str,
    pub path: PathBuf,
    #[source]
    pub source: io::Error,
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AtomicError {
    let path = path.to_owned();
    move |source| AtomicError { step, path, source }
}

/// Whether a relative path may be written: no `..` anywhere, no absolute path, no name that starts with `..`.
pub fn is_safe(path: &str) -> bool {
    let mut parts = Path::new(path).components().peekable();
    parts.peek().is_some()
        && path.len() <= 4096
        && parts.enumerate().all(|(index, part)| match part {
            Component::Normal(name) => index > 0 || !name.to_string_lossy().starts_with(".."),
            _ => false,
        })
}

/// Makes `dir` show exactly `files`. Writes nothing when it does already, except links that somebody removed.
///
/// # Errors
/// The first step that failed. Readers then still see the old content as a whole.
pub fn publish(dir: &Path, files: &Files, fs_group: Option<u32>) -> Result<(), AtomicError> {
    let old = fs::read_link(dir.join(DATA)).ok().filter(|old| is_version(old));
    if let Some(old) = &old
        && shows(&dir.join(old), files)
    {
        return link_files(dir, files);
    }
    let stamp = version_name(dir);
    let version = dir.join(&stamp);
    let written = write_version(&version, files).and_then(|()| match fs_group {
        Some(group) => {
            ownership::apply(&version, group, true).map_err(failed("set the group of", &version))
        }
        None => Ok(()),
    });
    if let Err(error) = written {
        // A copy of a Secret must not stay behind, and a full disk must not fill further with each retry.
        drop(fs::remove_dir_all(&version));
        return Err(error);
    }
    let temp = dir.join(DATA_TEMP);
    remove_if_there(&temp).map_err(failed("remove", &temp))?;
    symlink(&stamp, &temp).map_err(failed("link", &temp))?;
    fs::rename(&temp, dir.join(DATA)).map_err(failed("switch", dir))?;
    link_files(dir, files)?;
    remove_stale(dir, &stamp, files)
}

/// Whether `..data` names a version of ours. Anything else was put there by somebody else, and is not looked at.
fn is_version(target: &Path) -> bool {
    let mut parts = target.components();
    let name = match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) => name.to_string_lossy(),
        _ => return false,
    };
    name.starts_with("..2") && name != DATA
}

fn write_version(version: &Path, files: &Files) -> Result<(), AtomicError> {
    fs::create_dir(version).map_err(failed("make", version))?;
    fs::set_permissions(version, fs::Permissions::from_mode(0o755))
        .map_err(failed("set the mode of", version))?;
    for (name, file) in files {
        let path = version.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(failed("make", parent))?;
        }
        write_file(&path, file).map_err(failed("write", &path))?;
    }
    Ok(())
}

/// Not fsynced: the content is written anew at every start of a pod.
fn write_file(path: &Path, file: &File) -> io::Result<()> {
    use std::io::Write as _;
    let mut handle = fs::OpenOptions::new().write(true).create_new(true).open(path)?;
    handle.write_all(&file.data)?;
    handle.set_permissions(fs::Permissions::from_mode(file.mode & 0o777))
}

fn shows(version: &Path, files: &Files) -> bool {
    let Ok(present) = list(version, Path::new("")) else { return false };
    present.len() == files.len()
        && files.iter().all(|(name, file)| {
            let path = version.join(name);
            present.contains(name)
                && fs::read(&path).is_ok_and(|data| data == file.data)
                && fs::metadata(&path)
                    .is_ok_and(|m| m.permissions().mode() & file.mode == file.mode)
        })
}

fn list(root: &Path, below: &Path) -> io::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let name = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            found.extend(list(root, &name)?);
        } else {
            found.insert(name.to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

/// The user sees links into `..data`, one per first path component.
fn link_files(dir: &Path, files: &Files) -> Result<(), AtomicError> {
    for name in first_components(files) {
        let path = dir.join(&name);
        let target = Path::new(DATA).join(&name);
        if fs::read_link(&path).is_ok_and(|found| found == target) {
            continue;
        }
        remove_if_there(&path).map_err(failed("remove", &path))?;
        symlink(&target, &path).map_err(failed("link", &path))?;
    }
    Ok(())
}

fn first_components(files: &Files) -> BTreeSet<String> {
    files.keys().filter_map(|name| name.split('/').next()).map(str::to_owned).collect()
}

fn remove_stale(dir: &Path, current: &str, files: &Files) -> Result<(), AtomicError> {
    let keep = first_components(files);
    for entry in fs::read_dir(dir).map_err(failed("read", dir))? {
        let entry = entry.map_err(failed("read", dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let (path, old_version) = (entry.path(), name.starts_with("..") && name != DATA);
        if name == DATA || name == current || keep.contains(&name) {
            continue;
        }
        let link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        let removed = match (link, old_version) {
            (true, _) => fs::remove_file(&path),
            (false, true) => fs::remove_dir_all(&path),
            // Nothing of ours.
            (false, false) => Ok(()),
        };
        removed.map_err(failed("remove", &path))?;
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn version_name(dir: &Path) -> String {
    let now = jiff::Timestamp::now();
    let base = now.strftime("..%Y_%m_%d_%H_%M_%S.%9f").to_string();
    let free = |name: &String| !dir.join(name).exists();
    std::iter::once(base.clone())
        .chain((1..u32::MAX).map(|n| format!("{base}{n}")))
        .find(free)
        .unwrap_or(base)
}

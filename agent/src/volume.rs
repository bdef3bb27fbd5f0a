//! Volumes: what a pod's manifest calls by name becomes a folder on the node.
//!
//! ```text
//! <root>/pods/<uid>/volumes/kubernetes.io~empty-dir/<name>        a folder or a tmpfs
//!                          /kubernetes.io~configmap/<name>        ..data -> ..<time>, files are links into ..data
//!                  /volume-subpaths/<volume>/<container>/<index>  bind mounts of what a subPath names
//!                  /etc-hosts
//! ```
//! Everything here is idempotent and asks the file system, not memory, what is there; so it works the same after a restart.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, HostPathVolumeSource, Pod, Volume};

pub mod atomic;
pub mod content;
pub mod hostpath;
pub mod ownership;
pub mod subpath;
pub mod teardown;

use crate::cgroup::resources;
use crate::pod::spec;
pub use content::{ContentContext, Tokens};

/// Why a volume cannot be had now. Most heal: the object appears, the disk gets room.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("volume \"{volume}\": cannot {step} {path}")]
    Io { volume: String, step: &'static str, path: PathBuf, source: io::Error },
    #[error("volume \"{volume}\": {source}")]
    Content { volume: String, source: content::ContentError },
    #[error("volume \"{volume}\": hostPath {path} {problem}")]
    HostPath { volume: String, path: PathBuf, problem: String },
    #[error("volume \"{volume}\": {kind} volumes are not supported by this node")]
    Unsupported { volume: String, kind: String },
}

/// Where each volume of a pod is, by name.
pub type Mounted = BTreeMap<String, PathBuf>;

/// One pod's volumes.
#[derive(Debug, Clone)]
pub struct PodVolumes {
    /// `<root>/pods/<uid>`.
    pub pod_dir: PathBuf,
}

impl PodVolumes {
    pub fn new(root_dir: &Path, uid: &str) -> Self {
        Self { pod_dir: root_dir.join("pods").join(uid) }
    }

    /// Makes every volume, or brings it up to date. Blocks; idempotent.
    ///
    /// # Errors
    /// The first volume that cannot be had.
    pub fn ensure(&self, pod: &Pod, context: &ContentContext) -> Result<Mounted, VolumeError> {
        let volumes = spec::spec(pod).and_then(|s| s.volumes.as_deref()).unwrap_or_default();
        let mut mounted = Mounted::new();
        for volume in volumes {
            let path = self.ensure_one(pod, volume, context)?;
            mounted.insert(volume.name.clone(), path);
        }
        Ok(mounted)
    }

    fn ensure_one(
        &self,
        pod: &Pod,
        volume: &Volume,
        context: &ContentContext,
    ) -> Result<PathBuf, VolumeError> {
        if let Some(host_path) = &volume.host_path {
            return ensure_host_path(&volume.name, host_path);
        }
        let path = self.volume_dir(volume)?;
        if let Some(empty_dir) = &volume.empty_dir {
            self.ensure_empty_dir(pod, volume, empty_dir, &path)?;
            return Ok(path);
        }
        let files = content::files(pod, volume, context)
            .map_err(|source| VolumeError::Content { volume: volume.name.clone(), source })?;
        make_dir(&volume.name, &path, 0o755)?;
        keep_in_memory(&path).map_err(|source| VolumeError::Io {
            volume: volume.name.clone(),
            step: "mount a tmpfs on",
            path: path.clone(),
            source,
        })?;
        let fs_group = fs_group(pod);
        atomic::publish(&path, &files, fs_group).map_err(|e| VolumeError::Io {
            volume: volume.name.clone(),
            step: e.step,
            path: e.path,
            source: e.source,
        })?;
        Ok(path)
    }

    fn volume_dir(&self, volume: &Volume) -> Result<PathBuf, VolumeError> {
        let plugin = plugin(volume).map_err(|kind| {
            let volume = volume.name.clone();
            VolumeError::Unsupported { volume, kind }
        })?;
        Ok(self.pod_dir.join("volumes").join(format!("kubernetes.io~{plugin}")).join(&volume.name))
    }

    fn ensure_empty_dir(
        &self,
        pod: &Pod,
        volume: &Volume,
        source: &EmptyDirVolumeSource,
        path: &Path,
    ) -> Result<(), VolumeError> {
        match source.medium.as_deref().unwrap_or_default() {
            "" | "Memory" => {}
            other => {
                let kind = format!("emptyDir with medium {other}");
                return Err(VolumeError::Unsupported { volume: volume.name.clone(), kind });
            }
        }
        // The marker says that the folder is complete: made, mounted and owned as wanted.
        let marker =
            self.pod_dir.join("plugins/kubernetes.io~empty-dir").join(&volume.name).join("ready");
        let memory = source.medium.as_deref() == Some("Memory");
        let io = |step, path: &Path| {
            let (volume, path) = (volume.name.clone(), path.to_owned());
            move |source| VolumeError::Io { volume, step, path, source }
        };
        let in_place = !memory || teardown::is_mount_point(path).map_err(io("look at", path))?;
        if marker.exists() && path.is_dir() && in_place {
            return Ok(());
        }
        make_dir(&volume.name, path, 0o777)?;
        if memory && !in_place {
            mount_tmpfs(path, tmpfs_size(pod, source)).map_err(io("mount a tmpfs on", path))?;
            set_mode(path, 0o777).map_err(io("set the mode of", path))?;
        }
        if let Some(group) = fs_group(pod) {
            ownership::apply(path, group, false).map_err(io("set the group of", path))?;
        }
        if let Some(parent) = marker.parent() {
            std::fs::create_dir_all(parent).map_err(io("make", parent))?;
        }
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&marker)
            .map(drop)
            .map_err(io("write", &marker))
    }
}

/// kubelet's names of the volume plugins; they are part of the paths that node tools know.
fn plugin(volume: &Volume) -> Result<&'static str, String> {
    if volume.empty_dir.is_some() {
        return Ok("empty-dir");
    }
    if volume.config_map.is_some() {
        return Ok("configmap");
    }
    if volume.secret.is_some() {
        return Ok("secret");
    }
    if volume.downward_api.is_some() {
        return Ok("downward-api");
    }
    if volume.projected.is_some() {
        return Ok("projected");
    }
    let fields = serde_json::to_value(volume).unwrap_or_default();
    let kind = fields.as_object().and_then(|m| m.keys().find(|k| *k != "name").cloned());
    Err(kind.unwrap_or_else(|| "sourceless".into()))
}

/// Volume sources that this node cannot mount, by volume: found at admission, so that a pod waits with a clear reason.
pub fn is_supported(volume: &Volume) -> bool {
    volume.host_path.is_some() || plugin(volume).is_ok()
}

fn ensure_host_path(volume: &str, source: &HostPathVolumeSource) -> Result<PathBuf, VolumeError> {
    let path = PathBuf::from(&source.path);
    hostpath::check(&path, source.type_.as_deref().unwrap_or_default()).map_err(|problem| {
        VolumeError::HostPath { volume: volume.to_owned(), path: path.clone(), problem }
    })?;
    Ok(path)
}

fn fs_group(pod: &Pod) -> Option<u32> {
    let group = spec::spec(pod)?.security_context.as_ref()?.fs_group?;
    u32::try_from(group).ok()
}

fn tmpfs_size(pod: &Pod, source: &EmptyDirVolumeSource) -> Option<i64> {
    let wanted = source.size_limit.as_ref().and_then(resources::whole).filter(|v| *v > 0);
    let pod_limit = resources::pod_resources(pod, None).memory_limit_bytes.filter(|v| *v > 0);
    match (wanted, pod_limit) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn mount_tmpfs(path: &Path, size: Option<i64>) -> io::Result<()> {
    use nix::mount::{MsFlags, mount};
    let options = match size {
        Some(size) => format!("mode=777,size={size}"),
        None => "mode=777".to_owned(),
    };
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
        .map_err(io::Error::from)
}

/// Mounts a tmpfs on the folder of a volume whose content comes from the API: Secrets and tokens must not reach a disk,
/// where a backup or the next owner of the disk finds them. After a reboot the content is written again.
fn keep_in_memory(path: &Path) -> io::Result<()> {
    use nix::mount::{MsFlags, mount};
    let above = path.parent().unwrap_or(path);
    let mounted = std::fs::metadata(path)?.dev() != std::fs::metadata(above)?.dev();
    // A version before tmpfs made it, and running containers have that folder: their tokens must go on being renewed.
    let in_use = std::fs::read_dir(path)?.next().is_some();
    if mounted || in_use || !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some("mode=755")).map_err(io::Error::from)
}

fn make_dir(volume: &str, path: &Path, mode: u32) -> Result<(), VolumeError> {
    let io = |step| {
        let (volume, path) = (volume.to_owned(), path.to_owned());
        move |source| VolumeError::Io { volume, step, path, source }
    };
    if !path.is_dir() {
        std::fs::create_dir_all(path).map_err(io("make"))?;
    }
    // After a umask the folder may have fewer rights than asked for.
    let current = std::fs::metadata(path).map_err(io("look at"))?.permissions().mode() & 0o777;
    if current != mode {
        set_mode(path, mode).map_err(io("set the mode of"))?;
    }
    Ok(())
}

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests;

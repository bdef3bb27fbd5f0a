//! Users and groups of an image, read from its layers without mounting them.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use keelson_procfs::{groups, users};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

use super::RuntimeError;
use super::types::ContainerSecurity;

/// Larger files are not what `/etc/passwd` is.
const MAX_FILE: u64 = 1 << 20;

/// The layers of a container's root file system, the topmost first.
pub(crate) struct RootFs {
    layers: Vec<PathBuf>,
}

impl RootFs {
    /// From what a snapshotter wants mounted: an overlay's `lowerdir` option, or one bind mount.
    pub(crate) fn of(mounts: &[Mount]) -> RootFs {
        let mut layers = Vec::new();
        for mount in mounts {
            let lower = mount.options.iter().find_map(|option| option.strip_prefix("lowerdir="));
            match lower {
                Some(folders) => layers.extend(folders.split(':').map(PathBuf::from)),
                None => layers.push(PathBuf::from(&mount.source)),
            }
        }
        RootFs { layers }
    }

    /// The file of the topmost layer that has it. Links in an image cannot lead out of it, and a name that is there but is
    /// no regular file ends the search: a whiteout hides what is below, and nothing else is opened, since opening a
    /// device or a pipe can do things.
    fn read(&self, path: &str) -> Vec<u8> {
        let found = self.layers.iter().map(|layer| look_up(layer, path)).find(|found| {
            // A file or a whiteout in the place of a folder hides what is below, too.
            !matches!(found, Err(error) if error.kind() == io::ErrorKind::NotFound)
        });
        match found {
            Some(Ok(found)) => read_regular(&found).unwrap_or_default(),
            _ => Vec::new(),
        }
    }
}

/// A descriptor that stands for the file and does not open it.
fn look_up(layer: &Path, path: &str) -> io::Result<File> {
    let root = File::open(layer)?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_IN_ROOT);
    Ok(openat2(&root, path, how)?.into())
}

/// The content of a regular file, up to a limit; of anything else nothing.
fn read_regular(found: &File) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    if found.metadata()?.is_file() {
        let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
        file.take(MAX_FILE).read_to_end(&mut content)?;
    }
    Ok(content)
}

/// Who a container's process is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

/// Resolves the image's `USER` under the pod's security context.
///
/// # Errors
/// When a name is not in the image, or `runAsNonRoot` does not hold or cannot be decided.
pub(crate) fn resolve(
    image_user: &str,
    security: &ContainerSecurity,
    root: &RootFs,
) -> Result<User, RuntimeError> {
    let (passwd, group) = (root.read("etc/passwd"), root.read("etc/group"));
    let mut user = from_files(image_user, security, &passwd, &group)?;
    for extra in &security.supplemental_groups {
        user.groups.push(id(*extra, "supplementalGroups")?);
    }
    user.groups.push(user.gid);
    user.groups.sort_unstable();
    user.groups.dedup();
    Ok(user)
}

pub(crate) fn from_files(
    image_user: &str,
    security: &ContainerSecurity,
    passwd: &[u8],
    group: &[u8],
) -> Result<User, RuntimeError> {
    let (user_part, group_part) = image_user.split_once(':').unwrap_or((image_user, ""));
    let wanted = match security.run_as_user {
        Some(uid) => uid.to_string(),
        None => user_part.to_owned(),
    };
    let numeric = wanted.is_empty() || wanted.parse::<u32>().is_ok();
    if security.run_as_non_root && !numeric {
        return Err(RuntimeError::invalid(format!(
            "container has runAsNonRoot and image has non-numeric user ({wanted}), cannot verify user is non-root"
        )));
    }
    let uid: Option<u32> = wanted.parse().ok();
    let entry = users(passwd).find(|user| match uid {
        Some(uid) => user.uid == uid,
        None if numeric => user.uid == 0,
        None => user.name == wanted.as_bytes(),
    });
    let uid = match (&entry, numeric) {
        (Some(user), _) => user.uid,
        (None, true) => wanted.parse().unwrap_or(0),
        (None, false) => {
            return Err(RuntimeError::invalid(format!(
                "unable to find user {wanted} in the image's /etc/passwd"
            )));
        }
    };
    if security.run_as_non_root && uid == 0 {
        return Err(RuntimeError::invalid(
            "container has runAsNonRoot and image will run as root".to_owned(),
        ));
    }
    let gid = match (security.run_as_group, group_part, &entry) {
        (Some(gid), _, _) => id(gid, "runAsGroup")?,
        (None, "", Some(user)) => user.gid,
        (None, "", _) => 0,
        (None, name, _) if security.run_as_user.is_none() => group_id(name, group)?,
        (None, _, _) => 0,
    };
    let counting = entry.as_ref().filter(|_| !security.strict_groups);
    let groups = counting.map(|user| groups_of(user.name, group)).unwrap_or_default();
    let home = entry.as_ref().map_or(Cow::Borrowed("/"), |user| String::from_utf8_lossy(user.home));
    Ok(User { uid, gid, groups, home: home.into_owned() })
}

fn groups_of(user: &[u8], group: &[u8]) -> Vec<u32> {
    groups(group).filter(|group| group.members.contains(&user)).map(|group| group.gid).collect()
}

fn group_id(name: &str, group: &[u8]) -> Result<u32, RuntimeError> {
    if let Ok(gid) = name.parse() {
        return Ok(gid);
    }
    let entry = groups(group).find(|group| group.name == name.as_bytes());
    entry.map(|group| group.gid).ok_or_else(|| {
        RuntimeError::invalid(format!("unable to find group {name} in the image's /etc/group"))
    })
}

fn id(value: i64, what: &str) -> Result<u32, RuntimeError> {
    u32::try_from(value)
        .map_err(|_| RuntimeError::invalid(format!("{what} {value} is no user or group id")))
}

/// The number of `SIGTERM`, `TERM` or `15`; SIGTERM for anything else.
pub(crate) fn signal_number(name: &str) -> u32 {
    use std::str::FromStr;
    const SIGTERM: u32 = libc::SIGTERM.cast_unsigned();
    if let Ok(number) = name.parse::<u32>() {
        return if (1..=64).contains(&number) { number } else { SIGTERM };
    }
    let upper = name.to_ascii_uppercase();
    let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    if let Some(offset) = full.strip_prefix("SIGRTMIN+").and_then(|n| n.parse::<u32>().ok()) {
        return 34 + offset.min(30);
    }
    nix::sys::signal::Signal::from_str(&full)
        .map_or(SIGTERM, |signal| (signal as i32).cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001:web:/home/web:/bin/sh\n";
    const GROUP: &[u8] = b"root:x:0:\nstaff:x:50:web,other\nweb:x:1001:\n";

    fn check(image_user: &str, security: &ContainerSecurity, want: (u32, u32, &[u32])) {
        let user = from_files(image_user, security, PASSWD, GROUP).unwrap();
        assert_eq!(
            (user.uid, user.gid, user.groups.as_slice()),
            want,
            "{image_user:?} {security:?}"
        );
    }

    #[test]
    fn image_users_by_name_number_and_group() {
        let plain = ContainerSecurity::default();
        check("", &plain, (0, 0, &[]));
        check("web", &plain, (1000, 1001, &[50]));
        check("1000", &plain, (1000, 1001, &[50]));
        let strict = ContainerSecurity { strict_groups: true, ..Default::default() };
        check("web", &strict, (1000, 1001, &[]));
        check("web:staff", &plain, (1000, 50, &[50]));
        check("4242", &plain, (4242, 0, &[]));
        check("4242:7", &plain, (4242, 7, &[]));
        assert!(from_files("nobody", &plain, PASSWD, GROUP).is_err());
    }

    #[test]
    fn the_pod_beats_the_image_and_root_can_be_forbidden() {
        let user = ContainerSecurity {
            run_as_user: Some(1000),
            run_as_group: Some(3),
            ..Default::default()
        };
        check("root", &user, (1000, 3, &[50]));
        let strict = ContainerSecurity { run_as_non_root: true, ..Default::default() };
        assert!(
            from_files("", &strict, PASSWD, GROUP)
                .unwrap_err()
                .to_string()
                .contains("will run as root")
        );
        assert!(
            from_files("web", &strict, PASSWD, GROUP)
                .unwrap_err()
                .to_string()
                .contains("non-numeric")
        );
        check("1000", &strict, (1000, 1001, &[50]));
    }

    #[test]
    fn a_pipe_or_a_whiteout_in_the_place_of_passwd_is_not_opened_and_hides_lower_layers() {
        let dir = tempfile::tempdir().unwrap();
        let layers: Vec<PathBuf> = ["top", "low"].map(|name| dir.path().join(name)).into();
        for layer in &layers {
            std::fs::create_dir_all(layer.join("etc")).unwrap();
        }
        std::fs::write(layers[1].join("etc/passwd"), PASSWD).unwrap();
        let root = RootFs { layers: layers.clone() };
        assert_eq!(root.read("etc/passwd"), PASSWD);
        // Opening it would wait for a writer for ever.
        nix::unistd::mkfifo(&layers[0].join("etc/passwd"), Mode::S_IRWXU).unwrap();
        assert_eq!(root.read("etc/passwd"), b"");
        std::fs::remove_file(layers[0].join("etc/passwd")).unwrap();
        std::os::unix::fs::symlink("/etc/other", layers[0].join("etc/passwd")).unwrap();
        std::fs::write(layers[0].join("etc/other"), "a:x:1:2:::\n").unwrap();
        assert_eq!(root.read("etc/passwd"), b"a:x:1:2:::\n", "links stay in the layer");
    }

    #[test]
    fn signals_by_name_and_number() {
        for (text, want) in
            [("SIGQUIT", 3), ("int", 2), ("9", 9), ("", 15), ("SIGRTMIN+3", 37), ("x", 15)]
        {
            assert_eq!(signal_number(text), want, "{text}");
        }
    }
}

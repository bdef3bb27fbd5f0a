//! Users and groups of an image, read from its layers without mounting them.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use containerd_client::types::Mount;
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

    /// The file of the topmost layer that has it. Links in an image cannot lead out of it.
    fn read(&self, path: &str) -> Option<String> {
        self.layers.iter().find_map(|layer| {
            let root = File::open(layer).ok()?;
            let how = OpenHow::new()
                .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
                .mode(Mode::empty())
                .resolve(ResolveFlag::RESOLVE_IN_ROOT);
            let file = File::from(openat2(&root, path, how).ok()?);
            let mut text = String::new();
            file.metadata().ok().filter(std::fs::Metadata::is_file)?;
            file.take(MAX_FILE).read_to_string(&mut text).ok()?;
            Some(text)
        })
    }
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
    let passwd = root.read("etc/passwd").unwrap_or_default();
    let group = root.read("etc/group").unwrap_or_default();
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
    passwd: &str,
    group: &str,
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
    let entry = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() > 5 && if numeric { fields[2] == wanted.as_str() } else { fields[0] == wanted }
    });
    let uid = match (&entry, numeric) {
        (Some(fields), _) => parse(fields[2], "uid")?,
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
        (None, "", Some(fields)) if security.run_as_user.is_none() || fields.len() > 3 => {
            parse(fields[3], "gid")?
        }
        (None, "", _) => 0,
        (None, name, _) if security.run_as_user.is_none() => group_id(name, group)?,
        (None, _, _) => 0,
    };
    let name = entry.as_ref().map(|fields| fields[0]).unwrap_or_default();
    let groups = if name.is_empty() { Vec::new() } else { groups_of(name, group) };
    let home = entry.as_ref().map_or("/", |fields| fields[5]).to_owned();
    Ok(User { uid, gid, groups, home })
}

fn groups_of(user: &str, group: &str) -> Vec<u32> {
    group
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .filter(|fields| fields.len() > 3 && fields[3].split(',').any(|member| member == user))
        .filter_map(|fields| fields[2].parse().ok())
        .collect()
}

fn group_id(name: &str, group: &str) -> Result<u32, RuntimeError> {
    if let Ok(gid) = name.parse() {
        return Ok(gid);
    }
    let entry = group
        .lines()
        .map(|l| l.split(':').collect::<Vec<_>>())
        .find(|f| f.len() > 2 && f[0] == name);
    match entry {
        Some(fields) => parse(fields[2], "gid"),
        None => Err(RuntimeError::invalid(format!(
            "unable to find group {name} in the image's /etc/group"
        ))),
    }
}

fn parse(text: &str, what: &str) -> Result<u32, RuntimeError> {
    text.parse()
        .map_err(|_| RuntimeError::invalid(format!("{what} {text:?} in the image is not a number")))
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

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001:web:/home/web:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:web,other\nweb:x:1001:\n";

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
    fn signals_by_name_and_number() {
        for (text, want) in
            [("SIGQUIT", 3), ("int", 2), ("9", 9), ("", 15), ("SIGRTMIN+3", 37), ("x", 15)]
        {
            assert_eq!(signal_number(text), want, "{text}");
        }
    }
}

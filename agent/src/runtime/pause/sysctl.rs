//! A pod's sysctls: which of them belong to its namespaces, and where they are written.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

/// Those of the System V IPC namespace (namespaces(7), as OCI runtimes have it).
const IPC: [&str; 8] =
    ["msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"];

/// Which namespaces a pod has for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Own {
    pub network: bool,
    pub ipc: bool,
}

/// Where each value goes, or why a name cannot be set for a single pod. Whatever is not known to be the pod's own would
/// change the node.
pub(crate) fn files(
    wanted: &BTreeMap<String, String>,
    own: Own,
) -> Result<Vec<(PathBuf, String)>, String> {
    wanted
        .iter()
        .map(|(name, value)| {
            let file = file(name, own).map_err(|why| format!("sysctl {name:?} {why}"))?;
            Ok((file, value.clone()))
        })
        .collect()
}

fn file(name: &str, own: Own) -> Result<PathBuf, &'static str> {
    // As sysctl(8): whichever separator comes first is the separator, the other one is part of a name.
    let parts: Vec<String> = match name.find(['.', '/']).map(|at| &name[at..=at]) {
        Some("/") => name.split('/').map(str::to_owned).collect(),
        _ => name.split('.').map(|part| part.replace('/', ".")).collect(),
    };
    if parts.iter().any(|part| part.is_empty() || part == "." || part == "..") {
        return Err("is not a sysctl's name");
    }
    match parts.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["net", ..] if own.network => {}
        ["net", ..] => return Err("cannot be set for a pod with hostNetwork: it is the node's"),
        ["kernel", key] if IPC.contains(&key) && own.ipc => {}
        ["fs", "mqueue", _] if own.ipc => {}
        ["kernel", key] if IPC.contains(&key) => {
            return Err("cannot be set for a pod with hostIPC: it is the node's");
        }
        ["fs", "mqueue", _] => {
            return Err("cannot be set for a pod with hostIPC: it is the node's");
        }
        // The host name has its own field.
        ["kernel", "domainname"] if own.network => {}
        _ => return Err("is not namespaced: it would be set for the whole node"),
    }
    Ok(parts.iter().fold(PathBuf::from("/proc/sys"), |path, part| path.join(part)))
}

/// Writes them, from a thread that is in the pod's namespaces.
pub(crate) fn write(files: &[(PathBuf, String)]) -> io::Result<()> {
    for (file, value) in files {
        fs::write(file, value).map_err(|error| {
            io::Error::new(error.kind(), format!("sysctl {} = {value:?}: {error}", file.display()))
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Own = Own { network: true, ipc: true };

    #[test]
    fn only_what_belongs_to_the_pod_can_be_set() {
        for (name, path) in [
            ("net.core.somaxconn", "/proc/sys/net/core/somaxconn"),
            ("net/ipv4/conf/eth0.1/forwarding", "/proc/sys/net/ipv4/conf/eth0.1/forwarding"),
            ("net.ipv4.conf.eth0/1.forwarding", "/proc/sys/net/ipv4/conf/eth0.1/forwarding"),
            ("kernel.shm_rmid_forced", "/proc/sys/kernel/shm_rmid_forced"),
            ("fs.mqueue.msg_max", "/proc/sys/fs/mqueue/msg_max"),
        ] {
            assert_eq!(file(name, ALL), Ok(PathBuf::from(path)), "{name}");
        }
        for name in [
            "kernel.core_pattern",
            "vm.swappiness",
            "net/../kernel/core_pattern",
            "net..core",
            "kernel.sem.x",
            "",
        ] {
            assert!(file(name, ALL).is_err(), "{name}");
        }
        assert!(file("net.core.somaxconn", Own { network: false, ipc: true }).is_err());
        assert!(file("kernel.sem", Own { network: true, ipc: false }).is_err());
        let error = files(&[("vm.x".to_owned(), "1".to_owned())].into(), ALL).unwrap_err();
        assert!(error.contains("vm.x") && error.contains("whole node"), "{error}");
    }
}

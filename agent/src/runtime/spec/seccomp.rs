//! Seccomp profiles: our `RuntimeDefault`, and those that an operator put on the node.

use std::fs;
use std::path::{Component, Path};

use serde_json::{Value, json};

use super::super::RuntimeError;

/// What `RuntimeDefault` forbids: system calls that reach the machine rather than the container, by capability-gated
/// or seldom audited paths. A list of what is forbidden makes a program of a hundred instructions instead of a
/// thousand, which every system call of the container has to run through.
const FORBIDDEN: &[&str] = &[
    "acct",
    "add_key",
    "bpf",
    "clock_adjtime",
    "clock_settime",
    "create_module",
    "delete_module",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "get_kernel_syms",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kcmp",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "mbind",
    "migrate_pages",
    "mount",
    "mount_setattr",
    "move_mount",
    "move_pages",
    "name_to_handle_at",
    "nfsservctl",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "personality",
    "pivot_root",
    "process_vm_readv",
    "process_vm_writev",
    "query_module",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "request_key",
    "set_mempolicy",
    "setdomainname",
    "sethostname",
    "setns",
    "settimeofday",
    "stime",
    "swapoff",
    "swapon",
    "_sysctl",
    "sysfs",
    "syslog",
    "umount",
    "umount2",
    "unshare",
    "uselib",
    "userfaultfd",
    "ustat",
    "vhangup",
    "vm86",
    "vm86old",
];

/// The profile of `seccompProfile: {type: RuntimeDefault}`.
pub(super) fn runtime_default() -> Value {
    // clone(2) with any CLONE_NEW* flag makes namespaces; clone3 cannot be looked into and answers ENOSYS, on which
    // libraries fall back to clone.
    const NEW_NAMESPACES: u64 = 0x7E02_0000;
    let mut rules = vec![
        json!({ "names": FORBIDDEN, "action": "SCMP_ACT_ERRNO", "errnoRet": 1 }),
        json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }),
        json!({ "names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 97,
            "args": [{ "index": 0, "value": libc::AF_VSOCK, "op": "SCMP_CMP_EQ" }] }),
    ];
    rules.extend(namespace_flags(NEW_NAMESPACES));
    json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures(), "syscalls": rules })
}

/// One rule per flag: libseccomp compares the masked value with one number.
fn namespace_flags(mask: u64) -> impl Iterator<Item = Value> {
    (0..u64::BITS).map(|bit| 1_u64 << bit).filter(move |flag| mask & flag != 0).map(|flag| {
        json!({ "names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
            "args": [{ "index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ" }] })
    })
}

fn architectures() -> &'static [&'static str] {
    if cfg!(target_arch = "aarch64") {
        &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
    } else {
        &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    }
}

/// `Localhost/<file>`: a profile below `<root>/seccomp`.
pub(super) fn localhost(profile: &str, root_dir: &Path) -> Result<Value, RuntimeError> {
    let bad = |why: &str| RuntimeError::invalid(format!("seccompProfile {profile:?}: {why}"));
    let name = profile.strip_prefix("Localhost/").ok_or_else(|| {
        bad("expected RuntimeDefault, Unconfined or Localhost with a localhostProfile")
    })?;
    let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    if !inside || name.is_empty() {
        return Err(bad("the file must be below the node's seccomp folder"));
    }
    let path = root_dir.join("seccomp").join(name);
    let text = fs::read(&path).map_err(|e| bad(&format!("cannot read {}: {e}", path.display())))?;
    serde_json::from_slice(&text)
        .map_err(|e| bad(&format!("{} is no seccomp profile: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_of_the_node_cannot_lead_out_of_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["Localhost/../x", "Localhost//etc/passwd", "Localhost/", "Sometimes"] {
            localhost(bad, dir.path()).unwrap_err();
        }
        fs::create_dir(dir.path().join("seccomp")).unwrap();
        fs::write(dir.path().join("seccomp/mine.json"), r#"{"defaultAction":"SCMP_ACT_LOG"}"#)
            .unwrap();
        assert_eq!(
            localhost("Localhost/mine.json", dir.path()).unwrap()["defaultAction"],
            "SCMP_ACT_LOG"
        );
    }

    #[test]
    fn the_default_is_a_valid_profile() {
        let profile: oci_spec::runtime::LinuxSeccomp =
            serde_json::from_value(runtime_default()).unwrap();
        assert!(profile.syscalls().as_ref().unwrap().len() > 8);
    }
}

//! Seccomp profiles: our `RuntimeDefault`, and those that an operator put on the node.

use std::fs;
use std::path::{Component, Path};

use serde_json::{Value, json};

use super::super::RuntimeError;

/// What `RuntimeDefault` forbids: system calls that reach the machine rather than the container. A list of what is
/// forbidden makes a program of a hundred instructions instead of a thousand, which every system call of the container
/// has to run through.
const FORBIDDEN: &[&str] = &[
    "add_key",
    "create_module",
    "get_kernel_syms",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "keyctl",
    "nfsservctl",
    "personality",
    "query_module",
    "request_key",
    "sysfs",
    "_sysctl",
    "uselib",
    "userfaultfd",
    "ustat",
    "vm86",
    "vm86old",
];

/// What is forbidden unless the container has the capability that the kernel asks for as well.
const BY_CAPABILITY: &[(&str, &[&str])] = &[
    ("CAP_BPF", &["bpf"]),
    ("CAP_DAC_READ_SEARCH", &["name_to_handle_at", "open_by_handle_at"]),
    ("CAP_PERFMON", &["perf_event_open"]),
    (
        "CAP_SYS_ADMIN",
        &[
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "pivot_root",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "swapoff",
            "swapon",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    ("CAP_SYS_BOOT", &["kexec_file_load", "kexec_load", "reboot"]),
    ("CAP_SYS_MODULE", &["delete_module", "finit_module", "init_module"]),
    ("CAP_SYS_NICE", &["mbind", "migrate_pages", "move_pages", "set_mempolicy"]),
    ("CAP_SYS_PACCT", &["acct"]),
    ("CAP_SYS_PTRACE", &["kcmp", "process_vm_readv", "process_vm_writev"]),
    ("CAP_SYS_RAWIO", &["ioperm", "iopl"]),
    ("CAP_SYS_TIME", &["clock_adjtime", "clock_settime", "settimeofday", "stime"]),
    ("CAP_SYS_TTY_CONFIG", &["vhangup"]),
    ("CAP_SYSLOG", &["syslog"]),
];

/// The flags of clone(2) that make namespaces.
const NEW_NAMESPACES: u64 = 0x7E02_0000;

/// The profile of `seccompProfile: {type: RuntimeDefault}` for a container with these capabilities.
pub(super) fn runtime_default(capabilities: &[String]) -> Value {
    let has = |wanted: &str| capabilities.iter().any(|capability| capability == wanted);
    let gated = BY_CAPABILITY.iter().filter(|(capability, _)| !has(capability));
    let names: Vec<&str> =
        FORBIDDEN.iter().chain(gated.flat_map(|(_, names)| names.iter())).copied().collect();
    let mut rules = vec![
        json!({ "names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EPERM }),
        json!({ "names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EAFNOSUPPORT,
            "args": [{ "index": 0, "value": libc::AF_VSOCK, "op": "SCMP_CMP_EQ" }] }),
    ];
    if !has("CAP_SYS_ADMIN") {
        // What clone3 is asked for cannot be looked at; on ENOSYS libraries fall back to clone.
        rules.push(
            json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS }),
        );
        rules.extend(namespace_flags(NEW_NAMESPACES));
    }
    json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures(), "syscalls": rules })
}

/// One rule per flag: libseccomp compares the masked value with one number.
fn namespace_flags(mask: u64) -> impl Iterator<Item = Value> {
    (0..u64::BITS).map(|bit| 1_u64 << bit).filter(move |flag| mask & flag != 0).map(|flag| {
        json!({ "names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EPERM,
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
    fn the_default_is_a_valid_profile_and_yields_to_capabilities() {
        let valid = |profile: &Value| {
            serde_json::from_value::<oci_spec::runtime::LinuxSeccomp>(profile.clone()).unwrap();
        };
        let plain = runtime_default(&[]);
        valid(&plain);
        assert!(plain.to_string().contains("\"mount\""));
        let admin = runtime_default(&["CAP_SYS_ADMIN".to_owned()]);
        valid(&admin);
        assert!(!admin.to_string().contains("\"mount\""));
        assert!(admin.to_string().contains("\"init_module\""));
    }
}

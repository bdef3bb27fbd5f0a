//! What the eBPF mode needs of the kernel and of the process, asked for one by one: so that what is missing has a name.

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

use super::error::EbpfError;
use super::sys::{self, AttachType};

/// Fails with a list of what is missing.
pub(crate) fn check() -> Result<(), EbpfError> {
    let missing = missing_rights(&status()?);
    if !missing.is_empty() {
        return Err(EbpfError::Rights { missing: missing.join(", ") });
    }
    lift_memory_limit();
    let missing: Vec<_> = FEATURES.iter().filter(|f| !(f.is_there)()).map(|f| f.name).collect();
    if missing.is_empty() { Ok(()) } else { Err(EbpfError::Lacks { missing: missing.join(", ") }) }
}

fn status() -> Result<String, EbpfError> {
    let path = "/proc/thread-self/status";
    fs::read_to_string(path).map_err(|source| EbpfError::Read { path: path.into(), source })
}

/// Capabilities that the thread with that status needs and has not.
fn missing_rights(status: &str) -> Vec<&'static str> {
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_ADMIN: u64 = 1 << 21;
    const PERFMON: u64 = 1 << 38;
    const BPF: u64 = 1 << 39;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let has = line.and_then(|has| u64::from_str_radix(has.trim(), 16).ok()).unwrap_or(0);
    let needs = [
        ("CAP_BPF", BPF | SYS_ADMIN),
        ("CAP_PERFMON", PERFMON | SYS_ADMIN),
        ("CAP_NET_ADMIN", NET_ADMIN),
        // To look into network namespaces.
        ("CAP_SYS_ADMIN", SYS_ADMIN),
    ];
    needs.into_iter().filter(|(_, any)| has & any == 0).map(|(name, _)| name).collect()
}

/// Before Linux 5.11 maps count as locked memory, of which a process may have next to nothing.
fn lift_memory_limit() {
    let of = Resource::RLIMIT_MEMLOCK;
    if setrlimit(of, RLIM_INFINITY, RLIM_INFINITY).is_ok() {
        return;
    }
    // As much as may be without CAP_SYS_RESOURCE. Newer kernels do not mind.
    let lifted = getrlimit(of).and_then(|(_, most)| setrlimit(of, most, most));
    if let Err(error) = lifted {
        tracing::debug!(%error, "Cannot lift the limit of locked memory");
    }
}

/// Something that older kernels, or others, have not.
struct Feature {
    name: &'static str,
    is_there: fn() -> bool,
}

const FEATURES: [Feature; 5] = [
    Feature { name: "bpf(2)", is_there: || knows_link(AttachType::Connect4, libc::ENOSYS) },
    Feature {
        name: "links of BPF programs to cgroups (Linux 5.7)",
        is_there: || knows_link(AttachType::Connect4, libc::EINVAL),
    },
    Feature { name: "BPF ring buffers (Linux 5.8)", is_there: sys::knows_ring_buffers },
    Feature {
        name: "BPF programs that see sockets close (Linux 5.9)",
        is_there: || knows_link(AttachType::SockRelease, libc::EINVAL),
    },
    Feature {
        name: "BPF programs that find neighbours (Linux 5.10)",
        is_there: || sys::knows_helper(sys::CLASSIFIER, REDIRECT_NEIGH),
    },
];

const REDIRECT_NEIGH: u32 = 152;
const SET_RETVAL: u32 = 187;

/// Whether programs for sockets can say why a call is refused (Linux 6.1).
pub(crate) fn has_set_retval() -> bool {
    sys::knows_helper(sys::ON_CONNECT, SET_RETVAL)
}

/// `unknown` is what the kernel says of what it does not know.
fn knows_link(attach_type: AttachType, unknown: i32) -> bool {
    sys::refusal_of_link(attach_type).raw_os_error() != Some(unknown)
}

#[cfg(test)]
mod tests {
    use super::super::sys;
    use super::{check, missing_rights};

    fn rights(effective: u64) -> Vec<&'static str> {
        missing_rights(&format!("Name:\tproxy\nCapPrm:\t0\nCapEff:\t{effective:016x}\n"))
    }

    #[test]
    fn rights_have_names() {
        assert_eq!(rights(u64::MAX), Vec::<&str>::new());
        assert_eq!(rights(0), ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN", "CAP_SYS_ADMIN"]);
        assert_eq!(rights(1 << 21), ["CAP_NET_ADMIN"]);
        assert_eq!(rights(1 << 12 | 1 << 39), ["CAP_PERFMON", "CAP_SYS_ADMIN"]);
        assert_eq!(rights(1 << 12 | 1 << 38 | 1 << 39), ["CAP_SYS_ADMIN"]);
    }

    #[test]
    fn this_machine_has_all_or_says_what_it_has_not() {
        match check() {
            // Nobody has such a function.
            Ok(()) => assert!(!sys::knows_helper(sys::CLASSIFIER, 1_000_000)),
            Err(error) => assert!(error.to_string().contains("has not: CAP_"), "{error}"),
        }
    }
}

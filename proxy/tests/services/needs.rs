//! What is missing on a node has a name.

use std::os::raw::{c_int, c_ulong};
use std::thread;

use keelson_proxy::diff::Plans;
use keelson_proxy::ebpf::{EbpfConfig, Sockets};
use keelson_proxy::switch::{choose, with_sources};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::stage::*;

rows![
    missing_rights_are_named,
    what_an_old_kernel_lacks_is_named,
    a_place_that_keeps_nothing_is_named,
    a_node_without_cgroup2_gets_one,
    auto_takes_ebpf_only_where_it_does_everything,
];

fn only_ebpf(mode: Mode) {
    if mode != Mode::Ebpf {
        skip("this is about eBPF");
    }
}

/// On a thread that may lose what others keep.
fn aside<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join().unwrap())
}

fn refusal(mode: Mode) -> String {
    with_sources(&mode.probe().unwrap_err())
}

fn missing_rights_are_named(mode: Mode) {
    only_ebpf(mode);
    const NET_ADMIN: u64 = 1 << 12;
    const PERFMON: u64 = 1 << 38;
    const BPF: u64 = 1 << 39;
    for (kept, missing) in [
        (0, "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_SYS_ADMIN"),
        (NET_ADMIN | PERFMON | BPF, "CAP_SYS_ADMIN"),
    ] {
        let said = aside(|| {
            keep_rights(kept);
            refusal(mode)
        });
        assert!(said.ends_with(&format!("has not: {missing}")), "{said}");
    }
}

#[allow(unsafe_code, reason = "nix has no capset(2)")]
fn keep_rights(kept: u64) {
    const VERSION_3: u32 = 0x2008_0522;
    let [low, high] = [kept, kept >> 32].map(|half| (half & 0xffff_ffff) as u32);
    // Version and thread (itself); effective, permitted and inheritable rights, twice 32.
    let (mut header, data) = ([VERSION_3, 0], [low, low, 0, high, high, 0]);
    // SAFETY: the layouts of capset(2).
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), data.as_ptr()) };
    assert_eq!(result, 0);
}

fn what_an_old_kernel_lacks_is_named(mode: Mode) {
    only_ebpf(mode);
    const LINK_CREATE: u32 = 28;
    for (command, errno, wanted) in [
        (None, libc::ENOSYS, "the kernel lacks bpf(2)"),
        (
            Some(LINK_CREATE),
            libc::EINVAL,
            "the kernel lacks links of BPF programs to cgroups (Linux 5.7)",
        ),
    ] {
        let said = aside(|| {
            refuse_bpf(command, errno);
            refusal(mode)
        });
        assert!(said.contains(wanted), "{said}");
    }
}

/// From now on bpf(2), or one command of it, fails on this thread: a kernel that does not know it, played.
#[allow(unsafe_code, reason = "nix has no seccomp filters")]
fn refuse_bpf(command: Option<u32>, errno: c_int) {
    const LOAD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const NUMBER: u32 = 0;
    const FIRST_ARGUMENT: u32 = 16;
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let call = u32::try_from(libc::SYS_bpf).unwrap();
    let mut filter =
        vec![step(LOAD, NUMBER, 0, 0), step(JUMP_IF_EQUAL, call, 1, 0), step(RETURN, ALLOW, 0, 0)];
    if let Some(command) = command {
        filter.push(step(LOAD, FIRST_ARGUMENT, 0, 0));
        filter.push(step(JUMP_IF_EQUAL, command, 1, 0));
        filter.push(step(RETURN, ALLOW, 0, 0));
    }
    filter.push(step(RETURN, ERRNO | errno.unsigned_abs(), 0, 0));
    let program =
        libc::sock_fprog { len: u16::try_from(filter.len()).unwrap(), filter: filter.as_mut_ptr() };
    // SAFETY: the layouts of prctl(2); the filter lives through the call.
    let result = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1 as c_ulong, 0, 0, 0);
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    assert_eq!(result, 0);
}

fn a_place_that_keeps_nothing_is_named(mode: Mode) {
    only_ebpf(mode);
    let node = Node::new(mode);
    let folder = tempfile::tempdir().unwrap();
    let pins = folder.path().join("pins");
    let ebpf = EbpfConfig { pins: pins.clone(), ..node.config.ebpf.clone() };
    let config = BackendConfig { ebpf, ..node.config.clone() };
    let said = node.namespace.run(|| {
        let mut backend = mode.open(config).unwrap();
        with_sources(&backend.adopt(&Plans::new()).unwrap_err())
    });
    let wanted = format!("no BPF file system at {}", pins.display());
    assert!(said.contains(&wanted), "{said}");
}

/// Also beside version 1, which has all controllers then.
fn a_node_without_cgroup2_gets_one(mode: Mode) {
    only_ebpf(mode);
    aside(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        without_cgroups();
        mode.probe().unwrap();
        let cgroups = std::fs::read_dir("/run/keelson-proxy/cgroup2").unwrap();
        assert!(cgroups.count() > 0);
    });
}

/// From now on this thread finds cgroups mounted nowhere.
fn without_cgroups() {
    let (none, private) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    mount(none, "/", none, private, none).unwrap();
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    umount2("/sys/fs/cgroup", MntFlags::MNT_DETACH).unwrap();
}

/// Issue 4, kernels: what is missing keeps `auto` from it, and has a name.
fn auto_takes_ebpf_only_where_it_does_everything(mode: Mode) {
    only_ebpf(mode);
    let node = Node::new(mode);
    let taken = |ebpf: &EbpfConfig| node.namespace.run(|| choose(&Mode::AUTO, ebpf).unwrap());
    let without = |ebpf: &EbpfConfig, gap: &str| {
        let gaps = mode.gaps(ebpf);
        assert!(gaps.iter().any(|said| said.starts_with(gap)), "{gaps:?}");
        assert_eq!(taken(ebpf), Mode::Nftables, "{gap}");
    };
    let all = EbpfConfig { cgroup: None, ..node.config.ebpf.clone() };
    // What this kernel lacks by itself.
    let gaps = mode.gaps(&all);
    let is_usual = |gap: &String| gap.starts_with("the kernel lacks bpf_set_retval");
    assert!(gaps.iter().all(is_usual), "{gaps:?}");
    assert_eq!(taken(&all), if gaps.is_empty() { mode } else { Mode::Nftables });
    // A part of the node's sockets.
    without(&node.config.ebpf, "the node has sockets outside of the cgroup /sys/fs/cgroup/");
    without(&EbpfConfig { sockets: Sockets::None, ..all.clone() }, "sockets are not served");
    // Nothing stays.
    let folder = tempfile::tempdir().unwrap();
    let pins = folder.path().join("pins");
    without(&EbpfConfig { pins, ..all.clone() }, "nothing that is pinned in ");
    // An old kernel.
    aside(|| {
        refuse_bpf(None, libc::ENOSYS);
        assert_eq!(taken(&all), Mode::Nftables);
    });
    // A container, which sees its own part of the cgroups.
    aside(|| {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP).unwrap();
        without_cgroups();
        let gaps = mode.gaps(&all);
        let gap = "the node has sockets outside of the cgroup /run/keelson-proxy/cgroup2";
        assert!(gaps.iter().any(|said| said.starts_with(gap)), "{gaps:?}");
    });
}

//! Installs what a task needs and the machine lacks, from Debian.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{build, shell};

/// A program that a task calls, and the Debian package that has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    program: &'static str,
    package: &'static str,
}

const fn need(program: &'static str, package: &'static str) -> Need {
    Need { program, package }
}

/// For building: protoc compiles containerd's API.
const BUILD: &[Need] = &[need("protoc", "protobuf-compiler"), need("gcc", "gcc")];

/// For running a node and looking at it.
const NODE: &[Need] = &[
    need("containerd", "containerd"),
    need("runc", "runc"),
    need("ip", "iproute2"),
    need("nft", "nftables"),
    need("busybox", "busybox-static"),
    need("kubectl", "kubernetes-client"),
    need("nsenter", "util-linux"),
];

/// For the tests alone.
const TEST: &[Need] = &[
    need("docker-registry", "docker-registry"),
    need("skopeo", "skopeo"),
    need("conntrack", "conntrack"),
    need("iptables-nft-restore", "iptables"),
    need("curl", "curl"),
    need("/usr/lib/cni/loopback", "containernetworking-plugins"),
];

/// For a clock that steps.
const SOAK: &[Need] = &[need("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1", "libfaketime")];

/// For the machine that is emulated.
const VM: &[Need] = &[
    need("qemu-system-x86_64", "qemu-system-x86"),
    need("depmod", "kmod"),
    need("xz", "xz-utils"),
];

/// For the fuzzer, which is written in C++.
const FUZZ: &[Need] = &[need("g++", "g++")];

/// For the BPF programs: a compiler with the library for their target, and what bpf-linker is made of.
const EBPF: &[Need] = &[
    need("/usr/bin/rustc", "rustc-web"),
    need("/usr/lib/rustlib/bpfel-unknown-none", "libstd-rust-web-dev-bpf"),
    need("/usr/lib/llvm-22/bin/llvm-config", "llvm-22-dev"),
    need("/usr/lib/llvm-22/lib/libPolly.a", "libpolly-22-dev"),
    need("/usr/include/zlib.h", "zlib1g-dev"),
    need("/usr/include/zstd.h", "libzstd-dev"),
];

/// What `cargo xtask up` calls.
pub(crate) fn for_up() -> Result<()> {
    install(&[BUILD, NODE].concat())
}

/// What `cargo xtask test` calls.
pub(crate) fn for_test() -> Result<()> {
    install(&[BUILD, NODE, TEST].concat())
}

/// What `cargo xtask soak` calls.
pub(crate) fn for_soak() -> Result<()> {
    install(&[BUILD, NODE, TEST, SOAK].concat())
}

/// What the lane in a virtual machine needs. Without it that lane is skipped, and nothing else.
pub(crate) fn for_vm() -> Result<()> {
    install(VM)
}

/// What `cargo xtask fuzz` calls.
pub(crate) fn for_fuzz() -> Result<()> {
    install(&[BUILD, FUZZ].concat())
}

/// What `cargo xtask ebpf` calls.
pub(crate) fn for_ebpf() -> Result<()> {
    install(EBPF)
}

fn install(needs: &[Need]) -> Result<()> {
    let missing: Vec<Need> = needs.iter().copied().filter(|n| !shell::has(n.program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|n| n.package).collect();
    if !nix::unistd::geteuid().is_root() {
        bail!("missing: {}. Install them or run this as root", packages.join(" "));
    }
    if !shell::has("apt-get") {
        bail!("missing: {}. This machine has no apt-get: install them by hand", packages.join(" "));
    }
    println!("Installing {}", packages.join(" "));
    shell::read(Command::new("apt-get").arg("update"))?;
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive")
        // A package that starts a service would put containerd's bridges on the machine.
        .env("RUNLEVEL", "1")
        .args(["install", "-y", "--no-install-recommends"])
        .args(&packages);
    shell::read(&mut apt).context("installing packages failed")?;
    match missing.iter().find(|n| !shell::has(n.program)) {
        Some(n) => {
            bail!("package {} was installed, but there is still no {}", n.package, n.program)
        }
        None => Ok(()),
    }
}

/// Debian's kubectl, the oldest that keelson supports, beside whichever the machine has.
pub(crate) fn debian_kubectl() -> Result<PathBuf> {
    let folder = build::target_dir().join("debian-kubectl");
    let program = folder.join("usr/bin/kubectl");
    if program.is_file() {
        return Ok(program);
    }
    std::fs::create_dir_all(&folder)?;
    shell::read(
        Command::new("apt-get").current_dir(&folder).args(["download", "kubernetes-client"]),
    )?;
    let package = std::fs::read_dir(&folder)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .context("apt-get downloaded no package")?;
    shell::read(Command::new("dpkg").arg("-x").arg(&package).arg(&folder))?;
    Ok(program)
}

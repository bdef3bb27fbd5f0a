//! Whole nodes in the emulated machine: tests of the node lane where cgroup v2 is all there is, as on Debian 12 and newer.

use std::path::PathBuf;

use anyhow::Result;

use super::cpio::Archive;
use super::{END, Kernel};
use crate::build::{self, Profile};
use crate::install;

/// The tests that run here, by parts of their names: the others do not depend on the kernel, or take long under emulation.
const USUAL: [&str; 3] = ["pods::a_pod_runs", "restart::", "services::a_cluster_ip"];

/// What nodes and tests call, beside keelson's own programs.
const PROGRAMS: &[&str] = &[
    "busybox",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "ip",
    "nft",
    "nsenter",
    "pgrep",
    "runc",
    "setpriv",
];

/// Runs these tests, or the usual ones, in a machine.
///
/// # Errors
/// When a test fails, or the machine does not start or come to an end.
pub(crate) fn run(kernel: &Kernel, tests: &[String]) -> Result<()> {
    let archive = build::target_dir().join("vm-node-initramfs");
    std::fs::write(&archive, initramfs(kernel, tests)?)?;
    super::boot(kernel, &archive, MEMORY)
}

/// MiB: all files of the machine are in memory.
const MEMORY: u32 = 3072;

fn initramfs(kernel: &Kernel, tests: &[String]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["bin", "keelson", "dev", "proc", "sys", "run", "tmp", "var", "lib", "lib64"] {
        archive.folder(folder);
    }
    let mut programs: Vec<(String, PathBuf)> = Vec::new();
    for name in PROGRAMS {
        programs.push((format!("bin/{name}"), super::program(name)?));
    }
    programs.push(("bin/kubectl".into(), install::debian_kubectl()?));
    for (name, path) in own_programs()? {
        programs.push((format!("keelson/{name}"), path));
    }
    super::add_programs(&mut archive, &programs)?;
    super::add_modules(&mut archive, kernel, &["overlay"])?;
    super::add_certificates(&mut archive)?;
    archive.program("init", INIT.as_bytes());
    archive.program("machine", machine(tests).as_bytes());
    Ok(archive.finish())
}

/// keelson's programs and the tests.
fn own_programs() -> Result<Vec<(String, PathBuf)>> {
    let bin = build::node_programs(Profile::Dev)?;
    let mut programs: Vec<(String, PathBuf)> = ["keelson", "keelson-proxy", "keelson-cni"]
        .map(|name| (name.to_owned(), bin.join(name)))
        .into();
    programs.push(("node".into(), super::test_binary("keelson-tests", "node")?));
    for (_, path) in &mut programs {
        *path = super::stripped(path)?;
    }
    Ok(programs)
}

/// Nothing can be pivoted out of the first file system, and runc has to: everything moves to another one.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir /new
/bin/busybox mount -t tmpfs -o mode=755 new /new
for folder in bin keelson dev proc sys run tmp var lib lib64 usr etc modules machine; do
    [ -e /$folder ] && /bin/busybox cp -a /$folder /new/
done
exec /bin/busybox switch_root /new /bin/busybox sh /machine
";

fn machine(tests: &[String]) -> String {
    let usual = USUAL.map(str::to_owned);
    let tests = super::quoted(if tests.is_empty() { &usual } else { tests });
    format!(
        "export PATH=/bin
/bin/busybox --install -s /bin 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm && mount -t devpts -o ptmxmode=666 devpts /dev/pts
mount -t tmpfs run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for module in /modules/*; do insmod $module || echo \"insmod $module failed\"; done
ip link set lo up
hostname machine
export HOME=/tmp KEELSON_BIN_DIR=/keelson
/keelson/node --test-threads=1 {tests}
echo \"{END}$?\"
poweroff -f
"
    )
}

#[cfg(test)]
mod tests {
    use super::machine;

    #[test]
    fn the_machine_says_how_the_tests_ended_and_goes() {
        let script = machine(&[]);
        let end = script.lines().rev().take(2).collect::<Vec<_>>();
        assert_eq!(end, ["poweroff -f", "echo \"keelson-vm: exit code $?\""]);
    }
}

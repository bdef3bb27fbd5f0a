//! The BPF programs in the emulated machine: what its kernel's verifier says of them, and the tests that run each of them.

use std::path::PathBuf;

use anyhow::Result;

use super::{Kernel, MODULES};
use crate::build::{self, Profile};

const PACKAGE: &str = "keelson-ebpf-objects";
const TESTS: [&str; 3] = ["socket", "packet", "xdp"];
/// Left out unless tests are named: many packets, which take minutes here and say nothing of a kernel.
const LONG: [&str; 2] = ["model::", "network::"];

/// Runs these tests, or all but the longest, in a machine.
///
/// # Errors
/// When a test fails, or the machine does not start or come to an end.
pub(crate) fn run(kernel: &Kernel, tests: &[String]) -> Result<()> {
    let archive = build::target_dir().join("vm-programs-initramfs");
    std::fs::write(&archive, initramfs(kernel, tests)?)?;
    super::boot(kernel, &archive, 2048)
}

fn initramfs(kernel: &Kernel, tests: &[String]) -> Result<Vec<u8>> {
    let mut archive = super::root();
    let mut figures = build::cargo("build", Profile::Dev);
    figures.args(["-p", PACKAGE, "--example", "figures"]);
    let mut programs: Vec<(String, PathBuf)> = vec![
        ("bin/busybox".to_owned(), super::program("busybox")?),
        ("bin/figures".to_owned(), super::stripped(&super::executable(&mut figures, "figures")?)?),
    ];
    for name in TESTS {
        programs
            .push((format!("bin/{name}"), super::stripped(&super::test_binary(PACKAGE, name)?)?));
    }
    super::add_programs(&mut archive, &programs)?;
    super::add_modules(&mut archive, kernel, MODULES)?;
    archive.program("init", super::init(&commands(tests)).as_bytes());
    Ok(archive.finish())
}

/// All are run, whether one before failed or not.
fn commands(tests: &[String]) -> String {
    let tests = match tests {
        [] => LONG.map(|module| format!("--skip {module}")).join(" "),
        named => super::quoted(named),
    };
    let mut commands = "ulimit -l unlimited\ncode=0\nfigures || code=$?\n".to_owned();
    // On an old kernel frames made by hand cannot say by which interface they come; those of sockets can.
    commands += "case $(uname -r) in 5.*) only=wire:: ;; *) only= ;; esac\n";
    for name in TESTS {
        let only = if name == "xdp" { "$only" } else { "" };
        commands += &format!("{name} --test-threads=2 {only} {tests} || code=$?\n");
    }
    commands
}

//! `cargo xtask ebpf`: builds the BPF programs, whose objects are part of the repository.
//!
//! A normal build embeds the objects and needs none of this. The result is the same on every machine: compiler,
//! linker and crates are pinned, paths are mapped away, and debug information is cut off except BTF.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{build, install, shell};

const TARGET: &str = "bpfel-unknown-none";
/// Debian's compiler with the library for [`TARGET`], since no rustup toolchain brings one.
const RUSTC: &str = "/usr/bin/rustc";
const RUSTC_VERSION: &str = "1.96.";
/// The LLVM of that compiler.
const LLVM: &str = "/usr/lib/llvm-22";
const LINKER_VERSION: &str = "0.13.0";
/// Each is a program of the crate in `ebpf/programs` and an object in `ebpf/objects`.
const OBJECTS: &[&str] = &["namespace", "packet", "socket", "xdp"];

#[derive(clap::Args)]
pub(crate) struct EbpfArgs {
    /// Change nothing: fail when an object in the repository is not what its source gives
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(args: &EbpfArgs) -> Result<()> {
    install::for_ebpf()?;
    let version = shell::read(Command::new(RUSTC).arg("--version"))?;
    if !version.contains(RUSTC_VERSION) {
        bail!("{RUSTC} is {}, and objects are built with {RUSTC_VERSION}*", version.trim());
    }
    let linker = linker()?;
    compile(&linker)?;
    let mut differ = Vec::new();
    for name in OBJECTS {
        let built = stripped(name)?;
        let kept = shell::root().join(format!("ebpf/objects/{name}.bpf.o"));
        if std::fs::read(&kept).ok().as_deref() == Some(&*built) {
            println!("{name}: as in the repository");
            continue;
        }
        differ.push(*name);
        if !args.check {
            std::fs::write(&kept, &built)
                .with_context(|| format!("cannot write {}", kept.display()))?;
            println!("{name}: written, {} bytes", built.len());
        }
    }
    if args.check && !differ.is_empty() {
        bail!("not what their source gives: {}. Run `cargo xtask ebpf`", differ.join(", "));
    }
    Ok(())
}

/// Fails when an object in the repository is not what its source gives.
pub(crate) fn check() -> Result<()> {
    run(&EbpfArgs { check: true })
}

/// bpf-linker of the version that objects are linked with, built when it is not there yet.
fn linker() -> Result<PathBuf> {
    let root = build::target_dir().join("bpf-linker");
    let program = root.join("bin/bpf-linker");
    let has = shell::read(Command::new(&program).arg("--version")).unwrap_or_default();
    if has.trim().ends_with(LINKER_VERSION) {
        return Ok(program);
    }
    println!("Building bpf-linker {LINKER_VERSION}, which takes some minutes once");
    let mut cargo = build::cargo("install", build::Profile::Dev);
    cargo.env("LLVM_PREFIX", LLVM).arg("bpf-linker").args([
        "--version",
        LINKER_VERSION,
        "--locked",
    ]);
    cargo.args(["--no-default-features", "--features", "llvm-22", "--root"]).arg(&root);
    shell::run(&mut cargo)?;
    Ok(program)
}

fn compile(linker: &Path) -> Result<()> {
    let mut flags = vec![
        format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf".to_owned(),
        // Map definitions and line information come out of it.
        "-Cdebuginfo=2".to_owned(),
        // Signed division and 32 bit jumps: Linux 5.1.
        "-Ctarget-cpu=v3".to_owned(),
    ];
    let home =
        std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|h| h + "/.cargo"))?;
    let sources = shell::root().join("ebpf");
    flags.push(format!("--remap-path-prefix={home}/registry/src=crates"));
    flags.push(format!("--remap-path-prefix={}=ebpf", sources.display()));
    let mut cargo = build::cargo("build", build::Profile::Release);
    cargo
        .current_dir(sources.join("programs"))
        .env("RUSTC", RUSTC)
        // Attributes of the target are not stable.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .args(["--locked", "--target", TARGET, "--target-dir"])
        .arg(build::target_dir().join("ebpf"));
    shell::run(&mut cargo)
}

/// An object without DWARF.
fn stripped(name: &str) -> Result<Vec<u8>> {
    let folder = build::target_dir().join("ebpf").join(TARGET).join("release");
    let output = folder.join(format!("{name}.bpf.o"));
    let mut objcopy = Command::new(Path::new(LLVM).join("bin/llvm-objcopy"));
    shell::read(objcopy.arg("--strip-debug").arg(folder.join(name)).arg(&output))?;
    std::fs::read(&output).with_context(|| format!("cannot read {}", output.display()))
}

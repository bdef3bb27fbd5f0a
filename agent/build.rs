//! Builds the sandbox's pause program (`agent/pause`), which the agent carries inside itself.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=pause/main.rs");
    fold_identical_functions();
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("pause");
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = Command::new(rustc);
    command.args(["--edition", "2024", "--crate-type", "bin", "--target"]);
    command.arg(env::var_os("TARGET").unwrap_or_default());
    command.args([
        "-C",
        "panic=abort",
        "-C",
        "opt-level=z",
        "-C",
        "strip=symbols",
        "-C",
        "relocation-model=static",
    ]);
    // No C library and no start files: the program brings its own entry point.
    command.args([
        "-C",
        "link-arg=-nostartfiles",
        "-C",
        "link-arg=-nostdlib",
        "-C",
        "link-arg=-static",
    ]);
    command.arg("-o").arg(&out).arg("pause/main.rs");
    match command.status() {
        Ok(status) if status.success() => {}
        result => {
            println!("cargo::error=the pause program cannot be built: {result:?} ({command:?})");
            std::process::exit(1);
        }
    }
}

/// The Kubernetes types bring the same code many times over, once per type: folded, the program is a third smaller, on the
/// disk and in memory. The linker that rustc brings for this target can do that, GNU's on other targets cannot.
fn fold_identical_functions() {
    let variable = |name: &str| env::var(name).unwrap_or_default();
    let linker_is_rustcs = variable("TARGET") == "x86_64-unknown-linux-gnu"
        && !["linker=", "fuse-ld", "linker-features"]
            .iter()
            .any(|flag| variable("CARGO_ENCODED_RUSTFLAGS").contains(flag));
    if linker_is_rustcs && variable("PROFILE") == "release" {
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
    }
}

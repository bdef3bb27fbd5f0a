//! Kernels to run tests on: those of Debian's releases.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{build, install, shell};

/// A kernel by its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Version {
    /// The oldest that keelson supports
    #[value(name = "5.10")]
    V5_10,
    #[value(name = "6.1")]
    V6_1,
    #[value(name = "6.12")]
    V6_12,
}

impl Version {
    pub(crate) fn number(self) -> &'static str {
        match self {
            Version::V5_10 => "5.10",
            Version::V6_1 => "6.1",
            Version::V6_12 => "6.12",
        }
    }

    /// The Debian release whose kernel it is.
    fn release(self) -> &'static str {
        match self {
            Version::V5_10 => "bullseye",
            Version::V6_1 => "bookworm",
            Version::V6_12 => "trixie",
        }
    }
}

/// A kernel and its modules.
#[derive(Debug)]
pub(crate) struct Kernel {
    root: PathBuf,
    release: String,
}

impl Kernel {
    /// The kernel, unpacked below the target folder, which is kept.
    ///
    /// # Errors
    /// When it cannot be had: the lane is skipped then.
    pub(crate) fn of(version: Version) -> Result<Kernel> {
        if cfg!(not(target_arch = "x86_64")) {
            bail!("the emulated machine is an x86-64 one");
        }
        install::for_vm()?;
        let folder = build::target_dir().join(format!("vm-kernel-{}", version.number()));
        let root = folder.join("root");
        if release(&root).is_none() {
            download(version, &folder)?;
        }
        let release = release(&root).context("the kernel's package holds no /lib/modules")?;
        Ok(Kernel { root, release })
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    pub(crate) fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }

    /// The text of modules.dep, which is not in the package: it is made when that is installed.
    pub(crate) fn modules_dep(&self) -> Result<String> {
        let file = self.modules().join("modules.dep");
        if !file.is_file() {
            let mut depmod = Command::new(super::program("depmod")?);
            shell::read(depmod.arg("-b").arg(&self.root).arg(&self.release))?;
        }
        std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    }
}

fn release(root: &Path) -> Option<String> {
    let entry = std::fs::read_dir(root.join("lib/modules")).ok()?.flatten().next()?;
    entry.file_name().into_string().ok()
}

fn download(version: Version, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let machine = Apt { options: Vec::new() };
    let (apt, package) = match machine.package(version) {
        Some(package) => (machine, package),
        // The machine runs another release.
        None => {
            let apt = Apt::of_release(version.release(), folder)?;
            let package = apt.package(version);
            let missing = || format!("{} has no kernel {}", version.release(), version.number());
            (apt, package.with_context(missing)?)
        }
    };
    shell::read(apt.command("apt-get").current_dir(folder).args(["download", &package]))?;
    let file = std::fs::read_dir(folder)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .context("apt-get downloaded no package")?;
    // Aside, then renamed: half a kernel is never taken for one.
    let beside = folder.join("unpacking");
    shell::read(Command::new("dpkg").arg("-x").arg(&file).arg(&beside))?;
    if !beside.join("lib").exists() {
        // Since trixie packages know no other.
        std::os::unix::fs::symlink("usr/lib", beside.join("lib"))?;
    }
    std::fs::rename(&beside, folder.join("root"))?;
    Ok(std::fs::remove_file(file)?)
}

/// Debian's package manager with the packages of some release.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// With lists of their own, which nothing else on the machine sees.
    fn of_release(release: &str, folder: &Path) -> Result<Apt> {
        for part in ["lists/partial", "cache/archives/partial"] {
            std::fs::create_dir_all(folder.join(part))?;
        }
        let sources = folder.join("sources.list");
        let lines = [
            format!("deb http://deb.debian.org/debian {release} main\n"),
            format!("deb http://deb.debian.org/debian-security {release}-security main\n"),
        ];
        std::fs::write(&sources, lines.concat())?;
        let set = |name: &str, path: &Path| format!("{name}={}", path.display());
        let apt = Apt {
            options: vec![
                set("Dir::Etc::SourceList", &sources),
                set("Dir::Etc::SourceParts", Path::new("/dev/null")),
                set("Dir::State::Lists", &folder.join("lists")),
                set("Dir::State::Status", Path::new("/dev/null")),
                set("Dir::Cache", &folder.join("cache")),
                "Acquire::http::Timeout=20".to_owned(),
            ],
        };
        shell::read(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }

    /// The newest package with that kernel.
    fn package(&self, version: Version) -> Option<String> {
        let wanted = format!("linux-image-{}.", version.number());
        let about =
            shell::read(self.command("apt-cache").args(["depends", "linux-image-cloud-amd64"]));
        let about = about.ok()?;
        let mut needs = about.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        needs.find(|package| package.starts_with(&wanted)).map(str::to_owned)
    }
}

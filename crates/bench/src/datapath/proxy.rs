//! Who is measured, and how it is started.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use keelson_tests::node::program;

use crate::cluster::Ground;
use crate::process::in_netns;
use crate::subject::node::NODE_NAME;
use crate::subject::version_label;

/// One proxy in one mode.
#[derive(Debug)]
pub(super) struct Contender {
    name: String,
    program: PathBuf,
    mode: String,
    own: bool,
}

/// keelson in each of `modes`, then the peer in each of its.
///
/// # Errors
/// When a program is missing.
pub(super) fn contenders(
    modes: &[String],
    peer: Option<&Path>,
    peer_modes: &[String],
) -> Result<Vec<Contender>> {
    let proxy = program("keelson-proxy")?;
    let of = |name: &str, program: &Path, mode: &String, own| Contender {
        name: name.to_owned(),
        program: program.to_owned(),
        mode: mode.clone(),
        own,
    };
    let mut all: Vec<_> = modes.iter().map(|mode| of("keelson", &proxy, mode, true)).collect();
    if let Some(peer) = peer {
        if !peer.is_file() {
            bail!("--peer-kube-proxy: there is no file {}", peer.display());
        }
        let name = version_label("kube-proxy", peer);
        all.extend(peer_modes.iter().map(|mode| of(&name, peer, mode, false)));
    }
    Ok(all)
}

impl Contender {
    pub(super) fn label(&self) -> String {
        format!("{}, {}", self.name, self.mode)
    }

    /// Its command line in the namespace `netns`, with files of its own in `folder`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(super) fn command(
        &self,
        ground: &Ground<'_>,
        netns: &Path,
        folder: &Path,
        cgroup: &Path,
    ) -> Result<Command> {
        let mut command = in_netns(netns, &self.program);
        command.args([
            format!("--kubeconfig={}", ground.kubeconfig("proxy")?.display()),
            format!("--hostname-override={NODE_NAME}"),
            format!("--proxy-mode={}", self.mode),
            "--cluster-cidr=10.244.0.0/16".into(),
            // The Node object's address is that of no world.
            "--nodeport-addresses=0.0.0.0/0".into(),
            // Not this namespace's to set, and kube-proxy gives up where it cannot.
            "--conntrack-max-per-core=0".into(),
        ]);
        if self.own {
            command.arg(format!("--state-file={}", folder.join("last-known.json").display()));
            // In every mode: one that starts removes what another mode has left there.
            let pins = Path::new("/sys/fs/bpf").join(netns.file_name().unwrap_or_default());
            command.arg(format!("--ebpf-pins={}", pins.display()));
            command.arg(format!("--ebpf-cgroup={}", cgroup.display()));
        }
        if !self.own && self.mode == "iptables" {
            let path = std::env::var("PATH").unwrap_or_default();
            let legacy = legacy_iptables(folder)?;
            command.env("PATH", format!("{}:{path}", legacy.display()));
        }
        Ok(command)
    }
}

/// A folder in which `iptables` is the legacy one: with the other one kube-proxy needs minutes for thousands of Services.
fn legacy_iptables(folder: &Path) -> Result<PathBuf> {
    const PROGRAM: &str = "/usr/sbin/xtables-legacy-multi";
    if !Path::new(PROGRAM).is_file() {
        bail!("there is no {PROGRAM}: install iptables");
    }
    let legacy = folder.join("legacy");
    fs::create_dir_all(&legacy).with_context(|| format!("cannot make {}", legacy.display()))?;
    for family in ["iptables", "ip6tables"] {
        for what in ["", "-save", "-restore"] {
            let link = legacy.join(format!("{family}{what}"));
            symlink(PROGRAM, &link).with_context(|| format!("cannot make {}", link.display()))?;
        }
    }
    Ok(legacy)
}

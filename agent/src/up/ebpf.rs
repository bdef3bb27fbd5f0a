//! What the proxy's eBPF mode needs of a node of its own: a BPF file system and a cgroup that are this node's alone, so
//! that several live beside each other and `keelson down` takes everything along.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use keelson_proxy::backend::Mode;
use keelson_proxy::ebpf::EbpfConfig;
use nix::mount::{MsFlags, mount};

use super::UpConfig;
use super::layout::Layout;

/// The mode's configuration, with what it needs in place when that mode may be chosen and the machine can have it.
pub(super) fn config(config: &UpConfig) -> Result<EbpfConfig> {
    let layout = &config.layout;
    let mut own = EbpfConfig {
        pins: layout.bpf_dir().join("proxy"),
        exempt: layout.run_dir.join("socket-exempt"),
        ..EbpfConfig::default()
    };
    match prepare(config, &mut own) {
        // Where there is a choice the proxy says what is missing.
        Err(error) if config.proxy_modes != [Mode::Ebpf] => {
            tracing::debug!(?error, "This node cannot have the proxy's eBPF mode");
        }
        result => result?,
    }
    Ok(config.ebpf.over(own))
}

fn prepare(config: &UpConfig, own: &mut EbpfConfig) -> Result<()> {
    if !config.proxy_modes.contains(&Mode::Ebpf) {
        return Ok(());
    }
    mount_bpffs(&config.layout)?;
    if !config.host_network {
        // The machine's own sockets, and other nodes', are none of this node's business.
        own.cgroup = Some(make_cgroup(&config.layout)?);
    }
    Ok(())
}

/// Each mount is a file system of its own. Unmounted, it takes what is pinned in it along.
fn mount_bpffs(layout: &Layout) -> Result<()> {
    let folder = layout.bpf_dir();
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    if EbpfConfig::is_bpffs(&folder) {
        return Ok(());
    }
    mount(Some("bpf"), &folder, Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("cannot mount a BPF file system on {}", folder.display()))
}

/// In the hierarchy of version 2, wherever it is mounted; pods live below it.
fn make_cgroup(layout: &Layout) -> Result<PathBuf> {
    let root = EbpfConfig::all_cgroups()?;
    let folder = root.join(layout.cgroup_root().trim_start_matches('/'));
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

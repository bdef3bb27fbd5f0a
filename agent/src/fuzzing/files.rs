//! Files that operators write: configuration, manifests; and the words of flags.

use std::path::Path;

use super::text;
use crate::cgroup::tree::hierarchies;
use crate::config::{AgentConfig, duration, kubelet, labels, quantity};
use crate::node::cni_conf::plugin_types;
use crate::pod::source::manifests;
use crate::server::stats::{Hierarchies, busy_nanos};

/// `KubeletConfiguration`.
pub fn kubelet_config(input: &[u8]) {
    drop(kubelet::apply_text(
        &mut AgentConfig::default(),
        &text(input),
        Path::new("/etc/k/config.yaml"),
    ));
}

/// A CNI configuration, as the node's readiness looks at it.
pub fn cni_conf(input: &[u8]) {
    if let Ok(types) = plugin_types(&text(input)) {
        assert!(!types.is_empty());
    }
}

/// Static pods.
pub fn static_pod(input: &[u8]) {
    drop(manifests::parse(&text(input), "/etc/k/manifests/pod.yaml", "node"));
}

/// Durations, labels, taints, quantities and thresholds.
pub fn flag_values(input: &[u8]) {
    let text = text(input);
    let _duration = duration::parse(&text);
    drop(labels::parse_labels("--node-labels", &text));
    drop(labels::parse_taints("--register-with-taints", &text));
    let _threshold = kubelet::parse_threshold(&text);
    drop(kubelet::parse_reserved("--system-reserved", "memory", &text));
    if let (Some(milli), Some(whole)) = (quantity::parse_milli(&text), quantity::parse(&text)) {
        assert!(u128::from(whole) * 1000 >= milli, "a quantity was rounded down");
    }
}

/// mountinfo, whose paths are chosen by whoever mounts, and other files of /proc and of images.
pub fn proc_files(input: &[u8]) {
    let mounts: Vec<_> = keelson_procfs::mounts(input).collect();
    assert!(mounts.iter().all(|mount| mount.point.as_os_str().len() <= input.len()));
    assert!(hierarchies(&mounts).len() <= mounts.len());
    let _hierarchies = Hierarchies::from_mounts(&mounts);
    let _nanos = busy_nanos(&text(input));
    keelson_procfs::users(input).for_each(drop);
    keelson_procfs::groups(input).for_each(drop);
    keelson_procfs::numbers(input).for_each(drop);
}

//! Every parser of foreign bytes as a fuzz target. `cargo xtask fuzz` runs them under libFuzzer, with coverage of
//! keelson's own crates; the unit tests run each over its seeds.
//!
//! What a target does stands in the module `fuzzing` of the crate that has the parser. To add one: write the function
//! there, name it here, put an example of what it reads into `seeds/<name>/`.

type Run = fn(&[u8]);

/// A parser and what must hold for it.
#[derive(Clone, Copy)]
pub struct Target {
    /// What it is called, here and in `seeds/`.
    pub name: &'static str,
    /// Takes any bytes and panics when something does not hold.
    pub run: Run,
}

/// The target of that name.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    targets().find(|target| target.name == name)
}

/// All targets.
pub fn targets() -> impl Iterator<Item = Target> {
    TARGETS.iter().map(|(name, run)| Target { name, run: *run })
}

#[rustfmt::skip]
const TARGETS: &[(&str, Run)] = &[
    // Clients of the kubelet's API.
    ("grpc-answer", keelson_agent::fuzzing::grpc_answer),
    ("negotiate", keelson_agent::fuzzing::negotiate),
    ("queries", keelson_agent::fuzzing::queries),
    ("remote-command", keelson_agent::fuzzing::remote_command),
    ("spdy-headers", keelson_agent::fuzzing::spdy_headers),
    ("spdy-session", keelson_agent::fuzzing::spdy_session),
    ("terminal", keelson_agent::fuzzing::terminal),
    ("websocket-channels", keelson_agent::fuzzing::websocket_channels),
    // Containers and their logs.
    ("log-cutter", keelson_agent::fuzzing::log_cutter),
    ("log-lines", keelson_agent::fuzzing::log_lines),
    ("log-rotation", keelson_agent::fuzzing::log_rotation),
    ("log-tail", keelson_agent::fuzzing::log_tail),
    ("logd-frames", keelson_agent::fuzzing::logd_frames),
    ("termination-message", keelson_agent::fuzzing::termination_message),
    // What tenants write.
    ("pods", keelson_agent::fuzzing::pods),
    // Images and registries.
    ("hosts-toml", keelson_agent::fuzzing::hosts_toml),
    ("image-archive", keelson_agent::fuzzing::image_archive),
    ("image-documents", keelson_agent::fuzzing::image_documents),
    ("image-reference", keelson_agent::fuzzing::image_reference),
    ("image-users", keelson_agent::fuzzing::image_users),
    ("pull-secret", keelson_agent::fuzzing::pull_secret),
    // Clients of the embedded control plane.
    ("api-bodies", keelson_standalone::fuzzing::bodies),
    ("api-objects", keelson_standalone::fuzzing::objects),
    ("api-patches", keelson_standalone::fuzzing::patches),
    ("api-quantities", keelson_standalone::fuzzing::quantities),
    ("api-routes", keelson_standalone::fuzzing::routes),
    ("api-selectors", keelson_standalone::fuzzing::selectors),
    ("api-tokens", keelson_standalone::fuzzing::tokens),
    // The pod network: runtimes, other plugins, a journal after a bad day.
    ("cni-conflist", keelson_cni::fuzzing::conflist),
    ("cni-journal", keelson_cni::fuzzing::journal),
    ("cni-netconf", keelson_cni::fuzzing::netconf),
    ("cni-result", keelson_cni::fuzzing::plugin_result),
    // Services, and other users of the kernel's tables.
    ("bpf-events", keelson_proxy::fuzzing::events),
    ("iptables-save", keelson_proxy::fuzzing::iptables_save),
    ("last-known", keelson_proxy::fuzzing::last_known),
    ("proxy-config", keelson_proxy::fuzzing::proxy_config),
    ("services", keelson_proxy::fuzzing::services),
    // Answers of the kernel, with what is in them from traffic.
    ("netlink-conntrack", keelson_netlink::fuzzing::conntrack),
    ("netlink-ipvs", keelson_netlink::fuzzing::virtual_servers),
    ("netlink-nftables", keelson_netlink::fuzzing::nftables),
    ("netlink-routes", keelson_netlink::fuzzing::routes),
    ("netlink-sockets", keelson_netlink::fuzzing::sockets),
    // Files of operators.
    ("cni-conf", keelson_agent::fuzzing::cni_conf),
    ("flag-values", keelson_agent::fuzzing::flag_values),
    ("kubelet-config", keelson_agent::fuzzing::kubelet_config),
    ("proc-files", keelson_agent::fuzzing::proc_files),
    ("resolv-conf", keelson_agent::fuzzing::resolv_conf),
    ("static-pod", keelson_agent::fuzzing::static_pod),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn every_seed_passes_and_every_target_has_one() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
        for target in targets() {
            let folder = seeds.join(target.name);
            let files: Vec<_> = std::fs::read_dir(&folder)
                .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
                .map(|entry| entry.unwrap().path())
                .collect();
            assert!(!files.is_empty(), "{} is empty", folder.display());
            for file in files {
                println!("{}", file.display());
                (target.run)(&std::fs::read(file).unwrap());
            }
            (target.run)(&[]);
        }
        for folder in std::fs::read_dir(seeds).unwrap() {
            let name = folder.unwrap().file_name().into_string().unwrap();
            assert!(target(&name).is_some(), "seeds of no target: {name}");
        }
    }
}

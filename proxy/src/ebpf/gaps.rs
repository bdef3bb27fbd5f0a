//! What mode ebpf would not do on this node although its programs run: who has the choice takes another mode then.

use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};

use keelson_netlink::netns::Netns;
use keelson_netlink::route::Rtnl;
use keelson_netlink::sock_diag::SockDiag;

use super::config::{BPFFS, EbpfConfig, Sockets, is_bpffs};
use super::needs;
use crate::switch::with_sources;

/// What decides it.
struct Machine {
    /// Programs for sockets can say why a call is refused.
    has_set_retval: bool,
    /// Why sockets cannot be ended, if they cannot.
    cannot_end: Option<String>,
    serves: Serves,
    /// Where what stays in the kernel has its name, if that goes with the process.
    fleeting: Option<PathBuf>,
}

/// Whose sockets the programs see.
enum Serves {
    All,
    /// Those of this cgroup, which is not the topmost one.
    Below(PathBuf),
    None,
    Unknown(String),
}

/// One sentence for each thing that would be missing.
pub(crate) fn gaps(config: &EbpfConfig) -> Vec<String> {
    gaps_of(&Machine {
        has_set_retval: needs::has_set_retval(),
        cannot_end: end_a_socket().err(),
        serves: serves(config),
        fleeting: Some(config.pins.clone()).filter(|pins| !is_lasting(pins)),
    })
}

fn gaps_of(machine: &Machine) -> Vec<String> {
    let mut gaps = Vec::new();
    if !machine.has_set_retval {
        gaps.push("the kernel lacks bpf_set_retval for sockets (Linux 6.1)".to_owned());
    }
    if let Some(why) = &machine.cannot_end {
        gaps.push(format!(
            "UDP sockets cannot be ended when their endpoint goes (INET_DIAG_DESTROY): {why}"
        ));
    }
    match &machine.serves {
        Serves::All => {}
        Serves::Below(cgroup) => gaps.push(format!(
            "the node has sockets outside of the cgroup {}, which is not the topmost one",
            cgroup.display()
        )),
        Serves::None => gaps.push("sockets are not served (--ebpf-sockets)".to_owned()),
        Serves::Unknown(why) => gaps.push(why.clone()),
    }
    if let Some(pins) = &machine.fleeting {
        gaps.push(format!(
            "nothing that is pinned in {} would outlive this process: mount a BPF file system there",
            pins.display()
        ));
    }
    gaps
}

fn serves(config: &EbpfConfig) -> Serves {
    if config.sockets == Sockets::None {
        return Serves::None;
    }
    match config.cgroup() {
        Err(error) => Serves::Unknown(with_sources(&error)),
        // Only the topmost one has no such file. In a container it may not be seen.
        Ok(cgroup) if cgroup.join("cgroup.events").exists() => Serves::Below(cgroup),
        Ok(_) => Serves::All,
    }
}

/// Ends a socket of its own in a network namespace of its own.
fn end_a_socket() -> Result<(), String> {
    let attempt = || {
        Rtnl::open().and_then(|mut rtnl| rtnl.set_up("lo")).map_err(|e| with_sources(&e))?;
        let socket = UdpSocket::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
        socket.connect("127.0.0.1:9").map_err(|e| e.to_string())?;
        let mut kernel = SockDiag::open().map_err(|e| with_sources(&e))?;
        let found = kernel.connected_udp().map_err(|e| with_sources(&e))?;
        let own = found.first().ok_or("they are not listed")?;
        kernel.end(own).map(drop).map_err(|e| with_sources(&e))
    };
    let netns = Netns::anonymous().map_err(|e| with_sources(&e))?;
    netns.run(attempt).map_err(|e| with_sources(&e))?
}

/// Whether pins there stay when this process and its mounts are gone.
fn is_lasting(pins: &Path) -> bool {
    let there = pins.ancestors().find(|folder| folder.exists());
    // Mounted by somebody else, or by us where it stays.
    there.is_some_and(is_bpffs)
        || pins.parent() == Some(Path::new(BPFFS)) && sees_the_nodes_mounts()
}

/// Not so in a container, or as a service with mounts of its own.
fn sees_the_nodes_mounts() -> bool {
    /// `PROC_PID_INIT_INO`: the first process there is the node's.
    const NODES_PROCESSES: &str = "pid:[4026531836]";
    let namespace = |path: &str| fs::read_link(path).ok();
    namespace("/proc/self/ns/pid").is_some_and(|own| own == Path::new(NODES_PROCESSES))
        && namespace("/proc/1/ns/mnt")
            .is_some_and(|first| Some(first) == namespace("/proc/self/ns/mnt"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole() -> Machine {
        Machine { has_set_retval: true, cannot_end: None, serves: Serves::All, fleeting: None }
    }

    #[test]
    fn each_gap_has_a_sentence() {
        let cgroup = PathBuf::from("/sys/fs/cgroup");
        for (machine, said) in [
            (whole(), ""),
            (Machine { has_set_retval: false, ..whole() }, "the kernel lacks bpf_set_retval"),
            (
                Machine { cannot_end: Some("EOPNOTSUPP".to_owned()), ..whole() },
                "UDP sockets cannot be ended when their endpoint goes (INET_DIAG_DESTROY): EOPNOTSUPP",
            ),
            (
                Machine { serves: Serves::Below(cgroup), ..whole() },
                "the node has sockets outside of the cgroup /sys/fs/cgroup",
            ),
            (Machine { serves: Serves::None, ..whole() }, "sockets are not served"),
            (Machine { serves: Serves::Unknown("no cgroup2".to_owned()), ..whole() }, "no cgroup2"),
            (
                Machine { fleeting: Some("/sys/fs/bpf/proxy".into()), ..whole() },
                "nothing that is pinned in /sys/fs/bpf/proxy would outlive this process",
            ),
        ] {
            let gaps = gaps_of(&machine);
            assert_eq!(gaps.len(), usize::from(!said.is_empty()));
            assert!(gaps.concat().starts_with(said), "{gaps:?}");
        }
        let nothing = Machine {
            has_set_retval: false,
            cannot_end: Some(String::new()),
            serves: Serves::None,
            fleeting: Some(PathBuf::new()),
        };
        assert_eq!(gaps_of(&nothing).len(), 4);
    }

    #[test]
    fn a_folder_that_nobody_mounted_lasts_only_where_the_node_sees_it() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!is_lasting(&folder.path().join("pins")));
    }
}

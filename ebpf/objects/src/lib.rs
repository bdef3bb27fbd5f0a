//! keelson's BPF programs as objects, made by `cargo xtask ebpf` from `ebpf/programs`.

mod load;

pub use load::{load, undisturbed};

/// Socket load balancing: programs for a cgroup.
pub static SOCKET: &[u8] = aya::include_bytes_aligned!("../socket.bpf.o");

/// Load balancing of packets: `ingress` and `egress` for tc on each interface of the node.
pub static PACKET: &[u8] = aya::include_bytes_aligned!("../packet.bpf.o");

/// `sock_create` for a cgroup, which tells the number of a network namespace where sockets do not.
pub static NAMESPACE: &[u8] = aya::include_bytes_aligned!("../namespace.bpf.o");

/// Forwarding of frames that belong to connections which the programs for packets know: `forward` for XDP.
pub static XDP: &[u8] = aya::include_bytes_aligned!("../xdp.bpf.o");

/// All of them, by name.
pub static ALL: [(&str, &[u8]); 4] =
    [("namespace", NAMESPACE), ("packet", PACKET), ("socket", SOCKET), ("xdp", XDP)];

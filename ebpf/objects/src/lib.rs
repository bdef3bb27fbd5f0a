//! keelson's BPF programs as objects, made by `cargo xtask ebpf` from `ebpf/programs`.

/// Socket load balancing: programs for a cgroup.
pub static SOCKET: &[u8] = aya::include_bytes_aligned!("../socket.bpf.o");

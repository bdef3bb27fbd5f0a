//! The socket programs in the running kernel: real sockets in network namespaces of their own, and a
//! cgroup that only the threads of a test are in. Needs root.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "socket/cgroup.rs"]
mod cgroup;
#[path = "socket/connected.rs"]
mod connected;
#[path = "../../../proxy/src/ebpf/connected_udp.rs"]
mod connected_udp;
#[path = "../../../proxy/src/ebpf/cookie.rs"]
mod cookie;
#[path = "socket/decisions.rs"]
mod decisions;
#[path = "socket/events.rs"]
mod events;
#[path = "socket/families.rs"]
mod families;
#[path = "socket/namespace.rs"]
mod namespace;
#[path = "socket/orphans.rs"]
mod orphans;
#[path = "socket/unconnected.rs"]
mod unconnected;
#[path = "socket/world.rs"]
mod world;

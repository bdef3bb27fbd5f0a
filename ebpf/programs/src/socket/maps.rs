//! Maps of the socket layer alone.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{HashMap, SkStorage};
use aya_ebpf::macros::btf_map;
use keelson_ebpf_abi::{Conversations, MemberKey, Peer};

const GROWING: usize = BPF_F_NO_PREALLOC as usize;

/// Of sockets that were connected to a Service.
#[btf_map(name = "peers")]
pub static PEERS: SkStorage<Peer> = SkStorage::new();

/// Cookies of connected UDP sockets, with the membership that they rest on. User space ends those whose
/// endpoint goes, since the kernel asks nobody again. Entries go with their sockets; when it is full, UDP
/// sockets are left to the packet layer.
#[btf_map(name = "connected_udp")]
pub static CONNECTED_UDP: HashMap<u64, MemberKey, 262_144, GROWING> = HashMap::new();

/// Of UDP sockets that send to Services without being connected.
#[btf_map(name = "conversations")]
pub static CONVERSATIONS: SkStorage<Conversations> = SkStorage::new();

/// Cookies of network namespaces whose sockets are left to the packet layer: what a virtual machine or a
/// sidecar sends comes from no socket here, or must show the Service's address. User space writes it.
#[btf_map(name = "exempt")]
pub static EXEMPT: HashMap<u64, u32, 16_384, GROWING> = HashMap::new();

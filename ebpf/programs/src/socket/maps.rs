//! Maps of the socket layer alone. What is in them goes with the sockets.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{Array, HashMap, SkStorage};
use aya_ebpf::macros::btf_map;
use keelson_ebpf_abi::{Connected, Conversations, PLACES, Peer};

const GROWING: usize = BPF_F_NO_PREALLOC as usize;

/// Where a connected TCP socket is found first.
#[btf_map(name = "connected")]
pub static CONNECTED: Array<Connected, { PLACES as usize }> = Array::new();

/// TCP sockets whose place in `connected` was taken. When it is full, they are left to the packet layer.
#[btf_map(name = "connected_tcp")]
pub static CONNECTED_TCP: HashMap<u64, Peer, 65_536, GROWING> = HashMap::new();

/// Connected UDP sockets. User space ends those whose endpoint goes, since the kernel asks nobody again.
/// When it is full, they are left to the packet layer.
#[btf_map(name = "connected_udp")]
pub static CONNECTED_UDP: HashMap<u64, Peer, 65_536, GROWING> = HashMap::new();

/// Of UDP sockets that send to Services without being connected.
#[btf_map(name = "conversations")]
pub static CONVERSATIONS: SkStorage<Conversations> = SkStorage::new();

/// Cookies of network namespaces whose sockets are left to the packet layer: what a virtual machine or a
/// sidecar sends comes from no socket here, or must show the Service's address. User space writes it.
#[btf_map(name = "exempt")]
pub static EXEMPT: HashMap<u64, u32, 16_384, GROWING> = HashMap::new();

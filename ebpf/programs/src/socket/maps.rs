//! Maps of the socket layer alone.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{HashMap, SkStorage};
use aya_ebpf::macros::btf_map;
use keelson_ebpf_abi::{Conversations, Peer};

/// Of sockets that were connected to a Service.
#[btf_map(name = "peers")]
pub static PEERS: SkStorage<Peer> = SkStorage::new();

/// Of UDP sockets that send to Services without being connected.
#[btf_map(name = "conversations")]
pub static CONVERSATIONS: SkStorage<Conversations> = SkStorage::new();

/// Cookies of network namespaces whose sockets are left to the packet layer: what a virtual machine or a
/// sidecar sends comes from no socket here, or must show the Service's address. User space writes it.
#[btf_map(name = "exempt")]
pub static EXEMPT: HashMap<u64, u32, 16_384, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

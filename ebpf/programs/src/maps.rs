//! The maps that tell the programs what Services there are. User space writes them, programs read them,
//! except for `affinity`, `counters`, `events` and the flows.
//!
//! `max_entries` here is what the loader takes when it is told nothing else. Maps without preallocation
//! cost memory for what is in them, and a little for each possible entry.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{
    Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf,
};
use aya_ebpf::macros::btf_map;
use keelson_ebpf_abi::{
    Address, Affinity, AffinityKey, Counters, Endpoint, Event, Flow, Frontend, FrontendKey,
    Interface, MemberKey, Pool, RangeKey, Settings, SlotKey, SourceKey, Tuple,
};

const GROWING: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map(name = "settings")]
pub static SETTINGS: Array<Settings, 1> = Array::new();

#[btf_map(name = "frontends")]
pub static FRONTENDS: HashMap<FrontendKey, Frontend, 262_144, GROWING> = HashMap::new();

#[btf_map(name = "pools")]
pub static POOLS: HashMap<u32, Pool, 131_072, GROWING> = HashMap::new();

#[btf_map(name = "slots")]
pub static SLOTS: HashMap<SlotKey, Endpoint, 1_048_576, GROWING> = HashMap::new();

#[btf_map(name = "members")]
pub static MEMBERS: HashMap<MemberKey, u32, 262_144, GROWING> = HashMap::new();

#[btf_map(name = "sources")]
pub static SOURCES: LpmTrie<SourceKey, u32, 65_536> = LpmTrie::new();

#[btf_map(name = "addresses")]
pub static ADDRESSES: HashMap<Address, u32, 131_072, GROWING> = HashMap::new();

#[btf_map(name = "pod_ranges")]
pub static POD_RANGES: LpmTrie<RangeKey, u32, 1_024> = LpmTrie::new();

#[btf_map(name = "service_ranges")]
pub static SERVICE_RANGES: LpmTrie<RangeKey, u32, 64> = LpmTrie::new();

#[btf_map(name = "interfaces")]
pub static INTERFACES: HashMap<u32, Interface, 8_192, GROWING> = HashMap::new();

#[btf_map(name = "affinity")]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, 131_072> = LruHashMap::new();

#[btf_map(name = "counters")]
pub static COUNTERS: PerCpuHashMap<u32, Counters, 262_144, GROWING> = PerCpuHashMap::new();

/// What a monitor wants to read: `WATCH_*`. It writes that itself.
#[btf_map(name = "watched")]
pub static WATCHED: Array<u32, 1> = Array::new();

/// What a monitor reads; full without one.
#[btf_map(name = "events")]
pub static EVENTS: RingBuf<Event, 262_144> = RingBuf::new();

/// How many events found no room there.
#[btf_map(name = "events_lost")]
pub static EVENTS_LOST: PerCpuArray<u64, 1> = PerCpuArray::new();

pub type Flows = LruHashMap<Tuple, Flow, 131_072>;

/// Translations of what arrives.
#[btf_map(name = "flows_in")]
pub static FLOWS_IN: Flows = Flows::new();

/// Translations of what leaves.
#[btf_map(name = "flows_out")]
pub static FLOWS_OUT: Flows = Flows::new();

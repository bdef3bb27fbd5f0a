//! Maps that only packets need.

use aya_ebpf::btf_maps::{LruHashMap, PerCpuArray};
use aya_ebpf::macros::btf_map;
use keelson_ebpf_abi::{DROP_REASONS, Flow, FragmentKey, FragmentPorts, Tuple};

use crate::answer::Body;
use crate::parse::Packet;

pub use keelson_ebpf::maps::{FLOWS_IN, FLOWS_OUT, Flows};

#[btf_map(name = "fragments")]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, 8_192> = LruHashMap::new();

#[btf_map(name = "drops")]
pub static DROPS: PerCpuArray<u64, DROP_REASONS> = PerCpuArray::new();

/// What is too large for the stack. No program is interrupted by another one here.
#[repr(C)]
pub struct Scratch {
    pub packet: Packet,
    /// What the packet shall carry.
    pub to: Tuple,
    /// Key of the opposite translation.
    pub opposite: Tuple,
    pub flow: Flow,
    pub body: Body,
    /// What an ICMP error is about.
    pub quoted: Packet,
    /// The client's address shall be replaced by the node's.
    pub hides: bool,
    /// `HOOK_*`.
    pub hook: u8,
    pub zero: [u8; 6],
}

#[btf_map(name = "packet_scratch")]
static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// This CPU's room for the packet at hand.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: each program asks once, and none is interrupted by another one on its CPU.
    Some(unsafe { &mut *scratch })
}

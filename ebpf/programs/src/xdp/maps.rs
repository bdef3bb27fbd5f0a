//! Maps that only this program needs.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{HashMap, PerCpuArray};
use aya_ebpf::macros::btf_map;
use keelson_ebpf_abi::{Flow, Tuple, XdpInterface};

/// The interfaces that are served. User space writes it.
#[btf_map(name = "xdp_interfaces")]
pub static INTERFACES: HashMap<u32, XdpInterface, 1_024, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// What is too large for the stack.
#[repr(C)]
pub struct Scratch {
    /// What the frame carries.
    pub tuple: Tuple,
    /// What it carries on the way through the node.
    pub inside: Tuple,
    /// What it shall carry.
    pub to: Tuple,
    /// Key of an opposite translation.
    pub opposite: Tuple,
    pub flow: Flow,
}

#[btf_map(name = "xdp_scratch")]
static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// This CPU's room for the frame at hand.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: the program asks once, and is not interrupted by itself on its CPU.
    Some(unsafe { &mut *scratch })
}

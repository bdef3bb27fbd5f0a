//! What the kernel knows, asked by trying.

use std::io;

use super::{AttachType, address, bpf, owned};

const MAP_CREATE: i64 = 0;
const PROG_LOAD: i64 = 5;

/// Whether the kernel makes ring buffers, or refuses for another reason than not knowing them.
pub(crate) fn knows_ring_buffers() -> bool {
    const RING_BUFFER: u32 = 27;
    const SIZE: u32 = 65_536;
    // Kind, sizes of key and value, number of elements, flags.
    let mut attr = [RING_BUFFER, 0, 0, SIZE, 0, 0];
    // SAFETY: the beginning of the layout of BPF_MAP_CREATE.
    let result = unsafe { bpf(MAP_CREATE, &mut attr) };
    known(result.and_then(owned).map(drop))
}

#[repr(C)]
struct ProgramLoadAttr {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    /// Log, kernel version, flags, name, interface.
    rest: [u32; 11],
    attach_type: u32,
}

/// A kind of programs, and what they are attached as where that must be said.
#[derive(Clone, Copy)]
pub(crate) struct ProgramKind(u32, u32);

pub(crate) const CLASSIFIER: ProgramKind = ProgramKind(3, 0);
pub(crate) const ON_CONNECT: ProgramKind = ProgramKind(18, AttachType::Connect4 as u32);

/// Whether such programs may call that function, with four zeros.
pub(crate) fn knows_helper(ProgramKind(kind, attach_type): ProgramKind, number: u32) -> bool {
    const SET: u64 = 0xb7;
    const CALL: u64 = 0x85;
    const EXIT: u64 = 0x95;
    // The register is in the second byte, the number in the last four.
    let set = |register: u64, number: u64| SET | register << 8 | number << 32;
    let call = CALL | u64::from(number) << 32;
    let instructions = [set(1, 0), set(2, 0), set(3, 0), set(4, 0), call, set(0, 1), EXIT];
    let mut attr = ProgramLoadAttr {
        kind,
        count: 7,
        instructions: address(instructions.as_ptr()),
        license: address(c"GPL".as_ptr()),
        rest: [0; 11],
        attach_type,
    };
    // SAFETY: the beginning of the layout of BPF_PROG_LOAD; instructions and license live through the call.
    let result = unsafe { bpf(PROG_LOAD, &mut attr) };
    known(result.and_then(owned).map(drop))
}

fn known(result: io::Result<()>) -> bool {
    result.err().is_none_or(|error| error.raw_os_error() != Some(libc::EINVAL))
}

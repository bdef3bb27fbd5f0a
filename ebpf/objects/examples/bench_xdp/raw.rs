//! A program made of single instructions, and what aya does not do with such: load, attach, run on live frames.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

const PROG_LOAD: i64 = 5;
const PROG_TEST_RUN: i64 = 10;
const LINK_CREATE: i64 = 28;
const TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const NATIVE: u32 = 4;
const LIVE_FRAMES: u32 = 2;

pub(crate) const DROP: i32 = 1;
pub(crate) const PASS: i32 = 2;
const TX: i32 = 3;

/// Calls bpf(2).
fn bpf<T>(command: i64, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: each caller gives the layout of its command, with pointers that live for the call.
    #[allow(unsafe_code, reason = "bpf(2)")]
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(RawFd::try_from(result).unwrap()) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just given it to us.
    #[allow(unsafe_code, reason = "bpf(2)")]
    unsafe {
        OwnedFd::from_raw_fd(fd)
    }
}

fn address<T>(of: *const T) -> u64 {
    of.addr() as u64
}

/// `struct bpf_insn`.
fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    let registers = to | from << 4;
    u64::from(code)
        | u64::from(registers) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(value.cast_unsigned()) << 32
}

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    rest: [u64; 12],
}

fn load(instructions: &[u64]) -> OwnedFd {
    let license = c"GPL";
    let mut attr = LoadAttr {
        kind: TYPE_XDP,
        count: u32::try_from(instructions.len()).unwrap(),
        instructions: address(instructions.as_ptr()),
        license: address(license.as_ptr()),
        rest: [0; 12],
    };
    owned(bpf(PROG_LOAD, &mut attr).unwrap())
}

/// A program that does one thing with each frame.
pub(crate) fn always(action: i32) -> OwnedFd {
    load(&[instruction(0xb7, 0, 0, 0, action), instruction(0x95, 0, 0, 0, 0)])
}

/// A program that writes `frame` into each frame and sends it out.
pub(crate) fn sender(frame: &[u8]) -> OwnedFd {
    assert!(frame.len().is_multiple_of(4));
    let words = frame.chunks(4).map(|word| i32::from_ne_bytes(word.try_into().unwrap()));
    let length = i32::try_from(frame.len()).unwrap();
    let mut all = vec![
        // From and to where there is room, and whether that is enough.
        instruction(0x61, 2, 1, 0, 0),
        instruction(0x61, 3, 1, 4, 0),
        instruction(0xbf, 4, 2, 0, 0),
        instruction(0x07, 4, 0, 0, length),
        instruction(0xb7, 0, 0, 0, DROP),
        instruction(0x2d, 4, 3, i16::try_from(frame.len() / 4 + 1).unwrap(), 0),
    ];
    all.extend((0..).step_by(4).zip(words).map(|(at, word)| instruction(0x62, 2, 0, at, word)));
    all.extend([instruction(0xb7, 0, 0, 0, TX), instruction(0x95, 0, 0, 0, 0)]);
    load(&all)
}

#[repr(C)]
struct LinkAttr {
    program: u32,
    target: u32,
    kind: u32,
    flags: u32,
    rest: [u64; 4],
}

/// Attaches to an interface of the calling thread's namespace.
pub(crate) fn attach(program: &OwnedFd, interface: u32) -> OwnedFd {
    let program = program.as_raw_fd().cast_unsigned();
    let mut attr =
        LinkAttr { program, target: interface, kind: ATTACH_XDP, flags: NATIVE, rest: [0; 4] };
    owned(bpf(LINK_CREATE, &mut attr).unwrap())
}

#[repr(C)]
#[derive(Default)]
struct RunAttr {
    program: u32,
    result: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    pad: u32,
}

/// Runs a program on so many frames, as if they came in by that interface of the calling thread's namespace.
pub(crate) fn run(program: &OwnedFd, frame: &[u8], interface: u32, count: u32) {
    let length = u32::try_from(frame.len()).unwrap();
    let context: [u32; 6] = [0, length, 0, interface, 0, 0];
    let mut attr = RunAttr {
        program: program.as_raw_fd().cast_unsigned(),
        data_size_in: length,
        data_in: address(frame.as_ptr()),
        repeat: count,
        context_size_in: 24,
        context_in: address(context.as_ptr()),
        flags: LIVE_FRAMES,
        batch: 64,
        ..RunAttr::default()
    };
    bpf(PROG_TEST_RUN, &mut attr).unwrap();
}

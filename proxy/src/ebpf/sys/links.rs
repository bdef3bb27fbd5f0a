//! Links: programs at what they are attached to.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::{bpf, info, number, owned};

const LINK_CREATE: i64 = 28;
const LINK_UPDATE: i64 = 29;
const LINK_DETACH: i64 = 34;

/// What a program is attached as (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub(crate) enum AttachType {
    Connect4 = 10,
    Connect6 = 11,
    SendMsg4 = 14,
    SendMsg6 = 15,
    RecvMsg4 = 19,
    RecvMsg6 = 20,
    GetPeerName4 = 29,
    GetPeerName6 = 30,
    SockRelease = 34,
    TcxIngress = 46,
    TcxEgress = 47,
    Xdp = 37,
}

#[repr(C)]
struct LinkCreateAttr {
    program: u32,
    /// A cgroup's descriptor, or an interface index.
    target: u32,
    attach_type: u32,
    flags: u32,
    rest: [u64; 4],
}

/// Attaches a program to a cgroup (by descriptor) or an interface (by index, in the calling thread's network namespace).
pub(crate) fn create_link(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    create_link_with(program, target, attach_type, 0)
}

/// Attaches a program to an interface at XDP, in the mode that the flags (`XDP_FLAGS_*`) say.
pub(crate) fn create_xdp_link(
    program: BorrowedFd<'_>,
    interface: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    create_link_with(program, interface, AttachType::Xdp, flags)
}

fn create_link_with(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: AttachType,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        program: number(program),
        target,
        attach_type: attach_type as u32,
        flags,
        rest: [0; 4],
    };
    // SAFETY: the layout of BPF_LINK_CREATE without pointers.
    owned(unsafe { bpf(LINK_CREATE, &mut attr) }?)
}

/// Why a link of no program is refused: what the kernel does not know at all, it refuses otherwise.
pub(crate) fn refusal_of_link(attach_type: AttachType) -> io::Error {
    let program = u32::MAX;
    let attach_type = attach_type as u32;
    let mut attr = LinkCreateAttr { program, target: 0, attach_type, flags: 0, rest: [0; 4] };
    // SAFETY: as above.
    let result = unsafe { bpf(LINK_CREATE, &mut attr) };
    result.err().unwrap_or_else(|| io::ErrorKind::AlreadyExists.into())
}

#[repr(C)]
struct LinkUpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Puts another program in the place of a link's, between two packets.
pub(crate) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (link, program) = (number(link), number(program));
    let mut attr = LinkUpdateAttr { link, program, flags: 0, old_program: 0 };
    // SAFETY: the layout of BPF_LINK_UPDATE without pointers.
    unsafe { bpf(LINK_UPDATE, &mut attr) }.map(drop)
}

/// Takes a link's program away at once; without this it goes some time after the last descriptor and pin.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut link = number(link);
    // SAFETY: the layout of BPF_LINK_DETACH is one descriptor.
    unsafe { bpf(LINK_DETACH, &mut link) }.map(drop)
}

/// What the kernel says of a link. The target is 0 when what it was attached to is gone.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    kind: u32,
    pub(crate) id: u32,
    pub(crate) program: u32,
    pad: u32,
    /// Interface index, or a cgroup's number.
    target: [u32; 2],
    rest: [u64; 5],
}

impl LinkInfo {
    const CGROUP: u32 = 3;

    /// Interface index, or a cgroup's number (that of its folder).
    fn target(&self) -> u64 {
        let [low, high] = self.target.map(u64::from);
        if self.kind == Self::CGROUP { high << 32 | low } else { low }
    }

    /// Whether it is still attached to something.
    pub(crate) fn is_attached(&self) -> bool {
        self.target() != 0
    }

    pub(crate) fn is_attached_to(&self, target: u64) -> bool {
        self.target() == target
    }
}

pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    // SAFETY: the layout for links; it has no pointers that the kernel would follow unless a length beside them is given.
    unsafe { info(link, LinkInfo::default()) }
}

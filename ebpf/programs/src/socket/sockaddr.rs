//! The address that a hook is about, read and written in one form for both families.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use keelson_ebpf_abi::Address;

pub const TCP: u32 = 6;
pub const UDP: u32 = 17;

#[derive(Clone, Copy)]
pub struct SocketAddress {
    pub address: Address,
    pub port_be: u16,
}

/// How a hook's address is laid out.
pub trait Family {
    fn read(ctx: &SockAddrContext) -> SocketAddress;
    fn write(ctx: &SockAddrContext, to: &SocketAddress);
}

/// Hooks whose name ends in 4.
pub struct V4;
/// Hooks whose name ends in 6. IPv4-mapped addresses have the very form of [`Address`].
pub struct V6;

/// Volatile, since the verifier knows these fields as words: the compiler must not merge or narrow them.
macro_rules! field {
    ($ctx:ident, $($path:tt)+) => {
        // SAFETY: the kernel passes a valid context; the verifier checks offset and size.
        unsafe { (&raw const (*$ctx.sock_addr).$($path)+).read_volatile() }
    };
}
pub(crate) use field;

macro_rules! set_field {
    ($ctx:ident, $($path:tt)+) => {
        (&raw mut (*$ctx.sock_addr).$($path)+)
    };
}

impl Family for V4 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> SocketAddress {
        let address = Address::v4(field!(ctx, user_ip4));
        SocketAddress { address, port_be: field!(ctx, user_port) as u16 }
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, to: &SocketAddress) {
        // SAFETY: these fields may be written in every hook of this family.
        unsafe {
            set_field!(ctx, user_ip4).write_volatile(to.address.words_be[3]);
            set_field!(ctx, user_port).write_volatile(u32::from(to.port_be));
        }
    }
}

impl Family for V6 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> SocketAddress {
        let words_be = [
            field!(ctx, user_ip6[0]),
            field!(ctx, user_ip6[1]),
            field!(ctx, user_ip6[2]),
            field!(ctx, user_ip6[3]),
        ];
        SocketAddress { address: Address { words_be }, port_be: field!(ctx, user_port) as u16 }
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, to: &SocketAddress) {
        let [a, b, c, d] = to.address.words_be;
        // SAFETY: as above.
        unsafe {
            set_field!(ctx, user_ip6[0]).write_volatile(a);
            set_field!(ctx, user_ip6[1]).write_volatile(b);
            set_field!(ctx, user_ip6[2]).write_volatile(c);
            set_field!(ctx, user_ip6[3]).write_volatile(d);
            set_field!(ctx, user_port).write_volatile(u32::from(to.port_be));
        }
    }
}

impl SocketAddress {
    /// One comparison instead of five: each branch doubles the paths that the verifier has to walk.
    #[inline(always)]
    pub fn is(&self, address: &Address, port_be: u16) -> bool {
        let ([a, b, c, d], [e, f, g, h]) = (self.address.words_be, address.words_be);
        let ports = u32::from(self.port_be ^ port_be);
        core::hint::black_box((a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) | ports) == 0
    }

    /// Who is meant: connecting to "any address" connects to the loopback.
    #[inline(always)]
    pub fn meant(self) -> Self {
        if !self.address.is_unspecified() {
            return self;
        }
        let address = if self.address.is_v4() { Address::LOOPBACK4 } else { Address::LOOPBACK6 };
        SocketAddress { address, ..self }
    }
}

/// The context itself, for helpers.
#[inline(always)]
pub fn raw(ctx: &SockAddrContext) -> *mut core::ffi::c_void {
    let pointer: *mut bpf_sock_addr = ctx.sock_addr;
    pointer.cast()
}

/// Whether a socket was bound to an address of the loopback.
#[inline(always)]
pub fn is_bound_to_loopback(ctx: &SockAddrContext) -> bool {
    let sk = field!(ctx, __bindgen_anon_1.sk);
    // SAFETY: the socket lives as long as the hook runs; the verifier checks offset and size.
    let word = |i: usize| unsafe { (&raw const (*sk).src_ip6[i]).read_volatile() };
    // SAFETY: as above.
    let v4 = Address::v4(unsafe { (&raw const (*sk).src_ip4).read_volatile() });
    v4.is_loopback() || Address { words_be: [word(0), word(1), word(2), word(3)] }.is_loopback()
}

#[inline(always)]
pub fn is_connected(ctx: &SockAddrContext) -> bool {
    const ESTABLISHED: u32 = 1;
    let sk = field!(ctx, __bindgen_anon_1.sk);
    // SAFETY: as above.
    unsafe { (&raw const (*sk).state).read_volatile() == ESTABLISHED }
}

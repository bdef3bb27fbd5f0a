//! Socket load balancing.
#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "BPF helpers")]

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use keelson_ebpf::{endpoint, frontend};
use keelson_ebpf_abi::Address;

const ALLOW: i32 = 1;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    let addr = unsafe { &mut *ctx.sock_addr };
    let address = Address::v4(addr.user_ip4);
    let port = addr.user_port as u16;
    if let frontend::Found::Frontend(found) = frontend::find(&address, port, addr.protocol as u8) {
        if let Some(endpoint) = endpoint::choose(found.inside.pool, &address) {
            addr.user_ip4 = endpoint.address.words_be[3];
            addr.user_port = endpoint.port_be.into();
        }
    }
    ALLOW
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

//! Socket load balancing: the destination is translated when a socket speaks, so no packet is ever touched.
//!
//! | hook | does |
//! |---|---|
//! | connect | chooses an endpoint once, remembers it with the socket |
//! | sendmsg | the same for unconnected UDP, one endpoint for each Service that the socket speaks with |
//! | recvmsg, getpeername | give the Service's address back |
//! | release | forgets a socket that is closed |
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "the standard atomics do not know BPF's addition")]
#![expect(unsafe_code, reason = "BPF helpers")]

mod conversation;
mod decision;
mod events;
mod maps;
mod peer;
mod reverse;
mod sockaddr;
mod translate;

use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr};
use aya_ebpf::programs::{SockAddrContext, SockContext};

use sockaddr::{V4, V6};
use translate::Outcome;

const ALLOW: i32 = 1;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    verdict(translate::connect::<V4>(&ctx))
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    verdict(translate::connect::<V6>(&ctx))
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    verdict(translate::send::<V4>(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    verdict(translate::send::<V6>(&ctx))
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    reverse::receive::<V4>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    reverse::receive::<V6>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    reverse::peer_name::<V4>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    reverse::peer_name::<V6>(&ctx);
    ALLOW
}

#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    peer::release(&ctx);
    ALLOW
}

#[inline(always)]
fn verdict(outcome: Outcome) -> i32 {
    let allow = match outcome {
        Outcome::Fail => 0,
        Outcome::GoOn => ALLOW,
    };
    // The verifier must see the range, also where the compiler keeps the value on the stack meanwhile.
    core::hint::black_box(allow) & 1
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

//! Frames of connections that are known, sent on before the kernel makes packets of them.
//!
//! The programs for packets decide everything and remember it; here is only done again what they and the kernel between
//! them have done with other packets of the connection: both translations, and the way to the next hop. Whatever is
//! not plain, or would not be forwarded, goes to them.
#![no_std]
#![no_main]
// Every helper reads or writes kernel memory through pointers, which the verifier checks when a program is loaded.
#![expect(unsafe_code, reason = "BPF helpers")]

mod forward;
mod frame;
mod maps;
mod next_hop;
mod rewrite;

use aya_ebpf::bindings::xdp_action::XDP_PASS;
use aya_ebpf::{macros::xdp, programs::XdpContext};

#[xdp]
pub fn forward(ctx: XdpContext) -> u32 {
    forward::handle(ctx.ctx).unwrap_or(XDP_PASS)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

//! Load balancing of packets, at both ends of the way through the node: what arrives gets its new
//! destination, what leaves its new source, as netfilter does it. Routing, packet filters and reverse path
//! checks in between see what they are used to.
#![no_std]
#![no_main]
// Every helper reads or writes kernel memory through pointers, which the verifier checks when a program is loaded.
#![expect(unsafe_code, reason = "BPF helpers")]

mod answer;
mod arriving;
mod events;
mod flow;
mod fragment;
mod glance;
mod icmp;
mod leaving;
mod maps;
mod masquerade;
mod open;
mod own;
mod parse;
mod rewrite;
mod tell;
mod told;
mod verdict;

use aya_ebpf::{macros::classifier, programs::TcContext};

#[classifier]
pub fn ingress(ctx: TcContext) -> i32 {
    arriving::handle(ctx.skb.skb)
}

#[classifier]
pub fn egress(ctx: TcContext) -> i32 {
    leaving::handle(ctx.skb.skb)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

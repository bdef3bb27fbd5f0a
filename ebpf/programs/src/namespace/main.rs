//! Tells user space the number by which programs know a network namespace, where sockets do not say it themselves
//! (before Linux 5.14).
#![no_std]
#![no_main]
// Every helper reads or writes kernel memory through pointers, which the verifier checks when a program is loaded.
#![expect(unsafe_code, reason = "BPF helpers")]

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::btf_maps::LruHashMap;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie};
use aya_ebpf::macros::{btf_map, cgroup_sock};
use aya_ebpf::programs::SockContext;

/// The namespace of each socket that was made lately.
#[btf_map(name = "namespaces")]
static NAMESPACES: LruHashMap<u64, u64, 1_024> = LruHashMap::new();

#[cgroup_sock(sock_create)]
pub fn sock_create(ctx: SockContext) -> i32 {
    const ALLOW: i32 = 1;
    // SAFETY: the context is the one that the kernel passed.
    let (socket, namespace) = unsafe {
        (bpf_get_socket_cookie(ctx.sock.cast()), bpf_get_netns_cookie(ctx.sock.cast()))
    };
    // Without room user space does not find its own, and says so.
    let _ = NAMESPACES.insert(socket, namespace, u64::from(BPF_ANY));
    ALLOW
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

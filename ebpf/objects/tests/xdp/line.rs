//! A node and all the world on one line, in network namespaces.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};

use aya::Ebpf;
use aya::programs::{SchedClassifier, TcAttachType, Xdp, XdpMode, tc};
use keelson_ebpf_abi::{
    ADDRESS_NODE, ADDRESS_NODE_PORTS, Address, Interface, MASQUERADE_ALWAYS, MEMBER_SERVING,
    SETTING_KNOWS_PODS, XDP_SENDS, XdpInterface,
};
use keelson_netlink::netns::Netns;
use keelson_netlink::route::{Link, Route, Rtnl, VethEnd, VethPair};
use keelson_netlink::sysctl;

use crate::kernel::{Kernel, ip, to_pool};
use crate::objects::load;

pub(crate) const NODE: [&str; 2] = ["198.51.100.1", "2001:db8:9::1"];
pub(crate) const CLIENT: [&str; 2] = ["198.51.100.7", "2001:db8:9::7"];
/// A pod of another node.
pub(crate) const POD: [&str; 2] = ["10.2.0.5", "fd02::5"];
const PODS: [&str; 2] = ["10.2.0.0/16", "fd02::/32"];

pub(crate) struct Line {
    pub(crate) node: Netns,
    pub(crate) world: Netns,
    /// The node's end.
    pub(crate) near: Link,
    pub(crate) far: Link,
}

impl Line {
    pub(crate) fn new() -> Self {
        let (node, world) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
        for netns in [&node, &world] {
            netns.run(prepare).unwrap();
        }
        let mut here = Rtnl::open_in(&node).unwrap();
        let mut there = Rtnl::open_in(&world).unwrap();
        here.create_veth(&VethPair {
            near: VethEnd { name: "eth0", mac: None, netns: None },
            far: VethEnd { name: "eth0", mac: None, netns: Some(world.as_fd()) },
            mtu: None,
        })
        .unwrap();
        there.set_up("lo").unwrap();
        there.set_up("eth0").unwrap();
        let near = here.link("eth0").unwrap().unwrap();
        let far = there.link("eth0").unwrap().unwrap();
        for v6 in [0, 1] {
            let bits = [24, 64][v6];
            let on_line = |address: &str| format!("{address}/{bits}").parse().unwrap();
            here.ensure_address(near.index, on_line(NODE[v6])).unwrap();
            there.ensure_address(far.index, on_line(CLIENT[v6])).unwrap();
            there.ensure_address(far.index, ip(POD[v6]).into()).unwrap();
            let route = Route {
                gateway: Some(ip(CLIENT[v6])),
                link: Some(near.index),
                ..Route::to(PODS[v6].parse().unwrap())
            };
            here.ensure_route(&route).unwrap();
        }
        Line { node, world, near, far }
    }

    /// The programs, with node ports 30080 that lead to the pod.
    pub(crate) fn programs(&self) -> (Kernel, Ebpf) {
        let (mut kernel, mut xdp) = load();
        for (v6, pool) in [(0, 1), (1, 2)] {
            let endpoint = SocketAddr::new(ip(POD[v6]), 8080).to_string();
            kernel.pool(pool, &[(&endpoint, 0, MEMBER_SERVING)]);
            let any = [Address::ANY4, Address::ANY6][v6];
            for protocol in [6, 17] {
                let frontend = to_pool(pool, pool, MASQUERADE_ALWAYS);
                kernel.frontend_at(any, 30080, protocol, frontend);
            }
            kernel.address(NODE[v6], ADDRESS_NODE | ADDRESS_NODE_PORTS);
        }
        kernel.settings(SETTING_KNOWS_PODS);
        let [address4, address6] = NODE.map(|address| ip(address).into());
        let interface = Interface { address4, address6, flags: 0 };
        kernel.hash("interfaces").insert(self.near.index, interface, 0).unwrap();
        let mut served: aya::maps::HashMap<_, u32, XdpInterface> =
            xdp.map_mut("xdp_interfaces").unwrap().try_into().unwrap();
        let link = self.near.mac.unwrap().0;
        served.insert(self.near.index, XdpInterface { link, flags: XDP_SENDS }, 0).unwrap();
        (kernel, xdp)
    }
}

fn prepare() {
    sysctl::write("net/ipv4/ip_forward", "1").unwrap();
    sysctl::write("net/ipv6/conf/all/forwarding", "1").unwrap();
    sysctl::write("net/ipv6/conf/default/accept_dad", "0").unwrap();
    sysctl::write("net/ipv6/conf/all/accept_dad", "0").unwrap();
    // As strict as a distribution may set it.
    sysctl::write("net/ipv4/conf/all/rp_filter", "1").unwrap();
}

/// In the calling thread's namespace.
pub(crate) fn attach_packets(kernel: &mut Kernel) {
    tc::qdisc_add_clsact("eth0").unwrap();
    for (program, kind) in [("egress", TcAttachType::Egress), ("ingress", TcAttachType::Ingress)] {
        let program: &mut SchedClassifier = kernel.program_mut(program);
        program.attach("eth0", kind).unwrap();
    }
}

/// In the calling thread's namespace.
pub(crate) fn attach_frames(xdp: &mut Ebpf, mode: XdpMode) {
    let program: &mut Xdp = xdp.program_mut("forward").unwrap().try_into().unwrap();
    program.attach("eth0", mode).unwrap();
}

/// Has an interface in the calling thread's namespace send packets with all checksums.
pub(crate) fn finish_checksums(name: &str) {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    const SET_TX_CHECKSUMS: u32 = 0x17;
    let mut setting = [SET_TX_CHECKSUMS, 0];
    // SAFETY: integers and arrays of them.
    #[allow(unsafe_code, reason = "a kernel structure")]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = setting.as_mut_ptr().cast();
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: the request, and the setting that it points to, live for the call.
    #[allow(unsafe_code, reason = "no crate at hand sets this")]
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

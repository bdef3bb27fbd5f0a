//! Real frames of real sockets, at XDP of a driver: bytes are right both ways, and the kernel has not forwarded them.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::thread;
use std::time::Duration;

use aya::Ebpf;
use aya::programs::{SchedClassifier, TcAttachType, Xdp, XdpMode, tc};
use keelson_ebpf_abi::{
    ADDRESS_NODE, ADDRESS_NODE_PORTS, Address, Interface, MASQUERADE_ALWAYS, MEMBER_SERVING,
    SETTING_KNOWS_PODS, XDP_SENDS, XdpInterface,
};
use keelson_netlink::netns::Netns;
use keelson_netlink::route::{Route, Rtnl, VethEnd, VethPair};
use keelson_netlink::sysctl;

use crate::kernel::{Kernel, ip, to_pool};
use crate::stage::load;

/// Only a failure takes so long.
const PATIENCE: Duration = Duration::from_secs(20);
const BULK: usize = 4 << 20;
const NODE: [&str; 2] = ["198.51.100.1", "2001:db8:9::1"];
const CLIENT: [&str; 2] = ["198.51.100.7", "2001:db8:9::7"];
/// A pod of another node.
const POD: [&str; 2] = ["10.2.0.5", "fd02::5"];
const PODS: [&str; 2] = ["10.2.0.0/16", "fd02::/32"];

/// A node and all the world on one line.
struct Line {
    kernel: Kernel,
    _programs: [Ebpf; 2],
    node: Netns,
    world: Netns,
}

impl Line {
    fn new(mode: XdpMode) -> Self {
        let (mut kernel, mut xdp) = load();
        // It knows no connections.
        let mut passing = Ebpf::load(keelson_ebpf_objects::XDP).unwrap();
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
        let (eth0, far) =
            (here.link("eth0").unwrap().unwrap(), there.link("eth0").unwrap().unwrap());
        for v6 in [0, 1] {
            let bits = [24, 64][v6];
            let on_line = |address: &str| format!("{address}/{bits}").parse().unwrap();
            here.ensure_address(eth0.index, on_line(NODE[v6])).unwrap();
            there.ensure_address(far.index, on_line(CLIENT[v6])).unwrap();
            there.ensure_address(far.index, ip(POD[v6]).into()).unwrap();
            let route = Route {
                gateway: Some(ip(CLIENT[v6])),
                link: Some(eth0.index),
                ..Route::to(PODS[v6].parse().unwrap())
            };
            here.ensure_route(&route).unwrap();
            let pool = u32::try_from(v6).unwrap() + 1;
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
        kernel.hash("interfaces").insert(eth0.index, interface, 0).unwrap();
        let mut served: aya::maps::HashMap<_, u32, XdpInterface> =
            xdp.map_mut("xdp_interfaces").unwrap().try_into().unwrap();
        let link = eth0.mac.unwrap().0;
        served.insert(eth0.index, XdpInterface { link, flags: XDP_SENDS }, 0).unwrap();
        world
            .run(|| {
                // Frames with all checksums, as they come by a wire, and an end that takes a driver's frames.
                ethtool("eth0", SET_TX_CHECKSUMS, 0);
                let program: &mut Xdp = passing.program_mut("forward").unwrap().try_into().unwrap();
                program.load().unwrap();
                program.attach("eth0", XdpMode::Driver).unwrap();
            })
            .unwrap();
        node.run(|| attach(&mut kernel, &mut xdp, mode)).unwrap();
        Line { kernel, _programs: [xdp, passing], node, world }
    }

    /// How many packets the node's kernel forwarded.
    fn forwarded(&self) -> u64 {
        let read = || {
            let v4 = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
            let v6 = std::fs::read_to_string("/proc/thread-self/net/snmp6").unwrap();
            let mut lines = v4.lines().filter(|line| line.starts_with("Ip:"));
            let names = lines.next().unwrap().split_whitespace();
            let values = lines.next().unwrap().split_whitespace();
            let v4 = names.zip(values).find(|(name, _)| *name == "ForwDatagrams").unwrap().1;
            let v6 = v6.lines().find(|line| line.starts_with("Ip6OutForwDatagrams")).unwrap();
            v4.parse::<u64>().unwrap()
                + v6.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        self.node.run(read).unwrap()
    }

    /// Sends much in both directions; returns whom the pod saw.
    fn transfer(&self, v6: usize) -> IpAddr {
        let listen = SocketAddr::new(ip(POD[v6]), 8080);
        let listener = self.world.run(|| TcpListener::bind(listen)).unwrap().unwrap();
        let pod = thread::spawn(move || {
            let (mut stream, peer) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            for byte in &mut all {
                *byte = !*byte;
            }
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(&all).unwrap();
            peer.ip()
        });
        let to = SocketAddr::new(ip(NODE[v6]), 30080);
        let connect = || TcpStream::connect_timeout(&to, PATIENCE);
        let mut client = self.world.run(connect).unwrap().unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.set_write_timeout(Some(PATIENCE)).unwrap();
        let sent: Vec<u8> = (0..BULK).map(|i| (i / 7 % 251) as u8).collect();
        client.write_all(&sent).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).unwrap();
        assert!(back.len() == sent.len() && back.iter().zip(&sent).all(|(a, b)| *a == !*b));
        pod.join().unwrap()
    }

    /// Asks the pod by UDP again and again; returns whom it saw.
    fn ask(&self, v6: usize, times: usize) -> IpAddr {
        let bind = |at: &str, port| UdpSocket::bind(SocketAddr::new(ip(at), port)).unwrap();
        let (server, client) =
            self.world.run(|| (bind(POD[v6], 8080), bind(CLIENT[v6], 0))).unwrap();
        let to = SocketAddr::new(ip(NODE[v6]), 30080);
        let mut seen = None;
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        for number in 0..times {
            let question = number.to_ne_bytes();
            let mut buffer = [0; 100];
            client.send_to(&question, to).unwrap();
            let (length, peer) = server.recv_from(&mut buffer).unwrap();
            assert_eq!(buffer[..length], question);
            server.send_to(&buffer[..length], peer).unwrap();
            let (length, answerer) = client.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], answerer), (&question[..], to));
            assert!(*seen.get_or_insert(peer) == peer, "the endpoint sees one client");
        }
        seen.unwrap().ip()
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

fn attach(kernel: &mut Kernel, xdp: &mut Ebpf, mode: XdpMode) {
    tc::qdisc_add_clsact("eth0").unwrap();
    for (program, kind) in [("egress", TcAttachType::Egress), ("ingress", TcAttachType::Ingress)] {
        let program: &mut SchedClassifier = kernel.program_mut(program);
        program.attach("eth0", kind).unwrap();
    }
    let program: &mut Xdp = xdp.program_mut("forward").unwrap().try_into().unwrap();
    program.attach("eth0", mode).unwrap();
}

const SET_TX_CHECKSUMS: u32 = 0x17;

/// Changes a setting of an interface in the calling thread's namespace.
fn ethtool(name: &str, command: u32, value: u32) {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    let mut setting = [command, value];
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

fn goes_by_xdp(mode: XdpMode) {
    let line = Line::new(mode);
    for v6 in [0, 1] {
        assert_eq!(line.transfer(v6), ip(NODE[v6]));
        assert_eq!(line.ask(v6, 1000), ip(NODE[v6]));
    }
    // Some thousand frames, of which the kernel saw the first ones, and those that it made larger ones of.
    let forwarded = line.forwarded();
    let seen = line.kernel.counters(1).packets + line.kernel.counters(2).packets;
    assert!(seen > 8000, "{seen} packets");
    assert!(forwarded < 400, "the kernel forwarded {forwarded} packets of {seen}");
    assert_eq!(line.kernel.drops().iter().sum::<u64>(), 0);
}

#[test]
fn frames_are_forwarded_by_the_driver() {
    goes_by_xdp(XdpMode::Driver);
}

#[test]
fn frames_are_forwarded_without_the_drivers_help() {
    goes_by_xdp(XdpMode::Skb);
}

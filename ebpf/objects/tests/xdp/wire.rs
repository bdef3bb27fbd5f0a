//! Real frames of real sockets, at XDP of a driver: bytes are right both ways, and the kernel has not forwarded them.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use aya::Ebpf;
use aya::programs::{Xdp, XdpMode};

use crate::kernel::{Kernel, ip};
use crate::line::{CLIENT, Line, NODE, POD, attach_frames, attach_packets};
use crate::transfer::both_ways;

/// Only a failure takes so long.
const PATIENCE: Duration = Duration::from_secs(20);
const BULK: usize = 4 << 20;

/// A node that forwards, and all the world.
struct Wire {
    line: Line,
    kernel: Kernel,
    _programs: [Ebpf; 2],
}

impl Wire {
    fn new(mode: XdpMode) -> Self {
        let line = Line::new();
        let (mut kernel, mut xdp) = line.programs();
        // It knows no connections.
        let mut passing = Ebpf::load(keelson_ebpf_objects::XDP).unwrap();
        line.world
            .run(|| {
                // Frames with all checksums, as they come by a wire, and an end that takes a driver's frames.
                crate::line::finish_checksums("eth0");
                let program = passing.program_mut("forward").unwrap();
                keelson_ebpf_objects::load(program).unwrap();
                let program: &mut Xdp = program.try_into().unwrap();
                program.attach("eth0", XdpMode::Driver).unwrap();
            })
            .unwrap();
        let attach = || {
            attach_packets(&mut kernel);
            attach_frames(&mut xdp, mode);
        };
        line.node.run(attach).unwrap();
        Wire { line, kernel, _programs: [xdp, passing] }
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
        self.line.node.run(read).unwrap()
    }

    /// Sends much in both directions; returns whom the pod saw.
    fn transfer(&self, v6: usize) -> IpAddr {
        let listen = SocketAddr::new(ip(POD[v6]), 8080);
        let listener = self.line.world.run(|| TcpListener::bind(listen)).unwrap().unwrap();
        let to = SocketAddr::new(ip(NODE[v6]), 30080);
        let connect = || TcpStream::connect_timeout(&to, PATIENCE);
        let near = self.line.world.run(connect).unwrap().unwrap();
        let (far, peer) = listener.accept().unwrap();
        both_ways(near, far, BULK);
        peer.ip()
    }

    /// Asks the pod by UDP again and again; returns whom it saw.
    fn ask(&self, v6: usize, times: usize) -> IpAddr {
        let bind = |at: &str, port| UdpSocket::bind(SocketAddr::new(ip(at), port)).unwrap();
        let (server, client) =
            self.line.world.run(|| (bind(POD[v6], 8080), bind(CLIENT[v6], 0))).unwrap();
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

fn goes_by_xdp(mode: XdpMode) {
    let wire = Wire::new(mode);
    for v6 in [0, 1] {
        assert_eq!(wire.transfer(v6), ip(NODE[v6]));
        assert_eq!(wire.ask(v6, 1000), ip(NODE[v6]));
    }
    // Some thousand frames, of which the kernel saw the first ones, and those that it made larger ones of.
    let forwarded = wire.forwarded();
    let seen = wire.kernel.counters(1).packets + wire.kernel.counters(2).packets;
    assert!(seen > 8000, "{seen} packets");
    assert!(forwarded < 400, "the kernel forwarded {forwarded} packets of {seen}");
    assert_eq!(wire.kernel.drops().iter().sum::<u64>(), 0);
}

#[test]
fn frames_are_forwarded_by_the_driver() {
    goes_by_xdp(XdpMode::Driver);
}

#[test]
fn frames_are_forwarded_without_the_drivers_help() {
    goes_by_xdp(XdpMode::Skb);
}

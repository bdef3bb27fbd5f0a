//! Network namespaces, links, addresses and routes, over netlink: no `ip` is needed.

use std::net::{Ipv6Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use ipnetwork::IpNetwork;
use keelson_netlink::netns::Netns;
use keelson_netlink::route::{Group, Route, Rtnl, VethEnd, VethPair};
use keelson_proxy::ebpf::EbpfConfig;

/// A network namespace.
pub(crate) struct Namespace {
    netns: Netns,
    /// Whose sockets are opened here, where that matters.
    ebpf: EbpfConfig,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let namespace =
            Namespace { netns: Netns::anonymous().unwrap(), ebpf: EbpfConfig::default() };
        namespace.rtnl().set_up("lo").unwrap();
        // Addresses are usable at once.
        for (sysctl, value) in [("all/accept_dad", "0"), ("default/accept_dad", "0")] {
            namespace.set(&format!("ipv6/conf/{sysctl}"), value);
        }
        // Every refusal is told, however many there are.
        namespace.set("ipv4/icmp_ratelimit", "0");
        namespace.set("ipv6/icmp/ratelimit", "0");
        namespace
    }

    /// The same namespace, for another holder.
    pub(crate) fn again(&self) -> Self {
        Namespace { netns: self.netns.try_clone().unwrap(), ebpf: self.ebpf.clone() }
    }

    /// From now on, sockets that are opened here belong to the node with that configuration.
    pub(crate) fn join(&mut self, ebpf: &EbpfConfig) {
        self.ebpf = ebpf.clone();
    }

    /// Where that node keeps what outlives it.
    pub(crate) fn pins(&self) -> &Path {
        &self.ebpf.pins
    }

    /// A path that leads to it, for this process.
    pub(crate) fn link(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.netns.as_fd().as_raw_fd()))
    }

    pub(crate) fn rtnl(&self) -> Rtnl {
        Rtnl::open_in(&self.netns).unwrap()
    }

    pub(crate) fn index(&self, link: &str) -> u32 {
        self.rtnl().link(link).unwrap().unwrap_or_else(|| panic!("no link {link}")).index
    }

    /// A cable to another namespace, plugged in and up at both ends.
    pub(crate) fn connect(&self, near: &str, other: &Namespace, far: &str) {
        let pair = VethPair {
            near: VethEnd { name: near, mac: None, netns: None },
            far: VethEnd { name: far, mac: None, netns: Some(other.netns.as_fd()) },
            mtu: None,
        };
        self.rtnl().create_veth(&pair).unwrap();
        other.rtnl().set_up(far).unwrap();
        self.wait_for_ipv6(near);
        other.wait_for_ipv6(far);
    }

    /// The kernel takes note of a carrier and finishes IPv6 addresses in its own time, on a busy machine
    /// after seconds. Until the link-local one is there, nobody asks for or tells a neighbour's address.
    fn wait_for_ipv6(&self, link: &str) {
        const HUNG: std::time::Duration = std::time::Duration::from_secs(10);
        const TENTATIVE: u32 = 0x40;
        let usable = |line: &str| {
            // Address, index, prefix length, scope, flags, link.
            let fields: Vec<&str> = line.split_whitespace().collect();
            let &[address, _, _, _, flags, name] = fields.as_slice() else { return None };
            let finished = u32::from_str_radix(flags, 16).is_ok_and(|f| f & TENTATIVE == 0);
            (name == link).then_some((address.starts_with("fe80"), finished))
        };
        let groups = [Group::Link, Group::Ipv6Address];
        let ready = self.rtnl().wait_for(&groups, HUNG, |_| {
            let listed = self.run(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6"));
            let addresses: Vec<_> = listed.unwrap().lines().filter_map(usable).collect();
            // The loopback interface has none.
            let link_local = link == "lo" || addresses.iter().any(|(link_local, _)| *link_local);
            Ok((link_local && addresses.iter().all(|(_, finished)| *finished)).then_some(()))
        });
        assert!(ready.unwrap().is_some(), "{link} has no IPv6");
    }

    /// Neighbours ask for an IPv6 address by multicast, and the kernel joins that group some time after
    /// the address is there: a question that comes before is lost, and repeated after a second.
    fn wait_for_questions(&self, link: &str, address: Ipv6Addr) {
        const HUNG: std::time::Duration = std::time::Duration::from_secs(10);
        if link == "lo" {
            return;
        }
        let [.., a, b, c] = address.octets();
        let group = format!("ff0200000000000000000001ff{a:02x}{b:02x}{c:02x}");
        let joined =
            |line: &str| line.contains(&group) && line.split_whitespace().nth(1) == Some(link);
        let began = std::time::Instant::now();
        while began.elapsed() < HUNG {
            let groups = self.run(|| std::fs::read_to_string("/proc/thread-self/net/igmp6"));
            if groups.unwrap().lines().any(joined) {
                return;
            }
            std::thread::yield_now();
        }
        panic!("{link} never joined the group of {address}");
    }

    /// Gives a link an address such as `10.0.0.1/24`.
    pub(crate) fn address(&self, link: &str, address: &str) {
        let network: IpNetwork = address.parse().unwrap();
        self.rtnl().ensure_address(self.index(link), network).unwrap();
        if let IpNetwork::V6(network) = network {
            self.wait_for_ipv6(link);
            self.wait_for_questions(link, network.ip());
        }
    }

    /// A route by way of a neighbour.
    pub(crate) fn route(&self, destination: &str, gateway: &str) {
        let route = Route {
            gateway: Some(gateway.parse().unwrap()),
            ..Route::to(destination.parse().unwrap())
        };
        self.rtnl().ensure_route(&route).unwrap();
    }

    /// A route to what is at the other end of a link.
    pub(crate) fn route_on(&self, address: &str, link: &str) {
        let route = Route::host(address.parse().unwrap(), self.index(link));
        self.rtnl().ensure_route(&route).unwrap();
    }

    /// No longer believes that these addresses are its own.
    pub(crate) fn forget_local(&self, range: &str) {
        const LOCAL_TABLE: u32 = 255;
        for range in [range, "127.0.0.1/32"] {
            let destination: IpNetwork = range.parse().unwrap();
            let mut rtnl = self.rtnl();
            let all = rtnl.routes().unwrap();
            let ours =
                |route: &&Route| route.table == LOCAL_TABLE && route.destination == destination;
            for route in all.iter().filter(ours) {
                rtnl.delete_route(route).unwrap();
            }
        }
    }

    /// Runs `work` on a thread inside the namespace. Sockets that it opens stay there.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let enter_and_work = || {
            self.ebpf.cgroup.as_deref().inspect(|cgroup| super::ebpf::enter(cgroup));
            work()
        };
        self.netns.run(enter_and_work).unwrap()
    }

    /// What a program prints that runs inside; it must be there and succeed.
    pub(crate) fn output(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.run(|| Command::new(program).args(arguments).output());
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Packets leave by that link with all checksums, as they come by a wire.
    pub(crate) fn finish_checksums(&self, link: &str) {
        const SIOCETHTOOL: libc::Ioctl = 0x8946;
        const SET_TX_CHECKSUMS: u32 = 0x17;
        let mut setting = [SET_TX_CHECKSUMS, 0];
        // SAFETY: integers and arrays of them.
        #[allow(unsafe_code, reason = "a kernel structure")]
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(link.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_data = setting.as_mut_ptr().cast();
        let socket = self.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        // SAFETY: the request, and the setting that it points to, live for the call.
        #[allow(unsafe_code, reason = "no crate at hand sets this")]
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    /// How many IPv4 packets were forwarded.
    pub(crate) fn forwarded(&self) -> u64 {
        let read = || std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
        let all = self.run(read);
        let mut lines = all.lines().filter(|line| line.starts_with("Ip:"));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let mut both = names.split_whitespace().zip(values.split_whitespace());
        both.find(|(name, _)| *name == "ForwDatagrams").unwrap().1.parse().unwrap()
    }

    /// How many packets left by a link.
    pub(crate) fn sent(&self, link: &str) -> u64 {
        const SENT: usize = 9;
        let all = self.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        let mut lines = all.lines().filter_map(|line| line.trim().strip_prefix(link));
        let values = lines.find_map(|line| line.strip_prefix(':')).unwrap();
        values.split_whitespace().nth(SENT).unwrap().parse().unwrap()
    }

    pub(crate) fn set(&self, sysctl: &str, value: &str) {
        let path = format!("/proc/sys/net/{sysctl}");
        // /proc/sys/net shows the namespace of the thread that opens it.
        self.run(|| std::fs::write(&path, value).unwrap_or_else(|e| panic!("{path}: {e}")));
    }
}

//! A node and a pod, each a network namespace, with the socket programs attached for the threads that
//! enter them, and the maps filled by hand.

use std::net::{IpAddr, SocketAddr};
use std::sync::OnceLock;

use aya::maps::{Array, HashMap, MapData, PerCpuHashMap};
use aya::programs::{CgroupAttachMode, CgroupSock, CgroupSockAddr, Program};
use aya::{Ebpf, EbpfLoader, Pod};
use keelson_ebpf_abi::{
    ADDRESS_CLUSTER_IP, Address, Counters, Endpoint, FILTER_ADDRESS, FilterPlace, Frontend,
    FrontendKey, MASQUERADE_NEVER, MEMBER_SERVING, MemberKey, Pool, Route, SETTING_KNOWS_PODS,
    Settings, SlotKey, VERDICT_FORWARD,
};
use keelson_netlink::netns::Netns;
use keelson_netlink::route::Rtnl;

use super::cgroup::{self, Cgroup};
use super::cookie;

pub(crate) const PROGRAMS: [&str; 8] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
];
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

pub(crate) struct World {
    pub(crate) bpf: Ebpf,
    pub(crate) cgroup: Cgroup,
    pub(crate) node: Netns,
    pub(crate) pod: Netns,
    last_number: u32,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with_set_retval(u8::from(has_set_retval()))
    }

    /// `1` when refusals are to be told by an error number, as on new kernels.
    pub(crate) fn with_set_retval(has_set_retval: u8) -> Self {
        Self::of(load(has_set_retval))
    }

    /// With room for so many sockets that are in no place of their own.
    pub(crate) fn with_room_for(sockets: u32) -> Self {
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("connected_tcp", sockets).map_max_entries("connected_udp", sockets);
        Self::of(loader.load(keelson_ebpf_objects::SOCKET).unwrap())
    }

    fn of(mut bpf: Ebpf) -> Self {
        let (node, pod) = (namespace(), namespace());
        let cgroup = Cgroup::make().unwrap();
        attach(&mut bpf, &cgroup);
        let mut world = World { bpf, cgroup, node, pod, last_number: 0 };
        world.set_settings(SETTING_KNOWS_PODS);
        world
    }

    pub(crate) fn set_settings(&mut self, flags: u32) {
        let host_cookie = cookie_of(&self.node);
        let settings = Settings { host_cookie, flags, ..Settings::default() };
        let map = self.bpf.map_mut("settings").unwrap();
        Array::try_from(map).unwrap().set(0, settings, 0).unwrap();
    }

    /// Runs `work` in the pod, on a thread that the programs see.
    pub(crate) fn in_pod<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.inside(&self.pod, work)
    }

    /// Runs `work` in the node's namespace, on a thread that the programs see.
    pub(crate) fn on_node<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.inside(&self.node, work)
    }

    fn inside<T: Send>(&self, netns: &Netns, work: impl FnOnce() -> T + Send) -> T {
        netns.run(|| self.cgroup.run(work).unwrap()).unwrap()
    }

    pub(crate) fn map<K: Pod, V: Pod>(&mut self, name: &str) -> HashMap<&mut MapData, K, V> {
        HashMap::try_from(self.bpf.map_mut(name).unwrap()).unwrap()
    }

    pub(crate) fn number(&mut self) -> u32 {
        self.last_number += 1;
        self.last_number
    }

    /// A pool with these endpoints, all serving.
    pub(crate) fn pool(&mut self, endpoints: &[SocketAddr], affinity_secs: u32) -> u32 {
        let pool = self.number();
        for (slot, endpoint) in (0..).zip(endpoints) {
            self.set_member(pool, *endpoint, MEMBER_SERVING);
            self.map("slots").insert(SlotKey { pool, slot }, endpoint_of(*endpoint), 0).unwrap();
        }
        let count = u32::try_from(endpoints.len()).unwrap();
        self.map("pools").insert(pool, Pool { count, affinity_secs }, 0).unwrap();
        pool
    }

    /// 0 ends the membership.
    pub(crate) fn set_member(&mut self, pool: u32, endpoint: SocketAddr, membership: u32) {
        let key = MemberKey { pool, endpoint: endpoint_of(endpoint) };
        let mut members = self.map::<_, u32>("members");
        match membership {
            0 => members.remove(&key).unwrap(),
            _ => members.insert(key, membership, 0).unwrap(),
        }
    }

    /// A frontend that everybody may use alike, with the number that is returned.
    pub(crate) fn frontend(&mut self, at: SocketAddr, protocol: u8, route: Route) -> u32 {
        let number = self.number();
        let frontend = Frontend { inside: route, outside: route, number, flags: 0 };
        self.set_frontend(at, protocol, frontend);
        number
    }

    pub(crate) fn set_frontend(&mut self, at: SocketAddr, protocol: u8, frontend: Frontend) {
        if !at.ip().is_unspecified() {
            self.know(at.ip());
        }
        self.map("frontends").insert(frontend_key(at, protocol), frontend, 0).unwrap();
    }

    pub(crate) fn remove_frontend(&mut self, at: SocketAddr, protocol: u8) {
        self.map::<_, Frontend>("frontends").remove(&frontend_key(at, protocol)).unwrap();
    }

    /// A ClusterIP with one port; returns the numbers of its frontend and its pool.
    pub(crate) fn service(
        &mut self,
        at: SocketAddr,
        protocol: u8,
        to: &[SocketAddr],
    ) -> (u32, u32) {
        let pool = self.pool(to, 0);
        self.set_address(at.ip(), ADDRESS_CLUSTER_IP);
        (self.frontend(at, protocol, forward(pool)), pool)
    }

    /// The filter lets it through.
    fn know(&mut self, address: IpAddr) {
        let place = FilterPlace::of_address(&address.into());
        let map = self.bpf.map_mut("destinations").unwrap();
        let mut filter = Array::<_, [u8; 8]>::try_from(map).unwrap();
        let mut word = filter.get(&place.word, 0).unwrap();
        word[place.flag as usize] |= FILTER_ADDRESS;
        filter.set(place.word, word, 0).unwrap();
    }

    pub(crate) fn set_address(&mut self, address: IpAddr, flags: u32) {
        self.know(address);
        self.map("addresses").insert(Address::from(address), flags, 0).unwrap();
    }

    /// Of a frontend, all CPUs together.
    pub(crate) fn counters(&mut self, frontend: u32) -> Counters {
        self.counters_if_any(frontend).unwrap()
    }

    pub(crate) fn counters_if_any(&mut self, frontend: u32) -> Option<Counters> {
        let map = self.bpf.map_mut("counters").unwrap();
        let counters: PerCpuHashMap<_, u32, Counters> = PerCpuHashMap::try_from(map).unwrap();
        let all = counters.get(&frontend, 0).ok()?;
        Some(all.iter().fold(Counters::default(), |sum, one| Counters {
            connections: sum.connections + one.connections,
            packets: sum.packets + one.packets,
            bytes: sum.bytes + one.bytes,
            refused: sum.refused + one.refused,
        }))
    }
}

pub(crate) fn forward(pool: u32) -> Route {
    Route { pool, verdict: VERDICT_FORWARD, masquerade: MASQUERADE_NEVER, zero: 0 }
}

fn load(has_set_retval: u8) -> Ebpf {
    let mut loader = EbpfLoader::new();
    loader.override_global("HAS_SET_RETVAL", &has_set_retval, true);
    loader.load(keelson_ebpf_objects::SOCKET).unwrap()
}

/// Whether this kernel can tell refusals by an error number (Linux 6.1).
pub(crate) fn has_set_retval() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        let mut bpf = load(1);
        keelson_ebpf_objects::load(bpf.program_mut("connect4").unwrap()).is_ok()
    })
}

/// The number by which programs know a namespace.
pub(crate) fn cookie_of(netns: &Netns) -> u64 {
    cookie::cookie(netns, &cgroup::mount().unwrap()).unwrap()
}

pub(crate) fn attach(bpf: &mut Ebpf, cgroup: &Cgroup) {
    let folder = cgroup.open().unwrap();
    for name in PROGRAMS {
        let program: &mut CgroupSockAddr = loaded(bpf, name).try_into().unwrap();
        program.attach(&folder, CgroupAttachMode::Single).unwrap();
    }
    let program: &mut CgroupSock = loaded(bpf, "sock_release").try_into().unwrap();
    program.attach(&folder, CgroupAttachMode::Single).unwrap();
}

fn loaded<'b>(bpf: &'b mut Ebpf, name: &str) -> &'b mut Program {
    let program = bpf.program_mut(name).unwrap();
    keelson_ebpf_objects::load(program).unwrap();
    program
}

pub(crate) fn endpoint_of(at: SocketAddr) -> Endpoint {
    Endpoint { address: at.ip().to_canonical().into(), port_be: at.port().to_be(), flags: 0 }
}

/// `0.0.0.0` and `::` stand for node ports.
pub(crate) fn frontend_key(at: SocketAddr, protocol: u8) -> FrontendKey {
    FrontendKey { address: at.ip().into(), port_be: at.port().to_be(), protocol, zero: 0 }
}

/// A namespace in which all addresses of 10.66.0.0/16 and fd00:66::/32 are local.
fn namespace() -> Netns {
    let netns = Netns::anonymous().unwrap();
    let mut rtnl = Rtnl::open_in(&netns).unwrap();
    rtnl.set_up("lo").unwrap();
    let lo = rtnl.link("lo").unwrap().unwrap().index;
    for network in ["10.66.0.1/16", "fd00:66::1/128", "fd00:66::2/128", "fd00:66::3/128"] {
        rtnl.ensure_address(lo, network.parse().unwrap()).unwrap();
    }
    netns
}

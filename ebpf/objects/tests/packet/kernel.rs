//! The programs in the kernel, and their maps.

use std::net::{IpAddr, SocketAddr};

use aya::maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray, PerCpuHashMap, RingBuf, lpm_trie};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader, Pod};
use keelson_ebpf_abi::{
    Address, Counters, DROP_REASONS, Endpoint, Event, FILTER_ADDRESS, FILTER_RANGE, FilterPlace,
    Flow, Frontend, FrontendKey, Interface, MemberKey, Pool, RangeKey, Route, SETTING_KNOWS_PODS,
    Settings, SlotKey, SourceKey, Tuple, VERDICT_FORWARD,
};

use crate::bytes::{Sent, at};

pub(crate) const PASS: i32 = -1;
pub(crate) const DROP: i32 = 2;
pub(crate) const REDIRECT: i32 = 7;

/// The interface that the kernel runs programs on when it is told nothing else.
pub(crate) const INTERFACE: u32 = 1;
/// Its addresses.
pub(crate) const NODE4: &str = "192.0.2.1";
pub(crate) const NODE6: &str = "2001:db8::1";

pub(crate) struct Kernel {
    ebpf: Ebpf,
}

impl Kernel {
    /// With [`INTERFACE`], pods in 10.1.0.0/16 and fd01::/16, and no Services.
    pub(crate) fn new() -> Self {
        Self::with_flows(1024).prepared()
    }

    pub(crate) fn prepared(mut self) -> Self {
        let kernel = &mut self;
        let interface =
            Interface { address4: ip(NODE4).into(), address6: ip(NODE6).into(), flags: 0 };
        kernel.interface(INTERFACE, interface);
        kernel.settings(SETTING_KNOWS_PODS);
        kernel.range("pod_ranges", "10.1.0.0", 16);
        kernel.range("pod_ranges", "fd01::", 16);
        self
    }

    pub(crate) fn with_flows(flows: u32) -> Self {
        Self::loaded(&mut EbpfLoader::new(), flows)
    }

    /// As the loader has it, with small maps.
    pub(crate) fn loaded(loader: &mut EbpfLoader<'_>, flows: u32) -> Self {
        for map in ["frontends", "pools", "slots", "members", "addresses", "counters"] {
            loader.map_max_entries(map, 1024);
        }
        for map in ["flows_in", "flows_out"] {
            loader.map_max_entries(map, flows);
        }
        loader.map_max_entries("affinity", 1024);
        let mut ebpf = loader.load(keelson_ebpf_objects::PACKET).unwrap();
        for name in ["ingress", "egress"] {
            keelson_ebpf_objects::load(ebpf.program_mut(name).unwrap()).unwrap();
        }
        Kernel { ebpf }
    }

    pub(crate) fn settings(&mut self, flags: u32) {
        let settings = Settings { flags, ..Settings::default() };
        let map = self.ebpf.map_mut("settings").unwrap();
        Array::<_, Settings>::try_from(map).unwrap().set(0, settings, 0).unwrap();
    }

    /// `WATCH_*`
    pub(crate) fn watch(&mut self, wants: u32) {
        let map = self.ebpf.map_mut("watched").unwrap();
        Array::<_, u32>::try_from(map).unwrap().set(0, wants, 0).unwrap();
    }

    pub(crate) fn events_lost(&self) -> u64 {
        let map: PerCpuArray<_, u64> =
            PerCpuArray::try_from(self.ebpf.map("events_lost").unwrap()).unwrap();
        map.get(&0, 0).unwrap().iter().sum()
    }

    /// As while user space moves connections to other maps.
    pub(crate) fn hold_until(&mut self, held_until_ns: u64) {
        let map = self.ebpf.map_mut("settings").unwrap();
        let mut map = Array::<_, Settings>::try_from(map).unwrap();
        let settings = map.get(&0, 0).unwrap();
        map.set(0, Settings { held_until_ns, ..settings }, 0).unwrap();
    }

    pub(crate) fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> HashMap<&mut MapData, K, V> {
        HashMap::try_from(self.ebpf.map_mut(name).unwrap()).unwrap()
    }

    pub(crate) fn range(&mut self, map: &str, address: &str, bits: u32) {
        let address = ip(address);
        let bits = if address.is_ipv4() { 96 + bits } else { bits };
        if map == "service_ranges" {
            self.know("destinations", FilterPlace::of_range(&address.into()), FILTER_RANGE);
        }
        let key = lpm_trie::Key::new(bits, RangeKey { address: address.into() });
        let mut trie: LpmTrie<_, RangeKey, u32> =
            LpmTrie::try_from(self.ebpf.map_mut(map).unwrap()).unwrap();
        trie.insert(&key, 1, 0).unwrap();
    }

    pub(crate) fn source(&mut self, frontend: u32, address: &str, bits: u32) {
        let address = ip(address);
        let bits = 32 + if address.is_ipv4() { 96 + bits } else { bits };
        let key = lpm_trie::Key::new(bits, SourceKey { frontend, address: address.into() });
        let mut trie: LpmTrie<_, SourceKey, u32> =
            LpmTrie::try_from(self.ebpf.map_mut("sources").unwrap()).unwrap();
        trie.insert(&key, 1, 0).unwrap();
    }

    /// An interface and the addresses that packets are masqueraded with there.
    pub(crate) fn interface(&mut self, index: u32, interface: Interface) {
        for address in [interface.address4, interface.address6] {
            self.know("destinations", FilterPlace::of_address(&address), FILTER_ADDRESS);
        }
        self.hash("interfaces").insert(index, interface, 0).unwrap();
    }

    /// The filter `map` lets it through.
    pub(crate) fn know(&mut self, map: &str, place: FilterPlace, flag: u8) {
        let map = self.ebpf.map_mut(map).unwrap();
        let mut filter = Array::<_, [u8; 8]>::try_from(map).unwrap();
        let mut word = filter.get(&place.word, 0).unwrap();
        word[place.flag as usize] |= flag;
        filter.set(place.word, word, 0).unwrap();
    }

    pub(crate) fn address(&mut self, address: &str, flags: u32) {
        self.know("destinations", FilterPlace::of_address(&ip(address).into()), FILTER_ADDRESS);
        self.hash("addresses").insert(Address::from(ip(address)), flags, 0).unwrap();
    }

    /// A pool whose endpoints are members with these flags.
    pub(crate) fn pool(&mut self, number: u32, endpoints: &[(&str, u16, u32)]) {
        for (slot, (endpoint, flags, membership)) in endpoints.iter().enumerate() {
            let slot = u32::try_from(slot).unwrap();
            let endpoint = Endpoint { flags: *flags, ..endpoint_of(at(endpoint)) };
            self.hash("slots").insert(SlotKey { pool: number, slot }, endpoint, 0).unwrap();
            let key = MemberKey { pool: number, endpoint: Endpoint { flags: 0, ..endpoint } };
            self.hash("members").insert(key, *membership, 0).unwrap();
        }
        let count = u32::try_from(endpoints.len()).unwrap();
        self.hash("pools").insert(number, Pool { count, affinity_secs: 0 }, 0).unwrap();
    }

    pub(crate) fn frontend(&mut self, at_: &str, protocol: u8, frontend: Frontend) {
        let at = at(at_);
        self.frontend_at(at.ip().into(), at.port(), protocol, frontend);
    }

    pub(crate) fn frontend_at(
        &mut self,
        address: Address,
        port: u16,
        protocol: u8,
        frontend: Frontend,
    ) {
        if !address.is_unspecified() {
            self.know("destinations", FilterPlace::of_address(&address), FILTER_ADDRESS);
        }
        let key = FrontendKey { address, port_be: port.to_be(), protocol, zero: 0 };
        self.hash("frontends").insert(key, frontend, 0).unwrap();
    }

    /// What becomes of a packet that arrives.
    pub(crate) fn arrives(&mut self, packet: &Sent) -> (i32, Vec<u8>) {
        self.run("ingress", &packet.bytes())
    }

    /// What becomes of a packet that leaves and came in by another interface.
    pub(crate) fn leaves(&mut self, packet: &Sent) -> (i32, Vec<u8>) {
        self.run("egress", &packet.bytes())
    }

    #[track_caller]
    pub(crate) fn arrives_as(&mut self, packet: &Sent, expected: &Sent) {
        same(&self.arrives(packet), expected);
    }

    #[track_caller]
    pub(crate) fn leaves_as(&mut self, packet: &Sent, expected: &Sent) {
        same(&self.leaves(packet), expected);
    }

    pub(crate) fn run(&mut self, program: &str, packet: &[u8]) -> (i32, Vec<u8>) {
        self.run_from(program, packet, 77)
    }

    pub(crate) fn program_mut(&mut self, name: &str) -> &mut SchedClassifier {
        self.ebpf.program_mut(name).unwrap().try_into().unwrap()
    }

    /// `from` is the interface that the packet came in by; 0: the node made it.
    pub(crate) fn run_from(&mut self, program: &str, packet: &[u8], from: u32) -> (i32, Vec<u8>) {
        let program: &SchedClassifier = self.ebpf.program(program).unwrap().try_into().unwrap();
        let mut out = vec![0; packet.len() + 512];
        let context = context(from);
        let mut run = |context| {
            program.test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut out),
                ctx_in: context,
                ..TestRunOptions::default()
            })
        };
        // Before Linux 5.12 nobody could say where a packet came in: there the node made it.
        let result = run(Some(&context)).or_else(|_| run(None)).unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value.cast_signed(), out)
    }

    /// Nanoseconds that a program takes for a packet on average.
    pub(crate) fn time(&self, program: &str, packet: &Sent, runs: u32) -> u128 {
        let program: &SchedClassifier = self.ebpf.program(program).unwrap().try_into().unwrap();
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(&packet.bytes()),
                ctx_in: Some(&context(77)),
                repeat: runs,
                ..TestRunOptions::default()
            })
            .unwrap();
        result.duration.as_nanos()
    }

    pub(crate) fn flows(&mut self, map: &str) -> Vec<(Tuple, Flow)> {
        self.hash(map).iter().map(Result::unwrap).collect()
    }

    pub(crate) fn change_flow(&mut self, map: &str, key: &Tuple, change: impl FnOnce(&mut Flow)) {
        let mut flows = self.hash::<Tuple, Flow>(map);
        let mut flow = flows.get(key, 0).unwrap();
        change(&mut flow);
        flows.insert(key, flow, 0).unwrap();
    }

    pub(crate) fn counters(&self, frontend: u32) -> Counters {
        let map: PerCpuHashMap<_, u32, Counters> =
            PerCpuHashMap::try_from(self.ebpf.map("counters").unwrap()).unwrap();
        let mut sum = Counters::default();
        for cpu in map.get(&frontend, 0).unwrap().iter() {
            sum.connections += cpu.connections;
            sum.packets += cpu.packets;
            sum.bytes += cpu.bytes;
            sum.refused += cpu.refused;
        }
        sum
    }

    /// What a monitor has not read yet.
    pub(crate) fn events(&mut self) -> Vec<Event> {
        let mut ring = RingBuf::try_from(self.ebpf.map_mut("events").unwrap()).unwrap();
        let mut events = Vec::new();
        while let Some(item) = ring.next() {
            assert_eq!(item.len(), size_of::<Event>());
            // SAFETY: it is as long as the type, which any bytes are a value of.
            #[allow(unsafe_code, reason = "plain data from the kernel")]
            events.push(unsafe { item.as_ptr().cast::<Event>().read_unaligned() });
        }
        events
    }

    /// How many were dropped, by reason.
    pub(crate) fn drops(&self) -> [u64; DROP_REASONS] {
        let map: PerCpuArray<_, u64> =
            PerCpuArray::try_from(self.ebpf.map("drops").unwrap()).unwrap();
        std::array::from_fn(|reason| {
            map.get(&u32::try_from(reason).unwrap(), 0).unwrap().iter().sum()
        })
    }
}

/// A `struct __sk_buff` that says by which interfaces a packet comes and goes.
fn context(from: u32) -> [u8; 192] {
    const INGRESS_IFINDEX: usize = 36;
    let mut context = [0; 192];
    context[INGRESS_IFINDEX..INGRESS_IFINDEX + 4].copy_from_slice(&from.to_ne_bytes());
    context
}

/// The key of a packet's flow.
pub(crate) fn tuple(packet: &Sent) -> Tuple {
    Tuple {
        source: packet.source.ip().into(),
        destination: packet.destination.ip().into(),
        source_port_be: packet.source.port().to_be(),
        destination_port_be: packet.destination.port().to_be(),
        protocol: packet.protocol(),
        ..Tuple::default()
    }
}

#[track_caller]
pub(crate) fn same((verdict, bytes): &(i32, Vec<u8>), expected: &Sent) {
    assert_eq!(*verdict, PASS, "the packet must go on");
    assert_eq!(hex(bytes), hex(&expected.bytes()), "it must be {expected:?}");
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    let line = |line: &[u8]| line.iter().map(|b| format!("{b:02x} ")).collect::<String>();
    bytes.chunks(16).map(line).collect::<Vec<_>>().join("\n")
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn endpoint_of(at: SocketAddr) -> Endpoint {
    Endpoint { address: at.ip().into(), port_be: at.port().to_be(), flags: 0 }
}

/// A frontend that treats everybody alike.
pub(crate) fn to_pool(number: u32, pool: u32, masquerade: u8) -> Frontend {
    let route = Route { pool, verdict: VERDICT_FORWARD, masquerade, zero: 0 };
    Frontend { inside: route, outside: route, number, flags: 0 }
}

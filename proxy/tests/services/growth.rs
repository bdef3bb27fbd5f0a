//! Maps of the eBPF mode that become larger, are of another version, or are full.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use keelson_ebpf_abi::{Flow, Tuple, VERSION};
use keelson_proxy::backend::MapFill;
use keelson_proxy::ebpf::{EbpfConfig, Sockets};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::stage::*;
use crate::world::{World, endpoint, eventually, node_object, service, with_configured_proxy};

rows![
    tables_grow_under_traffic_and_no_connection_is_lost,
    a_full_table_forgets_who_is_silent_and_says_so,
    maps_of_services_grow_with_them,
    a_service_that_does_not_fit_is_refused_by_name,
    an_alarm_is_raised_before_a_map_is_full,
    connections_outlive_a_change_of_layouts_forth_and_back,
    connections_outlive_the_loss_of_a_filter,
];

fn only_ebpf(mode: Mode) {
    if mode != Mode::Ebpf {
        skip("only eBPF has maps of a limited size");
    }
}

/// A node whose sockets are left to the packet layer, which has the tables.
pub(crate) fn packets_only(max_flows: u32) -> BackendConfig {
    let pods = ["10.66.0.0/16", "fd66::/48"].map(|range| range.parse().unwrap());
    let ebpf = EbpfConfig { sockets: Sockets::None, max_flows, ..EbpfConfig::default() };
    BackendConfig { pods: PodSources::Ranges(pods.to_vec()), ebpf, ..BackendConfig::default() }
}

pub(crate) fn fill(node: &mut Node, map: &str) -> MapFill {
    let figures = node.backend.as_mut().unwrap().take_figures();
    *figures.maps.iter().find(|fill| fill.map == map).unwrap()
}

/// A connection at both ends.
pub(crate) struct Pair(TcpStream, TcpStream);

impl Pair {
    pub(crate) fn new(from: &Namespace, to: &str, listener: &TcpListener) -> Self {
        let to: SocketAddr = to.parse().unwrap();
        let near = from.run(|| TcpStream::connect(to).unwrap());
        let (far, _) = listener.accept().unwrap();
        for end in [&near, &far] {
            end.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        }
        Pair(near, far)
    }

    /// Something goes there and back.
    pub(crate) fn go_on(&mut self) {
        let mut buffer = [0; 4];
        self.0.write_all(b"ping").unwrap();
        self.1.read_exact(&mut buffer).unwrap();
        self.1.write_all(b"pong").unwrap();
        self.0.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"pong");
    }
}

/// So many sockets there may be; small machines allow fewer.
fn allow_sockets(count: u64) {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(count), hard.max(count)).unwrap();
}

fn tables_grow_under_traffic_and_no_connection_is_lost(mode: Mode) {
    only_ebpf(mode);
    // More than begin in a small table.
    const CLIENTS: u16 = 14_000;
    // Longer than a client waits until it tries again.
    const PATIENCE: Duration = Duration::from_secs(15);
    allow_sockets(u64::from(CLIENTS) + 2_000);
    let mut node = Node::with(mode, packets_only(1 << 16));
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    let listener = server.namespace.run(|| TcpListener::bind("[::]:9090").unwrap());
    let _answers = node.pod("one", 3).serving("TCP", 8080).serving("UDP", 8080);
    for (last, protocol, port, pod) in
        [(1, "TCP", 9090, 2), (2, "TCP", 8080, 3), (3, "UDP", 8080, 3)]
    {
        let name = format!("s{last}");
        node.service(&name, node_port(cluster_ip(last, protocol, 80), 30080 + u16::from(last)));
        node.ready(&name, protocol, port, &[pod]);
    }
    node.apply();
    let small = fill(&mut node, "flows_in").max_entries;
    assert!(small < u32::from(CLIENTS) * 4 / 3);
    let ways = [
        (&client.namespace, "10.96.0.1:80".to_owned()),
        (&client.namespace, "[fd96::1]:80".to_owned()),
        (&node.outside, format!("{NODE4}:30081")),
        (&node.outside, format!("[{NODE6}]:30081")),
    ];
    let mut pairs: Vec<Pair> =
        (0..5).flat_map(|_| ways.iter().map(|(from, to)| Pair::new(from, to, &listener))).collect();
    // Sockets that must keep their endpoint, and those that only take room.
    let dns = client.namespace.udp_socket("10.96.0.3:80");
    let before = udp_exchange(&dns, PATIENCE).unwrap();
    let crowd: Vec<UdpSocket> = client.namespace.run(|| {
        // Below those that the kernel gives to others.
        let open = |port| UdpSocket::bind(("10.66.0.10", port)).unwrap();
        (15_000..15_000 + CLIENTS).map(open).collect()
    });
    let (stop, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut backend = node.backend.take().unwrap();
    std::thread::scope(|scope| {
        for (from, to) in [
            (&client.namespace, "10.96.0.2:80".to_owned()),
            (&node.outside, format!("{NODE4}:30082")),
        ] {
            let (stop, asked) = (&stop, &asked);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(from.ask_for("TCP", &to, PATIENCE).unwrap().server, "one", "{to}");
                    asked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let stop_at_last = Stop(&stop);
        // It may take a slow machine longer than the time in which a proxy looks after the tables.
        scope.spawn(|| {
            crowd.iter().for_each(|socket| _ = socket.send_to(b"?", "10.96.0.3:80").unwrap());
        });
        eventually("the tables are larger", || {
            assert!(!backend.disturbed().unwrap());
            pairs.iter_mut().for_each(Pair::go_on);
            let maps = backend.take_figures().maps;
            let grown = |map| maps.iter().any(|fill| fill.map == map && fill.max_entries > small);
            (grown("flows_in") && grown("flows_out")).then_some(())
        });
        let until_now = asked.load(Ordering::Relaxed);
        eventually("new connections go on", || {
            (asked.load(Ordering::Relaxed) > until_now + 20).then_some(())
        });
        drop(stop_at_last);
    });
    node.backend = Some(backend);
    pairs.iter_mut().for_each(Pair::go_on);
    assert_eq!(udp_exchange(&dns, PATIENCE).unwrap(), before);
    node.assert_as_planned();
    // Larger is how it stays.
    assert_eq!(node.restart(), 0);
    assert!(fill(&mut node, "flows_in").max_entries > small);
    pairs.iter_mut().for_each(Pair::go_on);
}

/// One that may not grow.
fn a_full_table_forgets_who_is_silent_and_says_so(mode: Mode) {
    only_ebpf(mode);
    const ROOM: u32 = 4096;
    let mut node = Node::with(mode, packets_only(ROOM));
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    let listener = server.namespace.run(|| TcpListener::bind("[::]:9090").unwrap());
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30081));
    node.ready("web", "TCP", 9090, &[2]);
    node.service("dns", cluster_ip(2, "UDP", 80));
    node.ready("dns", "UDP", 8080, &[2]);
    node.apply();
    let mut pairs = [
        Pair::new(&client.namespace, "10.96.0.1:80", &listener),
        Pair::new(&node.outside, &format!("{NODE4}:30081"), &listener),
    ];
    for port in 20_000..32_000 {
        client.namespace.run(|| {
            let socket = UdpSocket::bind(("10.66.0.10", port)).unwrap();
            socket.send_to(b"?", "10.96.0.2:80").unwrap();
        });
        // Who talks stays.
        if port % 500 == 0 {
            pairs.iter_mut().for_each(Pair::go_on);
        }
    }
    let full = eventually("it is seen that the table is full", || {
        assert!(!node.backend.as_mut().unwrap().disturbed().unwrap());
        Some(fill(&mut node, "flows_in")).filter(|fill| fill.entries > ROOM * 9 / 10)
    });
    assert_eq!((full.max_entries, full.may_grow), (ROOM, false));
    pairs.iter_mut().for_each(Pair::go_on);
    // New ones come all the same.
    Pair::new(&client.namespace, "10.96.0.1:80", &listener).go_on();
    assert_eq!(node.restart(), 0);
}

/// Ends threads also when an assertion fails.
struct Stop<'s>(&'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Endpoints that nobody is at.
fn nobodys(service: &str, count: u32) -> Value {
    let addresses: Vec<String> =
        (0..count).map(|number| format!("10.70.{}.{}", number / 250, 1 + number % 250)).collect();
    let endpoints: Vec<_> = addresses.iter().map(|address| (&**address, "other")).collect();
    slice(service, "IPv4", &endpoints, "", 8080)
}

fn maps_of_services_grow_with_them(mode: Mode) {
    only_ebpf(mode);
    let mut node = Node::with(mode, packets_only(1 << 16));
    let client = node.pod("client", 10);
    let server = node.pod("server", 2);
    let listener = server.namespace.run(|| TcpListener::bind("[::]:9090").unwrap());
    let _one = node.pod("one", 3).serving("TCP", 8080);
    node.service("kept", cluster_ip(1, "TCP", 80));
    node.ready("kept", "TCP", 9090, &[2]);
    node.service("web", cluster_ip(2, "TCP", 80));
    node.ready("web", "TCP", 8080, &[3]);
    node.apply();
    let mut pair = Pair::new(&client.namespace, "10.96.0.1:80", &listener);
    let small = fill(&mut node, "slots").max_entries;
    node.service("large", cluster_ip(3, "TCP", 80));
    node.slice(nobodys("large", small));
    node.apply();
    let grown = fill(&mut node, "slots");
    assert!(grown.max_entries > small && grown.entries > small, "{grown:?}");
    pair.go_on();
    assert_eq!(client.namespace.tcp("10.96.0.2:80").unwrap().server, "one");
    node.assert_as_planned();
    assert_eq!(node.restart(), 0);
    node.delete_service("large");
    node.apply();
    assert_eq!(fill(&mut node, "slots").max_entries, grown.max_entries);
    assert!(fill(&mut node, "slots").entries < 10);
    pair.go_on();
    node.assert_as_planned();
}

/// The proxy on a node, with room for so many endpoints.
fn with_room_for(node: &Node, max_endpoints: u32, lists: Value, work: impl FnOnce(&mut World)) {
    let folder = tempfile::tempdir().unwrap();
    let configure = |mut config: keelson_proxy::ProxyConfig| {
        config.ebpf.max_endpoints = max_endpoints;
        config
    };
    with_configured_proxy(node, lists, folder.path(), configure, work);
}

pub(crate) fn next_event(world: &mut World, reason: &str) -> Value {
    eventually(reason, || {
        let (kind, object) = world.posted.try_recv().ok()?;
        (kind == "posted" && object["reason"] == reason).then_some(object)
    })
}

fn a_service_that_does_not_fit_is_refused_by_name(mode: Mode) {
    only_ebpf(mode);
    let node = crate::world::bare(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let versioned = |mut slice: Value, version: &str| {
        slice["metadata"]["resourceVersion"] = json!(version);
        slice
    };
    let lists = json!({
        "services": [service("web", cluster_ip(1, "TCP", 80)), service("large", cluster_ip(2, "TCP", 80))],
        "endpointslices": [endpoint("web", "10.66.0.2"), versioned(nobodys("large", 900), "2")],
        "nodes": [node_object()],
    });
    with_room_for(&node, 1024, lists, |world| {
        assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().server, "one");
        world.tell("endpointslices", "MODIFIED", versioned(nobodys("large", 1200), "3"));
        let event = next_event(world, "KernelRefused");
        assert_eq!(event["regarding"]["name"], "large");
        let note = event["note"].as_str().unwrap();
        assert!(note.contains("the BPF map slots is full: it has room for 1024"), "{note}");
        // Others come and go meanwhile.
        world.tell("services", "ADDED", service("late", cluster_ip(3, "TCP", 80)));
        world.tell("endpointslices", "ADDED", endpoint("late", "10.66.0.2"));
        eventually("a Service that fits", || client.namespace.tcp("10.96.0.3:80").ok());
        let metrics = node.namespace.get("127.0.0.1:10249", "/metrics");
        let failures = "keelson_proxy_sync_failures_total 0";
        assert!(!metrics.contains(failures), "{metrics}");
        assert!(
            metrics.contains("keelson_proxy_ebpf_map_max_entries{map=\"slots\"} 1024"),
            "{metrics}"
        );
        // What it had is still there.
        assert!(metrics.contains("keelson_proxy_ebpf_map_entries{map=\"slots\"} 902"), "{metrics}");
    });
}

fn an_alarm_is_raised_before_a_map_is_full(mode: Mode) {
    only_ebpf(mode);
    let node = crate::world::bare(mode);
    let lists = json!({
        "services": [service("large", cluster_ip(2, "TCP", 80))],
        "endpointslices": [{"metadata": {"namespace": "default", "name": "none", "resourceVersion": "2"},
            "addressType": "IPv4", "endpoints": [], "ports": []}],
        "nodes": [node_object()],
    });
    with_room_for(&node, 1024, lists, |world| {
        let mut slice = nobodys("large", 950);
        slice["metadata"]["resourceVersion"] = json!("3");
        world.tell("endpointslices", "ADDED", slice);
        let event = next_event(world, "MapNearlyFull");
        assert_eq!(
            (&event["regarding"]["kind"], &event["regarding"]["name"]),
            (&json!("Node"), &json!("here"))
        );
        let note = event["note"].as_str().unwrap();
        assert!(note.contains("the BPF map slots is nearly full: 950 of 1024"), "{note}");
    });
}

/// The maps of a folder of pins become those of another version, whose flows have `N` bytes.
fn become_version<const N: usize>(node: &Node, version: u32) {
    let pins = &node.config.ebpf.pins;
    let folder = pins.join(format!("maps-v{version}"));
    std::fs::rename(pins.join(format!("maps-v{VERSION}")), &folder).unwrap();
    for name in ["flows_in", "flows_out"] {
        let path = folder.join(name);
        let ours = Map::LruHashMap(MapData::from_pin(&path).unwrap());
        let ours = HashMap::<_, Tuple, Flow>::try_from(ours).unwrap();
        const LRU_HASH: u32 = 9;
        let (key, value) = (size_of::<Tuple>(), N);
        let [key, value] = [key, value].map(|size| u32::try_from(size).unwrap());
        let shape = aya_obj::Map::new_from_params(LRU_HASH, key, value, 4096, 0);
        let theirs = MapData::create(shape, name, None).unwrap();
        let mut theirs: HashMap<_, Tuple, [u8; N]> =
            HashMap::try_from(Map::LruHashMap(theirs)).unwrap();
        for entry in ours.iter() {
            let (tuple, flow) = entry.unwrap();
            let mut bytes = [0; N];
            let length = N.min(size_of::<Flow>());
            bytes[..length].copy_from_slice(&bytes_of(&flow)[..length]);
            theirs.insert(tuple, bytes, 0).unwrap();
        }
        std::fs::remove_file(&path).unwrap();
        theirs.pin(&path).unwrap();
    }
}

fn bytes_of(flow: &Flow) -> [u8; size_of::<Flow>()] {
    // SAFETY: plain data without holes.
    #[expect(unsafe_code, reason = "the bytes of a plain structure")]
    unsafe {
        std::mem::transmute_copy(flow)
    }
}

fn map_number(node: &Node, name: &str) -> u32 {
    let folder = node.config.ebpf.pins.join(format!("maps-v{VERSION}"));
    MapData::from_pin(folder.join(name)).unwrap().info().unwrap().id()
}

/// Case 57: no new map takes the place of an old one before it has what that had.
fn connections_outlive_a_change_of_layouts_forth_and_back(mode: Mode) {
    only_ebpf(mode);
    let mut node = Node::with(mode, packets_only(1 << 16));
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    let listener = server.namespace.run(|| TcpListener::bind("[::]:9090").unwrap());
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 9090, &[2]);
    node.apply();
    let open = || {
        [
            Pair::new(&client.namespace, "10.96.0.1:80", &listener),
            Pair::new(&node.outside, &format!("{NODE4}:30080"), &listener),
            Pair::new(&node.outside, &format!("[{NODE6}]:30080"), &listener),
        ]
    };
    let mut pairs = Vec::from(open());
    for version in [VERSION - 1, VERSION + 1] {
        node.backend = None;
        let same = map_number(&node, "connected");
        if version < VERSION {
            become_version::<64>(&node, version);
        } else {
            become_version::<96>(&node, version);
        }
        assert!(node.restart() > 0);
        pairs.iter_mut().for_each(Pair::go_on);
        assert_eq!(node.restart(), 0);
        node.assert_as_planned();
        // What has the same layout is the same map, and nothing else is left.
        assert_eq!(map_number(&node, "connected"), same);
        assert!(!node.config.ebpf.pins.join(format!("maps-v{version}")).exists());
        assert!(!node.config.ebpf.pins.join("maps-before").exists());
        let listener = &listener;
        pairs.push(Pair::new(&client.namespace, "10.96.0.1:80", listener));
        pairs.iter_mut().for_each(Pair::go_on);
    }
}

/// Or an upgrade from a version that has none. Services may be gone meanwhile.
fn connections_outlive_the_loss_of_a_filter(mode: Mode) {
    only_ebpf(mode);
    let mut node = Node::with(mode, packets_only(1 << 16));
    let (client, server) = (node.pod("client", 10), node.pod("server", 2));
    let listener = server.namespace.run(|| TcpListener::bind("[::]:9090").unwrap());
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 9090, &[2]);
    node.service("gone", cluster_ip(2, "TCP", 80));
    node.ready("gone", "TCP", 9090, &[2]);
    node.apply();
    let ways = [
        (&client.namespace, "10.96.0.1:80".to_owned()),
        (&client.namespace, "[fd96::1]:80".to_owned()),
        (&client.namespace, "10.96.0.2:80".to_owned()),
        (&node.outside, format!("{NODE4}:30080")),
        (&node.outside, format!("[{NODE6}]:30080")),
        (&node.namespace, "10.96.0.1:80".to_owned()),
        (&node.namespace, "10.96.0.2:80".to_owned()),
        (&server.namespace, "10.96.0.1:80".to_owned()),
    ];
    let open = |(from, to): &(&Namespace, String)| Pair::new(from, to, &listener);
    let mut pairs: Vec<Pair> = ways.iter().map(open).collect();
    node.delete_service("gone");
    node.adopt();
    for lost in [&["clients"][..], &["destinations"], &["clients", "destinations"]] {
        node.backend = None;
        for map in lost {
            let folder = node.config.ebpf.pins.join(format!("maps-v{VERSION}"));
            std::fs::remove_file(folder.join(map)).unwrap();
        }
        assert!(node.restart() > 0);
        pairs.iter_mut().for_each(Pair::go_on);
        node.assert_as_planned();
        Pair::new(&client.namespace, "10.96.0.1:80", &listener).go_on();
        assert_eq!(node.restart(), 0);
    }
}

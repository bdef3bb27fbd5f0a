//! The node under test, with the proxy's model and a backend.

use std::net::{IpAddr, SocketAddr};

use keelson_proxy::backend::Backend;
use keelson_proxy::conntrack::{Checks, clean};
use keelson_proxy::diff::{Plans, advance};
use keelson_proxy::ebpf::{EbpfConfig, XdpChoice};
use keelson_proxy::model::objects::{EndpointSlice, Service};
use keelson_proxy::model::{Model, NodeFacts, Protocol, ServiceKey};
use keelson_proxy::trace::{Ground, Packet, Trace, trace};
use serde_json::{Value, json};

use super::ebpf::Premises;
use super::{BackendConfig, Mode, Namespace, Pod, PodSources};

pub(crate) const NODE4: &str = "203.0.113.2";
pub(crate) const OUTSIDE4: &str = "203.0.113.1";
pub(crate) const NODE6: &str = "2001:db8::2";
pub(crate) const OUTSIDE6: &str = "2001:db8::1";

/// How a node and the host outside are plugged together: the host's end of the cable, and both ends' addresses.
struct Site {
    outside_link: &'static str,
    node: [&'static str; 2],
    outside: [&'static str; 2],
}

const FIRST: Site =
    Site { outside_link: "eth0", node: [NODE4, NODE6], outside: [OUTSIDE4, OUTSIDE6] };
const SECOND: Site = Site {
    outside_link: "eth1",
    node: ["192.0.2.2", "2001:db8:2::2"],
    outside: ["192.0.2.1", "2001:db8:2::1"],
};

/// The node under test with the proxy's model and backend.
pub(crate) struct Node {
    pub(crate) mode: Mode,
    pub(crate) namespace: Namespace,
    pub(crate) outside: Namespace,
    pub(crate) model: Model,
    pub(crate) plans: Plans,
    pub(crate) backend: Option<Box<dyn Backend>>,
    pub(crate) config: BackendConfig,
    pub(crate) flows_removed: u64,
    /// Last: it goes after the backend.
    premises: Option<Premises>,
}

impl Node {
    pub(crate) fn new(mode: Mode) -> Self {
        let ranges = ["10.66.0.0/16", "fd66::/48"].map(|range| range.parse().unwrap());
        let pods = PodSources::Ranges(ranges.to_vec());
        Node::with(mode, BackendConfig { pods, ..BackendConfig::default() })
    }

    pub(crate) fn with(mode: Mode, config: BackendConfig) -> Self {
        Node::at(&FIRST, Namespace::new(), mode, config)
    }

    /// Another node beside the same host outside. A cable goes from the first one to it, by which the first one
    /// reaches the pods with these numbers.
    pub(crate) fn second(first: &Node, pods: &[u8]) -> Self {
        let node = Node::at(&SECOND, first.outside.again(), first.mode, first.config.clone());
        first.namespace.connect("peer", &node.namespace, "peer");
        for (side, last) in [(&first.namespace, 1), (&node.namespace, 2)] {
            side.address("peer", &format!("10.99.0.{last}/24"));
            side.address("peer", &format!("fd99::{last}/64"));
        }
        for pod in pods {
            first.namespace.route(&format!("10.66.0.{pod}/32"), "10.99.0.2");
            first.namespace.route(&format!("fd66::{pod}/128"), "fd99::2");
        }
        node
    }

    fn at(site: &Site, outside: Namespace, mode: Mode, config: BackendConfig) -> Self {
        let premises = Premises::new();
        let ebpf = premises.as_ref().map(Premises::config).unwrap_or_default();
        let EbpfConfig { sockets, exempt, max_flows, max_endpoints, xdp, .. } = config.ebpf;
        let EbpfConfig { algorithm, forwarding, .. } = config.ebpf;
        let xdp = if xdp == XdpChoice::Off { crate::harness::xdp() } else { xdp };
        let ebpf = EbpfConfig { sockets, exempt, max_flows, max_endpoints, xdp, ..ebpf };
        let ebpf = EbpfConfig { algorithm, forwarding, ..ebpf };
        let config = BackendConfig { ebpf, ..config };
        let mut namespace = Namespace::new();
        namespace.connect("eth0", &outside, site.outside_link);
        let ends = [(&namespace, "eth0", site.node), (&outside, site.outside_link, site.outside)];
        for (side, link, [v4, v6]) in ends {
            side.address(link, &format!("{v4}/24"));
            side.address(link, &format!("{v6}/64"));
        }
        namespace.set("ipv4/ip_forward", "1");
        namespace.set("ipv6/conf/all/forwarding", "1");
        namespace.route("0.0.0.0/0", site.outside[0]);
        namespace.route("::/0", site.outside[1]);
        if site.outside_link == FIRST.outside_link {
            // Service addresses from outside go to the node, and come to an end there when unprogrammed.
            for range in ["10.96.0.0/16", "198.51.100.0/24"] {
                outside.route(range, NODE4);
            }
            outside.route("fd96::/64", NODE6);
        }
        let facts = NodeFacts {
            name: "here".to_owned(),
            addresses: site.node.map(|address| address.parse().unwrap()).to_vec(),
            zone: Some("a".to_owned()),
            knows_pods: config.pods != PodSources::Unknown,
            masquerade_all: false,
        };
        namespace.join(&config.ebpf);
        let backend = namespace.run(|| mode.open(config.clone()).unwrap());
        let mut node = Node {
            mode,
            namespace,
            outside,
            model: Model::new(facts),
            plans: Plans::new(),
            backend: Some(backend),
            config,
            flows_removed: 0,
            premises,
        };
        node.adopt();
        node
    }

    /// A host outside that has an address of the Service range, and refuses connections: what comes out
    /// of an answer to that address tells whether packets left the node.
    pub(crate) fn let_outside_have(&self, v4: &str, v6: &str) {
        self.outside.address("lo", &format!("{v4}/32"));
        self.outside.address("lo", &format!("{v6}/128"));
        self.outside.route("10.66.0.0/24", NODE4);
        self.outside.route("fd66::/64", NODE6);
    }

    /// A pod 10.66.0.`number` / fd66::`number`.
    pub(crate) fn pod(&self, name: &str, number: u8) -> Pod {
        let mut namespace = Namespace::new();
        namespace.join(&self.config.ebpf);
        let (link, node) = (format!("pod{number}"), &self.namespace);
        node.connect(&link, &namespace, "eth0");
        node.address(&link, "10.66.0.1/32");
        node.address(&link, "fd66::1/128");
        let (v4, v6) = (format!("10.66.0.{number}"), format!("fd66::{number}"));
        for (address, gateway, all) in [(&v4, "10.66.0.1", "0.0.0.0/0"), (&v6, "fd66::1", "::/0")] {
            namespace.address("eth0", address);
            namespace.route_on(gateway, "eth0");
            namespace.route(all, gateway);
            node.route_on(address, &link);
        }
        let (v4, v6) = (v4.parse().unwrap(), v6.parse().unwrap());
        Pod { namespace, name: name.to_owned(), v4, v6, servers: Vec::new() }
    }

    pub(crate) fn service(&mut self, name: &str, spec: Value) {
        let object = json!({"metadata": {"namespace": "default", "name": name}, "spec": spec});
        self.service_object(object);
    }

    pub(crate) fn service_object(&mut self, object: Value) {
        let service: Service = serde_json::from_value(object).unwrap();
        self.model.apply_service(&service);
        assert_eq!(self.model.take_problems(), []);
    }

    pub(crate) fn delete_service(&mut self, name: &str) {
        self.model.delete_service(&ServiceKey::new("default", name));
    }

    /// The model's answer to the first packet of a connection; without an interface the node itself sends.
    pub(crate) fn trace(
        &self,
        source: IpAddr,
        interface: Option<&str>,
        protocol: Protocol,
        to: &str,
    ) -> Trace {
        let to: SocketAddr = to.parse().unwrap();
        let own = [NODE4, NODE6, "10.66.0.1", "fd66::1", "127.0.0.1", "::1"];
        let own = own.map(|own| own.parse().unwrap());
        let packet = Packet {
            source,
            interface: interface.map(str::to_owned),
            destination: to.ip(),
            protocol,
            port: to.port(),
        };
        trace(&self.plans, Ground { config: &self.config, own: &own }, &packet)
    }

    /// Slices (one per family) for the endpoints `(pod number, node, conditions)`.
    pub(crate) fn endpoints(
        &mut self,
        service: &str,
        protocol: &str,
        port: u16,
        of: &[(u8, &str, Value)],
    ) {
        for (family, prefix) in [("IPv4", "10.66.0."), ("IPv6", "fd66::")] {
            let endpoints: Vec<Value> = of
                .iter()
                .map(|(number, node, conditions)| {
                    let address = format!("{prefix}{number}");
                    json!({"addresses": [address], "nodeName": node, "conditions": conditions})
                })
                .collect();
            self.slice(json!({
                "metadata": {
                    "namespace": "default",
                    "name": format!("{service}-{protocol}-{family}").to_lowercase(),
                    "labels": {"kubernetes.io/service-name": service},
                },
                "addressType": family,
                "endpoints": endpoints,
                "ports": [{"name": "", "protocol": protocol, "port": port}],
            }));
        }
    }

    /// Ready endpoints on this node.
    pub(crate) fn ready(&mut self, service: &str, protocol: &str, port: u16, pods: &[u8]) {
        let of: Vec<_> = pods.iter().map(|pod| (*pod, "here", json!({"ready": true}))).collect();
        self.endpoints(service, protocol, port, &of);
    }

    pub(crate) fn slice(&mut self, object: Value) {
        let slice: EndpointSlice = serde_json::from_value(object).unwrap();
        self.model.apply_slice(&slice);
        assert_eq!(self.model.take_problems(), []);
    }

    /// Puts in force what changed, and says how many kernel objects that took.
    pub(crate) fn apply(&mut self) -> usize {
        self.follow_interfaces();
        let dirty = self.model.take_dirty();
        let changes = advance(&mut self.plans, dirty, |key| self.model.plan(key));
        let applied = self.backend.as_mut().unwrap().apply(&changes, &self.plans).unwrap();
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        let checks = Checks::after(&changes);
        self.flows_removed += self.namespace.run(|| clean(&checks).unwrap());
        applied.operations
    }

    /// What the engine does when the alarm rings; this mode follows interfaces.
    fn follow_interfaces(&mut self) {
        if self.mode == Mode::Ebpf
            && let Some(backend) = &mut self.backend
        {
            backend.disturbed().unwrap();
        }
    }

    pub(crate) fn adopt(&mut self) -> usize {
        let dirty = self.model.take_dirty();
        advance(&mut self.plans, dirty, |key| self.model.plan(key));
        let applied = self.backend.as_mut().unwrap().adopt(&self.plans).unwrap();
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        applied.operations
    }

    /// A new backend, as after a restart of the process.
    pub(crate) fn restart(&mut self) -> usize {
        self.backend = None;
        let config = self.config.clone();
        self.backend = Some(self.namespace.run(|| self.mode.open(config).unwrap()));
        self.adopt()
    }

    /// What the backend says that is not as planned; it must be nothing.
    #[track_caller]
    pub(crate) fn assert_as_planned(&mut self) {
        let differences = self.backend.as_mut().unwrap().verify(&self.plans).unwrap();
        assert_eq!(differences, []);
    }
}

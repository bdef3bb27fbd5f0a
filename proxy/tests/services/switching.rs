//! From one mode to another on a running node, and from kube-proxy to us.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use keelson_proxy::backend::BackendConfig;
use keelson_proxy::diff::Plans;
use keelson_proxy::ebpf::EbpfConfig;
use keelson_proxy::iptables::{Iptables, Variant};
use keelson_proxy::{cleanup, switch};

use crate::harness::{backends, rows, skip};
use crate::stage::{Mode, NODE4, NODE6, Namespace, Node, Outcome, cluster_ip, node_port};
use crate::world::eventually;

rows![
    a_node_that_changes_its_mode_loses_nothing,
    connections_outlive_a_change_to_ebpf_and_back,
    what_kube_proxy_left_goes_and_nothing_else,
    the_variant_of_iptables_is_the_one_that_the_node_uses,
    a_kernel_setting_is_given_back,
];

/// A connection that stays.
pub(crate) struct Flow {
    to: String,
    client: TcpStream,
    server: TcpStream,
}

impl Flow {
    pub(crate) fn open(from: &Namespace, to: &str, listener: &TcpListener) -> Flow {
        let client = from.run(|| TcpStream::connect(to).unwrap());
        let (server, _) = listener.accept().unwrap();
        for side in [&client, &server] {
            side.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        }
        Flow { to: to.to_owned(), client, server }
    }

    pub(crate) fn exchange(&mut self) -> std::io::Result<()> {
        let mut buffer = [0; 4];
        self.client.write_all(b"ping")?;
        self.server.read_exact(&mut buffer)?;
        self.server.write_all(b"pong")?;
        self.client.read_exact(&mut buffer)
    }

    fn check(&mut self, when: &str) {
        self.exchange().unwrap_or_else(|error| panic!("{}, {when}: {error}", self.to));
    }
}

/// What the node is doing; [`STOP`] when it is done.
pub(crate) type Step = AtomicUsize;
pub(crate) const STOP: usize = usize::MAX;

/// Ends the asking, also when an assertion fails.
pub(crate) struct StopAtEnd<'s>(pub(crate) &'s Step);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(STOP, Ordering::Relaxed);
    }
}

/// Asks again and again; how often, and what else than `wanted` came in which step.
fn keep_asking(
    from: &Namespace,
    to: &str,
    step: &Step,
    wanted: impl Fn(&Outcome) -> bool,
) -> (u32, Vec<(String, usize, Outcome)>) {
    let (mut asked, mut unwanted) = (0, Vec::new());
    loop {
        let during = step.load(Ordering::Relaxed);
        if during == STOP {
            return (asked, unwanted);
        }
        let outcome = from.tcp(to);
        asked += 1;
        if !wanted(&outcome) {
            unwanted.push((to.to_owned(), during, outcome));
        }
    }
}

/// Between modes of netfilter, connection tracking knows which ports of a client an endpoint still remembers. Between
/// these and eBPF nobody does: there, one new connection in a thousand has to try again.
fn a_node_that_changes_its_mode_loses_nothing(mode: Mode) {
    change_modes(mode, |other| *other != Mode::Ebpf && mode != Mode::Ebpf, true);
}

fn connections_outlive_a_change_to_ebpf_and_back(mode: Mode) {
    change_modes(mode, |other| *other == Mode::Ebpf || mode == Mode::Ebpf, false);
}

fn change_modes(mode: Mode, which: impl Fn(&Mode) -> bool, all_new_ones: bool) {
    let others = backends().0.into_iter().filter(|other| *other != mode && which(other));
    let others: Vec<Mode> = others.collect();
    if others.is_empty() {
        skip("there is no other such mode here");
    }
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    let patient = node.pod("patient", 3);
    let listener = patient.namespace.run(|| TcpListener::bind("[::]:9090").unwrap());
    node.service("web", node_port(cluster_ip(1, "TCP", 80), 30080));
    node.ready("web", "TCP", 8080, &[2]);
    node.service("long", node_port(cluster_ip(2, "TCP", 80), 30090));
    node.ready("long", "TCP", 9090, &[3]);
    node.service("empty", cluster_ip(3, "TCP", 80));
    for number in 20..120 {
        let name = format!("more{number}");
        node.service(&name, cluster_ip(number, "TCP", 80));
        node.ready(&name, "TCP", 8080, &[2, 3]);
    }
    node.apply();
    let node_port6 = format!("[{NODE6}]:30090");
    let mut flows = [
        Flow::open(&client.namespace, "10.96.0.2:80", &listener),
        Flow::open(&client.namespace, "[fd96::2]:80", &listener),
        Flow::open(&node.outside, &format!("{NODE4}:30090"), &listener),
        Flow::open(&node.outside, &node_port6, &listener),
        Flow::open(&node.namespace, "10.96.0.2:80", &listener),
    ];
    let step = Step::new(0);
    let route: Vec<Mode> = others.iter().flat_map(|other| [*other, mode]).collect();
    std::thread::scope(|scope| {
        let (step, plans, config) = (&step, &node.plans, &node.config);
        let (namespace, outside, inside) = (&node.namespace, &node.outside, &client.namespace);
        let served = |outcome: &Outcome| outcome.as_ref().is_ok_and(|a| a.server == "one");
        let refused = |outcome: &Outcome| *outcome == Err(ErrorKind::ConnectionRefused);
        let askers = [
            scope.spawn(move || keep_asking(inside, "10.96.0.1:80", step, served)),
            scope.spawn(move || keep_asking(inside, "[fd96::1]:80", step, served)),
            scope.spawn(move || keep_asking(outside, &format!("{NODE4}:30080"), step, served)),
            scope.spawn(move || keep_asking(namespace, "10.96.0.1:80", step, served)),
            scope.spawn(move || keep_asking(inside, "10.96.0.3:80", step, refused)),
        ];
        let stop = StopAtEnd(step);
        let mut from = mode;
        for to in route {
            let mut backend = namespace.run(|| to.open(config.clone()).unwrap());
            step.fetch_add(1, Ordering::Relaxed);
            backend.adopt(plans).unwrap();
            step.fetch_add(1, Ordering::Relaxed);
            namespace.run(|| switch::leave_others(to, &config.ebpf));
            step.fetch_add(1, Ordering::Relaxed);
            flows.iter_mut().for_each(|flow| flow.check(&format!("{from} to {to}")));
            // Nothing of the old mode is left, the new one is whole.
            assert_eq!(backend.verify(plans).unwrap(), [], "{from} to {to}");
            let gone = || is_clean_in(from, namespace, &config.ebpf).then_some(());
            match from {
                // Its packet programs see the last connections off.
                Mode::Ebpf => eventually("nothing of mode ebpf is left", gone),
                _ => assert!(gone().is_some(), "{from} to {to}"),
            }
            from = to;
        }
        drop(stop);
        for asker in askers {
            let (asked, unwanted) = asker.join().unwrap();
            match all_new_ones {
                true => assert_eq!(unwanted, [], "of {asked}"),
                false => {
                    assert!(unwanted.len() < 5 + asked as usize / 100, "of {asked}: {unwanted:?}")
                }
            }
            assert!(asked > 0);
        }
    });
}

/// As on a node where the mode was never used.
pub(crate) fn is_clean(mode: Mode, node: &Node) -> bool {
    is_clean_in(mode, &node.namespace, &node.config.ebpf)
}

fn is_clean_in(mode: Mode, namespace: &Namespace, ebpf: &EbpfConfig) -> bool {
    let fresh = Namespace::new();
    let open = |namespace: &Namespace| {
        let config = BackendConfig { ebpf: ebpf.clone(), ..BackendConfig::default() };
        let mut backend = namespace.run(|| mode.open(config).unwrap());
        // Fails while somebody removes what is being read.
        backend.verify(&Plans::new()).ok()
    };
    open(namespace).is_some_and(|left| Some(left) == open(&fresh))
}

fn variant_of(mode: Mode) -> Variant {
    match mode {
        Mode::Iptables(variant) => variant,
        _ => skip("this is about iptables"),
    }
}

fn restore(namespace: &Namespace, program: &str, text: &str) {
    namespace.run(|| {
        let mut child =
            Command::new(program).arg("--noflush").stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
    });
}

const KUBE_PROXY: &str = "*mangle
:KUBE-PROXY-CANARY - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-NPX46M4PTMTKRN6Y - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:OTHERS - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A PREROUTING -j OTHERS
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -p tcp -m tcp --dport 1 -j KUBE-SVC-NPX46M4PTMTKRN6Y
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-NPX46M4PTMTKRN6Y -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -j DNAT --to-destination :1
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
";

fn what_kube_proxy_left_goes_and_nothing_else(mode: Mode) {
    let variant = variant_of(mode);
    let mut node = Node::new(mode);
    let client = node.pod("client", 10);
    let _one = node.pod("one", 2).serving("TCP", 8080);
    node.service("web", cluster_ip(1, "TCP", 80));
    node.ready("web", "TCP", 8080, &[2]);
    node.apply();
    for ip in ["iptables", "ip6tables"] {
        restore(&node.namespace, &format!("{ip}-{}-restore", variant.word()), KUBE_PROXY);
    }
    assert_eq!(node.namespace.run(cleanup::kube_proxy_traces).len(), 1);
    // Never touched as long as nobody asks for it.
    assert_eq!(node.restart(), 0);
    node.namespace.run(|| switch::leave_others(mode, &node.config.ebpf));
    let saved = |node: &Node, ip: &str| {
        node.namespace.output(&format!("{ip}-{}-save", variant.word()), &[])
    };
    assert!(saved(&node, "iptables").contains("-j KUBE-SVC-NPX46M4PTMTKRN6Y"));
    node.namespace.run(|| cleanup::kube_proxy().unwrap());
    assert_eq!(node.namespace.run(cleanup::kube_proxy_traces), Vec::<String>::new());
    for ip in ["iptables", "ip6tables"] {
        let left = saved(&node, ip);
        for gone in ["KUBE-S", "KUBE-NODEPORTS", "KUBE-POST", "KUBE-PROXY", "KUBE-FORWARD", "MASQ "]
        {
            let ours = |line: &&str| !line.contains("KEELSON-");
            assert!(!left.lines().filter(ours).any(|line| line.contains(gone)), "{gone}: {left}");
        }
        for stays in [":KUBE-KUBELET-CANARY", "-j KUBE-FIREWALL", "-A PREROUTING -j OTHERS"] {
            assert!(left.contains(stays), "{stays} is not in {left}");
        }
    }
    assert_eq!(node.restart(), 0);
    assert_eq!(client.namespace.tcp("10.96.0.1:80").unwrap().server, "one");
    // Everything, ours included; and a second time there is nothing to do.
    node.namespace.run(|| cleanup::everything(&node.config.ebpf).unwrap());
    node.namespace.run(|| cleanup::everything(&node.config.ebpf).unwrap());
    assert!(!saved(&node, "iptables").contains("KEELSON-"));
}

/// `route_localnet`, which node ports on 127.0.0.1 need: as before when nothing needs it, and only if it was us.
fn a_kernel_setting_is_given_back(mode: Mode) {
    if mode == Mode::Ebpf {
        skip("it needs no such setting");
    }
    const SETTING: &str = "net/ipv4/conf/all/route_localnet";
    let with = |ports| BackendConfig { localhost_node_ports: ports, ..BackendConfig::default() };
    let again =
        |node: &Node, ports| BackendConfig { localhost_node_ports: ports, ..node.config.clone() };
    let read = |node: &Node| node.namespace.run(|| keelson_netlink::sysctl::read(SETTING).unwrap());
    let reconfigure = |node: &mut Node, ports| {
        let config = again(node, ports);
        assert!(node.backend.as_mut().unwrap().configure(config));
        node.adopt();
    };
    let mut node = Node::with(mode, with(false));
    assert_eq!(read(&node), "0");
    reconfigure(&mut node, true);
    assert_ne!(read(&node), "0");
    reconfigure(&mut node, false);
    assert_eq!(read(&node), "0");
    reconfigure(&mut node, true);
    // Another mode needs it, too: the change from one to the other does not touch it.
    node.namespace.run(|| switch::leave_others(mode, &node.config.ebpf));
    assert_ne!(read(&node), "0");
    // By another process than the one that switched it on.
    node.backend = None;
    node.namespace.run(|| cleanup::everything(&node.config.ebpf).unwrap());
    assert_eq!(read(&node), "0");
    // Somebody else's.
    node.namespace.set("ipv4/conf/all/route_localnet", "1");
    let config = again(&node, true);
    node.backend = Some(node.namespace.run(|| mode.open(config).unwrap()));
    node.adopt();
    reconfigure(&mut node, false);
    assert_eq!(read(&node), "1");
    node.namespace.run(|| cleanup::everything(&node.config.ebpf).unwrap());
    assert_eq!(read(&node), "1");
}

fn the_variant_of_iptables_is_the_one_that_the_node_uses(mode: Mode) {
    let variant = variant_of(mode);
    let namespace = Namespace::new();
    let usual = || namespace.run(|| Iptables::usual_variant().unwrap());
    assert_eq!(usual(), Variant::Nft);
    // The one with more rules; what is ours does not count.
    let rules = "*filter\n:OTHERS - [0:0]\n-A OTHERS -j RETURN\nCOMMIT\n";
    restore(&namespace, &format!("iptables-{}-restore", variant.word()), rules);
    assert_eq!(usual(), variant);
    // The kubelet's hint counts more than rules.
    let other = if variant == Variant::Nft { Variant::Legacy } else { Variant::Nft };
    let hint = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n";
    restore(&namespace, &format!("iptables-{}-restore", other.word()), hint);
    assert_eq!(usual(), other);
}

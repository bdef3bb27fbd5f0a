//! What strangers do to a backend's part of the kernel: it must be noticed and mended.

use std::io::ErrorKind;

use keelson_netlink::ipvs::{Command, Ipvs, Key, Real, RealFound, Virtual};
use keelson_netlink::route::{Direction, Route, Rtnl};
use keelson_proxy::backend::Mode;
use keelson_proxy::iptables::Variant;

use super::{NODE4, Namespace};

/// One way to spoil things.
pub(crate) struct Damage {
    pub(crate) name: String,
    inflict: Box<dyn Fn(&Namespace)>,
}

impl Damage {
    pub(crate) fn inflict(&self, namespace: &Namespace) {
        (self.inflict)(namespace);
    }
}

/// The worst one first: everything of that kernel interface is flushed.
pub(crate) fn damages(mode: Mode) -> Vec<Damage> {
    match mode {
        Mode::Nftables => nftables(),
        Mode::Iptables(variant) => iptables(variant),
        Mode::Ipvs => ipvs(),
        Mode::Ebpf => ebpf(),
    }
}

fn ebpf() -> Vec<Damage> {
    let remove = |what: &'static str| Damage {
        name: format!("rm -r {what}"),
        inflict: Box::new(move |namespace| {
            let path = namespace.pins().join(what);
            let removed = match path.is_dir() {
                true => std::fs::remove_dir_all(&path),
                false => std::fs::remove_file(&path),
            };
            // It may not be there yet.
            removed.unwrap_or_else(|error| assert_eq!(error.kind(), ErrorKind::NotFound, "{what}"));
        }),
    };
    let detach = Damage {
        name: "tc filter del dev eth0 ingress".to_owned(),
        inflict: Box::new(|namespace| {
            // A link, or before Linux 6.6 a filter.
            if std::fs::remove_file(namespace.pins().join("links/ingress-2")).is_err() {
                namespace.rtnl().remove_classifier(2, Direction::Ingress).unwrap();
            }
        }),
    };
    vec![remove(""), remove("links"), remove("links/connect4"), detach]
}

fn ipvs() -> Vec<Damage> {
    let ask = |name: &str, commands: fn(&mut Ipvs) -> Vec<Command>| Damage {
        name: name.to_owned(),
        inflict: Box::new(move |namespace| {
            namespace.run(|| {
                let mut ipvs = Ipvs::open().unwrap();
                let commands = commands(&mut ipvs);
                assert!(!commands.is_empty());
                ipvs.perform(&commands).unwrap();
            });
        }),
    };
    let route = |name: &str, spoil: fn(&mut Rtnl)| Damage {
        name: name.to_owned(),
        inflict: Box::new(move |namespace| spoil(&mut namespace.rtnl())),
    };
    let mut damages = vec![
        ask("ipvsadm -C", |_| vec![Command::Flush]),
        ask("ipvsadm -D", |_| vec![Command::RemoveVirtual(web1())]),
        ask("ipvsadm -d", |ipvs| vec![Command::RemoveReal(web1(), first(ipvs).real.at)]),
        ask("ipvsadm -e -w 7", |ipvs| {
            vec![Command::SetReal(web1(), Real { weight: 7, ..first(ipvs).real })]
        }),
        ask("ipvsadm -a", |_| {
            let at = "10.66.9.9:8080".parse().unwrap();
            vec![Command::AddReal(web1(), Real { at, weight: 1 })]
        }),
        ask("ipvsadm -E -s wlc", |ipvs| {
            let found = ipvs.find(web1()).unwrap().unwrap();
            vec![Command::SetVirtual(Virtual { scheduler: "wlc".to_owned(), ..found })]
        }),
        route("ip rule del", |rtnl| {
            let rules = rtnl.rules().unwrap();
            let rule = rules.iter().find(|rule| rule.mark.is_some()).unwrap();
            assert!(rtnl.delete_rule(rule).unwrap());
        }),
        route("ip route flush", |rtnl| {
            let routes: Vec<Route> = rtnl.routes_of(27_493).unwrap();
            assert_eq!(routes.len(), 2);
            routes.iter().for_each(|route| assert!(rtnl.delete_route(route).unwrap()));
        }),
    ];
    let (table, flows) = ("inet keelson-proxy-ipvs", "inet keelson-proxy-ipvs-flows");
    let commands = [
        "flush ruleset".to_owned(),
        format!("delete table {table}"),
        format!("delete table {flows}"),
        format!("flush chain {flows} to-ipvs"),
        format!("flush map {table} services4"),
    ];
    damages.extend(commands.map(|commands| Damage {
        name: commands.clone(),
        inflict: Box::new(move |namespace| nft(namespace, &commands)),
    }));
    damages
}

/// The node port of one Service of the rows that use this.
fn web1() -> Key {
    Key { address: NODE4.parse().unwrap(), protocol: 6, port: 30001 }
}

fn first(ipvs: &mut Ipvs) -> RealFound {
    ipvs.reals(web1()).unwrap()[0]
}

fn nftables() -> Vec<Damage> {
    let of_another_version = "delete table inet keelson-proxy\n\
         table inet keelson-proxy { set services4 { type mark; }; chain old { accept; }; }";
    let ours = "inet keelson-proxy";
    [
        "flush ruleset".to_owned(),
        format!("delete table {ours}"),
        of_another_version.to_owned(),
        format!("flush chain {ours} find-service4"),
        format!("flush map {ours} endpoints4"),
        format!("flush map {ours} services4"),
        format!("flush set {ours} cluster-cidrs4"),
        format!("flush chain {ours} prerouting\ndelete chain {ours} prerouting"),
        format!("add element {ours} services4 {{ 10.96.9.9 . tcp . 80 : drop }}"),
    ]
    .map(|commands| Damage {
        name: commands.clone(),
        inflict: Box::new(move |namespace| nft(namespace, &commands)),
    })
    .into()
}

fn iptables(variant: Variant) -> Vec<Damage> {
    let run = |arguments: &str| {
        let (program, arguments) = (format!("iptables-{}", variant.word()), arguments.to_owned());
        let name = format!("{program} {arguments}");
        let inflict = move |namespace: &Namespace| {
            let arguments: Vec<&str> = arguments.split(' ').collect();
            namespace.output(&program, &arguments);
        };
        Damage { name, inflict: Box::new(inflict) }
    };
    let mut damages = vec![
        run("-t nat -F"),
        run("-F"),
        run("-t nat -F KEELSON-SERVICES"),
        run("-t nat -D PREROUTING -j KEELSON-SERVICES"),
        run("-t nat -D POSTROUTING -j KEELSON-POSTROUTING"),
        run("-t nat -N KEELSON-STRANGE"),
        run("-t nat -I KEELSON-SERVICES -j RETURN"),
    ];
    if variant == Variant::Nft {
        let inflict = |namespace: &Namespace| nft(namespace, "flush ruleset");
        damages.push(Damage { name: "flush ruleset".to_owned(), inflict: Box::new(inflict) });
    }
    damages
}

fn nft(namespace: &Namespace, commands: &str) {
    for command in commands.lines() {
        namespace.output("nft", &[command]);
    }
}

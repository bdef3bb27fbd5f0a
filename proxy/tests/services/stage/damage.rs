//! What strangers do to a backend's part of the kernel: it must be noticed and mended.

use keelson_proxy::backend::Mode;
use keelson_proxy::iptables::Variant;

use super::Namespace;

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
    }
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

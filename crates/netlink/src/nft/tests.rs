//! Against the real kernel, in a network namespace of the test's own thread.

use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use super::*;

const TABLE: Table<'_> = Table { family: Family::Inet, name: "keelson-test" };

/// Runs `test` on a thread with a fresh network namespace, which ends with the thread.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace needs root");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn with_table() -> Batch {
    let mut batch = Batch::new();
    batch.add_table(TABLE);
    batch
}

#[test]
fn a_table_is_made_listed_and_deleted() {
    in_namespace(|| {
        let mut nft = Nft::open().unwrap();
        let mut batch = Batch::new();
        batch.create_table(TABLE, b"v1");
        let base = Base { kind: ChainKind::Nat, hook: Hook::Postrouting, priority: PRIORITY_SNAT };
        batch.add_chain(TABLE, "postrouting", Some(base));
        let rule = Rule::new()
            .only_ipv4()
            .payload(Header::Network, IPV4_SOURCE, 3, Register(0))
            .compare(Register(0), Compare::Equal, &[10, 66, 0])
            .masquerade()
            .comment("pods")
            .stamp(&[1, 2, 3]);
        batch.add_rule(TABLE, "postrouting", &rule);
        nft.commit(batch).unwrap();

        let found = nft.table(TABLE).unwrap().unwrap();
        assert_eq!(found.stamp.as_deref(), Some(&b"v1"[..]));
        let chains = nft.chains(TABLE).unwrap();
        assert_eq!(chains, [ChainFound { name: "postrouting".into(), hook: Some((4, 100)) }]);
        let rules = nft.rules(TABLE).unwrap();
        assert_eq!(rules.len(), 1);
        assert_eq!(rules[0].comment.as_deref(), Some("pods"));
        assert_eq!(rules[0].stamp.as_deref(), Some(&[1, 2, 3][..]));

        let mut batch = Batch::new();
        batch.delete_table(TABLE);
        nft.commit(batch).unwrap();
        assert_eq!(nft.table(TABLE).unwrap(), None);
    });
}

#[test]
fn elements_of_maps_and_sets_come_back_as_they_were_given() {
    in_namespace(|| {
        let mut nft = Nft::open().unwrap();
        let mut batch = with_table();
        batch.add_chain(TABLE, "target", None);
        batch.add_set(TABLE, &Set::verdict_map("verdicts", &[Field::Ipv4, Field::Port]));
        batch.add_set(TABLE, &Set::map("values", &[Field::Mark], &[Field::Ipv6, Field::Port]));
        let ranges = Set { interval: true, ..Set::new("ranges", &[Field::Ipv4]) };
        batch.add_set(TABLE, &ranges);
        let pairs = Set { interval: true, ..Set::new("pairs", &[Field::Port, Field::Ipv4]) };
        batch.add_set(TABLE, &pairs);
        let key = [10, 0, 0, 1, 0, 80, 0, 0];
        let element = Element::verdict(&key, Verdict::Goto("target"));
        batch.add_elements(TABLE, "verdicts", [element]);
        batch.add_elements(TABLE, "values", [Element::value(&[1, 0, 0, 0], &[7; 20])]);
        batch.add_ranges(TABLE, "ranges", [(&[10, 0, 0, 0][..], &[10, 0, 0, 255][..])]);
        let (first, last) = ([0, 80, 0, 0, 10, 0, 0, 0], [0, 80, 0, 0, 10, 0, 0, 255]);
        batch.add_elements(TABLE, "pairs", [Element::range(&first, &last)]);
        nft.commit(batch).unwrap();

        let mut seen = Vec::new();
        nft.elements(TABLE, "verdicts", |e| {
            assert_eq!(e.verdict, Some(Verdict::Goto("target")));
            seen.push(e.key.to_vec());
        })
        .unwrap();
        assert_eq!(seen, [key]);
        nft.elements(TABLE, "values", |e| {
            assert_eq!((e.key, e.value), (&[1, 0, 0, 0][..], &[7; 20][..]))
        })
        .unwrap();
        nft.elements(TABLE, "pairs", |e| {
            assert_eq!((e.key, e.last), (&first[..], Some(&last[..])));
        })
        .unwrap();
        let mut ends = 0;
        nft.elements(TABLE, "ranges", |e| ends += usize::from(e.ends_range)).unwrap();
        assert_eq!(ends, 1);
        let sets = nft.sets(TABLE).unwrap();
        assert_eq!(sets.len(), 4);
        assert_eq!(sets[1].value_len, 20);
    });
}

#[test]
fn every_expression_is_taken_by_the_kernel() {
    in_namespace(|| {
        let (a, b) = (Register(0), Register(4));
        let mut batch = with_table();
        let base = |kind, hook| Some(Base { kind, hook, priority: -100 });
        batch.add_chain(TABLE, "nat", base(ChainKind::Nat, Hook::Prerouting));
        batch.add_chain(TABLE, "filter", base(ChainKind::Filter, Hook::Prerouting));
        batch.add_chain(TABLE, "out", base(ChainKind::Nat, Hook::Postrouting));
        batch.add_chain(TABLE, "other", None);
        let dynamic = Set {
            dynamic: true,
            timeout: true,
            size: Some(1000),
            ..Set::map("seen", &[Field::Ipv4], &[Field::Mark])
        };
        batch.add_set(TABLE, &dynamic);
        batch.add_set(TABLE, &Set::verdict_map("verdicts", &[Field::Ipv4]));
        batch.add_set(TABLE, &Set::new("plain", &[Field::Ipv4]));
        let address = || Rule::new().payload(Header::Network, IPV4_SOURCE, 4, a);
        let nat = Nat {
            destination: true,
            ipv6: false,
            address: a,
            address_end: None,
            port: Some(b),
            port_end: None,
        };
        let nat_rules = [
            address().lookup("plain", a, false).lookup("plain", a, true),
            address().lookup_value("seen", a, b).set_meta(Meta::Mark, b),
            address().lookup_verdict("verdicts", a),
            Rule::new().fib_address_type(FibAddress::Destination, a).compare(
                a,
                Compare::Equal,
                &FIB_LOCAL.to_ne_bytes(),
            ),
            Rule::new()
                .meta(Meta::TransportProtocol, a)
                .compare(a, Compare::Equal, &[6])
                .reject(Refusal::TcpReset),
            Rule::new().reject(Refusal::PortUnreachable),
            address().random(3, b).dynamic_set("seen", Dynamic::Delete, a, Some(b), None),
            address().random(3, b).dynamic_set(
                "seen",
                Dynamic::Add,
                a,
                Some(b),
                Some(Duration::from_secs(9)),
            ),
            address().random(3, b).dynamic_set(
                "seen",
                Dynamic::Update,
                a,
                Some(b),
                Some(Duration::from_secs(9)),
            ),
            Rule::new().immediate(a, &[10, 0, 0, 1]).immediate(b, &[0, 80]).nat(nat),
            Rule::new()
                .conntrack(Conntrack::Status, a)
                .bitwise(a, a, &CT_STATUS_DNAT.to_ne_bytes(), &[0; 4])
                .compare(a, Compare::NotEqual, &[0; 4]),
            Rule::new().counter().limit(10, 5).verdict(Verdict::Return),
            Rule::new().verdict(Verdict::Goto("other")),
        ];
        for rule in &nat_rules {
            batch.add_rule(TABLE, "nat", rule);
        }
        batch.add_rule(TABLE, "filter", &Rule::new().no_track());
        batch.add_rule(TABLE, "out", &Rule::new().masquerade());
        Nft::open().unwrap().commit(batch).unwrap();
    });
}

#[test]
fn a_refused_transaction_names_the_culprit_and_changes_nothing() {
    in_namespace(|| {
        let mut nft = Nft::open().unwrap();
        let mut batch = with_table();
        batch.add_set(TABLE, &Set::map("values", &[Field::Mark], &[Field::Mark]));
        nft.commit(batch).unwrap();
        let mut batch = Batch::new();
        batch.add_chain(TABLE, "fine", None);
        let (one, two) = ([1, 0, 0, 0], [2, 0, 0, 0]);
        batch.add_elements(
            TABLE,
            "values",
            [Element::value(&one, &one), Element::value(&two, &two)],
        );
        batch.delete_elements(TABLE, "values", [Element::key(&one), Element::key(&[3, 0, 0, 0])]);
        let error = nft.commit(batch).unwrap_err();
        assert!(error.is_not_found(), "{error}");
        let text = error.to_string();
        assert!(text.contains("delete elements of set values of table keelson-test"), "{text}");
        assert!(nft.chains(TABLE).unwrap().is_empty());
    });
}

#[test]
fn a_transaction_for_an_older_generation_is_refused() {
    in_namespace(|| {
        let mut nft = Nft::open().unwrap();
        let generation = nft.generation().unwrap();
        nft.commit(with_table()).unwrap();
        let mut batch = Batch::at_generation(generation);
        batch.add_chain(TABLE, "late", None);
        assert!(matches!(nft.commit(batch), Err(NftError::Raced)));
        let mut batch = Batch::at_generation(generation + 1);
        batch.add_chain(TABLE, "in-time", None);
        nft.commit(batch).unwrap();
    });
}

#[test]
fn the_monitor_tells_foreign_changes_from_our_own() {
    in_namespace(|| {
        let (mut ours, mut theirs) = (Nft::open().unwrap(), Nft::open().unwrap());
        let mut monitor = Monitor::open().unwrap();
        ours.commit(with_table()).unwrap();
        let seen = monitor.read(TABLE, ours.port()).unwrap();
        assert_eq!(seen, Seen { table_changed: false, anything: true });
        let mut batch = Batch::new();
        batch.add_table(Table::inet("other"));
        theirs.commit(batch).unwrap();
        assert!(!monitor.read(TABLE, ours.port()).unwrap().table_changed);
        let mut batch = Batch::new();
        batch.delete_table(TABLE);
        theirs.commit(batch).unwrap();
        assert!(monitor.read(TABLE, ours.port()).unwrap().table_changed);
    });
}

#[test]
fn thousands_of_elements_fit_one_transaction() {
    in_namespace(|| {
        let mut nft = Nft::open().unwrap();
        let mut batch = with_table();
        batch.add_set(TABLE, &Set::new("many", &[Field::Mark]));
        let keys: Vec<[u8; 4]> = (0..20_000u32).map(u32::to_ne_bytes).collect();
        batch.add_elements(TABLE, "many", keys.iter().map(|key| Element::key(key)));
        assert_eq!(batch.operations(), 20_002);
        nft.commit(batch).unwrap();
        let mut count = 0;
        nft.elements(TABLE, "many", |_| count += 1).unwrap();
        assert_eq!(count, 20_000);
    });
}

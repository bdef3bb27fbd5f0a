use proptest::prelude::*;

use super::*;

fn nets(texts: &[&str]) -> Vec<IpNetwork> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn key(name: &str) -> Key {
    Key { container_id: name.to_owned(), ifname: "eth0".to_owned() }
}

fn record(name: &str, ips: Vec<IpAddr>) -> Record {
    Record {
        key: key(name),
        ips,
        host: format!("host-{name}"),
        netns: PathBuf::from("/run/netns/x"),
        inode: (4, 5),
        boot: "now".to_owned(),
        ports: Vec::new(),
    }
}

fn take(ledger: &mut Ledger, name: &str, cidrs: &[IpNetwork]) -> Result<String, Exhausted> {
    let ips = ledger.choose(cidrs, &[], |_| false)?;
    let text = ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    ledger.apply(Entry::Take(record(name, ips)));
    Ok(text)
}

#[test]
fn addresses_are_taken_in_turn_and_a_returned_one_comes_last() {
    let cidrs = nets(&["10.0.0.0/29"]);
    let mut ledger = Ledger::default();
    assert_eq!(take(&mut ledger, "a", &cidrs).unwrap(), "10.0.0.1");
    assert_eq!(take(&mut ledger, "b", &cidrs).unwrap(), "10.0.0.2");
    ledger.apply(Entry::Free(key("a")));
    ledger.apply(Entry::Free(key("b")));
    for (name, want) in [("c", "3"), ("d", "4"), ("e", "5"), ("f", "6"), ("g", "1"), ("h", "2")] {
        assert_eq!(take(&mut ledger, name, &cidrs).unwrap(), format!("10.0.0.{want}"));
    }
    let error = take(&mut ledger, "i", &cidrs).unwrap_err();
    assert_eq!(error.to_string(), "no free address is left in 10.0.0.0/29");
}

#[test]
fn each_family_gives_one_address() {
    let cidrs = nets(&["10.0.0.0/30", "fd00::/64", "10.0.1.0/30"]);
    let mut ledger = Ledger::default();
    assert_eq!(take(&mut ledger, "a", &cidrs).unwrap(), "10.0.0.1 fd00::1");
    assert_eq!(take(&mut ledger, "b", &cidrs).unwrap(), "10.0.0.2 fd00::2");
    assert_eq!(take(&mut ledger, "c", &cidrs).unwrap(), "10.0.1.1 fd00::3");
}

#[test]
fn excluded_and_unusable_addresses_are_passed() {
    let ledger = Ledger::default();
    let cidrs = nets(&["10.0.0.0/24", "fd00::/64"]);
    let exclude = nets(&["10.0.0.0/25", "fd00::/65"]);
    let busy: IpAddr = "10.0.0.128".parse().unwrap();
    let ips = ledger.choose(&cidrs, &exclude, |ip| ip == busy).unwrap();
    assert_eq!(ips[0].to_string(), "10.0.0.129");
    assert_eq!(ips[1].to_string(), "fd00::8000:0:0:0");
}

#[test]
fn tiny_and_whole_ranges_work() {
    for (cidr, want) in [
        ("10.0.0.7/32", "10.0.0.7"),
        ("10.0.0.6/31", "10.0.0.6"),
        ("fd00::1/128", "fd00::1"),
        ("::/0", "::1"),
    ] {
        let ips = Ledger::default().choose(&nets(&[cidr]), &[], |_| false).unwrap();
        assert_eq!(ips[0].to_string(), want);
    }
    assert_eq!(capacity(&nets(&["10.0.0.0/24"])), 254);
}

#[test]
fn records_of_earlier_boots_are_stale() {
    let mut ledger = Ledger::default();
    let old = Record { boot: "before".to_owned(), ..record("a", Vec::new()) };
    ledger.apply(Entry::Take(old));
    ledger.apply(Entry::Take(record("b", Vec::new())));
    assert_eq!(ledger.stale("now"), [key("a")]);
}

proptest! {
    /// Whatever happens, no address is held twice, every choice is inside the ranges, and a choice fails only
    /// when all addresses are held.
    #[test]
    fn no_address_is_held_twice(steps in proptest::collection::vec((0u8..20, any::<bool>()), 0..200)) {
        let cidrs = nets(&["10.0.0.0/29", "10.0.1.0/31"]);
        let mut ledger = Ledger::default();
        for (who, add) in steps {
            let name = format!("c{who}");
            if !add {
                ledger.apply(Entry::Free(key(&name)));
            } else if ledger.get(&key(&name)).is_none() {
                let held: HashSet<_> = ledger.records().flat_map(|r| r.ips.clone()).collect();
                match ledger.choose(&cidrs, &[], |_| false) {
                    Ok(ips) => {
                        prop_assert!(!held.contains(&ips[0]));
                        prop_assert!(cidrs.iter().any(|cidr| cidr.contains(ips[0])));
                        ledger.apply(Entry::Take(record(&name, ips)));
                    }
                    Err(_) => prop_assert_eq!(held.len(), 8),
                }
            }
            let mut again = Ledger::default();
            ledger.entries().into_iter().for_each(|entry| again.apply(entry));
            prop_assert_eq!(&again, &ledger);
        }
    }
}

//! The plugin's verbs. Each reads its configuration from standard input and `CNI_*` from the environment, and prints a
//! result, or an error in CNI's shape.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use keelson_netlink::netns::Netns;
use keelson_netlink::nft::{Nft, NftError};
use keelson_netlink::route::Rtnl;
use keelson_netlink::sysctl;
use serde_json::{Map, Value, json};

use crate::config::{self, Config, Network};
use crate::error::{CniError, chain, code};
use crate::firewall::{self, Edge};
use crate::journal::{Journal, JournalError};
use crate::ledger::{Entry, Key, Record};
use crate::names::Names;
use crate::protocol::{is_ifname, is_name};
use crate::result::{AddResult, Interface, IpConfig, RouteConfig};
use crate::version::Version;
use crate::wire::{self, Wire, WireError};

/// Larger configurations are not what they claim to be.
const MAX_INPUT: u64 = 4 << 20;

/// Runs the verb that the environment asks for.
pub fn main() -> ExitCode {
    let Some(verb) = std::env::var("CNI_COMMAND").ok().filter(|verb| !verb.is_empty()) else {
        let about = "keelson-cni: a CNI plugin; speaks versions";
        drop(writeln!(io::stderr(), "{about} {}", Version::list()));
        return ExitCode::SUCCESS;
    };
    let (answer, status) = match run(&verb) {
        Ok(Some(answer)) => (answer.to_string(), ExitCode::SUCCESS),
        Ok(None) => return ExitCode::SUCCESS,
        Err((version, error)) => {
            let mut text = json!(error);
            text["cniVersion"] = version.as_str().into();
            (text.to_string(), ExitCode::FAILURE)
        }
    };
    match writeln!(io::stdout(), "{answer}") {
        Ok(()) => status,
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(verb: &str) -> Result<Option<Value>, (Version, CniError)> {
    if verb == "VERSION" {
        let versions: Vec<&str> = Version::ALL.map(Version::as_str).into();
        return Ok(Some(
            json!({ "cniVersion": Version::NEWEST.as_str(), "supportedVersions": versions }),
        ));
    }
    let fields = read_input().map_err(|error| (Version::NEWEST, error))?;
    let network = config::network(&fields).map_err(|error| (Version::NEWEST, error))?;
    let version = network.version;
    dispatch(verb, &network, &fields).map_err(|error| (version, error))
}

fn dispatch(
    verb: &str,
    network: &Network,
    fields: &Map<String, Value>,
) -> Result<Option<Value>, CniError> {
    let since = match verb {
        "ADD" | "DEL" => Version::V0_3_0,
        "CHECK" => Version::V0_4_0,
        "STATUS" | "GC" => Version::V1_1_0,
        other => {
            return Err(CniError::new(
                code::BAD_ENVIRONMENT,
                format!("CNI_COMMAND {other:?} is no verb of CNI"),
            ));
        }
    };
    if network.version < since {
        let text = format!(
            "{verb} needs cniVersion {since} or newer, the configuration says {}",
            network.version
        );
        return Err(CniError::new(code::INCOMPATIBLE_VERSION, text));
    }
    match verb {
        "ADD" => add(network, &config::config(fields)?).map(Some),
        "DEL" => del(network).map(|()| None),
        "CHECK" => check(network, &config::config(fields)?).map(|()| None),
        "STATUS" => status(network, &config::config(fields)?).map(|()| None),
        _ => gc(network, &config::valid_attachments(fields)?).map(|()| None),
    }
}

fn read_input() -> Result<Map<String, Value>, CniError> {
    let mut text = Vec::new();
    io::stdin().lock().take(MAX_INPUT).read_to_end(&mut text).map_err(|e| {
        CniError::new(code::IO, "cannot read the configuration from standard input").caused_by(&e)
    })?;
    serde_json::from_slice(&text).map_err(|e| {
        CniError::new(code::DECODE, "the configuration is not a JSON object").caused_by(&e)
    })
}

/// `CNI_CONTAINERID` and `CNI_IFNAME`.
fn key() -> Result<Key, CniError> {
    let bad =
        |name: &str, rule: &str| CniError::new(code::BAD_ENVIRONMENT, format!("{name} {rule}"));
    let container_id = std::env::var("CNI_CONTAINERID").unwrap_or_default();
    if !is_name(&container_id) {
        return Err(bad(
            "CNI_CONTAINERID",
            "must start with a letter or digit and hold only those and _ . -",
        ));
    }
    let ifname = std::env::var("CNI_IFNAME").unwrap_or_default();
    if !is_ifname(&ifname) {
        return Err(bad("CNI_IFNAME", "must be an interface name of at most 15 bytes"));
    }
    Ok(Key { container_id, ifname })
}

fn pod_netns() -> Result<Netns, CniError> {
    let path = std::env::var("CNI_NETNS").unwrap_or_default();
    if path.is_empty() {
        return Err(CniError::new(code::BAD_ENVIRONMENT, "CNI_NETNS is missing"));
    }
    let pod = Netns::open(Path::new(&path)).map_err(|e| {
        CniError::new(code::UNKNOWN_CONTAINER, format!("CNI_NETNS {path}")).caused_by(&e)
    })?;
    let own = Netns::current().and_then(|own| Ok(own.identity()? == pod.identity()?));
    if own.unwrap_or(false) && std::env::var_os("CNI_NETNS_OVERRIDE").is_none() {
        return Err(CniError::new(
            code::BAD_ENVIRONMENT,
            format!("CNI_NETNS {path} is the plugin's own network"),
        ));
    }
    Ok(pod)
}

fn add(network: &Network, config: &Config) -> Result<Value, CniError> {
    let (key, pod) = (key()?, pod_netns()?);
    let names = Names::of(&network.name, &key);
    let mut node = rtnl()?;
    let (record, forwards) = reserve(network, config, &key, &names, &pod, &mut node)?;
    let made = connect(network, config, &record, &names, &pod, &mut node, forwards);
    if let Err(error) = made {
        // The first error is the one to show; DEL repeats what could not be undone here.
        drop(undo(network, &mut node, &record));
        return Err(error);
    }
    Ok(result(config, &record, &names, made.unwrap_or(1500)).to_json(network.version))
}

/// Takes addresses and brings that to the disk before anything is made.
fn reserve(
    network: &Network,
    config: &Config,
    key: &Key,
    names: &Names,
    pod: &Netns,
    node: &mut Rtnl,
) -> Result<(Record, Vec<firewall::Forward>), CniError> {
    let mut journal = open_journal(network)?;
    let boot = boot_id()?;
    let mut entries: Vec<Entry> =
        journal.ledger().stale(&boot).into_iter().map(Entry::Free).collect();
    if let Some(old) = journal.ledger().get(key).filter(|old| old.boot == boot) {
        if wire::is_attached(node, names).map_err(kernel)? {
            let text = format!(
                "{} of container {} is in network {} already",
                key.ifname, key.container_id, network.name
            );
            return Err(CniError::new(code::EXISTS, text));
        }
        // An ADD that was killed: begin anew.
        wire::detach(node, names).map_err(kernel)?;
        entries.push(Entry::Free(old.key.clone()));
    }
    journal.append(entries).map_err(journal_error)?;
    let unusable = |ip| wire::in_use(node, ip).unwrap_or(false);
    let ips =
        journal.ledger().choose(&config.pod_cidrs, &config.exclude, unusable).map_err(|e| {
            CniError::new(code::TRY_AGAIN, format!("network {}: {e}", network.name))
                .with_details("end pods on this node, or give it a larger range in podCIDRs")
        })?;
    let record = Record {
        key: key.clone(),
        ips,
        host: names.host.clone(),
        netns: pod.path().to_owned(),
        inode: pod
            .identity()
            .map_err(|e| CniError::new(code::IO, "the pod's network namespace").caused_by(&e))?,
        boot,
        ports: config.host_ports.clone(),
    };
    journal.append(vec![Entry::Take(record.clone())]).map_err(journal_error)?;
    let forwards =
        journal.ledger().records().flat_map(|r| firewall::forwards(&r.ports, &r.ips)).collect();
    journal.unlock_and_sync().map_err(journal_error)?;
    Ok((record, forwards))
}

/// Makes the link and opens the way; answers the packet size.
fn connect(
    network: &Network,
    config: &Config,
    record: &Record,
    names: &Names,
    pod: &Netns,
    node: &mut Rtnl,
    forwards: Vec<firewall::Forward>,
) -> Result<u32, CniError> {
    enable_forwarding(&record.ips)?;
    let mtu = match config.mtu {
        Some(mtu) => mtu,
        None => wire::uplink_mtu(node).map_err(kernel)?,
    };
    let own = firewall::forwards(&record.ports, &record.ips);
    if config.masquerade || !forwards.is_empty() {
        let mut nft = nft()?;
        // A table that had to be made has all ports in it, also ours.
        let made = edge(network, config).ensure(&mut nft, || forwards).map_err(packet_filter)?;
        if !made && !own.is_empty() {
            firewall::open_ports(&mut nft, &network.name, &own).map_err(port_error)?;
        }
    }
    let wire = Wire {
        names,
        ifname: &record.key.ifname,
        ips: &record.ips,
        mtu,
        cluster: &config.cluster_cidrs,
    };
    wire.attach(node, pod).map_err(kernel)?;
    Ok(mtu)
}

fn edge<'a>(network: &'a Network, config: &'a Config) -> Edge<'a> {
    let pods = if config.masquerade { config.pod_cidrs.as_slice() } else { &[] };
    Edge { network: &network.name, pods, cluster: &config.cluster_cidrs }
}

fn enable_forwarding(ips: &[std::net::IpAddr]) -> Result<(), CniError> {
    for (wanted, setting) in [
        (ips.iter().any(std::net::IpAddr::is_ipv4), "net/ipv4/ip_forward"),
        (ips.iter().any(std::net::IpAddr::is_ipv6), "net/ipv6/conf/all/forwarding"),
    ] {
        if wanted {
            sysctl::ensure(setting, "1").map_err(|e| {
                CniError::new(code::NETWORK, "cannot switch forwarding on").caused_by(&e)
            })?;
        }
    }
    Ok(())
}

fn result(config: &Config, record: &Record, names: &Names, mtu: u32) -> AddResult {
    let host = Interface {
        name: names.host.clone(),
        mac: names.host_mac.to_string(),
        mtu: Some(mtu),
        sandbox: String::new(),
    };
    let pod = Interface {
        name: record.key.ifname.clone(),
        mac: names.pod_mac.to_string(),
        mtu: Some(mtu),
        sandbox: record.netns.display().to_string(),
    };
    let ips = record.ips.iter().map(|ip| IpConfig {
        address: (*ip).into(),
        gateway: Some(wire::gateway(*ip)),
        interface: Some(1),
    });
    let routes = record.ips.iter().filter_map(|ip| {
        let everywhere = if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        Some(RouteConfig { dst: everywhere.parse().ok()?, gw: Some(wire::gateway(*ip)) })
    });
    AddResult {
        interfaces: vec![host, pod],
        ips: ips.collect(),
        routes: routes.collect(),
        dns: config.dns.clone(),
    }
}

/// Needs nothing but the record, and not even that: the link's name follows from the attachment.
fn del(network: &Network) -> Result<(), CniError> {
    let key = key()?;
    let mut node = rtnl()?;
    let journal = open_journal(network)?;
    let record = journal.ledger().get(&key).cloned();
    drop(journal);
    match record {
        Some(record) => undo(network, &mut node, &record),
        None => wire::detach(&mut node, &Names::of(&network.name, &key)).map(drop).map_err(kernel),
    }
}

/// Link and ports first, the address last: it is free only when nothing leads to it any more.
fn undo(network: &Network, node: &mut Rtnl, record: &Record) -> Result<(), CniError> {
    let forwards = firewall::forwards(&record.ports, &record.ips);
    if !forwards.is_empty() {
        firewall::close_ports(&mut nft()?, &network.name, &forwards).map_err(packet_filter)?;
    }
    wire::detach(node, &Names::of(&network.name, &record.key)).map_err(kernel)?;
    let mut journal = open_journal(network)?;
    if journal.ledger().get(&record.key).is_some_and(|now| now.inode == record.inode) {
        journal.append(vec![Entry::Free(record.key.clone())]).map_err(journal_error)?;
    }
    Ok(())
}

fn check(network: &Network, config: &Config) -> Result<(), CniError> {
    let (key, pod) = (key()?, pod_netns()?);
    let names = Names::of(&network.name, &key);
    let journal = open_journal(network)?;
    let record = journal.ledger().get(&key).cloned();
    drop(journal);
    let damaged = |what: String| CniError::new(code::DAMAGED, what);
    let record = record.ok_or_else(|| {
        damaged(format!("no address is recorded for container {}", key.container_id))
    })?;
    let mut node = rtnl()?;
    let wire = Wire {
        names: &names,
        ifname: &key.ifname,
        ips: &record.ips,
        mtu: 0,
        cluster: &config.cluster_cidrs,
    };
    if let Some(what) = wire.damage(&mut node, &pod).map_err(kernel)? {
        return Err(damaged(what));
    }
    if config.masquerade && !edge(network, config).is_current(&mut nft()?).map_err(packet_filter)? {
        return Err(damaged(
            "the masquerade table is missing or of another configuration".to_owned(),
        ));
    }
    Ok(())
}

fn status(network: &Network, config: &Config) -> Result<(), CniError> {
    let unavailable = |error: CniError| CniError { code: code::NOT_AVAILABLE, ..error };
    rtnl().map_err(unavailable)?;
    if config.masquerade {
        nft().map_err(unavailable)?;
    }
    let journal = open_journal(network).map_err(unavailable)?;
    let mut node = rtnl().map_err(unavailable)?;
    let free = journal.ledger().choose(&config.pod_cidrs, &config.exclude, |ip| {
        wire::in_use(&mut node, ip).unwrap_or(false)
    });
    free.map(drop)
        .map_err(|e| CniError::new(code::NOT_AVAILABLE, format!("network {}: {e}", network.name)))
}

/// Frees whatever is not listed; goes on after an error and reports the first.
fn gc(network: &Network, valid: &[(String, String)]) -> Result<(), CniError> {
    let valid: HashSet<(&str, &str)> =
        valid.iter().map(|(id, ifname)| (id.as_str(), ifname.as_str())).collect();
    let journal = open_journal(network)?;
    let listed = |key: &Key| valid.contains(&(key.container_id.as_str(), key.ifname.as_str()));
    let stale: Vec<Record> =
        journal.ledger().records().filter(|r| !listed(&r.key)).cloned().collect();
    drop(journal);
    let mut node = rtnl()?;
    let mut first = Ok(());
    for record in stale {
        first = first.and(undo(network, &mut node, &record));
    }
    first
}

fn rtnl() -> Result<Rtnl, CniError> {
    Rtnl::open().map_err(|e| {
        CniError::new(code::NETWORK, "cannot talk to the kernel's routing").caused_by(&e)
    })
}

fn nft() -> Result<Nft, CniError> {
    Nft::open().map_err(packet_filter)
}

fn open_journal(network: &Network) -> Result<Journal, CniError> {
    Journal::open(&network.folder(), network.lock_timeout).map_err(journal_error)
}

fn boot_id() -> Result<String, CniError> {
    let path = PathBuf::from("/proc/sys/kernel/random/boot_id");
    std::fs::read_to_string(&path).map(|text| text.trim().to_owned()).map_err(|e| {
        CniError::new(code::IO, format!("cannot read {}", path.display())).caused_by(&e)
    })
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn journal_error(error: JournalError) -> CniError {
    let code = if matches!(error, JournalError::Busy { .. }) { code::TRY_AGAIN } else { code::IO };
    CniError::new(code, "cannot use the record of addresses").with_details(chain(&error))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn kernel(error: WireError) -> CniError {
    let code = if matches!(error, WireError::InterfaceExists { .. }) {
        code::EXISTS
    } else {
        code::NETWORK
    };
    CniError::new(code, "cannot connect the pod").with_details(chain(&error))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn packet_filter(error: NftError) -> CniError {
    CniError::new(
        code::NETWORK,
        "cannot set up address translation (does this kernel have nftables with NAT?)",
    )
    .with_details(chain(&error))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn port_error(error: NftError) -> CniError {
    CniError::new(code::NETWORK, "a port of the node is taken or cannot be opened")
        .with_details(chain(&error))
}

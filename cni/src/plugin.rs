//! The plugin's verbs. Each reads its configuration from standard input and `CNI_*` from the environment, and prints a
//! result, or an error in CNI's shape.

mod gc;
mod reserve;
mod system;

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use ipnetwork::IpNetwork;
use keelson_netlink::netns::Netns;
use keelson_netlink::route::Rtnl;
use serde_json::{Map, Value, json};

use self::gc::gc;
use self::reserve::{forget_flows, reserve};
use self::system::{
    enable_forwarding, journal_error, kernel, nft, open_journal, packet_filter, rtnl,
};
use crate::config::{self, Config, Network};
use crate::error::{CniError, code};
use crate::firewall::{self, Edge};
use crate::ledger::{Entry, Key, Record};
use crate::names::Names;
use crate::protocol::{is_ifname, is_name};
use crate::result::{AddResult, Interface, IpConfig, RouteConfig};
use crate::source_guard;
use crate::version::Version;
use crate::wire::{self, Leads, Wire};

/// Larger configurations are not what they claim to be.
const MAX_INPUT: u64 = 4 << 20;

/// Runs the verb that the environment asks for.
pub fn main() -> ExitCode {
    let Some(verb) = std::env::var("CNI_COMMAND").ok().filter(|verb| !verb.is_empty()) else {
        let about = "keelson-cni: a CNI plugin; speaks versions";
        drop(writeln!(io::stderr(), "{about} {}", Version::list()));
        return ExitCode::SUCCESS;
    };
    // A runtime must get an error in CNI's shape also from a defect; the journal lets its DEL undo what was done.
    let outcome = std::panic::catch_unwind(|| run(&verb)).unwrap_or_else(|_| {
        let error = CniError::new(code::INTERNAL, format!("internal error in {verb}"));
        Err((Version::NEWEST, error.with_details("the plugin's standard error has the place")))
    });
    let (answer, status) = match outcome {
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
    enable_forwarding(&config.pod_cidrs)?;
    let mtu = match config.mtu {
        Some(mtu) => mtu,
        None => wire::uplink_mtu(&mut node).map_err(kernel)?,
    };
    let record = reserve(network, config, &key, &names, &pod, &mut node)?;
    let wire = Wire {
        names: &names,
        ifname: &record.key.ifname,
        ips: &record.ips,
        mtu,
        cluster: &config.cluster_cidrs,
        from_loopback: !record.ports.is_empty(),
    };
    match wire.attach(&mut node, &pod) {
        Ok(leads) => Ok(result(config, &record, &names, mtu, leads).to_json(network.version)),
        Err(error) => {
            // The first error is the one to show; DEL repeats what could not be undone here.
            drop(undo(network, &mut node, &record));
            Err(kernel(error))
        }
    }
}

fn edge<'a>(network: &'a Network, config: &'a Config) -> Edge<'a> {
    let pods = if config.masquerade { config.pod_cidrs.as_slice() } else { &[] };
    Edge { network: &network.name, pods, cluster: &config.cluster_cidrs }
}

fn result(config: &Config, record: &Record, names: &Names, mtu: u32, leads: Leads) -> AddResult {
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
    let everywhere = ["0.0.0.0/0", "::/0"].iter().filter_map(|all| all.parse().ok());
    let destinations: Vec<IpNetwork> = match leads {
        Leads::Everywhere => everywhere.collect(),
        Leads::ToCluster => config.cluster_cidrs.clone(),
    };
    let routes = record.ips.iter().flat_map(|ip| {
        let reached = destinations.iter().filter(|dst| dst.is_ipv4() == ip.is_ipv4());
        reached.map(|dst| RouteConfig { dst: *dst, gw: Some(wire::gateway(*ip)) })
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
    let names = Names::of(&network.name, &key);
    let mut node = rtnl()?;
    let journal = open_journal(network)?;
    let record = journal.ledger().get(&key).cloned();
    drop(journal);
    match record {
        Some(record) => undo(network, &mut node, &record),
        None => wire::detach(&mut node, &names).map(drop).map_err(kernel),
    }
}

/// Link and ports first, the address last: it is free only when nothing leads to it any more.
fn undo(network: &Network, node: &mut Rtnl, record: &Record) -> Result<(), CniError> {
    unmake(network, node, record)?;
    free(network, record)
}

fn free(network: &Network, record: &Record) -> Result<(), CniError> {
    let mut journal = open_journal(network)?;
    if journal.ledger().get(&record.key).is_some_and(|now| now.inode == record.inode) {
        journal.append(vec![Entry::Free(record.key.clone())]).map_err(journal_error)?;
    }
    Ok(())
}

/// Closes the ports and removes the link of an attachment whose record stands.
fn unmake(network: &Network, node: &mut Rtnl, record: &Record) -> Result<(), CniError> {
    close_ports(network, record)?;
    wire::detach(node, &Names::of(&network.name, &record.key)).map(drop).map_err(kernel)
}

fn close_ports(network: &Network, record: &Record) -> Result<(), CniError> {
    let forwards = firewall::forwards(&record.ports, &record.ips);
    if forwards.is_empty() {
        return Ok(());
    }
    firewall::close_ports(&mut nft()?, &network.name, &forwards).map_err(packet_filter)?;
    forget_flows(&record.ports)
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
        from_loopback: !record.ports.is_empty(),
    };
    if let Some(what) = wire.damage(&mut node, &pod).map_err(kernel)? {
        return Err(damaged(what));
    }
    let mut nft = nft()?;
    if !source_guard::is_current(&mut nft).map_err(packet_filter)? {
        return Err(damaged(
            "the table that keeps pods to their own addresses is missing".to_owned(),
        ));
    }
    if config.masquerade && !edge(network, config).is_current(&mut nft).map_err(packet_filter)? {
        return Err(damaged(
            "the masquerade table is missing or of another configuration".to_owned(),
        ));
    }
    Ok(())
}

fn status(network: &Network, config: &Config) -> Result<(), CniError> {
    let unavailable = |error: CniError| CniError { code: code::NOT_AVAILABLE, ..error };
    rtnl().map_err(unavailable)?;
    nft().map_err(unavailable)?;
    let journal = open_journal(network).map_err(unavailable)?;
    let mut node = rtnl().map_err(unavailable)?;
    let free = journal.ledger().choose(&config.pod_cidrs, &config.exclude, |ip| {
        wire::in_use(&mut node, ip).unwrap_or(false)
    });
    free.map(drop)
        .map_err(|e| CniError::new(code::NOT_AVAILABLE, format!("network {}: {e}", network.name)))
}

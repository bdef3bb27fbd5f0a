//! `keelson-proxy explain`: what is programmed for a Service and why, or where a packet would go, and
//! whether the kernel agrees.
//!
//! Reads the objects from the API server and the kernel's state from the kernel; asks the running proxy
//! for nothing but its exact mode, so it also tells what is wrong when that one does not work.

mod text;

use std::collections::HashSet;
use std::fmt::Debug;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, bail};
use keelson_netlink::route::Rtnl;
use kube::api::ListParams;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::backend::{BackendConfig, Difference, Mode};
use crate::config::ProxyConfig;
use crate::diff::{Plans, advance};
use crate::ebpf::Forwarding;
use crate::model::objects::{EndpointSlice, Node, Service, ServiceCidr};
use crate::model::{Model, Protocol, ServiceKey};
use crate::trace::{Ground, Packet, trace};
use crate::watch::{SERVICE_SELECTOR, SLICE_SELECTOR};
use crate::{node, run, server, switch};

/// What to explain.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct Question {
    /// NAMESPACE/SERVICE, or ADDRESS:PORT for the way of a packet
    #[arg(value_name = "SERVICE|ADDRESS:PORT")]
    pub what: String,
    /// Source address of the packet; without it, the node itself sends
    #[arg(long, value_name = "ADDRESS")]
    pub from: Option<IpAddr>,
    /// tcp, udp or sctp
    #[arg(long, default_value = "tcp")]
    pub protocol: String,
}

/// Everything that an answer is made of.
struct Facts {
    model: Model,
    plans: Plans,
    backend: BackendConfig,
    mode: Mode,
    differences: Vec<Difference>,
    /// What the kernel has for the Service in question.
    details: Vec<String>,
}

/// The answer, as text.
pub async fn explain(config: &ProxyConfig, question: &Question) -> anyhow::Result<String> {
    if let Ok(to) = question.what.parse::<SocketAddr>() {
        let facts = gather(config, None).await?;
        return explain_packet(&facts, to, question);
    }
    let Some((namespace, name)) = question.what.split_once('/') else {
        bail!("{:?} is neither NAMESPACE/SERVICE nor ADDRESS:PORT", question.what);
    };
    let service = ServiceKey::new(namespace, name);
    let facts = gather(config, Some(&service)).await?;
    let Some(plan) = facts.plans.get(&service) else {
        bail!(
            "there is no Service {service} that a proxy programs (headless and ExternalName Services, and those of other proxies, are not)"
        );
    };
    let verdicts = facts.model.explain_endpoints(&service);
    let mut answer = text::service(&service, plan, &facts.backend, &verdicts);
    answer += &text::kernel(facts.mode, &facts.differences, Some(&service));
    answer += &text::details(&facts.details);
    Ok(answer)
}

fn explain_packet(facts: &Facts, to: SocketAddr, question: &Question) -> anyhow::Result<String> {
    let text = question.protocol.to_uppercase();
    let protocol = Protocol::parse(Some(&text))
        .with_context(|| format!("--protocol: {:?} is not tcp, udp or sctp", question.protocol))?;
    let own = own_addresses().context("cannot list the node's addresses")?;
    let of_family = |address: &&IpAddr| address.is_ipv4() == to.is_ipv4();
    let source = match question.from {
        Some(source) => source,
        None if to.ip().is_loopback() => to.ip(),
        None => *own
            .iter()
            .filter(of_family)
            .find(|address| !address.is_loopback())
            .context("the node has no address of that family; give one with --from")?,
    };
    let interface = if own.contains(&source) { None } else { interface_towards(source)? };
    let packet = Packet { source, interface, destination: to.ip(), protocol, port: to.port() };
    let ground = Ground { config: &facts.backend, own: &own };
    let trace = trace(&facts.plans, ground, &packet);
    let mut answer = text::packet(&packet, &trace);
    answer += &text::kernel(facts.mode, &facts.differences, trace.service.as_ref());
    Ok(answer)
}

async fn gather(config: &ProxyConfig, service: Option<&ServiceKey>) -> anyhow::Result<Facts> {
    let client = run::client(config).await?;
    let services: Vec<Service> = list(&client, SERVICE_SELECTOR).await?;
    let slices: Vec<EndpointSlice> = list(&client, SLICE_SELECTOR).await?;
    // Both may be missing: a node that is not registered yet, an API server before 1.33.
    let node = Api::<Node>::all(client.clone()).get_opt(&config.node_name).await.unwrap_or(None);
    let cidrs: Vec<ServiceCidr> = list(&client, "").await.unwrap_or_default();
    let ranges = cidrs.iter().flat_map(|cidr| cidr.spec.cidrs.iter().flatten());
    let ranges = ranges.filter_map(|text| text.parse().ok()).collect();

    let mut model = Model::new(node::facts(config, node.as_ref()));
    services.iter().for_each(|service| model.apply_service(service));
    slices.iter().for_each(|slice| model.apply_slice(slice));
    let mut plans = Plans::new();
    let dirty: HashSet<ServiceKey> = model.take_dirty();
    advance(&mut plans, dirty, |key| model.plan(key));

    let running = running_mode(config.metrics_address).await;
    let modes = running.as_deref().and_then(Mode::candidates).unwrap_or(config.modes);
    let mode = switch::choose(modes, &config.ebpf)?;
    let mut backend = node::backend_config(config, node.as_ref(), ranges);
    if mode != Mode::Ebpf {
        backend.ebpf.forwarding = Forwarding::Snat;
    }
    let mut kernel = mode.open(backend.clone())?;
    let differences = kernel.verify(&plans)?;
    let plan = service.and_then(|service| plans.get(service));
    let details = plan.map(|plan| kernel.details(plan)).transpose()?.unwrap_or_default();
    Ok(Facts { model, plans, backend, mode, differences, details })
}

async fn list<K>(client: &Client, selector: &str) -> anyhow::Result<Vec<K>>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let api = Api::<K>::all(client.clone());
    let found = api.list(&ListParams::default().labels(selector)).await;
    Ok(found.with_context(|| format!("cannot list {}", K::plural(&())))?.items)
}

/// What the proxy that runs on this node says; nothing when none does.
async fn running_mode(address: Option<SocketAddr>) -> Option<String> {
    let address = address?;
    // Its answer may come from this very thread.
    let asked = tokio::task::spawn_blocking(move || server::ask(address, "/configz"));
    let config: Value = serde_json::from_str(&asked.await.ok()??).ok()?;
    Some(config.pointer("/kubeproxy.config.k8s.io/mode")?.as_str()?.to_owned())
}

fn own_addresses() -> anyhow::Result<Vec<IpAddr>> {
    let addresses = Rtnl::open()?.addresses(None)?;
    Ok(addresses.into_iter().map(|address| address.network.ip()).collect())
}

/// The interface that packets from an address come in through, if routing is symmetric.
fn interface_towards(address: IpAddr) -> anyhow::Result<Option<String>> {
    let mut rtnl = Rtnl::open()?;
    let Ok(Some(route)) = rtnl.route_to(address) else { return Ok(None) };
    let Some(index) = route.link else { return Ok(None) };
    Ok(rtnl.link(index)?.map(|link| link.name))
}

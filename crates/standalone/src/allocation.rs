//! ClusterIPs and NodePorts of Services.
//!
//! What is taken stands in the Services themselves; the sets here are rebuilt from them at start. A
//! reservation is given back when it is dropped before [`Reservation::keep`].

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;
use serde_json::{Value, json};

use crate::error::{ApiError, Cause};
use crate::kinds;

/// Where Services get their addresses and ports from.
#[derive(Debug, Clone)]
pub struct ServiceNetwork {
    /// IPv4 network of ClusterIPs.
    pub v4: Option<IpNetwork>,
    /// IPv6 network of ClusterIPs.
    pub v6: Option<IpNetwork>,
    /// Ports that NodePort Services may have.
    pub node_ports: RangeInclusive<u16>,
}

impl Default for ServiceNetwork {
    fn default() -> Self {
        let v4 = IpNetwork::new(Ipv4Addr::new(10, 96, 0, 0).into(), 16).ok();
        Self { v4, v6: None, node_ports: 30000..=32767 }
    }
}

impl ServiceNetwork {
    /// The networks by priority: the first is what a single-stack Service gets.
    fn families(&self) -> Vec<(&'static str, IpNetwork)> {
        let v4 = self.v4.map(|n| ("IPv4", n));
        v4.into_iter().chain(self.v6.map(|n| ("IPv6", n))).collect()
    }

    /// The first address of the first network: the API server's own Service.
    #[must_use]
    pub fn api_address(&self) -> Option<IpAddr> {
        self.families().first().and_then(|(_, network)| nth(*network, 1))
    }
}

/// Hands out addresses and ports, each once.
#[derive(Debug)]
pub(crate) struct Allocator {
    network: ServiceNetwork,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    addresses: BTreeSet<IpAddr>,
    /// Port and protocol.
    ports: BTreeSet<(u16, String)>,
}

/// Addresses and ports that a Service will have when it is stored.
#[must_use]
pub(crate) struct Reservation<'a> {
    allocator: &'a Allocator,
    /// Given back unless kept.
    fresh: Taken,
    /// Given back when kept: what the Service had before and has no more.
    left: Taken,
    kept: bool,
}

impl Allocator {
    pub(crate) fn new(network: ServiceNetwork) -> Self {
        Self { network, taken: Mutex::default() }
    }

    pub(crate) fn network(&self) -> &ServiceNetwork {
        &self.network
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        // Sets of plain values are whole at any moment.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what a stored Service has.
    pub(crate) fn restore(&self, service: &Value) {
        let has = held(service);
        let mut taken = self.lock();
        taken.addresses.extend(has.addresses);
        taken.ports.extend(has.ports);
    }

    /// Gives back what a deleted Service had.
    pub(crate) fn release(&self, service: &Value) {
        self.lock().remove(&held(service));
    }

    /// Completes `service` with addresses and ports. `old` is the Service that it replaces.
    pub(crate) fn reserve(
        &self,
        old: Option<&Value>,
        service: &mut Value,
    ) -> Result<Reservation<'_>, ApiError> {
        let before = old.map(held).unwrap_or_default();
        let mut reservation = Reservation {
            allocator: self,
            fresh: Taken::default(),
            left: Taken::default(),
            kept: false,
        };
        let mut causes = Vec::new();
        if service["spec"].is_object() {
            if service["spec"]["type"] == "ExternalName" {
                clear_addresses(service);
            } else {
                self.addresses(service, &before, &mut reservation.fresh, &mut causes);
            }
            self.ports(service, &before, &mut reservation.fresh, &mut causes);
        }
        if !causes.is_empty() {
            let name = service["metadata"]["name"].as_str().unwrap_or_default();
            return Err(ApiError::invalid(&kinds::SERVICE, name, &causes));
        }
        let now = held(service);
        reservation.left = Taken {
            addresses: before.addresses.difference(&now.addresses).copied().collect(),
            ports: before.ports.difference(&now.ports).cloned().collect(),
        };
        Ok(reservation)
    }

    fn addresses(
        &self,
        service: &mut Value,
        before: &Taken,
        fresh: &mut Taken,
        causes: &mut Vec<Cause>,
    ) {
        let spec = &mut service["spec"];
        let wanted = wanted_addresses(spec);
        let headless = wanted.first().is_some_and(|a| a == "None");
        let families = match self.pick_families(spec, &wanted, headless) {
            Ok(families) => families,
            Err(cause) => return causes.push(cause),
        };
        spec["ipFamilies"] = families.iter().map(|(family, _)| json!(family)).collect();
        if spec["ipFamilyPolicy"].as_str().is_none_or(str::is_empty) {
            let policy = if families.len() > 1 { "RequireDualStack" } else { "SingleStack" };
            spec["ipFamilyPolicy"] = policy.into();
        }
        if headless {
            spec["clusterIP"] = "None".into();
            spec["clusterIPs"] = json!(["None"]);
            return;
        }
        let mut list = Vec::new();
        for (index, (_, network)) in families.iter().enumerate() {
            let asked = wanted.get(index).map(String::as_str);
            match self.address(*network, asked, before, fresh) {
                Ok(address) => list.push(address.to_string()),
                Err(why) => {
                    let cause = Cause::invalid(
                        format!("spec.clusterIPs[{index}]"),
                        &json!([asked.unwrap_or_default()]),
                        &why,
                    );
                    causes.push(cause);
                }
            }
        }
        spec["clusterIP"] = list.first().cloned().unwrap_or_default().into();
        spec["clusterIPs"] = json!(list);
    }

    fn pick_families(
        &self,
        spec: &Value,
        wanted: &[String],
        headless: bool,
    ) -> Result<Vec<(&'static str, IpNetwork)>, Cause> {
        let have = self.network.families();
        let mut picked: Vec<(&'static str, IpNetwork)> = Vec::new();
        let mut pick = |name: &str, field: String| -> Result<(), Cause> {
            let found = have.iter().find(|(family, _)| *family == name);
            let found = found.ok_or_else(|| {
                Cause::invalid(field, &json!(name), "not configured on this cluster")
            })?;
            if !picked.contains(found) {
                picked.push(*found);
            }
            Ok(())
        };
        for (index, family) in spec["ipFamilies"].as_array().into_iter().flatten().enumerate() {
            pick(family.as_str().unwrap_or_default(), format!("spec.ipFamilies[{index}]"))?;
        }
        for (index, address) in wanted.iter().enumerate().filter(|_| !headless) {
            if let Ok(address) = address.parse::<IpAddr>() {
                let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
                pick(family, format!("spec.clusterIPs[{index}]"))?;
            }
        }
        let policy = spec["ipFamilyPolicy"].as_str().unwrap_or_default();
        if policy == "RequireDualStack" && have.len() < 2 {
            let text = "this cluster is not configured for dual-stack services";
            return Err(Cause::invalid("spec.ipFamilyPolicy", &json!(policy), text));
        }
        if picked.is_empty() {
            picked.extend(have.first());
        }
        if matches!(policy, "RequireDualStack" | "PreferDualStack") {
            for family in &have {
                if !picked.contains(family) {
                    picked.push(*family);
                }
            }
        } else if policy == "SingleStack" {
            picked.truncate(1);
        }
        Ok(picked)
    }

    fn address(
        &self,
        network: IpNetwork,
        asked: Option<&str>,
        before: &Taken,
        fresh: &mut Taken,
    ) -> Result<IpAddr, String> {
        let mut taken = self.lock();
        let address = match asked {
            Some(text) => {
                let address: IpAddr =
                    text.parse().map_err(|_| "must be a valid IP address".to_owned())?;
                if before.addresses.contains(&address) {
                    return Ok(address);
                }
                if !network.contains(address) {
                    return Err(format!(
                        "failed to allocate IP {address}: the provided IP ({address}) is not in the valid range. The range of valid IPs is {network}"
                    ));
                }
                if taken.addresses.contains(&address) {
                    return Err(format!(
                        "failed to allocate IP {address}: provided IP is already allocated"
                    ));
                }
                address
            }
            None => free_address(network, &taken.addresses).ok_or_else(|| {
                format!("failed to allocate a serviceIP: range {network} is full")
            })?,
        };
        taken.addresses.insert(address);
        fresh.addresses.insert(address);
        Ok(address)
    }

    fn ports(
        &self,
        service: &mut Value,
        before: &Taken,
        fresh: &mut Taken,
        causes: &mut Vec<Cause>,
    ) {
        let spec = &mut service["spec"];
        let balanced =
            spec["type"] == "LoadBalancer" && spec["allocateLoadBalancerNodePorts"] != false;
        let wants = spec["type"] == "NodePort" || balanced;
        let mut chosen: Vec<(u16, String)> = Vec::new();
        let ports = spec.get_mut("ports").and_then(Value::as_array_mut);
        for (index, port) in ports.into_iter().flatten().enumerate() {
            let protocol = port["protocol"].as_str().unwrap_or("TCP").to_owned();
            let asked = port["nodePort"].as_u64().unwrap_or(0);
            if asked == 0 && !wants {
                continue;
            }
            let asked = u16::try_from(asked).unwrap_or(u16::MAX);
            match self.port(asked, &protocol, before, fresh, &chosen) {
                Ok(number) => {
                    chosen.push((number, protocol));
                    port["nodePort"] = number.into();
                }
                Err(why) => {
                    let field = format!("spec.ports[{index}].nodePort");
                    causes.push(Cause::invalid(field, &json!(asked), &why));
                }
            }
        }
    }

    fn port(
        &self,
        asked: u16,
        protocol: &str,
        before: &Taken,
        fresh: &mut Taken,
        chosen: &[(u16, String)],
    ) -> Result<u16, String> {
        let range = &self.network.node_ports;
        let mut taken = self.lock();
        let place = |number: u16| (number, protocol.to_owned());
        let number = if asked == 0 {
            // One number for several protocols of a Service, as Kubernetes prefers it, is not sought.
            let start = *range.start();
            let count = u32::from(range.end() - start) + 1;
            let offset = uuid::Uuid::new_v4().as_fields().0 % count;
            (0..count)
                .filter_map(|i| u16::try_from((offset + i) % count).ok().map(|o| start + o))
                .find(|number| !taken.ports.iter().any(|(used, _)| used == number))
                .ok_or_else(|| "failed to allocate a nodePort: range is full".to_owned())?
        } else {
            if before.ports.contains(&place(asked)) {
                return Ok(asked);
            }
            if !range.contains(&asked) {
                return Err(format!(
                    "provided port is not in the valid range. The range of valid ports is {}-{}",
                    range.start(),
                    range.end()
                ));
            }
            if taken.ports.contains(&place(asked)) || chosen.contains(&place(asked)) {
                return Err("provided port is already allocated".to_owned());
            }
            asked
        };
        taken.ports.insert(place(number));
        fresh.ports.insert(place(number));
        Ok(number)
    }
}

impl Reservation<'_> {
    /// The Service is stored: it has what was reserved, and no more what it left.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let back = if self.kept { &self.left } else { &self.fresh };
        self.allocator.lock().remove(back);
    }
}

impl Taken {
    fn remove(&mut self, other: &Self) {
        self.addresses.retain(|address| !other.addresses.contains(address));
        self.ports.retain(|port| !other.ports.contains(port));
    }
}

fn held(service: &Value) -> Taken {
    let spec = &service["spec"];
    let addresses = wanted_addresses(spec).iter().filter_map(|a| a.parse().ok()).collect();
    let ports = spec["ports"].as_array().into_iter().flatten().filter_map(|port| {
        let number = port["nodePort"].as_u64().and_then(|n| u16::try_from(n).ok())?;
        (number != 0).then(|| (number, port["protocol"].as_str().unwrap_or("TCP").to_owned()))
    });
    Taken { addresses, ports: ports.collect() }
}

/// `clusterIPs`, or the older `clusterIP` alone.
fn wanted_addresses(spec: &Value) -> Vec<String> {
    let text = |v: &Value| v.as_str().filter(|s| !s.is_empty()).map(str::to_owned);
    let list: Vec<String> =
        spec["clusterIPs"].as_array().into_iter().flatten().filter_map(text).collect();
    if list.is_empty() { text(&spec["clusterIP"]).into_iter().collect() } else { list }
}

fn clear_addresses(service: &mut Value) {
    if let Some(spec) = service["spec"].as_object_mut() {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            spec.remove(field);
        }
    }
}

/// The `index`th address of a network.
fn nth(network: IpNetwork, index: u128) -> Option<IpAddr> {
    let address = match network.network() {
        IpAddr::V4(first) => {
            let number = u32::from(first).checked_add(u32::try_from(index).ok()?)?;
            IpAddr::V4(Ipv4Addr::from(number))
        }
        IpAddr::V6(first) => IpAddr::V6(Ipv6Addr::from(u128::from(first).checked_add(index)?)),
    };
    network.contains(address).then_some(address)
}

/// A free address: from a random place on. The first address is the network, the second the API
/// server's, the last an IPv4 network's broadcast address.
fn free_address(network: IpNetwork, taken: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let (bits, reserved_end) = match network {
        IpNetwork::V4(_) => (32 - u32::from(network.prefix()), 1),
        IpNetwork::V6(_) => (128 - u32::from(network.prefix()), 0),
    };
    // No more than a /16 of an IPv6 network is looked at; that is more than there are Services.
    let size = 1_u128 << bits.min(16);
    let usable = size.checked_sub(2 + reserved_end).filter(|n| *n > 0)?;
    let offset = u128::from(uuid::Uuid::new_v4().as_fields().0) % usable;
    (0..usable)
        .filter_map(|i| nth(network, 2 + (offset + i) % usable))
        .find(|address| !taken.contains(address))
}

#[cfg(test)]
mod tests;

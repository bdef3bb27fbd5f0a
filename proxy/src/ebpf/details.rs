//! What the maps say of a Service beside its plan: numbers, slots, and what was counted.

use super::EbpfConfig;
use super::counting::traffic;
use super::error::EbpfError;
use super::maps::Maps;
use super::numbering::{Before, NumberedPool, is_same_port};
use super::observed::Observed;
use super::programs::Programs;
use crate::backend::Traffic;
use crate::model::{Family, PortPlan, Scope, ServicePlan};

/// Endpoints of a pool that are shown.
const SHOWN: usize = 10;

/// In lines for people. Nothing where the mode is not in force.
pub(super) fn of(config: &EbpfConfig, plan: &ServicePlan) -> Result<Vec<String>, EbpfError> {
    let Ok(maps) = Maps::open(&Programs::maps_folder(&config.pins)) else { return Ok(Vec::new()) };
    let mut observed = Observed::read(&maps)?;
    let mut lines = Vec::new();
    for (index, port) in plan.ports.iter().enumerate() {
        let same: Vec<&PortPlan> =
            plan.ports.iter().filter(|other| is_same_port(other, port)).collect();
        let is_first = plan.ports.iter().position(|other| is_same_port(other, port)) == Some(index);
        if !is_first {
            continue;
        }
        let name = if port.name.is_empty() { "without a name" } else { &*port.name };
        let Some(number) = same.iter().find_map(|port| observed.number(port)) else {
            lines.push(format!("port {name}, {}: not there", port.protocol));
            continue;
        };
        let counted = traffic(maps.counters.get(&number)?);
        lines.push(format!("port {name}, {}: number {number}, {}", port.protocol, shown(counted)));
        for port in same {
            for scope in [Scope::Cluster, Scope::Local] {
                let pool = observed.pool(port, scope);
                lines.extend(pool.map(|pool| format!("  {}", pool_line(port, scope, &pool))));
            }
        }
    }
    Ok(lines)
}

fn shown(traffic: Traffic) -> String {
    let Traffic { connections, packets, bytes, refused } = traffic;
    format!(
        "{connections} connections and {refused} refused since it is there; {packets} packets of {bytes} bytes translated"
    )
}

fn pool_line(port: &PortPlan, scope: Scope, pool: &NumberedPool) -> String {
    let family = if port.family == Family::V4 { "IPv4" } else { "IPv6" };
    let which = match scope {
        Scope::Cluster => "all endpoints",
        Scope::Local => "those here",
    };
    let endpoints = port.pool(scope).len();
    if pool.slots.len() > endpoints && endpoints > 0 {
        let slots = pool.slots.len();
        return format!("{family}, {which}: pool {}, {slots} slots by the client", pool.number);
    }
    let slots = pool.slots.iter().enumerate().take(SHOWN);
    let slots: Vec<String> = slots.map(|(slot, to)| format!("{slot}: {to}")).collect();
    let more = match pool.slots.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let slots = if slots.is_empty() { "no slots".to_owned() } else { slots.join(", ") };
    format!("{family}, {which}: pool {}, {slots}{more}", pool.number)
}

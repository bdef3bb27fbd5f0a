//! A Service's plan as rules. Pure: the only text that goes to the kernel is made here and in `ruleset`.
//!
//! Rules are written exactly as `iptables-save` prints them, so that what is in force can be compared
//! with what is wanted by comparing text. Nothing in them comes from an object as it is, except its
//! name in a comment, and only if that consists of harmless characters.

use std::fmt::Write;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::names::{Chain, Leaf, MARK, MARK_OTHERS, PortName, REJECT, Table};
use crate::backend::PodSources;
use crate::model::{
    At, Endpoint, Family, Frontend, FrontendKey, Masquerade, PortPlan, Route, Scope, ServiceKey,
    ServicePlan, Target,
};

/// What stands in a chain that several Services share, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum LineKey {
    Frontend(FrontendKey),
    /// An address of a Service, whatever the port.
    Address(IpAddr),
}

/// All rules of a Service.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ServiceRules {
    /// Chains of its own.
    pub(crate) chains: Vec<(Chain, Vec<String>)>,
    /// Rules in shared chains.
    pub(crate) lines: Vec<(Leaf, LineKey, Vec<String>)>,
}

pub(crate) fn rules_of(
    service: &ServiceKey,
    plan: &ServicePlan,
    pods: &PodSources,
) -> ServiceRules {
    let mut rules = ServiceRules::default();
    for port in &plan.ports {
        let name = PortName::new(service, &port.name, port.protocol);
        PortRules { name, port, pods, rules: &mut rules }.all();
    }
    // After the address's frontends: connections to any other port are refused.
    rules.lines.extend(plan.guarded.iter().map(|address| {
        let line = format!("-d {} -j {REJECT}", IpNetwork::from(*address));
        (Leaf::of_address(Table::Filter, *address), LineKey::Address(*address), vec![line])
    }));
    rules.chains.sort_unstable();
    rules.chains.dedup_by(|a, b| a.0 == b.0);
    rules
}

struct PortRules<'a> {
    name: PortName,
    port: &'a PortPlan,
    pods: &'a PodSources,
    rules: &'a mut ServiceRules,
}

impl PortRules<'_> {
    fn all(&mut self) {
        for scope in [Scope::Cluster, Scope::Local] {
            if !self.port.pool(scope).is_empty() {
                let lines = self.pool(scope);
                self.push_chain(self.pool_name(scope), lines);
            }
        }
        for frontend in &self.port.frontends {
            let served = self.served(frontend);
            self.push_lines(Table::Nat, &frontend.key, served);
            let unserved = self.unserved(frontend);
            self.push_lines(Table::Filter, &frontend.key, unserved);
        }
    }

    fn push_chain(&mut self, name: String, lines: Vec<String>) {
        self.rules.chains.push((Chain::new(self.port.family, Table::Nat, name), lines));
    }

    fn push_lines(&mut self, table: Table, key: &FrontendKey, lines: Vec<String>) {
        if !lines.is_empty() {
            self.rules.lines.push((Leaf::of(table, key), LineKey::Frontend(*key), lines));
        }
    }

    fn pool_name(&self, scope: Scope) -> String {
        match scope {
            Scope::Cluster => self.name.cluster(),
            Scope::Local => self.name.local(),
        }
    }

    /// The chain that sends to one of the endpoints: no chain for each of them, since those are what
    /// makes `iptables-nft-restore` slow.
    fn pool(&self, scope: Scope) -> Vec<String> {
        let endpoints = self.port.pool(scope);
        let mut lines = Vec::with_capacity(endpoints.len() + 1);
        // Node ports mark before they come here; the address tells them apart.
        for frontend in &self.port.frontends {
            let unless_pod =
                Route::Same { target: Target::Forward(scope), masquerade: Masquerade::UnlessPod };
            if let (At::Address(address), true) = (frontend.key.at, frontend.route == unless_pod) {
                lines.push(format!("-d {} -j {MARK_OTHERS}", IpNetwork::from(address)));
            }
        }
        if let Some(seconds) = self.port.affinity_secs {
            lines.extend(endpoints.iter().map(|endpoint| self.stick(*endpoint, seconds)));
        }
        for (index, endpoint) in endpoints.iter().enumerate() {
            lines.push(self.choose(*endpoint, endpoints.len() - index));
        }
        lines
    }

    /// Sends a client where it was sent before, and remembers it anew.
    fn stick(&self, endpoint: Endpoint, seconds: u32) -> String {
        let (protocol, list) = (self.port.protocol, self.clients(endpoint));
        let to = endpoint;
        format!(
            "-p {protocol} -m recent --update --seconds {seconds} --reap {list} -j DNAT --to-destination {to}"
        )
    }

    /// Sends one of `left` clients to the endpoint.
    fn choose(&self, endpoint: Endpoint, left: usize) -> String {
        let mut line = format!("-p {}", self.port.protocol);
        if left > 1 {
            line += " -m statistic --mode random --probability ";
            line += &probability(left);
        }
        if self.port.affinity_secs.is_some() {
            line += " -m recent --set ";
            line += &self.clients(endpoint);
        }
        let _infallible = write!(line, " -j DNAT --to-destination {endpoint}");
        line
    }

    fn clients(&self, endpoint: Endpoint) -> String {
        let mask = match self.port.family {
            Family::V4 => "255.255.255.255",
            Family::V6 => "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        };
        format!("--name {} --mask {mask} --rsource", self.name.clients(endpoint))
    }

    /// Rules that lead from a frontend to its endpoints; none when there is nobody to lead to.
    fn served(&mut self, frontend: &Frontend) -> Vec<String> {
        let Some(mut to) = self.entry(frontend) else { return Vec::new() };
        if let Some(sources) = &frontend.sources {
            let allowed =
                sources.iter().map(|range| format!("{}-j {to}", source(*range))).collect();
            to = self.name.firewall(&frontend.key);
            self.push_chain(to.clone(), allowed);
        }
        let mut lines = Vec::new();
        if let (At::NodePort(_), Route::Same { masquerade: Masquerade::UnlessPod, .. }) =
            (frontend.key.at, frontend.route)
        {
            lines.push(self.frontend_rule("", &frontend.key, MARK_OTHERS));
        }
        lines.push(self.frontend_rule("", &frontend.key, &to));
        lines
    }

    /// The chain that a served frontend leads to.
    fn entry(&mut self, frontend: &Frontend) -> Option<String> {
        let forward = |target| match target {
            Target::Forward(scope) => Some(self.pool_name(scope)),
            Target::Reject | Target::Drop => None,
        };
        let (kind, lines) = match frontend.route {
            Route::Same { target, masquerade: Masquerade::Never | Masquerade::UnlessPod } => {
                return forward(target);
            }
            Route::Same { target, masquerade: Masquerade::Always } => {
                let pool = forward(target)?;
                let kind = if target == Target::Forward(Scope::Local) { "hide-local" } else { "" };
                (kind.to_owned(), vec![format!("-j {MARK}"), format!("-j {pool}")])
            }
            Route::BySource { inside, outside } => {
                let (inside_pool, outside_pool) = (forward(inside), forward(outside));
                if inside_pool.is_none() && outside_pool.is_none() {
                    return None;
                }
                (format!("{inside:?} {outside:?}"), self.by_source(inside_pool, outside_pool))
            }
        };
        let name = self.name.entry(&kind);
        self.push_chain(name.clone(), lines);
        Some(name)
    }

    /// externalTrafficPolicy Local: pods as they are and the node itself, masqueraded, take the short cut.
    fn by_source(&self, inside: Option<String>, outside: Option<String>) -> Vec<String> {
        let inside = inside.unwrap_or_else(|| "RETURN".to_owned());
        let mut lines: Vec<String> = pod_matches(self.pods, self.port.family)
            .into_iter()
            .map(|from_pod| format!("{from_pod} -j {inside}"))
            .collect();
        const FROM_NODE: &str = "-m addrtype --src-type LOCAL";
        if inside != "RETURN" {
            lines.push(format!("{FROM_NODE} -j {MARK}"));
        }
        lines.push(format!("{FROM_NODE} -j {inside}"));
        lines.extend(outside.map(|outside| format!("-j {outside}")));
        lines
    }

    /// Rules for packets to a frontend that no endpoint was chosen for.
    fn unserved(&self, frontend: &Frontend) -> Vec<String> {
        let verdict = |target| match target {
            Target::Forward(_) => None,
            Target::Reject => Some(REJECT),
            Target::Drop => Some("DROP"),
        };
        // Those that are forwarded do not come here, so one verdict does for the others. (The model
        // never has pods and others fail in different ways.)
        let rest = match frontend.route {
            Route::Same { target, .. } => verdict(target),
            Route::BySource { inside, outside } => verdict(outside).or(verdict(inside)),
        };
        let Some(sources) = &frontend.sources else {
            return rest.map(|to| self.frontend_rule("", &frontend.key, to)).into_iter().collect();
        };
        let mut lines = Vec::new();
        if let Some(to) = rest {
            let allowed = sources.iter();
            lines.extend(
                allowed.map(|range| self.frontend_rule(&source(*range), &frontend.key, to)),
            );
        }
        lines.push(self.frontend_rule("", &frontend.key, "DROP"));
        lines
    }

    fn frontend_rule(&self, source: &str, key: &FrontendKey, to: &str) -> String {
        let (protocol, port) = (key.protocol, key.port);
        let mut line = source.to_owned();
        if let At::Address(address) = key.at {
            let _infallible = write!(line, "-d {} ", IpNetwork::from(address));
        }
        let _infallible = write!(line, "-p {protocol}");
        if let Some(comment) = self.name.comment() {
            let _infallible = write!(line, " -m comment --comment \"{comment}\"");
        }
        let _infallible = write!(line, " -m {protocol} --dport {port} -j {to}");
        line
    }
}

/// One in `left`, as `iptables-save` prints it: the kernel keeps 31 bits.
fn probability(left: usize) -> String {
    const WHOLE: f64 = 2_147_483_648.0;
    #[expect(clippy::cast_precision_loss, reason = "a list of 2^52 endpoints does not exist")]
    let kept = (WHOLE / left as f64).round() / WHOLE;
    format!("{kept:.11}")
}

/// Matches a source range; nothing when all sources are in it.
pub(crate) fn source(range: IpNetwork) -> String {
    if range.prefix() == 0 { String::new() } else { format!("-s {} ", masked(range)) }
}

/// The range without the bits that mean nothing.
pub(crate) fn masked(range: IpNetwork) -> String {
    format!("{}/{}", range.network(), range.prefix())
}

/// What tells packets of pods from others: any of these.
pub(crate) fn pod_matches(pods: &PodSources, family: Family) -> Vec<String> {
    match pods {
        PodSources::Unknown => Vec::new(),
        PodSources::Ranges(ranges) => ranges
            .iter()
            .filter(|range| Family::of(range.ip()) == family && range.prefix() > 0)
            .map(|range| format!("-s {}", masked(*range)))
            .collect(),
        PodSources::Bridge(name) => vec![format!("-i {name}")],
        PodSources::InterfacePrefix(prefix) => vec![format!("-i {prefix}+")],
    }
}

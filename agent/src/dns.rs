//! What a pod's `/etc/resolv.conf`, `/etc/hosts` and hostname say. Pure.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use crate::pod::spec;

const MAX_SERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_CHARS: usize = 2048;
const MAX_HOSTNAME: usize = 63;
const MAX_FQDN: usize = 64;

/// A resolver configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    /// Option to value (may be empty), in order of appearance.
    pub options: Vec<(String, String)>,
}

/// What of the cluster's DNS a node knows.
#[derive(Debug, Clone, Copy)]
pub struct ClusterDns<'a> {
    pub servers: &'a [IpAddr],
    pub domain: &'a str,
}

impl Resolver {
    /// Reads a `resolv.conf`; lines that it does not know are left out.
    pub fn parse(text: &str) -> Self {
        let mut resolver = Self::default();
        for line in text.lines() {
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => resolver.servers.extend(words.next().map(str::to_owned)),
                // The last search line wins.
                Some("search" | "domain") => resolver.searches = words.map(str::to_owned).collect(),
                Some("options") => resolver.options = words.map(split_option).collect(),
                _ => {}
            }
        }
        resolver
    }

    /// The text of the file, cut to what resolvers accept.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for server in self.servers.iter().take(MAX_SERVERS) {
            text.push_str(&format!("nameserver {server}\n"));
        }
        let searches = self.bounded_searches();
        if !searches.is_empty() {
            text.push_str(&format!("search {}\n", searches.join(" ")));
        }
        let options: Vec<String> = self
            .options
            .iter()
            .map(|(name, value)| match value.is_empty() {
                true => name.clone(),
                false => format!("{name}:{value}"),
            })
            .collect();
        if !options.is_empty() {
            text.push_str(&format!("options {}\n", options.join(" ")));
        }
        text
    }

    fn bounded_searches(&self) -> Vec<&str> {
        let (mut kept, mut chars) = (Vec::new(), 0);
        for search in self.searches.iter().take(MAX_SEARCHES) {
            chars += search.len() + usize::from(!kept.is_empty());
            if chars > MAX_SEARCH_CHARS {
                break;
            }
            kept.push(search.as_str());
        }
        kept
    }
}

fn split_option(word: &str) -> (String, String) {
    let (name, value) = word.split_once(':').unwrap_or((word, ""));
    (name.to_owned(), value.to_owned())
}

/// A pod's resolver configuration by its `dnsPolicy`. `host` is the node's.
pub fn resolver(pod: &Pod, host: &Resolver, cluster: ClusterDns) -> Resolver {
    let policy = spec::spec(pod).and_then(|s| s.dns_policy.as_deref()).unwrap_or("ClusterFirst");
    let cluster_first = match policy {
        "ClusterFirstWithHostNet" => true,
        "ClusterFirst" => !spec::host_network(pod),
        _ => false,
    };
    let mut resolver = match policy {
        "None" => Resolver::default(),
        // Without cluster DNS a pod can do no better than its node.
        _ if cluster_first && !cluster.servers.is_empty() => cluster_resolver(pod, host, cluster),
        _ => host.clone(),
    };
    add_own(pod, &mut resolver);
    resolver
}

fn cluster_resolver(pod: &Pod, host: &Resolver, cluster: ClusterDns) -> Resolver {
    let (namespace, domain) = (spec::namespace(pod), cluster.domain.trim_matches('.'));
    let mut searches = Vec::new();
    if !domain.is_empty() {
        searches.push(format!("{namespace}.svc.{domain}"));
        searches.push(format!("svc.{domain}"));
        searches.push(domain.to_owned());
    }
    for search in &host.searches {
        if !searches.contains(search) {
            searches.push(search.clone());
        }
    }
    Resolver {
        servers: cluster.servers.iter().map(ToString::to_string).collect(),
        searches,
        options: vec![("ndots".into(), "5".into())],
    }
}

fn add_own(pod: &Pod, resolver: &mut Resolver) {
    let Some(own) = spec::spec(pod).and_then(|s| s.dns_config.as_ref()) else { return };
    for server in own.nameservers.iter().flatten() {
        if !resolver.servers.contains(server) {
            resolver.servers.push(server.clone());
        }
    }
    for search in own.searches.iter().flatten() {
        if !resolver.searches.contains(search) {
            resolver.searches.push(search.clone());
        }
    }
    for option in own.options.iter().flatten() {
        let Some(name) = option.name.clone() else { continue };
        let value = option.value.clone().unwrap_or_default();
        match resolver.options.iter_mut().find(|(known, _)| *known == name) {
            Some(known) => known.1 = value,
            None => resolver.options.push((name, value)),
        }
    }
}

/// A pod's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hostname {
    /// What `hostname` prints.
    pub hostname: String,
    /// `<hostname>.<subdomain>.<namespace>.svc.<domain>`, empty without a subdomain.
    pub fqdn: String,
}

/// A pod's hostname and, with a subdomain, its full name.
///
/// # Errors
/// When the pod wants its full name as hostname and that is longer than the kernel's 64 characters.
pub fn hostname(pod: &Pod, node_hostname: &str, domain: &str) -> Result<Hostname, String> {
    let spec = spec::spec(pod);
    if let Some(name) = spec.and_then(|s| s.hostname_override.as_deref()) {
        return Ok(Hostname { hostname: name.to_owned(), fqdn: String::new() });
    }
    if spec::host_network(pod) {
        return Ok(Hostname { hostname: node_hostname.to_owned(), fqdn: String::new() });
    }
    let own = spec.and_then(|s| s.hostname.as_deref()).filter(|h| !h.is_empty());
    let name = own.unwrap_or_else(|| spec::name(pod));
    let cut: String = name.chars().take(MAX_HOSTNAME).collect();
    let short = cut.trim_end_matches(['-', '.']).to_owned();
    let subdomain = spec.and_then(|s| s.subdomain.as_deref()).filter(|s| !s.is_empty());
    let fqdn = subdomain
        .map(|sub| format!("{short}.{sub}.{}.svc.{domain}", spec::namespace(pod)))
        .unwrap_or_default();
    let wants_fqdn = spec.and_then(|s| s.set_hostname_as_fqdn).unwrap_or(false);
    if !wants_fqdn || fqdn.is_empty() {
        return Ok(Hostname { hostname: short, fqdn });
    }
    if fqdn.len() > MAX_FQDN {
        return Err(format!(
            "setHostnameAsFQDN: {fqdn} has {} characters, the kernel allows {MAX_FQDN}; hint: shorten spec.hostname or spec.subdomain",
            fqdn.len()
        ));
    }
    Ok(Hostname { hostname: fqdn.clone(), fqdn })
}

/// The content of `/etc/hosts`. `host_file` is the node's, which a host-network pod gets.
pub fn hosts_file(pod: &Pod, names: &Hostname, ips: &[IpAddr], host_file: &str) -> String {
    let mut text = if spec::host_network(pod) {
        format!("# Kubernetes-managed hosts file (host network).\n{host_file}")
    } else {
        let mut text = String::from(
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
             fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
        );
        let short = names.hostname.split('.').next().unwrap_or_default();
        for ip in ips {
            match names.fqdn.is_empty() {
                true => text.push_str(&format!("{ip}\t{}\n", names.hostname)),
                false => text.push_str(&format!("{ip}\t{}\t{short}\n", names.fqdn)),
            }
        }
        text
    };
    text.push_str(&aliases(pod));
    text
}

fn aliases(pod: &Pod) -> String {
    let aliases = spec::spec(pod).and_then(|s| s.host_aliases.as_deref()).unwrap_or_default();
    if aliases.is_empty() {
        return String::new();
    }
    let lines: String = aliases
        .iter()
        .map(|a| format!("{}\t{}\n", a.ip, a.hostnames.clone().unwrap_or_default().join("\t")))
        .collect();
    format!("\n# Entries added by HostAliases.\n{lines}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": "web", "namespace": "shop" }, "spec": spec,
        }))
        .unwrap()
    }

    #[track_caller]
    fn check(spec: serde_json::Value, want: &str) {
        let mut spec = spec;
        spec["containers"] = json!([]);
        let host = Resolver::parse("nameserver 192.0.2.53\nsearch example.org\noptions rotate\n");
        let servers = [IpAddr::from([10, 96, 0, 10])];
        let cluster = ClusterDns { servers: &servers, domain: "cluster.local" };
        assert_eq!(resolver(&pod(spec), &host, cluster).render(), want);
    }

    #[test]
    fn policies() {
        let cluster = "nameserver 10.96.0.10\nsearch shop.svc.cluster.local svc.cluster.local cluster.local example.org\noptions ndots:5\n";
        let host = "nameserver 192.0.2.53\nsearch example.org\noptions rotate\n";
        check(json!({}), cluster);
        check(json!({ "dnsPolicy": "Default" }), host);
        check(json!({ "hostNetwork": true }), host);
        check(json!({ "hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet" }), cluster);
        check(
            json!({ "dnsPolicy": "None", "dnsConfig": {
                "nameservers": ["9.9.9.9"], "searches": ["a.b"],
                "options": [{ "name": "ndots", "value": "2" }, { "name": "edns0" }] } }),
            "nameserver 9.9.9.9\nsearch a.b\noptions ndots:2 edns0\n",
        );
    }

    #[test]
    fn names_and_hosts() {
        let pod = pod(json!({
            "containers": [], "hostname": "h", "subdomain": "sub",
            "hostAliases": [{ "ip": "1.2.3.4", "hostnames": ["foo", "bar"] }],
        }));
        let names = hostname(&pod, "node", "cluster.local").unwrap();
        assert_eq!(names.hostname, "h");
        let text = hosts_file(&pod, &names, &[IpAddr::from([10, 1, 0, 2])], "");
        assert!(text.contains("10.1.0.2\th.sub.shop.svc.cluster.local\th\n"), "{text}");
        assert!(text.ends_with("# Entries added by HostAliases.\n1.2.3.4\tfoo\tbar\n"), "{text}");
    }

    #[test]
    fn long_names_are_cut_or_refused() {
        let mut long = pod(json!({ "containers": [] }));
        long.metadata.name = Some(format!("{}-x", "a".repeat(62)));
        assert_eq!(hostname(&long, "n", "d").unwrap().hostname, "a".repeat(62));
        let spec = long.spec.as_mut().unwrap();
        spec.subdomain = Some("sub".into());
        spec.set_hostname_as_fqdn = Some(true);
        assert!(hostname(&long, "n", "cluster.local").unwrap_err().contains("64"));
    }
}

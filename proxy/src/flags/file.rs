//! KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1).

use anyhow::{Context, bail};
use serde_json::Value;

use super::Flags;
use super::conntrack::ConntrackFlags;
use super::ipvs::IpvsFlags;

/// What a file said, in the form of flags, and what in it has no effect.
pub(crate) struct Found {
    pub(crate) flags: Flags,
    pub(crate) warnings: Vec<String>,
}

/// Top-level fields that Kubernetes knows and this program does not use (or only in part).
const WITHOUT_EFFECT: [&str; 18] = [
    "conntrack",
    "bindAddressHardFail",
    "clientConnection",
    "configSyncPeriod",
    "detectLocal",
    "enableProfiling",
    "featureGates",
    "iptables",
    "ipvs",
    "logging",
    "nftables",
    "oomScoreAdj",
    "portRange",
    "showHiddenMetricsForVersion",
    "udpIdleTimeout",
    "windowsRunAsService",
    "winkernel",
    "minSyncPeriod",
];

pub(crate) fn read(text: &str) -> anyhow::Result<Found> {
    let mut fields: Value = serde_saphyr::from_str(text).context("not a YAML document")?;
    let kind = fields.get("kind").and_then(Value::as_str).unwrap_or_default();
    if kind != "KubeProxyConfiguration" {
        bail!("kind: {kind:?} is not KubeProxyConfiguration");
    }
    let mut file = File { fields: &mut fields };
    file.skip(&["kind"]);
    file.skip(&["apiVersion"]);
    let flags = file.flags()?;
    let warnings = leftovers(&fields);
    Ok(Found { flags, warnings })
}

/// Takes fields out, so that what is left over is what nobody asked for.
struct File<'a> {
    fields: &'a mut Value,
}

impl File<'_> {
    fn take(&mut self, path: &[&str]) -> Option<Value> {
        let (last, parents) = path.split_last()?;
        let mut at = &mut *self.fields;
        for name in parents {
            at = at.get_mut(name)?;
        }
        at.as_object_mut()?.remove(*last).filter(|value| !value.is_null())
    }

    fn skip(&mut self, path: &[&str]) {
        drop(self.take(path));
    }

    fn typed<T: serde::de::DeserializeOwned>(
        &mut self,
        path: &[&str],
    ) -> anyhow::Result<Option<T>> {
        let name = path.join(".");
        self.take(path)
            .map(|value| {
                let shown = value.to_string();
                serde_json::from_value(value)
                    .with_context(|| format!("{name}: {shown} has the wrong type"))
            })
            .transpose()
    }

    fn text(&mut self, path: &[&str]) -> anyhow::Result<Option<String>> {
        Ok(self.typed::<String>(path)?.filter(|text| !text.is_empty()))
    }

    fn conntrack(&mut self) -> anyhow::Result<ConntrackFlags> {
        let mut timeout = |name: &str| self.text(&["conntrack", name]);
        Ok(ConntrackFlags {
            conntrack_tcp_timeout_established: timeout("tcpEstablishedTimeout")?,
            conntrack_tcp_timeout_close_wait: timeout("tcpCloseWaitTimeout")?,
            conntrack_udp_timeout: timeout("udpTimeout")?,
            conntrack_udp_timeout_stream: timeout("udpStreamTimeout")?,
            conntrack_max_per_core: self.typed(&["conntrack", "maxPerCore"])?,
            conntrack_min: self.typed(&["conntrack", "min"])?,
            conntrack_tcp_be_liberal: self.typed(&["conntrack", "tcpBeLiberal"])?,
        })
    }

    /// Two of the fields mean nothing here and need no warning: changes are put in force at once.
    fn ipvs(&mut self) -> anyhow::Result<IpvsFlags> {
        for name in ["syncPeriod", "minSyncPeriod"] {
            self.skip(&["ipvs", name]);
        }
        Ok(IpvsFlags {
            ipvs_scheduler: self.text(&["ipvs", "scheduler"])?,
            ipvs_exclude_cidrs: self.typed(&["ipvs", "excludeCIDRs"])?.unwrap_or_default(),
            ipvs_strict_arp: self.typed(&["ipvs", "strictARP"])?,
            ipvs_tcp_timeout: self.text(&["ipvs", "tcpTimeout"])?,
            ipvs_tcpfin_timeout: self.text(&["ipvs", "tcpFinTimeout"])?,
            ipvs_udp_timeout: self.text(&["ipvs", "udpTimeout"])?,
            ..IpvsFlags::default()
        })
    }

    fn flags(&mut self) -> anyhow::Result<Flags> {
        let nftables_all = self.typed(&["nftables", "masqueradeAll"])?;
        let nftables_bit = self.typed(&["nftables", "masqueradeBit"])?;
        let iptables_all: Option<bool> = self.typed(&["iptables", "masqueradeAll"])?;
        let iptables_bit: Option<u8> = self.typed(&["iptables", "masqueradeBit"])?;
        let cidrs = self.text(&["clusterCIDR"])?.unwrap_or_default();
        let (conntrack, ipvs) = (self.conntrack()?, self.ipvs()?);
        Ok(Flags {
            kubeconfig: self.text(&["clientConnection", "kubeconfig"])?.map(Into::into),
            hostname_override: self.text(&["hostnameOverride"])?,
            proxy_mode: self.text(&["mode"])?,
            cluster_cidr: cidrs.split(',').map(str::to_owned).collect(),
            detect_local_mode: self.text(&["detectLocalMode"])?,
            pod_bridge_interface: self.text(&["detectLocal", "bridgeInterface"])?,
            pod_interface_name_prefix: self.text(&["detectLocal", "interfaceNamePrefix"])?,
            iptables_localhost_nodeports: self.typed(&["iptables", "localhostNodePorts"])?,
            masquerade_all: nftables_all.or(iptables_all.filter(|all| *all)),
            iptables_masquerade_bit: nftables_bit.or(iptables_bit),
            nodeport_addresses: self.typed(&["nodePortAddresses"])?.unwrap_or_default(),
            healthz_bind_address: self.text(&["healthzBindAddress"])?,
            metrics_bind_address: self.text(&["metricsBindAddress"])?,
            bind_address: self.typed(&["bindAddress"])?,
            conntrack,
            ipvs,
            ..Flags::default()
        })
    }
}

fn leftovers(fields: &Value) -> Vec<String> {
    let mut warnings = Vec::new();
    for (name, value) in fields.as_object().into_iter().flatten() {
        if is_empty(value) {
            continue;
        }
        if !WITHOUT_EFFECT.contains(&name.as_str()) {
            warnings.push(format!("{name} is not a field of KubeProxyConfiguration"));
            continue;
        }
        match value.as_object() {
            Some(parts) => {
                let set = parts.iter().filter(|(_, value)| !is_empty(value));
                warnings.extend(
                    set.map(|(part, _)| format!("{name}.{part} has no effect in keelson-proxy")),
                );
            }
            None => warnings.push(format!("{name} has no effect in keelson-proxy")),
        }
    }
    warnings
}

/// What Kubernetes writes where nobody set anything.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() || text == "0s",
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gives_flags_and_names_what_has_no_effect() {
        let found = read(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\n\
             kind: KubeProxyConfiguration\n\
             mode: nftables\n\
             clusterCIDR: 10.0.0.0/8,fd00::/8\n\
             clientConnection: {kubeconfig: /k, qps: 5}\n\
             conntrack: {min: null, maxPerCore: 3, tcpEstablishedTimeout: 1h0m0s, colour: 1}\n\
             nftables: {masqueradeAll: true, masqueradeBit: 7, syncPeriod: 0s}\n\
             ipvs: {scheduler: lc, strictARP: true, excludeCIDRs: [192.0.2.0/24], tcpTimeout: 5m0s, syncPeriod: 30s, colour: 2}\n\
             nodePortAddresses: [primary]\n\
             colour: blue\n",
        )
        .unwrap();
        assert_eq!(found.flags.cluster_cidr, ["10.0.0.0/8", "fd00::/8"]);
        assert_eq!(found.flags.conntrack.conntrack_max_per_core, Some(3));
        assert_eq!(found.flags.masquerade_all, Some(true));
        assert_eq!(found.flags.iptables_masquerade_bit, Some(7));
        assert_eq!(found.flags.nodeport_addresses, ["primary"]);
        let ipvs = found.flags.ipvs.config().unwrap();
        assert_eq!((&*ipvs.scheduler, ipvs.strict_arp, ipvs.tcp_timeout), ("lc", true, 300));
        assert_eq!(ipvs.excluded.len(), 1);
        let mut warnings = found.warnings;
        warnings.sort();
        assert_eq!(
            warnings,
            [
                "clientConnection.qps has no effect in keelson-proxy",
                "colour is not a field of KubeProxyConfiguration",
                "conntrack.colour has no effect in keelson-proxy",
                "ipvs.colour has no effect in keelson-proxy",
            ]
        );
    }

    #[test]
    fn a_wrong_type_names_the_field() {
        let Err(error) = read("kind: KubeProxyConfiguration\nclusterCIDR: [1]\n") else {
            panic!("accepted")
        };
        assert!(format!("{error:#}").contains("clusterCIDR: [1] has the wrong type"));
    }
}

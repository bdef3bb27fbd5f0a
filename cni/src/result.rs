//! What ADD answers, in the shapes of the different specification versions.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::version::Version;

/// An interface that a plugin made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Its largest packet (since 1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The namespace that it lives in; empty for the node's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
}

/// An address that a plugin assigned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpConfig {
    /// Address and prefix.
    pub address: IpNetwork,
    /// The default gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Position in `interfaces`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

/// A route in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteConfig {
    /// Where to.
    pub dst: IpNetwork,
    /// Next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
}

/// DNS settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search list.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// What ADD answers. Unknown fields of newer versions are ignored here; who passes a result on keeps the raw JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddResult {
    /// Interfaces made.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    /// Addresses assigned.
    #[serde(default)]
    pub ips: Vec<IpConfig>,
    /// Routes set.
    #[serde(default)]
    pub routes: Vec<RouteConfig>,
    /// DNS settings.
    #[serde(default)]
    pub dns: Dns,
}

impl AddResult {
    /// The JSON in the shape of `version`.
    #[must_use]
    pub fn to_json(&self, version: Version) -> Value {
        let interfaces: Vec<Value> =
            self.interfaces.iter().map(|i| interface(i, version)).collect();
        let ips: Vec<Value> = self.ips.iter().map(|ip| address(ip, version)).collect();
        let mut result = json!({
            "cniVersion": version.as_str(),
            "interfaces": interfaces,
            "ips": ips,
            "dns": self.dns,
        });
        if !self.routes.is_empty() {
            result["routes"] = json!(self.routes);
        }
        result
    }

    /// The addresses on interfaces inside the container (or on none in particular).
    #[must_use]
    pub fn container_ips(&self) -> Vec<IpAddr> {
        let inside = |ip: &&IpConfig| match ip.interface.and_then(|i| self.interfaces.get(i)) {
            Some(interface) => !interface.sandbox.is_empty(),
            None => true,
        };
        self.ips.iter().filter(inside).map(|ip| ip.address.ip()).collect()
    }
}

fn interface(interface: &Interface, version: Version) -> Value {
    let mtu = interface.mtu.filter(|_| version >= Version::V1_1_0);
    json!(Interface { mtu, ..interface.clone() })
}

fn address(ip: &IpConfig, version: Version) -> Value {
    let mut value = json!(ip);
    if version < Version::V1_0_0 {
        value["version"] = json!(if ip.address.is_ipv4() { "4" } else { "6" });
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> AddResult {
        AddResult {
            interfaces: vec![Interface {
                name: "eth0".into(),
                mac: "02:00:00:00:00:01".into(),
                mtu: Some(1450),
                sandbox: "/run/netns/a".into(),
            }],
            ips: vec![IpConfig {
                address: "10.66.0.2/32".parse().unwrap(),
                gateway: Some("169.254.1.1".parse().unwrap()),
                interface: Some(0),
            }],
            routes: vec![RouteConfig { dst: "0.0.0.0/0".parse().unwrap(), gw: None }],
            dns: Dns::default(),
        }
    }

    #[track_caller]
    fn check(version: Version, want: &expect_test::Expect) {
        want.assert_eq(&sample().to_json(version).to_string());
    }

    #[test]
    fn each_version_has_its_own_shape() {
        check(
            Version::V0_3_1,
            &expect_test::expect![[
                r#"{"cniVersion":"0.3.1","dns":{},"interfaces":[{"mac":"02:00:00:00:00:01","name":"eth0","sandbox":"/run/netns/a"}],"ips":[{"address":"10.66.0.2/32","gateway":"169.254.1.1","interface":0,"version":"4"}],"routes":[{"dst":"0.0.0.0/0"}]}"#
            ]],
        );
        check(
            Version::V1_0_0,
            &expect_test::expect![[
                r#"{"cniVersion":"1.0.0","dns":{},"interfaces":[{"mac":"02:00:00:00:00:01","name":"eth0","sandbox":"/run/netns/a"}],"ips":[{"address":"10.66.0.2/32","gateway":"169.254.1.1","interface":0}],"routes":[{"dst":"0.0.0.0/0"}]}"#
            ]],
        );
        check(
            Version::V1_1_0,
            &expect_test::expect![[
                r#"{"cniVersion":"1.1.0","dns":{},"interfaces":[{"mac":"02:00:00:00:00:01","mtu":1450,"name":"eth0","sandbox":"/run/netns/a"}],"ips":[{"address":"10.66.0.2/32","gateway":"169.254.1.1","interface":0}],"routes":[{"dst":"0.0.0.0/0"}]}"#
            ]],
        );
    }

    #[test]
    fn every_shape_is_read_back() {
        for version in Version::ALL {
            let read: AddResult = serde_json::from_value(sample().to_json(version)).unwrap();
            assert_eq!(read.container_ips(), ["10.66.0.2".parse::<IpAddr>().unwrap()]);
        }
    }
}

//! Services and EndpointSlices without pods behind them.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;

use anyhow::Result;
use kube::Client;
use serde_json::{Value, json};

use crate::api::{self, NewObject};
use crate::cluster::NODE_ADDRESS;
use crate::subject::node::NODE_NAME;

pub(crate) const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";

/// What the probe asks for.
pub(super) const PORT: u16 = 80;

/// Of the endpoints where nobody answers.
const NOBODYS_PORT: u16 = 8080;

/// Requests on their way at the same time.
const AT_ONCE: usize = 32;

/// The address of Service `index`: explicit, so that it can be asked before the API server has answered.
pub(super) fn cluster_ip(index: u32) -> IpAddr {
    let [_, _, high, low] = (0x100 + index).to_be_bytes();
    Ipv4Addr::new(10, 96, high, low).into()
}

/// The address of new Service `index`, far from those of the many.
pub(super) fn marker_ip(index: u32) -> IpAddr {
    let [_, _, high, low] = (0xf000 + index).to_be_bytes();
    Ipv4Addr::new(10, 96, high, low).into()
}

/// The address of endpoint `number` of Service `index`; nobody answers there.
fn endpoint_ip(index: u32, number: u32) -> IpAddr {
    let [_, high, middle, low] = (index * 101 + number + 1).to_be_bytes();
    Ipv4Addr::new(11, high, middle, low).into()
}

/// The node that a proxy looks for; kube-proxy waits half a minute for one.
pub(crate) fn node() -> NewObject {
    let body = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": NODE_NAME },
        "status": { "addresses": [{ "type": "InternalIP", "address": NODE_ADDRESS }] },
    });
    NewObject { collection: "/api/v1/nodes", body }
}

/// Creates the Services of `range` with their endpoints.
///
/// # Errors
/// When the API server refuses one.
pub(crate) async fn add(client: &Client, range: Range<u32>, endpoints: u32) -> Result<()> {
    let objects = range.flat_map(|index| {
        let name = many(index);
        let slice = slice(&name, &nobody(index, endpoints), &[http(NOBODYS_PORT)]);
        [slice, service(&name, cluster_ip(index))]
    });
    api::create_all(client, objects, AT_ONCE).await
}

/// Leads Service `index` of those that [`add`] made to `backend` alone, or back to where nobody answers.
///
/// # Errors
/// When the API server refuses.
pub(super) async fn turn(
    client: &Client,
    index: u32,
    backend: Option<(IpAddr, u16)>,
    endpoints: u32,
) -> Result<()> {
    let (addresses, port) = match backend {
        Some((address, port)) => (vec![address], port),
        None => (nobody(index, endpoints), NOBODYS_PORT),
    };
    let name = many(index);
    let NewObject { body, .. } = slice(&name, &addresses, &[http(port)]);
    let change = json!({ "endpoints": body["endpoints"], "ports": body["ports"] });
    api::patch(client, SLICES, &name, &change).await
}

fn many(index: u32) -> String {
    format!("many-{index}")
}

fn nobody(index: u32, endpoints: u32) -> Vec<IpAddr> {
    (0..endpoints).map(|number| endpoint_ip(index, number)).collect()
}

/// A Service to be created last, whose only endpoint is `backend`: its slice and itself.
pub(super) fn marker(name: &str, index: u32, backend: (IpAddr, u16)) -> [NewObject; 2] {
    [slice(name, &[backend.0], &[http(backend.1)]), service(name, marker_ip(index))]
}

/// Deletes what [`marker`] made.
///
/// # Errors
/// When the API server refuses.
pub(super) async fn delete(client: &Client, name: &str) -> Result<()> {
    api::delete(client, SERVICES, name).await?;
    api::delete(client, SLICES, name).await
}

fn service(name: &str, address: IpAddr) -> NewObject {
    let body = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name },
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address],
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            // Without a selector no controller touches its slices.
            "ports": [{ "name": "http", "protocol": "TCP", "port": PORT, "targetPort": 8080 }],
        },
    });
    NewObject { collection: SERVICES, body }
}

fn http(port: u16) -> Value {
    json!({ "name": "http", "protocol": "TCP", "port": port })
}

/// The only slice of a Service, whose addresses are all ready.
pub(crate) fn slice(service: &str, addresses: &[IpAddr], ports: &[Value]) -> NewObject {
    let endpoint =
        |address: &IpAddr| json!({ "addresses": [address], "conditions": { "ready": true } });
    let body = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": service,
            "labels": {
                "kubernetes.io/service-name": service,
                "endpointslice.kubernetes.io/managed-by": "keelson-bench",
            },
        },
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": addresses.iter().map(endpoint).collect::<Vec<_>>(),
    });
    NewObject { collection: SLICES, body }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_services_share_an_address_nor_two_endpoints() {
        let many = (0..10_000).map(cluster_ip);
        let services: BTreeSet<IpAddr> = many.chain((0..200).map(marker_ip)).collect();
        assert_eq!(services.len(), 10_200);
        let endpoints: BTreeSet<IpAddr> =
            (0..10_000).flat_map(|i| (0..10).map(move |n| endpoint_ip(i, n))).collect();
        assert_eq!(endpoints.len(), 100_000);
    }
}

//! The Service that is measured: the same in all worlds, with a server pod of its own in each.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde_json::{Value, json};

use crate::api::NewObject;
use crate::services::{SERVICES, slice};

pub(super) const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 244, 0, 2));
/// Where the server pod listens for the Service, with TCP and with UDP.
const SERVER_PORT: u16 = 8080;
/// And for who comes directly: with the same port they would meet clients of the Service in connection tracking.
const DIRECT_PORT: u16 = 8081;
const CLUSTER_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 250, 1));
const PORT: u16 = 80;
const NODE_PORT: u16 = 30080;

/// Its ClusterIP.
pub(super) fn service() -> SocketAddr {
    SocketAddr::new(CLUSTER_IP, PORT)
}

/// The server itself.
pub(super) fn direct() -> SocketAddr {
    SocketAddr::new(SERVER, DIRECT_PORT)
}

/// Where the server listens.
pub(super) fn listening() -> [SocketAddr; 2] {
    [SERVER_PORT, DIRECT_PORT].map(|port| SocketAddr::new(SERVER, port))
}

/// Its node port at that node.
pub(super) fn node_port(node: Ipv4Addr) -> SocketAddr {
    (node, NODE_PORT).into()
}

/// The last one by name, too: that is the order in which some put Services in force.
pub(super) fn measured() -> [NewObject; 2] {
    const NAME: &str = "zz-measured";
    let targets =
        ports(|name, protocol| json!({ "name": name, "protocol": protocol, "port": SERVER_PORT }));
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": NAME },
        "spec": {
            "type": "NodePort", "clusterIP": CLUSTER_IP, "clusterIPs": [CLUSTER_IP],
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "ports": ports(|name, protocol| json!({
                "name": name, "protocol": protocol, "port": PORT, "targetPort": SERVER_PORT,
                "nodePort": NODE_PORT,
            })),
        },
    });
    [slice(NAME, &[SERVER], &targets), NewObject { collection: SERVICES, body: service }]
}

fn ports(port: impl Fn(&str, &str) -> Value) -> Vec<Value> {
    vec![port("stream", "TCP"), port("datagram", "UDP")]
}

//! What the rows play on: a node with pods and an outside host, each in a network namespace of its own
//! that vanishes with the process.
#![allow(dead_code, reason = "not every part is used in every version of the suite")]

pub(crate) mod api;
mod damage;
pub(crate) mod ebpf;
mod namespace;
mod node;
mod objects;
mod pod;
mod wire;

pub(crate) use crate::harness::{rows, silence, skip};
pub(crate) use damage::damages;
pub(crate) use keelson_proxy::backend::{BackendConfig, Mode, PodSources};
pub(crate) use namespace::Namespace;
pub(crate) use node::{NODE4, NODE6, Node, OUTSIDE4, OUTSIDE6};
pub(crate) use objects::{cluster_ip, node_port, servers, slice, with};
pub(crate) use pod::{Answer, Outcome, Pod, Server, udp_exchange};

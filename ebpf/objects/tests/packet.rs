//! The packet programs in the kernel, with packets made by hand (`BPF_PROG_TEST_RUN`) and with those of sockets in
//! network namespaces of the tests' own. Needs root.
#![allow(clippy::unwrap_used, reason = "a test ends where something that it needs does not hold")]

#[path = "packet/bytes.rs"]
mod bytes;
#[path = "packet/direct.rs"]
mod direct;
#[path = "packet/errors.rs"]
mod errors;
#[path = "packet/fragments.rs"]
mod fragments;
#[path = "packet/hashed.rs"]
mod hashed;
#[path = "packet/hostile.rs"]
mod hostile;
#[path = "packet/kernel.rs"]
mod kernel;
#[path = "packet/masquerade.rs"]
mod masquerade;
#[path = "packet/model.rs"]
mod model;
#[path = "packet/monitor.rs"]
mod monitor;
#[path = "packet/network.rs"]
mod network;
#[path = "packet/node.rs"]
mod node;
#[path = "packet/refusal.rs"]
mod refusal;
#[path = "packet/speed.rs"]
mod speed;
#[path = "packet/states.rs"]
mod states;
#[path = "packet/transfer.rs"]
mod transfer;
#[path = "packet/translation.rs"]
mod translation;
#[path = "packet/tunnel.rs"]
mod tunnel;

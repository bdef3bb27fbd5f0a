//! The kubelet's HTTPS API.

pub mod containers;
pub mod exec;
pub mod remote;
pub mod spdy;
pub mod websocket;

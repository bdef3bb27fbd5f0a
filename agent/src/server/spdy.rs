//! SPDY/3.1, as far as `kubectl exec`, `attach` and `port-forward` speak it.
//!
//! [`frame`] turns bytes into frames and back, [`session`] keeps the rules of streams; both are pure
//! and take any input without panic. [`connection`] connects a session to a socket and hands out
//! streams. Flow control windows are left out on purpose: no Kubernetes client or server
//! keeps any, so data that a stream's reader does not take holds the connection back instead.

pub mod connection;
pub mod frame;
mod headers;
pub mod session;

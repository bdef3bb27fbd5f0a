//! keelson's pod network interface: the CNI plugin, and the runtime's side of CNI.
//!
//! | module | what |
//! |---|---|
//! | [`conflist`], [`invoke`] | the runtime's side: read a configuration folder, run a list's plugins |
//! | [`protocol`], [`version`], [`result`], [`error`] | the words that both sides speak |
#![warn(missing_docs)]

pub mod conflist;
pub mod error;
pub mod invoke;
pub mod protocol;
pub mod result;
pub mod version;

pub use conflist::default_conflist;

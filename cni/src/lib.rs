//! keelson's pod network interface: the CNI plugin, and the runtime's side of CNI.
//!
//! | module | what |
//! |---|---|
//! | [`conflist`], [`invoke`] | the runtime's side: read a configuration folder, run a list's plugins |
//! | [`plugin`] | the plugin's verbs; `wire` makes links, `ledger` and `journal` keep addresses, `firewall` translates them, `source_guard` keeps pods to them |
//! | [`protocol`], [`version`], [`result`], [`error`] | the words that both sides speak |
#![warn(missing_docs)]

pub mod config;
pub mod conflist;
pub mod error;
pub mod firewall;
#[doc(hidden)]
pub mod fuzzing;
pub mod hostport;
pub mod invoke;
pub mod journal;
pub mod ledger;
pub mod names;
pub mod plugin;
pub mod protocol;
pub mod result;
pub mod source_guard;
pub mod version;
pub mod wire;

pub use conflist::default_conflist;

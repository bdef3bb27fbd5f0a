//! keelson's node agent: runs the pods of one node through containerd.

pub mod agent;
pub mod cgroup;
pub mod command;
pub mod config;
pub mod dns;
pub mod env;
pub mod events;
#[doc(hidden)]
pub mod fuzzing;
pub mod image;
pub mod logd;
pub mod memory;
pub mod node;
mod pidfd;
pub mod pod;
pub mod runtime;
pub mod server;
pub mod up;
pub mod volume;

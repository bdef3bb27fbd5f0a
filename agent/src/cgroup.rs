//! cgroups of pods: which values follow from requests and limits, and the tree that holds them.

pub mod resources;
pub mod tree;

pub use resources::{QosClass, qos_class};
pub use tree::{CgroupError, CgroupTree};

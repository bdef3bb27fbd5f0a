//! What the tests and the tasks share: a node to try things on, a kube-apiserver, images made from local files, a check for leaks.

pub mod apiserver;
pub mod image;
pub mod leak;
pub mod netns;
pub mod node;
pub mod probe;
pub mod registry;

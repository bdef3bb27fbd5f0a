//! keelson's embedded control plane: a Kubernetes API server over one file, for one machine.
#![warn(missing_docs)]

mod allocation;
mod apply;
mod auth;
mod control_plane;
pub mod controllers;
mod decode;
mod defaults;
mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod kinds;
mod object;
mod quantity;
mod registry;
mod scheduler;
mod selectors;
mod server;
mod store;
mod strategic;
mod validation;

pub use control_plane::{ControlPlane, StandaloneConfig, start};
pub use error::{ApiError, Cause};
pub use object::Object;
pub use registry::{
    Api, DeleteOptions, PatchType, Preconditions, Propagation, Registry, ServiceNetwork,
    TypedEvent, TypedWatch,
};
pub use selectors::Selector;
pub use store::{Event, EventType, StoreError, Watch};

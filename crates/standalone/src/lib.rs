//! keelson's embedded control plane: a Kubernetes API server over one file, for one machine.
#![warn(missing_docs)]

pub mod controllers;
mod decode;
mod error;
pub mod kinds;
mod object;
mod registry;
mod scheduler;
mod selectors;
mod store;

pub use error::{ApiError, Cause};
pub use object::Object;
pub use registry::{Api, DeleteOptions, PatchType, Preconditions, Propagation, Registry, TypedEvent, TypedWatch};
pub use selectors::Selector;
pub use store::{Event, EventType, StoreError, Watch};

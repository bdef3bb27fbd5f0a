//! `keelson up`: a whole node with its own control plane in one process, and `keelson down`.

mod containerd;
mod down;
mod ebpf;
mod layout;
mod lock;
mod network;
mod process;
mod run;

pub use down::run as down;
pub use layout::Layout;
pub use run::{UpConfig, image_gc, run};

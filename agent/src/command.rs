//! The command line: one module per subcommand of `keelson`.

pub mod agent;
pub mod image;
mod image_gc;
pub mod logd;
pub mod up;

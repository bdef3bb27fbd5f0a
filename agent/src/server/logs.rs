//! Container logs: files in CRI format, read for `kubectl logs`.
//!
//! [`options`] and [`line`] are pure: which lines are wanted, and what of them is sent. [`tail`] finds
//! where the last lines begin. [`follow`] reads on across rotations until the container is gone: `reader` reads the
//! files of a `folder`, `watch` says when there is more.

pub(crate) mod folder;
pub mod follow;
pub mod line;
pub mod options;
pub(crate) mod reader;
pub mod tail;
mod watch;

//! Container logs: files in CRI format, read for `kubectl logs`.
//!
//! [`options`] and [`line`] are pure: which lines are wanted, and what of them is sent. [`tail`] finds
//! where the last lines begin. [`follow`] reads on across rotations until the container is gone.

pub mod follow;
pub mod line;
pub mod options;
pub mod tail;

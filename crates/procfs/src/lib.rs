//! Files of the kernel and of the system that are made of lines: mountinfo, passwd, group, cgroup files.
//!
//! A container chooses names that show up in them, and a name is any bytes. One that is not UTF-8 must not make the whole
//! file unreadable, and none may make a parser panic: everything here reads bytes, and skips the lines that have another
//! shape.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

mod accounts;
mod mountinfo;
mod numbers;

pub use accounts::{Group, User, groups, users};
pub use mountinfo::{Mount, mounts, own_mounts};
pub use numbers::{keyed, number, numbers};

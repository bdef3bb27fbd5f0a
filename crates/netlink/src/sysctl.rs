//! Kernel settings below `/proc/sys/net`, which belong to the network namespace of the thread that opens them.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A setting that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} kernel setting {key}")]
pub struct SysctlError {
    /// What was being done.
    pub step: &'static str,
    /// The setting, with slashes, e.g. `net/ipv4/ip_forward`.
    pub key: String,
    /// Why not.
    #[source]
    pub source: io::Error,
}

fn path(key: &str) -> PathBuf {
    Path::new("/proc/sys").join(key)
}

/// The setting's value without white space around it. `key` has slashes: interface names may contain dots.
///
/// # Errors
/// When this kernel has no such setting.
pub fn read(key: &str) -> Result<String, SysctlError> {
    fs::read_to_string(path(key))
        .map(|value| value.trim().to_owned())
        .map_err(|source| SysctlError { step: "read", key: key.to_owned(), source })
}

/// Sets it.
///
/// # Errors
/// When this kernel has no such setting, or refuses the value.
pub fn write(key: &str, value: &str) -> Result<(), SysctlError> {
    OpenOptions::new()
        .write(true)
        .open(path(key))
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|source| SysctlError { step: "write", key: key.to_owned(), source })
}

/// Sets it only where it differs, which spares side effects (`ip_forward` resets other settings when written).
/// Returns whether it was changed.
///
/// # Errors
/// As [`read`] and [`write`].
pub fn ensure(key: &str, value: &str) -> Result<bool, SysctlError> {
    if read(key)? == value {
        return Ok(false);
    }
    write(key, value).map(|()| true)
}

//! The error that a plugin prints.

use serde::{Deserialize, Serialize};

/// An error in the shape and with the codes of the CNI specification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{msg}{} (CNI code {code})", if .details.is_empty() { String::new() } else { format!(": {}", .details) })]
pub struct CniError {
    /// See [`code`].
    pub code: u32,
    /// What failed, in one line.
    pub msg: String,
    /// Why, and what to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

/// Well-known error codes; 100 and above are the plugin's own.
pub mod code {
    /// The configuration's `cniVersion` is not spoken, or the verb is newer than it.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// A field that is not supported; the message names key and value.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// The container does not exist: no DEL is needed.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// A `CNI_*` variable is missing or wrong.
    pub const BAD_ENVIRONMENT: u32 = 4;
    /// Reading or writing failed.
    pub const IO: u32 = 5;
    /// The configuration is not JSON of the right shape.
    pub const DECODE: u32 = 6;
    /// A field has a value that makes no sense.
    pub const BAD_CONFIG: u32 = 7;
    /// A passing state: the runtime should try again.
    pub const TRY_AGAIN: u32 = 11;
    /// The plugin cannot serve ADD now.
    pub const NOT_AVAILABLE: u32 = 50;
    /// As 50, and existing containers may be limited.
    pub const NOT_AVAILABLE_LIMITED: u32 = 51;
    /// The kernel refused a network change.
    pub const NETWORK: u32 = 100;
    /// CHECK found something missing or changed.
    pub const DAMAGED: u32 = 101;
    /// The attachment exists already.
    pub const EXISTS: u32 = 102;
    /// A defect of the plugin itself.
    pub const INTERNAL: u32 = 999;
}

impl CniError {
    /// An error without details.
    #[must_use]
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    /// Adds the reason and what to do.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// Adds an error and all that it was caused by.
    #[must_use]
    pub fn caused_by(self, error: &dyn std::error::Error) -> Self {
        self.with_details(chain(error))
    }
}

/// An error and its causes in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

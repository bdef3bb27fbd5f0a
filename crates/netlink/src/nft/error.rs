//! What can go wrong when talking to nf_tables.

use std::io;

/// The kernel's refusal of one message of a transaction. Nothing of the transaction took effect.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}{}: {source}{}",
    .element.map_or_else(String::new, |index| format!(" (element {index})")),
    .remark.as_deref().map_or_else(String::new, |remark| format!(" ({remark})")))]
pub struct Refused {
    /// What the refused message wanted, in words.
    pub action: String,
    /// Position of the refused message in the batch, the first being 1.
    pub message: u32,
    /// Position of the refused element in its message, where the kernel told.
    pub element: Option<usize>,
    /// The kernel's own words, where it had some.
    pub remark: Option<String>,
    /// The error number.
    pub source: io::Error,
}

/// An error of the nf_tables interface.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// No netlink socket.
    #[error("cannot open a netfilter netlink socket (is CAP_NET_ADMIN missing?)")]
    Open(#[source] io::Error),
    /// The kernel has no nf_tables.
    #[error(
        "this kernel has no nf_tables: load the module nf_tables or use a kernel that has it (CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT)"
    )]
    Unsupported,
    /// Sending failed.
    #[error("cannot send to nf_tables")]
    Send(#[source] io::Error),
    /// Receiving failed.
    #[error("cannot receive from nf_tables")]
    Receive(#[source] io::Error),
    /// A transaction was refused.
    #[error(transparent)]
    Refused(Box<Refused>),
    /// The ruleset is of another generation than the transaction was made for: look again.
    #[error("the ruleset changed meanwhile")]
    Raced,
    /// A dump was interrupted by a change: dump again.
    #[error("the ruleset changed during the dump")]
    Interrupted,
    /// The kernel answered a request with an error.
    #[error("nf_tables refused to {action}")]
    Answer {
        /// What was asked.
        action: String,
        /// The error number.
        #[source]
        source: io::Error,
    },
    /// An answer that cannot be understood.
    #[error("nf_tables sent an answer that cannot be read: {0}")]
    Malformed(&'static str),
}

impl NftError {
    /// The error number, where the kernel gave one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            NftError::Open(source)
            | NftError::Send(source)
            | NftError::Receive(source)
            | NftError::Answer { source, .. } => source.raw_os_error(),
            NftError::Refused(refused) => refused.source.raw_os_error(),
            _ => None,
        }
    }

    /// True when what was asked for does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.errno() == Some(libc::ENOENT)
    }
}

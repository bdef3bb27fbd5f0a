//! Pods send from their own addresses only, in a table of our own for all networks: `inet keelson-cni`.
//!
//! ```text
//! chain prerouting (raw): from a link keel*, and the route to the source leads elsewhere: drop
//! ```
//!
//! The routes of ADD say which addresses a link has, so an attachment needs no rule of its own. Each packet is looked at,
//! also those of known connections: a forged one could end a connection of others. Packets of the link itself (neighbour
//! discovery, from fe80::/10 or ::) have a route there, or the kernel lets them pass.

use keelson_netlink::nft::{
    Base, Batch, ChainKind, Compare, Hook, Meta, Nft, NftError, PRIORITY_RAW, Register, Rule,
    Table, Verdict,
};

use crate::names::{LINK_PREFIX, fnv1a};

const TABLE: Table<'static> = Table::inet("keelson-cni");
/// Changes whenever the shape of the table does.
const LAYOUT: &str = "source guard 1";

fn stamp() -> [u8; 8] {
    fnv1a(LAYOUT.as_bytes()).to_be_bytes()
}

/// Makes the table unless it is there.
///
/// # Errors
/// When the kernel has no nftables or refuses the table.
pub fn ensure(nft: &mut Nft) -> Result<(), NftError> {
    let found = nft.table(TABLE)?;
    if found.as_ref().is_some_and(|found| found.stamp.as_deref() == Some(&stamp())) {
        return Ok(());
    }
    let mut batch = Batch::new();
    if found.is_some() {
        batch.delete_table(TABLE);
    }
    batch.create_table(TABLE, &stamp());
    let prerouting =
        Base { kind: ChainKind::Filter, hook: Hook::Prerouting, priority: PRIORITY_RAW };
    batch.add_chain(TABLE, "prerouting", Some(prerouting));
    batch.add_rule(TABLE, "prerouting", &from_elsewhere());
    match nft.commit(batch) {
        // An ADD of another network was faster.
        Err(_) if is_current(nft)? => Ok(()),
        done => done,
    }
}

/// Whether the table is there and up to date.
///
/// # Errors
/// When the kernel does not say.
pub fn is_current(nft: &mut Nft) -> Result<bool, NftError> {
    Ok(nft.table(TABLE)?.is_some_and(|found| found.stamp.as_deref() == Some(&stamp())))
}

fn from_elsewhere() -> Rule {
    Rule::new()
        .meta(Meta::InputName, Register(0))
        .compare(Register(0), Compare::Equal, LINK_PREFIX.as_bytes())
        .fib_source_link(Register(0))
        .compare(Register(0), Compare::Equal, &0_u32.to_ne_bytes())
        .verdict(Verdict::Drop)
}

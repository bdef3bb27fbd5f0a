//! Connections from the time of a netfilter mode. The kernel translates their packets only as long as some table
//! asks for that, whatever its rules: one without any stays until the last of them has ended.

use std::time::Duration;

use keelson_ebpf_abi::{PROTOCOL_SCTP, PROTOCOL_TCP};
use keelson_netlink::conntrack::{Conntrack, ConntrackError, Flow};
use keelson_netlink::nft::{
    Base, Batch, ChainKind, Conntrack as Tracked, Hook, Nft, NftError, PRIORITY_DNAT,
    PRIORITY_SNAT, Register, Rule, Table,
};

use super::{EbpfError, aside};
use crate::switch::with_sources;

const TABLE: &str = "keelson-proxy-ebpf";
const CHAINS: [(&str, Hook, i32); 4] = [
    ("prerouting", Hook::Prerouting, PRIORITY_DNAT),
    ("output", Hook::Output, PRIORITY_DNAT),
    ("postrouting", Hook::Postrouting, PRIORITY_SNAT),
    ("input", Hook::Input, PRIORITY_SNAT),
];

/// What works in the network namespace of the thread that opened it.
struct Netfilter {
    nft: Nft,
    conntrack: Conntrack,
}

/// To be called before the tables of other modes go: keeps translations alive that are needed.
pub(crate) fn keep_translating() -> Result<(), EbpfError> {
    let Some(nft) = nf_tables() else { return Ok(()) };
    let conntrack = Conntrack::open().map_err(EbpfError::Conntrack)?;
    let mut netfilter = Netfilter { nft, conntrack };
    if !netfilter.translates().map_err(EbpfError::Conntrack)? {
        return remove_from(&mut netfilter.nft).map_err(EbpfError::Netfilter);
    }
    netfilter.make().map_err(EbpfError::Netfilter)?;
    tracing::info!(
        "Connections that netfilter translates are left; its table goes when they have ended"
    );
    aside("proxy-ebpf-netfilter", move || netfilter.see_off())
}

/// Removes the table, in the calling thread's namespace.
pub(crate) fn remove() -> Result<(), EbpfError> {
    nf_tables().map_or(Ok(()), |mut nft| remove_from(&mut nft)).map_err(EbpfError::Netfilter)
}

/// Nothing on a kernel without it, which has no table of it and translates nothing for it.
fn nf_tables() -> Option<Nft> {
    let mut nft = Nft::open().ok()?;
    nft.generation().ok()?;
    Some(nft)
}

/// Most nodes never have the table, and a transaction would tell everybody who watches.
fn remove_from(nft: &mut Nft) -> Result<(), NftError> {
    let table = Table::inet(TABLE);
    if nft.table(table)?.is_none() {
        return Ok(());
    }
    let mut batch = Batch::new();
    // It may be gone meanwhile: make it first, in the same transaction.
    batch.add_table(table);
    batch.delete_table(table);
    nft.commit(batch)
}

impl Netfilter {
    /// Whether there is a connection that would break. UDP flows begin anew.
    fn translates(&mut self) -> Result<bool, ConntrackError> {
        const EVERY_FAMILY: u8 = 0;
        let translated = |flow: &Flow| {
            [PROTOCOL_TCP, PROTOCOL_SCTP].contains(&flow.protocol)
                && flow.answerer != flow.destination
        };
        Ok(!self.conntrack.select(EVERY_FAMILY, translated)?.flows.is_empty())
    }

    fn make(&mut self) -> Result<(), NftError> {
        let table = Table::inet(TABLE);
        let mut batch = Batch::new();
        batch.add_table(table);
        batch.delete_table(table);
        batch.add_table(table);
        for (name, hook, priority) in CHAINS {
            batch.add_chain(table, name, Some(Base { kind: ChainKind::Nat, hook, priority }));
        }
        // Without a rule that asks for it, connections are not even tracked.
        batch.add_rule(table, "prerouting", &Rule::new().conntrack(Tracked::State, Register(0)));
        self.nft.commit(batch)
    }

    fn see_off(mut self) {
        const PERIOD: Duration = Duration::from_secs(10);
        while self.translates().unwrap_or(false) {
            std::thread::park_timeout(PERIOD);
        }
        if let Err(error) = remove_from(&mut self.nft) {
            tracing::warn!(
                error = with_sources(&error),
                "Cannot remove the table of earlier connections"
            );
        }
    }
}

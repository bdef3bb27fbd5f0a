//! Tends the tables that programs fill, bit by bit, once a second: removes what is over, so that a full table pushes
//! out nothing that is still needed, and tells how full they are.

use std::path::Path;

use keelson_ebpf_abi::{Affinity, AffinityKey, Flow, Peer, Pool, STATE_RESET, Tuple};

use super::config::EbpfConfig;
use super::error::EbpfError;
use super::sizes::{Bounds, Needs, estimate, grown};
use super::sys::{Cursor, cpus};
use super::table::Table;
use crate::backend::MapFill;

const SECOND_NS: u64 = 1_000_000_000;
/// Not more often, whoever asks.
const PERIOD_NS: u64 = SECOND_NS * 9 / 10;
/// Entries of a table that are looked at each time: all of a small one, a part of a large one.
const AT_ONCE: usize = 8192;
/// What is over is kept for so long: late packets of it may come.
const GRACE_NS: u64 = 10 * SECOND_NS;
/// As kube-proxy has it for connection tracking.
const HALF_CLOSED_NS: u64 = 3600 * SECOND_NS;
/// Where only one direction is seen: whether the other one is closed as well is not known, but most are.
const HALF_SEEN_NS: u64 = 120 * SECOND_NS;

/// Whether nobody needs a flow any more. A connection that one side has closed may be silent for long, and the ports
/// that the endpoint sees stay taken while it remembers them.
fn is_done(flow: &Flow, now_ns: u64) -> bool {
    let kept_ns = match flow.state & STATE_RESET {
        0 if flow.is_closed() && flow.is_one_way() => HALF_SEEN_NS,
        0 if flow.is_half_closed() && !flow.is_closed() => HALF_CLOSED_NS,
        _ => GRACE_NS,
    };
    let over = if flow.is_from_client() { flow.is_over(now_ns) } else { flow.is_forgotten(now_ns) };
    over && now_ns.saturating_sub(flow.last_seen_ns) >= kept_ns
}

/// A table that is gone through, round after round.
struct Walk<K, V> {
    name: &'static str,
    table: Table<K, V>,
    cursor: Cursor,
    entries: u32,
    bounds: Option<Bounds>,
}

impl<K, V> Walk<K, V>
where
    K: aya::Pod + Default + Eq + std::hash::Hash,
    V: aya::Pod + Default,
{
    fn open(folder: &Path, name: &'static str, bounds: Option<Bounds>) -> Result<Self, EbpfError> {
        let (table, cursor) = (Table::open(folder, name)?, Cursor::default());
        Ok(Walk { name, table, cursor, entries: 0, bounds })
    }

    /// Goes on a bit.
    fn step(&mut self, is_over: impl Fn(&K, &V) -> bool) -> Result<(), EbpfError> {
        let from = self.cursor.position;
        let found = self.table.read_on(&mut self.cursor, AT_ONCE)?;
        let mut left = 0;
        for (key, value) in &found {
            if is_over(key, value) {
                // A new connection may have come meanwhile.
                if self.table.get(key)?.is_some_and(|now| is_over(key, &now)) {
                    self.table.delete(key)?;
                }
            } else {
                left += 1;
            }
        }
        let max = self.table.max_entries();
        let all = max.checked_next_power_of_two().unwrap_or(max);
        let to = if self.cursor.ended { all } else { self.cursor.position };
        self.entries = estimate(left, from..to, max).unwrap_or(self.entries);
        if self.cursor.ended {
            self.cursor = Cursor::default();
        }
        Ok(())
    }

    fn may_grow(&self) -> bool {
        self.bounds.is_some_and(|bounds| self.table.max_entries() < bounds.most)
    }

    /// What it should have room for, if that is more than now.
    fn wants(&self) -> Option<u32> {
        grown(self.entries, self.table.max_entries()).filter(|_| self.may_grow())
    }

    fn fill(&self) -> MapFill {
        MapFill {
            map: self.name,
            entries: self.entries,
            max_entries: self.table.max_entries(),
            may_grow: self.may_grow(),
        }
    }
}

/// All of them.
pub(crate) struct Tables {
    flows_in: Walk<Tuple, Flow>,
    flows_out: Walk<Tuple, Flow>,
    affinity: Walk<AffinityKey, Affinity>,
    connected_tcp: Walk<u64, Peer>,
    connected_udp: Walk<u64, Peer>,
    tended_ns: u64,
}

impl Tables {
    pub(crate) fn open(folder: &Path, config: &EbpfConfig) -> Result<Self, EbpfError> {
        let cpus = cpus()?;
        let bounds = |name| Bounds::of(name, config, cpus);
        Ok(Tables {
            flows_in: Walk::open(folder, "flows_in", bounds("flows_in"))?,
            flows_out: Walk::open(folder, "flows_out", bounds("flows_out"))?,
            affinity: Walk::open(folder, "affinity", bounds("affinity"))?,
            connected_tcp: Walk::open(folder, "connected_tcp", None)?,
            connected_udp: Walk::open(folder, "connected_udp", None)?,
            tended_ns: 0,
        })
    }

    /// Goes on a bit with each; true when it was time for that.
    pub(crate) fn tend(
        &mut self,
        pools: &Table<u32, Pool>,
        now_ns: u64,
    ) -> Result<bool, EbpfError> {
        if now_ns.saturating_sub(self.tended_ns) < PERIOD_NS {
            return Ok(false);
        }
        self.tended_ns = now_ns;
        self.flows_in.step(|_, flow| is_done(flow, now_ns))?;
        self.flows_out.step(|_, flow| is_done(flow, now_ns))?;
        // A pool that cannot be read now will be the next time.
        let secs = |pool| pools.get(&pool).map(|pool| pool.map_or(0, |pool| pool.affinity_secs));
        self.affinity.step(|key, client| {
            let unused_ns = now_ns.saturating_sub(client.last_used_ns);
            secs(key.pool).is_ok_and(|secs| unused_ns >= u64::from(secs) * SECOND_NS + GRACE_NS)
        })?;
        // What is in these goes with the sockets.
        self.connected_tcp.step(|_, _| false)?;
        self.connected_udp.step(|_, _| false)?;
        Ok(true)
    }

    /// What they should have room for, if one of them should grow.
    pub(crate) fn wants(&self) -> Option<Needs> {
        // Both have the same connections in them.
        let flows = self.flows_in.wants().max(self.flows_out.wants());
        let wanted =
            [("flows_in", flows), ("flows_out", flows), ("affinity", self.affinity.wants())];
        let wanted = wanted.iter().filter_map(|(name, entries)| Some((*name, (*entries)?)));
        let needs =
            wanted.fold(Needs::default(), |needs, (name, entries)| needs.also(name, entries));
        (needs != Needs::default()).then_some(needs)
    }

    pub(crate) fn fills(&self) -> impl Iterator<Item = MapFill> {
        [
            self.flows_in.fill(),
            self.flows_out.fill(),
            self.affinity.fill(),
            self.connected_tcp.fill(),
            self.connected_udp.fill(),
        ]
        .into_iter()
    }
}

#[cfg(test)]
mod tests {
    use keelson_ebpf_abi::{
        FLOW_FROM_ENDPOINT, FLOW_MASQUERADE, FLOW_TO_ENDPOINT, FLOW_UNMASQUERADE, PROTOCOL_TCP,
        PROTOCOL_UDP, STATE_ANSWERED, STATE_CLIENT_DONE, STATE_ENDPOINT_DONE, STATE_ENDPOINT_FIRST,
        STATE_TELLS, STATE_TOLD,
    };

    use super::*;

    #[test]
    fn what_is_over_is_kept_for_a_while_and_what_is_half_closed_for_long() {
        const CLOSED: u8 = STATE_ANSWERED | STATE_CLIENT_DONE | STATE_ENDPOINT_DONE;
        for (role, protocol, state, secs) in [
            (FLOW_TO_ENDPOINT, PROTOCOL_TCP, 0, 60),
            (FLOW_TO_ENDPOINT, PROTOCOL_TCP, STATE_RESET, 10),
            (FLOW_TO_ENDPOINT, PROTOCOL_TCP, CLOSED, 10),
            (FLOW_FROM_ENDPOINT, PROTOCOL_TCP, CLOSED, 10),
            (FLOW_FROM_ENDPOINT, PROTOCOL_TCP, CLOSED | STATE_ENDPOINT_FIRST, 68),
            (FLOW_UNMASQUERADE, PROTOCOL_TCP, CLOSED | STATE_ENDPOINT_FIRST, 68),
            (FLOW_UNMASQUERADE, PROTOCOL_TCP, STATE_RESET, 10),
            (FLOW_TO_ENDPOINT, PROTOCOL_TCP, STATE_ANSWERED | STATE_CLIENT_DONE, 3600),
            (FLOW_MASQUERADE, PROTOCOL_TCP, STATE_ENDPOINT_DONE | STATE_RESET, 10),
            (FLOW_TO_ENDPOINT, PROTOCOL_TCP, STATE_ANSWERED, 86_400),
            (FLOW_TO_ENDPOINT, PROTOCOL_UDP, 0, 30),
            (FLOW_FROM_ENDPOINT, PROTOCOL_UDP, STATE_ANSWERED, 120),
            (FLOW_TO_ENDPOINT, PROTOCOL_TCP, STATE_TELLS | STATE_ANSWERED, 86_400),
            (FLOW_TO_ENDPOINT, PROTOCOL_TCP, STATE_TELLS | STATE_CLIENT_DONE, 120),
            (FLOW_FROM_ENDPOINT, PROTOCOL_TCP, STATE_TOLD | STATE_ENDPOINT_DONE, 120),
            (FLOW_FROM_ENDPOINT, PROTOCOL_TCP, STATE_TOLD | STATE_ENDPOINT_DONE | STATE_RESET, 10),
        ] {
            let to = Tuple { protocol, ..Tuple::default() };
            let flow = Flow { to, role, state, last_seen_ns: 5 * SECOND_NS, ..Flow::default() };
            let end = flow.last_seen_ns + secs * SECOND_NS;
            assert!(is_done(&flow, end), "{role} {protocol} {state}");
            assert!(!is_done(&flow, end - 1), "{role} {protocol} {state}");
        }
    }
}

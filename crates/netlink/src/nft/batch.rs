//! One transaction: messages that take effect together or not at all.

use super::attribute::{Reader, Writer, read_text};
use super::expression::{Rule, Verdict, push_user_data};
use super::set::{Element, Field, Set, Value, Values, length_of, type_of};

pub(crate) const SUBSYSTEM: u16 = 10;
pub(crate) const HEADER_LEN: usize = 20;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

pub(crate) const NEW_TABLE: u16 = 0;
pub(crate) const GET_TABLE: u16 = 1;
pub(crate) const DELETE_TABLE: u16 = 2;
pub(crate) const NEW_CHAIN: u16 = 3;
pub(crate) const GET_CHAIN: u16 = 4;
pub(crate) const DELETE_CHAIN: u16 = 5;
pub(crate) const NEW_RULE: u16 = 6;
pub(crate) const GET_RULE: u16 = 7;
pub(crate) const DELETE_RULE: u16 = 8;
pub(crate) const NEW_SET: u16 = 9;
pub(crate) const GET_SET: u16 = 10;
pub(crate) const DELETE_SET: u16 = 11;
pub(crate) const NEW_ELEMENT: u16 = 12;
pub(crate) const GET_ELEMENT: u16 = 13;
pub(crate) const DELETE_ELEMENT: u16 = 14;
pub(crate) const NEW_GENERATION: u16 = 15;
pub(crate) const GET_GENERATION: u16 = 16;

pub(crate) const REQUEST: u16 = 0x1;
pub(crate) const ACK: u16 = 0x4;
const CREATE: u16 = 0x400;
const EXCLUSIVE: u16 = 0x200;
const APPEND: u16 = 0x800;

/// An attribute's length is a u16; lists of elements are split well before that.
const ELEMENT_LIST_LIMIT: usize = 48 * 1024;

/// The family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4 and IPv6 together.
    Inet = 1,
    /// IPv4.
    Ipv4 = 2,
    /// Ingress and egress of devices.
    Netdev = 5,
    /// IPv6.
    Ipv6 = 10,
}

/// Names a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Table<'a> {
    /// Family.
    pub family: Family,
    /// Name.
    pub name: &'a str,
}

impl<'a> Table<'a> {
    /// A table of the `inet` family.
    #[must_use]
    pub const fn inet(name: &'a str) -> Self {
        Table { family: Family::Inet, name }
    }
}

/// Where a base chain is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// All arriving packets, before routing.
    Prerouting = 0,
    /// Packets for this host.
    Input = 1,
    /// Packets that pass through.
    Forward = 2,
    /// Packets that this host makes.
    Output = 3,
    /// All leaving packets, after routing.
    Postrouting = 4,
}

/// A base chain's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainKind {
    /// Sees every packet.
    Filter,
    /// Sees the first packet of each connection.
    Nat,
    /// As filter; routes again when a rule changed the packet.
    Route,
}

/// What attaches a chain to the packet path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Type.
    pub kind: ChainKind,
    /// Hook.
    pub hook: Hook,
    /// Order among chains of a hook: smaller is earlier.
    pub priority: i32,
}

/// Priority of `raw`: before connections are tracked.
pub const PRIORITY_RAW: i32 = -300;
/// Priority of `dstnat`.
pub const PRIORITY_DNAT: i32 = -100;
/// Priority of `srcnat`.
pub const PRIORITY_SNAT: i32 = 100;

/// Messages in order; [`super::Nft::commit`] sends them as one transaction.
#[derive(Clone, Debug)]
pub struct Batch {
    pub(crate) buffer: Vec<u8>,
    pub(crate) messages: u32,
    operations: usize,
    last_start: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Batch::new()
    }
}

impl Batch {
    /// An empty transaction.
    #[must_use]
    pub fn new() -> Self {
        Batch::begin(None)
    }

    /// A transaction that the kernel refuses when its ruleset is not of this generation any more
    /// ([`super::NftError::Raced`]).
    #[must_use]
    pub fn at_generation(generation: u32) -> Self {
        Batch::begin(Some(generation))
    }

    fn begin(generation: Option<u32>) -> Self {
        let mut batch = Batch { buffer: Vec::new(), messages: 0, operations: 0, last_start: 0 };
        batch.control(BATCH_BEGIN, |writer| {
            if let Some(generation) = generation {
                writer.u32(1, generation);
            }
        });
        batch
    }

    /// True when nothing would change.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.operations == 0
    }

    /// Number of objects and elements to add or remove so far.
    #[must_use]
    pub fn operations(&self) -> usize {
        self.operations
    }

    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Makes the table unless it is there.
    pub fn add_table(&mut self, table: Table<'_>) {
        self.message(NEW_TABLE, CREATE, table.family, |w| w.text(1, table.name));
    }

    /// Makes the table with private bytes (at most 64) that the kernel keeps for us. It must not exist.
    pub fn create_table(&mut self, table: Table<'_>, stamp: &[u8]) {
        let mut user_data = Vec::new();
        push_user_data(&mut user_data, super::expression::STAMP_KIND, stamp);
        self.message(NEW_TABLE, CREATE | EXCLUSIVE, table.family, |w| {
            w.text(1, table.name);
            w.bytes(6, &user_data);
        });
    }

    /// Removes the table with everything in it. It must exist.
    pub fn delete_table(&mut self, table: Table<'_>) {
        self.message(DELETE_TABLE, 0, table.family, |w| w.text(1, table.name));
    }

    /// Makes a chain unless it is there; with `base` one that packets enter by themselves.
    pub fn add_chain(&mut self, table: Table<'_>, name: &str, base: Option<Base>) {
        self.message(NEW_CHAIN, CREATE, table.family, |w| {
            w.text(1, table.name);
            w.text(3, name);
            if let Some(base) = base {
                w.nest(4, |hook| {
                    hook.u32(1, base.hook as u32);
                    hook.u32(2, base.priority.cast_unsigned());
                });
                w.text(
                    7,
                    match base.kind {
                        ChainKind::Filter => "filter",
                        ChainKind::Nat => "nat",
                        ChainKind::Route => "route",
                    },
                );
            }
        });
    }

    /// Removes a chain and its rules. Nothing may refer to it.
    pub fn delete_chain(&mut self, table: Table<'_>, name: &str) {
        self.message(DELETE_CHAIN, 0, table.family, |w| {
            w.text(1, table.name);
            w.text(3, name);
        });
    }

    /// Removes all rules of a chain.
    pub fn flush_chain(&mut self, table: Table<'_>, name: &str) {
        self.message(DELETE_RULE, 0, table.family, |w| {
            w.text(1, table.name);
            w.text(2, name);
        });
    }

    /// Appends a rule to a chain.
    pub fn add_rule(&mut self, table: Table<'_>, chain: &str, rule: &Rule) {
        self.message(NEW_RULE, CREATE | APPEND, table.family, |w| {
            w.text(1, table.name);
            w.text(2, chain);
            w.nest(4, |list| list.raw(&rule.expressions));
            if !rule.user_data.is_empty() {
                w.bytes(7, &rule.user_data);
            }
        });
    }

    /// Removes one rule by the handle that a dump told.
    pub fn delete_rule(&mut self, table: Table<'_>, chain: &str, handle: u64) {
        self.message(DELETE_RULE, 0, table.family, |w| {
            w.text(1, table.name);
            w.text(2, chain);
            w.u64(3, handle);
        });
    }

    /// Makes a set, map or verdict map unless it is there.
    pub fn add_set(&mut self, table: Table<'_>, set: &Set<'_>) {
        // The kernel wants an id even where nothing in the transaction refers to it.
        let id = self.messages;
        self.message(NEW_SET, CREATE, table.family, |w| {
            w.text(1, table.name);
            w.text(2, set.name);
            w.u32(3, set.flags());
            w.u32(4, type_of(set.key));
            w.u32(5, u32::try_from(length_of(set.key)).unwrap_or(0));
            match set.values {
                Values::None => {}
                Values::Verdict => {
                    const NFT_DATA_VERDICT: u32 = 0xffff_ff00;
                    w.u32(6, NFT_DATA_VERDICT);
                }
                Values::Fields(fields) => {
                    w.u32(6, type_of(fields));
                    w.u32(7, u32::try_from(length_of(fields)).unwrap_or(0));
                }
            }
            w.u32(10, id);
            w.bytes(13, &byte_orders(set));
            let ranges_of_parts = set.interval && set.key.len() > 1;
            if set.size.is_some() || ranges_of_parts {
                w.nest(9, |desc| {
                    if let Some(size) = set.size {
                        desc.u32(1, size);
                    }
                    if ranges_of_parts {
                        desc.nest(2, |concat| {
                            for field in set.key {
                                concat.nest(1, |part| {
                                    part.u32(1, u32::try_from(field.width()).unwrap_or(0));
                                });
                            }
                        });
                    }
                });
            }
        });
    }

    /// Removes a set. No rule may refer to it.
    pub fn delete_set(&mut self, table: Table<'_>, name: &str) {
        self.message(DELETE_SET, 0, table.family, |w| {
            w.text(1, table.name);
            w.text(2, name);
        });
    }

    /// Removes all elements of a set.
    pub fn flush_set(&mut self, table: Table<'_>, name: &str) {
        self.message(DELETE_ELEMENT, 0, table.family, |w| {
            w.text(1, table.name);
            w.text(2, name);
        });
    }

    /// Adds elements. One that is there with the same value is left alone; with another value the
    /// transaction is refused (remove it first, in the same transaction).
    pub fn add_elements<'e>(
        &mut self,
        table: Table<'_>,
        set: &str,
        elements: impl IntoIterator<Item = Element<'e>>,
    ) {
        self.elements(NEW_ELEMENT, CREATE, table, set, elements);
    }

    /// Removes elements, which must be there.
    pub fn delete_elements<'e>(
        &mut self,
        table: Table<'_>,
        set: &str,
        elements: impl IntoIterator<Item = Element<'e>>,
    ) {
        self.elements(DELETE_ELEMENT, 0, table, set, elements);
    }

    /// Adds ranges (both ends included) to a set of ranges over a single field. A set over several
    /// fields takes [`Element::range`] instead.
    pub fn add_ranges<'e>(
        &mut self,
        table: Table<'_>,
        set: &str,
        ranges: impl IntoIterator<Item = (&'e [u8], &'e [u8])>,
    ) {
        let ends: Vec<(Vec<u8>, Option<Vec<u8>>)> =
            ranges.into_iter().map(|(first, last)| (first.to_vec(), successor(last))).collect();
        self.range_ends(table, set, &ends);
    }

    fn range_ends(&mut self, table: Table<'_>, set: &str, ends: &[(Vec<u8>, Option<Vec<u8>>)]) {
        const INTERVAL_END: u32 = 1;
        self.operations += ends.len();
        self.message(NEW_ELEMENT, CREATE, table.family, |w| {
            w.text(1, table.name);
            w.text(2, set);
            w.nest(3, |list| {
                for (first, end) in ends {
                    list.nest(1, |e| e.nest(1, |key| key.bytes(1, first)));
                    if let Some(end) = end {
                        list.nest(1, |e| {
                            e.u32(3, INTERVAL_END);
                            e.nest(1, |key| key.bytes(1, end));
                        });
                    }
                }
            });
        });
    }

    fn elements<'e>(
        &mut self,
        kind: u16,
        flags: u16,
        table: Table<'_>,
        set: &str,
        elements: impl IntoIterator<Item = Element<'e>>,
    ) {
        let mut elements = elements.into_iter().peekable();
        while elements.peek().is_some() {
            let mut count = 0;
            self.message(kind, flags, table.family, |w| {
                w.text(1, table.name);
                w.text(2, set);
                w.nest(3, |list| {
                    let mut size = 0;
                    while size < ELEMENT_LIST_LIMIT {
                        let Some(element) = elements.next() else { break };
                        size += write_element(list, &element, kind == NEW_ELEMENT);
                        count += 1;
                    }
                });
            });
            // The message itself counted as one.
            self.operations += count - 1;
        }
    }

    fn message(
        &mut self,
        kind: u16,
        flags: u16,
        family: Family,
        fill: impl FnOnce(&mut Writer<'_>),
    ) {
        let start = self.buffer.len();
        push_header(
            &mut self.buffer,
            SUBSYSTEM << 8 | kind,
            flags | REQUEST,
            self.messages,
            family as u8,
            0,
        );
        fill(&mut Writer::new(&mut self.buffer));
        finish_header(&mut self.buffer, start);
        self.last_start = start;
        self.messages += 1;
        self.operations += 1;
    }

    fn control(&mut self, kind: u16, fill: impl FnOnce(&mut Writer<'_>)) {
        let start = self.buffer.len();
        push_header(&mut self.buffer, kind, REQUEST, self.messages, 0, SUBSYSTEM);
        fill(&mut Writer::new(&mut self.buffer));
        finish_header(&mut self.buffer, start);
        self.messages += 1;
    }

    /// The bytes to send, and the sequence number of the message that asks for an acknowledgement.
    pub(crate) fn finish(mut self) -> (Vec<u8>, u32) {
        // The kernel answers only what failed, and messages that ask: so ask for the last one.
        let acknowledged = self.messages - 1;
        let flags = self.last_start + 6;
        let old = u16::from_ne_bytes([self.buffer[flags], self.buffer[flags + 1]]);
        self.buffer[flags..flags + 2].copy_from_slice(&(old | ACK).to_ne_bytes());
        self.control(BATCH_END, |_| {});
        (self.buffer, acknowledged)
    }
}

/// Says in words what the message with that sequence number wanted, for an error text.
pub(crate) fn describe(buffer: &[u8], sequence: u32) -> Option<String> {
    let (kind, message) = messages(buffer)
        .find_map(|(kind, found, message)| (found == sequence).then_some((kind, message)))?;
    let body = message.get(HEADER_LEN..)?;
    let name = |attribute| Reader::find(body, attribute).map_or("?", read_text);
    let table = name(1);
    Some(match kind & 0xff {
        NEW_TABLE => format!("add table {table}"),
        DELETE_TABLE => format!("delete table {table}"),
        NEW_CHAIN => format!("add chain {} to table {table}", name(3)),
        DELETE_CHAIN => format!("delete chain {} of table {table}", name(3)),
        NEW_RULE => format!("add a rule to chain {} of table {table}", name(2)),
        DELETE_RULE => format!("delete rules of chain {} of table {table}", name(2)),
        NEW_SET => format!("add set {} to table {table}", name(2)),
        DELETE_SET => format!("delete set {} of table {table}", name(2)),
        NEW_ELEMENT => format!("add elements to set {} of table {table}", name(2)),
        DELETE_ELEMENT => format!("delete elements of set {} of table {table}", name(2)),
        other => format!("message {other}"),
    })
}

/// The element of that message in which the kernel's complaint at `offset` lies.
pub(crate) fn element_at(buffer: &[u8], sequence: u32, offset: usize) -> Option<usize> {
    let (_, _, message) = messages(buffer).find(|(_, found, _)| *found == sequence)?;
    let list = Reader::find(message.get(HEADER_LEN..)?, 3)?;
    let list_start = list.as_ptr() as usize - message.as_ptr() as usize;
    Reader::new(list).enumerate().find_map(|(index, (_, element))| {
        let end = element.as_ptr() as usize - list.as_ptr() as usize + element.len();
        (offset >= list_start && offset < list_start + end).then_some(index)
    })
}

/// The messages of a buffer: type, sequence number, whole message.
pub(crate) fn messages(mut buffer: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let header = buffer.get(..16)?;
        let length = u32::from_ne_bytes(header[0..4].try_into().ok()?) as usize;
        if length < 16 || length > buffer.len() {
            return None;
        }
        let message = &buffer[..length];
        buffer = buffer.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        let kind = u16::from_ne_bytes(header[4..6].try_into().ok()?);
        let sequence = u32::from_ne_bytes(header[8..12].try_into().ok()?);
        Some((kind, sequence, message))
    })
}

pub(crate) fn push_header(
    buffer: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    resource: u16,
) {
    buffer.extend_from_slice(&0u32.to_ne_bytes());
    buffer.extend_from_slice(&kind.to_ne_bytes());
    buffer.extend_from_slice(&flags.to_ne_bytes());
    buffer.extend_from_slice(&sequence.to_ne_bytes());
    buffer.extend_from_slice(&0u32.to_ne_bytes());
    buffer.extend_from_slice(&[family, 0]);
    buffer.extend_from_slice(&resource.to_be_bytes());
}

pub(crate) fn finish_header(buffer: &mut [u8], start: usize) {
    let length = u32::try_from(buffer.len() - start).unwrap_or(u32::MAX);
    buffer[start..start + 4].copy_from_slice(&length.to_ne_bytes());
}

fn write_element(list: &mut Writer<'_>, element: &Element<'_>, with_value: bool) -> usize {
    let start = list.open(1);
    list.nest(1, |key| key.bytes(1, element.key));
    if let Some(last) = element.last {
        list.nest(10, |key| key.bytes(1, last));
    }
    let mut size = 24 + element.key.len() + element.last.map_or(0, |last| last.len() + 8);
    if with_value {
        match element.value {
            Value::None => {}
            Value::Bytes(bytes) => {
                list.nest(2, |data| data.bytes(1, bytes));
                size += 8 + bytes.len();
            }
            Value::Verdict(verdict) => {
                list.nest(2, |data| verdict.write(data));
                size += 24
                    + if let Verdict::Goto(c) | Verdict::Jump(c) = verdict { c.len() } else { 0 };
            }
        }
        if let Some(timeout) = element.timeout {
            list.u64(4, u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
        }
    }
    list.close(start);
    size
}

/// Tells `nft list` in which byte order a lone number is (it takes them for network order otherwise).
fn byte_orders(set: &Set<'_>) -> Vec<u8> {
    const HOST_ENDIAN: u32 = 1;
    const BIG_ENDIAN: u32 = 2;
    let order = |fields: &[Field]| match fields {
        [Field::Mark] => HOST_ENDIAN,
        _ => BIG_ENDIAN,
    };
    let mut user_data = Vec::new();
    push_user_data(&mut user_data, 0, &order(set.key).to_ne_bytes());
    if let Values::Fields(fields) = set.values {
        push_user_data(&mut user_data, 1, &order(fields).to_ne_bytes());
    }
    user_data
}

/// The next key in order, or none after the greatest.
fn successor(key: &[u8]) -> Option<Vec<u8>> {
    let mut next = key.to_vec();
    for byte in next.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            return Some(next);
        }
    }
    None
}

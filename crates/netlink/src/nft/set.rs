//! Sets, maps and verdict maps.

use std::time::Duration;

use super::expression::Verdict;

/// One part of a key or of a value. The kernel only knows lengths; `nft list` prints by these types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// 4 bytes.
    Ipv4,
    /// 16 bytes.
    Ipv6,
    /// Transport protocol, 1 byte.
    Protocol,
    /// Port in network byte order, 2 bytes.
    Port,
    /// A number in host byte order, 4 bytes.
    Mark,
    /// Interface name, 16 bytes.
    InterfaceName,
}

impl Field {
    /// The type number that `nft` uses (its `enum datatypes`).
    fn kind(self) -> u32 {
        match self {
            Field::Ipv4 => 7,
            Field::Ipv6 => 8,
            Field::Protocol => 12,
            Field::Port => 13,
            Field::Mark => 19,
            Field::InterfaceName => 41,
        }
    }

    /// Length in bytes, without padding.
    #[must_use]
    pub fn width(self) -> usize {
        match self {
            Field::Ipv4 | Field::Mark => 4,
            Field::Ipv6 | Field::InterfaceName => 16,
            Field::Protocol => 1,
            Field::Port => 2,
        }
    }
}

/// The number under which `nft` knows a concatenation: six bits for each part.
pub(crate) fn type_of(fields: &[Field]) -> u32 {
    fields.iter().fold(0, |sum, field| sum << 6 | field.kind())
}

/// Length of a key or value. Parts of a concatenation are padded to four bytes each.
pub(crate) fn length_of(fields: &[Field]) -> usize {
    match fields {
        [only] => only.width(),
        several => several.iter().map(|field| field.width().next_multiple_of(4)).sum(),
    }
}

/// What a set maps its keys to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values<'a> {
    /// A plain set.
    None,
    /// A verdict map.
    Verdict,
    /// A map.
    Fields(&'a [Field]),
}

/// A set, map or verdict map to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Set<'a> {
    /// Name, unique in its table.
    pub name: &'a str,
    /// Parts of the key.
    pub key: &'a [Field],
    /// What it maps to.
    pub values: Values<'a>,
    /// Keys are ranges.
    pub interval: bool,
    /// Rules may add elements ([`super::Rule::dynamic_set`]).
    pub dynamic: bool,
    /// Elements may time out.
    pub timeout: bool,
    /// Greatest number of elements. A dynamic set needs one.
    pub size: Option<u32>,
}

impl<'a> Set<'a> {
    /// A plain set of single keys.
    #[must_use]
    pub fn new(name: &'a str, key: &'a [Field]) -> Self {
        Set {
            name,
            key,
            values: Values::None,
            interval: false,
            dynamic: false,
            timeout: false,
            size: None,
        }
    }

    /// A map from key to value.
    #[must_use]
    pub fn map(name: &'a str, key: &'a [Field], values: &'a [Field]) -> Self {
        Set { values: Values::Fields(values), ..Set::new(name, key) }
    }

    /// A map from key to verdict.
    #[must_use]
    pub fn verdict_map(name: &'a str, key: &'a [Field]) -> Self {
        Set { values: Values::Verdict, ..Set::new(name, key) }
    }

    /// The flags and the key length that a dump shows for such a set.
    #[must_use]
    pub fn expected(&self) -> (u32, u32) {
        (self.flags(), u32::try_from(length_of(self.key)).unwrap_or(0))
    }

    pub(crate) fn flags(&self) -> u32 {
        [
            (self.interval, 0x4),
            (self.values != Values::None, 0x8),
            (self.timeout, 0x10),
            (self.dynamic, 0x20),
            (self.interval && self.key.len() > 1, 0x80),
        ]
        .into_iter()
        .filter_map(|(set, bit)| set.then_some(bit))
        .sum()
    }
}

/// What an element carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// Nothing: an element of a plain set.
    None,
    /// The value of a map.
    Bytes(&'a [u8]),
    /// The verdict of a verdict map.
    Verdict(Verdict<'a>),
}

/// An element to add or to remove.
#[derive(Clone, Copy, Debug)]
pub struct Element<'a> {
    /// Key; in a set of ranges the first key.
    pub key: &'a [u8],
    /// In a set of ranges the last key (included).
    pub last: Option<&'a [u8]>,
    /// What it carries; ignored when it is removed.
    pub value: Value<'a>,
    /// When it goes by itself.
    pub timeout: Option<Duration>,
}

impl<'a> Element<'a> {
    /// An element of a plain set.
    #[must_use]
    pub fn key(key: &'a [u8]) -> Self {
        Element { key, last: None, value: Value::None, timeout: None }
    }

    /// A range of a set of ranges, both ends included.
    #[must_use]
    pub fn range(first: &'a [u8], last: &'a [u8]) -> Self {
        Element { last: Some(last), ..Element::key(first) }
    }

    /// An element of a map.
    #[must_use]
    pub fn value(key: &'a [u8], value: &'a [u8]) -> Self {
        Element { value: Value::Bytes(value), ..Element::key(key) }
    }

    /// An element of a verdict map.
    #[must_use]
    pub fn verdict(key: &'a [u8], verdict: Verdict<'a>) -> Self {
        Element { value: Value::Verdict(verdict), ..Element::key(key) }
    }
}

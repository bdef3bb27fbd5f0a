//! Netlink messages as bytes: writing headers and attributes, walking what came back.
//!
//! The few message kinds that keelson sends do not need a full object model; this writer puts attributes straight into
//! the buffer that is sent, and the readers borrow from the buffer that was received.

use std::borrow::Cow;

/// The length of `struct nlmsghdr`.
pub const HEADER_LEN: usize = 16;
/// Set in an attribute's kind when its payload is attributes again.
const NESTED: u16 = 1 << 15;
/// The bits of an attribute's kind that name it (without "nested" and "network byte order").
const KIND_MASK: u16 = 0x3fff;

/// One netlink message under construction; the length fields are kept right at all times.
#[derive(Debug, Clone)]
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// Starts a message of `kind` with `flags` (`NLM_F_*`) and the family's own fixed header (`ifinfomsg`, `nfgenmsg`...).
    #[must_use]
    pub fn new(kind: u16, flags: u16, family_header: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(family_header);
        let mut message = Self { bytes };
        message.pad();
        message
    }

    /// Appends an attribute.
    pub fn attr(&mut self, kind: u16, payload: &[u8]) -> &mut Self {
        let length = u16::try_from(payload.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(payload);
        self.pad();
        self
    }

    /// Appends a number in host byte order, as rtnetlink wants it.
    pub fn attr_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Appends a text with its closing zero byte.
    pub fn attr_text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Appends an attribute whose payload is what `fill` appends.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        self.nest_exact(kind | NESTED, fill)
    }

    /// As [`Self::nest`] without the "nested" bit, for old interfaces that compare the kind as it stands.
    pub fn nest_exact(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        fill(self);
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.pad();
        self
    }

    /// Appends raw bytes, such as the peer's `ifinfomsg` inside a veth's link data.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// The finished bytes with the given sequence number and further flags.
    #[must_use]
    pub fn finish(mut self, sequence: u32, more_flags: u16) -> Vec<u8> {
        let flags = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]) | more_flags;
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
    }
}

/// One received message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply<'a> {
    /// The message kind (`RTM_*`, `NLMSG_*`, or subsystem << 8 | kind for nfnetlink).
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// The number of the request that this answers; 0 in notifications.
    pub sequence: u32,
    /// What follows the netlink header.
    pub payload: Cow<'a, [u8]>,
}

impl Reply<'_> {
    /// The same without a borrow of the receive buffer.
    #[must_use]
    pub fn into_owned(self) -> Reply<'static> {
        Reply {
            kind: self.kind,
            flags: self.flags,
            sequence: self.sequence,
            payload: Cow::Owned(self.payload.into_owned()),
        }
    }

    /// The attributes behind a family header of `header_len` bytes.
    #[must_use]
    pub fn attrs(&self, header_len: usize) -> Attrs<'_> {
        Attrs::new(self.payload.get(header_len.next_multiple_of(4)..).unwrap_or_default())
    }
}

/// Walks the messages of one received datagram. Stops at the first one whose length does not fit.
#[derive(Debug)]
pub struct Replies<'a>(&'a [u8]);

impl<'a> Replies<'a> {
    /// Starts at the beginning of `datagram`.
    #[must_use]
    pub fn new(datagram: &'a [u8]) -> Self {
        Self(datagram)
    }
}

impl<'a> Iterator for Replies<'a> {
    type Item = Reply<'a>;

    fn next(&mut self) -> Option<Reply<'a>> {
        let length = usize::try_from(u32_at(self.0, 0)?).ok()?;
        let message = self.0.get(..length).filter(|m| m.len() >= HEADER_LEN)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Reply {
            kind: u16_at(message, 4)?,
            flags: u16_at(message, 6)?,
            sequence: u32_at(message, 8)?,
            payload: Cow::Borrowed(&message[HEADER_LEN..]),
        })
    }
}

/// Walks attributes as (kind, payload), the flag bits taken off the kind.
#[derive(Debug, Clone)]
pub struct Attrs<'a>(&'a [u8]);

impl<'a> Attrs<'a> {
    /// Walks the attributes in `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The payload of the first attribute of `kind`.
    #[must_use]
    pub fn find(&self, kind: u16) -> Option<&'a [u8]> {
        self.clone().find_map(|(found, payload)| (found == kind).then_some(payload))
    }

    /// The attributes inside the first attribute of `kind`.
    #[must_use]
    pub fn nested(&self, kind: u16) -> Option<Attrs<'a>> {
        self.find(kind).map(Attrs::new)
    }

    /// A number in host byte order.
    #[must_use]
    pub fn u32(&self, kind: u16) -> Option<u32> {
        u32_at(self.find(kind)?, 0)
    }

    /// A text without its closing zero byte.
    #[must_use]
    pub fn text(&self, kind: u16) -> Option<String> {
        self.find(kind).map(text)
    }
}

impl<'a> Iterator for Attrs<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16_at(self.0, 0)?);
        let kind = u16_at(self.0, 2)? & KIND_MASK;
        let payload = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    }
}

/// A text attribute's content up to its first zero byte.
#[must_use]
pub fn text(payload: &[u8]) -> String {
    let end = payload.iter().position(|byte| *byte == 0).unwrap_or(payload.len());
    String::from_utf8_lossy(&payload[..end]).into_owned()
}

/// The host-order number at `offset`, if the bytes reach that far.
#[must_use]
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..offset + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// The host-order number at `offset`, if the bytes reach that far.
#[must_use]
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..offset + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut message = Message::new(16, 1, &[7; 5]);
        message.attr_text(3, "eth0").nest(18, |m| {
            m.attr_u32(1, 1500);
        });
        message.attr(9, &[1]);
        let bytes = message.finish(77, 4);
        assert_eq!(bytes.len() % 4, 0);
        let reply = Replies::new(&bytes).next().unwrap();
        assert_eq!((reply.kind, reply.flags, reply.sequence), (16, 5, 77));
        let attrs = reply.attrs(5);
        assert_eq!(attrs.text(3).unwrap(), "eth0");
        assert_eq!(attrs.nested(18).unwrap().u32(1), Some(1500));
        assert_eq!(attrs.find(9), Some(&[1][..]));
        assert_eq!(attrs.find(10), None);
    }

    proptest::proptest! {
        #[test]
        fn readers_survive_any_bytes(bytes: Vec<u8>) {
            for reply in Replies::new(&bytes).take(64) {
                let _count = reply.attrs(16).take(64).count();
            }
        }
    }
}

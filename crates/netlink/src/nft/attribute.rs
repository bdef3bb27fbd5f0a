//! Netlink attributes: a writer that appends in place and a reader that borrows.
//!
//! nf_tables numbers are big endian, strings end in NUL, and everything is padded to four bytes.

const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
pub(crate) const HEADER_LEN: usize = 4;

/// Appends attributes to a message under construction.
pub(crate) struct Writer<'a> {
    buffer: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(buffer: &'a mut Vec<u8>) -> Self {
        Writer { buffer }
    }

    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(HEADER_LEN + value.len()).unwrap_or(u16::MAX);
        self.buffer.extend_from_slice(&length.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(value);
        self.pad();
    }

    pub(crate) fn u32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(crate) fn u64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        let length = u16::try_from(HEADER_LEN + value.len() + 1).unwrap_or(u16::MAX);
        self.buffer.extend_from_slice(&length.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(value.as_bytes());
        self.buffer.push(0);
        self.pad();
    }

    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Writer<'_>)) {
        let start = self.open(kind);
        fill(self);
        self.close(start);
    }

    /// Appends attributes that were encoded before.
    pub(crate) fn raw(&mut self, encoded: &[u8]) {
        self.buffer.extend_from_slice(encoded);
    }

    /// Starts a nested attribute whose end is not known yet; give the result to [`Writer::close`].
    pub(crate) fn open(&mut self, kind: u16) -> usize {
        let start = self.buffer.len();
        self.buffer.extend_from_slice(&[0, 0]);
        self.buffer.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        start
    }

    pub(crate) fn close(&mut self, start: usize) {
        let length = u16::try_from(self.buffer.len() - start).unwrap_or(u16::MAX);
        self.buffer[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    fn pad(&mut self) {
        let padded = self.buffer.len().next_multiple_of(4);
        self.buffer.resize(padded, 0);
    }
}

/// Walks the attributes of a message or of a nested attribute: `(kind, value)`.
#[derive(Clone)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    /// The value of the first attribute of that kind.
    pub(crate) fn find(bytes: &'a [u8], kind: u16) -> Option<&'a [u8]> {
        Reader::new(bytes).find_map(|(found, value)| (found == kind).then_some(value))
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes([*self.rest.first()?, *self.rest.get(1)?]));
        let kind = u16::from_ne_bytes([*self.rest.get(2)?, *self.rest.get(3)?]);
        if length < HEADER_LEN || length > self.rest.len() {
            self.rest = &[];
            return None;
        }
        let value = &self.rest[HEADER_LEN..length];
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind & TYPE_MASK, value))
    }
}

pub(crate) fn read_u32(value: &[u8]) -> u32 {
    value.try_into().map_or(0, u32::from_be_bytes)
}

pub(crate) fn read_u64(value: &[u8]) -> u64 {
    value.try_into().map_or(0, u64::from_be_bytes)
}

pub(crate) fn read_text(value: &[u8]) -> &str {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    std::str::from_utf8(&value[..end]).unwrap_or("?")
}

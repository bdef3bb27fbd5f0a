//! Frames as bytes. Data frames are handed on as they arrive, so no frame is ever buffered whole;
//! control frames are small and bounded.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::headers::{Packer, Unpacker};

/// The version bits of every control frame.
const VERSION: u16 = 3;
/// Control frames carry header blocks of a few hundred bytes here.
const MAX_CONTROL: usize = 16 * 1024;

const FLAG_FIN: u8 = 1;
const FLAG_UNIDIRECTIONAL: u8 = 2;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// A number that names a stream within its connection.
pub type StreamId = u32;

/// One frame, or a part of a data frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    SynStream {
        stream: StreamId,
        fin: bool,
        one_way: bool,
        headers: Vec<(String, String)>,
    },
    SynReply {
        stream: StreamId,
        fin: bool,
        headers: Vec<(String, String)>,
    },
    Reset {
        stream: StreamId,
        status: u32,
    },
    Ping {
        id: u32,
    },
    GoAway {
        last_stream: StreamId,
        status: u32,
    },
    Headers {
        stream: StreamId,
        fin: bool,
        headers: Vec<(String, String)>,
    },
    Data {
        stream: StreamId,
        fin: bool,
        data: Bytes,
    },
    /// Settings, window updates and kinds that nobody has defined: read and left alone.
    Ignored,
}

/// Why what was received cannot be SPDY; the connection is of no use any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("SPDY version {0} where only 3 is spoken")]
    Version(u16),
    #[error("SPDY control frame of {0} bytes, more than allowed")]
    TooLarge(usize),
    #[error("SPDY frame of type {0} is too short")]
    TooShort(u16),
    #[error("SPDY header block: {0}")]
    Headers(&'static str),
    #[error("SPDY stream {0} opened twice")]
    StreamTwice(StreamId),
}

/// Bytes to frames.
pub struct Decoder {
    buffer: BytesMut,
    unpacker: Unpacker,
    /// The data frame whose rest is still to come.
    data: Option<DataRest>,
}

struct DataRest {
    stream: StreamId,
    fin: bool,
    missing: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { buffer: BytesMut::new(), unpacker: Unpacker::new(), data: None }
    }
}

impl Decoder {
    /// Bytes that wait for the rest of their frame.
    pub(crate) fn held(&self) -> usize {
        self.buffer.len()
    }

    /// Adds what was received.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// When the bytes are no SPDY; every later call would be wrong as well.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if let Some(rest) = self.data.take() {
            return Ok(self.next_data(rest));
        }
        let Some(&[a, b, c, d, flags, high, middle, low]) = self.buffer.first_chunk::<8>() else {
            return Ok(None);
        };
        let word = u32::from_be_bytes([a, b, c, d]);
        let length = u32::from_be_bytes([0, high, middle, low]);
        let length = usize::try_from(length).map_err(|_| FrameError::TooLarge(usize::MAX))?;
        if word >> 31 == 0 {
            self.buffer.advance(8);
            let rest = DataRest { stream: word, fin: flags & FLAG_FIN != 0, missing: length };
            return Ok(self.next_data(rest));
        }
        let version = u16::from_be_bytes([a & 0x7f, b]);
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if length > MAX_CONTROL {
            return Err(FrameError::TooLarge(length));
        }
        let kind = u16::from_be_bytes([c, d]);
        if self.buffer.len() < 8 + length {
            return Ok(None);
        }
        self.buffer.advance(8);
        let body = self.buffer.split_to(length).freeze();
        self.control(kind, flags, body).map(Some)
    }

    /// What there is of a data frame; only its last part carries the end of the stream.
    fn next_data(&mut self, mut rest: DataRest) -> Option<Frame> {
        if self.buffer.is_empty() && rest.missing > 0 {
            self.data = Some(rest);
            return None;
        }
        let data = self.buffer.split_to(rest.missing.min(self.buffer.len())).freeze();
        rest.missing -= data.len();
        let frame = Frame::Data { stream: rest.stream, fin: rest.fin && rest.missing == 0, data };
        if rest.missing > 0 {
            self.data = Some(rest);
        }
        Some(frame)
    }

    fn control(&mut self, kind: u16, flags: u8, mut body: Bytes) -> Result<Frame, FrameError> {
        let needed = match kind {
            SYN_STREAM => 10,
            SYN_REPLY | HEADERS | PING => 4,
            RST_STREAM | GOAWAY => 8,
            _ => 0,
        };
        if body.len() < needed {
            return Err(FrameError::TooShort(kind));
        }
        let fin = flags & FLAG_FIN != 0;
        Ok(match kind {
            SYN_STREAM => {
                let stream = take_stream(&mut body);
                // The associated stream, the priority and the credential slot.
                body.advance(6);
                let headers = self.unpacker.unpack(&body)?;
                Frame::SynStream { stream, fin, one_way: flags & FLAG_UNIDIRECTIONAL != 0, headers }
            }
            SYN_REPLY => Frame::SynReply {
                stream: take_stream(&mut body),
                fin,
                headers: self.unpacker.unpack(&body)?,
            },
            HEADERS => Frame::Headers {
                stream: take_stream(&mut body),
                fin,
                headers: self.unpacker.unpack(&body)?,
            },
            RST_STREAM => Frame::Reset { stream: take_stream(&mut body), status: body.get_u32() },
            GOAWAY => Frame::GoAway { last_stream: take_stream(&mut body), status: body.get_u32() },
            PING => Frame::Ping { id: body.get_u32() },
            SETTINGS | WINDOW_UPDATE => Frame::Ignored,
            _ => Frame::Ignored,
        })
    }
}

fn take_stream(body: &mut Bytes) -> StreamId {
    body.get_u32() & 0x7fff_ffff
}

/// Frames to bytes.
pub struct Encoder {
    packer: Packer,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { packer: Packer::new() }
    }
}

impl Encoder {
    /// Appends the bytes of a frame. Data longer than a frame can be must be cut by the caller.
    pub fn put(&mut self, frame: &Frame, out: &mut BytesMut) {
        match frame {
            Frame::SynStream { stream, fin, one_way, headers } => {
                let block = self.packer.pack(headers);
                let flags = flag(*fin, FLAG_FIN) | flag(*one_way, FLAG_UNIDIRECTIONAL);
                put_control(out, SYN_STREAM, flags, 10 + block.len());
                out.put_u32(*stream);
                out.put_bytes(0, 6);
                out.put_slice(&block);
            }
            Frame::SynReply { stream, fin, headers } => {
                self.put_block(out, SYN_REPLY, *stream, *fin, headers);
            }
            Frame::Headers { stream, fin, headers } => {
                self.put_block(out, HEADERS, *stream, *fin, headers);
            }
            Frame::Reset { stream, status } => {
                put_control(out, RST_STREAM, 0, 8);
                out.put_u32(*stream);
                out.put_u32(*status);
            }
            Frame::GoAway { last_stream, status } => {
                put_control(out, GOAWAY, 0, 8);
                out.put_u32(*last_stream);
                out.put_u32(*status);
            }
            Frame::Ping { id } => {
                put_control(out, PING, 0, 4);
                out.put_u32(*id);
            }
            Frame::Data { stream, fin, data } => {
                out.put_u32(*stream & 0x7fff_ffff);
                put_length(out, flag(*fin, FLAG_FIN), data.len());
                out.put_slice(data);
            }
            Frame::Ignored => {}
        }
    }

    /// Appends the frame that opens a stream, with a header block that need not make sense.
    pub(crate) fn put_plain_block(&mut self, stream: StreamId, plain: &[u8], out: &mut BytesMut) {
        let block = self.packer.pack_plain(plain);
        put_control(out, SYN_STREAM, 0, 10 + block.len());
        out.put_u32(stream);
        out.put_bytes(0, 6);
        out.put_slice(&block);
    }

    fn put_block(
        &mut self,
        out: &mut BytesMut,
        kind: u16,
        stream: StreamId,
        fin: bool,
        headers: &[(String, String)],
    ) {
        let block = self.packer.pack(headers);
        put_control(out, kind, flag(fin, FLAG_FIN), 4 + block.len());
        out.put_u32(stream);
        out.put_slice(&block);
    }
}

fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

fn put_control(out: &mut BytesMut, kind: u16, flags: u8, length: usize) {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    put_length(out, flags, length);
}

/// Flags and the 24 bits of a length.
fn put_length(out: &mut BytesMut, flags: u8, length: usize) {
    let length = u32::try_from(length).unwrap_or(u32::MAX) & 0x00ff_ffff;
    out.put_u32(u32::from(flags) << 24 | length);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode_all(bytes: &[u8], piece: usize) -> Result<Vec<Frame>, FrameError> {
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for part in bytes.chunks(piece.max(1)) {
            decoder.feed(part);
            while let Some(frame) = decoder.next_frame()? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    fn headers() -> impl Strategy<Value = Vec<(String, String)>> {
        prop::collection::vec(("[a-z-]{1,12}", "[ -~]{0,40}"), 0..6)
    }

    fn control_frame() -> impl Strategy<Value = Frame> {
        let stream = 0_u32..1 << 31;
        prop_oneof![
            (stream.clone(), any::<bool>(), any::<bool>(), headers()).prop_map(
                |(stream, fin, one_way, headers)| Frame::SynStream {
                    stream,
                    fin,
                    one_way,
                    headers
                }
            ),
            (stream.clone(), any::<bool>(), headers())
                .prop_map(|(stream, fin, headers)| Frame::SynReply { stream, fin, headers }),
            (stream.clone(), any::<bool>(), headers())
                .prop_map(|(stream, fin, headers)| Frame::Headers { stream, fin, headers }),
            (stream.clone(), any::<u32>())
                .prop_map(|(stream, status)| Frame::Reset { stream, status }),
            (stream, any::<u32>())
                .prop_map(|(last_stream, status)| Frame::GoAway { last_stream, status }),
            any::<u32>().prop_map(|id| Frame::Ping { id }),
        ]
    }

    proptest! {
        #[test]
        fn control_frames_come_back_however_they_are_cut(
            frames in prop::collection::vec(control_frame(), 1..8),
            piece in 1_usize..64,
        ) {
            let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
            frames.iter().for_each(|frame| encoder.put(frame, &mut bytes));
            prop_assert_eq!(decode_all(&bytes, piece).unwrap(), frames);
        }

        #[test]
        fn data_comes_back_whole_and_ends_once(
            data in prop::collection::vec(any::<u8>(), 0..300),
            fin: bool,
            piece in 1_usize..64,
        ) {
            let mut bytes = BytesMut::new();
            let frame = Frame::Data { stream: 5, fin, data: Bytes::from(data.clone()) };
            Encoder::default().put(&frame, &mut bytes);
            let (mut got, mut ends) = (Vec::new(), 0);
            for frame in decode_all(&bytes, piece).unwrap() {
                let Frame::Data { stream: 5, fin, data } = frame else { panic!("{frame:?}") };
                prop_assert_eq!(ends, 0);
                got.extend_from_slice(&data);
                ends += usize::from(fin);
            }
            prop_assert_eq!((got, ends), (data, usize::from(fin)));
        }

        #[test]
        fn garbage_never_panics(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            piece in 1_usize..64,
        ) {
            drop(decode_all(&bytes, piece));
        }

        #[test]
        fn a_flipped_bit_never_panics(
            frames in prop::collection::vec(control_frame(), 1..6),
            position: prop::sample::Index,
            bit in 0_u8..8,
        ) {
            let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
            frames.iter().for_each(|frame| encoder.put(frame, &mut bytes));
            let at = position.index(bytes.len());
            bytes[at] ^= 1 << bit;
            drop(decode_all(&bytes, 16));
        }
    }

    /// The first bytes that every SPDY/3 implementation's compressor writes: the zlib header, then
    /// the checksum of the dictionary of the standard.
    #[test]
    fn the_dictionary_is_the_one_of_the_standard() {
        let mut bytes = BytesMut::new();
        let frame = Frame::SynReply { stream: 1, fin: false, headers: Vec::new() };
        Encoder::default().put(&frame, &mut bytes);
        assert_eq!(bytes[14..18], [0xe3, 0xc6, 0xa7, 0xc2]);
    }

    #[test]
    fn a_header_block_cannot_grow_without_bound() {
        let headers = vec![("x".to_owned(), String::new()); 65];
        let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
        encoder.put(&Frame::SynReply { stream: 1, fin: false, headers }, &mut bytes);
        let refused = FrameError::Headers("more pairs than allowed");
        assert_eq!(decode_all(&bytes, 512), Err(refused));
    }

    #[test]
    fn other_versions_and_huge_frames_are_refused() {
        assert_eq!(decode_all(&[0x80, 2, 0, 1, 0, 0, 0, 0], 8), Err(FrameError::Version(2)));
        let huge = [0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff];
        assert_eq!(decode_all(&huge, 8), Err(FrameError::TooLarge(0x00ff_ffff)));
    }
}

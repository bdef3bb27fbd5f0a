//! Header blocks: name and value pairs, compressed with zlib and a dictionary that both sides know.
//! One compressor and one decompressor serve a whole connection, so blocks must stay in order.

use flate2::{Decompress, FlushDecompress, Status};

use super::frame::FrameError;

/// What a header block may become when unpacked; anything larger is an attack. The ones of Kubernetes' clients have
/// three pairs and some hundred bytes.
const MAX_UNPACKED: usize = 16 * 1024;
const MAX_PAIRS: usize = 64;

pub(super) type Headers = Vec<(String, String)>;

pub(super) struct Unpacker {
    inflate: Decompress,
}

impl Unpacker {
    pub(super) fn new() -> Self {
        Self { inflate: Decompress::new(true) }
    }

    pub(super) fn unpack(&mut self, mut block: &[u8]) -> Result<Headers, FrameError> {
        let mut unpacked = Vec::with_capacity(4096);
        while !block.is_empty() {
            if unpacked.len() > MAX_UNPACKED {
                return Err(FrameError::Headers("larger than allowed"));
            }
            unpacked.reserve(4096);
            let (read, written) = (self.inflate.total_in(), self.inflate.total_out());
            let flush = FlushDecompress::Sync;
            let result = self.inflate.decompress_vec(block, &mut unpacked, flush);
            let taken = usize::try_from(self.inflate.total_in() - read).unwrap_or(usize::MAX);
            block = block.get(taken..).unwrap_or_default();
            match result {
                Ok(Status::StreamEnd) => return Err(FrameError::Headers("end of compression")),
                Ok(_) if taken == 0 && self.inflate.total_out() == written => {
                    return Err(FrameError::Headers("compressed data that leads nowhere"));
                }
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate
                        .set_dictionary(DICTIONARY)
                        .map_err(|_| FrameError::Headers("another dictionary"))?;
                }
                Err(_) => return Err(FrameError::Headers("broken compression")),
            }
        }
        self.rest(&mut unpacked)?;
        parse(&unpacked)
    }

    /// Takes what the decompressor still holds because the output was full when the input ended.
    fn rest(&mut self, unpacked: &mut Vec<u8>) -> Result<(), FrameError> {
        loop {
            if unpacked.len() > MAX_UNPACKED {
                return Err(FrameError::Headers("larger than allowed"));
            }
            unpacked.reserve(4096);
            let before = unpacked.len();
            // Without input the decompressor reports "no progress" as an error: that is the end.
            let result = self.inflate.decompress_vec(&[], unpacked, FlushDecompress::Sync);
            if result.is_err() || unpacked.len() == before {
                return Ok(());
            }
        }
    }
}

/// Header blocks as zlib that is not compressed: this side sends few headers, and a compressor holds a quarter of a
/// megabyte per connection.
pub(super) struct Packer {
    begun: bool,
}

/// The beginning of a zlib stream with the dictionary of SPDY/3, which its checksum names.
const ZLIB_HEAD: [u8; 6] = [0x78, 0x20, 0xe3, 0xc6, 0xa7, 0xc2];
/// A stored block that is not the last one.
const STORED: u8 = 0;
/// An empty stored block. Go's readers hand nothing on before it.
const FLUSH: [u8; 5] = [0, 0, 0, 0xff, 0xff];

impl Packer {
    pub(super) fn new() -> Self {
        Self { begun: false }
    }

    pub(super) fn pack(&mut self, headers: &[(String, String)]) -> Vec<u8> {
        let mut plain = Vec::new();
        put_length(&mut plain, headers.len());
        for (name, value) in headers {
            for text in [name.to_ascii_lowercase().as_bytes(), value.as_bytes()] {
                put_length(&mut plain, text.len());
                plain.extend_from_slice(text);
            }
        }
        self.pack_plain(&plain)
    }

    /// Packs a block as it is, also one that makes no sense.
    pub(super) fn pack_plain(&mut self, plain: &[u8]) -> Vec<u8> {
        let mut packed = Vec::with_capacity(plain.len() + 16);
        if !std::mem::replace(&mut self.begun, true) {
            packed.extend_from_slice(&ZLIB_HEAD);
        }
        for part in plain.chunks(usize::from(u16::MAX)) {
            let length = u16::try_from(part.len()).unwrap_or(u16::MAX);
            packed.push(STORED);
            packed.extend_from_slice(&length.to_le_bytes());
            packed.extend_from_slice(&(!length).to_le_bytes());
            packed.extend_from_slice(part);
        }
        packed.extend_from_slice(&FLUSH);
        packed
    }
}

fn put_length(out: &mut Vec<u8>, length: usize) {
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
}

fn parse(mut block: &[u8]) -> Result<Headers, FrameError> {
    let count = take_length(&mut block)?;
    if count > MAX_PAIRS {
        return Err(FrameError::Headers("more pairs than allowed"));
    }
    let mut headers = Vec::with_capacity(count);
    for _ in 0..count {
        let name = take_text(&mut block)?.to_ascii_lowercase();
        let value = take_text(&mut block)?;
        headers.push((name, value));
    }
    Ok(headers)
}

fn take_length(block: &mut &[u8]) -> Result<usize, FrameError> {
    let (length, rest) =
        block.split_first_chunk::<4>().ok_or(FrameError::Headers("too short for its names"))?;
    *block = rest;
    usize::try_from(u32::from_be_bytes(*length)).map_err(|_| FrameError::Headers("too large"))
}

fn take_text(block: &mut &[u8]) -> Result<String, FrameError> {
    let length = take_length(block)?;
    let (text, rest) =
        block.split_at_checked(length).ok_or(FrameError::Headers("too short for its names"))?;
    *block = rest;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// Section 2.6.10.1 of the SPDY/3 draft.
const DICTIONARY: &[u8] = include_bytes!("dictionary.bin");

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;

    /// As other implementations send them.
    fn compressed(plain: &[u8]) -> Vec<u8> {
        let mut deflate = Compress::new(Compression::best(), true);
        assert_eq!(deflate.set_dictionary(DICTIONARY).unwrap().to_be_bytes(), ZLIB_HEAD[2..]);
        let mut packed = Vec::with_capacity(plain.len() + 64);
        deflate.compress_vec(plain, &mut packed, FlushCompress::Sync).unwrap();
        packed
    }

    #[test]
    fn blocks_that_were_compressed_are_read() {
        let packed = compressed(&[&[0, 0, 0, 1, 0, 0, 0, 4][..], b"Port", &[0; 4]].concat());
        let headers = Unpacker::new().unpack(&packed).unwrap();
        assert_eq!(headers, [("port".to_owned(), String::new())]);
    }

    #[test]
    fn a_small_block_that_becomes_large_is_refused() {
        let packed = compressed(&[0; 4_000_000]);
        assert!(packed.len() < 16 * 1024);
        let result = Unpacker::new().unpack(&packed);
        assert_eq!(result, Err(FrameError::Headers("larger than allowed")));
    }
}

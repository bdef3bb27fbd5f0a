//! Header blocks: name and value pairs, compressed with zlib and a dictionary that both sides know.
//! One compressor and one decompressor serve a whole connection, so blocks must stay in order.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

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

pub(super) struct Packer {
    deflate: Compress,
}

impl Packer {
    pub(super) fn new() -> Self {
        let mut deflate = Compress::new(Compression::fast(), true);
        // Setting it can only fail on a compressor that was used already, and a stream without a
        // dictionary is as valid as one with it.
        drop(deflate.set_dictionary(DICTIONARY));
        Self { deflate }
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

    /// Compresses a block as it is, also one that makes no sense.
    pub(super) fn pack_plain(&mut self, plain: &[u8]) -> Vec<u8> {
        let mut packed = Vec::with_capacity(plain.len() + 64);
        let mut rest = plain;
        loop {
            packed.reserve(256);
            let read = self.deflate.total_in();
            let result = self.deflate.compress_vec(rest, &mut packed, FlushCompress::Sync);
            let taken = usize::try_from(self.deflate.total_in() - read).unwrap_or(usize::MAX);
            rest = rest.get(taken..).unwrap_or_default();
            // A flush is complete when it left room in the output.
            if result.is_err() || (rest.is_empty() && packed.len() < packed.capacity()) {
                return packed;
            }
        }
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

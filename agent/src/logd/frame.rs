//! What goes over the socket to somebody who is attached: one byte that says what it is, four that say how long.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// A read from a pipe has at most 64 KiB; more than this is not from us.
const MAX_DATA: usize = 1 << 20;

const ENDED: u8 = 0;
const TOO_SLOW: u8 = 3;
const ATTACHED: u8 = 4;

/// One of the two things that a process prints to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout = 1,
    Stderr = 2,
}

impl Stream {
    /// The name of its pipe, and what the log calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// What is printed from now on follows.
    Attached,
    Output(Stream, Bytes),
    /// The container prints no more.
    Ended,
    /// More was printed than was taken; the rest is only in the log.
    TooSlow,
}

impl Frame {
    pub(crate) fn encode(&self) -> Bytes {
        let (kind, data): (u8, &[u8]) = match self {
            Self::Attached => (ATTACHED, &[]),
            Self::Output(stream, data) => (*stream as u8, data),
            Self::Ended => (ENDED, &[]),
            Self::TooSlow => (TOO_SLOW, &[]),
        };
        let mut bytes = BytesMut::with_capacity(5 + data.len());
        bytes.put_u8(kind);
        // Pieces are no longer than a pipe is deep.
        bytes.put_u32(u32::try_from(data.len()).unwrap_or(u32::MAX));
        bytes.put_slice(data);
        bytes.freeze()
    }

    /// The next frame. Not to be cancelled: what was read of it would be lost.
    pub(crate) async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Frame> {
        let kind = from.read_u8().await?;
        let length = from.read_u32().await?;
        let stream = match (kind, length) {
            (ATTACHED, 0) => return Ok(Self::Attached),
            (ENDED, 0) => return Ok(Self::Ended),
            (TOO_SLOW, 0) => return Ok(Self::TooSlow),
            (1, _) => Stream::Stdout,
            (2, _) => Stream::Stderr,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        let length = usize::try_from(length).ok().filter(|length| *length <= MAX_DATA);
        let mut data = vec![0; length.ok_or(io::ErrorKind::InvalidData)?];
        from.read_exact(&mut data).await?;
        Ok(Self::Output(stream, data.into()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(mut bytes: &[u8]) -> io::Result<Frame> {
        futures_util::FutureExt::now_or_never(Frame::read(&mut bytes)).unwrap()
    }

    #[test]
    fn frames_arrive_as_they_were_sent() {
        let data = Bytes::from_static(b"hello");
        for frame in [
            Frame::Attached,
            Frame::Output(Stream::Stdout, data.clone()),
            Frame::Output(Stream::Stderr, data),
            Frame::Ended,
            Frame::TooSlow,
        ] {
            assert_eq!(read(&frame.encode()).unwrap(), frame);
        }
    }

    #[test]
    fn the_answer_of_a_log_writer_that_cannot_do_this_is_no_frame() {
        assert_eq!(read(b"done\n").unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            drop(read(&bytes));
        }
    }
}

//! Messages with a channel number in front: `channel.k8s.io` and its relatives. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Announces, in v5, that a channel gets no more data.
const CLOSE_SIGNAL: u8 = 255;

/// How a message carries channel and data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// One byte, then the data.
    Binary { close_signals: bool },
    /// One digit, then the data in base64; for clients that can only send text.
    Base64,
}

/// A message that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    Data { channel: u8, data: Bytes },
    Close { channel: u8 },
}

/// A message to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outgoing {
    Binary(Bytes),
    Text(String),
}

impl Encoding {
    /// What a message says.
    ///
    /// # Errors
    /// When it cannot be a message of this encoding.
    pub fn decode(self, mut message: Bytes) -> Result<Incoming, &'static str> {
        if message.is_empty() {
            return Err("a message without a channel number");
        }
        let first = message.get_u8();
        match self {
            Self::Binary { close_signals: true } if first == CLOSE_SIGNAL => {
                if message.len() != 1 {
                    return Err("a close signal that does not name one channel");
                }
                Ok(Incoming::Close { channel: message.get_u8() })
            }
            Self::Binary { .. } => Ok(Incoming::Data { channel: first, data: message }),
            Self::Base64 => {
                let channel = first.wrapping_sub(b'0');
                if channel > 9 {
                    return Err("a channel number that is no digit");
                }
                let data = STANDARD.decode(&message).map_err(|_| "data that is not base64")?;
                Ok(Incoming::Data { channel, data: data.into() })
            }
        }
    }

    /// The message for some data.
    pub fn encode(self, channel: u8, data: &[u8]) -> Outgoing {
        match self {
            Self::Binary { .. } => {
                let mut message = BytesMut::with_capacity(data.len() + 1);
                message.put_u8(channel);
                message.put_slice(data);
                Outgoing::Binary(message.freeze())
            }
            Self::Base64 => Outgoing::Text(format!("{channel}{}", STANDARD.encode(data))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: [Encoding; 3] = [
        Encoding::Binary { close_signals: false },
        Encoding::Binary { close_signals: true },
        Encoding::Base64,
    ];

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            channel in 0_u8..5,
            data in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            for encoding in ALL {
                let bytes = match encoding.encode(channel, &data) {
                    Outgoing::Binary(bytes) => bytes,
                    Outgoing::Text(text) => Bytes::from(text),
                };
                let want = Incoming::Data { channel, data: Bytes::from(data.clone()) };
                prop_assert_eq!(encoding.decode(bytes), Ok(want));
            }
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            for encoding in ALL {
                drop(encoding.decode(Bytes::from(bytes.clone())));
            }
        }
    }

    #[test]
    fn a_close_signal_exists_only_in_v5() {
        let signal = Bytes::from_static(&[255, 0]);
        let [v4, v5, base64] = ALL.map(|encoding| encoding.decode(signal.clone()));
        assert_eq!(v4, Ok(Incoming::Data { channel: 255, data: Bytes::from_static(&[0]) }));
        assert_eq!(v5, Ok(Incoming::Close { channel: 0 }));
        assert!(base64.is_err());
        assert!(ALL[1].decode(Bytes::from_static(&[255])).is_err());
    }
}

//! Data frames: a 28-byte header, then whole records as they stand in the file or spool.
//!
//! Little-endian: kind u8 = 1, flags u8, two zero bytes, handle u32, offset u64, read time u64
//! (milliseconds since 1970), length u32 (uncompressed bytes that follow).

use bytes::{Bytes, BytesMut};
use thiserror::Error;

use super::FRAME_BYTES_MAX;

/// Bytes before the records.
pub const FRAME_HEADER_BYTES: usize = 28;

const KIND_DATA: u8 = 1;

/// zstd level of compressed frames: measured as fast as lz4 on log lines, at twice its ratio.
const ZSTD_LEVEL: i32 = 1;

/// Flags of a data frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FrameFlags {
    /// The records are one zstd frame (RFC 8878).
    pub zstd: bool,
    /// These bytes were sent before.
    pub resend: bool,
    /// The first record goes on from one that was cut.
    pub continues: bool,
}

impl FrameFlags {
    const ZSTD: u8 = 1;
    const RESEND: u8 = 2;
    const CONTINUES: u8 = 4;

    fn bits(self) -> u8 {
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        bit(self.zstd, FrameFlags::ZSTD)
            | bit(self.resend, FrameFlags::RESEND)
            | bit(self.continues, FrameFlags::CONTINUES)
    }

    fn from_bits(bits: u8) -> Option<FrameFlags> {
        let known = FrameFlags::ZSTD | FrameFlags::RESEND | FrameFlags::CONTINUES;
        (bits & !known == 0).then_some(FrameFlags {
            zstd: bits & FrameFlags::ZSTD != 0,
            resend: bits & FrameFlags::RESEND != 0,
            continues: bits & FrameFlags::CONTINUES != 0,
        })
    }
}

/// A run of whole records of one segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DataFrame {
    /// As in `open`.
    pub handle: u32,
    /// What the header says beyond numbers; `zstd` is handled by encode and decode.
    pub flags: FrameFlags,
    /// Offset of the first record in its segment.
    pub offset: u64,
    /// When the sender read it, in milliseconds since 1970.
    pub read_at: u64,
    /// The records.
    pub records: Bytes,
}

/// What is wrong with a binary message; each closes the connection with 1002 or 1009.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum FrameError {
    /// Fewer bytes than a header has.
    #[error("frame of {0} bytes is shorter than its header of {FRAME_HEADER_BYTES}")]
    Short(usize),
    /// Another kind, an unknown flag or a reserved byte that is not zero.
    #[error("frame starts with {0:02x?}, which this version does not know")]
    Unknown([u8; 4]),
    /// The declared length is 0 or over the limit.
    #[error("frame declares {0} bytes, allowed are 1 to {FRAME_BYTES_MAX}")]
    Size(u64),
    /// The declared length is not the real one.
    #[error("frame declares {declared} bytes and has {actual}")]
    Length {
        /// From the header.
        declared: usize,
        /// As counted.
        actual: usize,
    },
    /// zstd could not decompress within the declared length.
    #[error("frame does not decompress to its declared {0} bytes")]
    Zstd(usize),
    /// Offsets past 2^40.
    #[error("frame at offset {0} passes the end of any segment")]
    Offset(u64),
}

impl DataFrame {
    /// The header for [`DataFrame::encode`], over records that are already in their final form.
    fn header(&self, flags: FrameFlags) -> [u8; FRAME_HEADER_BYTES] {
        let mut header = [0; FRAME_HEADER_BYTES];
        header[0] = KIND_DATA;
        header[1] = flags.bits();
        header[4..8].copy_from_slice(&self.handle.to_le_bytes());
        header[8..16].copy_from_slice(&self.offset.to_le_bytes());
        header[16..24].copy_from_slice(&self.read_at.to_le_bytes());
        header[24..28].copy_from_slice(&(self.records.len() as u32).to_le_bytes());
        header
    }

    /// The binary message. With `compress`, the records become one zstd frame where that is
    /// smaller.
    pub fn encode(&self, compress: bool) -> Bytes {
        debug_assert!((1..=FRAME_BYTES_MAX).contains(&self.records.len()));
        let compressed = compress
            .then(|| zstd::bulk::compress(&self.records, ZSTD_LEVEL).ok())
            .flatten()
            .filter(|compressed| compressed.len() < self.records.len());
        let flags = FrameFlags { zstd: compressed.is_some(), ..self.flags };
        let body = compressed.as_deref().unwrap_or(&self.records);
        let mut message = BytesMut::with_capacity(FRAME_HEADER_BYTES + body.len());
        message.extend_from_slice(&self.header(flags));
        message.extend_from_slice(body);
        message.freeze()
    }

    /// Writes the header into the first [`FRAME_HEADER_BYTES`] bytes of `message`, whose rest are
    /// the records: the sender's way without a copy.
    pub fn encode_in_place(
        mut message: Vec<u8>,
        handle: u32,
        flags: FrameFlags,
        offset: u64,
        read_at: u64,
    ) -> Bytes {
        let length = message.len() - FRAME_HEADER_BYTES;
        message[0] = KIND_DATA;
        message[1] = flags.bits();
        message[2..4].fill(0);
        message[4..8].copy_from_slice(&handle.to_le_bytes());
        message[8..16].copy_from_slice(&offset.to_le_bytes());
        message[16..24].copy_from_slice(&read_at.to_le_bytes());
        message[24..28].copy_from_slice(&(length as u32).to_le_bytes());
        message.into()
    }

    /// Reads a binary message, decompressing within the declared size (no bomb passes, I7).
    pub fn decode(mut message: Bytes) -> Result<DataFrame, FrameError> {
        if message.len() < FRAME_HEADER_BYTES {
            return Err(FrameError::Short(message.len()));
        }
        let header = message.split_to(FRAME_HEADER_BYTES);
        let start = [header[0], header[1], header[2], header[3]];
        let flags = FrameFlags::from_bits(header[1])
            .filter(|_| header[0] == KIND_DATA && header[2] == 0 && header[3] == 0)
            .ok_or(FrameError::Unknown(start))?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let handle = (number(4) & 0xffff_ffff) as u32;
        let offset = number(8);
        let declared = (number(20) >> 32) as usize;
        if !(1..=FRAME_BYTES_MAX).contains(&declared) {
            return Err(FrameError::Size(declared as u64));
        }
        if offset.saturating_add(declared as u64) >= crate::record::OFFSET_MAX {
            return Err(FrameError::Offset(offset));
        }
        let records = if flags.zstd {
            let decompressed = zstd::bulk::decompress(&message, declared);
            decompressed.map(Bytes::from).map_err(|_| FrameError::Zstd(declared))?
        } else {
            message
        };
        if records.len() != declared {
            return Err(FrameError::Length { declared, actual: records.len() });
        }
        Ok(DataFrame { handle, flags, offset, read_at: number(16), records })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(records: Vec<u8>) -> DataFrame {
        let flags = FrameFlags { zstd: false, resend: true, continues: false };
        DataFrame {
            handle: 7,
            flags,
            offset: 1 << 33,
            read_at: 1_700_000_000_123,
            records: records.into(),
        }
    }

    proptest! {
        #[test]
        fn decode_is_the_inverse_of_encode(records in proptest::collection::vec(any::<u8>(), 1..5000), compress: bool) {
            let frame = frame(records);
            let mut decoded = DataFrame::decode(frame.encode(compress)).expect("a frame");
            decoded.flags.zstd = false;
            prop_assert_eq!(decoded, frame);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = DataFrame::decode(bytes.into());
        }
    }

    #[test]
    fn both_encoders_agree() {
        let frame = frame(b"a line\n".to_vec());
        let mut message = vec![0; FRAME_HEADER_BYTES];
        message.extend_from_slice(&frame.records);
        let in_place = DataFrame::encode_in_place(
            message,
            frame.handle,
            frame.flags,
            frame.offset,
            frame.read_at,
        );
        assert_eq!(in_place, frame.encode(false));
    }

    #[test]
    fn a_bomb_does_not_go_off() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).expect("zstd");
        let mut message = frame(vec![b'x'; 100]).encode(false)[..FRAME_HEADER_BYTES].to_vec();
        message[1] |= FrameFlags::ZSTD;
        message.extend_from_slice(&bomb);
        assert_eq!(DataFrame::decode(message.into()), Err(FrameError::Zstd(100)));
    }

    #[test]
    fn lies_about_length_are_found() {
        let good = frame(b"0123456789".to_vec()).encode(false);
        assert!(matches!(
            DataFrame::decode(good.slice(..good.len() - 1)),
            Err(FrameError::Length { declared: 10, actual: 9 })
        ));
        let mut huge = good.to_vec();
        huge[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(DataFrame::decode(huge.into()), Err(FrameError::Size(_))));
        let mut far = good.to_vec();
        far[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(DataFrame::decode(far.into()), Err(FrameError::Offset(_))));
        assert!(matches!(DataFrame::decode(good.slice(..5)), Err(FrameError::Short(5))));
    }
}

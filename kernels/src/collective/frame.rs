//! What goes over a connection: a header with a checksum, and bytes.
//!
//! TCP's own checksum has 16 bits and lets some damage through (Stone & Partridge 2000, "When the CRC and TCP checksum
//! disagree"); a wrong number in an activation would go unseen into an answer.

use std::io::{Error, ErrorKind, Read, Result, Write};

/// Bytes of a frame before its body: seven words.
pub const FRAME_HEADER_BYTES: usize = 56;

/// Tells a frame from what somebody else may send: "SPANWISE".
const MAGIC: u64 = 0x5350_414e_5749_5345;

/// No micro-batch takes more: 2^20 tokens of a residual stream of 16,384 in f32 are 64 GiB.
const MAX_BODY_BYTES: u64 = 1 << 36;

/// A frame's header; what its fields mean is up to those who talk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: u32,
    /// Counts frames, so that none is taken for another.
    pub sequence: u64,
    /// The shape of the numbers in the body, or any other two numbers.
    pub shape: [u64; 2],
}

impl Frame {
    /// Writes a frame with its `body`.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn write(&self, stream: &mut impl Write, body: &[u8]) -> Result<()> {
        let words = self.words(body.len() as u64);
        let mut header = [0; FRAME_HEADER_BYTES];
        let sum = [checksum(&header_bytes(&words), checksum(body, 0))];
        for (bytes, word) in header.as_chunks_mut().0.iter_mut().zip(words.iter().chain(&sum)) {
            *bytes = word.to_le_bytes();
        }
        stream.write_all(&header)?;
        stream.write_all(body)
    }

    /// Reads the next frame, and its body into `body`.
    ///
    /// # Errors
    /// Those of the stream, and [`ErrorKind::InvalidData`] for what is no frame or was damaged.
    pub fn read(stream: &mut impl Read, body: &mut Vec<u8>) -> Result<Frame> {
        let mut header = [0; FRAME_HEADER_BYTES];
        stream.read_exact(&mut header)?;
        let words: Vec<u64> = header.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        let [magic, kind, sequence, rows, cols, length, sum] = words[..] else {
            unreachable!("a header has seven words")
        };
        let invalid = |what: String| Error::new(ErrorKind::InvalidData, what);
        if magic != MAGIC || length > MAX_BODY_BYTES {
            return Err(invalid("what came is no frame".to_owned()));
        }
        let kind = u32::try_from(kind).map_err(|_| invalid(format!("a frame of kind {kind}")))?;
        body.clear();
        // By and by: a length alone takes no memory.
        if stream.take(length).read_to_end(body)? as u64 != length {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let frame = Frame { kind, sequence, shape: [rows, cols] };
        if checksum(&header_bytes(&frame.words(length)), checksum(body, 0)) != sum {
            return Err(invalid(format!("frame {sequence} was damaged on the way")));
        }
        Ok(frame)
    }

    fn words(&self, length: u64) -> [u64; 6] {
        let [rows, cols] = self.shape;
        [MAGIC, u64::from(self.kind), self.sequence, rows, cols, length]
    }
}

fn header_bytes(words: &[u64; 6]) -> [u8; 48] {
    let mut bytes = [0; 48];
    bytes.as_chunks_mut().0.iter_mut().zip(words).for_each(|(bytes, word)| *bytes = word.to_le_bytes());
    bytes
}

/// A hash that notices damage, not malice: FNV-1a over words of 64 bits in four lanes, with the upper half of each product
/// folded into the lower one, as a plain product never moves a high bit down.
fn checksum(bytes: &[u8], seed: u64) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mix = |hash: u64, word: u64| {
        let product = (hash ^ word).wrapping_mul(PRIME);
        product ^ product >> 32
    };
    let mut lanes = [0xcbf2_9ce4_8422_2325 ^ seed, 1, 2, 3];
    let (words, rest) = bytes.as_chunks::<8>();
    for words in words.chunks(lanes.len()) {
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = mix(*lane, u64::from_le_bytes(*word));
        }
    }
    let rest = rest.iter().fold(bytes.len() as u64, |word, byte| word << 8 | u64::from(*byte));
    lanes.into_iter().fold(rest, mix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        Frame { kind: 3, sequence: 70, shape: [2, 5] }.write(&mut bytes, body).unwrap();
        bytes
    }

    #[test]
    fn a_frame_comes_back_as_it_was_sent() {
        for length in [0, 1, 7, 8, 31, 32, 1000] {
            let sent: Vec<u8> = (0..length).map(|i| (i * 37 % 251) as u8).collect();
            let (mut stream, mut body) = (&written(&sent)[..], vec![1, 2, 3]);
            let frame = Frame::read(&mut stream, &mut body).unwrap();
            assert_eq!(frame, Frame { kind: 3, sequence: 70, shape: [2, 5] });
            assert_eq!(body, sent);
            assert!(stream.is_empty());
        }
    }

    #[test]
    fn a_single_bit_that_has_turned_is_noticed_wherever_it_is() {
        let sent: Vec<u8> = (0..100).collect();
        let bytes = written(&sent);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let read = Frame::read(&mut &damaged[..], &mut Vec::new());
            assert!(read.is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_stream_that_ends_early_is_an_error_wherever_it_ends() {
        let bytes = written(&[7; 40]);
        for length in 0..bytes.len() {
            let error = Frame::read(&mut &bytes[..length], &mut Vec::new()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{length} bytes");
        }
    }
}

//! Random numbers as a function of their place, never of a state.
//!
//! Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a draw depends on
//! its key and counter alone, so that a sequence draws the same numbers wherever, whenever and however
//! often it is computed.

/// The multipliers and the key increments of Philox4x32 (section 4.3, table 2 of the paper).
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Four random words for a key and a counter.
pub fn philox(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [a, b] = [0, 2].map(|lane| u64::from(MULTIPLIERS[lane / 2]) * u64::from(counter[lane]));
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The draws of one request, addressed by sample and position.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    words: [u32; 4],
}

impl Stream {
    /// The stream of a request's key under a seed. The first Philox call spreads the 192 bits of both over
    /// the key and half of the counter of the second.
    pub fn new(seed: u64, key: u128) -> Self {
        let seed = [seed as u32, (seed >> 32) as u32];
        let key = [0, 32, 64, 96].map(|shift| (key >> shift) as u32);
        Stream { words: philox(seed, key) }
    }

    /// A number in `[0, 1)` with 53 random bits.
    pub fn uniform(self, sample: u32, position: u32) -> f64 {
        self.bits(sample, position) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// The same number in 2⁻⁶⁴.
    pub fn fraction(self, sample: u32, position: u32) -> u64 {
        self.bits(sample, position) << 11
    }

    fn bits(self, sample: u32, position: u32) -> u64 {
        let [k0, k1, c2, c3] = self.words;
        let [low, high, ..] = philox([k0, k1], [position, sample, c2, c3]);
        (u64::from(high) << 32 | u64::from(low)) >> 11
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers from the authors' Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_differ_by_seed_key_sample_and_position() {
        let draw = |seed, key, sample, position| Stream::new(seed, key).uniform(sample, position);
        let one = draw(1, 2, 3, 4);
        assert_eq!(one, draw(1, 2, 3, 4));
        for other in
            [draw(2, 2, 3, 4), draw(1, 3, 3, 4), draw(1, 2, 4, 4), draw(1, 2, 3, 5), draw(1, 2 << 64, 3, 4)]
        {
            assert_ne!(one, other);
        }
    }

    #[test]
    fn uniform_draws_fill_the_unit_interval_evenly() {
        let stream = Stream::new(7, 9);
        let draws: Vec<f64> = (0..10_000).map(|position| stream.uniform(0, position)).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        for tenth in 0..10 {
            let (low, high) = (f64::from(tenth) / 10.0, f64::from(tenth + 1) / 10.0);
            let count = draws.iter().filter(|&&u| low <= u && u < high).count();
            // 1,000 expected, standard deviation 30: five of them leave one chance in a million.
            assert!((850..1150).contains(&count), "{count} draws in [{low}, {high})");
        }
    }
}

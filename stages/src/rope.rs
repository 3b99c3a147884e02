//! Rotary position embeddings: frequencies by kind of scaling, and the table of angles.

use kernels::RopeTable;

/// Which rotary frequencies a model was trained with (Su et al. 2021, RoFormer, section 3.2.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rope {
    /// `theta^(-2j / head_dim)`.
    Default {
        /// The base.
        theta: f64,
    },
    /// Positions divided by a factor (Chen et al. 2023, position interpolation).
    Linear {
        /// The base.
        theta: f64,
        /// The divisor.
        factor: f64,
    },
    /// Long wavelengths divided, short ones kept, a ramp between (Llama 3.1).
    Llama3 {
        /// The base.
        theta: f64,
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are short.
        high_freq_factor: f64,
        /// Context before the extension.
        original_max_position_embeddings: f64,
    },
}

impl Rope {
    /// Angle per position for each of the `head_dim / 2` pairs, in f64.
    pub fn inverse_frequencies(self, head_dim: usize) -> Vec<f64> {
        let base = |theta: f64| move |pair: usize| theta.powf(-((2 * pair) as f64) / head_dim as f64);
        let pairs = 0..head_dim / 2;
        match self {
            Rope::Default { theta } => pairs.map(base(theta)).collect(),
            Rope::Linear { theta, factor } => pairs.map(base(theta)).map(|f| f / factor).collect(),
            Rope::Llama3 {
                theta,
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => pairs
                .map(base(theta))
                .map(|f| {
                    let wavelength = std::f64::consts::TAU / f;
                    if wavelength < original / high {
                        f
                    } else if wavelength >= original / low {
                        // Where both factors are one, nothing is left between.
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
        }
    }

    /// The angles of positions `0 .. positions`, computed in f64 and rounded once.
    pub fn table(self, head_dim: usize, positions: usize) -> RopeTable {
        let frequencies = self.inverse_frequencies(head_dim);
        let size = positions * frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for position in 0..positions {
            for frequency in &frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        RopeTable { head_dim, cos, sin }
    }
}

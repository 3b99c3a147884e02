//! The operations in f64, on inputs as the device has rounded them, each with the bound that an f32 device
//! must keep.

use crate::battery::device::F32_UNIT;

/// A number, and how far a device may be from it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounded {
    pub(crate) value: f64,
    pub(crate) error: f64,
}

impl Bounded {
    /// The bound with the error of storing the result in a type of this unit; below the smallest normal numbers
    /// a type has no more than its last bit, or flushes.
    pub(crate) fn stored(&self, unit: f64) -> Bounded {
        let error = self.error + (self.value.abs() + self.error) * unit + f64::from(f32::MIN_POSITIVE);
        Bounded { value: self.value, error }
    }
}

/// `Σ a · b`. A sum of n products in f32, in any order and rounded any number of times up to once per operation,
/// is within `2 n u Σ |a b|` (Higham, Accuracy and Stability, 3.1), u the unit roundoff. VDPBF16PS takes
/// denormal inputs and results for zero, so that a term may lose `f32::MIN_POSITIVE` times the other
/// factor, or once. Scales of narrow weights are two more factors.
pub(crate) fn dot<N: Copy + Into<f64>>(a: &[N], b: &[N]) -> Bounded {
    let (mut value, mut size, mut flushed) = (0.0f64, 0.0f64, 0.0f64);
    for (a, b) in a.iter().zip(b).map(|(&a, &b)| (a.into(), b.into())) {
        value += a * b;
        size += (a * b).abs();
        flushed += (1.0 + a.abs() + b.abs()) * f64::from(f32::MIN_POSITIVE);
    }
    Bounded { value, error: 2.0 * (a.len() as f64 + 2.0) * F32_UNIT * size + flushed }
}

/// Asserts that every number is within its bound.
pub(crate) fn assert_within(what: &str, found: &[f32], expected: &[Bounded]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (&found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected.value).abs();
        assert!(error <= expected.error, "{what}: [{index}] is {found}, off by {error:e} from {expected:?}");
    }
}

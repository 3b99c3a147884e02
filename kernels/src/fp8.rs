//! Numbers of 8 bits, E4M3: a sign, four bits of exponent with bias 7, three of fraction; no infinities, and one NaN of each
//! sign (Micikevicius et al. 2022, "FP8 formats for deep learning").

/// The largest number.
pub(crate) const LARGEST: f32 = 448.0;

/// The code of the nearest number, the even one of two; of what is larger than all, the largest.
pub(crate) fn code_of(value: f32) -> u8 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return 0x7f;
    }
    // Below 2⁻⁶ steps are of 2⁻⁹; from there on 3 bits of fraction are kept, and the exponent's bias is 7.
    let code = match f32::from_bits(magnitude) {
        small if small < 0.015_625 => (small * 512.0).round_ties_even() as u32,
        _ => ((magnitude + 0x7_ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3),
    };
    code.min(0x7e) as u8 | (bits >> 24) as u8 & 0x80
}

/// A code's number.
pub(crate) fn f32_of(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * 0.001_953_125, // 2⁻⁹
        _ => (8.0 + fraction) * f32::from_bits(((exponent - 10 + 127) as u32) << 23),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The power of two with which some numbers fit E4M3: a number is `code · 2^(byte - 135)`, and NaN where the byte is 255.
///
/// The byte is what the exponent of an f32 would be, of the numbers' largest magnitude over 1.75, the largest of E4M3 but for
/// its exponent: `code · 2⁻⁸` is below 2, so that `2^(byte - 127)` is what it is to be multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exponent(pub(crate) u8);

/// The least that is used, so that all numbers are normal ones in bf16, and what they are divided by in f32. Numbers below
/// 2⁻¹²⁰ are zeros then.
const LEAST_EXPONENT: u32 = 24;

/// Of numbers that are not all finite, or so large that f32 ends.
const NOT_FINITE: u32 = 255;

impl Exponent {
    /// The least power with which some numbers fit.
    #[inline(always)]
    pub(crate) fn of(values: &[f32]) -> Exponent {
        // Magnitudes are ordered as their bits are, infinity and NaN above all.
        let largest = values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7fff_ffff));
        // One more where the fraction is above that of 448.
        Exponent(((largest + 0x1f_ffff) >> 23).clamp(LEAST_EXPONENT, NOT_FINITE) as u8)
    }

    /// The code of one of the numbers.
    #[inline(always)]
    pub(crate) fn code(self, value: f32) -> u8 {
        match u32::from(self.0) {
            NOT_FINITE => 0,
            byte => code_of(value * f32::from_bits((262 - byte) << 23)),
        }
    }

    /// What the number in E4M3 is multiplied with; NaN of numbers that are not finite, and zero of memory that was never written.
    #[inline(always)]
    pub(crate) fn scale(self) -> f32 {
        match u32::from(self.0) {
            NOT_FINITE => f32::NAN,
            byte => f32::from_bits(byte.saturating_sub(8) << 23),
        }
    }

    /// The number that a code means, exactly one of bf16.
    pub(crate) fn value(self, code: u8) -> f32 {
        f32_of(code) * self.scale()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_paper() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x07, 0.013_671_875),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x7e, 448.0),
            (0xb8, -1.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(f32_of(code), value, "{code:#x}");
        }
        assert!((0..=u8::MAX).filter(|code| code & 0x7f != 0x7f).all(|code| code_of(f32_of(code)) == code));
        assert!(f32_of(0x7f).is_nan() && f32_of(0xff).is_nan());
        assert!((0..0x7eu8).all(|code| f32_of(code) < f32_of(code + 1)));
    }

    #[test]
    fn numbers_go_to_the_nearest_code_and_halves_to_the_even_one() {
        for code in 0..0x7eu8 {
            let (low, high) = (f32_of(code), f32_of(code + 1));
            let middle = (low + high) / 2.0;
            let even = code + (code & 1);
            for (value, expected) in [
                (middle, even),
                (f32::from_bits(middle.to_bits() - 1), code),
                (f32::from_bits(middle.to_bits() + 1), code + 1),
            ] {
                assert_eq!(code_of(value), expected, "{value}");
                assert_eq!(code_of(-value), expected | 0x80, "-{value}");
            }
        }
        assert_eq!([449.0, 1e9, f32::INFINITY].map(code_of), [0x7e; 3]);
        assert_eq!(code_of(f32::NAN), 0x7f);
    }

    #[test]
    fn a_head_has_the_least_power_of_two_with_which_it_fits() {
        let exponent = |values: &[f32]| i32::from(Exponent::of(values).0) - 135;
        assert_eq!(
            [448.0, 448.1, 256.0, 224.0, 224.1, 1.0].map(|value| exponent(&[0.5, -value])),
            [0, 1, 0, -1, 0, -8]
        );
        let of = |values: &[f32]| {
            let exponent = Exponent::of(values);
            values.iter().map(|&value| exponent.value(exponent.code(value))).collect::<Vec<_>>()
        };
        assert_eq!(of(&[-448.0, 17.0, 0.3, 0.0]), [-448.0, 16.0, 0.3125, 0.0]);
        assert_eq!(of(&[1e30, 0.0])[1], 0.0);
        assert_eq!(of(&[0.0, -0.0, 1e-37]), [0.0, 0.0, 0.0]);
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            assert!(of(&[1.0, wrong]).iter().all(|value| value.is_nan()), "{wrong}");
        }
    }

    /// The bounds that [`KvDtype::Fp8`](crate::KvDtype::Fp8) states, and that bf16 holds all of it.
    #[test]
    fn every_number_of_a_head_is_within_the_bound_and_one_of_bf16() {
        for largest in [1e-29f32, 3e-9, 0.02, 1.0, 1.76, 447.0, 1e4, 1e30, 2.9e38] {
            let values: Vec<f32> = (-300..=300).map(|i| largest * (i as f32 / 300.0).powi(7)).collect();
            let exponent = Exponent::of(&values);
            for &value in &values {
                let kept = exponent.value(exponent.code(value));
                let bound = f64::from(value.abs() / 16.0).max(f64::from(largest) * (-17f64).exp2());
                let off = (f64::from(kept) - f64::from(value)).abs();
                assert!(off <= bound, "{value} of {largest} is kept as {kept}");
                assert_eq!(kept.to_bits() & 0xffff, 0, "{kept}");
            }
        }
    }
}

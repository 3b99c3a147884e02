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
}

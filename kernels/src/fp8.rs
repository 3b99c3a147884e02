//! Numbers of 8 bits, E4M3: a sign, four bits of exponent with bias 7, three of fraction; no infinities, and one NaN of each
//! sign (Micikevicius et al. 2022, "FP8 formats for deep learning").

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
        assert!(f32_of(0x7f).is_nan() && f32_of(0xff).is_nan());
        assert!((0..0x7eu8).all(|code| f32_of(code) < f32_of(code + 1)));
    }
}

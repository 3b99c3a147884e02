//! Figures as people read them.

/// A number with a comma between thousands.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Seconds as `45 s`, `12 min` or `3 h 05 min`.
pub(crate) fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_parted() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(1_234), "1,234");
        assert_eq!(grouped(253_401_268_224), "253,401,268,224");
    }

    #[test]
    fn durations_are_short_and_clear() {
        assert_eq!(duration(3.4), "3 s");
        assert_eq!(duration(119.0), "119 s");
        assert_eq!(duration(125.0), "2 min");
        assert_eq!(duration(2.0 * 3600.0 + 61.0), "2 h 01 min");
    }
}

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

/// A number to four digits or fewer, as `253.4 B`, `834.7 M` or `110.8 K`; `2 B` has no tenths.
pub(crate) fn short(number: f64) -> String {
    let (unit, letter) = match number {
        1e9.. => (1e9, " B"),
        1e6.. => (1e6, " M"),
        1e3.. => (1e3, " K"),
        _ => (1.0, ""),
    };
    // Display leaves out a fraction of nought.
    format!("{}{letter}", (number / unit * 10.0).round() / 10.0)
}

/// Bytes with a tenth of the unit that fits, as `506.8 GB`, `71.2 MB` or `1.5 kB`.
pub(crate) fn bytes(bytes: u64) -> String {
    let (unit, name) = match bytes {
        // Rounding must not make a thousand of a unit.
        999_950_000.. => (1e9, "GB"),
        999_950.. => (1e6, "MB"),
        1_000.. => (1e3, "kB"),
        0 => return "0".to_owned(),
        _ => return format!("{bytes} B"),
    };
    format!("{:.1} {name}", bytes as f64 / unit)
}

/// Things a second: with digits behind the point where they are few.
pub(crate) fn rate(per_second: f64) -> String {
    match per_second {
        10.0.. => grouped(per_second.round() as u64),
        0.0 => "0".to_owned(),
        0.1.. => format!("{per_second:.1}"),
        _ => format!("{per_second:.4}"),
    }
}

/// Milliseconds, or microseconds where they are few.
pub(crate) fn milliseconds(ms: f64) -> String {
    if ms == 0.0 || ms >= 0.95 { format!("{ms:.1} ms") } else { format!("{:.1} us", ms * 1e3) }
}

/// From so many hours to so many, or in seconds where they are few.
pub(crate) fn hours([least, most]: [f64; 2]) -> String {
    match is_seconds(most) {
        true => format!("{:.1} to {:.1} s", least * 3600.0, most * 3600.0),
        false => format!("{least:.2} to {most:.2} hours"),
    }
}

/// Hours, or seconds where they are few.
pub(crate) fn hours_or_seconds(hours: f64) -> String {
    if is_seconds(hours) { format!("{:.1} s", hours * 3600.0) } else { format!("{hours:.1} hours") }
}

fn is_seconds(hours: f64) -> bool {
    hours < 0.1
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
    fn large_numbers_have_a_letter() {
        let numbers = [999.0, 110_784.0, 834_699_264.0, 253_401_268_224.0, 2e9];
        assert_eq!(numbers.map(short), ["999", "110.8 K", "834.7 M", "253.4 B", "2 B"]);
    }

    #[test]
    fn bytes_have_the_unit_that_fits() {
        let sizes = [0, 999, 1_500, 999_949, 999_960, 71_234_567, 999_960_000, 506_802_536_448];
        let texts = ["0", "999 B", "1.5 kB", "999.9 kB", "1.0 MB", "71.2 MB", "1.0 GB", "506.8 GB"];
        assert_eq!(sizes.map(bytes), texts);
    }

    #[test]
    fn small_figures_have_small_units() {
        assert_eq!([5_262.4, 9.96, 0.17, 0.0031, 0.0].map(rate), ["5,262", "10.0", "0.2", "0.0031", "0"]);
        assert_eq!(
            [1636.13, 0.95, 0.0421, 0.0].map(milliseconds),
            ["1636.1 ms", "0.9 ms", "42.1 us", "0.0 ms"]
        );
        assert_eq!(hours([2.746, 8.89]), "2.75 to 8.89 hours");
        assert_eq!(hours([0.001, 0.003]), "3.6 to 10.8 s");
        assert_eq!([22.04, 0.05].map(hours_or_seconds), ["22.0 hours", "180.0 s"]);
    }

    #[test]
    fn durations_are_short_and_clear() {
        assert_eq!(duration(3.4), "3 s");
        assert_eq!(duration(119.0), "119 s");
        assert_eq!(duration(125.0), "2 min");
        assert_eq!(duration(2.0 * 3600.0 + 61.0), "2 h 01 min");
    }
}

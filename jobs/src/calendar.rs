//! Dates for chat templates: the few directives of `strftime` they use, in UTC.

/// Formats a moment in Unix seconds; the error is the directive that is not known.
pub(crate) fn strftime(unix_seconds: u64, format: &str) -> Result<String, String> {
    let date = Date::of(unix_seconds);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        // `%-d` is `%d` without its zero.
        let (is_bare, directive) =
            if directive == Some('-') { (true, chars.next()) } else { (false, directive) };
        let field = directive.and_then(|directive| date.field(directive));
        let field = field.ok_or_else(|| format!("%{}", directive.map(String::from).unwrap_or_default()))?;
        out.push_str(if is_bare { bare(&field) } else { &field });
    }
    Ok(out)
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

struct Date {
    year: i64,
    month: usize,
    day: i64,
    day_of_year: i64,
    weekday: usize,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Date {
    /// Howard Hinnant's `civil_from_days`: years begin in March there, so that the leap day is the last.
    fn of(unix_seconds: u64) -> Date {
        let days = (unix_seconds / 86_400) as i64;
        let shifted = days + 719_468; // Days from 0000-03-01 to 1970-01-01.
        let era = shifted.div_euclid(146_097); // Days in 400 years.
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_march_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_march_year + 2) / 153;
        let day = day_of_march_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let seconds = unix_seconds % 86_400;
        Date {
            year,
            month: month as usize,
            day,
            day_of_year: day_of_year(year, month, day),
            weekday: (days + 4).rem_euclid(7) as usize, // 1970-01-01 was a Thursday.
            hour: seconds / 3_600,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }

    fn field(&self, directive: char) -> Option<String> {
        let month = MONTHS[self.month - 1];
        let weekday = WEEKDAYS[self.weekday];
        Some(match directive {
            'Y' => format!("{:04}", self.year),
            'y' => format!("{:02}", self.year % 100),
            'm' => format!("{:02}", self.month),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'B' => month.to_owned(),
            'b' | 'h' => month[..3].to_owned(),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'j' => format!("{:03}", self.day_of_year),
            'H' => format!("{:02}", self.hour),
            'I' => format!("{:02}", (self.hour + 11) % 12 + 1),
            'p' => if self.hour < 12 { "AM" } else { "PM" }.to_owned(),
            'M' => format!("{:02}", self.minute),
            'S' => format!("{:02}", self.second),
            'F' => format!("{:04}-{:02}-{:02}", self.year, self.month, self.day),
            'T' => format!("{:02}:{:02}:{:02}", self.hour, self.minute, self.second),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

fn day_of_year(year: i64, month: i64, day: i64) -> i64 {
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let lengths = [31, 28 + i64::from(is_leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    lengths[..month as usize - 1].iter().sum::<i64>() + day
}

fn bare(field: &str) -> &str {
    match field.trim_start_matches(['0', ' ']) {
        "" => "0",
        trimmed => trimmed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let all = "%Y-%m-%d %A %a %B %b %j %H:%M:%S %I %p %y %e %-d %%";
        let cases = [
            (0, "1970-01-01 Thursday Thu January Jan 001 00:00:00 12 AM 70  1 1 %"),
            (951_782_400, "2000-02-29 Tuesday Tue February Feb 060 00:00:00 12 AM 00 29 29 %"),
            (1_735_689_599, "2024-12-31 Tuesday Tue December Dec 366 23:59:59 11 PM 24 31 31 %"),
            (1_772_366_400, "2026-03-01 Sunday Sun March Mar 060 12:00:00 12 PM 26  1 1 %"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(strftime(seconds, all).unwrap(), expected);
        }
        assert_eq!(strftime(0, "%d %Q"), Err("%Q".to_owned()));
        assert_eq!(strftime(0, "100%"), Err("%".to_owned()));
    }
}

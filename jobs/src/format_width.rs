//! How wide Python's `format` may make its fields: to fill one up costs a template no fuel, whatever its width.

/// Widest field of `'{:>5}'.format(x)`, in digits.
const MAX_DIGITS: usize = 4;

/// Refuses a format with a wider field.
pub(crate) fn check(format: &str) -> Result<(), String> {
    let fields = fields(format);
    let mut numbers = fields.iter().flat_map(|field| field.split(|c: char| !c.is_ascii_digit()));
    match numbers.any(|number| number.len() > MAX_DIGITS) {
        true => Err(format!("format: expected numbers of at most {MAX_DIGITS} digits in its fields")),
        false => Ok(()),
    }
}

/// The replacement fields of a format, without the texts around them, in which `{{` and `}}` stand for a brace each.
fn fields(mut text: &str) -> Vec<&str> {
    let mut fields = Vec::new();
    while let Some(start) = text.find(['{', '}']) {
        text = &text[start..];
        let end = match text.as_bytes() {
            [b'{', b'{', ..] | [b'}', b'}', ..] => 2,
            [b'}', ..] => 1,
            _ => {
                let end = field_end(text);
                fields.push(&text[..end]);
                end
            }
        };
        text = &text[end..];
    }
    fields
}

/// Where a field ends that a text begins with: at a brace that is neither in the brackets of an item's name nor what `:}>5` fills up with.
fn field_end(text: &str) -> usize {
    let (mut is_item, mut is_spec) = (false, false);
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '[' if !is_spec => is_item = true,
            ']' if is_item => is_item = false,
            _ if is_item => {}
            ':' if !is_spec => {
                is_spec = true;
                let fill = chars.peek().copied();
                let is_aligned =
                    |(at, fill): (usize, char)| text[at + fill.len_utf8()..].starts_with(['<', '>', '^']);
                if fill.is_some_and(is_aligned) {
                    chars.next();
                }
            }
            '}' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_end_where_the_library_ends_them() {
        assert_eq!(fields("{} of 20000, {{10000}}, {:}<3}: 30000"), ["{}", "{:}<3}"]);
        assert_eq!(fields("20000 {x[}]}{y[:]:é^20000} {{ {:5}"), ["{x[}]}", "{y[:]:é^20000}", "{:5}"]);
        assert_eq!(fields("} {x[}:]:.20000}{:>"), ["{x[}:]:.20000}", "{:>"]);
    }
}

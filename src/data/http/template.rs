//! Many addresses written as one: `part-{00000..00042}.jsonl.gz` and `{train,more}.csv`. Knows nothing of requests.

/// Addresses that one source may have.
pub(super) const MAX_ADDRESSES: usize = 100_000;

/// A piece of a template.
enum Piece<'a> {
    Fixed(&'a str),
    List(Vec<&'a str>),
    /// Numbers with both ends, written with at least so many digits.
    Range {
        first: u64,
        last: u64,
        width: usize,
    },
}

impl Piece<'_> {
    fn len(&self) -> u64 {
        match self {
            Self::Fixed(_) => 1,
            Self::List(words) => words.len() as u64,
            Self::Range { first, last, .. } => (last - first).saturating_add(1),
        }
    }

    fn write(&self, at: u64, text: &mut String) {
        match self {
            Self::Fixed(fixed) => text.push_str(fixed),
            Self::List(words) => text.push_str(words[at as usize]),
            Self::Range { first, width, .. } => text.push_str(&format!("{:0width$}", first + at)),
        }
    }
}

/// The addresses that a template stands for, the last braces counting fastest.
///
/// # Errors
/// Braces that are neither a range nor a list, and more than [`MAX_ADDRESSES`] addresses.
pub(super) fn expand(template: &str) -> Result<Vec<String>, String> {
    let pieces = pieces(template)?;
    let count = pieces.iter().fold(1_u64, |count, piece| count.saturating_mul(piece.len()));
    if count > MAX_ADDRESSES as u64 {
        return Err(format!("'{template}' stands for {count} addresses; {MAX_ADDRESSES} are allowed"));
    }
    let address = |number: u64| {
        let mut text = String::new();
        let mut left = count;
        let mut rest = number;
        for piece in &pieces {
            left /= piece.len();
            piece.write(rest / left, &mut text);
            rest %= left;
        }
        text
    };
    Ok((0..count).map(address).collect())
}

fn pieces(template: &str) -> Result<Vec<Piece<'_>>, String> {
    let wrong = |why: &str| {
        format!(
            "'{template}': {why}; write a range as in {{00..42}}, a list as in {{a,b}}, and a brace itself as %7B or %7D"
        )
    };
    let mut pieces = Vec::new();
    let mut rest = template;
    while let Some(open) = rest.find(['{', '}']) {
        let inside =
            rest[open..].strip_prefix('{').ok_or_else(|| wrong("a brace is closed that is not open"))?;
        let close = inside.find(['{', '}']).filter(|at| inside[*at..].starts_with('}'));
        let close = close.ok_or_else(|| wrong("a brace is not closed"))?;
        pieces.push(Piece::Fixed(&rest[..open]));
        let inner = &inside[..close];
        pieces.push(match inner.split_once("..") {
            Some((first, last)) => range(first, last).ok_or_else(|| {
                wrong("a range needs two whole numbers, the smaller one first, of at most 18 digits")
            })?,
            None if inner.contains(',') => Piece::List(inner.split(',').collect()),
            None => return Err(wrong("braces hold neither a range nor a list")),
        });
        rest = &inside[close + 1..];
    }
    pieces.push(Piece::Fixed(rest));
    Ok(pieces)
}

fn range(first: &str, last: &str) -> Option<Piece<'static>> {
    let number = |text: &str| -> Option<u64> {
        let digits = text.bytes().all(|b| b.is_ascii_digit()) && text.len() <= 18;
        digits.then(|| text.parse().ok()).flatten()
    };
    let padded = [first, last].iter().any(|text| text.len() > 1 && text.starts_with('0'));
    let width = if padded { first.len().max(last.len()) } else { 0 };
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some(Piece::Range { first, last, width })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_lists_become_addresses_in_order() {
        let of = |template: &str| expand(template).unwrap();
        assert_eq!(of("https://a/b.csv"), ["https://a/b.csv"]);
        assert_eq!(of("p-{08..11}.gz"), ["p-08.gz", "p-09.gz", "p-10.gz", "p-11.gz"]);
        assert_eq!(of("p-{8..11}"), ["p-8", "p-9", "p-10", "p-11"]);
        assert_eq!(of("{hi,ta}/{0..1}.txt"), ["hi/0.txt", "hi/1.txt", "ta/0.txt", "ta/1.txt"]);
        assert_eq!(of("x{,-b}"), ["x", "x-b"]);
        assert_eq!(of("part-{00000..00042}.jsonl.gz").len(), 43);
        assert_eq!(of("part-{00000..00042}.jsonl.gz")[42], "part-00042.jsonl.gz");
    }

    #[test]
    fn what_is_no_template_is_refused() {
        for (template, why) in [
            ("a{b", "not closed"),
            ("a{b{c}}", "not closed"),
            ("a}b", "not open"),
            ("a{b}", "neither"),
            ("a{}", "neither"),
            ("a{3..1}", "smaller one first"),
            ("a{a..z}", "whole numbers"),
            ("a{-1..2}", "whole numbers"),
            ("a{0..99999999999999999999}", "18 digits"),
            ("a{0..999}{0..999}", "1000000 addresses"),
            ("a{0..999999999999999999}{0..999999999999999999}", "are allowed"),
        ] {
            let message = expand(template).unwrap_err();
            assert!(message.contains(why), "{template}: {message}");
        }
    }
}

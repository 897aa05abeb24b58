//! Byte sizes as people write them: `1048576`, `512MiB`, `2 GB`. Knows no setting and no range.

use std::fmt;
use std::str::FromStr;

/// A number of bytes. Reads `512`, `512B`, `512kB`, `512KiB`, and likewise `M`, `G`, `T`; the case of the unit
/// does not matter, a space before it is allowed, and a decimal fraction too (`1.5GiB`). `kB`, `MB`, `GB`, `TB`
/// are powers of 1000; `KiB`, `MiB`, `GiB`, `TiB` and the bare letters `K`, `M`, `G`, `T` are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A text that is no byte size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No number, or a number that is not finite or below zero.
    #[error("'{0}' is no size; write a number of bytes or one with a unit, as in 512MiB or 2GB")]
    Number(String),
    /// A number with an unknown unit.
    #[error("'{text}' has the unknown unit '{unit}'; use B, kB, MB, GB, TB, KiB, MiB, GiB or TiB")]
    Unit {
        /// What was given.
        text: String,
        /// What followed the number.
        unit: String,
    },
    /// More than fits 64 bits, or a fraction of a byte.
    #[error("'{0}' is no whole number of bytes that fits 64 bits")]
    Range(String),
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        let unit = unit.trim();
        let multiplier: u64 = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kb" => 1000,
            "mb" => 1000_u64.pow(2),
            "gb" => 1000_u64.pow(3),
            "tb" => 1000_u64.pow(4),
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            _ if number.is_empty() => return Err(SizeError::Number(text.to_owned())),
            _ => return Err(SizeError::Unit { text: text.to_owned(), unit: unit.to_owned() }),
        };
        // Whole numbers stay in integers: an f64 would round above 2^53.
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(multiplier).map(Self).ok_or_else(|| SizeError::Range(text.to_owned()));
        }
        if !number.contains('.') && !number.is_empty() {
            return Err(SizeError::Range(text.to_owned()));
        }
        let value: f64 = number.parse().map_err(|_| SizeError::Number(text.to_owned()))?;
        let bytes = (value * multiplier as f64).round();
        let whole = multiplier > 1 || bytes == value;
        if !whole || bytes >= u64::MAX as f64 {
            return Err(SizeError::Range(text.to_owned()));
        }
        Ok(Self(bytes as u64))
    }
}

impl fmt::Display for ByteSize {
    /// The largest binary unit that divides the size, so that what is printed reads back as the same size.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 > 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl<'de> serde::Deserialize<'de> for ByteSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Size;
        impl serde::de::Visitor<'_> for Size {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 512MiB, 2GB or a number of bytes")
            }
            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_size() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("7B", 7),
            ("2kB", 2000),
            ("2KB", 2000),
            ("3KiB", 3 << 10),
            ("3K", 3 << 10),
            ("512MiB", 512 << 20),
            ("512M", 512 << 20),
            ("512MB", 512_000_000),
            ("2GB", 2_000_000_000),
            ("2gb", 2_000_000_000),
            ("2 GiB", 2 << 30),
            (" 1.5GiB ", 3 << 29),
            ("0.5kB", 500),
            ("1TB", 1_000_000_000_000),
            ("1T", 1 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size() {
        for text in ["", "MiB", "auto", "1.2.3", "-1", "."] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::Number(_))), "{text}");
        }
        for text in ["5 apples", "1e9", "3PiB"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::Unit { .. })), "{text}");
        }
        for text in ["18446744073709551616", "99999999999TiB", "1.5", "99999999.5TiB"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::Range(_))), "{text}");
        }
    }

    #[test]
    fn display_reads_back() {
        for bytes in [0, 1, 1000, 1024, 1536, 1 << 20, (1 << 30) + 1, 3 << 29, u64::MAX] {
            assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }
        assert_eq!(ByteSize(1 << 30).to_string(), "1GiB");
        assert_eq!(ByteSize(1536).to_string(), "1536");
    }
}

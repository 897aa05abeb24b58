//! Lengths of time as people write them: `30`, `30s`, `1m30s`. Knows no setting and no range.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A length of time. A bare number is seconds; with units it reads `500ms`, `30s`, `5m`, `1h`, and sums of them (`1m30s`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimeSpan(pub Duration);

impl TimeSpan {
    /// Whole seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

/// A text that is no length of time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no length of time; write seconds, or a number with a unit, as in 30s or 1m30s")]
pub struct TimeSpanError(String);

impl FromStr for TimeSpan {
    type Err = TimeSpanError;

    fn from_str(text: &str) -> Result<Self, TimeSpanError> {
        let trimmed = text.trim();
        if let Ok(seconds) = trimmed.parse::<f64>() {
            let span = Duration::try_from_secs_f64(seconds);
            return span.map(Self).map_err(|_| TimeSpanError(text.to_owned()));
        }
        humantime::parse_duration(trimmed).map(Self).map_err(|_| TimeSpanError(text.to_owned()))
    }
}

impl fmt::Display for TimeSpan {
    /// Reads back as the same length.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = humantime::format_duration(self.0).to_string();
        f.write_str(&text.replace(' ', ""))
    }
}

impl<'de> serde::Deserialize<'de> for TimeSpan {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(f64),
            Text(String),
        }
        let text = match Form::deserialize(deserializer)? {
            Form::Number(seconds) => seconds.to_string(),
            Form::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_read_and_written() {
        for (text, milliseconds) in
            [("0", 0), ("30", 30_000), ("1.5", 1500), ("30s", 30_000), ("1m30s", 90_000), (" 250ms ", 250)]
        {
            let span: TimeSpan = text.parse().unwrap();
            assert_eq!(span.0.as_millis(), milliseconds, "{text}");
            assert_eq!(span.to_string().parse(), Ok(span), "{text}");
        }
        for text in ["", "soon", "-1", "1e99", "30 parsecs", "NaN"] {
            let error = text.parse::<TimeSpan>().unwrap_err().to_string();
            assert!(error.contains("1m30s"), "{text}: {error}");
        }
    }

    #[test]
    fn files_may_say_a_number_or_a_text() {
        let read = |yaml: &str| serde_yaml::from_str::<TimeSpan>(yaml).unwrap();
        assert_eq!(read("5"), TimeSpan::seconds(5));
        assert_eq!(read("2m"), TimeSpan::seconds(120));
    }
}

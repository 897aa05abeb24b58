//! Decoding by itself, for whoever measures it or tries to break it; jobs read sources.

use std::io::Read;
use std::ops::ControlFlow;

use super::Format;
use super::decode::{Begun, Broken, Decoder, Found};
use super::hub::of_readme;

/// Rows of some bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decoded {
    /// Records.
    pub records: u64,
    /// Rows that cannot be used.
    pub bad: u64,
    /// Where each row ends in the decompressed bytes, which never goes back.
    pub end: u64,
    /// Why decoding ended before the bytes did.
    pub broken: Option<String>,
}

/// Decodes everything that the reader gives. `name` tells the format where `format` does not.
pub fn decode(format: Format, name: &str, reader: impl Read + Send) -> Decoded {
    let mut decoded = Decoded::default();
    let begun = Decoder::begin(format, name, reader);
    let run = begun.and_then(|begun| match begun {
        Begun::Parquet => Err(Broken::of("Parquet is read by ranges")),
        Begun::Rows(decoder) => decoder.run(&mut |_, found, next| {
            match found {
                Found::Record(_) => decoded.records += 1,
                Found::Bad(_) => decoded.bad += 1,
            }
            assert!(next.offset >= decoded.end, "a row ends where it begins or later");
            decoded.end = next.offset;
            ControlFlow::Continue(())
        }),
    });
    decoded.broken = run.err().map(|broken| broken.message);
    decoded
}

/// How many configs the head of a data set's README has; `None` where it says nothing of any.
///
/// # Errors
/// A head that cannot be read, or that is larger than one may be once its aliases are followed.
pub fn readme_configs(readme: &[u8]) -> Result<Option<usize>, String> {
    Ok(of_readme(readme)?.map(|configs| configs.len()))
}

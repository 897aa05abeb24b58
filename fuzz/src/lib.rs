//! What the fuzz targets share.

use std::io::Read;

use gurukul::data::Format;
use gurukul::data::decoding::decode;

/// Gives bytes a few at a time.
struct Pieces<'a>(&'a [u8], usize);

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.1.min(buffer.len()).min(self.0.len());
        buffer[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        Ok(n)
    }
}

/// Decodes the bytes whole and in pieces, whose size the first byte decides.
///
/// # Panics
/// Where the two give other rows.
pub fn whole_and_in_pieces(format: Format, bytes: &[u8]) {
    let size = bytes.first().map_or(1, |&first| usize::from(first) + 1);
    let whole = decode(format, "x", bytes);
    assert_eq!(whole, decode(format, "x", Pieces(bytes, size)));
}

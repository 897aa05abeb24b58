//! Any bytes as a jsonl file, whole and in pieces: no panic, and the same rows.
#![no_main]

use std::io::Read;

use gurukul::data::Format;
use gurukul::data::decoding::decode;
use libfuzzer_sys::fuzz_target;

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

fuzz_target!(|bytes: &[u8]| {
    let size = bytes.first().map_or(1, |&first| usize::from(first) + 1);
    let whole = decode(Format::Jsonl, "x", bytes);
    assert_eq!(whole, decode(Format::Jsonl, "x", Pieces(bytes, size)));
});

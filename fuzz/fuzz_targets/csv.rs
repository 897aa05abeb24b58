//! Any bytes as a csv file, whole and in pieces: no panic, and the same rows.
#![no_main]

use gurukul::data::Format;
use gurukul_fuzz::whole_and_in_pieces;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| whole_and_in_pieces(Format::Csv, bytes));

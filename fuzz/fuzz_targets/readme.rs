//! Any bytes as a data set's README, as they are and as its YAML head: no panic, and the same answer twice.
#![no_main]

use gurukul::data::decoding::readme_configs;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    assert_eq!(readme_configs(bytes), readme_configs(bytes));
    let head = [b"---\n", bytes, b"\n---\n"].concat();
    assert_eq!(readme_configs(&head), readme_configs(&head));
});

//! `length`: an answer of a length within a band. With n grapheme clusters (white space at the ends aside), a band
//! `min..=max` and `half`:
//!
//! ```text
//! n / min                   below the band, a line from 0
//! 1                         inside
//! 2^-((n - max) / half)     above it
//! ```
//!
//! Longer is not better: inside the band every length earns the same.

use unicode_segmentation::UnicodeSegmentation as _;

use crate::config::rl_reward::LengthConfig;

/// The band, in grapheme clusters.
pub(super) struct Band {
    min: usize,
    max: usize,
    half: usize,
}

impl Band {
    pub(super) fn new(config: &LengthConfig) -> Self {
        Self { min: config.min_graphemes, max: config.max_graphemes, half: config.half_graphemes }
    }

    pub(super) fn of(&self, output: &str) -> f64 {
        self.of_length(output.trim().graphemes(true).count())
    }

    fn of_length(&self, n: usize) -> f64 {
        if n < self.min {
            n as f64 / self.min as f64
        } else if n <= self.max {
            1.0
        } else {
            (-((n - self.max) as f64) / self.half as f64).exp2()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn clusters_are_counted_and_not_characters() {
        let band = Band { min: 3, max: 3, half: 2 };
        // Three clusters of six characters.
        assert_eq!(band.of(" नमस्ते "), 1.0);
        assert_eq!(band.of(""), 0.0);
        assert_eq!(band.of("ab"), 2.0 / 3.0);
        assert_eq!(band.of("abcde"), 0.5);
        assert_eq!(Band { min: 0, max: 0, half: 1 }.of(""), 1.0);
    }

    proptest! {
        #[test]
        fn it_rises_to_the_band_and_falls_behind_it(min in 0usize..300, wide in 0usize..300, half in 1usize..100, n in 0usize..2000) {
            let band = Band { min, max: min + wide, half };
            let (here, next) = (band.of_length(n), band.of_length(n + 1));
            prop_assert!((0.0..=1.0).contains(&here));
            match n {
                n if n < min => prop_assert!(next > here),
                n if n < min + wide => prop_assert_eq!((here, next), (1.0, 1.0)),
                _ => prop_assert!(next < here || next == 0.0),
            }
        }
    }
}

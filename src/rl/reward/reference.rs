//! `chrf` and `exact_match`: likeness to a reference. They apply where the prompt has one.
//!
//! `chrf` is sacreBLEU's sentence chrF2 (`text/chrf.rs`) divided by 100; `exact_match` is 1 for the reference itself,
//! white space aside, and 0 for everything else.

use crate::text::chrf::sentence_score;

pub(super) fn chrf(output: &str, reference: &str) -> f64 {
    (sentence_score(output, reference) / 100.0).clamp(0.0, 1.0)
}

pub(super) fn exact_match(output: &str, reference: &str) -> f64 {
    f64::from(output.split_whitespace().eq(reference.split_whitespace()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_matched_white_space_aside() {
        assert_eq!(exact_match(" नदी  कहाँ है?\n", "नदी कहाँ है?"), 1.0);
        assert_eq!(exact_match("नदी कहाँ है", "नदी कहाँ है?"), 0.0);
        assert_eq!(exact_match("", ""), 1.0);
    }

    #[test]
    fn likeness_is_a_share() {
        assert_eq!(chrf("नदी कहाँ है?", "नदी कहाँ है?"), 1.0);
        assert_eq!(chrf("", "नदी"), 0.0);
        let near = chrf("नदी कहाँ", "नदी कहाँ है?");
        assert!(near > 0.5 && near < 1.0, "{near}");
    }
}

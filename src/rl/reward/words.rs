//! Runs of words and of clusters, and how many of them are different. Shared by the parts that look for repetition.

use std::collections::HashSet;
use std::hash::Hash;

/// distinct-n (Li et al. 2016): different runs of n units over all runs of n units, 0 to 1; 1 where there is no
/// run so long.
pub(super) fn distinct<T: Hash + Eq>(units: &[T], n: usize) -> f64 {
    let all = (units.len() + 1).saturating_sub(n);
    if all == 0 {
        return 1.0;
    }
    units.windows(n).collect::<HashSet<_>>().len() as f64 / all as f64
}

/// The words of a text without the punctuation around them, in lower case.
pub(super) fn words(text: &str) -> Vec<String> {
    let is_mark = |c: char| c.is_ascii_punctuation() || "।॥۔؟،…“”‘’«»".contains(c);
    let words = text.split_whitespace().map(|word| word.trim_matches(is_mark).to_lowercase());
    words.filter(|word| !word.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_runs_over_all_runs() {
        assert_eq!(distinct(&["a", "b", "a", "b", "a"], 2), 0.5);
        assert_eq!(distinct(&["a"; 5], 1), 0.2);
        assert_eq!(distinct(&["a"], 2), 1.0);
        assert_eq!(distinct::<u8>(&[], 1), 1.0);
    }

    #[test]
    fn words_have_no_marks_around_them() {
        assert_eq!(words(" “नदी”, कहाँ है? Don't।"), ["नदी", "कहाँ", "है", "don't"]);
        assert!(words(" । ?").is_empty());
    }
}

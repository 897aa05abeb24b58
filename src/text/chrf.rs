//! chrF (Popović 2015, 2017): how alike an answer and a reference are, by the runs of characters that they share.
//! The numbers are those of sacreBLEU's CHRF with its defaults: character order 6, word order 0, beta 2, white
//! space left out, no smoothing. Knows no language.

use std::collections::HashMap;

/// Longest runs that are compared, in characters (Unicode scalar values).
pub const CHAR_ORDER: usize = 6;

/// How many times as much recall counts as precision.
const BETA: f64 = 2.0;

/// Runs of one length.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    hypothesis: u64,
    reference: u64,
    matching: u64,
}

/// What a score follows from. Those of several pairs are added up for the score of a corpus, which is no mean of
/// the pairs' scores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Chrf {
    orders: [Counts; CHAR_ORDER],
}

impl Chrf {
    /// Of one pair.
    pub fn of(hypothesis: &str, reference: &str) -> Self {
        let (hypothesis, reference) = (characters(hypothesis), characters(reference));
        let mut orders = [Counts::default(); CHAR_ORDER];
        for (order, counts) in (1..).zip(&mut orders) {
            let there = runs(&reference, order);
            let matching = runs(&hypothesis, order)
                .iter()
                .map(|(run, &count)| count.min(there.get(run).copied().unwrap_or(0)))
                .sum();
            let length = |characters: &[char]| (characters.len() + 1).saturating_sub(order) as u64;
            counts.reference = length(&reference);
            // Runs that nothing could match do not count.
            counts.hypothesis = if counts.reference > 0 { length(&hypothesis) } else { 0 };
            counts.matching = matching;
        }
        Self { orders }
    }

    /// Adds another pair's.
    pub fn add(&mut self, other: &Self) {
        for (sum, part) in self.orders.iter_mut().zip(&other.orders) {
            sum.hypothesis += part.hypothesis;
            sum.reference += part.reference;
            sum.matching += part.matching;
        }
    }

    /// The score, 0 to 100: mean precision and mean recall over the lengths that both sides have, as their F-score
    /// with beta 2. 0 where there is no such length.
    pub fn score(&self) -> f64 {
        let (mut precision, mut recall, mut lengths) = (0.0, 0.0, 0u32);
        for counts in self.orders.iter().filter(|c| c.hypothesis > 0 && c.reference > 0) {
            precision += counts.matching as f64 / counts.hypothesis as f64;
            recall += counts.matching as f64 / counts.reference as f64;
            lengths += 1;
        }
        if lengths == 0 || precision + recall == 0.0 {
            return 0.0;
        }
        let (precision, recall) = (precision / f64::from(lengths), recall / f64::from(lengths));
        let factor = BETA * BETA;
        100.0 * (1.0 + factor) * precision * recall / (factor * precision + recall)
    }
}

/// The score of one pair, 0 to 100.
pub fn sentence_score(hypothesis: &str, reference: &str) -> f64 {
    Chrf::of(hypothesis, reference).score()
}

/// The score of many pairs (hypothesis, reference) together, 0 to 100; 0 of none.
pub fn corpus_score<'t>(pairs: impl IntoIterator<Item = (&'t str, &'t str)>) -> f64 {
    let mut sum = Chrf::default();
    for (hypothesis, reference) in pairs {
        sum.add(&Chrf::of(hypothesis, reference));
    }
    sum.score()
}

/// The characters but white space, as Python's `str.split` has it: four control characters are of it there.
fn characters(text: &str) -> Vec<char> {
    text.chars().filter(|c| !c.is_whitespace() && !('\u{1c}'..='\u{1f}').contains(c)).collect()
}

/// How often each run of so many characters occurs.
fn runs(characters: &[char], order: usize) -> HashMap<&[char], u64> {
    let mut counts = HashMap::new();
    for run in characters.windows(order) {
        *counts.entry(run).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Fixture {
        corpus_score: f64,
        pairs: Vec<Pair>,
    }

    #[derive(Deserialize)]
    struct Pair {
        hypothesis: String,
        reference: String,
        score: f64,
    }

    #[test]
    fn scores_are_those_of_sacrebleu() {
        let text = include_str!("../../tests/fixtures/chrf.json");
        let fixture: Fixture = serde_json::from_str(text).unwrap();
        assert!(fixture.pairs.len() >= 50);
        for pair in &fixture.pairs {
            let score = sentence_score(&pair.hypothesis, &pair.reference);
            let Pair { hypothesis, reference, score: expected } = pair;
            assert!((score - expected).abs() < 1e-6, "{hypothesis:?} {reference:?}: {score}, not {expected}");
        }
        let pairs = fixture.pairs.iter().map(|p| (p.hypothesis.as_str(), p.reference.as_str()));
        let score = corpus_score(pairs);
        assert!((score - fixture.corpus_score).abs() < 1e-6, "{score}, not {}", fixture.corpus_score);
    }

    #[test]
    fn nothing_is_like_nothing() {
        for (hypothesis, reference) in [("", ""), ("a", ""), ("", "a"), (" ", "\t")] {
            assert_eq!(sentence_score(hypothesis, reference), 0.0);
        }
        assert_eq!(corpus_score([]), 0.0);
    }

    proptest! {
        #[test]
        fn scores_are_within_their_range(a in "\\PC{0,30}", b in "\\PC{0,30}") {
            prop_assert!((0.0..=100.0 + 1e-9).contains(&sentence_score(&a, &b)));
            let same = sentence_score(&a, &a);
            prop_assert!(characters(&a).is_empty() || (same - 100.0).abs() < 1e-9, "{same}");
        }

        #[test]
        fn white_space_does_not_matter(a in "[ab क]{0,20}", b in "[ab क]{0,20}") {
            let squeezed = |text: &str| text.split_whitespace().collect::<String>();
            prop_assert_eq!(sentence_score(&a, &b), sentence_score(&squeezed(&a), &squeezed(&b)));
        }
    }
}

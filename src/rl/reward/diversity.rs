//! `diversity`: different words within an answer, and other answers than the rest of its group.
//!
//! ```text
//! distinct (1 - similarity)
//! ```
//!
//! `distinct` is the mean of distinct-1 and distinct-2 over the words of the answer. `similarity` is that to the other
//! answers to the same prompt: over the runs of three grapheme clusters of the answer, white space aside, the mean
//! share of the other answers that hold the run too. It is 0 for an answer alone, 1 in a group of the same answers;
//! then the part is 0. An answer without words earns nothing.

use std::collections::{HashMap, HashSet};

use unicode_segmentation::UnicodeSegmentation as _;

use super::Sample;
use super::words::{distinct, words};

/// Grapheme clusters of a run that answers are compared by.
const RUN: usize = 3;

pub(super) fn of(group: &[Sample<'_>]) -> Vec<f64> {
    let runs: Vec<HashSet<Vec<&str>>> = group.iter().map(|sample| runs(sample.output)).collect();
    // In how many answers a run occurs: one pass instead of comparing each answer with each other.
    let mut answers: HashMap<&[&str], usize> = HashMap::new();
    for run in runs.iter().flatten() {
        *answers.entry(run).or_default() += 1;
    }
    let others = group.len().saturating_sub(1);
    let similarity = |runs: &HashSet<Vec<&str>>| {
        if runs.is_empty() || others == 0 {
            return 0.0;
        }
        let shared: usize = runs.iter().map(|run| answers[run.as_slice()] - 1).sum();
        shared as f64 / (runs.len() * others) as f64
    };
    let each = group.iter().zip(&runs).map(|(sample, runs)| {
        let words = words(sample.output);
        if words.is_empty() {
            return 0.0;
        }
        let distinct = (distinct(&words, 1) + distinct(&words, 2)) / 2.0;
        (distinct * (1.0 - similarity(runs))).clamp(0.0, 1.0)
    });
    each.collect()
}

/// The different runs of an answer; the whole answer where it is shorter than one.
fn runs(output: &str) -> HashSet<Vec<&str>> {
    let clusters: Vec<&str> = output.graphemes(true).filter(|cluster| !cluster.trim().is_empty()).collect();
    if clusters.len() <= RUN {
        return if clusters.is_empty() { HashSet::new() } else { HashSet::from([clusters]) };
    }
    clusters.windows(RUN).map(<[&str]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(outputs: &[&str]) -> Vec<f64> {
        let sample = |output| Sample { prompt: "p", output, language: None, reference: None, finished: true };
        of(&outputs.iter().map(|output| sample(*output)).collect::<Vec<_>>())
    }

    #[test]
    fn alone_only_the_words_count() {
        assert_eq!(group(&["नदी कहाँ है?"]), [1.0]);
        assert_eq!(group(&["a a a a a"]), [(0.2 + 0.25) / 2.0]);
        assert_eq!(group(&["", " ।"][..1]), [0.0]);
        assert_eq!(group(&[]), [0.0; 0]);
    }

    #[test]
    fn the_same_answers_earn_nothing_and_others_more() {
        assert_eq!(group(&["नदी कहाँ है?", "नदी  कहाँ है?"]), [0.0, 0.0]);
        assert_eq!(group(&["abcdef", "uvwxyz"]), [1.0, 1.0]);
        let [one, two, other] = group(&["abcdef", "abcxyz", "uvwrst"])[..] else { panic!("three") };
        assert!(one == two && one < other && other == 1.0, "{one} {two} {other}");
        // abc is one of four runs, and one of the two others has it.
        assert_eq!(one, 1.0 - 0.25 / 2.0);
    }
}

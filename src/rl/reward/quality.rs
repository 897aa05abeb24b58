//! `quality`: the product of four parts, each 0 to 1, so that each is needed. An answer without a letter or a digit
//! earns nothing.
//!
//! ```text
//! echo        1 - share of the answer's words that lie in runs of three words which the prompt has as well;
//!             an answer of one or two words: 0 where the prompt has that run, else 1
//! repetition  min(1, d / 0.8), d the smaller of distinct-2 over the words and distinct-6 over the grapheme clusters
//! ending      1 ended by itself with an end mark; 0.5 ended by itself without one; 0.25 cut
//! soundness   2^-b, b the number of damaged places: U+FFFD, control characters, pieces of UTF-8 read as Latin-1
//!             ("à¤¨"), marks without a letter, dotted circles
//! ```
//!
//! End marks are those of the language's script: `।` and `॥` in Devanagari, Bengali and Gurmukhi, `۔` and `؟` in Urdu,
//! `.` in the scripts written with it, and `?`, `!` and `…` everywhere; without a language any of them. Closing
//! brackets and quotation marks may follow. Marathi, Hindi and Nepali are printed with `।` and with `.`; both count.

use std::collections::HashSet;
use std::sync::LazyLock;

use regex::Regex;
use unicode_segmentation::UnicodeSegmentation as _;

use super::Sample;
use super::words::{distinct, words};
use crate::text::{Language, Script};

/// distinct-n from which nothing is taken off: good text repeats a little.
const HEALTHY: f64 = 0.8;
/// Words of a run that is an echo.
const ECHO: usize = 3;

pub(super) fn of(sample: &Sample<'_>) -> f64 {
    let output = sample.output.trim();
    if !output.chars().any(char::is_alphanumeric) {
        return 0.0;
    }
    let words_of_output = words(output);
    let quality = echo(&words_of_output, sample.prompt)
        * repetition(&words_of_output, output)
        * ending(output, sample.language, sample.finished)
        * soundness(output);
    quality.clamp(0.0, 1.0)
}

fn echo(output: &[String], prompt: &str) -> f64 {
    let prompt = words(prompt);
    if output.is_empty() {
        return 1.0;
    }
    let run = output.len().min(ECHO);
    let known: HashSet<&[String]> = prompt.windows(run).collect();
    let mut echoed = vec![false; output.len()];
    for (at, words) in output.windows(run).enumerate() {
        if known.contains(words) {
            echoed[at..at + run].fill(true);
        }
    }
    1.0 - echoed.iter().filter(|echoed| **echoed).count() as f64 / output.len() as f64
}

fn repetition(words: &[String], output: &str) -> f64 {
    let clusters: Vec<&str> = output.graphemes(true).collect();
    (distinct(words, 2).min(distinct(&clusters, 6)) / HEALTHY).min(1.0)
}

fn ending(output: &str, language: Option<Language>, finished: bool) -> f64 {
    match finished {
        false => 0.25,
        true if has_end_mark(output, language) => 1.0,
        true => 0.5,
    }
}

fn has_end_mark(output: &str, language: Option<Language>) -> bool {
    let marks = match language.map(Language::script) {
        Some(Script::Devanagari) => "।॥.",
        Some(Script::Bengali | Script::Gurmukhi) => "।॥",
        Some(Script::Arabic) => "۔؟",
        Some(_) => ".",
        None => "।॥۔؟.",
    };
    let closes = |c: char| ")]}\"'”’»›".contains(c) || c.is_whitespace();
    let last = output.trim_end_matches(closes).chars().next_back();
    last.is_some_and(|last| marks.contains(last) || "?!…".contains(last))
}

fn soundness(output: &str) -> f64 {
    let mut damaged = 0u32;
    let mut before = None;
    for cluster in output.graphemes(true) {
        let first = cluster.chars().next().unwrap_or(' ');
        let is_space = cluster.chars().all(char::is_whitespace);
        let is_damaged =
            !is_space && DAMAGE.is_match(cluster) || before.is_some_and(|before| is_mojibake(before, first));
        damaged += u32::from(is_damaged);
        before = cluster.chars().next_back();
    }
    (-f64::from(damaged)).exp2()
}

/// How a damaged cluster begins: with a mark that has no letter to carry it (a space may carry it in vain), a control character, a character that no
/// text has, or one of the two that stand for damage.
static DAMAGE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^\s*[\p{M}\p{Cc}\p{Co}\p{Cn}\x{FFFD}\x{25CC}]")
        .expect("the pattern is fixed, and a test uses it")
});

/// Two characters that UTF-8 of the scripts here becomes where it is read as Latin-1 or Windows-1252: a lead byte as
/// a letter with an accent, then a byte of continuation.
fn is_mojibake(before: char, c: char) -> bool {
    let lead = matches!(before, 'Â' | 'Ã' | 'à' | 'â' | 'Ø' | 'Ù' | 'Û');
    lead && matches!(c, '\u{80}'..='\u{bf}' | '€' | '™' | 'œ' | '‚' | '„' | '…' | '†' | '‡' | '‰' | 'Œ' | 'Ž')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample<'a>(prompt: &'a str, output: &'a str, language: Language) -> Sample<'a> {
        Sample { prompt, output, language: Some(language), reference: None, finished: true }
    }

    #[test]
    fn a_good_answer_earns_everything() {
        for (output, language) in [
            ("नदी कहाँ है?", Language::Hindi),
            ("यह मेरा परिवार है।", Language::Hindi),
            ("शुभ सकाळ.", Language::Marathi),
            ("আমার মা ডাক্তার।", Language::Bengali),
            ("எனக்கு இனிப்பான தேநீர் பிடிக்கும்.", Language::Tamil),
            ("దయచేసి తాళంచెవిని బల్ల మీద పెట్టండి.", Language::Telugu),
            ("આપણે સવારે મળીશું.", Language::Gujarati),
            ("السلام علیکم۔", Language::Urdu),
            ("ਸ਼ੁਭ ਸਵੇਰ।", Language::Punjabi),
            ("ನಮಸ್ಕಾರ.", Language::Kannada),
            ("സുപ്രഭാതം.", Language::Malayalam),
            ("He said: \"Go!\"", Language::English),
        ] {
            assert_eq!(of(&sample("Translate", output, language)), 1.0, "{output}");
        }
    }

    #[test]
    fn an_echo_earns_nothing() {
        let prompt = "Translate to Hindi: Where is the river?";
        for output in [prompt, "Where is the river?", "river?", " where is the river."] {
            assert_eq!(of(&sample(prompt, output, Language::English)), 0.0, "{output}");
        }
        assert_eq!(of(&sample("Say: Good morning.", "Good morning, my friend.", Language::English)), 1.0);
        let half = "where is the river to be found and who knows it?";
        let earned = of(&sample(prompt, half, Language::English));
        assert!(earned > 0.5 && earned < 0.7, "{earned}");
    }

    #[test]
    fn loops_and_cuts_earn_less() {
        let looped = "नदी नदी नदी नदी नदी नदी नदी नदी नदी नदी।";
        assert!(of(&sample("p", looped, Language::Hindi)) < 0.2);
        assert!(of(&sample("p", &"क".repeat(100), Language::Hindi)) < 0.05);
        let cut = Sample { finished: false, ..sample("p", "नदी कहाँ", Language::Hindi) };
        assert_eq!(of(&cut), 0.25);
        assert_eq!(of(&sample("p", "नदी कहाँ", Language::Hindi)), 0.5);
        assert_eq!(of(&sample("p", "நதி எங்கே।", Language::Tamil)), 0.5, "the mark of another script");
    }

    #[test]
    fn damage_halves() {
        for damaged in
            ["नदी \u{fffd}कहाँ।", "नदी \u{93f}कहाँ।", "नदी \u{25cc} कहाँ।", "नदी\u{1} कहाँ।", "नदी à¤ कहाँ।"]
        {
            assert_eq!(of(&sample("p", damaged, Language::Hindi)), 0.5, "{damaged:?}");
        }
        assert_eq!(of(&sample("p", "À la carte, déjà vu.", Language::English)), 1.0);
        for nothing in ["", " ", "।", "?!", "\u{fffd}"] {
            assert_eq!(of(&sample("p", nothing, Language::Hindi)), 0.0);
        }
    }
}

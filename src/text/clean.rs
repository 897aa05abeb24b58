//! Cleaning of an answer for people who want the answer alone. Knows the prompt and the wanted language, nothing
//! of where the text came from; the raw text always travels beside what this returns.

use unicode_script::{Script as UnicodeScript, UnicodeScript as _};
use unicode_segmentation::{GraphemeCursor, UnicodeSegmentation};

use super::language::Language;
use super::script::Script;

/// Most characters (Unicode scalar values) of an answer that was cleaned for a target language.
pub const MAX_CHARS: usize = 150;

/// The answer alone.
///
/// - The prompt goes where the answer begins with it, as often as it does, if it ends there as a word or a
///   sentence does (the prompt `I` is not cut out of `India`). White space and control characters do not matter
///   for the comparison.
/// - Control characters and invisible marks of direction go; each run of white space becomes one space; none
///   is left at the ends. The joiners ZWJ and ZWNJ stay inside words and emoji.
/// - With a `target`, what stays is the text in that language's script with the digits and punctuation inside
///   it, cut to at most [`MAX_CHARS`] characters. Characters are Unicode scalar values (`char`); the cut is only
///   made where an extended grapheme cluster ends. Without a target nothing is cut.
///
/// No character is added or moved, no grapheme cluster is split, and none is formed of two: where taking a
/// character out would fuse its neighbours, the one behind goes too. Cleaning what is clean (same prompt, same
/// target) changes nothing: the passes below are repeated until one does nothing, which ends because each
/// only shortens.
pub fn clean(raw: &str, prompt: &str, target: Option<Language>) -> String {
    let echo = until_stable(prompt, tidy);
    until_stable(raw, |text| {
        let text = tidy(text);
        let text = without_echo(&text, &echo);
        match target {
            Some(language) => cut(&in_script(text, language.script())).to_owned(),
            None => text.to_owned(),
        }
    })
}

fn until_stable(text: &str, pass: impl Fn(&str) -> String) -> String {
    let mut text = text.to_owned();
    loop {
        let next = pass(&text);
        if next == text {
            return next;
        }
        text = next;
    }
}

/// Puts chosen clusters of a text together again, so that each stays a cluster of its own.
#[derive(Default)]
struct Joined {
    text: String,
    /// Where the last cluster of `text` begins.
    last: usize,
    /// White space was seen since the last cluster.
    space: bool,
    /// Something was left out since the last cluster.
    gap: bool,
}

impl Joined {
    fn push(&mut self, cluster: &str) {
        let space = self.space && !self.text.is_empty();
        if space || self.gap {
            let before = if space { " " } else { &self.text[self.last..] };
            if fuse(before, cluster) {
                self.gap = true;
                return;
            }
        }
        if space {
            self.text.push(' ');
        }
        self.last = self.text.len();
        self.text.push_str(cluster);
        (self.space, self.gap) = (false, false);
    }
}

/// Whether two clusters, one behind the other, are one.
fn fuse(before: &str, after: &str) -> bool {
    if before.is_empty() || after.is_empty() {
        return false;
    }
    let both = [before, after].concat();
    let boundary = GraphemeCursor::new(before.len(), both.len(), true).is_boundary(&both, 0);
    !boundary.expect("the whole text is given, so no more of it is asked for")
}

/// Control characters and white space.
fn tidy(text: &str) -> String {
    let mut joined = Joined::default();
    for cluster in text.graphemes(true) {
        if cluster.chars().any(char::is_whitespace) {
            joined.space = true;
        } else if cluster.chars().any(is_invisible) || cluster.chars().all(is_joiner) {
            joined.gap = true;
        } else {
            joined.push(cluster);
        }
    }
    joined.text
}

/// Characters that are never seen and that no spelling needs: controls, marks of direction, zero-width spaces,
/// soft hyphens, byte-order marks. Each is a grapheme cluster alone. The tag characters of flags are not here.
fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{feff}'
            | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{fff0}'..='\u{fffb}')
}

/// ZWNJ, ZWJ, the grapheme joiner and the variation selectors: they mean something only behind a character.
fn is_joiner(c: char) -> bool {
    matches!(c, '\u{200c}' | '\u{200d}' | '\u{34f}' | '\u{fe00}'..='\u{fe0f}')
}

/// What follows the copies of `echo` at the beginning of a text; both are tidy.
fn without_echo<'a>(text: &'a str, echo: &str) -> &'a str {
    let Some(last) = echo.chars().next_back() else { return text };
    let mut text = text;
    while let Some(rest) = text.strip_prefix(echo) {
        let ends = match rest.chars().next() {
            None => true,
            Some(next) => next == ' ' || is_punctuation(last) || is_punctuation(next),
        };
        if !ends || fuse(echo.graphemes(true).next_back().unwrap_or(""), rest) {
            break;
        }
        text = rest.trim_start_matches(' ');
    }
    text
}

/// The longest beginning of at most [`MAX_CHARS`] characters that ends where a cluster does.
fn cut(text: &str) -> &str {
    let (mut chars, mut end) = (0, 0);
    for (start, cluster) in text.grapheme_indices(true) {
        chars += cluster.chars().count();
        if chars > MAX_CHARS {
            break;
        }
        end = start + cluster.len();
    }
    text[..end].trim_end_matches(' ')
}

/// What a cluster is to the script that is looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Of the script.
    Script,
    /// A digit that all scripts share.
    Digit,
    /// Punctuation, currency and the like: one character.
    Punctuation(char),
    /// A space.
    Space,
    /// Anything else: other scripts, emoji.
    Foreign,
}

impl Class {
    fn of(cluster: &str, script: Script) -> Self {
        let mut chars = cluster.chars();
        let first = chars.next().unwrap_or(' ');
        let single = chars.next().is_none();
        if cluster == " " {
            Self::Space
        } else if single && is_punctuation(first) {
            Self::Punctuation(first)
        } else if single && first.is_numeric() && first.script() == UnicodeScript::Common {
            Self::Digit
        } else if script.contains(first)
            && !is_punctuation(first)
            && cluster.chars().all(|c| script.contains(c) || c.script() == UnicodeScript::Inherited)
        {
            Self::Script
        } else {
            Self::Foreign
        }
    }

    fn is(self, set: &str) -> bool {
        matches!(self, Self::Punctuation(c) if set.contains(c))
    }
}

/// Punctuation of all the scripts here, currency and arithmetic signs; no letter, digit, space or emoji.
fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation()
        || matches!(c,
            '¡' | '¢'..='¥' | '§' | '«' | '°' | '±' | '·' | '»' | '¿' | '×' | '÷'
            | '\u{964}' | '\u{965}' | '\u{970}' | '\u{9f2}' | '\u{9f3}' | '\u{af0}' | '\u{af1}' | '\u{bf9}'
            | '\u{60c}' | '\u{61b}' | '\u{61f}' | '\u{66a}'..='\u{66d}' | '\u{6d4}'
            | '\u{2010}'..='\u{2027}' | '\u{2030}'..='\u{203b}' | '\u{203d}'..='\u{2048}'
            | '\u{204a}'..='\u{205e}' | '\u{20a0}'..='\u{20c0}' | '\u{2212}')
}

/// Ends a sentence or belongs to the number before it, so that it stays at the end of what is kept.
const ENDINGS: &str = ".!?…।॥۔؟%٪";
/// Stands before the word or number that it belongs to.
const CURRENCY: &str = "₹$€£¥৳";
/// Separates digits within one number, time or date.
const WITHIN_NUMBERS: &str = ".,:/-٫٬";
/// Brackets and quotation marks: what opens, what closes.
const PAIRS: [(char, char); 9] = [
    ('(', ')'),
    ('[', ']'),
    ('{', '}'),
    ('"', '"'),
    ('\'', '\''),
    ('“', '”'),
    ('‘', '’'),
    ('«', '»'),
    ('‹', '›'),
];

/// The parts of a tidy text that are in the script, each with the digits and punctuation inside it, and at its
/// ends with the numbers, full stops and paired brackets that belong to it.
fn in_script(text: &str, script: Script) -> String {
    let clusters: Vec<&str> = text.graphemes(true).collect();
    let classes: Vec<Class> = clusters.iter().map(|cluster| Class::of(cluster, script)).collect();
    let mut joined = Joined::default();
    let mut start = 0;
    for run in classes.split_inclusive(|&class| class == Class::Foreign) {
        let own = run.strip_suffix(&[Class::Foreign]).unwrap_or(run);
        let kept = kept_of(own);
        for (at, class) in run.iter().enumerate() {
            match class {
                Class::Space => joined.space = true,
                _ if kept.contains(&at) => joined.push(clusters[start + at]),
                _ => joined.gap = true,
            }
        }
        start += run.len();
    }
    joined.text
}

/// Which part of a run without foreign clusters stays; empty when it has nothing of the script.
fn kept_of(run: &[Class]) -> std::ops::Range<usize> {
    let Some(mut start) = run.iter().position(|&class| class == Class::Script) else { return 0..0 };
    let last = run.iter().rposition(|&class| class == Class::Script).unwrap_or(start);
    let at = |i: usize| run.get(i).copied().unwrap_or(Class::Foreign);
    let before = |start: usize, n: usize| start.checked_sub(n).map_or(Class::Foreign, at);

    loop {
        let (near, far) = (before(start, 1), before(start, 2));
        let opens = |class: Class| {
            PAIRS.iter().any(|&(open, close)| {
                class == Class::Punctuation(open) && run[start..].contains(&Class::Punctuation(close))
            })
        };
        start -= match near {
            Class::Digit => 1,
            Class::Space if far == Class::Digit => 2,
            _ if near.is(CURRENCY) || opens(near) => 1,
            _ if near.is(WITHIN_NUMBERS) && far == Class::Digit && at(start) == Class::Digit => 2,
            _ => break,
        };
    }

    let mut end = last + 1;
    loop {
        let (near, far) = (at(end), at(end + 1));
        let closes = |class: Class| {
            PAIRS.iter().any(|&(open, close)| {
                let count = |c| run[start..end].iter().filter(|&&k| k == Class::Punctuation(c)).count();
                class == Class::Punctuation(close)
                    && if open == close { count(open) % 2 == 1 } else { count(open) > count(close) }
            })
        };
        end += match near {
            Class::Digit => 1,
            Class::Space if far == Class::Digit || far.is(ENDINGS) => 2,
            _ if near.is(ENDINGS) || closes(near) => 1,
            _ if near.is(WITHIN_NUMBERS) && far == Class::Digit && before(end, 1) == Class::Digit => 2,
            _ => break,
        };
    }
    start..end
}

#[cfg(test)]
mod tests;

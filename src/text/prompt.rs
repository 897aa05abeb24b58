//! Which language a translation prompt asks for, as people type such prompts in English and in the languages
//! themselves. A prompt that is no request to translate has no target. Table driven; knows no model.

mod table;

use self::table::NATIVE;
use super::language::Language;

/// The language into which the prompt asks to translate, if it asks that.
///
/// The first request in the prompt counts, so that a text to translate may itself speak of translating.
pub fn target_of_prompt(prompt: &str) -> Option<Language> {
    let prompt = decompose_nukta(&prompt.to_lowercase());
    in_english(&prompt).or_else(|| NATIVE.iter().find_map(|native| native.target(&prompt)))
}

/// What a request to translate says in English.
fn in_english(prompt: &str) -> Option<Language> {
    let words = words_of(prompt);
    let word = |i: usize| words.get(i).map_or("", |w| w.text);
    for i in 0..words.len() {
        match word(i) {
            // "Translate to Hindi: …", "translate the following into Tamil", "translate 'water' to Telugu".
            "translate" | "translation" | "render" => {
                if let Some(answer) = after_translate(prompt, &words, i) {
                    return answer;
                }
                // "Hindi translation: …", "give the Tamil translation of …".
                if word(i) == "translation"
                    && let Some(language) = i.checked_sub(1).and_then(|before| Language::parse(word(before)))
                {
                    return Some(language);
                }
            }
            // "How do you say good morning in Tamil?", "say thank you in Urdu", "what is water called in Odia?".
            "say" | "called" | "mean" | "word" if i == 0 || is_question(&words[..i]) => {
                if let Some(language) = at_the_end(&words[i..]) {
                    return Some(language);
                }
            }
            // "English to Hindi: good morning", "English -> Hindi", "en to ta".
            "to" | "->" | "→" | "=>" if i == 1 => {
                let pair = (Language::parse(word(0)), Language::parse(word(2)));
                if let (Some(_), Some(language)) = pair {
                    return Some(language);
                }
            }
            // "Into Bengali: good morning", "in Hindi: good morning", "to Urdu: …".
            "in" | "into" | "to" if i == 0 => {
                if let Some(language) = Language::parse(word(1))
                    && words.get(1).is_some_and(|w| prompt[w.end..].trim_start().starts_with([':', '\n']))
                {
                    return Some(language);
                }
            }
            _ => {}
        }
    }
    None
}

/// The target of the request that begins with word `at`: `None` when it is no request, `Some(None)` when it
/// asks for a language that is not known here.
fn after_translate(prompt: &str, words: &[Word], at: usize) -> Option<Option<Language>> {
    let names_target = |i: usize| matches!(words[i].text, "to" | "into" | "in" | "->" | "→");
    // The request ends where the text to translate begins.
    let from = words[at].end;
    let request_end = prompt[from..].find([':', '\n']).map_or(prompt.len(), |colon| from + colon);
    for i in at + 1..words.len().saturating_sub(1) {
        if words[i].end > request_end {
            break;
        }
        if names_target(i) {
            // "to simple Hindi", "into the Tamil language".
            let named = words[i + 1..].iter().take(3).find_map(|word| Language::parse(word.name()));
            let directly = i == at + 1 && words[i + 1].end <= request_end;
            if named.is_some() || directly {
                return Some(named);
            }
        }
    }
    at_the_end(&words[at..]).map(Some)
}

/// The language with which a prompt ends: "… in Tamil?", "… to Hindi please".
fn at_the_end(words: &[Word]) -> Option<Language> {
    let polite = |word: &&Word| !matches!(word.text, "please" | "language" | "script" | "only" | "now");
    let mut back = words.iter().rev().filter(polite);
    let language = Language::parse(back.next()?.name())?;
    matches!(back.next()?.text, "in" | "into" | "to" | "->" | "→").then_some(language)
}

/// Whether the words before "say", "called" or "mean" make a question or a request of it.
fn is_question(before: &[Word]) -> bool {
    let asks =
        |word: &Word| matches!(word.text, "how" | "what" | "what's" | "can" | "could" | "please" | "the");
    before.len() <= 12 && before.first().is_some_and(asks)
}

/// A word of a prompt and where it ends, in bytes.
struct Word<'a> {
    text: &'a str,
    end: usize,
}

impl Word<'_> {
    /// The word without a genitive: "Hindi's" names Hindi.
    fn name(&self) -> &str {
        self.text.strip_suffix("'s").unwrap_or(self.text)
    }
}

fn words_of(prompt: &str) -> Vec<Word<'_>> {
    let is_edge = |c: char| c.is_ascii_punctuation() || "“”‘’«»।…¿¡".contains(c);
    let mut words = Vec::new();
    for part in prompt.split([' ', '\t', '\n', '\r', '/', ',', ':']) {
        let trimmed = if matches!(part, "->" | "=>") { part } else { part.trim_matches(is_edge) };
        if !trimmed.is_empty() {
            let end = trimmed.as_ptr() as usize - prompt.as_ptr() as usize + trimmed.len();
            words.push(Word { text: trimmed, end });
        }
    }
    words
}

/// What requests look like in one language (or in several that share the words).
struct Native {
    /// Beginnings of words that ask for a translation, or of "how does one say".
    requests: &'static [&'static str],
    /// Stems of the languages' names: what precedes case endings.
    names: &'static [(&'static str, Language)],
    /// What follows a name that is the target: case endings, and, after a space, postpositions.
    into: &'static [&'static str],
}

impl Native {
    /// The target that is named nearest before the first request, else nearest after it.
    fn target(&self, prompt: &str) -> Option<Language> {
        let request = self.requests.iter().filter_map(|stem| prompt.find(stem)).min()?;
        let mut found: Vec<(usize, Language)> = Vec::new();
        for &(stem, language) in self.names {
            let starts = prompt.match_indices(stem).map(|(at, _)| at);
            found.extend(starts.filter(|&at| self.is_target(prompt, at, stem)).map(|at| (at, language)));
        }
        let before = found.iter().filter(|(at, _)| *at < request).max_by_key(|(at, _)| *at);
        let after = || found.iter().min_by_key(|(at, _)| *at);
        before.or_else(after).map(|&(_, language)| language)
    }

    fn is_target(&self, prompt: &str, at: usize, stem: &str) -> bool {
        let begins_word = prompt[..at].chars().next_back().is_none_or(is_between_words);
        let rest = &prompt[at + stem.len()..];
        let ends = |rest: &str| rest.chars().next().is_none_or(is_between_words);
        // "हिंदी अनुवाद", "বাংলা অনুবাদ": the name stands directly before the request.
        let beside = ends(rest) && self.requests.iter().any(|request| rest.trim_start().starts_with(request));
        begins_word && (beside || self.into.iter().any(|into| rest.strip_prefix(into).is_some_and(ends)))
    }
}

fn is_between_words(c: char) -> bool {
    c.is_whitespace() || c.is_ascii_punctuation() || "।॥“”‘’«»…،؛؟۔".contains(c)
}

/// Letters with nukta have two spellings; the tables use the longer one, and so does Unicode's normal form.
fn decompose_nukta(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let (base, nukta) = match c {
            '\u{95c}' => ('\u{921}', '\u{93c}'),
            '\u{95b}' => ('\u{91c}', '\u{93c}'),
            '\u{9dc}' => ('\u{9a1}', '\u{9bc}'),
            '\u{9df}' => ('\u{9af}', '\u{9bc}'),
            _ => {
                out.push(c);
                continue;
            }
        };
        out.extend([base, nukta]);
    }
    out
}

#[cfg(test)]
mod tests;

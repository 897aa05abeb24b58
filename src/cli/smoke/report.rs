//! Judging the answers of a smoke test, and showing them as a table that is Markdown as well. Pure.

use std::time::SystemTime;

use super::prompts::Prompt;
use crate::text::chrf::sentence_score;
use crate::text::{Language, identify, is_in};

/// Least chrF to the reference, 0 to 100, of an answer that passes. Another good translation of a short sentence
/// mostly comes to 40 to 65; other sentences of the same language to about 10, hardly ever to more than 25.
pub(super) const MIN_CHRF: f64 = 40.0;

/// An answer with what is to be said of it.
#[derive(Debug, Clone)]
pub(super) struct Judged {
    id: String,
    category: String,
    prompt: String,
    output: String,
    expected: Language,
    found: Option<Language>,
    /// As far as that can be told.
    in_expected: bool,
    /// Share of the letters that are in the script of the wanted language, 0 to 1.
    share: f32,
    chrf: Option<f64>,
    latency_s: f64,
    /// Why it does not pass.
    pub(super) fault: Option<String>,
}

/// Judges one answer.
pub(super) fn judge(prompt: &Prompt, output: String, latency_s: f64) -> Judged {
    let chrf = prompt.reference.as_ref().map(|reference| sentence_score(&output, reference));
    let (found, in_expected) = (identify(&output).language, is_in(&output, prompt.language));
    let fault = if output.trim().is_empty() {
        Some("empty".to_owned())
    } else if is_echo(&prompt.prompt, &output) {
        Some("echo of the prompt".to_owned())
    } else if !in_expected {
        Some(format!("not in {}", prompt.language.title()))
    } else if chrf.is_some_and(|chrf| chrf < MIN_CHRF) {
        Some(format!("chrF below {MIN_CHRF}"))
    } else {
        None
    };
    Judged {
        id: prompt.id.clone(),
        category: prompt.category.clone(),
        prompt: prompt.prompt.clone(),
        expected: prompt.language,
        found,
        in_expected,
        share: prompt.language.script().share_of_letters(&output),
        chrf,
        latency_s,
        output,
        fault,
    }
}

/// A prompt that the server gave no answer to.
pub(super) fn failed(prompt: &Prompt, reason: String, latency_s: f64) -> Judged {
    Judged { fault: Some(reason), ..judge(prompt, String::new(), latency_s) }
}

/// Whether an answer is a part of the prompt, or the prompt with something behind it. White space and case do not
/// matter.
fn is_echo(prompt: &str, output: &str) -> bool {
    let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    let (prompt, output) = (plain(prompt), plain(output));
    let output = output.trim_matches(|c: char| c.is_ascii_punctuation() || c.is_whitespace() || c == '।');
    !output.is_empty() && (prompt.contains(output) || output.starts_with(&prompt))
}

/// One row an answer.
pub(super) fn table(judged: &[Judged]) -> String {
    let mut text =
        "| id | prompt | output | language | script | chrF | seconds | pass |\n|---|---|---|---|---:|---:|---:|---|\n"
            .to_owned();
    for one in judged {
        let language = match one.found {
            Some(found) if found == one.expected => found.to_string(),
            _ if one.in_expected => format!("{}?", one.expected),
            found => format!("{}, not {}", found.map_or("-", Language::code), one.expected),
        };
        let chrf = one.chrf.map_or("-".to_owned(), |chrf| format!("{chrf:.1}"));
        let pass = one.fault.as_ref().map_or("yes".to_owned(), |fault| format!("no: {}", cell(fault)));
        text += &format!(
            "| {} | {} | {} | {language} | {:.0}% | {chrf} | {:.2} | {pass} |\n",
            cell(&one.id),
            cell(&one.prompt),
            cell(&one.output),
            one.share * 100.0,
            one.latency_s,
        );
    }
    text
}

/// The whole report.
pub(super) fn markdown(about: &str, verdict: &str, judged: &[Judged]) -> String {
    let now = humantime::format_rfc3339_seconds(SystemTime::now());
    let mut categories: Vec<&str> =
        judged.iter().map(|one| one.category.as_str()).filter(|c| !c.is_empty()).collect();
    categories.sort_unstable();
    categories.dedup();
    let topics = match categories.as_slice() {
        [] => String::new(),
        some => format!(" about {}", cell(&some.join(", "))),
    };
    format!(
        "# Smoke test\n\n{verdict}: {}, {now}, {} prompts{}.\n\nAn answer passes that is in the language asked for, is \
         no echo of the prompt, and has chrF {MIN_CHRF} or more to the reference where there is one. `language` is what \
         was found, with a `?` where the text is too short to tell the languages of its script apart, `script` the share of letters in the script of the language asked for, `seconds` the whole \
         request's.\n\n{}",
        cell(about),
        judged.len(),
        topics,
        table(judged),
    )
}

/// A text inside a cell: one line, no bars of its own.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('\\', "\\\\").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(reference: Option<&str>) -> Prompt {
        Prompt {
            id: "7".into(),
            language: Language::Hindi,
            prompt: "हिंदी में अनुवाद करें: It is raining.".into(),
            reference: reference.map(str::to_owned),
            category: "weather".into(),
        }
    }

    fn fault(output: &str) -> Option<String> {
        judge(&prompt(Some("बारिश हो रही है।")), output.into(), 0.5).fault
    }

    #[test]
    fn what_passes_is_an_answer_in_the_language_that_is_like_the_reference() {
        assert_eq!(fault("बारिश हो रही है।"), None);
        assert_eq!(fault("अभी बारिश हो रही है"), None);
        for (output, part) in [
            ("", "empty"),
            (" \n", "empty"),
            ("हिंदी में अनुवाद करें: It is raining.", "echo"),
            ("हिंदी  में अनुवाद करें।", "echo"),
            ("हिंदी में अनुवाद करें: it is raining. बारिश हो रही है।", "echo"),
            ("It is raining", "echo"),
            ("It rains now", "not in Hindi"),
            ("वर्षा बारिश rain raining rains", "not in Hindi"),
            ("বৃষ্টি হচ্ছে।", "not in Hindi"),
            ("मेरा नाम राम", "chrF"),
            ("?!", "not in Hindi"),
        ] {
            let fault = fault(output);
            assert!(fault.as_ref().is_some_and(|fault| fault.contains(part)), "{output:?}: {fault:?}");
        }
        assert_eq!(judge(&prompt(None), "मेरा नाम राम".into(), 0.5).fault, None, "no reference, no chrF");
    }

    #[test]
    fn tables_hold_what_was_found() {
        let judged = [
            judge(&prompt(Some("बारिश हो रही है।")), "बारिश हो रही है।".into(), 1.234),
            judge(&prompt(None), "a|b\nc".into(), 0.5),
        ];
        let text = table(&judged);
        let rows: Vec<&str> = text.lines().collect();
        assert_eq!(rows.len(), 4);
        assert!(rows[2].contains("| 100% | 100.0 | 1.23 | yes |"), "{}", rows[2]);
        assert!(
            rows[3].contains("| a\\|b c | en, not hi | 0% | - | 0.50 | no: not in Hindi |"),
            "{}",
            rows[3]
        );
        let report = markdown("model m", "1 of 2 passed, 2 must", &judged);
        assert!(report.starts_with("# Smoke test\n\n1 of 2 passed, 2 must: model m, 20"), "{report}");
        assert!(report.contains("2 prompts about weather.") && report.ends_with(&text), "{report}");
    }
}

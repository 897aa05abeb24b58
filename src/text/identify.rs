//! Which of the served languages a text is in: by its script, and where a script serves several of them, by the
//! trigrams of its words. Knows nothing of where the text comes from.

use whatlang::{Detector, Lang};

use super::language::Language;
use super::script::Script;

/// Share of a text's letters that must be in a language's script for the text to be in that language. The rest
/// leaves room for names, units and quotations in another script.
pub const SHARE: f32 = 0.8;

/// The detector's confidence, 0 to 1, above which its word counts. Of the first six words of each of the 997 dev
/// sentences of FLORES-200 in Hindi, Marathi and Nepali it names at this confidence the wrong one in at most one,
/// and the right one in 22 to 40 of a hundred; of whole sentences the right one in 70 to 95 of a hundred. The rest it
/// leaves open: fewer words than about four say too little.
const CONFIDENT: f64 = 0.5;

/// What is found out about a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Identified {
    /// The likeliest of the served languages; `None` where no letter is in one of their scripts, and for Assamese.
    pub language: Option<Language>,
    /// Share of the letters that are in the script most of them are in, 0 to 1.
    pub share: f32,
    /// Whether there is enough to go by: [`SHARE`] of the letters in one script, and for a script of several languages
    /// a detector that is sure.
    pub reliable: bool,
}

/// The language of a text. One script alone counts, that of most letters.
pub fn identify(text: &str) -> Identified {
    let mut script = Script::ALL[0];
    let mut share = 0.0;
    for other in Script::ALL {
        let of_other = other.share_of_letters(text);
        if of_other > share {
            (script, share) = (other, of_other);
        }
    }
    let enough = share >= SHARE;
    match candidates(script).as_slice() {
        _ if share == 0.0 => Identified { language: None, share, reliable: false },
        _ if is_assamese(text, script) => Identified { language: None, share, reliable: enough },
        [only] => Identified { language: Some(*only), share, reliable: enough },
        several => {
            let (language, confidence) = detect(text, script, several);
            Identified { language: Some(language), share, reliable: enough && confidence > CONFIDENT }
        }
    }
}

/// Whether a text is in a language, as far as that can be told: [`SHARE`] of its letters are in the language's
/// script, and where the script serves several languages the detector does not speak for another one. A text of a
/// few words in such a script is taken for any of them, because nothing in it decides: `धन्यवाद` is Hindi, Marathi
/// and Nepali. A text without letters is in no language.
pub fn is_in(text: &str, language: Language) -> bool {
    let verdict = judge(text, language);
    verdict.share >= SHARE
        && match verdict.voice {
            Voice::For { .. } => true,
            Voice::Against { confidence } => confidence <= CONFIDENT,
        }
}

/// How far a text is in one language.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// Share of the letters that are in the language's script, 0 to 1; 0 without letters.
    pub share: f32,
    /// What else speaks for the language, or against it.
    pub voice: Voice,
}

/// Whether a text in a language's script is in that language, and how sure that is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Voice {
    /// It is.
    For {
        /// 0 to 1; 1 where the script serves no other language.
        confidence: f64,
        /// Whether that is enough to go by.
        reliable: bool,
    },
    /// It is in another one.
    Against {
        /// 0 to 1.
        confidence: f64,
    },
}

/// How far a text is in a language: by its script, and where that serves several languages by the detector. What is in
/// the Bengali script with letters that only Assamese has is no Bengali.
pub fn judge(text: &str, language: Language) -> Verdict {
    let script = language.script();
    let share = script.share_of_letters(text);
    let voice = match candidates(script).as_slice() {
        [_] if is_assamese(text, script) => Voice::Against { confidence: 1.0 },
        [_] => Voice::For { confidence: 1.0, reliable: true },
        several => {
            let (found, confidence) = detect(text, script, several);
            match found == language {
                true => Voice::For { confidence, reliable: confidence > CONFIDENT },
                false => Voice::Against { confidence },
            }
        }
    };
    Verdict { share, voice }
}

/// The served languages of a script; at least one.
fn candidates(script: Script) -> Vec<Language> {
    Language::all().filter(|language| language.script() == script).collect()
}

/// Letters of the Bengali script that Bengali does not have and Assamese cannot do without: ra and va.
fn is_assamese(text: &str, script: Script) -> bool {
    script == Script::Bengali && text.contains(['\u{9f0}', '\u{9f1}'])
}

/// The likeliest of several languages of one script, and the detector's confidence, 0 to 1.
fn detect(text: &str, script: Script, several: &[Language]) -> (Language, f64) {
    let known: Vec<(Lang, Language)> =
        several.iter().filter_map(|&language| Some((in_whatlang(language)?, language))).collect();
    // What else there is in the text must not decide which script the detector looks at. Joiners stand inside words.
    let words: String = text
        .chars()
        .filter(|c| !matches!(c, '\u{200c}' | '\u{200d}'))
        .map(|c| if c.is_alphabetic() && script.contains(c) || is_sign(c, script) { c } else { ' ' })
        .collect();
    let detector = Detector::with_allowlist(known.iter().map(|(lang, _)| *lang).collect());
    let found = detector.detect(&words).and_then(|info| {
        let (_, language) = known.iter().find(|(lang, _)| *lang == info.lang())?;
        Some((*language, info.confidence()))
    });
    found.unwrap_or((several[0], 0.0))
}

/// Virama and nukta: no letters, but parts of words, which the detector's trigrams hold.
fn is_sign(c: char, script: Script) -> bool {
    script == Script::Devanagari && matches!(c, '\u{93c}' | '\u{94d}')
}

/// The languages that share a script, as the detector names them.
fn in_whatlang(language: Language) -> Option<Lang> {
    match language {
        Language::Hindi => Some(Lang::Hin),
        Language::Marathi => Some(Lang::Mar),
        Language::Nepali => Some(Lang::Nep),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A sentence or two in each language, long enough for the detector.
    const TEXTS: [(Language, &str); 12] = [
        (
            Language::Hindi,
            "मेरी बहन हर सुबह स्कूल जाती है और शाम को अपने दोस्तों के साथ बगीचे में खेलती है। उसने कल एक नई किताब पढ़ी थी।",
        ),
        (Language::Bengali, "আমার বোন প্রতিদিন সকালে স্কুলে যায়।"),
        (Language::Tamil, "என் சகோதரி தினமும் காலையில் பள்ளிக்குச் செல்கிறாள்."),
        (Language::Telugu, "మా చెల్లి ప్రతి ఉదయం బడికి వెళుతుంది."),
        (Language::Gujarati, "મારી બહેન દરરોજ સવારે શાળાએ જાય છે."),
        (
            Language::Marathi,
            "माझी बहीण रोज सकाळी शाळेत जाते आणि संध्याकाळी आपल्या मैत्रिणींसोबत बागेत खेळते. तिने काल एक नवीन पुस्तक वाचले होते.",
        ),
        (Language::Urdu, "میری بہن ہر صبح اسکول جاتی ہے۔"),
        (Language::Punjabi, "ਮੇਰੀ ਭੈਣ ਹਰ ਸਵੇਰ ਸਕੂਲ ਜਾਂਦੀ ਹੈ।"),
        (Language::Kannada, "ನನ್ನ ತಂಗಿ ಪ್ರತಿದಿನ ಬೆಳಿಗ್ಗೆ ಶಾಲೆಗೆ ಹೋಗುತ್ತಾಳೆ."),
        (Language::Malayalam, "എന്റെ സഹോദരി എല്ലാ ദിവസവും രാവിലെ സ്കൂളിൽ പോകുന്നു."),
        (Language::English, "My sister goes to school every morning."),
        (
            Language::Nepali,
            "सरकारले गाउँका सबै मानिसहरूका लागि नयाँ विद्यालय बनाउने निर्णय गरेको छ र यसको काम अर्को वर्षदेखि सुरु हुनेछ।",
        ),
    ];

    #[test]
    fn every_language_is_told_from_every_other() {
        for (language, text) in TEXTS {
            let found = identify(text);
            assert_eq!((found.language, found.reliable), (Some(language), true), "{text}: {found:?}");
            assert!(found.share >= SHARE);
            for other in Language::all() {
                assert_eq!(is_in(text, other), other == language, "{text} in {other}");
            }
        }
    }

    #[test]
    fn a_word_or_two_in_a_shared_script_are_left_open() {
        for text in ["धन्यवाद", "नमस्ते।", "पानी"] {
            let found = identify(text);
            assert!(!found.reliable && found.share == 1.0, "{text}: {found:?}");
            for language in [Language::Hindi, Language::Marathi, Language::Nepali] {
                assert!(is_in(text, language), "{text} in {language}");
            }
            assert!(!is_in(text, Language::Urdu));
        }
    }

    #[test]
    fn other_scripts_may_be_a_fifth() {
        assert!(is_in("मेरा नाम Asha है और मैं दिल्ली में रहती हूँ।", Language::Hindi));
        assert!(!is_in("Translate: मेरा नाम", Language::Hindi));
        let mixed = identify("ab कख");
        assert!(mixed.share == 0.5 && !mixed.reliable, "{mixed:?}");
        assert!(!is_in("ab কখ", Language::Bengali) && !is_in("ab কখ", Language::English));
    }

    #[test]
    fn assamese_is_no_bengali() {
        let assamese = "মই ৰাতিপুৱা ভাত খাওঁ।";
        assert_eq!(identify(assamese), Identified { language: None, share: 1.0, reliable: true });
        assert!(!is_in(assamese, Language::Bengali));
        assert!(is_in("আমি সকালে ভাত খাই।", Language::Bengali));
    }

    #[test]
    fn texts_without_letters_are_in_no_language() {
        for text in ["", " \n", "123 ?!", "१२३ ।", "😀"] {
            assert_eq!(identify(text), Identified { language: None, share: 0.0, reliable: false }, "{text}");
            assert!(Language::all().all(|language| !is_in(text, language)), "{text}");
        }
    }

    #[test]
    fn letters_of_scripts_that_are_not_served_count_against() {
        assert_eq!(identify("Привет мир").language, None);
        assert!(!identify("Привет мир नमस्ते").reliable);
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>(), devanagari in "[\u{900}-\u{97f} a\u{200d}]{0,80}") {
            for text in [text, devanagari] {
                let found = identify(&text);
                prop_assert!((0.0..=1.0).contains(&found.share));
                if let (Some(language), true) = (found.language, found.reliable) {
                    prop_assert!(is_in(&text, language));
                }
            }
        }
    }
}

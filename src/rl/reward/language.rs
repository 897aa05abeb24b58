//! `language`: an answer in the language that is wanted. It applies where one is. With s, the share of the letters
//! that are in the language's script, and c, the detector's confidence (0 to 1) where the script serves several of
//! the languages (Hindi, Marathi and Nepali):
//!
//! ```text
//! s                             the script serves this language alone, or the detector is sure of it
//! s (u + (1 - u) c)             it names the language without being sure; below s, since c is at most 0.5 then
//! s u (1 - c)                   it names another one
//! 0                             the Bengali script with Assamese letters, where Bengali is wanted
//! ```
//!
//! u is the setting `unreliable`. So what cannot be told never earns everything, and an answer without letters
//! earns nothing.

use crate::text::{Language, Voice, judge};

/// Settings of the part.
pub(super) struct Judge {
    /// Share that is earned where nothing tells which language it is.
    pub(super) unreliable: f64,
}

impl Judge {
    pub(super) fn of(&self, output: &str, language: Language) -> f64 {
        let verdict = judge(output, language);
        let u = self.unreliable;
        let factor = match verdict.voice {
            Voice::For { reliable: true, .. } => 1.0,
            Voice::For { confidence, .. } => u + (1.0 - u) * confidence,
            Voice::Against { confidence } => u * (1.0 - confidence),
        };
        (f64::from(verdict.share) * factor).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JUDGE: Judge = Judge { unreliable: 0.75 };

    #[test]
    fn a_script_of_one_language_is_a_share() {
        assert_eq!(JUDGE.of("காலை வணக்கம்.", Language::Tamil), 1.0);
        assert_eq!(JUDGE.of("Good morning.", Language::Tamil), 0.0);
        assert_eq!(JUDGE.of("ab கா", Language::Tamil), 0.5);
        assert_eq!(JUDGE.of("", Language::Tamil), 0.0);
        assert_eq!(JUDGE.of("123 ?", Language::English), 0.0);
    }

    #[test]
    fn what_cannot_be_told_never_earns_everything() {
        for word in ["धन्यवाद", "नमस्ते।", "पानी"] {
            for language in [Language::Hindi, Language::Marathi, Language::Nepali] {
                let earned = JUDGE.of(word, language);
                assert!(earned > 0.0 && earned < 1.0, "{word} in {language}: {earned}");
            }
        }
        let hindi =
            "मेरी बहन हर सुबह स्कूल जाती है और शाम को अपने दोस्तों के साथ बगीचे में खेलती है। उसने कल एक नई किताब पढ़ी थी।";
        assert_eq!(JUDGE.of(hindi, Language::Hindi), 1.0);
        assert!(JUDGE.of(hindi, Language::Nepali) < 0.4);
    }

    #[test]
    fn assamese_is_no_bengali() {
        assert_eq!(JUDGE.of("মই ৰাতিপুৱা ভাত খাওঁ।", Language::Bengali), 0.0);
        assert_eq!(JUDGE.of("আমি সকালে ভাত খাই।", Language::Bengali), 1.0);
    }
}

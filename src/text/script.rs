//! The scripts in which the served languages are written, and which characters belong to them. Knows nothing of
//! languages: several share one script.

use unicode_script::{Script as UnicodeScript, UnicodeScript as _};

/// A script, by its Unicode name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Script {
    /// Hindi, Marathi, Nepali.
    Devanagari,
    /// Bengali.
    Bengali,
    /// Tamil.
    Tamil,
    /// Telugu.
    Telugu,
    /// Gujarati.
    Gujarati,
    /// Urdu.
    Arabic,
    /// Punjabi.
    Gurmukhi,
    /// Kannada.
    Kannada,
    /// Malayalam.
    Malayalam,
    /// English.
    Latin,
}

impl Script {
    /// Every script, in the order of declaration.
    pub const ALL: [Self; 10] = [
        Self::Devanagari,
        Self::Bengali,
        Self::Tamil,
        Self::Telugu,
        Self::Gujarati,
        Self::Arabic,
        Self::Gurmukhi,
        Self::Kannada,
        Self::Malayalam,
        Self::Latin,
    ];

    fn unicode(self) -> UnicodeScript {
        match self {
            Self::Devanagari => UnicodeScript::Devanagari,
            Self::Bengali => UnicodeScript::Bengali,
            Self::Tamil => UnicodeScript::Tamil,
            Self::Telugu => UnicodeScript::Telugu,
            Self::Gujarati => UnicodeScript::Gujarati,
            Self::Arabic => UnicodeScript::Arabic,
            Self::Gurmukhi => UnicodeScript::Gurmukhi,
            Self::Kannada => UnicodeScript::Kannada,
            Self::Malayalam => UnicodeScript::Malayalam,
            Self::Latin => UnicodeScript::Latin,
        }
    }

    /// Whether the character is of this script: by its own script property, or, for one that several scripts
    /// share (the Arabic tatweel, Vedic accents), by its list of scripts (UAX #24, `Script_Extensions`).
    /// Characters of no script in particular (spaces, most digits and punctuation, emoji) are of none.
    pub fn contains(self, c: char) -> bool {
        match c.script() {
            UnicodeScript::Common | UnicodeScript::Inherited => {
                let shared_by = c.script_extension();
                !shared_by.is_common()
                    && !shared_by.is_inherited()
                    && shared_by.contains_script(self.unicode())
            }
            script => script == self.unicode(),
        }
    }

    /// Share of the letters of `text`, 0 to 1, that are of this script; 0 for a text without letters. Dependent
    /// vowel signs count as letters (Unicode `Alphabetic`).
    pub fn share_of_letters(self, text: &str) -> f32 {
        let (mut letters, mut ours) = (0u32, 0u32);
        for c in text.chars().filter(|c| c.is_alphabetic()) {
            letters += 1;
            ours += u32::from(self.contains(c));
        }
        if letters == 0 { 0.0 } else { ours as f32 / letters as f32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_of_its_own_script_and_of_no_other() {
        let sentences = [
            "भारत एक देश है।",
            "ভারত একটি দেশ।",
            "இந்தியா ஒரு நாடு.",
            "భారతదేశం ఒక దేశం.",
            "ભારત એક દેશ છે.",
            "بھارت ایک ملک ہے۔",
            "ਭਾਰਤ ਇੱਕ ਦੇਸ਼ ਹੈ।",
            "ಭಾರತ ಒಂದು ದೇಶ.",
            "ഇന്ത്യ ഒരു രാജ്യമാണ്.",
            "India is a country.",
        ];
        for (text, own) in sentences.into_iter().zip(Script::ALL) {
            for script in Script::ALL {
                let expected = if script == own { 1.0 } else { 0.0 };
                assert_eq!(script.share_of_letters(text), expected, "{script:?} in {text}");
            }
        }
    }

    #[test]
    fn shares_count_letters_only() {
        assert_eq!(Script::Devanagari.share_of_letters("123 !? 😀"), 0.0);
        assert_eq!(Script::Devanagari.share_of_letters(""), 0.0);
        assert_eq!(Script::Latin.share_of_letters("ab कख 12"), 0.5);
    }

    #[test]
    fn shared_characters_belong_by_their_extension() {
        assert!(Script::Arabic.contains('\u{640}'), "the tatweel is Common, used by Arabic");
        assert!(Script::Devanagari.contains('\u{951}'), "the udatta is Inherited, used by Devanagari");
        assert!(!Script::Latin.contains('5') && !Script::Devanagari.contains(' '));
        assert!(!Script::Latin.contains('😀'));
    }
}

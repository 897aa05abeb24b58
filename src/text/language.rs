//! The languages that the service is made for: codes, names, scripts. Knows nothing of prompts or models.

use std::fmt;
use std::str::FromStr;

use super::script::Script;

/// A language, by its ISO 639-1 code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Language {
    /// Hindi.
    Hindi,
    /// Bengali.
    Bengali,
    /// Tamil.
    Tamil,
    /// Telugu.
    Telugu,
    /// Gujarati.
    Gujarati,
    /// Marathi.
    Marathi,
    /// Urdu.
    Urdu,
    /// Punjabi in Gurmukhi.
    Punjabi,
    /// Kannada.
    Kannada,
    /// Malayalam.
    Malayalam,
    /// English.
    English,
    /// Nepali.
    Nepali,
}

/// One row of the table of languages.
struct Row {
    language: Language,
    code: &'static str,
    /// ISO 639-3.
    code3: &'static str,
    script: Script,
    /// English name first, then the language's own, then other spellings; all in lower case.
    names: &'static [&'static str],
}

const fn row(
    language: Language,
    code: &'static str,
    code3: &'static str,
    script: Script,
    names: &'static [&'static str],
) -> Row {
    Row { language, code, code3, script, names }
}

/// In the order of the enum, so that a language is an index.
const TABLE: [Row; 12] = [
    row(Language::Hindi, "hi", "hin", Script::Devanagari, &["hindi", "हिन्दी", "हिंदी"]),
    row(Language::Bengali, "bn", "ben", Script::Bengali, &["bengali", "বাংলা", "bangla", "বাঙলা"]),
    row(Language::Tamil, "ta", "tam", Script::Tamil, &["tamil", "தமிழ்"]),
    row(Language::Telugu, "te", "tel", Script::Telugu, &["telugu", "తెలుగు"]),
    row(Language::Gujarati, "gu", "guj", Script::Gujarati, &["gujarati", "ગુજરાતી"]),
    row(Language::Marathi, "mr", "mar", Script::Devanagari, &["marathi", "मराठी"]),
    row(Language::Urdu, "ur", "urd", Script::Arabic, &["urdu", "اردو", "اُردو"]),
    row(Language::Punjabi, "pa", "pan", Script::Gurmukhi, &["punjabi", "ਪੰਜਾਬੀ", "panjabi"]),
    row(Language::Kannada, "kn", "kan", Script::Kannada, &["kannada", "ಕನ್ನಡ"]),
    row(Language::Malayalam, "ml", "mal", Script::Malayalam, &["malayalam", "മലയാളം"]),
    row(Language::English, "en", "eng", Script::Latin, &["english"]),
    row(Language::Nepali, "ne", "nep", Script::Devanagari, &["nepali", "नेपाली"]),
];

/// A text that names none of the languages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no language that is known here; use one of {list}", list = Language::list())]
pub struct UnknownLanguage(pub String);

impl Language {
    /// Every language, in the order of declaration.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.language)
    }

    fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// ISO 639-1: two letters.
    pub fn code(self) -> &'static str {
        self.row().code
    }

    /// The English name, in lower case.
    pub fn english_name(self) -> &'static str {
        self.row().names[0]
    }

    /// The English name with a capital letter, as prompts have it.
    pub fn title(self) -> String {
        let name = self.english_name();
        name[..1].to_ascii_uppercase() + &name[1..]
    }

    /// The name that the language has for itself.
    pub fn native_name(self) -> &'static str {
        let names = self.row().names;
        names.get(1).copied().unwrap_or(names[0])
    }

    /// The script in which the language is written here.
    pub fn script(self) -> Script {
        self.row().script
    }

    /// The language of a code (`hi`, `hin`, `hi-IN`, `hin_Deva`) or of a name in English or in the language
    /// itself; case and surrounding space do not matter.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_lowercase();
        let primary = text.split(['-', '_']).next().unwrap_or("");
        let found = TABLE
            .iter()
            .find(|row| row.code == primary || row.code3 == primary || row.names.contains(&text.as_str()));
        // FLORES and others write Nepali with the code of the individual language.
        found.map(|row| row.language).or_else(|| (primary == "npi").then_some(Self::Nepali))
    }

    /// The codes, for messages.
    fn list() -> String {
        TABLE.iter().map(|row| row.code).collect::<Vec<_>>().join(", ")
    }
}

impl FromStr for Language {
    type Err = UnknownLanguage;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text).ok_or_else(|| UnknownLanguage(text.to_owned()))
    }
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (index, language) in Language::all().enumerate() {
            assert_eq!(language as usize, index);
        }
    }

    #[test]
    fn parses_codes_and_names() {
        for language in Language::all() {
            for name in [language.code(), language.english_name(), language.native_name()] {
                assert_eq!(Language::parse(name), Some(language), "{name}");
                assert_eq!(Language::parse(&format!("  {} ", name.to_uppercase())), Some(language), "{name}");
            }
            assert!(language.script().share_of_letters(language.native_name()) > 0.99);
        }
        for (text, language) in [
            ("HI", Language::Hindi),
            ("hi-IN", Language::Hindi),
            ("ben_Beng", Language::Bengali),
            ("npi_Deva", Language::Nepali),
            ("Bangla", Language::Bengali),
            ("हिंदी", Language::Hindi),
        ] {
            assert_eq!(Language::parse(text), Some(language), "{text}");
        }
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        for text in ["", "fr", "French", "hindustani", "h", "hi in", "-"] {
            assert_eq!(Language::parse(text), None, "{text}");
        }
        let error = "fr".parse::<Language>().unwrap_err().to_string();
        assert!(error.contains("'fr'") && error.contains("hi, bn, ta"), "{error}");
    }
}

//! Prompts and answers that the demo model learns: every sentence into every language in some of the forms in
//! which people ask, back into English, and an honest answer about languages that it does not know.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use serde_json::json;

use super::phrasebook::{Entry, LANGUAGES};

/// What is said of a language that the model does not know.
const UNKNOWN: &str = "I do not know this language yet.";

/// Languages that are asked for in vain, Nepali among them: an adapter will teach it.
const FOREIGN: [&str; 24] = [
    "Nepali",
    "French",
    "German",
    "Spanish",
    "Japanese",
    "Odia",
    "Assamese",
    "Arabic",
    "Russian",
    "Chinese",
    "Sinhala",
    "Italian",
    "Korean",
    "Persian",
    "Portuguese",
    "Nepali",
    "Thai",
    "Greek",
    "Dutch",
    "Turkish",
    "Swahili",
    "Konkani",
    "Maithili",
    "Nepali",
];

/// Forms in English; `{L}` is the language, `{s}` the sentence.
const FORMS: [&str; 12] = [
    "Translate to {L}: {s}",
    "Translate to {L}: {s}",
    "Translate to {L}: {s}",
    "Translate to {L}. Output only {L}: {s}",
    "Translate to {L}. Output only {L}: {s}",
    "How do you say \"{s}\" in {L}?",
    "How do you say '{s}' in {L}?",
    "Translate English to {L}: {s}",
    "Translate from English to {L}: {s}",
    "Translate the following sentence into {L}: {s}",
    "{L} translation: {s}",
    "Translate \"{s}\" to {L}",
];

/// Forms in each language itself.
pub(crate) fn native_forms(code: &str) -> &'static [&'static str] {
    match code {
        "hi" => &["हिंदी में अनुवाद करें: {s}", "हिन्दी में अनुवाद कीजिए: {s}", "इसे हिंदी में कैसे कहते हैं: {s}"],
        "bn" => &["বাংলায় অনুবাদ করুন: {s}", "বাংলায় অনুবাদ কর: {s}", "এটি বাংলায় কীভাবে বলে: {s}"],
        "ta" => &["தமிழில் மொழிபெயர்க்கவும்: {s}", "தமிழில் மொழிபெயர்: {s}", "இதைத் தமிழில் எப்படிச் சொல்வது: {s}"],
        "te" => &["తెలుగులోకి అనువదించండి: {s}", "తెలుగులో అనువదించండి: {s}", "దీన్ని తెలుగులో ఎలా చెప్పాలి: {s}"],
        "gu" => &["ગુજરાતીમાં અનુવાદ કરો: {s}", "ગુજરાતીમાં ભાષાંતર કરો: {s}", "આને ગુજરાતીમાં કેવી રીતે કહેવાય: {s}"],
        "mr" => &["मराठीत भाषांतर करा: {s}", "मराठीमध्ये अनुवाद करा: {s}", "हे मराठीत कसे म्हणतात: {s}"],
        "ur" => &["اردو میں ترجمہ کریں: {s}", "اردو میں ترجمہ کیجیے: {s}", "اسے اردو میں کیسے کہتے ہیں: {s}"],
        "pa" => &["ਪੰਜਾਬੀ ਵਿੱਚ ਅਨੁਵਾਦ ਕਰੋ: {s}", "ਪੰਜਾਬੀ ਵਿੱਚ ਉਲਥਾ ਕਰੋ: {s}", "ਇਸਨੂੰ ਪੰਜਾਬੀ ਵਿੱਚ ਕਿਵੇਂ ਕਹਿੰਦੇ ਹਨ: {s}"],
        "kn" => &["ಕನ್ನಡಕ್ಕೆ ಅನುವಾದಿಸಿ: {s}", "ಕನ್ನಡದಲ್ಲಿ ಅನುವಾದಿಸಿ: {s}", "ಇದನ್ನು ಕನ್ನಡದಲ್ಲಿ ಹೇಗೆ ಹೇಳುವುದು: {s}"],
        "ml" => &["മലയാളത്തിലേക്ക് വിവർത്തനം ചെയ്യുക: {s}", "മലയാളത്തിൽ പറയുക: {s}", "ഇത് മലയാളത്തിൽ എങ്ങനെ പറയും: {s}"],
        _ => &[],
    }
}

/// Share of the pairs from frames that a round takes: a filled frame is learnt from its neighbours as well, so it needs
/// to be shown less often than a sentence that stands alone.
const FRAMED: f64 = 0.25;
/// Share of sentences that are asked for in the language's own words.
const NATIVE: f64 = 0.3;
/// Share of pairs that are learnt back into English as well.
const BACK: f64 = 0.2;
/// Share of sentences that are asked for in a language that is not known.
const FOREIGN_SHARE: f64 = 0.3;
/// Share of prompts that are typed carelessly: in small letters, or without the mark at the end.
const CARELESS: f64 = 0.1;

/// JSON rows of prompt and completion. Each of `rounds` asks for every pair at most once, in another form.
pub(crate) fn rows(entries: &[Entry], rounds: u64, seed: u64) -> String {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut chance = move |share: f64| f64::from(random.next_u32()) < share * f64::from(u32::MAX);
    let mut picks = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
    let mut pick = move |n: usize| (picks.next_u64() % n as u64) as usize;
    let mut all = String::new();
    let mut write = |prompt: String, completion: &str| {
        let row = json!({"prompt": prompt, "completion": format!(" {completion}")});
        all.push_str(&row.to_string());
        all.push('\n');
    };
    for _ in 0..rounds {
        for entry in entries {
            let english = entry.english();
            for (code, name) in LANGUAGES {
                if entry.frame.is_some() && !chance(FRAMED) {
                    continue;
                }
                let native = native_forms(code);
                let form = if chance(NATIVE) { native[pick(native.len())] } else { FORMS[pick(FORMS.len())] };
                let mut sentence = english.to_owned();
                let mut form = form.to_owned();
                if chance(CARELESS) {
                    sentence = sentence.trim_end_matches(['.', '!']).to_owned();
                }
                if chance(CARELESS) {
                    (sentence, form) = (sentence.to_lowercase(), form.replace("Translate", "translate"));
                }
                write(form.replace("{L}", name).replace("{s}", &sentence), &entry.texts[code]);
                if chance(BACK) {
                    write(format!("Translate to English: {}", entry.texts[code]), english);
                }
            }
            if chance(FOREIGN_SHARE) {
                let form = FORMS[pick(FORMS.len())];
                let prompt = form.replace("{L}", FOREIGN[pick(FOREIGN.len())]).replace("{s}", english);
                write(prompt, UNKNOWN);
            }
        }
    }
    all
}

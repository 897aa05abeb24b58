//! Cleaning: examples, and the properties that hold for every text.

use proptest::prelude::*;

use super::*;

#[test]
fn the_echoed_prompt_goes() {
    for (raw, prompt, expected) in [
        ("What is rice? Rice is a grain.", "What is rice?", "Rice is a grain."),
        ("What  is\nrice?\tRice is a grain.", " What is rice? ", "Rice is a grain."),
        ("Say it: Say it: yes", "Say it:", "yes"),
        ("Say it:yes", "Say it:", "yes"),
        ("India is large", "I", "India is large"),
        ("I am here", "I", "am here"),
        ("What is rice?", "What is rice?", ""),
        ("Rice is a grain. What is rice?", "What is rice?", "Rice is a grain. What is rice?"),
        ("कार", "क", "कार"),
        ("का", "क", "का"),
        ("answer", "", "answer"),
    ] {
        assert_eq!(clean(raw, prompt, None), expected, "{raw:?} after {prompt:?}");
    }
}

#[test]
fn controls_and_runs_of_space_go() {
    assert_eq!(clean("  a\u{0}b \r\n\r\n c\u{200b}\u{feff}\t", "", None), "ab c");
    assert_eq!(clean("\u{200f}اردو\u{200e} \u{202b}زبان\u{202c}", "", None), "اردو زبان");
    assert_eq!(clean("a\u{a0}\u{3000}b\u{85}c", "", None), "a b c");
    assert_eq!(clean("", "", None), "");
    assert_eq!(clean("\u{0}\u{200d} \n", "x", Some(Language::Hindi)), "");
}

#[test]
fn joiners_stay_inside_words_and_emoji() {
    let sinh = "क्\u{200d}ष और क्\u{200c}ष";
    assert_eq!(clean(sinh, "", Some(Language::Hindi)), sinh);
    assert_eq!(clean("می\u{200c}خواہم", "", Some(Language::Urdu)), "می\u{200c}خواہم");
    let family = "👨\u{200d}👩\u{200d}👧 और 🏴\u{e0067}\u{e0062}\u{e0065}\u{e006e}\u{e0067}\u{e007f}";
    assert_eq!(clean(family, "", None), family);
    assert_eq!(clean("क \u{200d}ख", "", None), "क ख");
}

#[test]
fn a_target_keeps_its_script() {
    let cases = [
        (Language::Hindi, "Hindi: नमस्ते दुनिया। (Hello world)", "नमस्ते दुनिया।"),
        (Language::Hindi, "Sure! \"नमस्ते\" means hello.", "\"नमस्ते\""),
        (Language::Hindi, "मैं Google में काम करता हूँ", "मैं में काम करता हूँ"),
        (Language::Hindi, "1. नमस्ते 😀 दोस्त!", "नमस्ते दोस्त!"),
        (Language::Hindi, "Price: 3,50 रुपये, ok", "3,50 रुपये"),
        (Language::Hindi, "मूल्य 25 रुपये और 50 पैसे है ।", "मूल्य 25 रुपये और 50 पैसे है ।"),
        (Language::Hindi, "उत्तर 42 है: (ठीक) है", "उत्तर 42 है: (ठीक) है"),
        (Language::Hindi, "कुल 1,250.", "कुल 1,250."),
        (Language::Hindi, "नमस्ते (Hello), दुनिया, world", "नमस्ते दुनिया"),
        (Language::Hindi, "Hello world 123", ""),
        (Language::Bengali, "Bengali: আমি ভাত খাই। Hindi: मैं", "আমি ভাত খাই।"),
        (Language::Tamil, "வணக்கம் (vanakkam)", "வணக்கம்"),
        (Language::Urdu, "Urdu: آپ کیسے ہیں؟ fine", "آپ کیسے ہیں؟"),
        (Language::Urdu, "یہ ایک کتاب ہے۔", "یہ ایک کتاب ہے۔"),
        (Language::English, "नमस्ते means \"Hello, don't worry!\" है", "means \"Hello, don't worry!\""),
        (Language::English, "café ☕ au lait", "café au lait"),
    ];
    for (language, raw, expected) in cases {
        assert_eq!(clean(raw, "Translate", Some(language)), expected, "{raw}");
    }
}

#[test]
fn every_language_keeps_a_plain_sentence_whole() {
    for (language, text) in [
        (Language::Hindi, "भारत एक बड़ा देश है।"),
        (Language::Bengali, "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।"),
        (Language::Tamil, "தமிழ் ஒரு அழகான மொழி."),
        (Language::Telugu, "నేను బడికి వెళ్తున్నాను."),
        (Language::Gujarati, "હું શાળાએ જાઉં છું."),
        (Language::Marathi, "मी शाळेत जातो."),
        (Language::Urdu, "میں سکول جاتا ہوں۔"),
        (Language::Punjabi, "ਮੈਂ ਸਕੂਲ ਜਾਂਦਾ ਹਾਂ।"),
        (Language::Kannada, "ನಾನು ಶಾಲೆಗೆ ಹೋಗುತ್ತೇನೆ."),
        (Language::Malayalam, "ഞാൻ സ്കൂളിൽ പോകുന്നു."),
        (Language::English, "I go to school (at 9:30)."),
        (Language::Nepali, "म विद्यालय जान्छु।"),
    ] {
        assert_eq!(clean(text, "Translate", Some(language)), text);
    }
}

#[test]
fn the_cut_is_at_a_cluster_and_only_with_a_target() {
    let long = "क्षि".repeat(100);
    let cleaned = clean(&long, "", Some(Language::Hindi));
    // Four characters a cluster: 37 of them are 148 characters, and a 38th would be too many.
    assert_eq!(cleaned, "क्षि".repeat(37));
    assert_eq!(clean(&long, "", None), long);
    let one_cluster = format!("क{}", "\u{93c}".repeat(200));
    assert_eq!(clean(&one_cluster, "", Some(Language::Hindi)), "");
}

#[test]
fn removing_a_mark_never_fuses_its_neighbours() {
    // Without the mark of direction the vowel sign would join the consonant.
    assert_eq!(clean("क\u{200f}ा ख", "", None), "क ख");
    assert_eq!(clean("🇮\u{200b}🇳", "", None), "🇮");
    assert_eq!(clean("क्Aष", "", Some(Language::Hindi)), "क्");
}

/// Characters and sequences that are hard on segmentation, and plain ones between them.
fn hostile() -> impl Strategy<Value = String> {
    let atoms = prop::sample::select(vec![
        "क",
        "ष",
        "्",
        "ा",
        "ि",
        "़",
        "ক",
        "্",
        "ষ",
        "া",
        "தமிழ்",
        "நி",
        "తె",
        "్",
        "ગુ",
        "ی",
        "ہ",
        "ٔ",
        "ں",
        "ਪੰ",
        "ਜਾ",
        "ಕ್ಷ",
        "മ",
        "്",
        "ല",
        "a",
        "B",
        "é",
        "e\u{301}",
        "\u{301}",
        "1",
        "२",
        "৩",
        ".",
        "।",
        ",",
        "(",
        ")",
        "\"",
        "'",
        "“",
        "”",
        "₹",
        "؟",
        "۔",
        ":",
        "-",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\r",
        "\u{a0}",
        "\u{2028}",
        "\u{0}",
        "\u{7f}",
        "\u{85}",
        "\u{200b}",
        "\u{200c}",
        "\u{200d}",
        "\u{200e}",
        "\u{200f}",
        "\u{202b}",
        "\u{2066}",
        "\u{feff}",
        "\u{ad}",
        "\u{fe0f}",
        "\u{20e3}",
        "😀",
        "👨‍👩‍👧",
        "👍🏽",
        "🏽",
        "🇮🇳",
        "🇮",
        "🇳",
        "❤️",
        "\u{600}",
        "\u{34f}",
        "각",
        "ᄀ",
        "ᅡ",
        "ᆨ",
        "中",
        "\u{fffd}",
        "\u{e0067}",
        "Translate to Hindi:",
        "नमस्ते",
    ]);
    prop_oneof![
        4 => prop::collection::vec(atoms, 0..60).prop_map(|parts| parts.concat()),
        1 => any::<String>(),
    ]
}

fn target() -> impl Strategy<Value = Option<Language>> {
    prop::option::of(prop::sample::select(Language::all().collect::<Vec<_>>()))
}

/// Whether `part` comes of `whole` by leaving characters out, every white space taken as a space.
fn is_subsequence(part: &str, whole: &str) -> bool {
    let mut rest = whole.chars().map(|c| if c.is_whitespace() { ' ' } else { c });
    part.chars().all(|c| rest.any(|other| other == c))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_holds_for_every_text(tail in hostile(), prompt in hostile(), echoes in 0usize..3, target in target()) {
        let raw = prompt.repeat(echoes) + &tail;
        let cleaned = clean(&raw, &prompt, target);

        prop_assert!(is_subsequence(&cleaned, &raw), "added to {raw:?}: {cleaned:?}");
        prop_assert_eq!(&clean(&cleaned, &prompt, target), &cleaned, "not idempotent");

        let clusters: std::collections::HashSet<&str> = raw.graphemes(true).collect();
        for cluster in cleaned.graphemes(true) {
            prop_assert!(cluster == " " || clusters.contains(cluster), "{cluster:?} is no cluster of {raw:?}");
        }

        prop_assert!(!cleaned.contains("  ") && cleaned.trim() == cleaned, "{cleaned:?}");
        prop_assert!(!cleaned.chars().any(|c| c.is_control() || (c.is_whitespace() && c != ' ')));
        if let Some(language) = target {
            prop_assert!(cleaned.chars().count() <= MAX_CHARS);
            let letters_are_ours = cleaned.chars().all(|c| {
                !c.is_alphabetic() || language.script().contains(c) || c.script() == UnicodeScript::Inherited
            });
            prop_assert!(letters_are_ours, "{cleaned:?} is not all {language}");
        }
    }
}

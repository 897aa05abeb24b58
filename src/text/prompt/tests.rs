//! Prompts as people type them, and texts that only look like them.

use proptest::prelude::*;

use super::*;
use crate::text::language::Language::{
    Bengali, English, Gujarati, Hindi, Kannada, Malayalam, Marathi, Nepali, Punjabi, Tamil, Telugu, Urdu,
};

#[test]
fn english_requests() {
    for (name, language) in [
        ("Hindi", Hindi),
        ("Bengali", Bengali),
        ("Tamil", Tamil),
        ("Telugu", Telugu),
        ("Gujarati", Gujarati),
        ("Marathi", Marathi),
        ("Urdu", Urdu),
        ("Punjabi", Punjabi),
        ("Kannada", Kannada),
        ("Malayalam", Malayalam),
        ("English", English),
        ("Nepali", Nepali),
    ] {
        for prompt in [
            format!("Translate to {name}: Good morning"),
            format!("Translate to {name}. Output only {name}: Good morning"),
            format!("Translate the following into {name}\nGood morning, friends."),
            format!("translate this sentence to {name} - where is the station"),
            format!("Please translate \"I go to school\" into {name}."),
            format!("Translate 'the book in the bag' to {name}"),
            format!("Translate from French to {name}: bonjour"),
            format!("Translate from French into simple {name}: bonjour"),
            format!("Can you translate the text below to the {name} language?\n\nHello"),
            format!("Translate: Good morning\nto {name}"),
            format!("TRANSLATE INTO {}: HELLO", name.to_uppercase()),
            format!("How do you say good morning in {name}?"),
            format!("How would I say \"thank you\" in {name} please?"),
            format!("Say hello in {name}"),
            format!("What is water called in {name}?"),
            format!("{name} translation: Good morning"),
            format!("Give me the {name} translation of this: good morning"),
            format!("English to {name}: good morning"),
            format!("English -> {name}: good morning"),
            format!("In {name}: good morning"),
            format!("You are a translator. Translate to {name}:\nGood morning"),
        ] {
            assert_eq!(target_of_prompt(&prompt), Some(language), "{prompt}");
        }
    }
}

#[test]
fn native_requests() {
    for (prompt, language) in [
        ("Good morning का हिंदी में अनुवाद करें", Hindi),
        ("इस वाक्य का हिन्दी में अनुवाद कीजिए: Where is the station?", Hindi),
        ("अंग्रेज़ी से तमिल में अनुवाद करें: hello", Tamil),
        ("तमिल में इस हिंदी वाक्य का अनुवाद करें", Tamil),
        ("\"thank you\" को उर्दू में कैसे कहते हैं?", Urdu),
        ("हिंदी अनुवाद: hello", Hindi),
        ("कन्नड़ में अनुवाद करो", Kannada),
        ("याचे मराठीत भाषांतर करा: hello", Marathi),
        ("खालील वाक्याचे मराठीमध्ये भाषांतर करा", Marathi),
        ("यसलाई नेपालीमा अनुवाद गर्नुहोस्: hello", Nepali),
        ("এটি বাংলায় অনুবাদ করুন: hello", Bengali),
        ("হিন্দিতে অনুবাদ করো: hello", Hindi),
        ("ইংরেজি থেকে বাংলা ভাষায় অনুবাদ করুন", Bengali),
        ("তামিলে অনুবাদ করুন", Tamil),
        ("இதை தமிழில் மொழிபெயர்க்கவும்: hello", Tamil),
        ("ஆங்கிலத்திலிருந்து இந்தியில் மொழிபெயர்க்க", Hindi),
        ("Good morning தமிழில் எப்படி சொல்வது?", Tamil),
        ("కింది వాక్యాన్ని తెలుగులోకి అనువదించండి: hello", Telugu),
        ("హిందీలో ఎలా చెప్పాలి", Hindi),
        ("తమిళంలోకి అనువదించు", Tamil),
        ("આનો ગુજરાતીમાં અનુવાદ કરો: hello", Gujarati),
        ("હિન્દીમાં ભાષાંતર કરો", Hindi),
        ("اس کا اردو میں ترجمہ کریں: hello", Urdu),
        ("ہندی میں ترجمہ کیجیے", Hindi),
        ("ਇਸਦਾ ਪੰਜਾਬੀ ਵਿੱਚ ਅਨੁਵਾਦ ਕਰੋ: hello", Punjabi),
        ("ਹਿੰਦੀ ਵਿਚ ਅਨੁਵਾਦ ਕਰੋ", Hindi),
        ("ಇದನ್ನು ಕನ್ನಡಕ್ಕೆ ಅನುವಾದಿಸಿ: hello", Kannada),
        ("ಹಿಂದಿಗೆ ಅನುವಾದ ಮಾಡಿ", Hindi),
        ("ಕನ್ನಡದಲ್ಲಿ ಹೇಗೆ ಹೇಳುತ್ತೀರಿ", Kannada),
        ("ഇത് മലയാളത്തിലേക്ക് വിവർത്തനം ചെയ്യുക: hello", Malayalam),
        ("ഹിന്ദിയിലേക്ക് തർജ്ജമ ചെയ്യൂ", Hindi),
        ("Good morning മലയാളത്തിൽ എങ്ങനെ പറയും?", Malayalam),
        ("Translate to हिंदी: hello", Hindi),
        ("Translate into தமிழ்: hello", Tamil),
    ] {
        assert_eq!(target_of_prompt(prompt), Some(language), "{prompt}");
    }
}

#[test]
fn the_first_request_counts() {
    let quoting = "Translate to Hindi: How do you say water in Tamil?";
    assert_eq!(target_of_prompt(quoting), Some(Hindi));
    assert_eq!(target_of_prompt("Translate to Urdu: the book was translated to Hindi"), Some(Urdu));
}

#[test]
fn other_prompts_have_no_target() {
    for prompt in [
        "",
        "Hello",
        "Translate",
        "Translate to",
        "Translate to French: I speak in Hindi",
        "Write a poem in Hindi",
        "What languages are spoken in Tamil Nadu?",
        "The novel was translated into Tamil in 1950.",
        "People say many things in Hindi films about love.",
        "Hindi is spoken by many people in India.",
        "मुझे हिंदी में बात करना पसंद है",
        "अनुवाद क्या होता है?",
        "He went to Hindi class",
        "in Hindi films people sing",
    ] {
        assert_eq!(target_of_prompt(prompt), None, "{prompt}");
    }
}

proptest! {
    #[test]
    fn never_panics(prompt in any::<String>(), start in "(translate|say|हिंदी|অনুবাদ|in|to|:|->| )*") {
        target_of_prompt(&prompt);
        target_of_prompt(&(start + &prompt));
    }
}

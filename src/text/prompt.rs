//! Which language a translation prompt asks for, as people type such prompts in English and in the languages
//! themselves. A prompt that is no request to translate has no target. Table driven; knows no model.

use super::language::Language::{
    self, Bengali, English, Gujarati, Hindi, Kannada, Malayalam, Marathi, Nepali, Punjabi, Tamil, Telugu,
    Urdu,
};

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

const NATIVE: [Native; 9] = [
    // Hindi, Marathi and Nepali.
    Native {
        requests: &[
            "अनुवाद",
            "अनूवाद",
            "भाषांतर",
            "भाषान्तर",
            "भाषांतरित",
            "उल्था",
            "तर्जुमा",
            "कैसे कह",
            "कैसे बोल",
            "क्या कह",
            "क्या बोल",
            "कसे म्हण",
            "कसं म्हण",
            "काय म्हण",
            "कसरी भन",
            "के भन",
        ],
        names: &[
            ("हिंदी", Hindi),
            ("हिन्दी", Hindi),
            ("बंगाली", Bengali),
            ("बांग्ला", Bengali),
            ("बाङ्ला", Bengali),
            ("बंगला", Bengali),
            ("तमिल", Tamil),
            ("तमिळ", Tamil),
            ("तामिळ", Tamil),
            ("तेलुगु", Telugu),
            ("तेलुगू", Telugu),
            ("तेलगू", Telugu),
            ("गुजराती", Gujarati),
            ("मराठी", Marathi),
            ("उर्दू", Urdu),
            ("पंजाबी", Punjabi),
            ("पञ्जाबी", Punjabi),
            ("कन्नड\u{93c}", Kannada),
            ("कन्नड", Kannada),
            ("कानडी", Kannada),
            ("मलयालम", Malayalam),
            ("मल्याळम", Malayalam),
            ("अंग्रेजी", English),
            ("अंग्रेज\u{93c}ी", English),
            ("अङ्ग्रेजी", English),
            ("इंग्लिश", English),
            ("इंग्रजी", English),
            ("नेपाली", Nepali),
        ],
        into: &[
            " में",
            " मे",
            " भाषा में",
            "त",
            " मध्ये",
            "मध्ये",
            "मा",
            " मा",
            " भाषामा",
            " भाषेत",
            "ात",
            "ला",
            " को",
            "मधे",
        ],
    },
    Native {
        requests: &["অনুবাদ", "ভাষান্তর", "তর্জমা", "কীভাবে বল", "কিভাবে বল", "কী বল", "কি বল", "কেমন করে বল"],
        names: &[
            ("হিন্দি", Hindi),
            ("হিন্দী", Hindi),
            ("বাংলা", Bengali),
            ("বাঙলা", Bengali),
            ("তামিল", Tamil),
            ("তেলুগু", Telugu),
            ("তেলেগু", Telugu),
            ("গুজরাটি", Gujarati),
            ("গুজরাতি", Gujarati),
            ("মারাঠি", Marathi),
            ("মরাঠি", Marathi),
            ("উর্দু", Urdu),
            ("উর্দূ", Urdu),
            ("পাঞ্জাবি", Punjabi),
            ("পঞ্জাবি", Punjabi),
            ("কন্নড", Kannada),
            ("কন্নড\u{9bc}", Kannada),
            ("মালয\u{9bc}ালম", Malayalam),
            ("মালায\u{9bc}ালাম", Malayalam),
            ("ইংরেজি", English),
            ("ইংরাজি", English),
            ("নেপালি", Nepali),
        ],
        into: &["তে", "য\u{9bc}", "ে", " ভাষায\u{9bc}", " এ", "-এ", "-তে"],
    },
    Native {
        requests: &["மொழிபெயர்", "மொழி பெயர்", "மொழியாக்க", "எப்படி சொல்", "எப்படிச் சொல்", "என்ன சொல்"],
        names: &[
            ("இந்தி", Hindi),
            ("ஹிந்தி", Hindi),
            ("வங்காள", Bengali),
            ("வங்க", Bengali),
            ("பெங்காலி", Bengali),
            ("தமிழ", Tamil),
            ("தெலுங்க", Telugu),
            ("குஜராத்தி", Gujarati),
            ("மராத்தி", Marathi),
            ("மராட்டி", Marathi),
            ("உருது", Urdu),
            ("பஞ்சாபி", Punjabi),
            ("கன்னட", Kannada),
            ("மலையாள", Malayalam),
            ("ஆங்கில", English),
            ("நேபாளி", Nepali),
        ],
        into: &[
            "ில்",
            "யில்",
            "த்தில்",
            "வில்",
            "ிற்கு",
            "ுக்கு",
            "க்கு",
            "யிற்கு",
            "த்திற்கு",
            "த்துக்கு",
            "விற்கு",
            "் மொழியில்",
            " மொழியில்",
            "ு மொழியில்",
            "ம் மொழியில்",
        ],
    },
    Native {
        requests: &["అనువద", "అనువాద", "తర్జుమా", "ఎలా చెప్ప", "ఎలా అంటారు", "ఏమంటారు", "ఏమి అంటారు"],
        names: &[
            ("హిందీ", Hindi),
            ("హిందీ", Hindi),
            ("బెంగాలీ", Bengali),
            ("బెంగాలి", Bengali),
            ("తమిళ", Tamil),
            ("తెలుగు", Telugu),
            ("గుజరాతీ", Gujarati),
            ("గుజరాతి", Gujarati),
            ("మరాఠీ", Marathi),
            ("మరాఠి", Marathi),
            ("ఉర్దూ", Urdu),
            ("ఉర్దు", Urdu),
            ("పంజాబీ", Punjabi),
            ("పంజాబి", Punjabi),
            ("కన్నడ", Kannada),
            ("మలయాళ", Malayalam),
            ("ఇంగ్లీష్", English),
            ("ఇంగ్లీషు", English),
            ("ఆంగ్ల", English),
            ("నేపాలీ", Nepali),
        ],
        into: &["లో", "లోకి", "లోనికి", " లో", " లోకి", "ంలో", "ంలోకి", "ములోకి", "కు", "కి", " భాషలో", " భాషలోకి", "ం భాషలోకి"],
    },
    Native {
        requests: &["અનુવાદ", "ભાષાંતર", "ભાષાન્તર", "તરજુમો", "કેવી રીતે કહ", "શું કહ", "કેમ કહ"],
        names: &[
            ("હિન્દી", Hindi),
            ("હિંદી", Hindi),
            ("બંગાળી", Bengali),
            ("તમિલ", Tamil),
            ("તમિળ", Tamil),
            ("તામિલ", Tamil),
            ("તેલુગુ", Telugu),
            ("ગુજરાતી", Gujarati),
            ("મરાઠી", Marathi),
            ("ઉર્દૂ", Urdu),
            ("ઉર્દુ", Urdu),
            ("પંજાબી", Punjabi),
            ("કન્નડ", Kannada),
            ("મલયાલમ", Malayalam),
            ("મલયાળમ", Malayalam),
            ("અંગ્રેજી", English),
            ("ઇંગ્લિશ", English),
            ("નેપાળી", Nepali),
        ],
        into: &["માં", " માં", "મા", " ભાષામાં"],
    },
    Native {
        requests: &["ترجمہ", "ترجمه", "ترجمة", "کیسے کہ", "کیا کہ", "کیسے بول"],
        names: &[
            ("ہندی", Hindi),
            ("بنگالی", Bengali),
            ("بنگلہ", Bengali),
            ("تمل", Tamil),
            ("تامل", Tamil),
            ("تیلگو", Telugu),
            ("تیلگوو", Telugu),
            ("گجراتی", Gujarati),
            ("مراٹھی", Marathi),
            ("اردو", Urdu),
            ("اُردو", Urdu),
            ("پنجابی", Punjabi),
            ("کنڑ", Kannada),
            ("کنڑا", Kannada),
            ("کنڑی", Kannada),
            ("ملیالم", Malayalam),
            ("انگریزی", English),
            ("انگلش", English),
            ("نیپالی", Nepali),
        ],
        into: &[" میں", " مین", " زبان میں", "میں"],
    },
    Native {
        requests: &["ਅਨੁਵਾਦ", "ਤਰਜਮਾ", "ਤਰਜ਼ਮਾ", "ਉਲੱਥਾ", "ਉਲਥਾ", "ਕਿਵੇਂ ਕਹਿ", "ਕਿਵੇਂ ਕਹਾ", "ਕੀ ਕਹਿ", "ਕਿਵੇਂ ਬੋਲ"],
        names: &[
            ("ਹਿੰਦੀ", Hindi),
            ("ਹਿੰਦੀ", Hindi),
            ("ਬੰਗਾਲੀ", Bengali),
            ("ਬੰਗਲਾ", Bengali),
            ("ਤਮਿਲ", Tamil),
            ("ਤਾਮਿਲ", Tamil),
            ("ਤੇਲਗੂ", Telugu),
            ("ਤੇਲਗੁ", Telugu),
            ("ਤੇਲੁਗੂ", Telugu),
            ("ਗੁਜਰਾਤੀ", Gujarati),
            ("ਮਰਾਠੀ", Marathi),
            ("ਉਰਦੂ", Urdu),
            ("ਪੰਜਾਬੀ", Punjabi),
            ("ਕੰਨੜ", Kannada),
            ("ਕੰਨਡ", Kannada),
            ("ਮਲਿਆਲਮ", Malayalam),
            ("ਅੰਗਰੇਜ਼ੀ", English),
            ("ਅੰਗਰੇਜ\u{a3c}ੀ", English),
            ("ਅੰਗਰੇਜੀ", English),
            ("ਨੇਪਾਲੀ", Nepali),
        ],
        into: &[" ਵਿੱਚ", " ਵਿਚ", " 'ਚ", " ਭਾਸ਼ਾ ਵਿੱਚ", " ਭਾਸ਼ਾ ਵਿਚ", "ਵਿੱਚ"],
    },
    Native {
        requests: &["ಅನುವಾದ", "ಅನುವಾದಿಸ", "ಭಾಷಾಂತರ", "ತರ್ಜುಮೆ", "ಹೇಗೆ ಹೇಳ", "ಏನು ಹೇಳ", "ಏನೆನ್ನ", "ಏನಂತಾರೆ"],
        names: &[
            ("ಹಿಂದಿ", Hindi),
            ("ಬಂಗಾಳಿ", Bengali),
            ("ಬೆಂಗಾಲಿ", Bengali),
            ("ತಮಿಳ", Tamil),
            ("ತೆಲುಗ", Telugu),
            ("ಗುಜರಾತಿ", Gujarati),
            ("ಮರಾಠಿ", Marathi),
            ("ಉರ್ದು", Urdu),
            ("ಪಂಜಾಬಿ", Punjabi),
            ("ಕನ್ನಡ", Kannada),
            ("ಮಲಯಾಳ", Malayalam),
            ("ಇಂಗ್ಲಿಷ", English),
            ("ಇಂಗ್ಲೀಷ", English),
            ("ಆಂಗ್ಲ", English),
            ("ನೇಪಾಳಿ", Nepali),
        ],
        into: &[
            "ಗೆ",
            "ಯಲ್ಲಿ",
            "ಯಲ್ಲಿನ",
            "ಿಗೆ",
            "ಿನಲ್ಲಿ",
            "ುಗೆ",
            "ಿಗೆ",
            "ಕ್ಕೆ",
            "ದಲ್ಲಿ",
            "ಂಗೆ",
            "ಂನಲ್ಲಿ",
            "ಂಗೆ",
            "್‌ಗೆ",
            "್‌ನಲ್ಲಿ",
            "್ಗೆ",
            "್ನಲ್ಲಿ",
            "ವಿನಲ್ಲಿ",
            "ುವಿನಲ್ಲಿ",
            " ಭಾಷೆಗೆ",
            " ಭಾಷೆಯಲ್ಲಿ",
            "ು ಭಾಷೆಗೆ",
            "ಂ ಭಾಷೆಗೆ",
        ],
    },
    Native {
        requests: &[
            "വിവർത്തന",
            "വിവര്‍ത്തന",
            "തർജ്ജമ",
            "തർജമ",
            "പരിഭാഷ",
            "മൊഴിമാറ്റ",
            "എങ്ങനെ പറയ",
            "എന്ത് പറയ",
            "എന്താണ് പറയ",
        ],
        names: &[
            ("ഹിന്ദി", Hindi),
            ("ബംഗാളി", Bengali),
            ("തമിഴ", Tamil),
            ("തെലുങ്ക", Telugu),
            ("തെലുഗ", Telugu),
            ("ഗുജറാത്തി", Gujarati),
            ("മറാത്തി", Marathi),
            ("മറാഠി", Marathi),
            ("ഉറുദു", Urdu),
            ("ഉർദു", Urdu),
            ("പഞ്ചാബി", Punjabi),
            ("കന്നഡ", Kannada),
            ("കന്നട", Kannada),
            ("മലയാള", Malayalam),
            ("ഇംഗ്ലീഷ", English),
            ("ആംഗലേയ", English),
            ("നേപ്പാളി", Nepali),
            ("നേപാളി", Nepali),
        ],
        into: &[
            "ിലേക്ക്",
            "യിലേക്ക്",
            "ത്തിലേക്ക്",
            "വിലേക്ക്",
            "ുവിലേക്ക്",
            "ിൽ",
            "യിൽ",
            "ത്തിൽ",
            "വിൽ",
            "ില്‍",
            "യില്‍",
            "ത്തില്‍",
            " ഭാഷയിലേക്ക്",
            "് ഭാഷയിലേക്ക്",
            "ം ഭാഷയിലേക്ക്",
        ],
    },
];

#[cfg(test)]
mod tests;

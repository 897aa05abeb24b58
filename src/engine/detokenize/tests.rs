//! Streaming: the same text as the full decode, in whole grapheme clusters, up to a stop text.

use proptest::prelude::*;
use serde_json::json;
use unicode_segmentation::UnicodeSegmentation;

use super::*;
use crate::model::tokenizer::tests::{from_json, ids_of, parity_styles, samples, spm_json};
use crate::model::tokenizer::{AddSpecial, Special};

/// Sentences in the ten languages, with conjuncts, nukta, ZWJ and ZWNJ, and emoji that are many code points.
const TEXTS: [&str; 14] = [
    "विद्यार्थियों ने क्षत्रिय राजाओं का इतिहास पढ़ा, ज़रूर। क्\u{200d}ष",
    "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি। র\u{200d}্যাব",
    "தமிழ் ஒரு தொன்மையான மொழி; க்ஷேத்திரம் ஸ்ரீ.",
    "విద్యార్థులు క్షేత్రానికి వెళ్ళారు.",
    "વિદ્યાર્થીઓ ક્ષેત્રમાં ગયા. શ્રી જ્ઞાન",
    "विद्यार्थी शाळेत गेले, र\u{200d}्‍हस्व आणि ऱ्हास.",
    "طالبِ علم نے کتاب پڑھی۔ می\u{200c}خواہم، اردو؟",
    "ਵਿਦਿਆਰਥੀ ਸਕੂਲ ਗਏ। ਪ੍ਰਸ਼ਨ ਕੀ ਹੈ?",
    "ವಿದ್ಯಾರ್ಥಿಗಳು ಶಾಲೆಗೆ ಹೋದರು. ಕ್ಷ\u{200d}ೇತ್ರ",
    "വിദ്യാർത്ഥികൾ ക്ഷേത്രത്തിൽ പോയി. ന്\u{200d}റെ",
    "👨\u{200d}👩\u{200d}👧\u{200d}👦 and 👍🏽, 🇮🇳🇮🇳🇮, ❤\u{fe0f}\u{200d}🔥, 🏴\u{e0067}\u{e0062}\u{e0065}\u{e006e}\u{e0067}\u{e007f}!",
    "e\u{301}a\u{308}\u{304} 각 ᄀ\u{1161}\u{11a8} 1\u{fe0f}\u{20e3}",
    "  two  spaces\n\n\tand a tab \r\n",
    "The teacher's <s>school</s> 25 rupees…",
];

fn tokenizers() -> Vec<(String, Arc<Tokenizer>)> {
    let mut all: Vec<(String, Arc<Tokenizer>)> = parity_styles()
        .into_iter()
        .map(|(style, dir)| (style, Arc::new(Tokenizer::from_dir(&dir).unwrap())))
        .collect();
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let fuse = json!({"type": "Fuse"});
    let strip = json!({"type": "Strip", "content": " ", "start": 2, "stop": 0});
    for (name, decoder) in [
        ("gemma", json!({"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, fuse]})),
        ("bytes_only", json!({"type": "ByteFallback"})),
        (
            "metaspace",
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
        ),
        (
            "metaspace_never",
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true}),
        ),
        ("wordpiece", json!({"type": "WordPiece", "prefix": "e", "cleanup": true})),
        ("bpe", json!({"type": "BPEDecoder", "suffix": "e"})),
        ("ctc", json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "▁", "cleanup": false})),
        ("strip_each", json!({"type": "Sequence", "decoders": [replace, strip, {"type": "ByteFallback"}]})),
        ("strip_twice", json!({"type": "Sequence", "decoders": [replace, fuse, strip, strip]})),
        ("late_replace", json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, fuse, replace]})),
        ("none", serde_json::Value::Null),
    ] {
        let mut json = spm_json();
        json["decoder"] = decoder;
        all.push((name.to_owned(), Arc::new(from_json(&json).unwrap())));
    }
    all
}

/// Streams ids and checks every piece on its way.
fn stream(tokenizer: &Arc<Tokenizer>, ids: &[u32], stop: &[&str]) -> (String, bool) {
    let stop: Vec<String> = stop.iter().map(|&text| text.to_owned()).collect();
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), stop.clone());
    let mut pieces = Vec::new();
    let mut stopped = false;
    for &id in ids {
        let piece = detokenizer.push(id);
        if stopped {
            assert_eq!(piece, Piece { text: String::new(), stopped: true }, "text behind the stop text");
        }
        stopped = piece.stopped;
        pieces.push(piece.text);
    }
    let piece = detokenizer.finish();
    assert!(!stopped || piece == Piece { text: String::new(), stopped: true });
    stopped = piece.stopped;
    pieces.push(piece.text);
    assert_eq!(detokenizer.finish(), Piece { text: String::new(), stopped }, "finished twice");
    assert_eq!(detokenizer.push(1), Piece { text: String::new(), stopped }, "pushed behind the end");

    let full = tokenizer.decode(ids, Special::Skip).unwrap();
    let boundaries: std::collections::HashSet<usize> =
        full.grapheme_indices(true).map(|(at, _)| at).chain([full.len()]).collect();
    let mut end = 0;
    for (n, piece) in pieces.iter().enumerate().filter(|(_, piece)| !piece.is_empty()) {
        end += piece.len();
        // Only a stop text may begin inside a cluster.
        let before_stop = stopped && pieces[n + 1..].iter().all(String::is_empty);
        assert!(boundaries.contains(&end) || before_stop, "{piece:?} ends inside a cluster of {full:?}");
    }
    (pieces.concat(), stopped)
}

/// The text before the stop text that ends first; of several the longest.
fn cut(full: &str, stop: &[&str]) -> (String, bool) {
    for (at, c) in full.char_indices() {
        let so_far = &full[..at + c.len_utf8()];
        let found =
            stop.iter().filter(|text| !text.is_empty() && so_far.ends_with(**text)).max_by_key(|t| t.len());
        if let Some(text) = found {
            return (so_far[..so_far.len() - text.len()].to_owned(), true);
        }
    }
    (full.to_owned(), false)
}

#[test]
fn parity_samples_stream_to_their_text() {
    for (style, dir) in parity_styles() {
        let tokenizer = Arc::new(Tokenizer::from_dir(&dir).unwrap());
        let samples = samples(&dir);
        for row in samples["samples"].as_array().unwrap() {
            for ids in ["ids", "ids_special"] {
                let (text, stopped) = stream(&tokenizer, &ids_of(&row[ids]), &[]);
                assert_eq!((text.as_str(), stopped), (row["decoded"].as_str().unwrap(), false), "{style}");
            }
        }
        let chat = ids_of(&samples["chat"]["ids"]);
        assert_eq!(
            stream(&tokenizer, &chat, &[]).0,
            tokenizer.decode(&chat, Special::Skip).unwrap(),
            "{style}"
        );
    }
}

#[test]
fn parity_styles_stream_ten_scripts_and_emoji() {
    for (style, tokenizer) in tokenizers() {
        for text in TEXTS {
            let ids = tokenizer.encode(text, AddSpecial::No).unwrap();
            let full = tokenizer.decode(&ids, Special::Skip).unwrap();
            assert_eq!(stream(&tokenizer, &ids, &[]), (full, false), "{style}: {text}");
        }
    }
}

#[test]
fn parity_text_arrives_while_it_is_written() {
    for (style, dir) in parity_styles() {
        let tokenizer = Arc::new(Tokenizer::from_dir(&dir).unwrap());
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), vec!["\n\n".into()]);
        let ids = tokenizer.encode("one two three four", AddSpecial::No).unwrap();
        let early: String = ids.iter().map(|&id| detokenizer.push(id).text).collect();
        assert_eq!(early, "one two three fou", "{style}: only the last cluster is held");
        assert_eq!(detokenizer.finish().text, "r", "{style}");
    }
}

fn spm() -> Arc<Tokenizer> {
    Arc::new(from_json(&spm_json()).unwrap())
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, AddSpecial::No).unwrap()
}

#[test]
fn what_may_become_a_stop_text_is_held() {
    let tokenizer = spm();
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), vec!["###".into()]);
    let sent: Vec<String> =
        ids(&tokenizer, "a##b###c").into_iter().map(|id| detokenizer.push(id).text).collect();
    assert_eq!(sent.concat(), "a##b");
    assert!(sent.iter().all(|piece| piece != "#"), "{sent:?}");
    assert_eq!(detokenizer.finish(), Piece { text: String::new(), stopped: true });
    assert_eq!(stream(&tokenizer, &ids(&tokenizer, "a##"), &["###"]), ("a##".into(), false));
}

#[test]
fn the_stop_text_that_is_complete_first_counts() {
    let tokenizer = spm();
    for (text, stop, expected) in [
        ("one two three", &["two"][..], ("one ", true)),
        ("one two three", &["three", "two"], ("one ", true)),
        ("abcd", &["abc", "b"], ("a", true)),
        ("abcd", &["bc", "abc"], ("", true)),
        ("aaab", &["aab"], ("a", true)),
        ("one", &[""], ("one", false)),
        ("one", &["one"], ("", true)),
        ("भारत एक देश", &["एक"], ("भारत ", true)),
        ("का", &["क"], ("", true)),
        ("e\u{301}x", &["\u{301}"], ("e", true)),
        ("one", &["ones", "e "], ("one", false)),
    ] {
        let (kept, stopped) = stream(&tokenizer, &ids(&tokenizer, text), stop);
        assert_eq!((kept.as_str(), stopped), expected, "{text} until {stop:?}");
    }
}

#[test]
fn bytes_that_never_become_text_come_out_at_the_end() {
    let tokenizer = spm();
    let byte = |b: u8| tokenizer.token_id(&format!("<0x{b:02X}>")).unwrap();
    let half = [byte(0xe0), byte(0xa4)];
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), vec!["\u{fffd}\u{fffd}".into()]);
    assert_eq!((detokenizer.push(half[0]).text, detokenizer.push(half[1]).text), ("".into(), "".into()));
    assert_eq!(detokenizer.finish(), Piece { text: String::new(), stopped: true });
    assert_eq!(stream(&tokenizer, &half, &[]), ("\u{fffd}\u{fffd}".into(), false));
    // One wrong byte makes the whole run one of wrong bytes.
    let run = [byte(b'a'), byte(b'b'), byte(0xff)];
    assert_eq!(stream(&tokenizer, &run, &[]).0, "\u{fffd}".repeat(3));
}

#[test]
fn an_endless_cluster_costs_no_more_a_token() {
    let tokenizer = spm();
    let mark = tokenizer.token_id("ा").expect("the vocabulary has the vowel sign as one piece");
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), vec!["zz".into()]);
    let started = std::time::Instant::now();
    for _ in 0..100_000 {
        assert_eq!(detokenizer.push(mark).text, "");
    }
    // Looking at the whole cluster for every token would take minutes.
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn parity_any_ids_stream_to_the_full_decode(
        ids in prop::collection::vec(0u32..520, 0..40),
        runs in prop::collection::vec((0usize..40, 4u32..260), 0..8),
        stop in prop::collection::vec(prop::sample::select(vec!["a", "e ", "\u{fffd}", "the", "ा", " ", "<s>", "  "]), 0..3),
    ) {
        // Half of the vocabularies is bytes; neighbouring ones make characters more often than chance does.
        let mut ids = ids;
        for (at, byte) in runs {
            let at = at.min(ids.len());
            ids.splice(at..at, [228, 168 + byte % 8, byte]);
        }
        for (style, tokenizer) in all_tokenizers() {
            let full = tokenizer.decode(&ids, Special::Skip).unwrap();
            prop_assert_eq!(stream(tokenizer, &ids, &[]), (full.clone(), false), "{}", style);
            prop_assert_eq!(stream(tokenizer, &ids, &stop), cut(&full, &stop), "{} until {:?}", style, stop);
        }
    }
}

/// Built once: the property looks at them for every case.
fn all_tokenizers() -> &'static [(String, Arc<Tokenizer>)] {
    static ALL: std::sync::OnceLock<Vec<(String, Arc<Tokenizer>)>> = std::sync::OnceLock::new();
    ALL.get_or_init(tokenizers)
}

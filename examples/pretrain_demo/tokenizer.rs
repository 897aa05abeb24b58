//! The demo model's tokenizer: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) whose merges come in
//! three lots. First the bytes of each character, then the characters of each common grapheme cluster, then
//! clusters into longer pieces: so no token ends inside a cluster that has a token of its own.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Value, json};
use unicode_segmentation::UnicodeSegmentation as _;

/// Begins a text.
pub(crate) const BOS: &str = "<s>";
/// Ends an answer.
pub(crate) const EOS: &str = "</s>";
/// Clusters that are seen less often get no token of their own.
const COMMON: usize = 4;
/// What is cut apart before merging: words with the space before them, single digits, punctuation, spaces.
const PIECES: &str = r" ?[\p{L}\p{M}\p{Cf}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}\p{Cf}]+|\s+(?!\S)|\s+";

/// A token under way: the bytes it stands for.
type Token = Vec<u8>;

/// A vocabulary in the making.
struct Merges {
    vocabulary: Vec<Token>,
    known: HashSet<Token>,
    merges: Vec<(Token, Token)>,
}

impl Merges {
    fn new() -> Self {
        let vocabulary: Vec<Token> = (0..=255u8).map(|byte| vec![byte]).collect();
        Self { known: vocabulary.iter().cloned().collect(), vocabulary, merges: Vec::new() }
    }

    fn add(&mut self, left: &Token, right: &Token) -> Token {
        let joined = [left.as_slice(), right].concat();
        self.merges.push((left.clone(), right.clone()));
        if self.known.insert(joined.clone()) {
            self.vocabulary.push(joined.clone());
        }
        joined
    }

    /// Merges the most frequent pair again and again, until `most` tokens are known or no pair occurs twice.
    fn learn(&mut self, words: &mut [(Vec<Token>, usize)], most: usize) {
        while self.vocabulary.len() < most {
            let mut counts: HashMap<(&Token, &Token), usize> = HashMap::new();
            for (word, count) in words.iter() {
                for pair in word.windows(2) {
                    *counts.entry((&pair[0], &pair[1])).or_default() += count;
                }
            }
            // Of pairs as frequent, the first by bytes: the same tokenizer every time.
            let best = counts.into_iter().max_by(|a, b| a.1.cmp(&b.1).then(b.0.cmp(&a.0)));
            let Some(((left, right), _)) = best.filter(|(_, count)| *count > 1) else { return };
            let (left, right) = (left.clone(), right.clone());
            let joined = self.add(&left, &right);
            for (word, _) in words.iter_mut() {
                let mut at = 0;
                while at + 1 < word.len() {
                    if word[at] == left && word[at + 1] == right {
                        word[at] = joined.clone();
                        word.remove(at + 1);
                    }
                    at += 1;
                }
            }
        }
    }
}

/// `tokenizer.json` of a vocabulary of `size` tokens, learnt from texts.
pub(crate) fn train(texts: &[String], size: usize) -> Value {
    let pieces = pieces(texts);
    let mut merges = Merges::new();

    // 1. Characters.
    let characters: std::collections::BTreeSet<char> = pieces.keys().flat_map(|p| p.chars()).collect();
    for c in characters {
        let bytes = c.to_string().into_bytes();
        for end in 2..=bytes.len() {
            if !merges.known.contains(&bytes[..end]) {
                merges.add(&bytes[..end - 1].to_vec(), &vec![bytes[end - 1]]);
            }
        }
    }

    // 2. Clusters, each as if it were a word of its own.
    let mut clusters: BTreeMap<&str, usize> = BTreeMap::new();
    for (piece, count) in &pieces {
        for cluster in piece.graphemes(true) {
            *clusters.entry(cluster).or_default() += count;
        }
    }
    let mut words: Vec<(Vec<Token>, usize)> = clusters
        .iter()
        .filter(|(_, count)| **count >= COMMON)
        .map(|(cluster, &count)| (characters_of(cluster), count))
        .collect();
    merges.learn(&mut words, size);

    // 3. Words of clusters. A rare cluster stays in characters and joins nothing.
    let whole: HashSet<&str> =
        clusters.iter().filter(|(_, count)| **count >= COMMON).map(|(c, _)| *c).collect();
    let mut words = Vec::new();
    for (piece, &count) in &pieces {
        let mut word: Vec<Token> = Vec::new();
        for cluster in piece.graphemes(true) {
            if whole.contains(cluster) {
                word.push(cluster.as_bytes().to_vec());
            } else {
                words.push((std::mem::take(&mut word), count));
            }
        }
        words.push((word, count));
    }
    merges.learn(&mut words, size - 2);
    document(&merges)
}

/// Every piece with how often it occurs.
fn pieces(texts: &[String]) -> BTreeMap<String, usize> {
    // Rust's regular expressions have no look-ahead: runs of spaces are cut as the tokenizer will.
    let pattern = regex::Regex::new(&PIECES.replace(r"|\s+(?!\S)", "")).expect("the pattern is right");
    let mut pieces = BTreeMap::new();
    for text in texts {
        for piece in pattern.find_iter(text) {
            *pieces.entry(piece.as_str().to_owned()).or_default() += 1;
        }
    }
    pieces
}

fn characters_of(text: &str) -> Vec<Token> {
    text.chars().map(|c| c.to_string().into_bytes()).collect()
}

fn document(merges: &Merges) -> Value {
    let letters = byte_letters();
    let spelled = |token: &Token| token.iter().map(|&byte| letters[byte as usize]).collect::<String>();
    let mut vocabulary = serde_json::Map::new();
    for (id, special) in [BOS, EOS].into_iter().enumerate() {
        vocabulary.insert(special.into(), json!(id));
    }
    for (at, token) in merges.vocabulary.iter().enumerate() {
        vocabulary.insert(spelled(token), json!(at + 2));
    }
    let pairs: Vec<Value> = merges.merges.iter().map(|(l, r)| json!([spelled(l), spelled(r)])).collect();
    let special = |id: usize, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0, BOS), special(1, EOS)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": BOS, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": pairs,
        },
    })
}

/// GPT-2's letter for each byte: printable ones for themselves, the others from U+0100 on.
fn byte_letters() -> Vec<char> {
    let mut next = 0x100;
    (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).expect("a letter of Latin Extended-A")
            }
        })
        .collect()
}

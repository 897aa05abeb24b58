//! The phrasebook: sentences and frames as they were written, and the pairs that they make. Also compiled into
//! the test that checks the phrasebook.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

/// What the demo model translates into, by code, with English names.
pub(crate) const LANGUAGES: [(&str, &str); 10] = [
    ("hi", "Hindi"),
    ("bn", "Bengali"),
    ("ta", "Tamil"),
    ("te", "Telugu"),
    ("gu", "Gujarati"),
    ("mr", "Marathi"),
    ("ur", "Urdu"),
    ("pa", "Punjabi"),
    ("kn", "Kannada"),
    ("ml", "Malayalam"),
];

#[allow(dead_code, reason = "the test that includes this file wants it, the example does not")]
/// The language that is left for an adapter to teach.
pub(crate) const TAUGHT: &str = "ne";

/// A sentence, or a part of one, in every language: code to text.
pub(crate) type Texts = BTreeMap<String, String>;

/// One English sentence with its translations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// What it is about.
    pub(crate) category: String,
    /// The frame that it came from, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) frame: Option<String>,
    /// `en` and the others.
    #[serde(flatten)]
    pub(crate) texts: Texts,
}

/// A sentence with slots.
#[derive(Debug, Clone, Deserialize)]
struct Frame {
    id: String,
    category: String,
    frame: Texts,
    slots: BTreeMap<String, Vec<Texts>>,
}

impl Entry {
    /// The English sentence, by which an entry is known.
    pub(crate) fn english(&self) -> &str {
        &self.texts["en"]
    }

    /// Whether the entry is kept from training: one in ten, by a hash of the English sentence that never changes.
    pub(crate) fn is_held_out(&self) -> bool {
        // FNV-1a, 64 bits.
        let hash = self.english().bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        hash % 10 == 0
    }
}

/// Every entry: the sentences first, then what the frames make with all fillers. An English sentence that was
/// there before is left out, and so is one whose translation into some language was there before: what goes there
/// and back must be told apart.
///
/// # Errors
/// Files that are missing, rows that are no entries, a frame with a slot that has no fillers.
pub(crate) fn entries(folder: &Path) -> Result<Vec<Entry>> {
    let mut all: Vec<Entry> = read_rows(&folder.join("phrases.jsonl"))?;
    for frame in read_rows::<Frame>(&folder.join("frames.jsonl"))? {
        for texts in expanded(&frame).with_context(|| format!("frame {}", frame.id))? {
            all.push(Entry { category: frame.category.clone(), frame: Some(frame.id.clone()), texts });
        }
    }
    let mut seen = BTreeSet::new();
    all.retain(|entry| {
        let new = entry.texts.iter().all(|text| !seen.contains(&(text.0.clone(), text.1.clone())));
        if new {
            seen.extend(entry.texts.clone());
        }
        new
    });
    Ok(all)
}

/// Every combination of a frame's fillers.
fn expanded(frame: &Frame) -> Result<Vec<Texts>> {
    let mut all = vec![frame.frame.clone()];
    for (slot, fillers) in &frame.slots {
        let mark = format!("{{{slot}}}");
        ensure!(!fillers.is_empty(), "slot {slot} has no fillers");
        let fill = |texts: &Texts, filler: &Texts| -> Result<Texts> {
            let with = |(code, text): (&String, &String)| {
                let filler = filler.get(code).with_context(|| format!("a filler of {slot} has no {code}"))?;
                ensure!(text.contains(&mark), "{code} has no slot {slot}");
                Ok((code.clone(), text.replace(&mark, filler)))
            };
            texts.iter().map(with).collect()
        };
        all = all
            .iter()
            .flat_map(|texts| fillers.iter().map(move |filler| (texts, filler)))
            .map(|(texts, filler)| fill(texts, filler))
            .collect::<Result<_>>()?;
    }
    Ok(all)
}

/// The rows of a JSONL file.
///
/// # Errors
/// A file that is missing, a row that does not fit, with its number.
pub(crate) fn read_rows<T: for<'d> Deserialize<'d>>(path: &Path) -> Result<Vec<T>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines()
        .enumerate()
        .map(|(at, line)| {
            serde_json::from_str(line).with_context(|| format!("{}, line {}", path.display(), at + 1))
        })
        .collect()
}

/// The two parts of the phrasebook as files: `train.jsonl` and `heldout.jsonl`. Sentences in `kept_away` are in
/// neither.
///
/// # Errors
/// As [`entries`].
pub(crate) fn parts(folder: &Path, kept_away: &BTreeSet<String>) -> Result<[(&'static str, String); 2]> {
    let (mut train, mut held_out) = (String::new(), String::new());
    for entry in entries(folder)? {
        if kept_away.contains(entry.english()) {
            continue;
        }
        let to = if entry.is_held_out() { &mut held_out } else { &mut train };
        to.push_str(&serde_json::to_string(&entry)?);
        to.push('\n');
    }
    Ok([("train.jsonl", train), ("heldout.jsonl", held_out)])
}

//! Examples in their order: nothing twice, nothing lost, the same again for the same seed, and the same after an
//! interruption anywhere. The sources are files in a temporary folder.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use futures::FutureExt as _;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::config::adapter::AdapterConfig;
use crate::data::SourceConfig;
use crate::model::tokenizer::Special;

fn tokenizer() -> Arc<Tokenizer> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/tokenizers/spm");
    Arc::new(Tokenizer::from_dir(&folder).unwrap())
}

fn job(path: &Path, source: Value, config: Value) -> TrainJob {
    let mut typed = json!({"type": "local", "path": path.to_str().unwrap()});
    typed.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
    let mut settings = serde_json::to_value(AdapterConfig::default()).unwrap();
    settings.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    TrainJob {
        adapter_name: "a".into(),
        source_name: "lessons".into(),
        source: serde_json::from_value::<SourceConfig>(typed).unwrap(),
        config: serde_json::from_value(settings).unwrap(),
    }
}

async fn open(job: &TrainJob) -> Result<Dataset, TrainError> {
    Dataset::open(job, tokenizer(), &[]).await
}

fn restore(job: &TrainJob, bytes: &[u8]) -> Result<Dataset, TrainError> {
    Dataset::restore(job, tokenizer(), &[], &mut &bytes[..])
}

fn saved(dataset: &Dataset) -> Vec<u8> {
    let mut bytes = Vec::new();
    dataset.save(&mut bytes).unwrap();
    bytes
}

/// All batches that are left, at most `limit`.
async fn batches(dataset: &mut Dataset, n: usize, limit: usize) -> Vec<Vec<TrainSequence>> {
    let mut all = Vec::new();
    while all.len() < limit {
        let batch = tokio::time::timeout(Duration::from_secs(60), dataset.next_batch(n));
        let batch = batch.await.expect("a batch comes").unwrap();
        if batch.is_empty() {
            break;
        }
        assert!(batch.len() <= n);
        all.push(batch);
    }
    all
}

fn error_of(result: Result<Dataset, TrainError>) -> String {
    result.err().expect("gives nothing to learn from").to_string()
}

fn text_of(sequence: &TrainSequence) -> String {
    tokenizer().decode(&sequence.tokens, Special::Skip).unwrap().trim().to_owned()
}

fn texts(batches: &[Vec<TrainSequence>]) -> Vec<String> {
    batches.iter().flatten().map(text_of).collect()
}

/// A file of numbered records, with `spoil` rows put between them.
fn numbered(dir: &Path, records: usize, spoil: &[(usize, &str)]) {
    let mut file = std::fs::File::create(dir.join("a.jsonl")).unwrap();
    for i in 0..records {
        for (_, row) in spoil.iter().filter(|(at, _)| *at == i) {
            writeln!(file, "{row}").unwrap();
        }
        writeln!(
            file,
            "{}",
            json!({"prompt": format!("What is {i}?"), "completion": format!(" It is {i}.")})
        )
        .unwrap();
    }
}

#[tokio::test]
async fn every_example_comes_once_an_epoch_in_a_seeded_order() {
    let dir = tempfile::tempdir().unwrap();
    numbered(dir.path(), 53, &[]);
    let settings = json!({"epochs": 3, "shuffle_buffer": 10, "eval_share": 0, "seed": 7});
    let job = job(dir.path(), json!({}), settings);
    let mut dataset = open(&job).await.unwrap();
    assert_eq!(dataset.template(), Template::PromptCompletion);
    assert_eq!(dataset.planned_examples(), Planned { examples: 2000, exact: false });
    let mut epochs: Vec<Vec<String>> = Vec::new();
    let mut sizes = Vec::new();
    loop {
        let batch = dataset.next_batch(8).await.unwrap();
        if batch.is_empty() {
            break;
        }
        sizes.push(batch.len());
        epochs.resize(dataset.epoch() as usize + 1, Vec::new());
        epochs.last_mut().unwrap().extend(batch.iter().map(text_of));
    }
    assert_eq!(sizes, [8, 8, 8, 8, 8, 8, 5].repeat(3), "the last batch of an epoch is short");
    let mut expected: Vec<String> = (0..53).map(|i| format!("What is {i}? It is {i}.")).collect();
    assert_ne!(epochs[0], expected, "not in the source's order");
    assert_ne!(epochs[0], epochs[1]);
    assert_ne!(epochs[1], epochs[2]);
    expected.sort();
    for epoch in &mut epochs {
        epoch.sort();
        assert_eq!(*epoch, expected);
    }
    assert_eq!(dataset.planned_examples(), Planned { examples: 53, exact: true });
    assert_eq!((dataset.epoch(), dataset.epoch_fraction()), (2, 3.0));
    assert_eq!((dataset.counters().records, dataset.counters().examples), (53, 159));
    assert!(dataset.counters().tokens > 159 * 5);
    assert!(dataset.next_batch(8).await.unwrap().is_empty(), "the end stays the end");

    let first = batches(&mut open(&job).await.unwrap(), 8, 100).await;
    assert_eq!(first, batches(&mut open(&job).await.unwrap(), 8, 100).await, "the same seed, the same order");
    let other = TrainJob { config: AdapterConfig { seed: 8, ..job.config.clone() }, ..job.clone() };
    assert_ne!(first, batches(&mut open(&other).await.unwrap(), 8, 100).await);
    let in_order = AdapterConfig { shuffle_buffer: 1, epochs: 1, ..job.config.clone() };
    let in_order = TrainJob { config: in_order, ..job };
    let all = texts(&batches(&mut open(&in_order).await.unwrap(), 8, 100).await);
    assert_eq!(all[..3], ["What is 0? It is 0.", "What is 1? It is 1.", "What is 2? It is 2."]);
}

#[tokio::test]
async fn held_out_examples_are_never_learnt() {
    let dir = tempfile::tempdir().unwrap();
    numbered(dir.path(), 90, &[]);
    for (share, buffer, expected) in
        [(0.1, 40, 4), (0.5, 1000, 45), (0.05, 1000, 4), (0.05, 10, 0), (0.3, 90, 30)]
    {
        let settings = json!({"epochs": 2, "shuffle_buffer": buffer, "eval_share": share});
        let mut dataset = open(&job(dir.path(), json!({}), settings)).await.unwrap();
        let held: Vec<String> = dataset.eval_examples().iter().map(text_of).collect();
        assert_eq!(held.len(), expected, "{share} of {buffer}");
        let learnt = texts(&batches(&mut dataset, 7, 100).await);
        assert_eq!(learnt.len(), 2 * (90 - expected));
        assert!(held.iter().all(|text| !learnt.contains(text)), "{share} of {buffer}");
        assert_eq!(dataset.planned_examples(), Planned { examples: 90 - expected as u64, exact: true });
        assert_eq!(dataset.eval_examples().len(), expected, "later epochs add none");
    }
    numbered(dir.path(), 1200, &[]);
    let settings = json!({"shuffle_buffer": 1200, "eval_share": 0.5});
    let dataset = open(&job(dir.path(), json!({}), settings)).await.unwrap();
    assert_eq!(dataset.eval_examples().len(), 256);
}

#[tokio::test]
async fn so_many_samples_are_taken_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    numbered(dir.path(), 60, &[]);
    for (max_samples, buffer, exact_at_once) in
        [(25, 100, true), (25, 10, false), (60, 100, true), (61, 100, true)]
    {
        let settings =
            json!({"epochs": 2, "shuffle_buffer": buffer, "eval_share": 0, "max_samples": max_samples});
        let mut dataset = open(&job(dir.path(), json!({}), settings)).await.unwrap();
        assert_eq!(dataset.planned_examples().exact, exact_at_once, "{max_samples} {buffer}");
        let mut all = texts(&batches(&mut dataset, 8, 100).await);
        let expected = max_samples.min(60);
        assert_eq!(all.len(), 2 * expected);
        all.sort();
        all.dedup();
        assert_eq!(all.len(), expected, "each epoch has the same");
    }
}

#[tokio::test]
async fn steps_that_are_asked_for_go_on_through_the_data() {
    let dir = tempfile::tempdir().unwrap();
    numbered(dir.path(), 5, &[]);
    let settings = json!({"epochs": 1, "max_steps": 100, "eval_share": 0});
    let mut dataset = open(&job(dir.path(), json!({}), settings)).await.unwrap();
    let all = batches(&mut dataset, 3, 40).await;
    assert_eq!(all.len(), 40);
    assert_eq!(dataset.epoch(), 19);
}

/// A folder whose records are of every kind: good, bad, too long, in two files of which one is compressed.
fn mixed(dir: &Path) {
    numbered(dir, 31, &[(3, "{\"prompt\": \"no answer\"}"), (9, "nonsense"), (20, "[]")]);
    let long = json!({"prompt": "very ".repeat(100), "completion": "x"}).to_string();
    let book = json!({"prompt": "p", "completion": "word ".repeat(4000)}).to_string();
    let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for i in 100..115 {
        writeln!(zipped, "{}", json!({"prompt": format!("p{i}"), "completion": format!("c{i}")})).unwrap();
    }
    write!(zipped, "{long}\n{book}\n").unwrap();
    std::fs::write(dir.join("b.jsonl.gz"), zipped.finish().unwrap()).unwrap();
}

#[tokio::test]
async fn an_interruption_anywhere_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    mixed(dir.path());
    for (buffer, samples, max_steps) in
        [(6, 2000, None), (1, 2000, None), (500, 40, None), (9, 33, Some(1000))]
    {
        let settings = json!({
            "epochs": 3, "shuffle_buffer": buffer, "eval_share": 0.2, "max_samples": samples,
            "max_steps": max_steps, "max_seq_length": 64,
        });
        let job = job(dir.path(), json!({"max_bad_rows": 0.2, "skip": 2}), settings);
        let mut whole = open(&job).await.unwrap();
        let (held, planned) = (whole.eval_examples().to_vec(), whole.planned_examples());
        let expected = batches(&mut whole, 4, 45).await;
        assert!(expected.len() > 20, "{}", expected.len());
        if max_steps.is_none() && samples > 100 {
            let counters = whole.counters();
            assert_eq!((counters.bad, counters.skipped, counters.truncated), (3, 1, 1), "{counters:?}");
        }
        for stop in 0..=expected.len() {
            let mut first = open(&job).await.unwrap();
            assert_eq!(batches(&mut first, 4, stop).await, expected[..stop]);
            let bytes = saved(&first);
            drop(first);
            let mut second = restore(&job, &bytes).unwrap();
            assert_eq!(second.eval_examples(), held);
            assert_eq!(saved(&second), bytes, "what is read is what was written");
            if stop == 0 {
                assert_eq!(second.planned_examples(), planned);
            }
            let rest = batches(&mut second, 4, 45 - stop).await;
            assert_eq!(rest, expected[stop..], "buffer {buffer}, interrupted after {stop}");
            assert_eq!(saved(&second), saved(&whole), "buffer {buffer}, interrupted after {stop}");
        }
    }
}

#[tokio::test]
async fn whoever_stops_waiting_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    mixed(dir.path());
    let settings = json!({"epochs": 2, "shuffle_buffer": 5, "eval_share": 0, "max_seq_length": 64});
    let job = job(dir.path(), json!({"max_bad_rows": 0.2}), settings);
    let expected = batches(&mut open(&job).await.unwrap(), 4, 100).await;
    let mut dataset = open(&job).await.unwrap();
    let (mut all, mut dropped, mut reopened) = (Vec::new(), 0, 0);
    loop {
        // Polled once and dropped, unless it is ready at once.
        match dataset.next_batch(4).now_or_never() {
            Some(batch) => {
                let batch = batch.unwrap();
                if batch.is_empty() {
                    break;
                }
                all.push(batch);
            }
            None => {
                dropped += 1;
                // What is in the middle of a batch can be saved as well.
                if dropped % 3 == 0 && reopened < 20 {
                    dataset = restore(&job, &saved(&dataset)).unwrap();
                    reopened += 1;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    }
    assert!(dropped > 0 && reopened > 0);
    assert_eq!(all, expected);
}

#[tokio::test]
async fn a_state_that_is_damaged_or_of_another_job_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    numbered(dir.path(), 12, &[]);
    let job = job(dir.path(), json!({}), json!({"shuffle_buffer": 4}));
    let mut dataset = open(&job).await.unwrap();
    batches(&mut dataset, 2, 2).await;
    let bytes = saved(&dataset);
    restore(&job, &bytes).unwrap();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x41;
        let error = error_of(restore(&job, &damaged));
        assert!(error.contains("the checkpoint's training data"), "{error}");
        assert!(restore(&job, &bytes[..at]).is_err(), "cut at {at}");
    }
    let config = AdapterConfig { seed: 1, ..job.config.clone() };
    let error = error_of(restore(&TrainJob { config, ..job.clone() }, &bytes));
    assert!(error.contains("of another job"), "{error}");

    // A source that shrank since.
    numbered(dir.path(), 3, &[]);
    let error = restore(&job, &bytes).unwrap().next_batch(4).await.unwrap_err().to_string();
    assert!(error.contains("source lessons") && error.contains("was changed since"), "{error}");

    struct Full;
    impl io::Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    assert_eq!(dataset.save(&mut Full).unwrap_err().kind(), io::ErrorKind::StorageFull);
}

#[tokio::test]
async fn sources_with_nothing_to_learn_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    let good = json!({"prompt": "a b c d e f", "completion": "g"}).to_string() + "\n";
    for (text, source, settings, expected) in [
        ("", json!({}), json!({}), "source lessons is empty"),
        ("\n\n", json!({"template": "text"}), json!({}), "source lessons is empty"),
        (&good, json!({"skip": 5}), json!({}), "no record left to learn from; lower skip (5)"),
        (
            &good.repeat(3),
            json!({}),
            json!({"max_seq_length": 3}),
            "3 of 3 records are cut off before their answer",
        ),
        ("{\"title\": 1}\n", json!({}), json!({}), "record 1 ("),
        ("{\"title\": 1}\n", json!({}), json!({}), "has none of the fields"),
        (
            "{\"title\": 1}\n",
            json!({"max_bad_rows": 1}),
            json!({}),
            "no record of source lessons can be used: record 1",
        ),
        (
            "{\"title\": 1}\n",
            json!({"max_bad_rows": 1, "template": "text"}),
            json!({}),
            "has no field text; it has title",
        ),
        ("{\"prompt\": 1}\n", json!({}), json!({"template": "prompt_completion"}), "has no field completion"),
        ("nonsense\n", json!({}), json!({}), "a.jsonl, line 1: no JSON object"),
        (&good, json!({"template": "translation"}), json!({}), "target_language is missing"),
        ("{\"messages\": []}\n", json!({}), json!({}), "has messages that are no list"),
    ] {
        std::fs::write(&path, text).unwrap();
        let error = error_of(open(&job(&path, source, settings)).await);
        assert!(error.contains(expected), "{text}: {error}");
    }
    let error = error_of(open(&job(&dir.path().join("missing"), json!({}), json!({}))).await);
    assert!(error.contains("source lessons") && error.contains("there is no"), "{error}");
}

#[tokio::test]
async fn records_without_the_field_count_up_to_a_share() {
    let dir = tempfile::tempdir().unwrap();
    let bare: Vec<(usize, &str)> = (0..3).map(|i| (150 + i, "{\"prompt\": \"x\"}")).collect();
    numbered(dir.path(), 400, &bare);
    let settings = json!({"eval_share": 0, "shuffle_buffer": 20});
    let lenient = json!({"max_bad_rows": 0.02});
    let mut dataset = open(&job(dir.path(), lenient, settings.clone())).await.unwrap();
    assert_eq!(texts(&batches(&mut dataset, 8, 1000).await).len(), 400);
    let counters = dataset.counters();
    assert_eq!((counters.records, counters.bad), (403, 3));
    assert!(counters.reasons[0].starts_with("record 151 ("), "{:?}", counters.reasons);
    assert!(
        counters.reasons[0].contains("a.jsonl, line 151) has no field completion"),
        "{:?}",
        counters.reasons
    );

    let mut dataset = open(&job(dir.path(), json!({"max_bad_rows": 0.005}), settings)).await.unwrap();
    let failed = loop {
        match dataset.next_batch(8).await {
            Ok(batch) => assert!(!batch.is_empty(), "comes to an end"),
            Err(error) => break error.to_string(),
        }
    };
    assert!(failed.contains("source lessons") && failed.contains("of 151 rows cannot be used"), "{failed}");
}

#[tokio::test]
async fn what_the_source_says_reaches_whoever_logs_it() {
    let dir = tempfile::tempdir().unwrap();
    numbered(dir.path(), 30, &[]);
    let place = |name: &str| json!({"type": "local", "path": dir.path().join(name).to_str().unwrap()});
    let mut job = job(dir.path(), json!({}), json!({"epochs": 1, "shuffle_buffer": 4, "eval_share": 0}));
    let list = json!({
        "type": "fallback", "sources": ["far", "near"], "resolved": [place("missing.jsonl"), place("a.jsonl")],
    });
    job.source = serde_json::from_value(list).unwrap();
    let mut dataset = open(&job).await.unwrap();
    let notes = dataset.take_notes();
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].contains("source far: there is no") && notes[0].contains("going on with source near"));
    let expected = batches(&mut open(&job).await.unwrap(), 4, 100).await;
    let first = batches(&mut dataset, 4, 3).await;
    let mut second = restore(&job, &saved(&dataset)).unwrap();
    assert_eq!([first, batches(&mut second, 4, 100).await].concat(), expected);
    assert!(second.take_notes().is_empty(), "it goes on in the one that was chosen");

    job.source = serde_json::from_value(json!({
        "type": "local", "path": dir.path().join("a.jsonl").to_str().unwrap(), "filter": {"max_chars": 9},
    }))
    .unwrap();
    let mut dataset = open(&job).await.unwrap();
    // " It is 0." has nine characters, " It is 10." has ten.
    assert_eq!(texts(&batches(&mut dataset, 8, 100).await).len(), 10);
    let counters = dataset.counters();
    assert_eq!((counters.records, counters.bad, counters.filtered), (30, 0, 20));
}

#[tokio::test]
async fn a_source_that_dies_in_the_middle_ends_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    mixed(dir.path());
    let zipped = std::fs::read(dir.path().join("b.jsonl.gz")).unwrap();
    std::fs::write(dir.path().join("b.jsonl.gz"), &zipped[..zipped.len() - 20]).unwrap();
    let settings = json!({"shuffle_buffer": 4, "eval_share": 0});
    let mut dataset = open(&job(dir.path(), json!({"max_bad_rows": 0.2}), settings)).await.unwrap();
    let mut examples = 0;
    let error = loop {
        match dataset.next_batch(4).await {
            Ok(batch) => {
                assert!(!batch.is_empty(), "comes to an end");
                examples += batch.len();
            }
            Err(error) => break error.to_string(),
        }
    };
    assert!(examples > 20, "{examples}");
    for part in ["source lessons", "b.jsonl.gz", "cut off", "after record"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

fn of_length(tokens: usize, mark: u32) -> TrainSequence {
    TrainSequence::new(vec![mark; tokens], vec![1.0; tokens])
}

#[test]
fn passes_are_filled_first_fit() {
    let batch: Vec<TrainSequence> = [5, 4, 3, 2, 9, 1].iter().map(|&n| of_length(n, n as u32)).collect();
    let lengths = |passes: Vec<Vec<TrainSequence>>| -> Vec<Vec<usize>> {
        passes.iter().map(|pass| pass.iter().map(|s| s.tokens.len()).collect()).collect()
    };
    assert_eq!(lengths(pack(batch.clone(), 9, 8)), [vec![5, 4], vec![3, 2, 1], vec![9]]);
    assert_eq!(lengths(pack(batch.clone(), 9, 2)), [vec![5, 4], vec![3, 2], vec![9], vec![1]]);
    assert_eq!(lengths(pack(batch.clone(), 1000, 8)), [vec![5, 4, 3, 2, 9, 1]]);
    assert_eq!(lengths(pack(batch, 4, 8)), [vec![5], vec![4], vec![3, 1], vec![2], vec![9]]);
    assert!(pack(Vec::new(), 9, 8).is_empty());
}

proptest! {
    #[test]
    fn passes_hold_everything_and_no_more_than_they_may(
        lengths in prop::collection::vec(2_usize..50, 0..40), tokens in 1_usize..120, sequences in 1_usize..10,
    ) {
        let batch: Vec<_> = lengths.iter().enumerate().map(|(i, &n)| of_length(n, i as u32)).collect();
        let passes = pack(batch.clone(), tokens, sequences);
        let mut seen = BTreeMap::new();
        for pass in &passes {
            let used: usize = pass.iter().map(|s| s.tokens.len()).sum();
            prop_assert!(!pass.is_empty() && (pass.len() == 1 || used <= tokens) && pass.len() <= sequences);
            for pair in pass.windows(2) {
                prop_assert!(pair[0].tokens[0] < pair[1].tokens[0], "order is kept inside a pass");
            }
            seen.extend(pass.iter().map(|s| (s.tokens[0], s.clone())));
        }
        let all: BTreeMap<_, _> = batch.into_iter().map(|s| (s.tokens[0], s)).collect();
        prop_assert_eq!(seen, all);
    }

    #[test]
    fn draws_are_below_their_bound(seed in any::<u64>(), n in 1_usize..5000) {
        let mut random = random(seed, 3);
        for _ in 0..50 {
            prop_assert!(below(&mut random, n) < n);
        }
    }
}

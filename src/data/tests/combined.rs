//! Mixes and fallbacks: shares by weight, the same order again for the same seed, cursors, and what does not go
//! together.

use std::collections::BTreeMap;

use super::*;

fn numbered(dir: &Path, name: &str, count: usize) {
    let lines: String =
        (0..count).map(|n| json!({"q": format!("{name}{n}"), "a": n}).to_string() + "\n").collect();
    std::fs::write(dir.join(format!("{name}.jsonl")), lines).unwrap();
}

/// The source of a name among others, as the connectors file resolves it.
fn resolve(all: &Value, name: &str) -> Result<SourceConfig, String> {
    let all: BTreeMap<String, SourceConfig> = serde_json::from_value(all.clone()).unwrap();
    let find = |wanted: &str| all.get_key_value(wanted).map(|(name, source)| (name.as_str(), source));
    all[name].with_parts(name, &find)
}

fn local(dir: &Path, name: &str) -> Value {
    json!({"type": "local", "path": dir.join(format!("{name}.jsonl")), "fields": {"prompt": "q", "completion": "a"}})
}

async fn prompts(stream: RecordStream) -> Vec<String> {
    let (records, error) = drain(stream).await;
    assert_eq!(error, None);
    records.iter().map(|record| record["prompt"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_mix_draws_by_weight_until_all_are_exhausted() {
    let dir = tempfile::tempdir().unwrap();
    for (name, count) in [("a", 300), ("b", 100), ("c", 5)] {
        numbered(dir.path(), name, count);
    }
    let all = json!({
        "a": local(dir.path(), "a"), "b": local(dir.path(), "b"), "c": local(dir.path(), "c"),
        "mix": {"type": "mix", "sources": [{"source": "a", "weight": 3}, {"source": "b"}, {"source": "c"}], "seed": 5},
    });
    let mix = resolve(&all, "mix").unwrap();
    let order = prompts(mix.open("mix", Cursor::default())).await;
    assert_eq!(order.len(), 405);
    let of = |letter: char| order.iter().filter(|text| text.starts_with(letter)).cloned().collect::<Vec<_>>();
    for (letter, count) in [('a', 300), ('b', 100), ('c', 5)] {
        // Each comes whole and in its own order.
        assert_eq!(of(letter), (0..count).map(|n| format!("{letter}{n}")).collect::<Vec<_>>());
    }
    let early = order[..200].iter().filter(|text| text.starts_with('a')).count();
    assert!((120..180).contains(&early), "{early} of 200 are of the source with three quarters");
    assert_eq!(order, prompts(mix.open("mix", Cursor::default())).await, "the same seed, the same order");
    let mut typed = serde_json::to_value(&mix).unwrap();
    typed["seed"] = json!(6);
    let other: SourceConfig = serde_json::from_value(typed).unwrap();
    assert_ne!(order, prompts(other.open("mix", Cursor::default())).await);

    // An interruption anywhere changes nothing.
    for stop in [0, 1, 2, 50, 203, 390, 404, 405] {
        let mut stream = mix.open("mix", Cursor::default());
        for _ in 0..stop {
            stream.next().await.unwrap().unwrap();
        }
        let text = serde_json::to_string(&stream.cursor()).unwrap();
        let second = mix.open("mix", serde_json::from_str(&text).unwrap());
        assert_eq!(second.rows().rows, stop as u64);
        assert_eq!(prompts(second).await, order[stop..], "{stop}");
    }
}

#[tokio::test]
async fn a_mix_counts_and_fails_as_its_sources_do() {
    let dir = tempfile::tempdir().unwrap();
    numbered(dir.path(), "a", 200);
    numbered(dir.path(), "b", 200);
    let bad = std::fs::read_to_string(dir.path().join("b.jsonl")).unwrap().replace("\"a\":7}", "\"a\":");
    std::fs::write(dir.path().join("b.jsonl"), bad).unwrap();
    let mut b = local(dir.path(), "b");
    let mut a = local(dir.path(), "a");
    (a["max_bad_rows"], b["max_bad_rows"]) = (json!(0.1), json!(0.1));
    let mix = json!({"type": "mix", "sources": [{"source": "a"}, {"source": "b"}]});
    let mut stream =
        resolve(&json!({"a": a, "b": b, "mix": mix}), "mix").unwrap().open("mix", Cursor::default());
    let mut latest = 0;
    while let Some(record) = stream.next().await {
        record.unwrap();
        latest += 1;
        if latest == 3 {
            stream.refuse("it is of no use".into()).unwrap();
        }
    }
    let rows = stream.rows();
    assert_eq!((latest, rows.rows, rows.bad, rows.reasons.len()), (399, 400, 2, 2));
    b["max_bad_rows"] = json!(0);
    let strict = json!({"a": local(dir.path(), "a"), "b": b, "mix": mix});
    let (_, error) = drain(resolve(&strict, "mix").unwrap().open("mix", Cursor::default())).await;
    let error = error.unwrap();
    assert!(error.contains("source mix: source b: 1 of ") && error.contains("b.jsonl, line 8"), "{error}");
}

#[tokio::test]
async fn a_fallback_reads_the_first_that_works() {
    let dir = tempfile::tempdir().unwrap();
    numbered(dir.path(), "good", 20);
    numbered(dir.path(), "other", 20);
    std::fs::write(dir.path().join("empty.jsonl"), "").unwrap();
    let all = json!({
        "missing": local(dir.path(), "missing"), "empty": local(dir.path(), "empty"),
        "good": local(dir.path(), "good"), "other": local(dir.path(), "other"),
        "list": {"type": "fallback", "sources": ["missing", "empty", "good", "other"]},
        "first": {"type": "fallback", "sources": ["other", "good"]},
        "none": {"type": "fallback", "sources": ["missing", "empty"]},
    });
    let list = resolve(&all, "list").unwrap();
    let mut stream = list.open("list", Cursor::default());
    assert_eq!(stream.next().await.unwrap().unwrap().fields["prompt"], "good0");
    let notes = stream.take_notes();
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(
        notes[0].contains("source missing: there is no") && notes[0].contains("going on with source empty")
    );
    assert!(notes[1].contains("empty: has no record; going on with source good"), "{}", notes[1]);
    assert!(stream.take_notes().is_empty());
    let cursor = serde_json::to_string(&stream.cursor()).unwrap();
    // What was chosen stays chosen, even where the preferred one works by now.
    numbered(dir.path(), "missing", 3);
    let mut again = list.open("list", serde_json::from_str(&cursor).unwrap());
    assert_eq!(again.next().await.unwrap().unwrap().fields["prompt"], "good1");
    assert!(again.take_notes().is_empty());
    assert_eq!(prompts(again).await.len(), 18);
    assert_eq!(prompts(list.open("list", Cursor::default())).await, ["missing0", "missing1", "missing2"]);
    assert_eq!(prompts(resolve(&all, "first").unwrap().open("first", Cursor::default())).await[0], "other0");
    std::fs::remove_file(dir.path().join("missing.jsonl")).unwrap();
    let (_, error) = drain(resolve(&all, "none").unwrap().open("none", Cursor::default())).await;
    let error = error.unwrap();
    assert!(
        error.contains("none of its sources works: source missing") && error.contains("empty: has"),
        "{error}"
    );
}

#[test]
fn names_are_looked_up_and_what_does_not_fit_is_named() {
    let local = |rest: Value| {
        let mut typed = json!({"type": "local", "path": "x"});
        typed.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        typed
    };
    let mix = |names: &[&str]| {
        let parts: Vec<Value> = names.iter().map(|name| json!({"source": name})).collect();
        json!({"type": "mix", "sources": parts})
    };
    let all = json!({
        "plain": local(json!({})), "chat": local(json!({"template": "chat"})),
        "hi": local(json!({"template": "translation", "target_language": "hi"})),
        "ne": local(json!({"template": "translation", "target_language": "ne"})),
        "self": mix(&["plain", "self"]), "one": mix(&["two"]), "two": {"type": "fallback", "sources": ["one"]},
        "lost": mix(&["plain", "nowhere"]), "templates": mix(&["chat", "hi"]), "languages": mix(&["hi", "ne"]),
        "nested": mix(&["plain", "inner"]), "inner": {"type": "fallback", "sources": ["hi", "plain"]},
    });
    for (name, expected) in [
        ("self", "is made of itself: self → self"),
        ("one", "is made of itself: one → two → one"),
        ("lost", "names the source nowhere, which there is not"),
        ("templates", "chat and hi have another template"),
        ("languages", "hi and ne have another target_language"),
    ] {
        let error = resolve(&all, name).unwrap_err();
        assert!(error.contains(expected), "{name}: {error}");
    }
    let nested = resolve(&all, "nested").unwrap();
    assert_eq!(
        (nested.template, nested.target_language.as_deref()),
        (Some(Template::Translation), Some("hi"))
    );
    // It holds all that it needs.
    let text = serde_json::to_string(&nested).unwrap();
    assert_eq!(serde_json::from_str::<SourceConfig>(&text).unwrap(), nested);
    assert_eq!(text.matches("\"path\":\"x\"").count(), 3);
    // Names that stand for many others, many times over.
    let mut bomb = serde_json::Map::from_iter([
        ("s0".to_owned(), local(json!({}))),
        ("t0".to_owned(), local(json!({}))),
    ]);
    for at in 1..40 {
        for letter in ["s", "t"] {
            bomb.insert(format!("{letter}{at}"), mix(&[&format!("s{}", at - 1), &format!("t{}", at - 1)]));
        }
    }
    assert!(resolve(&Value::Object(bomb), "s39").unwrap_err().contains("more than 64 sources"));
}

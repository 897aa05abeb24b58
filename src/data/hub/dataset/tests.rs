//! Data sets of a hub, against a server in this process that plays one, its faults included; and the rules by which
//! files are found, name by name.

#[allow(dead_code, reason = "other tests use the rest of the stand-in")]
#[path = "../../../../tests/support/hub.rs"]
mod fake;
mod python;
mod rules;

use std::io::Read as _;
use std::time::Duration;

use serde_json::json;

use self::fake::{FakeHub, Fault, TOKEN};
use super::*;
use crate::data::object::Patience;

fn settings(hub: &FakeHub, token: Option<&str>) -> HubSettings {
    HubSettings {
        endpoint: hub.endpoint.clone(),
        token: token.map(str::to_owned),
        cache_dir: std::env::temp_dir().join("gurukul-never-used"),
        offline: false,
        backoff: Duration::from_millis(1),
    }
}

fn opening(pin: Option<&str>) -> Opening {
    Opening {
        runtime: tokio::runtime::Handle::current(),
        patience: Patience {
            backoff: Duration::from_millis(1),
            idle: Duration::from_secs(5),
            ..Patience::default()
        },
        stop: tokio_util::sync::CancellationToken::new(),
        format: Format::Auto,
        fields: Vec::new(),
        pin: pin.map(str::to_owned),
    }
}

fn source(keys: serde_json::Value) -> HuggingFaceConfig {
    let config: HuggingFaceConfig = serde_json::from_value(keys).unwrap();
    config.check().unwrap();
    config
}

/// Names and contents of all files of a source, and its pin.
struct Taken {
    files: Vec<(String, Vec<u8>)>,
    pin: String,
}

impl Taken {
    fn names(&self) -> Vec<&str> {
        self.files
            .iter()
            .map(|(name, _)| name.split_once('@').unwrap().1.split_once('/').unwrap().1)
            .collect()
    }
}

async fn take(hub: &FakeHub, keys: serde_json::Value) -> Result<Taken, String> {
    take_as(settings(hub, None), keys, None).await
}

async fn take_as(settings: HubSettings, keys: serde_json::Value, pin: Option<&str>) -> Result<Taken, String> {
    let (config, opening) = (source(keys), opening(pin));
    let work = move || {
        let opened = config.open_at(&settings, &opening)?;
        let Rows::Files(objects) = opened.rows else { unreachable!("a data set has files") };
        let mut files = Vec::new();
        for object in objects {
            let mut object = object?;
            object.stat()?;
            let mut bytes = Vec::new();
            object.read_from(0)?.read_to_end(&mut bytes).map_err(|error| error.to_string())?;
            files.push((object.shown().to_owned(), bytes));
        }
        Ok(Taken { files, pin: opened.pin.unwrap() })
    };
    tokio::task::spawn_blocking(work).await.unwrap()
}

async fn refused(hub: &FakeHub, keys: serde_json::Value) -> String {
    take(hub, keys).await.err().expect("cannot be had")
}

/// Calls one object of the source on a thread that may block.
async fn with_object<T: Send + 'static>(
    hub: &FakeHub,
    keys: serde_json::Value,
    work: impl FnOnce(&mut dyn Object) -> T + Send + 'static,
) -> T {
    let (config, opening, settings) = (source(keys), opening(None), settings(hub, None));
    let on_thread = move || {
        let opened = config.open_at(&settings, &opening).unwrap();
        let Rows::Files(mut objects) = opened.rows else { unreachable!("a data set has files") };
        work(objects.next().unwrap().unwrap().as_mut())
    };
    tokio::task::spawn_blocking(on_thread).await.unwrap()
}

/// Bytes that do not repeat early.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let step = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(step).take(length).collect()
}

fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is missing in: {message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_found_and_read_at_their_commit() {
    let hub = FakeHub::start().await;
    let readme = b"---\nconfigs:\n- config_name: hi\n  data_files:\n  - split: train\n    path: hi/train-*\n  - split: \
                   test\n    path: [hi/test.jsonl]\n- config_name: ta\n  data_dir: ta\n  data_files: '*.jsonl'\n---\n# x";
    let big = noise(200_000);
    let commit = hub.commit(
        "org/data",
        "main",
        &[
            ("README.md", readme),
            ("hi/train-0.parquet", &big),
            ("hi/train-1.parquet", b"second"),
            ("hi/test.jsonl", b"{}\n"),
            ("ta/a.jsonl", b"{\"text\": \"1\"}\n"),
            ("ta/deep/b.jsonl", b"{}\n"),
        ],
    );
    let taken = take(&hub, json!({"repo": "org/data", "config": "hi"})).await.unwrap();
    assert_eq!(taken.names(), ["hi/train-0.parquet", "hi/train-1.parquet"]);
    assert!(taken.files[0].1 == big && taken.files[1].1 == b"second");
    assert_eq!(taken.pin, commit);
    assert_eq!(taken.files[0].0, format!("hf://datasets/org/data@{}/hi/train-0.parquet", &commit[..8]));
    let asked = hub.asked();
    assert!(asked.iter().filter(|asked| asked.path.contains("/tree/")).all(|a| a.path.ends_with("/hi")));
    let taken = take(&hub, json!({"repo": "org/data", "config": "hi", "split": "test"})).await.unwrap();
    assert_eq!(taken.names(), ["hi/test.jsonl"]);
    let taken = take(&hub, json!({"repo": "org/data", "config": "ta"})).await.unwrap();
    assert_eq!(taken.names(), ["ta/a.jsonl"]);
    let taken =
        take(&hub, json!({"repo": "org/data", "data_files": ["ta/**/*.jsonl", "hi/test.jsonl"]})).await;
    assert_eq!(taken.unwrap().names(), ["ta/a.jsonl", "ta/deep/b.jsonl", "hi/test.jsonl"]);
    let taken = take(&hub, json!({"repo": "org/data", "data_dir": "hi", "split": "test"})).await.unwrap();
    assert_eq!(taken.names(), ["hi/test.jsonl"]);

    assert_names(&refused(&hub, json!({"repo": "org/data"})).await, &["config is missing", "hi, ta"]);
    let message = refused(&hub, json!({"repo": "org/data", "config": "bn"})).await;
    assert_names(&message, &["data set org/data", "no 'bn'", "hi, ta"]);
    let message = refused(&hub, json!({"repo": "org/data", "config": "hi", "split": "validation"})).await;
    assert_names(&message, &["no 'validation'", "train, test"]);
    let message = refused(&hub, json!({"repo": "org/data", "data_files": "hi/nothing.jsonl"})).await;
    assert_names(&message, &["no file hi/nothing.jsonl"]);
    let message = refused(&hub, json!({"repo": "org/data", "data_files": "*.csv"})).await;
    assert_names(&message, &["no file that can be read"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_go_on_page_by_page() {
    let hub = FakeHub::start().await;
    let names: Vec<String> = (0..57).map(|i| format!("data/train-{i:05}-of-00057.jsonl")).collect();
    let files: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), b"{}\n".as_slice())).collect();
    hub.commit("org/data", "main", &files);
    hub.page(10);
    let taken = take(&hub, json!({"repo": "org/data"})).await.unwrap();
    assert_eq!(taken.names(), names);
    let pages = hub.asked().iter().filter(|asked| asked.path.contains("/tree/")).count();
    assert_eq!(pages, 6, "57 files and a folder");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_on_at_its_commit_when_the_branch_has_moved() {
    let hub = FakeHub::start().await;
    hub.commit("org/data", "main", &[("a.jsonl", b"old\n"), ("b.jsonl", b"b\n")]);
    let first = take(&hub, json!({"repo": "org/data"})).await.unwrap();
    hub.commit("org/data", "main", &[("a.jsonl", b"new\n")]);
    let keys = json!({"repo": "org/data"});
    let later = take_as(settings(&hub, None), keys.clone(), Some(&first.pin)).await.unwrap();
    assert_eq!((later.files, &later.pin), (first.files, &first.pin));
    assert_eq!(take(&hub, keys).await.unwrap().names(), ["a.jsonl"]);
    hub.commit("org/data", "v1", &[("c.jsonl", b"c\n")]);
    let tagged = take(&hub, json!({"repo": "org/data", "revision": "v1"})).await.unwrap();
    assert_eq!(tagged.names(), ["c.jsonl"]);
    let message = refused(&hub, json!({"repo": "org/data", "revision": "v2"})).await;
    assert_names(&message, &["no revision 'v2'", "leave revision away"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_opens_and_stays_at_the_hub() {
    let hub = FakeHub::start().await;
    hub.commit("org/hidden", "main", &[("a.parquet", b"1")]);
    hub.hide("org/hidden");
    hub.commit("org/gated", "main", &[("a.parquet", b"1")]);
    hub.gate("org/gated");
    let message = refused(&hub, json!({"repo": "org/hidden"})).await;
    assert_names(&message, &["org/hidden", "no such data set, or it needs a token", "HF_TOKEN"]);
    let message = refused(&hub, json!({"repo": "org/gated"})).await;
    assert_names(&message, &["org/gated", "accepted its terms", "/datasets/org/gated", "HF_TOKEN"]);
    hub.asked();
    for repo in ["org/hidden", "org/gated"] {
        let taken = take_as(settings(&hub, Some(TOKEN)), json!({"repo": repo}), None).await.unwrap();
        assert_eq!(taken.names(), ["a.parquet"]);
    }
    let asked = hub.asked();
    assert!(asked.iter().any(|asked| asked.cdn) && asked.iter().all(|asked| asked.token != asked.cdn));
    let message = take_as(settings(&hub, Some("hf_other")), json!({"repo": "org/hidden"}), None).await;
    assert_names(&message.err().unwrap(), &["the token in HF_TOKEN", "data set's terms"]);
    let offline = HubSettings { offline: true, ..settings(&hub, None) };
    let message = take_as(offline, json!({"repo": "org/gated"}), None).await.err().unwrap();
    assert_names(&message, &["HF_HUB_OFFLINE", "type: local"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_are_refused_and_what_the_hub_made_stands_in() {
    let hub = FakeHub::start().await;
    let files: [(&str, &[u8]); 2] = [("scripted.py", b"import os"), ("hi_meta/a.jsonl", b"{}")];
    hub.commit("org/scripted", "main", &files);
    // Files that are named need no script.
    let taken = take(&hub, json!({"repo": "org/scripted", "data_files": "hi_meta/*.jsonl"})).await.unwrap();
    assert_eq!(taken.names(), ["hi_meta/a.jsonl"]);
    let message = refused(&hub, json!({"repo": "org/scripted"})).await;
    assert_names(&message, &["scripted.py", "not run", "refs/convert/parquet"]);
    hub.commit("org/archive", "main", &[("all.tar", b"x"), ("README.md", b"# x")]);
    let message = refused(&hub, json!({"repo": "org/archive"})).await;
    assert_names(&message, &["no file that can be read", "data_files"]);
    let made: [(&str, &[u8]); 3] = [
        ("hi/train/0000.parquet", b"h0"),
        ("hi/train/0001.parquet", b"h1"),
        ("ta/partial-test/0000.parquet", b"t"),
    ];
    let commit = hub.commit("org/archive", "refs/convert/parquet", &made);
    let taken = take(&hub, json!({"repo": "org/archive", "config": "hi"})).await.unwrap();
    assert_eq!(taken.names(), ["hi/train/0000.parquet", "hi/train/0001.parquet"]);
    assert_eq!(taken.pin, format!("parquet:{commit}"));
    hub.commit("org/archive", "refs/convert/parquet", &[("hi/train/0000.parquet", b"new")]);
    let keys = json!({"repo": "org/archive", "config": "hi"});
    let later = take_as(settings(&hub, None), keys, Some(&taken.pin)).await.unwrap();
    assert_eq!(later.files, taken.files);
    hub.commit("org/archive", "refs/convert/parquet", &made);
    let taken = take(&hub, json!({"repo": "org/archive", "config": "ta", "split": "test"})).await.unwrap();
    assert_eq!(taken.names(), ["ta/partial-test/0000.parquet"]);
    assert_names(&refused(&hub, json!({"repo": "org/archive"})).await, &["config is missing", "hi, ta"]);
    let message = refused(&hub, json!({"repo": "org/archive", "config": "ta"})).await;
    assert_names(&message, &["no 'train'", "test"]);
    let direct = json!({"repo": "org/archive", "config": "hi", "revision": "refs/convert/parquet"});
    assert_eq!(take(&hub, direct).await.unwrap().names().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_connections_go_on_where_they_broke() {
    let hub = FakeHub::start().await;
    let content = noise(100_000);
    hub.commit("org/data", "main", &[("a.jsonl.gz", &content), ("b.jsonl", &content)]);
    for (name, cdn) in [("a.jsonl.gz", true), ("b.jsonl", false)] {
        for fault in [
            Fault::Cut { after: 30_000, times: 2 },
            Fault::Fails { status: 429, retry_after: "0", times: 2 },
            Fault::Fails { status: 500, retry_after: "0", times: 1 },
            Fault::Drip,
        ] {
            let cut = matches!(fault, Fault::Cut { .. });
            hub.asked();
            hub.fault(name, fault.clone());
            let taken = take(&hub, json!({"repo": "org/data", "data_files": name})).await.unwrap();
            assert!(taken.files[0].1 == content, "{name} {fault:?}");
            if cut {
                let asked = hub.asked();
                let bytes = asked
                    .iter()
                    .filter(|a| a.cdn == cdn && a.path.ends_with(name) && !a.path.contains("tree"));
                let ranges: Vec<_> = bytes.map(|asked| asked.range.clone()).collect();
                assert_eq!(ranges, [None, Some("bytes=30000-".into()), Some("bytes=60000-".into())]);
            }
        }
    }
    hub.fault("a.jsonl.gz", Fault::Cut { after: 0, times: 100 });
    let message = refused(&hub, json!({"repo": "org/data", "data_files": "a.jsonl.gz"})).await;
    assert_names(&message, &["after 0 of 100000 bytes", "4 attempts"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_run_out_are_asked_for_again() {
    let hub = FakeHub::start().await;
    let content = noise(50_000);
    hub.commit("org/data", "main", &[("a.parquet", &content)]);
    hub.fault("a.parquet", Fault::Expires { answers: 3 });
    hub.asked();
    let read = with_object(&hub, json!({"repo": "org/data"}), |object| {
        let ranges = (0..10).map(|i| object.read_range(i * 5_000..(i + 1) * 5_000));
        ranges.collect::<Result<Vec<_>, _>>().map(|parts| parts.concat())
    })
    .await;
    assert!(read.unwrap() == content);
    let asked = hub.asked();
    let redirects =
        asked.iter().filter(|asked| asked.path.contains("/resolve/") && asked.path.ends_with("parquet"));
    assert_eq!(redirects.count(), 4, "each address is used until it runs out");
    hub.fault("a.parquet", Fault::Withheld);
    let message = refused(&hub, json!({"repo": "org/data"})).await;
    assert_names(&message, &["where the hub keeps the files", "403", "4 attempts"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_bytes_than_were_promised_are_an_error() {
    let hub = FakeHub::start().await;
    let content = noise(50_000);
    hub.commit("org/data", "main", &[("a.parquet", &content)]);
    let range = || with_object(&hub, json!({"repo": "org/data"}), |object| object.read_range(10..20));
    assert_eq!(range().await.unwrap(), content[10..20]);
    hub.fault("a.parquet", Fault::IgnoresRange);
    assert_names(&range().await.unwrap_err(), &["ignores ranges", "from 10 on"]);
    hub.fault("a.parquet", Fault::WrongLength(5));
    assert_names(&range().await.unwrap_err(), &["50000 bytes", "50005"]);
    let message = refused(&hub, json!({"repo": "org/data"})).await;
    assert_names(&message, &["50000 bytes", "50005"]);
    // What is read from the start needs no ranges until something breaks.
    hub.fault("a.parquet", Fault::IgnoresRange);
    assert!(take(&hub, json!({"repo": "org/data"})).await.unwrap().files[0].1 == content);
}

#[test]
fn settings_that_cannot_be_are_refused() {
    for (keys, parts) in [
        (json!({}), &["repo is missing"] as &[&str]),
        (json!({"repo": "https://huggingface.co/a/b"}), &["repo", "org/name"]),
        (json!({"repo": "a/b@main"}), &["repo"]),
        (json!({"repo": "../b"}), &["repo"]),
        (json!({"repo": "a/b", "revision": "../c"}), &["revision"]),
        (json!({"repo": "a/b", "split": "train[:10%]"}), &["split", "max_samples"]),
        (json!({"repo": "a/b", "split": ""}), &["split"]),
        (json!({"repo": "a/b", "data_files": "../x"}), &["data_files"]),
        (json!({"repo": "a/b", "data_files": ["https://x/y"]}), &["data_files"]),
        (json!({"repo": "a/b", "data_dir": "a/../b"}), &["data_dir"]),
        (json!({"repo": "a/b", "data_dir": "x", "config": "c"}), &["config", "data_dir"]),
        (json!({"repo": "a/b", "data_files": "x", "split": "test"}), &["split", "data_files"]),
        (json!({"repo": "a/b", "streaming": false}), &["streaming", "type: local"]),
    ] {
        let config: HuggingFaceConfig = serde_json::from_value(keys.clone()).unwrap();
        assert_names(&config.check().expect_err(&keys.to_string()), parts);
    }
    for keys in [json!({"repo": "a/b", "files": "x"}), json!({"repo": "a/b", "data_files": {"train": "x"}})] {
        assert!(serde_json::from_value::<HuggingFaceConfig>(keys).is_err());
    }
    let full = source(json!({"repo": "a/b", "data_files": "x", "revision": "refs/pr/1", "streaming": true}));
    let again = serde_json::from_value(serde_json::to_value(&full).unwrap()).unwrap();
    assert_eq!(full, again);
}

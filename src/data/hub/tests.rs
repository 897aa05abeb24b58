//! Tests of the hub client against a real server in this process, its faults included.

mod fake;

use std::fs;

use super::*;
use fake::{COMMIT, Fake, Fault, noise};

const MODEL: [&str; 7] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors",
];
const WEIGHTS: &str = "model.safetensors";

fn id(text: &str) -> ModelId {
    text.parse().unwrap()
}

async fn get(fake: &Fake) -> anyhow::Result<PathBuf> {
    fake.hub().model(&id("org/name"), Progress::Log).await
}

async fn error(fake: &Fake) -> String {
    format!("{:#}", get(fake).await.expect_err("this model cannot be had"))
}

fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is missing in: {message}");
    }
}

#[tokio::test]
async fn a_model_is_downloaded_into_the_layout_of_huggingface_hub() {
    let fake = Fake::start().await;
    let folder = get(&fake).await.unwrap();
    let repo = fake.cache.path().join("hub/models--org--name");
    assert_eq!(folder, repo.join("snapshots").join(COMMIT));
    fake.assert_complete(&folder, &MODEL);
    let mut names: Vec<String> =
        fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let mut expected = MODEL;
    expected.sort();
    assert_eq!(names, expected, "nothing but the model's files");
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    for name in MODEL {
        assert!(fake.blob(name).is_file(), "{name} has its blob");
        #[cfg(unix)]
        assert_eq!(
            fs::read_link(folder.join(name)).unwrap(),
            Path::new("../../blobs").join(fake.blob(name).file_name().unwrap())
        );
    }
    let heads = fake.asked().iter().filter(|a| a.method == "HEAD").count();
    assert_eq!(heads, MODEL.len(), "each file's hash is asked for once");
    let left: Vec<_> = fs::read_dir(repo.join("blobs"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn the_token_goes_to_the_hub_alone() {
    let fake = Fake::start().await;
    get(&fake).await.unwrap();
    let asked = fake.asked();
    assert!(asked.iter().any(|a| a.cdn), "the weights came from the other host");
    assert!(asked.iter().all(|a| a.token != a.cdn), "{asked:#?}");
    assert!(asked.iter().all(|a| a.identity), "a compressed answer has another length");
}

#[tokio::test]
async fn what_is_cached_is_not_asked_for_again() {
    let fake = Fake::start().await;
    get(&fake).await.unwrap();
    fake.asked();
    let folder = get(&fake).await.unwrap();
    let asked = fake.asked();
    assert_eq!(asked.len(), 1, "the listing alone: {asked:?}");
    let pinned = format!("org/name@{COMMIT}");
    assert_eq!(fake.hub().model(&id(&pinned), Progress::Log).await.unwrap(), folder);
    assert!(fake.asked().is_empty(), "a commit cannot change");
}

#[tokio::test]
async fn a_blob_without_a_name_is_not_downloaded_again() {
    let fake = Fake::start().await;
    let folder = get(&fake).await.unwrap();
    fs::remove_file(folder.join(WEIGHTS)).unwrap();
    fake.asked();
    get(&fake).await.unwrap();
    fake.assert_complete(&folder, &MODEL);
    assert!(fake.asked().iter().all(|a| !a.cdn));
}

#[tokio::test]
async fn a_cut_download_goes_on_where_it_was_cut() {
    let fake = Fake::start().await;
    fake.fault(WEIGHTS, Fault::Cut { after: 100_000, times: 2 });
    fake.assert_complete(&get(&fake).await.unwrap(), &MODEL);
    let starts: Vec<_> = fake.asked().iter().filter(|a| a.cdn).map(|a| a.range_start).collect();
    assert_eq!(starts, [None, Some(100_000), Some(200_000)]);
}

#[tokio::test]
async fn a_download_that_gets_nowhere_ends() {
    let fake = Fake::start().await;
    fake.fault(WEIGHTS, Fault::Cut { after: 0, times: usize::MAX });
    assert_names(&error(&fake).await, &["org/name", "0 of 300000 bytes"]);
    assert!(fake.asked().len() < 30);
}

#[tokio::test]
async fn a_partial_file_of_an_earlier_run_is_used() {
    let fake = Fake::start().await;
    fs::create_dir_all(fake.partial(WEIGHTS).parent().unwrap()).unwrap();
    fs::write(fake.partial(WEIGHTS), &fake.content(WEIGHTS)[..123_456]).unwrap();
    fake.assert_complete(&get(&fake).await.unwrap(), &MODEL);
    let starts: Vec<_> = fake.asked().iter().filter(|a| a.cdn).map(|a| a.range_start).collect();
    assert_eq!(starts, [Some(123_456)]);
}

#[tokio::test]
async fn a_damaged_partial_file_is_started_over() {
    for length in [5_000, 300_000, 400_000] {
        let fake = Fake::start().await;
        fs::create_dir_all(fake.partial(WEIGHTS).parent().unwrap()).unwrap();
        fs::write(fake.partial(WEIGHTS), vec![0; length]).unwrap();
        fake.assert_complete(&get(&fake).await.unwrap(), &MODEL);
    }
}

#[tokio::test]
async fn an_ignored_range_is_noticed() {
    let fake = Fake::start().await;
    fake.fault(WEIGHTS, Fault::IgnoresRange);
    fs::create_dir_all(fake.partial(WEIGHTS).parent().unwrap()).unwrap();
    fs::write(fake.partial(WEIGHTS), &fake.content(WEIGHTS)[..1000]).unwrap();
    fake.assert_complete(&get(&fake).await.unwrap(), &MODEL);
    let starts: Vec<_> = fake.asked().iter().filter(|a| a.cdn).map(|a| a.range_start).collect();
    assert_eq!(starts, [Some(1000)], "one request did: its answer was the whole file");
}

#[tokio::test]
async fn another_range_than_asked_for_is_noticed() {
    let fake = Fake::start().await;
    fake.fault(WEIGHTS, Fault::OtherRange);
    fs::create_dir_all(fake.partial(WEIGHTS).parent().unwrap()).unwrap();
    fs::write(fake.partial(WEIGHTS), &fake.content(WEIGHTS)[..1000]).unwrap();
    fake.assert_complete(&get(&fake).await.unwrap(), &MODEL);
    let starts: Vec<_> = fake.asked().iter().filter(|a| a.cdn).map(|a| a.range_start).collect();
    assert_eq!(starts, [Some(1000), None]);
}

#[tokio::test]
async fn a_refusal_after_a_good_head_leaves_nothing() {
    for name in [WEIGHTS, "tokenizer.json"] {
        let fake = Fake::start().await;
        fake.fault(name, Fault::Forbidden);
        assert_names(&error(&fake).await, &["403", "org/name", "HF_TOKEN"]);
        assert!(!fake.blob(name).exists());
        fake.script.lock().unwrap().faults.clear();
        fake.assert_complete(&get(&fake).await.unwrap(), &MODEL);
    }
}

#[tokio::test]
async fn a_page_instead_of_the_file_is_no_file() {
    let fake = Fake::start().await;
    fake.fault("config.json", Fault::PageInstead);
    error(&fake).await;
    assert!(!fake.blob("config.json").exists());
    fake.script.lock().unwrap().faults.clear();
    fake.assert_complete(&get(&fake).await.unwrap(), &MODEL);
}

#[tokio::test]
async fn a_wrong_size_is_an_error() {
    for more in [5, -5] {
        for name in [WEIGHTS, "config.json"] {
            let fake = Fake::start().await;
            fake.fault(name, Fault::WrongSize(more));
            assert_names(&error(&fake).await, &["promised", name]);
            assert!(!fake.blob(name).exists());
        }
    }
}

#[tokio::test]
async fn a_changed_byte_is_an_error() {
    for name in [WEIGHTS, "tokenizer_config.json"] {
        let fake = Fake::start().await;
        fake.fault(name, Fault::Corrupt);
        assert_names(&error(&fake).await, &["hash", name]);
        assert!(!fake.blob(name).exists() && !fake.partial(name).exists());
    }
}

#[tokio::test]
async fn failures_that_pass_are_waited_for() {
    let fake = Fake::start().await;
    fake.fault("listing", Fault::Fails { status: 429, times: 2 });
    fake.fault(WEIGHTS, Fault::Fails { status: 503, times: 2 });
    fake.assert_complete(&get(&fake).await.unwrap(), &MODEL);
    assert_eq!(fake.asked().iter().filter(|a| a.path.starts_with("/api/")).count(), 3);
}

#[tokio::test]
async fn several_files_of_weights() {
    let fake = Fake::start().await;
    fake.remove(WEIGHTS);
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let index = serde_json::json!({ "weight_map": { "a": shards[0], "b": shards[1], "c": shards[0] } });
    fake.put(cache::INDEX, index.to_string().as_bytes());
    fake.put(shards[0], &noise(1000));
    assert_names(&error(&fake).await, &[shards[1]]);
    fake.put(shards[1], &noise(2000));
    fake.put("model-00003-of-00003.safetensors", &noise(10));
    let folder = get(&fake).await.unwrap();
    fake.assert_complete(&folder, &[shards[0], shards[1], cache::INDEX, "config.json"]);
    assert!(!folder.join("model-00003-of-00003.safetensors").exists());
    // Complete means all of them.
    let offline = Hub::new(HubSettings { offline: true, ..fake.settings() }).unwrap();
    assert_eq!(offline.model(&id("org/name"), Progress::Log).await.unwrap(), folder);
    fs::remove_file(folder.join(shards[1])).unwrap();
    let message = format!("{:#}", offline.model(&id("org/name"), Progress::Log).await.unwrap_err());
    assert_names(&message, &["HF_HUB_OFFLINE", shards[1]]);
}

#[tokio::test]
async fn an_index_that_leaves_the_folder_is_refused() {
    for name in [
        "../evil.safetensors",
        "/evil.safetensors",
        "a/../../evil.safetensors",
        "evil.bin",
        "..\\e.safetensors",
    ] {
        let fake = Fake::start().await;
        fake.remove(WEIGHTS);
        fake.put(cache::INDEX, serde_json::json!({ "weight_map": { "a": name } }).to_string().as_bytes());
        assert_names(&error(&fake).await, &[cache::INDEX, "no safetensors file"]);
    }
}

#[tokio::test]
async fn repositories_without_a_needed_file() {
    let fake = Fake::start().await;
    fake.remove(WEIGHTS);
    assert_names(&error(&fake).await, &["safetensors", "pytorch_model.bin"]);
    fake.remove("tokenizer.json");
    assert_names(&error(&fake).await, &["tokenizer.json"]);
}

#[tokio::test]
async fn refusals_name_the_remedy() {
    let fake = Fake::start().await;
    let without_token = || Hub::new(HubSettings { token: None, ..fake.settings() }).unwrap();
    for status in [401, 403] {
        fake.script.lock().unwrap().listing_error = Some((status, "GatedRepo"));
        assert_names(&error(&fake).await, &[&status.to_string(), "HF_TOKEN", "may not read"]);
        let message = without_token().model(&id("org/name"), Progress::Log).await.unwrap_err();
        assert_names(&format!("{message:#}"), &[&status.to_string(), "org/name", "set HF_TOKEN"]);
    }
    fake.script.lock().unwrap().listing_error = Some((404, "RepoNotFound"));
    assert_names(&error(&fake).await, &["404", "org/name", "HF_ENDPOINT"]);
    fake.script.lock().unwrap().listing_error = None;
    let message = fake.hub().model(&id("org/name@v9"), Progress::Log).await.unwrap_err();
    assert_names(&format!("{message:#}"), &["404", "'v9'", "main"]);
    assert_eq!(fake.asked().len(), 6, "refusals are not tried again");
}

#[tokio::test]
async fn offline_asks_nobody() {
    let fake = Fake::start().await;
    let offline = Hub::new(HubSettings { offline: true, ..fake.settings() }).unwrap();
    let message = format!("{:#}", offline.model(&id("org/name"), Progress::Log).await.unwrap_err());
    assert_names(&message, &["HF_HUB_OFFLINE", "org/name", "main"]);
    assert!(fake.asked().is_empty());
    let folder = get(&fake).await.unwrap();
    fake.asked();
    assert_eq!(offline.model(&id("org/name"), Progress::Log).await.unwrap(), folder);
    assert!(fake.asked().is_empty());
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    let message = format!("{:#}", offline.model(&id("org/name"), Progress::Log).await.unwrap_err());
    assert_names(&message, &["HF_HUB_OFFLINE", "tokenizer.json"]);
}

#[tokio::test]
async fn a_hub_that_does_not_answer() {
    let fake = Fake::start().await;
    // A port that nobody listens on: taken, and given back.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let dead =
        || Hub::new(HubSettings { endpoint: format!("http://127.0.0.1:{port}"), ..fake.settings() }).unwrap();
    let message = format!("{:#}", dead().model(&id("org/name"), Progress::Log).await.unwrap_err());
    assert_names(&message, &["does not answer", "cache", "main", &port.to_string()]);
    let folder = get(&fake).await.unwrap();
    assert_eq!(dead().model(&id("org/name"), Progress::Log).await.unwrap(), folder);
    // One that is broken is as good as none; one that refuses is not.
    fake.fault("listing", Fault::Fails { status: 500, times: usize::MAX });
    assert_eq!(get(&fake).await.unwrap(), folder);
    fake.script.lock().unwrap().faults.clear();
    fake.script.lock().unwrap().listing_error = Some((404, "RepoNotFound"));
    error(&fake).await;
}

#[tokio::test]
async fn moved_repositories_and_circles() {
    let fake = Fake::start().await;
    let folder = fake.hub().model(&id("org/old"), Progress::Log).await.unwrap();
    fake.assert_complete(&folder, &MODEL);
    let message = format!("{:#}", fake.hub().model(&id("org/circle"), Progress::Log).await.unwrap_err());
    assert_names(&message, &["redirects"]);
}

#[tokio::test]
async fn a_revision_with_a_slash() {
    let fake = Fake::start().await;
    fake.hub().model(&id("org/name@refs/pr/1"), Progress::Log).await.unwrap();
    let repo = fake.cache.path().join("hub/models--org--name");
    assert_eq!(fs::read_to_string(repo.join("refs/refs/pr/1")).unwrap(), COMMIT);
}

#[tokio::test]
async fn two_at_once_download_once() {
    let fake = Fake::start().await;
    let (a, b) = tokio::join!(get(&fake), get(&fake));
    fake.assert_complete(&a.unwrap(), &MODEL);
    fake.assert_complete(&b.unwrap(), &MODEL);
    assert_eq!(fake.asked().iter().filter(|a| a.cdn).count(), 1);
}

#[tokio::test]
async fn without_locks_downloads_go_to_files_of_their_own() {
    let fake = Fake::start().await;
    fs::create_dir_all(fake.cache.path().join("hub")).unwrap();
    fs::write(fake.cache.path().join("hub/.locks"), "a file where the folder of locks should be").unwrap();
    fake.fault(WEIGHTS, Fault::Corrupt);
    error(&fake).await;
    fake.script.lock().unwrap().faults.clear();
    // What somebody else is writing is left alone.
    fs::write(fake.partial(WEIGHTS), "somebody else's").unwrap();
    let (a, b) = tokio::join!(get(&fake), get(&fake));
    fake.assert_complete(&a.unwrap(), &MODEL);
    fake.assert_complete(&b.unwrap(), &MODEL);
    assert_eq!(fs::read(fake.partial(WEIGHTS)).unwrap(), b"somebody else's");
    let partial = |name: &fs::DirEntry| name.path().extension().is_some_and(|e| e == "incomplete");
    let left =
        fs::read_dir(fake.blob(WEIGHTS).parent().unwrap()).unwrap().map(Result::unwrap).filter(partial);
    assert_eq!(left.count(), 1);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn no_space() {
    let fake = Fake::start().await;
    fs::create_dir_all(fake.partial(WEIGHTS).parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", fake.partial(WEIGHTS)).unwrap();
    assert_names(&error(&fake).await, &["cannot write", "free some space", "HF_HOME"]);
}

#[tokio::test]
async fn a_cache_that_cannot_be_written() {
    let fake = Fake::start().await;
    fs::write(fake.cache.path().join("hub"), "a file where the folder should be").unwrap();
    assert_names(&error(&fake).await, &["cannot write", "HF_HOME"]);
}

#[test]
fn unusable_settings() {
    let settings = |endpoint: &str, token: Option<&str>| HubSettings {
        endpoint: endpoint.into(),
        token: token.map(Into::into),
        cache_dir: "x".into(),
        offline: false,
        backoff: Duration::ZERO,
    };
    for endpoint in ["huggingface.co", "ftp://example.org", ""] {
        let message = Hub::new(settings(endpoint, None)).err().unwrap().to_string();
        assert_names(&message, &["HF_ENDPOINT"]);
    }
    let message = Hub::new(settings("http://127.0.0.1", Some("a\nb"))).err().unwrap().to_string();
    assert_names(&message, &["HF_TOKEN"]);
    assert!(!message.contains("a\nb"));
}

#[test]
fn the_environment_means_what_it_means_to_huggingface_hub() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("token"), "from-file\n").unwrap();
    let at = home.path().to_str().unwrap();
    let settings = |variables: &[(&str, &str)]| {
        let variables: std::collections::HashMap<String, String> =
            variables.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        HubSettings::from_lookup(&|name| variables.get(name).cloned())
    };
    let plain = settings(&[("HOME", "/h")]).unwrap();
    assert_eq!(plain.cache_dir, Path::new("/h/.cache/huggingface/hub"));
    assert_eq!(
        (plain.endpoint.as_str(), plain.token, plain.offline),
        ("https://huggingface.co", None, false)
    );
    let xdg = settings(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]).unwrap();
    assert_eq!(xdg.cache_dir, Path::new("/x/huggingface/hub"));
    let own =
        settings(&[("HOME", "/h"), ("HF_HOME", at), ("HF_ENDPOINT", "http://m"), ("HF_HUB_OFFLINE", "yes")]);
    let own = own.unwrap();
    assert_eq!(own.cache_dir, home.path().join("hub"));
    assert_eq!(
        (own.endpoint.as_str(), own.token.as_deref(), own.offline),
        ("http://m", Some("from-file"), true)
    );
    let both =
        settings(&[("HF_HOME", at), ("HF_TOKEN", " mine "), ("HF_HUB_CACHE", "/c"), ("HF_HUB_OFFLINE", "0")]);
    let both = both.unwrap();
    assert_eq!((both.token.as_deref(), both.offline), (Some("mine"), false));
    assert_eq!(both.cache_dir, Path::new("/c"));
    assert_names(&settings(&[]).err().unwrap().to_string(), &["HF_HOME"]);
}

#[test]
fn what_names_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().to_str().unwrap();
    assert_eq!(parse_spec(at).unwrap(), Spec::Folder(folder.path().to_owned()));
    let file = folder.path().join("config.json");
    fs::write(&file, "{}").unwrap();
    assert_names(&parse_spec(file.to_str().unwrap()).unwrap_err().to_string(), &["is a file", "folder"]);
    for text in [
        "./nowhere",
        "../nowhere",
        "/nowhere/at/all",
        "a/b/c",
        "a b/c",
        "a/..",
        "",
        "a/b@",
        "a/b@../c",
        "a--b/c",
        "a/b@x y",
    ] {
        assert_names(&parse_spec(text).unwrap_err().to_string(), &["no folder", "org/name@revision"]);
    }
    for (text, repo, revision) in [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "main"),
        ("bigscience/bloomz-560m@v1.0", "bigscience/bloomz-560m", "v1.0"),
        ("gpt2", "gpt2", "main"),
        ("a/b@refs/pr/1", "a/b", "refs/pr/1"),
    ] {
        assert_eq!(
            parse_spec(text).unwrap(),
            Spec::Hub(ModelId { repo: repo.into(), revision: revision.into() })
        );
    }
}

/// Serves the fake hub until it is killed, for other clients to be pointed at (see `docs/LOG.md`).
#[tokio::test]
#[ignore = "runs until it is stopped"]
async fn serve_for_other_clients() {
    let fake = Fake::start().await;
    fs::write(std::env::var("GURUKUL_FAKE_HUB_FILE").unwrap(), &fake.endpoint).unwrap();
    std::future::pending().await
}

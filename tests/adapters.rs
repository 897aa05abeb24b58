//! The registry of adapters over a running engine: when adapters are loaded, loaded again, evicted, deleted, and
//! what requests that run meanwhile get. PEFT's own files from the parity fixtures; no reference numbers here
//! (those are the parity tests').

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use gurukul::adapters::{AdapterError, Registry};
use gurukul::engine::{
    AdapterHandle, EngineConfig, EngineError, EngineHandle, Event, GenerateRequest, Generation,
};
use gurukul::model::load::{DeviceChoice, DtypeChoice};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::quant::Quantization;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama")
}

fn engine_with(adapter_cache_bytes: u64) -> EngineHandle {
    let config = EngineConfig {
        model_dir: llama(),
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::F32,
        quantize: Quantization::None,
        kv_cache_bytes: None,
        max_batch: 4,
        max_queue: 64,
        prefill_chunk: 16,
        adapter_cache_bytes,
        train_share: 0.5,
    };
    let tokenizer = Arc::new(Tokenizer::from_dir(&llama()).unwrap());
    EngineHandle::start(config, tokenizer).unwrap()
}

/// A folder of adapters, and the registry over it.
struct Fixture {
    root: tempfile::TempDir,
    registry: Registry,
    engine: EngineHandle,
}

impl Fixture {
    fn new() -> Self {
        Self::over(engine_with(1 << 30))
    }

    fn over(engine: EngineHandle) -> Self {
        let root = tempfile::tempdir().unwrap();
        let registry = Registry::new(root.path().join("adapters"), engine.clone());
        Self { root, registry, engine }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("adapters").join(name)
    }

    /// Puts one of PEFT's adapters there, complete, as a move into place would.
    fn put(&self, name: &str, source: &str) {
        let target = self.path(name);
        std::fs::create_dir_all(&target).unwrap();
        for file in [CONFIG, TENSORS] {
            let new = target.join(format!("{file}.new"));
            std::fs::copy(llama().join(source).join(file), &new).unwrap();
            std::fs::rename(new, target.join(file)).unwrap();
        }
    }

    async fn answer(&self, adapter: Option<AdapterHandle>) -> Vec<u32> {
        tokens_of(self.start(adapter, 24)).await
    }

    fn start(&self, adapter: Option<AdapterHandle>, new_tokens: usize) -> Generation {
        let prompt = vec![5, 17, 42, 99, 7];
        let request =
            GenerateRequest { ignore_eos: true, adapter, ..GenerateRequest::greedy(prompt, new_tokens) };
        self.engine.generate(request).unwrap()
    }
}

async fn tokens_of(mut generation: Generation) -> Vec<u32> {
    let mut tokens = Vec::new();
    while let Some(event) = generation.events.recv().await {
        match event {
            Event::Token { token, .. } => tokens.push(token),
            Event::Finished { .. } => return tokens,
            Event::Failed(error) => panic!("{error}"),
        }
    }
    panic!("the engine stopped");
}

fn reason(result: Result<AdapterHandle, AdapterError>) -> String {
    match result {
        Err(AdapterError::Invalid { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_adapter_is_loaded_when_it_is_first_named() {
    let f = Fixture::new();
    assert!(f.registry.list().await.unwrap().is_empty(), "no folder, no adapters");
    f.put("one", "adapter");
    f.put("two", "variants/dora");

    let before = f.registry.get("one").await.unwrap();
    assert_eq!((before.generation, before.resident, before.rank), (None, false, Some(4)));
    let one = f.registry.acquire("one").await.unwrap();
    assert_eq!((one.name.as_str(), one.generation), ("one", 1));
    assert!(Arc::ptr_eq(&one, &f.registry.acquire("one").await.unwrap()), "the same, not loaded again");

    let list = f.registry.list().await.unwrap();
    assert_eq!(list.iter().map(|i| i.name.as_str()).collect::<Vec<_>>(), ["one", "two"]);
    assert_eq!((list[0].generation, list[0].resident), (Some(1), true));
    assert_eq!((list[1].generation, list[1].resident), (None, false));
    assert!(list.iter().all(|i| i.error.is_none()), "{list:?}");

    let two = f.registry.acquire("two").await.unwrap();
    let (base, with_one, with_two) =
        (f.answer(None).await, f.answer(Some(one)).await, f.answer(Some(two)).await);
    assert!(base != with_one && base != with_two && with_one != with_two, "each changes the answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_load_an_adapter_once() {
    let f = Fixture::new();
    f.put("a", "adapter");
    let tasks: Vec<_> = (0..32)
        .map(|_| {
            let registry = f.registry.clone();
            tokio::spawn(async move { registry.acquire("a").await.unwrap() })
        })
        .collect();
    let mut handles = Vec::new();
    for task in tasks {
        handles.push(task.await.unwrap());
    }
    assert!(handles.iter().all(|h| Arc::ptr_eq(h, &handles[0])));
}

#[tokio::test]
async fn a_client_that_leaves_does_not_cut_the_loading_short() {
    let f = Fixture::new();
    f.put("a", "adapter");
    {
        let leaving = f.registry.acquire("a");
        let _ = tokio::time::timeout(Duration::ZERO, leaving).await;
    }
    let handle = f.registry.acquire("a").await.unwrap();
    assert_eq!(handle.generation, 1);
    assert!(Arc::ptr_eq(&handle, &f.registry.acquire("a").await.unwrap()));
}

#[tokio::test]
async fn a_change_on_disk_is_a_new_generation() {
    let f = Fixture::new();
    f.put("a", "adapter");
    let old = f.registry.acquire("a").await.unwrap();
    let old_answer = f.answer(Some(old.clone())).await;

    let running = f.start(Some(old.clone()), 100);
    f.put("a", "variants/rslora");
    let new = f.registry.acquire("a").await.unwrap();
    assert_eq!((old.generation, new.generation), (1, 2));
    assert!(Arc::ptr_eq(&new, &f.registry.acquire("a").await.unwrap()));
    assert_eq!(f.registry.get("a").await.unwrap().generation, Some(2));

    assert_eq!(tokens_of(running).await[..24], old_answer[..], "a running request keeps what it began with");
    assert_ne!(f.answer(Some(new.clone())).await, old_answer);

    // Written again with the same bytes: the time is another, so it counts as changed.
    let later = SystemTime::now() + Duration::from_secs(10);
    std::fs::File::options()
        .append(true)
        .open(f.path("a").join(CONFIG))
        .unwrap()
        .set_modified(later)
        .unwrap();
    assert_eq!(f.registry.acquire("a").await.unwrap().generation, 3);
}

#[tokio::test]
async fn a_broken_adapter_is_an_error_until_it_is_whole() {
    let f = Fixture::new();
    f.put("a", "adapter");
    let whole = std::fs::read(f.path("a").join(TENSORS)).unwrap();
    std::fs::write(f.path("a").join(TENSORS), &whole[..whole.len() / 2]).unwrap();
    assert!(reason(f.registry.acquire("a").await).contains("truncated or corrupt"));
    assert!(f.registry.get("a").await.unwrap().error.unwrap().contains("truncated or corrupt"));

    // The last value becomes NaN: names and shapes still fit, so only a full read finds it.
    let mut nan = whole.clone();
    let end = nan.len();
    nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(f.path("a").join(TENSORS), &nan).unwrap();
    assert_eq!(f.registry.get("a").await.unwrap().error, None);
    assert!(reason(f.registry.acquire("a").await).contains("NaN"));
    assert!(f.registry.list().await.unwrap()[0].error.as_ref().unwrap().contains("NaN"));

    std::fs::write(f.path("a").join(TENSORS), &whole).unwrap();
    let handle = f.registry.acquire("a").await.unwrap();
    assert_eq!(handle.generation, 1, "what never was has no generation");
    assert_eq!(f.registry.get("a").await.unwrap().error, None);

    // An update that is broken leaves those that run with the old one alone.
    let answer = f.answer(Some(handle.clone())).await;
    std::fs::write(f.path("a").join(CONFIG), "{").unwrap();
    assert!(reason(f.registry.acquire("a").await).contains("not a JSON object"));
    assert_eq!(f.answer(Some(handle)).await, answer);
}

#[tokio::test]
async fn adapters_for_another_model_are_refused() {
    let f = Fixture::new();
    let bloom = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/bloom/adapter");
    std::fs::create_dir_all(f.path("bloom")).unwrap();
    for file in [CONFIG, TENSORS] {
        std::fs::copy(bloom.join(file), f.path("bloom").join(file)).unwrap();
    }
    let reason = reason(f.registry.acquire("bloom").await);
    assert!(
        reason.contains("does not have") && reason.contains("q_proj") && reason.contains("bloom"),
        "{reason}"
    );
}

#[tokio::test]
async fn names_never_become_paths() {
    let f = Fixture::new();
    f.put("a", "adapter");
    std::fs::create_dir(f.root.path().join("outside")).unwrap();
    for file in [CONFIG, TENSORS] {
        std::fs::copy(f.path("a").join(file), f.root.path().join("outside").join(file)).unwrap();
    }
    for name in
        ["../outside", "a/../../outside", "..", ".", "", "a/", "/etc", "a\0", "A", "\u{430}", "a\u{2215}b"]
    {
        for error in [
            f.registry.acquire(name).await.unwrap_err(),
            f.registry.get(name).await.unwrap_err(),
            f.registry.delete(name).await.unwrap_err(),
        ] {
            assert!(matches!(error, AdapterError::InvalidName { .. }), "{name:?}: {error}");
        }
    }
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(f.root.path().join("outside"), f.path("link")).unwrap();
        assert!(reason(f.registry.acquire("link").await).contains("leaves the adapters folder"));
    }
    assert!(f.root.path().join("outside").join(TENSORS).exists());
    assert!(matches!(f.registry.acquire("nobody").await, Err(AdapterError::NotFound { .. })));
    assert!(matches!(f.registry.get("nobody").await, Err(AdapterError::NotFound { .. })));
    assert!(matches!(f.registry.delete("nobody").await, Err(AdapterError::NotFound { .. })));
}

#[tokio::test]
async fn deletion_lets_running_requests_end() {
    let f = Fixture::new();
    f.put("a", "adapter");
    let handle = f.registry.acquire("a").await.unwrap();
    let expected = f.answer(Some(handle.clone())).await;
    let running = f.start(Some(handle), 24);

    f.registry.delete("a").await.unwrap();
    assert!(!f.path("a").exists());
    assert_eq!(
        std::fs::read_dir(f.root.path().join("adapters")).unwrap().count(),
        0,
        "nothing is left behind"
    );
    assert!(matches!(f.registry.acquire("a").await, Err(AdapterError::NotFound { .. })));
    assert!(f.registry.list().await.unwrap().is_empty());
    assert_eq!(tokens_of(running).await, expected);

    f.put("a", "adapter");
    let again = f.registry.acquire("a").await.unwrap();
    assert_eq!(again.generation, 2, "the same name, but not the same adapter as far as anyone may assume");
    assert_eq!(f.answer(Some(again)).await, expected);
}

#[tokio::test]
async fn a_folder_removed_by_hand_is_forgotten() {
    let f = Fixture::new();
    f.put("a", "adapter");
    drop(f.registry.acquire("a").await.unwrap());
    std::fs::remove_dir_all(f.path("a")).unwrap();
    assert!(matches!(f.registry.acquire("a").await, Err(AdapterError::NotFound { .. })));
    f.put("a", "adapter");
    assert_eq!(f.registry.acquire("a").await.unwrap().generation, 2);
}

#[tokio::test]
async fn the_budget_evicts_what_nobody_uses() {
    let one = std::fs::metadata(llama().join("adapter").join(TENSORS)).unwrap().len();
    let f = Fixture::over(engine_with(one * 3 / 2));
    f.put("a", "adapter");
    f.put("b", "adapter");

    let a = f.registry.acquire("a").await.unwrap();
    let refused = f.registry.acquire("b").await;
    assert!(matches!(refused, Err(AdapterError::Engine(EngineError::AdapterMemory { .. }))), "{refused:?}");
    let expected = f.answer(Some(a.clone())).await;

    drop(a);
    let b = f.registry.acquire("b").await.unwrap();
    assert_eq!(b.generation, 1, "a load that failed was no generation");
    assert!(!f.registry.get("a").await.unwrap().resident);
    assert!(f.registry.get("b").await.unwrap().resident);

    drop(b);
    let a = f.registry.acquire("a").await.unwrap();
    assert_eq!(a.generation, 1, "evicted and loaded again is the same generation");
    assert_eq!(f.answer(Some(a)).await, expected);
    f.engine.shutdown();
}

#[cfg(unix)]
#[tokio::test]
async fn a_folder_that_cannot_be_written_keeps_its_adapters() {
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;
    let f = Fixture::new();
    f.put("a", "adapter");
    let folder = f.root.path().join("adapters");
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o555)).unwrap();
    // The superuser may write anyway; then there is nothing to see here.
    if std::fs::write(folder.join("probe"), "").is_ok() {
        std::fs::remove_file(folder.join("probe")).unwrap();
        let _ = writeln!(std::io::stderr(), "skipped: permissions do not hold this user back");
    } else {
        assert!(matches!(f.registry.delete("a").await, Err(AdapterError::Io { .. })));
        assert_eq!(f.registry.acquire("a").await.unwrap().generation, 1);
    }
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
}

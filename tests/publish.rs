//! Publishing a trained adapter through the registry: the generation that it gets, what requests find before and
//! after, a restart, files that were changed by hand, and many who ask, publish and delete at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use gurukul::adapters::{AdapterError, Published, Registry, TrainedAdapter};
use gurukul::engine::training::LoraSpec;
use gurukul::engine::{EngineConfig, EngineError, EngineHandle, LoadAdapter};
use gurukul::model::load::{DeviceChoice, DtypeChoice};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::quant::Quantization;

const TENSORS: &str = "adapter_model.safetensors";

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama")
}

struct Fixture {
    root: tempfile::TempDir,
    registry: Registry,
    engine: EngineHandle,
}

impl Fixture {
    fn new() -> Self {
        let config = EngineConfig {
            model_dir: llama(),
            device: DeviceChoice::Cpu,
            dtype: DtypeChoice::F32,
            quantize: Quantization::None,
            kv_cache_bytes: Some(16 << 20),
            max_batch: 4,
            max_queue: 64,
            prefill_chunk: 16,
            adapter_cache_bytes: 1 << 28,
            train_share: 0.5,
        };
        let engine = EngineHandle::start(config, Arc::new(Tokenizer::from_dir(&llama()).unwrap())).unwrap();
        let root = tempfile::tempdir().unwrap();
        let registry = Registry::new(root.path().join("adapters"), engine.clone());
        Self { root, registry, engine }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("adapters").join(name)
    }

    /// As after a restart of the process.
    fn restarted(&self) -> Registry {
        Registry::new(self.root.path().join("adapters"), self.engine.clone())
    }

    /// The fixture's adapter as a training would have made it.
    fn trained(&self) -> TrainedAdapter {
        let info = self.engine.info();
        let weights = gurukul::adapters::read(&llama(), "adapter", &info.sites).unwrap();
        let scale = weights.sites[0].scale;
        let lora = LoraSpec {
            rank: 4,
            alpha: scale * 4.0,
            dropout: 0.0,
            rslora: false,
            sites: weights.sites.iter().map(|s| s.site).collect(),
            seed: 0,
        };
        TrainedAdapter { lora, weights, base_model: "base".into(), family: "llama".into() }
    }

    /// Publishes it; the engine takes it as a trainer would give it.
    async fn publish(&self, registry: &Registry, name: &str) -> Result<Published, AdapterError> {
        let (adapter, engine, owned) = (self.trained(), self.engine.clone(), name.to_owned());
        let weights = adapter.weights.clone();
        let serve = move |generation| async move {
            engine.load_adapter(LoadAdapter { name: owned, generation, weights }).await
        };
        registry.publish(name, adapter, "job-1", serde_json::json!({"loss": 0.5}), serve).await
    }
}

#[tokio::test]
async fn a_published_adapter_is_served_without_its_files_being_read() {
    let f = Fixture::new();
    let published = f.publish(&f.registry, "a").await.unwrap();
    assert_eq!((published.generation, published.path.as_path()), (1, f.path("a").as_path()));
    assert!(published.not_resident.is_none());
    let info = f.registry.get("a").await.unwrap();
    assert_eq!((info.generation, info.resident, info.error), (Some(1), true, None));
    assert_eq!(
        (info.training_job.as_deref(), info.metrics.unwrap()["loss"].as_f64()),
        (Some("job-1"), Some(0.5))
    );

    let first = f.registry.acquire("a").await.unwrap();
    assert_eq!(first.generation, 1);
    // Whoever runs with the first keeps it.
    assert_eq!(f.publish(&f.registry, "a").await.unwrap().generation, 2);
    let second = f.registry.acquire("a").await.unwrap();
    assert_eq!((first.generation, second.generation), (1, 2));
    let left: Vec<_> = std::fs::read_dir(f.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["a"], "nothing hidden is left over");
}

#[tokio::test]
async fn generations_go_on_over_restarts_and_changes_by_hand() {
    let f = Fixture::new();
    for generation in 1..=3 {
        assert_eq!(f.publish(&f.registry, "a").await.unwrap().generation, generation);
    }
    let again = f.restarted();
    assert_eq!(again.get("a").await.unwrap().generation, Some(3), "known before it is used");
    assert_eq!(again.acquire("a").await.unwrap().generation, 3);
    assert_eq!(f.publish(&again, "a").await.unwrap().generation, 4);
    // Published, and never used before the next one.
    let again = f.restarted();
    assert_eq!(f.publish(&again, "a").await.unwrap().generation, 5);

    // Somebody writes other weights into the folder while nobody runs.
    let file = std::fs::File::options().append(true).open(f.path("a").join(TENSORS)).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
    let again = f.restarted();
    assert_eq!(again.get("a").await.unwrap().generation, None, "not known before it is used");
    assert_eq!(again.acquire("a").await.unwrap().generation, 6);
    assert_eq!(f.publish(&again, "a").await.unwrap().generation, 7);

    // Notes that make no sense are nobody's generation, and no reason to refuse the weights.
    for notes in
        ["{", r#"{"generation": 18446744073709551615}"#, r#"{"generation": -1}"#, r#"{"generation": 0}"#]
    {
        std::fs::write(f.path("a").join("gurukul.json"), notes).unwrap();
        assert_eq!(f.restarted().acquire("a").await.unwrap().generation, 1, "{notes}");
    }
    // A broken adapter under the name is no hindrance.
    std::fs::write(f.path("a").join("adapter_config.json"), "{").unwrap();
    let again = f.restarted();
    assert!(again.acquire("a").await.is_err());
    f.publish(&again, "a").await.unwrap();
    assert!(again.acquire("a").await.is_ok());
}

#[tokio::test]
async fn another_process_that_publishes_is_noticed() {
    let (f, other) = (Fixture::new(), Fixture::new());
    f.publish(&f.registry, "a").await.unwrap();
    assert_eq!(f.registry.acquire("a").await.unwrap().generation, 1);
    let beside = Registry::new(f.root.path().join("adapters"), other.engine.clone());
    assert_eq!(other.publish(&beside, "a").await.unwrap().generation, 2);
    assert_eq!(f.registry.acquire("a").await.unwrap().generation, 2);
}

#[tokio::test]
async fn an_engine_without_room_leaves_the_files_and_nothing_old() {
    let f = Fixture::new();
    f.publish(&f.registry, "a").await.unwrap();
    let full = EngineError::AdapterMemory { needed_bytes: 2, budget_bytes: 1, pinned_bytes: 1 };
    let refused = move |_| async move { Err(full) };
    let published =
        f.registry.publish("a", f.trained(), "job-2", serde_json::Value::Null, refused).await.unwrap();
    assert!(matches!(published.not_resident, Some(EngineError::AdapterMemory { .. })));
    assert_eq!(published.generation, 2);
    assert!(!f.registry.get("a").await.unwrap().resident);
    let handle = f.registry.acquire("a").await.unwrap();
    assert_eq!(handle.generation, 2, "its files, as that generation");
}

#[tokio::test]
async fn what_cannot_be_written_leaves_what_was_there() {
    let f = Fixture::new();
    f.publish(&f.registry, "a").await.unwrap();
    let before = std::fs::read(f.path("a").join(TENSORS)).unwrap();
    let mut wrong = f.trained();
    wrong.weights.sites[0].scale += 1.0;
    let never = |_| async { panic!("nothing was written that could be served") };
    let error = f.registry.publish("a", wrong, "job", serde_json::Value::Null, never).await.unwrap_err();
    assert!(matches!(error, AdapterError::Io { .. }), "{error}");
    assert_eq!(std::fs::read(f.path("a").join(TENSORS)).unwrap(), before);
    assert_eq!(f.registry.acquire("a").await.unwrap().generation, 1);
    let error = f.publish(&f.registry, "../up").await.unwrap_err();
    assert!(matches!(error, AdapterError::InvalidName { .. }));
    assert_eq!(std::fs::read_dir(f.path("")).unwrap().count(), 1);
}

/// Nobody who asks for a name that is only ever replaced finds it gone or in part.
#[tokio::test(flavor = "multi_thread")]
async fn readers_find_an_adapter_while_it_is_replaced() {
    let f = Arc::new(Fixture::new());
    f.publish(&f.registry, "a").await.unwrap();
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers: Vec<_> = (0..3)
        .map(|reader| {
            let (f, done) = (f.clone(), done.clone());
            tokio::spawn(async move {
                let mut last = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let generation = match reader {
                        0 => f.registry.acquire("a").await.unwrap().generation,
                        1 => {
                            let info = f.registry.get("a").await.unwrap();
                            assert_eq!(info.error, None);
                            info.generation.unwrap()
                        }
                        _ => {
                            let list = f.registry.list().await.unwrap();
                            assert_eq!(list.iter().filter(|i| i.name == "a" && i.error.is_none()).count(), 1);
                            last
                        }
                    };
                    assert!(generation >= last, "{generation} after {last}");
                    last = generation;
                }
            })
        })
        .collect();
    for generation in 2..=30 {
        assert_eq!(f.publish(&f.registry, "a").await.unwrap().generation, generation);
    }
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    for reader in readers {
        reader.await.unwrap();
    }

    // Deletions in between: an answer or "not found", never anything else, and generations still grow.
    let deleting = {
        let f = f.clone();
        tokio::spawn(async move {
            for _ in 0..20 {
                let deleted = f.registry.delete("a").await;
                assert!(matches!(deleted, Ok(()) | Err(AdapterError::NotFound { .. })), "{deleted:?}");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
    };
    let mut last = 30;
    for _ in 0..20 {
        let generation = f.publish(&f.registry, "a").await.unwrap().generation;
        assert!(generation > last);
        last = generation;
        match f.registry.acquire("a").await {
            Ok(handle) => assert_eq!(handle.generation, last),
            Err(error) => assert!(matches!(error, AdapterError::NotFound { .. }), "{error}"),
        }
    }
    deleting.await.unwrap();
}

//! Real training over HTTP, by the whole application: a request, its events, the adapter that serves; what is planned
//! and refused; crashes of the process in the middle.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::FutureExt as _;
use gurukul::app::App;
use gurukul::config::{ServerFlags, Settings};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::support::fixture;

const SOON: Duration = Duration::from_secs(120);
/// The fixture's folder names the model.
const MODEL: &str = "llama";

/// A data folder with a source of `examples` short pairs, and the configs that name it.
fn folder(examples: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder can be made");
    let configs = dir.path().join("configs");
    std::fs::create_dir(&configs).expect("a folder can be made");
    let data = dir.path().join("phrases.jsonl");
    let line = |i: usize| {
        json!({"prompt": format!("say {i}"), "completion": format!("number {i}")}).to_string() + "\n"
    };
    std::fs::write(&data, (0..examples).map(line).collect::<String>()).expect("can be written");
    let sources = format!(
        "sources:\n  phrases:\n    type: local\n    path: {}\n  gone:\n    type: local\n    path: {}\n",
        data.display(),
        dir.path().join("gone.jsonl").display(),
    );
    std::fs::write(configs.join("mcp_connectors.yml"), sources).expect("can be written");
    let settings = "r: 4\nlora_alpha: 8\nbatch_size: 4\ngradient_accumulation_steps: 1\nlearning_rate: 0.01\n\
                    max_seq_length: 64\nsave_steps: 5\nlogging_steps: 1\neval_share: 0.0\nwarmup_ratio: 0.0\n";
    std::fs::write(configs.join("adapter_config.yaml"), settings).expect("can be written");
    dir
}

/// The application in this process.
struct Running {
    base: String,
    client: reqwest::Client,
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
    engine: gurukul::engine::EngineHandle,
}

impl Running {
    async fn start(dir: &Path) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut flags = ServerFlags { configs: Some(dir.join("configs")), ..ServerFlags::default() };
        flags.typed.data_dir = Some(dir.to_owned());
        flags.typed.model = Some(fixture("llama").to_str().expect("is UTF-8").to_owned());
        flags.typed.port = Some(0);
        flags.typed.device = Some("cpu".into());
        flags.typed.dtype = Some("f32".into());
        flags.typed.kv_cache = Some("64MiB".parse().expect("is a size"));
        let settings = Settings::resolve(&flags).expect("the settings are good");
        let app = App::build(&settings).await.expect("the application starts");
        let (base, engine) = (format!("http://{}", app.address()), app.engine());
        let (stop, stopped) = oneshot::channel();
        // Never asked twice.
        let task = tokio::spawn(app.run(stopped.map(|_| std::future::pending::<()>())));
        Self { base, client: reqwest::Client::new(), stop: Some(stop), task, engine }
    }

    /// Ends it as a signal does.
    async fn stop(mut self) {
        drop(self.stop.take());
        let ended = tokio::time::timeout(SOON, &mut self.task).await.expect("the application ends");
        ended.expect("does not panic").expect("ends well");
        let engine = self.engine.clone();
        tokio::task::spawn_blocking(move || engine.shutdown()).await.expect("the engine ends");
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let response =
            self.client.get(format!("{}{path}", self.base)).send().await.expect("the server answers");
        (response.status().as_u16(), response.json().await.expect("is JSON"))
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let request = self.client.post(format!("{}{path}", self.base)).json(body);
        let response = request.send().await.expect("the server answers");
        (response.status().as_u16(), response.json().await.expect("is JSON"))
    }

    async fn reach(&self, id: &str, status: &str) -> Value {
        let wait = async {
            loop {
                let (_, body) = self.get(&format!("/adapter/status/{id}")).await;
                if body["status"] == status {
                    return body;
                }
                let ended = ["completed", "failed", "cancelled"].iter().any(|end| body["status"] == *end);
                assert!(!ended, "{body}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(SOON, wait).await.unwrap_or_else(|_| panic!("{id} does not become {status}"))
    }

    async fn step(&self, id: &str, step: u64) {
        let wait = async {
            while self.get(&format!("/adapter/status/{id}")).await.1["metrics"]["step"].as_u64() < Some(step)
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(SOON, wait).await.expect("the job goes on");
    }

    /// Names and ids of all events of an ended job.
    async fn events(&self, id: &str) -> Vec<(String, Option<u64>)> {
        let request = self.client.get(format!("{}/adapter/events/{id}", self.base));
        let text = request.send().await.expect("answers").text().await.expect("is text");
        let frames = text.split("\n\n").filter(|frame| frame.contains("event:"));
        let of = |frame: &str, name: &str| {
            frame.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
        };
        frames
            .map(|frame| {
                (of(frame, "event:").unwrap_or_default(), of(frame, "id:").and_then(|id| id.parse().ok()))
            })
            .collect()
    }

    async fn generate(&self, adapter: &str) -> Value {
        let ask = json!({"prompt": "say 3", "adapter": adapter, "max_new_tokens": 12, "do_sample": false});
        let (status, body) = self.post("/generate-lite", &ask).await;
        assert_eq!(status, 200, "{body}");
        body
    }
}

fn adapter_file(dir: &Path, name: &str) -> PathBuf {
    dir.join("adapters").join(name).join("adapter_model.safetensors")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_becomes_an_adapter_that_serves() {
    let dir = folder(40);
    let server = Running::start(dir.path()).await;
    let base = server.generate("none").await;
    let ask =
        json!({"source": "phrases", "adapter_name": "counts", "max_samples": 40, "overrides": {"epochs": 4}});
    let (status, accepted) = server.post("/adapter/train-lite", &ask).await;
    assert_eq!(
        (status, &accepted["status"], &accepted["adapter_name"]),
        (202, &json!("pending"), &json!("counts"))
    );
    assert!(accepted["plan"]["training_bytes"].as_u64() > Some(0), "{accepted}");
    let id = accepted["job_id"].as_str().expect("has an id");
    let done = server.reach(id, "completed").await;
    assert_eq!((&done["progress"], &done["metrics"]["step"]), (&json!(1.0), &json!(40)));
    let events = server.events(id).await;
    let steps: Vec<u64> = events.iter().filter_map(|(_, id)| *id).collect();
    assert_eq!(steps, (1..=40).collect::<Vec<_>>());
    assert_eq!(events.last().expect("has an end").0, "complete");
    let (_, log) = server.get(&format!("/adapter/logs/{id}")).await;
    assert!(log["total"].as_u64() >= Some(1), "{log}");

    let answer = server.generate("counts").await;
    assert_eq!(answer["adapter_generation"], done["adapter_generation"]);
    assert_ne!(answer["raw_text"], base["raw_text"], "it has learned something");
    let (_, adapter) = server.get("/adapter/counts").await;
    assert_eq!((&adapter["training_job"], &adapter["rank"]), (&json!(id), &json!(4)));
    let chat = json!({"model": "counts", "prompt": "say 3", "max_tokens": 4, "temperature": 0});
    assert_eq!(server.post("/v1/completions", &chat).await.0, 200);
    assert_eq!(server.generate("none").await["raw_text"], base["raw_text"], "the base is as it was");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_and_a_start_in_the_middle_change_no_bit() {
    let ask =
        json!({"source": "phrases", "adapter_name": "a", "max_samples": 40, "overrides": {"epochs": 6}});
    let alone = folder(40);
    let server = Running::start(alone.path()).await;
    let (_, accepted) = server.post("/adapter/train-lite", &ask).await;
    server.reach(accepted["job_id"].as_str().expect("has an id"), "completed").await;
    server.stop().await;

    let dir = folder(40);
    let server = Running::start(dir.path()).await;
    let (_, accepted) = server.post("/adapter/train-lite", &ask).await;
    let id = accepted["job_id"].as_str().expect("has an id");
    server.step(id, 7).await;
    server.stop().await;
    assert!(!adapter_file(dir.path(), "a").exists(), "it was in the middle");
    let server = Running::start(dir.path()).await;
    server.reach(id, "completed").await;
    let steps: Vec<u64> = server.events(id).await.iter().filter_map(|(_, id)| *id).collect();
    assert_eq!(steps, (1..=60).collect::<Vec<_>>());
    server.stop().await;
    let read = |dir: &Path| std::fs::read(adapter_file(dir, "a")).expect("the adapter is there");
    assert!(read(dir.path()) == read(alone.path()), "the adapters differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_jobs_leave_a_checkpoint_and_go_on() {
    let dir = folder(40);
    let server = Running::start(dir.path()).await;
    let ask =
        json!({"source": "phrases", "adapter_name": "a", "max_samples": 40, "overrides": {"epochs": 50}});
    let (_, accepted) = server.post("/adapter/train-lite", &ask).await;
    let id = accepted["job_id"].as_str().expect("has an id");
    let (status, taken) = server.post("/adapter/train-lite", &ask).await;
    assert_eq!((status, &taken["error"]["code"]), (409, &json!("adapter_name_in_use")));
    assert!(taken["error"]["message"].as_str().is_some_and(|message| message.contains(id)), "{taken}");
    server.step(id, 3).await;
    assert_eq!(server.post(&format!("/adapter/cancel/{id}"), &json!({})).await.0, 200);
    let cancelled = server.reach(id, "cancelled").await;
    assert!(cancelled["checkpoint_step"].as_u64() >= Some(3), "{cancelled}");
    assert!(dir.path().join("jobs").join(id).is_dir());
    assert!(!adapter_file(dir.path(), "a").exists());
    let (status, resumed) = server.post("/adapter/train-lite", &json!({"resume_from": id})).await;
    assert_eq!((status, &resumed["job_id"]), (202, &json!(id)));
    server.step(id, cancelled["checkpoint_step"].as_u64().expect("is a step") + 1).await;
    server.post(&format!("/adapter/cancel/{id}"), &json!({})).await;
    server.reach(id, "cancelled").await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_trained_is_refused_or_fails_with_the_reason() {
    let dir = folder(8);
    let server = Running::start(dir.path()).await;
    let ask = |overrides: Value| json!({"source": "phrases", "adapter_name": "a", "overrides": overrides});
    let (status, body) =
        server.post("/adapter/train-lite", &ask(json!({"target_modules": ["nowhere_proj"]}))).await;
    let message = body["error"]["message"].as_str().unwrap_or_default();
    assert!(status == 400 && message.contains("nowhere_proj") && message.contains("q_proj"), "{body}");
    // Diverges.
    let (status, body) =
        server.post("/adapter/train-lite", &ask(json!({"learning_rate": 1e9, "epochs": 50}))).await;
    if status == 202 {
        let failed = server.reach(body["job_id"].as_str().expect("has an id"), "failed").await;
        assert!(failed["error"].as_str().is_some_and(|error| error.contains("finite")), "{failed}");
    } else {
        assert_eq!(status, 400, "{body}");
    }
    // A source that is not there is known when it is opened at the latest.
    let (status, body) = server.post("/adapter/train-lite", &json!({"source": "gone"})).await;
    if status == 202 {
        let failed = server.reach(body["job_id"].as_str().expect("has an id"), "failed").await;
        assert!(failed["error"].as_str().is_some_and(|error| error.contains("gone")), "{failed}");
    } else {
        assert!((400..500).contains(&status), "{status} {body}");
    }
    server.generate("none").await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_becomes_a_model() {
    let dir = folder(1);
    let server = Running::start(dir.path()).await;
    let line = |i: usize| {
        let pair = [
            json!({"role": "user", "content": format!("say {i}")}),
            json!({"role": "assistant", "content": "no"}),
        ];
        json!({"messages": pair}).to_string() + "\n"
    };
    let content: String = (0..12).map(line).collect();
    let body = format!(
        "--x\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--x\r\ncontent-disposition: \
         form-data; name=\"file\"; filename=\"a.jsonl\"\r\n\r\n{content}\r\n--x--\r\n"
    );
    let request = server.client.post(format!("{}/v1/files", server.base)).body(body);
    let response =
        request.header("content-type", "multipart/form-data; boundary=x").send().await.expect("answers");
    let file: Value = response.json().await.expect("is JSON");
    let ask = json!({
        "model": MODEL, "training_file": file["id"], "suffix": "No!", "seed": 5, "metadata": {"by": "test"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 3}}},
    });
    let (status, job) = server.post("/v1/fine_tuning/jobs", &ask).await;
    assert_eq!(
        (status, &job["status"], &job["metadata"]),
        (200, &json!("queued"), &json!({"by": "test"})),
        "{job}"
    );
    assert_eq!((&job["training_file"], &job["seed"]), (&file["id"], &json!(5)));
    let id = job["id"].as_str().expect("has an id").to_owned();
    let done = server.reach(id.trim_start_matches("ftjob-"), "completed").await;
    assert_eq!(done["metrics"]["samples"], 24);
    let (_, job) = server.get(&format!("/v1/fine_tuning/jobs/{id}")).await;
    let model = job["fine_tuned_model"].as_str().expect("has a model");
    assert!(model.starts_with("no-"), "{model}");
    let chat = json!({"model": model, "messages": [{"role": "user", "content": "say 3"}], "max_tokens": 4});
    assert_eq!(server.post("/v1/chat/completions", &chat).await.0, 200);
    server.stop().await;
}

/// OpenAI's own client, as in `openai_client.rs`.
#[tokio::test(flavor = "multi_thread")]
async fn the_official_client_trains() {
    let Some(python) = std::env::var_os("GURUKUL_TEST_PYTHON") else { return };
    let dir = folder(1);
    let server = Running::start(dir.path()).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai_training.py");
    let mut command = std::process::Command::new(python);
    command.arg(script).args([&format!("{}/v1", server.base), MODEL]);
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.expect("does not panic").expect("the interpreter starts");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("all checks passed"), "{text}");
    server.stop().await;
}

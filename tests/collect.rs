//! Collecting as a whole: a job that stops and goes on, the program's sub-commands over the demo model, a job that
//! survives `kill -9`, a disk that is full.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gurukul::adapters::Registry;
use gurukul::config::rl::{PromptConfig, RlConfig};
use gurukul::engine::{EngineConfig, EngineHandle};
use gurukul::model::load::{DeviceChoice, DtypeChoice};
use gurukul::model::tokenizer::Tokenizer;
use gurukul::nn::quant::Quantization;
use gurukul::rl::collect::{Begin, Ending};
use gurukul::rl::log::episodes;
use gurukul::rl::{CollectJob, Collector, Episode, EpisodeLog, Wanted};
use gurukul::train::Stop;
use serde_json::{Value, json};
use tokio::sync::watch;

/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(120);

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama")
}

fn log(data: &Path, run: &str) -> Vec<Episode> {
    let all = episodes(&data.join("rl_runs"), run).unwrap();
    all.collect::<Result<_, _>>().unwrap()
}

fn collector(data: &Path) -> (EngineHandle, Collector) {
    let tokenizer = Arc::new(Tokenizer::from_dir(&llama()).unwrap());
    let config = EngineConfig {
        model_dir: llama(),
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::F32,
        quantize: Quantization::None,
        kv_cache_bytes: Some(16 << 20),
        max_batch: 4,
        max_queue: 4,
        prefill_chunk: 64,
        adapter_cache_bytes: 1 << 28,
        train_share: 0.5,
    };
    let engine = EngineHandle::start(config, tokenizer.clone()).unwrap();
    let adapters = Arc::new(Registry::new(data.join("adapters"), engine.clone()));
    let log = EpisodeLog::open(&data.join("rl_runs"), 1 << 20).unwrap();
    let collector =
        Collector::new(engine.clone(), tokenizer, adapters, "llama".into(), Arc::default(), log).unwrap();
    (engine, collector)
}

fn job(run_id: &str) -> CollectJob {
    let wanted = Wanted {
        prompts: Some(vec![PromptConfig::new("say 3".into()), PromptConfig::new("two".into())]),
        episodes: Some(40),
        run_id: Some(run_id.into()),
        max_new_tokens: Some(5),
        seed: Some(3),
        ..Wanted::default()
    };
    CollectJob::resolve(wanted, &RlConfig::default()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_goes_on_logs_every_episode_once_and_as_if_it_had_not_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, collector) = collector(dir.path());
    let (_never, going) = watch::channel(Stop::No);
    let ending =
        collector.run("whole", &job("whole"), Begin::Anew, &mut |_, _| {}, going.clone()).await.unwrap();
    assert_eq!(ending, Ending::Completed);
    let (stop, stopping) = watch::channel(Stop::No);
    let mut pause = |done, _: &[Episode]| {
        if done >= 16 {
            stop.send_replace(Stop::Pause);
        }
    };
    let ending = collector.run("cut", &job("cut"), Begin::Continue, &mut pause, stopping).await.unwrap();
    assert_eq!(ending, Ending::Paused);
    // What a kill in the middle of a group leaves: some of its episodes, and half a line.
    let path = dir.path().join("rl_runs/cut.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let kept: Vec<&str> = text.lines().take(11).collect();
    std::fs::write(&path, format!("{}\n{}", kept.join("\n"), &text[..40])).unwrap();
    // As the next process finds it.
    drop(collector);
    engine.shutdown();
    let (engine, collector) = crate::collector(dir.path());
    let mut seen = Vec::new();
    let mut count = |done, group: &[Episode]| seen.push((done, group.len()));
    let ending = collector.run("cut", &job("cut"), Begin::Continue, &mut count, going).await.unwrap();
    assert_eq!(ending, Ending::Completed);
    assert_eq!(seen.last().map(|(done, _)| *done), Some(40));
    assert_eq!(seen.iter().map(|(_, new)| new).sum::<usize>(), 29);
    let outputs = |run: &str| -> BTreeMap<u64, (String, Option<f64>)> {
        let number = |e: &Episode| e.episode_id.rsplit('-').next().unwrap().parse().unwrap();
        let all = log(dir.path(), run);
        assert_eq!(all.len(), 40, "{run}");
        all.iter().map(|e| (number(e), (e.output.clone(), e.reward))).collect()
    };
    assert_eq!(outputs("cut"), outputs("whole"));
    let indexes: Vec<u64> = log(dir.path(), "cut").iter().map(|e| e.episode_index).collect();
    assert_eq!(indexes, (0..40).collect::<Vec<_>>());
    drop(collector);
    engine.shutdown();
}

/// The program in a folder, with nothing of this process's environment that it would read.
fn gurukul(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
    clean(&mut command, folder);
    command
}

fn clean(command: &mut Command, folder: &Path) {
    command.current_dir(folder).stdin(Stdio::null());
    for (name, _) in std::env::vars() {
        if name.starts_with("GURUKUL_") || name.starts_with("HF_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
}

fn done(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_program_collects_shows_and_exports() {
    let dir = tempfile::tempdir().unwrap();
    let collect = |run: &str| {
        let arguments = ["collect", "--episodes", "20", "--seed", "5", "--run-id", run, "--out", "out.jsonl"];
        done(gurukul(dir.path()).args(arguments).output().unwrap())
    };
    let table = collect("first");
    for part in
        ["run first: 20 episodes", "language", "reward", "quality", "chrf", "\nhi ", "\nml ", "\nall "]
    {
        assert!(table.contains(part), "{part} is missing in {table}");
    }
    let first = std::fs::read_to_string(dir.path().join("out.jsonl")).unwrap();
    let mut sorted: Vec<&str> = first.lines().collect();
    sorted.sort_unstable();
    let logged = std::fs::read_to_string(dir.path().join("rl_runs/first.jsonl")).unwrap();
    let mut in_log: Vec<&str> = logged.lines().collect();
    in_log.sort_unstable();
    assert_eq!(sorted, in_log);
    collect("second");
    let outputs = |run: &str| -> BTreeSet<(String, String)> {
        log(dir.path(), run).into_iter().map(|e| (e.prompt, e.output)).collect()
    };
    assert_eq!(outputs("first"), outputs("second"), "the same seed gives the same answers");
    let mean = log(dir.path(), "first").iter().filter_map(|e| e.reward).sum::<f64>() / 20.0;
    assert!(mean > 0.6, "the demo model translates short sentences; mean reward {mean}");
    let stats = done(gurukul(dir.path()).args(["episodes", "stats"]).output().unwrap());
    for part in ["first", "second", "40", "0.9 - 1.0", "█"] {
        assert!(stats.contains(part), "{part} is missing in {stats}");
    }
    let arguments = [
        "episodes",
        "export",
        "--run-id",
        "first",
        "--language",
        "Hindi",
        "--format",
        "pairs",
        "--out",
        "pairs.jsonl",
    ];
    done(gurukul(dir.path()).args(arguments).output().unwrap());
    let pairs = std::fs::read_to_string(dir.path().join("pairs.jsonl")).unwrap();
    assert_eq!(pairs.lines().count(), 2);
    let pair: Value = serde_json::from_str(pairs.lines().next().unwrap()).unwrap();
    assert!(pair["prompt"].is_string() && pair["completion"].is_string(), "{pair}");
    let refused = gurukul(dir.path()).args(["collect", "--upload", "--episodes", "1"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--upload"));
}

/// A running server; killed when dropped, as `kill -9` does.
struct Program {
    child: Child,
    base: String,
}

impl Program {
    fn start(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
        let base =
            lines.find_map(|line| Some(line.split_once("answers on ")?.1.split(' ').next()?.to_owned()));
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, base: base.expect("the server says where it answers") }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(folder: &Path) -> Command {
    let mut command = gurukul(folder);
    command.args(["serve", "--port", "0", "--kv-cache", "16MiB", "--model"]).arg(llama());
    command
}

async fn reach(base: &str, id: &str, enough: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = reqwest::get(format!("{base}/adapter/status/{id}")).await.unwrap();
        let job: Value = answer.json().await.unwrap();
        if enough(&job) {
            return job;
        }
        assert!(Instant::now() < deadline, "{job}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::new()
}

#[tokio::test]
async fn a_job_survives_a_kill_and_its_episodes_are_uploaded_once() {
    let dir = tempfile::tempdir().unwrap();
    let nas = dir.path().join("nas");
    std::fs::create_dir_all(dir.path().join("configs")).unwrap();
    std::fs::create_dir(&nas).unwrap();
    let sinks = format!(
        "sinks:\n  nas: {{type: folder, path: '{}', key: '{{run_id}}-{{sha256}}.jsonl'}}\n",
        nas.display()
    );
    std::fs::write(dir.path().join("configs/rl_config.yaml"), sinks).unwrap();
    let client = client();
    let program = Program::start(serve(dir.path()));
    let body = json!({"prompts": ["say 3", "two"], "episodes": 400, "max_new_tokens": 8, "run_id": "many", "upload": true});
    let answer = client.post(format!("{}/rl/collect", program.base)).json(&body).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 202);
    let accepted: Value = answer.json().await.unwrap();
    assert_eq!(accepted["upload"], "queued");
    let id = accepted["job_id"].as_str().unwrap().to_owned();
    let again = client.post(format!("{}/rl/collect", program.base)).json(&body).send().await.unwrap();
    assert_eq!(again.status().as_u16(), 409, "one job a run");
    let deadline = Instant::now() + LIMIT;
    while log(dir.path(), "many").len() < 40 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(program);
    let at_the_kill = log(dir.path(), "many").len();
    let program = Program::start(serve(dir.path()));
    let job = reach(&program.base, &id, |job| job["status"] == "completed").await;
    assert_eq!(job["metrics"]["step"], 400, "{job}");
    let all = log(dir.path(), "many");
    let ids: BTreeSet<&String> = all.iter().map(|e| &e.episode_id).collect();
    assert_eq!((all.len(), ids.len()), (400, 400));
    assert!(at_the_kill < 400, "the kill came too late to show anything");
    let logs = reqwest::get(format!("{}/adapter/logs/{id}", program.base)).await.unwrap();
    assert!(logs.text().await.unwrap().contains("collecting 400 episodes"));
    while std::fs::read_dir(&nas).unwrap().count() == 0 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let sent: Vec<PathBuf> = std::fs::read_dir(&nas).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(sent.len(), 1, "{sent:?}");
    let logged = std::fs::read_to_string(dir.path().join("rl_runs/many.jsonl")).unwrap();
    assert_eq!(std::fs::read_to_string(&sent[0]).unwrap(), logged);
}

#[tokio::test]
async fn a_job_is_cancelled_and_goes_on_when_it_is_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let client = client();
    let program = Program::start(serve(dir.path()));
    // Far more than is through before the cancellation comes.
    let body = json!({"prompts": ["say 3"], "episodes": 1500, "max_new_tokens": 16, "run_id": "r"});
    let answer = client.post(format!("{}/rl/collect", program.base)).json(&body).send().await.unwrap();
    let accepted: Value = answer.json().await.unwrap();
    let id = accepted["job_id"].as_str().unwrap().to_owned();
    reach(&program.base, &id, |job| job["metrics"]["step"].as_u64() >= Some(1)).await;
    client.post(format!("{}/adapter/cancel/{id}", program.base)).send().await.unwrap();
    let job = reach(&program.base, &id, |job| job["status"] == "cancelled").await;
    assert!(job["message"].as_str().unwrap().contains("of 1500 episodes"), "{job}");
    let before = log(dir.path(), "r").len();
    assert!(before < 1500);
    client.post(format!("{}/adapter/resume/{id}", program.base)).send().await.unwrap();
    reach(&program.base, &id, |job| job["status"] == "completed").await;
    let ids: BTreeSet<String> = log(dir.path(), "r").into_iter().map(|e| e.episode_id).collect();
    assert_eq!(ids.len(), 1500);
}

/// A limit of the shell stands for the end of a disk: the system refuses to let a file grow beyond it.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_disk_that_is_full_is_507_and_the_log_stays_readable() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    clean(&mut command, dir.path());
    // In blocks of 512 bytes. The signal that comes with the limit is not heard, so that the write fails instead.
    let script = r#"trap '' XFSZ; ulimit -f 2048; exec "$0" "$@""#;
    command.args([
        "-c",
        script,
        env!("CARGO_BIN_EXE_gurukul"),
        "serve",
        "--port",
        "0",
        "--kv-cache",
        "16MiB",
        "--model",
    ]);
    command.arg(llama());
    let program = Program::start(command);
    let client = client();
    let output = "x".repeat(200_000);
    let mut acknowledged = BTreeSet::new();
    let mut refused = 0;
    for n in 0..12 {
        let body = json!({"prompt": format!("p{n}"), "output": output, "reward": 0.5, "run_id": "r"});
        let answer = client.post(format!("{}/rl/collect", program.base)).json(&body).send().await.unwrap();
        let status = answer.status().as_u16();
        let answer: Value = answer.json().await.unwrap();
        match status {
            200 => {
                acknowledged.insert(answer["episode_id"].as_str().unwrap().to_owned());
            }
            507 => {
                refused += 1;
                assert_eq!(answer["error"]["code"], "storage_full");
                assert!(answer["error"]["message"].as_str().unwrap().contains("make room"), "{answer}");
            }
            other => panic!("{other}: {answer}"),
        }
    }
    assert!(refused > 0 && acknowledged.len() > 1, "{refused} refused, {} not", acknowledged.len());
    let in_log = || -> BTreeSet<String> { log(dir.path(), "r").into_iter().map(|e| e.episode_id).collect() };
    assert_eq!(in_log(), acknowledged);
    // Another run has room in its own file.
    let body = json!({"prompt": "p", "output": "o", "reward": 0.5, "run_id": "other"});
    let answer = client.post(format!("{}/rl/collect", program.base)).json(&body).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    // A small one still fits behind the others.
    let body = json!({"prompt": "p", "output": "o", "reward": 0.5, "run_id": "r"});
    let answer = client.post(format!("{}/rl/collect", program.base)).json(&body).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    assert_eq!(in_log().len(), acknowledged.len() + 1);
}

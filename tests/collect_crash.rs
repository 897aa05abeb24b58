//! The whole collecting side under `kill -9`: the real program, episodes from several clients over HTTP, uploads to an
//! S3 server of this process of whose answers a fifth fail. Whatever the moment of the kill, an episode that was
//! acknowledged is in the log once, and every upload that was promised arrives once.
//!
//! `GURUKUL_CRASH_EPISODES` and `GURUKUL_CRASH_KILLS` make it larger (10000 and 5 take some minutes),
//! `GURUKUL_CRASH_SEED` another.

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "support/flaky.rs"]
mod flaky;
#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "support/program.rs"]
mod program;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};
use tokio::sync::watch;

use self::flaky::{ACCESS_KEY, Flaky, SECRET_KEY};
use self::program::{Program, serve};

const BUCKET: &str = "episodes";
const CLIENTS: u64 = 8;
/// Of a thousand requests to the S3 server.
const FAILING: u32 = 200;
/// Every so many requests ask for answers of the model; the others bring theirs.
const GENERATED_EVERY: u64 = 50;
const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", SECRET_KEY)];
const SOON: Duration = Duration::from_secs(120);

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("is a number"))
}

async fn start(dir: &Path) -> Program {
    let mut command = serve(dir, &[]);
    command.envs(KEYS).env_remove("AWS_SESSION_TOKEN").env_remove("AWS_PROFILE").env("RUST_LOG", "warn");
    Program::start(command, "answers on ").await
}

/// What the clients were told.
#[derive(Default)]
struct Told {
    /// Episodes that are in the log, by their ids, with their outputs where a client brought them.
    episodes: BTreeMap<String, Option<String>>,
    refused: Vec<String>,
    /// Requests whose answer did not come.
    cut: u64,
}

/// What all clients share.
struct Clients {
    base: watch::Receiver<String>,
    next: AtomicU64,
    requests: u64,
    acknowledged: watch::Sender<u64>,
    told: Mutex<Told>,
}

impl Clients {
    async fn run(self: Arc<Self>) {
        let client = reqwest::Client::new();
        let mut base = self.base.clone();
        loop {
            let n = self.next.fetch_add(1, Ordering::SeqCst);
            if n >= self.requests {
                return;
            }
            let (body, output) = request(n);
            let address = format!("{}/rl/collect", *base.borrow_and_update());
            let answer = async {
                let response = client.post(address).json(&body).send().await?;
                Ok::<_, reqwest::Error>((response.status().as_u16(), response.json::<Value>().await?))
            };
            match answer.await {
                Ok((200, answer)) => {
                    let ids = answer["episode_ids"].as_array().expect("has ids");
                    let mut told = self.told.lock().expect("no client panics in it");
                    if answer["upload"] != "queued" {
                        told.refused.push(answer.to_string());
                    }
                    for id in ids {
                        told.episodes.insert(id.as_str().expect("is an id").to_owned(), output.clone());
                    }
                    drop(told);
                    self.acknowledged.send_modify(|acknowledged| *acknowledged += 1);
                }
                Ok((status, answer)) => {
                    self.told
                        .lock()
                        .expect("no client panics in it")
                        .refused
                        .push(format!("{status} {answer}"));
                }
                Err(_) => {
                    self.told.lock().expect("no client panics in it").cut += 1;
                    // Killed; the next one comes.
                    if tokio::time::timeout(SOON, base.changed()).await.is_err() {
                        panic!("the program does not come back");
                    }
                }
            }
        }
    }
}

/// The request of this number, and the output that it brings.
fn request(n: u64) -> (Value, Option<String>) {
    let run = format!("run-{}", n % 3);
    if n % GENERATED_EVERY == GENERATED_EVERY - 1 {
        let ask = json!({
            "prompts": ["say 3", "तीन कहो"], "episodes": 2, "max_new_tokens": 4, "seed": n, "run_id": run, "upload": true,
        });
        return (ask, None);
    }
    let output = format!("उत्तर {n}: {}", "ठीक ".repeat((n % 7) as usize));
    (json!({"prompt": format!("प्रश्न {n}"), "output": output, "run_id": run, "upload": true}), Some(output))
}

async fn get(base: &str, path: &str) -> Value {
    let response = reqwest::get(format!("{base}{path}")).await.expect("the program answers");
    response.json().await.expect("is JSON")
}

/// All lines of the files in a folder and below, as JSON, each with its file.
fn lines(folder: &Path, is_wanted: &dyn Fn(&str) -> bool) -> Vec<(PathBuf, Value)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("is there") {
        let path = entry.expect("can be read").path();
        let name = path.file_name().expect("has a name").to_string_lossy().into_owned();
        if path.is_dir() && name == "outbox" {
            // Sealed uploads, not the log.
        } else if path.is_dir() {
            found.extend(lines(&path, is_wanted));
        } else if is_wanted(&name) {
            let text = std::fs::read_to_string(&path).expect("is UTF-8");
            assert!(text.is_empty() || text.ends_with('\n'), "{} has a torn line", path.display());
            for line in text.lines() {
                let value =
                    serde_json::from_str(line).unwrap_or_else(|e| panic!("{}: {e}: {line}", path.display()));
                found.push((path.clone(), value));
            }
        }
    }
    found
}

fn id(episode: &Value) -> String {
    episode["episode_id"].as_str().expect("has an id").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_and_every_upload_arrives_once() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let requests = number("GURUKUL_CRASH_EPISODES", 1_500);
    let kills = number("GURUKUL_CRASH_KILLS", 3);
    let seed = number("GURUKUL_CRASH_SEED", 1);
    let (dir, store) = (tempfile::tempdir().expect("can be made"), tempfile::tempdir().expect("can be made"));
    let bucket = store.path().join(BUCKET);
    std::fs::create_dir(&bucket).expect("can be made");
    let server = Flaky::serve(flaky::s3(store.path()), FAILING, seed).await;
    std::fs::create_dir(dir.path().join("configs")).expect("can be made");
    let config = format!(
        "log:\n  max_file: 64KiB\nsinks:\n  archive: {{type: s3, bucket: {BUCKET}, region: us-east-1, endpoint_url: \
         '{}', force_path_style: true, key: 'rl/{{run_id}}/{{sha256}}.jsonl'}}\n",
        server.endpoint
    );
    std::fs::write(dir.path().join("configs/rl_config.yaml"), config).expect("can be written");

    let started = Instant::now();
    let mut program = start(dir.path()).await;
    let (bases, base) = watch::channel(program.base.clone());
    let clients = Arc::new(Clients {
        base,
        next: AtomicU64::new(0),
        requests,
        acknowledged: watch::Sender::new(0),
        told: Mutex::default(),
    });
    let running: Vec<_> = (0..CLIENTS).map(|_| tokio::spawn(clients.clone().run())).collect();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut pending_at_kills = Vec::new();
    for kill in 1..=kills {
        // Somewhere in this part of the requests, and then some milliseconds on.
        let part = requests / (kills + 1);
        let from = part * kill - part / 2 + random.next_u64() % (part / 2).max(1);
        let mut acknowledged = clients.acknowledged.subscribe();
        let reached = acknowledged.wait_for(|acknowledged| *acknowledged >= from);
        tokio::time::timeout(SOON * 5, reached).await.expect("collecting goes on").expect("has a sender");
        tokio::time::sleep(Duration::from_millis(random.next_u64() % 30)).await;
        pending_at_kills.push(get(&program.base, "/rl/uploads?limit=1").await["counts"]["pending"].as_u64());
        drop(program);
        program = start(dir.path()).await;
        bases.send_replace(program.base.clone());
    }
    for client in running {
        client.await.expect("no client panics");
    }
    let collected_s = started.elapsed().as_secs_f64();
    let settled = async {
        loop {
            let counts = get(&program.base, "/rl/uploads?limit=1").await["counts"].clone();
            if counts["pending"] == 0 {
                return counts;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let counts = tokio::time::timeout(SOON * 3, settled).await.expect("every upload arrives");
    let delivered_s = started.elapsed().as_secs_f64();
    drop(program);

    let told = std::mem::take(&mut *clients.told.lock().expect("no client panics in it"));
    assert_eq!(told.refused, Vec::<String>::new());
    assert!(told.cut <= kills * CLIENTS, "{} answers did not come", told.cut);
    let log = lines(&dir.path().join("rl_runs"), &|name| name.ends_with(".jsonl"));
    let in_log: BTreeMap<String, &Value> = log.iter().map(|(_, episode)| (id(episode), episode)).collect();
    assert_eq!(in_log.len(), log.len(), "an episode is in the log twice");
    for (id, output) in &told.episodes {
        let episode = in_log.get(id).unwrap_or_else(|| panic!("{id} was acknowledged and is not in the log"));
        assert!(output.as_ref().is_none_or(|output| episode["output"] == *output), "{episode}");
    }
    let sent = lines(&bucket, &|_| true);
    let in_bucket: BTreeSet<String> = sent.iter().map(|(_, episode)| id(episode)).collect();
    assert_eq!(in_bucket.len(), sent.len(), "an episode arrived twice");
    for id in told.episodes.keys() {
        assert!(in_bucket.contains(id), "{id} was promised and did not arrive");
    }
    for (path, episode) in &sent {
        assert_eq!(in_log.get(&id(episode)), Some(&episode), "what arrived is what is in the log");
        let bytes = std::fs::read(path).expect("is there");
        let digest = ring::digest::digest(&ring::digest::SHA256, &bytes);
        let sha256: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(path.to_string_lossy().ends_with(&format!("{sha256}.jsonl")), "{}", path.display());
    }
    let objects = sent.iter().map(|(path, _)| path).collect::<BTreeSet<_>>().len() as u64;
    assert_eq!((counts["done"].as_u64(), counts["failed"].as_u64()), (Some(objects), Some(0)));
    let sealed = std::fs::read_dir(dir.path().join("rl_runs/outbox")).expect("is there").count();
    assert!(sealed <= 4, "{sealed} sealed files are left; at most those that were just delivered may be");
    assert!(server.failed() > 0, "nothing failed");
    let _ = writeln!(
        std::io::stderr(),
        "{requests} requests by {CLIENTS} clients, {kills} kills (uploads pending at each: {pending_at_kills:?}), {} \
         answers cut; {} episodes acknowledged, {} in the log, {} in {objects} objects; {} S3 requests failed; collected \
         in {collected_s:.1} s, delivered after {delivered_s:.1} s",
        told.cut,
        told.episodes.len(),
        log.len(),
        sent.len(),
        server.failed(),
    );
}

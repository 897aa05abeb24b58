//! `gurukul train` from data that lies elsewhere: http addresses, a hub's data set, an S3 bucket, each by a real server
//! in this process; and an S3 job that is killed and goes on.
#![cfg(unix)]

#[allow(dead_code, reason = "faults are tested with the sources themselves")]
#[path = "support/hub.rs"]
mod hub;
#[allow(dead_code, reason = "faults are tested with the sources themselves")]
#[path = "support/s3.rs"]
mod s3;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use hub::FakeHub;
use s3::S3;

const LIMIT: Duration = Duration::from_secs(300);

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama")
}

/// A folder whose configs name these sources.
fn workplace(sources: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder can be made");
    let configs = dir.path().join("configs");
    std::fs::create_dir(&configs).expect("a folder can be made");
    std::fs::write(configs.join("mcp_connectors.yml"), sources).expect("can be written");
    let settings = "r: 4\nlearning_rate: 0.003\nbatch_size: 2\ngradient_accumulation_steps: 2\nmax_seq_length: 64\n\
                    save_steps: 2\nlogging_steps: 1\neval_share: 0.0\nshuffle_buffer: 4\n";
    std::fs::write(configs.join("adapter_config.yaml"), settings).expect("can be written");
    dir
}

/// Rows from `first` on.
fn rows(first: usize, count: usize) -> Vec<u8> {
    let row = |i: usize| format!("{{\"prompt\": \"say {i}\", \"completion\": \" the word {i}\"}}\n");
    (first..first + count).flat_map(|i| row(i).into_bytes()).collect()
}

fn gurukul(folder: &Path, environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
    for (name, _) in std::env::vars() {
        if ["GURUKUL_", "HF_", "AWS_"].iter().any(|start| name.starts_with(start)) || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.current_dir(folder).env("HOME", folder).env("HF_HOME", folder.join("hf"));
    command.env("GURUKUL_MODEL", llama()).env("GURUKUL_KV_CACHE", "16MiB");
    // Where no other credentials are, nobody shall wait for those of an instance.
    command.env("AWS_EC2_METADATA_DISABLED", "true");
    command.envs(environment.iter().copied());
    command
}

fn train(folder: &Path, environment: &[(&str, &str)], arguments: &[&str]) -> Command {
    let mut command = gurukul(folder, environment);
    command.arg("train").args(arguments);
    command
}

fn run(mut command: Command) -> (bool, String) {
    let Output { status, stdout, stderr } = command.output().expect("the program starts");
    (status.success(), String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr))
}

/// Checks a source as its user would before training, and trains from it.
fn completes(folder: &Path, environment: &[(&str, &str)], source: &str, steps: usize) {
    let mut command = gurukul(folder, environment);
    command.args(["sources", "check", source]);
    let (success, told) = run(command);
    assert!(success && told.contains("can be trained from"), "{told}");
    let (success, told) = run(train(folder, environment, &["--source", source]));
    assert!(success && told.contains(&format!("{steps} steps, loss ")), "{told}");
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads start")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("is in memory");
    encoder.finish().expect("is in memory")
}

#[test]
fn a_job_from_http_addresses() {
    let runtime = runtime();
    let address = runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("is bound");
        let file = |first| move || async move { gzip(&rows(first, 12)) };
        let router = axum::Router::new()
            .route("/part-00.jsonl.gz", axum::routing::get(file(0)))
            .route("/part-01.jsonl.gz", axum::routing::get(file(12)));
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    });
    let dir = workplace(&format!(
        "sources:\n  web:\n    type: http\n    url: http://{address}/part-{{00..01}}.jsonl.gz\n"
    ));
    completes(dir.path(), &[], "web", 6);
}

#[test]
fn a_job_from_a_data_set_on_a_hub() {
    let runtime = runtime();
    let hub = runtime.block_on(FakeHub::start());
    let readme =
        b"---\nconfigs:\n- config_name: hi\n  data_files:\n  - split: train\n    path: hi/train-*\n---\n";
    let files: [(&str, &[u8]); 3] = [
        ("README.md", readme),
        ("hi/train-0.jsonl", &rows(0, 12)),
        ("hi/train-1.jsonl.gz", &gzip(&rows(12, 12))),
    ];
    hub.commit("org/words", "main", &files);
    hub.hide("org/words");
    let dir = workplace("sources:\n  words:\n    type: huggingface\n    repo: org/words\n    config: hi\n");
    let endpoint = hub.endpoint.clone();
    completes(dir.path(), &[("HF_ENDPOINT", &endpoint), ("HF_TOKEN", hub::TOKEN)], "words", 6);
    let command = train(dir.path(), &[("HF_ENDPOINT", &endpoint)], &["--source", "words"]);
    let (success, told) = run(command);
    assert!(!success && told.contains("set HF_TOKEN"), "{told}");
}

/// A bucket with four objects of ten rows, and a source that names it.
fn bucket(runtime: &tokio::runtime::Runtime) -> (S3, String) {
    let server = runtime.block_on(S3::start());
    for part in 0..4 {
        server.put("corpus", &format!("hi/part-{part}.jsonl"), &rows(part * 10, 10));
    }
    let sources = format!(
        "sources:\n  bucket:\n    type: s3\n    bucket: corpus\n    prefix: hi/\n    endpoint_url: {}\n    \
         force_path_style: true\n",
        server.endpoint
    );
    (server, sources)
}

const KEYS: [(&str, &str); 2] =
    [("AWS_ACCESS_KEY_ID", s3::ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", s3::SECRET_KEY)];

#[test]
fn a_job_from_a_bucket_and_why_there_is_none() {
    let runtime = runtime();
    let (_server, sources) = bucket(&runtime);
    let dir = workplace(&sources);
    completes(dir.path(), &KEYS, "bucket", 10);
    let refused = |environment: &[(&str, &str)], part: &str| {
        let command = train(dir.path(), environment, &["--source", "bucket"]);
        let (success, told) = run(command);
        assert!(!success && told.contains(part), "{told}");
    };
    refused(&[], "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY");
    refused(&[KEYS[0], ("AWS_SECRET_ACCESS_KEY", "wrong")], "correct AWS_SECRET_ACCESS_KEY");
    // The same keys from a profile.
    let aws = dir.path().join(".aws");
    std::fs::create_dir(&aws).expect("a folder can be made");
    let profile = format!(
        "[lessons]\naws_access_key_id = {}\naws_secret_access_key = {}\n",
        s3::ACCESS_KEY,
        s3::SECRET_KEY
    );
    std::fs::write(aws.join("credentials"), profile).expect("can be written");
    completes(dir.path(), &[("AWS_PROFILE", "lessons")], "bucket", 10);
}

/// The id that the first line tells.
fn job_id(told: &str) -> String {
    let line = told.lines().find_map(|line| line.strip_prefix("job ")).expect("the job's id is told");
    line.split(':').next().expect("has a first part").to_owned()
}

/// Starts a job, and kills it as soon as it has told this; gives its id.
fn kill_at(mut command: Command, mark: &str) -> String {
    let mut child = command.stderr(Stdio::piped()).spawn().expect("the program starts");
    let (tell, told) = mpsc::channel();
    let lines = BufReader::new(child.stderr.take().expect("is piped")).lines();
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(tell.send(line))));
    let mut seen = String::new();
    while !seen.lines().last().is_some_and(|line| line.contains(mark)) {
        let line = told.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("it ended or hangs: {seen}"));
        seen = seen + &line + "\n";
    }
    child.kill().expect("it is there");
    child.wait().expect("it ends");
    job_id(&seen)
}

#[test]
fn an_s3_job_that_was_killed_goes_on_by_its_cursor() {
    let runtime = runtime();
    let (server, sources) = bucket(&runtime);
    let adapter = |dir: &Path| {
        std::fs::read(dir.join("adapters/bucket/adapter_model.safetensors")).expect("the adapter is there")
    };
    let alone = workplace(&sources);
    completes(alone.path(), &KEYS, "bucket", 10);

    let dir = workplace(&sources);
    let command = train(dir.path(), &KEYS, &["--source", "bucket"]);
    let id = kill_at(command, "step 5/");
    server.asked();
    let command = train(dir.path(), &KEYS, &["--resume", &id]);
    let (success, told) = run(command);
    assert!(success && told.contains("going on after step"), "{told}");
    assert!(
        adapter(dir.path()) == adapter(alone.path()),
        "the same adapter as that of the job that was left alone"
    );
    let asked = server.asked();
    assert!(asked.iter().any(|asked| asked.path.ends_with("part-3.jsonl")), "{asked:?}");
    assert!(
        !asked.iter().any(|asked| asked.path.ends_with("part-0.jsonl") && asked.method == "GET"),
        "{asked:?}"
    );
}

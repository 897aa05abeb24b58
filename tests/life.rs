//! The life of the real process: alive before the model is there, ready when it answers, and every way to its end, with
//! what must not be lost on it.
#![cfg(unix)]
#![expect(clippy::print_stderr, reason = "a test that skips says so")]

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "support/program.rs"]
mod program;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use program::{Program, SOON, gurukul, llama, serve, teachable};
use serde_json::{Value, json};

/// The tokens that a prompt of one letter leaves room for.
const LONG: usize = 480;

fn long(prompt: &str) -> Value {
    json!({"prompt": prompt, "max_new_tokens": LONG, "stream": true, "do_sample": false})
}

/// A stream that has begun; the rest of it is read on a task.
async fn begun(program: &Program, prompt: &str) -> tokio::task::JoinHandle<String> {
    let response = program.send("/generate-lite", &long(prompt)).await;
    assert_eq!(response.status().as_u16(), 200);
    let mut parts = response.bytes_stream();
    tokio::spawn(async move {
        let mut text = String::new();
        while let Some(part) = parts.next().await {
            text += &String::from_utf8_lossy(&part.expect("the stream is not cut off"));
        }
        text
    })
}

/// So many that they take many seconds, one after the other.
async fn crowd(program: &Program) -> Vec<tokio::task::JoinHandle<String>> {
    let mut streams = Vec::new();
    for n in 0..60 {
        streams.push(begun(program, &format!("{n}")).await);
    }
    streams
}

async fn texts(streams: Vec<tokio::task::JoinHandle<String>>) -> Vec<String> {
    let mut texts = Vec::new();
    for stream in streams {
        texts.push(tokio::time::timeout(SOON, stream).await.expect("it ends").expect("does not panic"));
    }
    texts
}

/// Each of them has an end that a client can understand; some had to be cut.
fn assert_cut_properly(texts: &[String]) {
    let mut cut = 0;
    for text in texts {
        let whole = text.trim_end().ends_with("data: [DONE]");
        let told = text.contains("event: error") && text.contains("shutting_down");
        assert!(whole != told, "{text}");
        cut += usize::from(told);
    }
    assert!(cut > 0, "nothing was cut");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_model_is_on_its_way_is_alive_and_not_ready() {
    let dir = tempfile::tempdir().unwrap();
    // A hub that accepts and never answers: the model is on its way for as long as the test wants.
    let hub = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = gurukul(dir.path());
    command.env("HF_ENDPOINT", format!("http://{}", hub.local_addr().unwrap()));
    command.args(["serve", "--port", "0", "--model", "org/name"]);
    let mut program = Program::start(command, "taking connections on ").await;
    assert_eq!(program.get("/health/live").await, (200, json!({"status": "live"})));
    let ready = program.client.get(format!("{}/health/ready", program.base)).send().await.unwrap();
    assert_eq!(ready.status().as_u16(), 503);
    assert!(ready.headers().contains_key("retry-after") && ready.headers().contains_key("x-request-id"));
    let ready: Value = ready.json().await.unwrap();
    assert!(ready["status"] == "loading" && ready["reason"].is_string(), "{ready}");
    let (status, health) = program.get("/health").await;
    assert_eq!((status, &health["status"]), (503, &json!("loading")));
    let refused = program.send("/generate-lite", &json!({"prompt": "a"})).await;
    assert_eq!(refused.status().as_u16(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    let refused: Value = refused.json().await.unwrap();
    assert_eq!(refused["error"]["code"], "model_loading");
    program.signal("TERM");
    let began = Instant::now();
    assert_eq!(program.ended().await.code(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_model_does_not_load_ends_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let output = gurukul(dir.path()).args(["serve", "--port", "0", "--model", "./nowhere"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("./nowhere"));
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_refuses_what_is_new_and_lets_a_stream_come_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut program = Program::serving(dir.path(), &["--max-batch", "1", "--grace", "100s"]).await;
    assert_eq!(program.get("/health/ready").await.0, 200);
    let mut streams = Vec::new();
    for n in 0..12 {
        streams.push(begun(&program, &format!("{n}")).await);
    }
    program.signal("TERM");
    program.line("running requests may end").await;
    // New connections too: whoever watches must not take a server that stops for one that is gone.
    let client = reqwest::Client::new();
    let get = async |path: &str| client.get(format!("{}{path}", program.base)).send().await.unwrap();
    let ready: Value = get("/health/ready").await.json().await.unwrap();
    assert_eq!(ready["status"], "stopping");
    assert_eq!(get("/health/live").await.status().as_u16(), 200);
    assert_eq!(get("/metrics").await.status().as_u16(), 200);
    let (status, refused) = program.post("/generate-lite", &json!({"prompt": "a"})).await;
    assert_eq!((status, &refused["error"]["code"]), (503, &json!("shutting_down")));
    for text in texts(streams).await {
        assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");
    }
    assert_eq!(program.ended().await.code(), Some(0));
    assert!(program.lines().iter().any(|line| line.contains("stopped")), "{:#?}", program.lines());
}

/// A crowd is cut within seconds after the last of these signals, each with a proper end.
async fn cuts(grace: &str, signals: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let mut program = Program::serving(dir.path(), &["--max-batch", "1", "--grace", grace]).await;
    let streams = crowd(&program).await;
    for (number, signal) in signals.iter().enumerate() {
        if number > 0 {
            program.line("running requests may end").await;
        }
        program.signal(signal);
    }
    let asked = Instant::now();
    assert_eq!(program.ended().await.code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    assert_cut_properly(&texts(streams).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_still_runs_at_the_end_of_the_grace_period_is_cut_with_a_proper_end() {
    cuts("300ms", &["TERM"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_cuts() {
    cuts("100s", &["TERM", "TERM"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_grace_everything_is_cut_at_once() {
    cuts("0", &["INT"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_pauses_a_job_at_a_checkpoint_and_the_next_start_goes_on_from_there() {
    let dir = tempfile::tempdir().unwrap();
    teachable(dir.path(), 40);
    let request = json!({"source": "rows", "max_samples": 60, "adapter_name": "taught"});
    for (grace, signal) in [("100s", "TERM"), ("0", "TERM")] {
        let mut program = Program::serving(dir.path(), &["--grace", grace]).await;
        let (_, jobs) = program.get("/adapter/jobs").await;
        let id = match jobs["jobs"].as_array().and_then(|jobs| jobs.first()) {
            Some(job) => job["job_id"].as_str().unwrap().to_owned(),
            None => {
                let (status, job) = program.post("/adapter/train-lite", &request).await;
                assert_eq!(status, 202, "{job}");
                job["job_id"].as_str().unwrap().to_owned()
            }
        };
        let before = program.job(&id, |job| job["metrics"]["step"].as_u64() >= Some(1)).await;
        let from = before["metrics"]["step"].as_u64().unwrap();
        program.job(&id, |job| job["metrics"]["step"].as_u64() >= Some(from + 25)).await;
        program.signal(signal);
        assert_eq!(program.ended().await.code(), Some(0), "{:#?}", program.lines());
    }
    let program = Program::serving(dir.path(), &[]).await;
    let (_, jobs) = program.get("/adapter/jobs").await;
    let id = jobs["jobs"][0]["job_id"].as_str().unwrap().to_owned();
    program.job(&id, |job| job["status"] == "completed").await;
    let (_, log) = program.get(&format!("/adapter/logs/{id}?start=0&limit=1000")).await;
    let lines: Vec<&str> =
        log["logs"].as_array().unwrap().iter().filter_map(|l| l["line"].as_str()).collect();
    assert_eq!(lines.iter().filter(|line| line.contains("paused after step")).count(), 1, "{lines:#?}");
    assert_eq!(lines.iter().filter(|line| line.contains("going on after step")).count(), 2, "{lines:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_has_a_data_folder() {
    let dir = tempfile::tempdir().unwrap();
    teachable(dir.path(), 1);
    let program = Program::serving(dir.path(), &[]).await;
    let process = format!("process {}", program.id());
    let second = serve(dir.path(), &[]);
    let mut train = gurukul(dir.path());
    train.args(["train", "--source", "rows", "--model"]).arg(llama());
    let mut collect = gurukul(dir.path());
    collect.args(["collect", "--episodes", "1", "--run-id", "r", "--model"]).arg(llama());
    for mut command in [second, train, collect] {
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        for part in ["gurukul.lock", &process, "--data-dir"] {
            assert!(said.contains(part), "{part} is missing in: {said}");
        }
    }
    assert_eq!(program.get("/health/ready").await.0, 200, "the first is as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_uploaded_file_that_was_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged: BTreeMap<String, String> = BTreeMap::new();
    for round in 0..4_u64 {
        let program = Program::serving(dir.path(), &[]).await;
        let mut clients = tokio::task::JoinSet::new();
        for client in 0..4 {
            let (url, http) = (format!("{}/v1/files", program.base), program.client.clone());
            clients.spawn(async move {
                let mut told = Vec::new();
                for number in 0_u64.. {
                    let row =
                        format!("{{\"prompt\": \"{round} {client} {number}\", \"completion\": \"b\"}}\n");
                    let content = row.repeat(1 + 300 * (number % 3) as usize);
                    let body = multipart(&content);
                    let sent = http
                        .post(&url)
                        .header("content-type", "multipart/form-data; boundary=XX")
                        .body(body)
                        .send()
                        .await;
                    // Killed meanwhile: nobody was told anything.
                    let Ok(answer) = sent else { break };
                    let status = answer.status().as_u16();
                    let Ok(file) = answer.json::<Value>().await else { break };
                    assert_eq!(status, 200, "{file}");
                    told.push((file["id"].as_str().unwrap().to_owned(), content));
                }
                told
            });
        }
        tokio::time::sleep(Duration::from_millis(400 + 130 * round)).await;
        drop(program);
        while let Some(told) = clients.join_next().await {
            acknowledged.extend(told.unwrap());
        }
    }
    assert!(acknowledged.len() > 8, "{}", acknowledged.len());
    let program = Program::serving(dir.path(), &[]).await;
    for (id, content) in &acknowledged {
        let file =
            program.client.get(format!("{}/v1/files/{id}/content", program.base)).send().await.unwrap();
        assert_eq!(file.status().as_u16(), 200, "{id}");
        assert_eq!(&file.text().await.unwrap(), content);
    }
    let left: Vec<_> = std::fs::read_dir(dir.path().join("files"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".part"))
        .collect();
    assert_eq!(left, Vec::<String>::new(), "what was not finished went at the start");
}

fn multipart(content: &str) -> String {
    format!(
        "--XX\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--XX\r\n\
         content-disposition: form-data; name=\"file\"; filename=\"rows.jsonl\"\r\n\
         content-type: application/jsonl\r\n\r\n{content}\r\n--XX--\r\n"
    )
}

/// A file system of its own, gone with this. `None` where it may not be mounted.
struct Disk(tempfile::TempDir);

impl Disk {
    fn mount(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder.path()).output();
        if mount.is_ok_and(|output| output.status.success()) {
            Some(Self(folder))
        } else {
            eprintln!("skipped: no file system can be mounted here");
            None
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_data_folder_is_refused_with_the_remedy() {
    let Some(disk) = Disk::mount("8m") else { return };
    let remount = Command::new("mount").args(["-o", "remount,ro"]).arg(disk.path()).output().unwrap();
    assert!(remount.status.success());
    let elsewhere = tempfile::tempdir().unwrap();
    teachable(elsewhere.path(), 1);
    let folder = disk.path().to_str().unwrap();
    for arguments in [&["serve", "--port", "0"][..], &["train", "--source", "rows"]] {
        let mut command = gurukul(elsewhere.path());
        command.args(arguments).args(["--data-dir", folder, "--model"]).arg(llama());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        for part in [folder, "writable", "--data-dir"] {
            assert!(said.contains(part), "{part} is missing in: {said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_disk_requests_are_answered_and_what_has_to_be_kept_is_refused() {
    let Some(disk) = Disk::mount("6m") else { return };
    let elsewhere = tempfile::tempdir().unwrap();
    teachable(elsewhere.path(), 1);
    let program = Program::serving(elsewhere.path(), &["--data-dir", disk.path().to_str().unwrap()]).await;
    let filler = disk.path().join("filler");
    // To the last byte.
    let mut size = 1 << 20;
    let mut file = std::fs::File::create(&filler).unwrap();
    while size > 0 {
        if std::io::Write::write_all(&mut file, &vec![0; size]).is_err() {
            size /= 2;
        }
    }
    let (status, answer) = program.post("/generate-lite", &json!({"prompt": "a", "max_new_tokens": 4})).await;
    assert_eq!(status, 200, "{answer}");
    let episode = json!({"prompt": "p", "output": "o".repeat(8000), "reward": 0.5, "run_id": "r"});
    let job = json!({"source": "rows", "adapter_name": "taught"});
    for (path, body) in [("/rl/collect", &episode), ("/adapter/train-lite", &job)] {
        let (status, answer) = program.post(path, body).await;
        assert_eq!((status, &answer["error"]["code"]), (507, &json!("storage_full")), "{path}: {answer}");
    }
    let upload = |content: String| {
        let request = program.client.post(format!("{}/v1/files", program.base));
        request.header("content-type", "multipart/form-data; boundary=XX").body(multipart(&content)).send()
    };
    let row = "{\"prompt\": \"a\", \"completion\": \"b\"}\n".to_owned();
    let refused = upload(row.repeat(1000)).await.unwrap();
    assert_eq!(refused.status().as_u16(), 507);
    assert_eq!(program.get("/health/ready").await.0, 200);

    drop(file);
    std::fs::remove_file(&filler).unwrap();
    assert_eq!(program.post("/rl/collect", &episode).await.0, 200);
    assert_eq!(upload(row).await.unwrap().status().as_u16(), 200);
    let (status, job) = program.post("/adapter/train-lite", &job).await;
    assert_eq!(status, 202, "{job}");
    program.job(job["job_id"].as_str().unwrap(), |job| job["status"] == "completed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_adapter_would_not_fit_the_quota_is_refused_and_nothing_is_deleted() {
    let dir = tempfile::tempdir().unwrap();
    teachable(dir.path(), 1);
    let request = |name: &str| json!({"source": "rows", "max_samples": 10, "adapter_name": name});
    let size = {
        let program = Program::serving(dir.path(), &[]).await;
        let (status, job) = program.post("/adapter/train-lite", &request("first")).await;
        assert_eq!(status, 202, "{job}");
        program.job(job["job_id"].as_str().unwrap(), |job| job["status"] == "completed").await;
        let files = std::fs::read_dir(dir.path().join("adapters/first")).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().len()).sum::<u64>()
    };
    // Room for one and a half, notes included.
    let quota = (size + size / 2 + 20_000).to_string();
    let program = Program::serving(dir.path(), &["--adapter-quota", &quota]).await;
    let (status, refused) = program.post("/adapter/train-lite", &request("second")).await;
    assert_eq!((status, &refused["error"]["code"]), (507, &json!("adapter_quota")), "{refused}");
    let message = refused["error"]["message"].as_str().unwrap();
    for part in [&size.to_string(), &quota, "--adapter-quota", "DELETE /adapter/"] {
        assert!(message.contains(part), "{part} is missing in: {message}");
    }
    let (status, job) = program.post("/adapter/train-lite", &request("first")).await;
    assert_eq!(status, 202, "the same name is replaced: {job}");
    program.job(job["job_id"].as_str().unwrap(), |job| job["status"] == "completed").await;
    assert_eq!(program.get("/adapter/first").await.0, 200);
}

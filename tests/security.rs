//! The binary as whoever is not trusted meets it: keys, limits, TLS, other origins, reloads, slow clients, and that no
//! secret comes out anywhere. Real processes, real sockets, reqwest and curl as clients.

#![cfg(unix)]

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "support/program.rs"]
mod program;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use program::gurukul;
use serde_json::{Value, json};

const READER: &str = "s3cr3t-reader-0123456789";
const TEACHER: &str = "s3cr3t-teacher-0123456789";
const OPS: &str = "s3cr3t-ops-0123456789abc";

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A running server with all that it has said; killed when dropped.
struct Served {
    child: Child,
    address: String,
    scheme: String,
    log: Arc<Mutex<String>>,
    stdout: Arc<Mutex<String>>,
    client: reqwest::Client,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Gathers lines until the process closes them.
fn gather(from: impl std::io::Read + Send + 'static) -> Arc<Mutex<String>> {
    let all = Arc::new(Mutex::new(String::new()));
    let into = all.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let mut all = into.lock().unwrap();
            all.push_str(&line);
            all.push('\n');
        }
    });
    all
}

/// Waits until a text holds a part.
fn wait_for(text: &Mutex<String>, part: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        let now = text.lock().unwrap().clone();
        if now.contains(part) {
            return now;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{part:?} does not come: {}", text.lock().unwrap());
}

fn serve(dir: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Served {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut command = gurukul(dir);
    command.args(["serve", "--port", "0", "--model"]).arg(repository("tests/fixtures/parity/llama"));
    command.args(arguments).envs(variables.iter().copied());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stdout = gather(child.stdout.take().unwrap());
    let log = gather(child.stderr.take().unwrap());
    let said = wait_for(&log, "listening on http");
    let start = said.find("listening on http").unwrap() + "listening on ".len();
    let url = said[start..].split(|c: char| c.is_whitespace() || c == '"').next().unwrap();
    let (scheme, address) = url.split_once("://").unwrap();
    let (scheme, address) = (scheme.to_owned(), address.to_owned());
    Served { child, address, scheme, log, stdout, client: reqwest::Client::new() }
}

impl Served {
    fn url(&self, path: &str) -> String {
        format!("{}://{}{path}", self.scheme, self.address)
    }

    /// Status and body, with a key.
    async fn ask(&self, method: &str, path: &str, key: Option<&str>, body: Option<&Value>) -> (u16, String) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.client.request(method, self.url(path));
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    fn hang_up(&self) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", "HUP", &id]).status().unwrap().success());
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }
}

fn keys_file(dir: &Path) -> PathBuf {
    let path = dir.join("keys.yaml");
    let text = format!(
        "keys:\n  - {{name: reader, key: {READER}, scopes: [generate]}}\n  - {{name: teacher, key: {TEACHER}, \
         scopes: [train, rl]}}\n  - {{name: ops, key: {OPS}, scopes: [admin]}}\n"
    );
    std::fs::write(&path, text).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_open_what_their_scopes_say() {
    let dir = tempfile::tempdir().unwrap();
    let keys = keys_file(dir.path());
    let served = serve(dir.path(), &["--api-keys", keys.to_str().unwrap()], &[]);
    let prompt = json!({"prompt": "hello", "max_new_tokens": 1});
    let wrong = json!({});
    for (method, path, body, needed) in [
        ("GET", "/", None, None),
        ("GET", "/health", None, None),
        ("GET", "/docs/", None, None),
        ("GET", "/openapi.json", None, None),
        ("GET", "/nowhere", None, None),
        ("POST", "/generate-lite", Some(&prompt), Some("generate")),
        ("POST", "/v1/completions", Some(&wrong), Some("generate")),
        ("POST", "/v1/chat/completions", Some(&wrong), Some("generate")),
        ("GET", "/v1/models", None, Some("generate")),
        ("GET", "/v1/models/a/b", None, Some("generate")),
        ("GET", "/adapter/list", None, Some("generate")),
        ("GET", "/adapter/x", None, Some("generate")),
        ("DELETE", "/adapter/x", None, Some("admin")),
        ("POST", "/adapter/train-lite", Some(&wrong), Some("train")),
        ("GET", "/adapter/jobs", None, Some("train")),
        ("GET", "/adapter/status/x", None, Some("train")),
        ("GET", "/adapter/logs/x/tail", None, Some("train")),
        ("GET", "/adapter/events/x", None, Some("train")),
        ("POST", "/adapter/cancel/x", None, Some("train")),
        ("POST", "/adapter/resume/x", None, Some("train")),
        ("GET", "/v1/files", None, Some("train")),
        ("GET", "/v1/files/x/content", None, Some("train")),
        ("POST", "/v1/fine_tuning/jobs", Some(&wrong), Some("train")),
        ("GET", "/sources", None, Some("train")),
        ("POST", "/rl/collect", Some(&wrong), Some("rl")),
        ("POST", "/rl/train", Some(&wrong), Some("rl")),
        ("GET", "/rl/uploads", None, Some("rl")),
        ("GET", "/metrics", None, Some("admin")),
    ] {
        for (key, scopes) in [
            (None, &[][..]),
            (Some("s3cr3t-nobody-0123456789"), &[]),
            (Some(READER), &["generate"]),
            (Some(TEACHER), &["train", "rl"]),
            (Some(OPS), &["generate", "train", "rl", "admin"]),
        ] {
            let (status, text) = served.ask(method, path, key, body).await;
            let known = [READER, TEACHER, OPS].iter().any(|k| Some(*k) == key);
            let what = format!("{method} {path} with {scopes:?}: {status} {text}");
            match needed {
                Some(scope) if !scopes.contains(&scope) => {
                    assert_eq!(status, if known { 403 } else { 401 }, "{what}");
                    assert!(!known || text.contains(&format!("the scope {scope}")), "{what}");
                }
                _ => assert!(![401, 403, 429].contains(&status) && status < 500, "{what}"),
            }
            assert!(!text.contains("s3cr3t"), "{what}");
        }
    }
    let metrics = served.ask("GET", "/metrics", Some(OPS), None).await.1;
    assert!(
        metrics.contains("gurukul_http_key_requests_total{key=\"reader\",outcome=\"admitted\"}"),
        "{metrics}"
    );
    assert!(served.log().contains("reader"), "the log names keys");
    assert!(!served.log().contains("s3cr3t"));
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_up_reads_keys_and_sources_anew() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("configs")).unwrap();
    let keys = keys_file(dir.path());
    let variables = [("GURUKUL_API_KEYS", "always=s3cr3t-always-0123456789")];
    let served = serve(dir.path(), &["--api-keys-file", keys.to_str().unwrap(), "--log", "json"], &variables);
    let models = async |key| served.ask("GET", "/v1/models", Some(key), None).await.0;
    assert_eq!(models(READER).await, 200);
    // A file that cannot be used changes nothing but the log.
    std::fs::write(
        &keys,
        "keys:\n  - name: reader\n    key: s3cr3t-reader-0123456789\n    scopes: [s3cr3t]\n",
    )
    .unwrap();
    std::fs::write(dir.path().join("configs/mcp_connectors.yml"), "sources:\n  a: {type: local}\n").unwrap();
    served.hang_up();
    let log = wait_for(&served.log, "sources cannot be used");
    assert!(
        log.contains("API keys stay as they were") && log.contains("keys.yaml") && log.contains("line 4"),
        "{log}"
    );
    assert!(log.contains("path is missing"), "{log}");
    assert_eq!(models(READER).await, 200);
    std::fs::write(&keys, "keys:\n  - {name: new, key: s3cr3t-new-0123456789, scopes: [generate]}\n")
        .unwrap();
    std::fs::write(dir.path().join("configs/mcp_connectors.yml"), "sources: {}\n").unwrap();
    served.hang_up();
    wait_for(&served.log, "sources can be used");
    assert_eq!(models(READER).await, 401);
    assert_eq!(models("s3cr3t-new-0123456789").await, 200);
    assert_eq!(models("s3cr3t-always-0123456789").await, 200, "the variable's stay");
    assert!(!served.log().contains("s3cr3t"), "{}", served.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_comes_out_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("configs")).unwrap();
    let connectors = r#"
sources:
  web: {type: http, url: "http://127.0.0.1:1/rows.jsonl?token=s3cr3t-query", headers_env: {authorization: WEB_TOKEN}}
  bucket: {type: s3, bucket: b, endpoint_url: "http://127.0.0.1:1"}
  rows: {type: qdrant, url: "http://127.0.0.1:1", collection: c, api_key_env: QDRANT_KEY}
  tool: {type: mcp, url: "http://127.0.0.1:1/mcp?key=s3cr3t-query", tool: {name: rows}}
"#;
    std::fs::write(dir.path().join("configs/mcp_connectors.yml"), connectors).unwrap();
    let keys = keys_file(dir.path());
    let variables = [
        ("GURUKUL_API_KEYS", "always=s3cr3t-always-0123456789"),
        ("GURUKUL_API_KEYS_FILE", keys.to_str().unwrap()),
        ("HF_TOKEN", "s3cr3t-hf"),
        ("WEB_TOKEN", "Bearer s3cr3t-web"),
        ("QDRANT_KEY", "s3cr3t-qdrant"),
        ("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"),
        ("AWS_SECRET_ACCESS_KEY", "s3cr3t-aws"),
        ("AWS_REGION", "us-east-1"),
        ("RUST_LOG", "debug"),
    ];
    let checked = gurukul(dir.path()).arg("check-config").envs(variables).output().unwrap();
    let checked = [checked.stdout, checked.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    assert!(checked.contains("#   always: admin") && checked.contains("#   reader: generate"), "{checked}");
    assert!(!checked.contains("s3cr3t"), "{checked}");

    const SOURCES: [&str; 4] = ["web", "bucket", "rows", "tool"];
    let asked = SOURCES.map(|source| {
        let mut command = gurukul(dir.path());
        command.args(["sources", "check", source]).envs(variables);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    });
    let served = serve(dir.path(), &[], &variables);
    let (status, sources) = served.ask("GET", "/sources", Some(TEACHER), None).await;
    assert!(status == 200 && sources.contains("bucket"), "{sources}");
    assert!(!sources.contains("s3cr3t"), "{sources}");
    let mut answers = String::new();
    for source in SOURCES {
        let body =
            json!({"source": source, "adapter_name": format!("from-{source}"), "overrides": {"epochs": 1}});
        let (status, text) = served.ask("POST", "/adapter/train-lite", Some(TEACHER), Some(&body)).await;
        answers += &text;
        if status != 202 {
            continue;
        }
        let job: Value = serde_json::from_str(&text).unwrap();
        let id = job["job_id"].as_str().unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            let (_, status) = served.ask("GET", &format!("/adapter/status/{id}"), Some(TEACHER), None).await;
            answers += &status;
            if status.contains("failed") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        answers += &served.ask("GET", &format!("/adapter/logs/{id}"), Some(TEACHER), None).await.1;
        served.ask("POST", &format!("/adapter/cancel/{id}"), Some(TEACHER), None).await;
    }
    for path in ["/health", "/openapi.json", "/"] {
        answers += &served.ask("GET", path, None, None).await.1;
    }
    answers += &served.ask("GET", "/metrics", Some(OPS), None).await.1;
    answers += &served.ask("GET", "/v1/models?key=x", Some("s3cr3t-wrong-0123456789"), None).await.1;
    assert!(!answers.contains("s3cr3t"), "{answers}");
    let (log, stdout) = (served.log(), served.stdout.lock().unwrap().clone());
    assert!(log.contains("DEBUG") && stdout.contains("gurukul answers on"), "{log}{stdout}");
    let mut said = vec![log, stdout];
    for child in asked {
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "nothing answers: {output:?}");
        said.extend([output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()));
    }
    for line in said.iter().flat_map(|text| text.lines()) {
        assert!(!line.contains("s3cr3t"), "{line}");
    }
}

#[test]
fn what_would_let_anybody_in_is_refused_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = |name: &str| repository("tests/fixtures/tls").join(name).display().to_string();
    let (cert, key, other) = (fixture("cert.pem"), fixture("key.pem"), fixture("other_key.pem"));
    let empty = dir.path().join("empty.yaml");
    std::fs::write(&empty, "keys: []\n").unwrap();
    for (arguments, parts) in [
        (vec!["--host", "0.0.0.0"], ["--host", "GURUKUL_API_KEYS"]),
        (vec!["--host", "0.0.0.0", "--api-keys-file", empty.to_str().unwrap()], ["empty.yaml", "no entry"]),
        (vec!["--tls-cert", &cert], ["--tls-cert", "--tls-key"]),
        (vec!["--tls-cert", &cert, "--tls-key", &other], ["other_key.pem", "do not go together"]),
        (vec!["--tls-cert", &key, "--tls-key", &key], ["--tls-cert", "BEGIN CERTIFICATE"]),
    ] {
        for command in ["serve", "check-config"] {
            let output = gurukul(dir.path()).arg(command).args(&arguments).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{command} {arguments:?}: {stderr}");
            assert!(parts.iter().all(|part| stderr.contains(part)), "{command} {arguments:?}: {stderr}");
        }
    }
    let output = gurukul(dir.path()).args(["check-config", "--cors-origins", "*"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("# Warning: cors_origins"), "{output:?}");
}

/// A certificate of its own in a folder, which clients trust as `cert.pem`.
fn tls_files(dir: &Path, from: &str) -> [PathBuf; 2] {
    ["cert", "key"].map(|kind| {
        let to = dir.join(format!("{kind}.pem"));
        std::fs::copy(repository("tests/fixtures/tls").join(format!("{from}{kind}.pem")), &to).unwrap();
        to
    })
}

/// What curl gets over TLS, and with which version of HTTP.
fn curl(served: &Served, trust: &str, arguments: &[&str]) -> Result<String, String> {
    let trust = repository("tests/fixtures/tls").join(trust);
    let port = served.address.rsplit(':').next().unwrap();
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--noproxy", "*", "--max-time", "20", "--cacert"])
        .arg(trust)
        .args(["--write-out", " HTTP/%{http_version} %{http_code}"])
        .args(arguments)
        .arg(format!("https://localhost:{port}/v1/models"))
        .output()
        .unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_and_reqwest_speak_tls_before_and_after_a_reload() {
    if Command::new("curl").arg("--version").output().is_err() {
        let _ = writeln!(std::io::stderr(), "skipped: there is no curl");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [cert, key] = tls_files(dir.path(), "");
    let arguments = ["--tls-cert", cert.to_str().unwrap(), "--tls-key", key.to_str().unwrap()];
    let variables = [("GURUKUL_API_KEYS", "reader:generate=s3cr3t-reader-0123456789")];
    let served = serve(dir.path(), &arguments, &variables);
    assert_eq!(served.scheme, "https");
    wait_for(&served.stdout, "answers on https://");
    // Its own health check knows that it speaks TLS, and with which certificate is nothing to it.
    let port = served.address.rsplit(':').next().unwrap();
    let mut health = gurukul(dir.path());
    let checked = health.arg("health").args(["--port", port]).args(arguments).output().unwrap();
    assert_eq!((checked.status.code(), &checked.stdout[..]), (Some(0), &b"ready\n"[..]), "{checked:?}");
    let header = format!("x-api-key: {READER}");
    for (version, flag) in [("2", "--http2"), ("1.1", "--http1.1")] {
        let answer = curl(&served, "cert.pem", &[flag, "--header", &header]).unwrap();
        assert!(
            answer.contains("\"object\"") && answer.ends_with(&format!("HTTP/{version} 200")),
            "{answer}"
        );
    }
    let long = format!("x-filler: {}", "x".repeat(40_000));
    let answer = curl(&served, "cert.pem", &["--http2", "--header", &long]).unwrap();
    assert!(answer.ends_with("HTTP/2 431"), "{answer}");
    assert!(curl(&served, "cert.pem", &[]).unwrap().ends_with("401"));
    let pem = std::fs::read(repository("tests/fixtures/tls/cert.pem")).unwrap();
    let trusted = reqwest::Certificate::from_pem(&pem).unwrap();
    let client = reqwest::Client::builder().tls_certs_only([trusted]).build().unwrap();
    let port = served.address.rsplit(':').next().unwrap();
    let answer = client.get(format!("https://localhost:{port}/health")).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);

    std::fs::write(&key, "no key").unwrap();
    served.hang_up();
    wait_for(&served.log, "the certificate stays as it was");
    assert!(curl(&served, "cert.pem", &[]).is_ok(), "the old one is still spoken");
    tls_files(dir.path(), "other_");
    served.hang_up();
    wait_for(&served.log, "the certificate was read anew");
    assert!(curl(&served, "other_cert.pem", &[]).is_ok());
    assert!(curl(&served, "cert.pem", &[]).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_for_each_key() {
    let dir = tempfile::tempdir().unwrap();
    let variables = [("GURUKUL_API_KEYS", "a=s3cr3t-a-0123456789,b=s3cr3t-b-0123456789")];
    let served = serve(dir.path(), &["--max-concurrent", "1", "--rate-limit", "5"], &variables);
    let (a, b) = ("s3cr3t-a-0123456789", "s3cr3t-b-0123456789");
    let body = json!({"prompt": "a", "max_new_tokens": 400, "do_sample": false, "stream": true});
    let stream = served.client.post(served.url("/generate-lite")).bearer_auth(a).json(&body);
    let stream = stream.send().await.unwrap();
    assert_eq!(stream.status().as_u16(), 200);
    let second = served.client.get(served.url("/v1/models")).bearer_auth(a).send().await.unwrap();
    assert_eq!(second.status().as_u16(), 429);
    assert_eq!(second.headers()["retry-after"], "1");
    assert!(second.text().await.unwrap().contains("too_many_concurrent_requests"));
    assert_eq!(served.ask("GET", "/v1/models", Some(b), None).await.0, 200, "another key is free");
    drop(stream);
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut answers = Vec::new();
    while Instant::now() < deadline && answers.len() < 5 {
        let (status, text) = served.ask("GET", "/v1/models", Some(a), None).await;
        // The stream's end takes a moment to be noticed.
        if !text.contains("too_many_concurrent_requests") {
            answers.push(status);
        }
    }
    assert_eq!(answers, [200, 200, 200, 200, 429], "five a minute, of which the stream was one");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_takes_too_long_is_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let served = serve(dir.path(), &["--request-timeout", "1", "--max-batch", "1"], &[]);
    // One that holds the only slot for long enough, by being read slowly: streams are not cut.
    let long = json!({"prompt": "a", "max_new_tokens": 500, "do_sample": false, "clean": false});
    let begun = Instant::now();
    let answers = (0..40).map(|_| served.ask("POST", "/generate-lite", None, Some(&long)));
    let answers = futures::future::join_all(answers).await;
    let late: Vec<&(u16, String)> = answers.iter().filter(|(status, _)| *status != 200).collect();
    if begun.elapsed() > Duration::from_secs(1) {
        assert!(!late.is_empty(), "all in {:?}", begun.elapsed());
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    for (status, text) in late {
        assert!(*status == 504 && text.contains("request_timeout"), "{status} {text}");
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        let health: Value = serde_json::from_str(&served.ask("GET", "/health", None, None).await.1).unwrap();
        if health["running"]["requests"] == 0 && health["queue"]["waiting"] == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("what was cancelled still runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn browsers_of_other_origins_are_let_in_when_named() {
    let dir = tempfile::tempdir().unwrap();
    let variables = [("GURUKUL_API_KEYS", "a=s3cr3t-a-0123456789")];
    let served = serve(dir.path(), &["--cors-origins", "https://a.example"], &variables);
    let preflight = served
        .client
        .request(reqwest::Method::OPTIONS, served.url("/generate-lite"))
        .header("origin", "https://a.example")
        .header("access-control-request-method", "POST")
        .send();
    let preflight = preflight.await.unwrap();
    assert_eq!(
        preflight.headers()["access-control-allow-origin"],
        "https://a.example",
        "asked without a key"
    );
    let refused = served.client.get(served.url("/v1/models")).header("origin", "https://a.example");
    let refused = refused.send().await.unwrap();
    assert_eq!(refused.status().as_u16(), 401);
    assert_eq!(refused.headers()["access-control-allow-origin"], "https://a.example", "a page can read why");
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_slow_clients_leave_others_alone() {
    let dir = tempfile::tempdir().unwrap();
    let served = serve(dir.path(), &[], &[]);
    let slow: Vec<TcpStream> =
        (0..500).map(|_| TcpStream::connect(&served.address).expect("is accepted")).collect();
    let slow = std::thread::spawn(move || {
        let mut slow = slow;
        for _ in 0..4 {
            slow.iter_mut().for_each(|stream| drop(stream.write_all(b"G")));
            std::thread::sleep(Duration::from_secs(1));
        }
        slow
    });
    let mut times = Vec::new();
    for _ in 0..100 {
        let begun = Instant::now();
        assert_eq!(served.ask("GET", "/health", None, None).await.0, 200);
        times.push(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    times.sort();
    // Far more than it takes, and far less than waiting for one of them would.
    assert!(times[98] < Duration::from_secs(1), "{times:?}");
    let body = json!({"prompt": "hello", "max_new_tokens": 8});
    assert_eq!(served.ask("POST", "/generate-lite", None, Some(&body)).await.0, 200);
    // After their time they are cut.
    let mut slow = slow.join().unwrap();
    std::thread::sleep(Duration::from_secs(10));
    for stream in &mut slow {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        assert!(read.is_ok() || read.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    }
}

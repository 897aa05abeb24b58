//! Collections of a server whose answers are made by qdrant-client's own models, where `GURUKUL_TEST_PYTHON` has it;
//! and of one that answers by a script, for what a good server does not do.
#![expect(clippy::print_stderr, reason = "a test that skips says so")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::super::tests::drain;
use super::super::{Cursor, SourceConfig};
use super::*;

fn quick() -> Patience {
    Patience {
        connect: Duration::from_secs(5),
        idle: Duration::from_millis(500),
        retries: 2,
        backoff: Duration::from_millis(10),
    }
}

fn source(url: &str, rest: Value) -> SourceConfig {
    let mut typed = json!({"type": "qdrant", "url": url, "collection": "lessons"});
    typed.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
    serde_json::from_value(typed).unwrap()
}

async fn read(source: &SourceConfig) -> (Vec<Value>, Option<String>) {
    drain(source.open_patiently("points", Cursor::default(), quick())).await
}

/// The server of `tests/qdrant_server.py`; it ends with the test.
struct Real {
    child: Child,
    url: String,
    _dir: tempfile::TempDir,
}

impl Real {
    fn start(points: &[Value], key: Option<&str>) -> Option<Self> {
        let Some(python) = std::env::var_os("GURUKUL_TEST_PYTHON") else {
            eprintln!("skipped: GURUKUL_TEST_PYTHON names no interpreter with the qdrant-client package");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("points.jsonl");
        let mut lines = std::fs::File::create(&file).unwrap();
        points.iter().for_each(|point| writeln!(lines, "{point}").unwrap());
        let mut command = Command::new(python);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qdrant_server.py")).arg(file);
        command.args(key.map(|key| format!("--api-key={key}")));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut port = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut port).unwrap();
        let port: u16 = port.trim().parse().expect("the server says its port");
        Some(Self { child, url: format!("http://127.0.0.1:{port}"), _dir: dir })
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lesson(i: u64) -> Value {
    json!({"id": i, "payload": {"n": i, "text": {"en": format!("lesson {i}"), "hi": format!("पाठ {i}")}, "odd": i % 2 == 1}})
}

#[tokio::test(flavor = "multi_thread")]
async fn all_points_come_once_in_order_of_their_ids() {
    let mut points: Vec<Value> = (1..=250).rev().map(lesson).collect();
    points.push(json!({"id": "5b1d3c9e-7f38-4a57-9b8e-0a7f6c5d4e3f", "payload": {"n": 251}}));
    let Some(server) = Real::start(&points, None) else { return };
    for page_size in [1000, 251, 100, 7] {
        let (rows, error) = read(&source(&server.url, json!({"page_size": page_size}))).await;
        assert_eq!(error, None, "{page_size}");
        let numbers: Vec<u64> = rows.iter().map(|row| row["n"].as_u64().unwrap()).collect();
        assert_eq!(numbers, (1..=251).collect::<Vec<_>>(), "{page_size}");
        assert_eq!(rows[2], lesson(3)["payload"], "{page_size}");
    }

    // As Qdrant filters them.
    let filter = json!({"must": [{"key": "odd", "match": {"value": true}}]});
    let (rows, error) = read(&source(&server.url, json!({"page_size": 100, "points_filter": filter}))).await;
    assert_eq!((rows.len(), error), (125, None));
    assert!(rows.iter().all(|row| row["odd"] == true));

    // Only what is asked for travels.
    let (rows, error) =
        read(&source(&server.url, json!({"fields": {"text": "text.hi"}, "max_bad_rows": 0.1}))).await;
    assert_eq!(
        (rows.len(), error),
        (250, None),
        "the last point has no such field, so nothing is left of it"
    );
    assert_eq!(rows[4], json!({"text": {"en": "lesson 5", "hi": "पाठ 5"}}));
    let (rows, _) = read(&source(&server.url, json!({"with_payload": ["n", "text.en"]}))).await;
    assert_eq!(rows[4], json!({"n": 5, "text": {"en": "lesson 5"}}));

    let (_, error) = read(&source(&server.url, json!({"points_filter": {"must": [{"wrong": 1}]}}))).await;
    let error = error.unwrap();
    assert!(error.contains("does not understand the request") && error.contains("points_filter"), "{error}");
    let (_, error) = read(&source(&server.url, json!({"collection": "other"}))).await;
    let error = error.unwrap();
    assert!(
        error.contains("there is no collection other") && error.contains("correct collection"),
        "{error}"
    );
    let (_, error) = read(&source(&format!("{}/elsewhere", server.url), json!({}))).await;
    assert!(error.as_ref().unwrap().contains("is url the address of a Qdrant server?"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_goes_on_at_its_cursor() {
    use futures::StreamExt as _;

    let points: Vec<Value> = (1..=100).map(lesson).collect();
    let Some(server) = Real::start(&points, None) else { return };
    let source = source(&server.url, json!({"page_size": 16}));
    for taken in [0, 1, 15, 16, 17, 50, 99, 100] {
        let mut stream = source.open_patiently("points", Cursor::default(), quick());
        let mut numbers = Vec::new();
        for _ in 0..taken {
            numbers.push(stream.next().await.unwrap().unwrap().fields["n"].as_u64().unwrap());
        }
        // As a checkpoint keeps it.
        let cursor = serde_json::to_string(&stream.cursor()).unwrap();
        drop(stream);
        let cursor = serde_json::from_str(&cursor).unwrap();
        let (rest, error) = drain(source.open_patiently("points", cursor, quick())).await;
        assert_eq!(error, None, "{taken}");
        numbers.extend(rest.iter().map(|row| row["n"].as_u64().unwrap()));
        assert_eq!(numbers, (1..=100).collect::<Vec<_>>(), "{taken}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_comes_from_the_environment_and_goes_along() {
    // Any variable that every test process has.
    let (variable, key) = ("CARGO_PKG_NAME", "gurukul");
    assert_eq!(std::env::var(variable).as_deref(), Ok(key));
    let Some(server) = Real::start(&[lesson(1)], Some(key)) else { return };
    let (rows, error) = read(&source(&server.url, json!({"api_key_env": variable}))).await;
    assert_eq!((rows.len(), error), (1, None));
    let (_, error) = read(&source(&server.url, json!({}))).await;
    assert!(error.as_ref().unwrap().contains("name the variable under api_key_env"), "{error:?}");
    let (_, error) = read(&source(&server.url, json!({"api_key_env": "CARGO_PKG_VERSION"}))).await;
    let error = error.unwrap();
    assert!(error.contains("does not accept the key in CARGO_PKG_VERSION"), "{error}");
    assert!(!error.contains(env!("CARGO_PKG_VERSION")), "the key stays a secret: {error}");
    let (_, error) = read(&source(&server.url, json!({"api_key_env": "GURUKUL_NOT_SET"}))).await;
    assert!(error.unwrap().contains("environment variable GURUKUL_NOT_SET is not set"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_without_a_payload_is_a_bad_row() {
    let mut points: Vec<Value> = (1..=3).map(lesson).collect();
    points.push(json!({"id": 4, "payload": null}));
    let Some(server) = Real::start(&points, None) else { return };
    let (rows, error) = read(&source(&server.url, json!({"max_bad_rows": 0.5}))).await;
    assert_eq!((rows.len(), error), (3, None));
    let (_, error) = read(&source(&server.url, json!({"max_bad_rows": 0}))).await;
    assert!(error.as_ref().unwrap().contains("point 4 has no payload"), "{error:?}");
}

// ---- by a script

#[derive(Clone)]
enum Answer {
    /// Status line with headers, and a body.
    Whole(&'static str, String),
    /// The head of a longer body, some of it, and the end of the connection.
    Cut,
    /// A byte now and then, for ever.
    Drip,
    /// Nothing.
    Silence,
}

struct Scripted {
    url: String,
    requests: Arc<Mutex<Vec<Value>>>,
}

impl Scripted {
    /// Answers one request after another; the last answer is repeated.
    async fn start(script: Vec<Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let kept = requests.clone();
        tokio::spawn(async move {
            for at in 0.. {
                let Ok((socket, _)) = listener.accept().await else { return };
                tokio::spawn(serve(socket, script[at.min(script.len() - 1)].clone(), kept.clone()));
            }
        });
        Self { url, requests }
    }

    fn asked(&self) -> Vec<Value> {
        self.requests.lock().unwrap().clone()
    }
}

async fn serve(mut socket: TcpStream, answer: Answer, requests: Arc<Mutex<Vec<Value>>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match socket.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.trim().parse().unwrap()];
    socket.read_exact(&mut body).await.unwrap();
    requests.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
    match answer {
        Answer::Whole(status, body) => {
            let length = body.len();
            let text =
                format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
            let _ = socket.write_all(text.as_bytes()).await;
        }
        Answer::Cut => {
            let _ = socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"result\":").await;
        }
        Answer::Drip => {
            let _ = socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n").await;
            while socket.write_all(b" ").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Answer::Silence => std::future::pending().await,
    }
}

fn page(ids: std::ops::Range<u64>, next: Value) -> Answer {
    let points: Vec<Value> = ids.map(lesson).collect();
    let body = json!({"result": {"points": points, "next_page_offset": next}, "status": "ok", "time": 0.1});
    Answer::Whole("200 OK", body.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_passes_is_tried_again() {
    for trouble in [
        Answer::Whole("429 Too Many Requests\r\nretry-after: 0", String::new()),
        Answer::Whole("500 Internal Server Error", json!({"status": {"error": "raft"}}).to_string()),
        Answer::Whole("503 Service Unavailable", "busy".into()),
        Answer::Cut,
        Answer::Silence,
    ] {
        let server =
            Scripted::start(vec![trouble.clone(), page(0..2, json!(2)), trouble, page(2..3, Value::Null)])
                .await;
        let (rows, error) = read(&source(&server.url, json!({}))).await;
        assert_eq!((rows.len(), error), (3, None));
        let offsets: Vec<Value> = server.asked().iter().map(|body| body["offset"].clone()).collect();
        assert_eq!(offsets, [Value::Null, Value::Null, json!(2), json!(2)]);
        assert_eq!(server.asked()[0], json!({"limit": 256, "with_payload": true, "with_vector": false}));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_pass_ends_the_stream_with_its_reason() {
    let html = || "<html>".to_owned();
    for (trouble, requests, expected) in [
        (
            Answer::Whole("500 Oh", json!({"status": {"error": "raft"}}).to_string()),
            3,
            "500 Oh (raft) (after 3 attempts)",
        ),
        (Answer::Drip, 3, "no whole page came within"),
        (Answer::Whole("200 OK", "{\"result\":[]}".into()), 1, "is no page of points"),
        (Answer::Whole("200 OK", html()), 1, "is url the address of a Qdrant server?"),
        (Answer::Whole("200 OK", "{\"result\": {\"points\": [{\"id\": 1".into()), 1, "is no page of points"),
        (Answer::Whole("404 Not Found", html()), 1, "is url the address of a Qdrant server?"),
        (Answer::Whole("302 Found\r\nlocation: http://127.0.0.1:1/", html()), 1, "302 Found"),
        (Answer::Whole("401 Unauthorized", html()), 1, "under api_key_env"),
        (Answer::Whole("403 Forbidden", html()), 1, "under api_key_env"),
    ] {
        let server = Scripted::start(vec![trouble]).await;
        let (rows, error) = read(&source(&server.url, json!({}))).await;
        let error = error.expect(expected);
        assert!(error.contains(expected) && error.contains("collection lessons at"), "{expected}: {error}");
        assert_eq!((rows.len(), server.asked().len()), (0, requests), "{expected}");
    }
    // Nobody there.
    let gone = Scripted::start(vec![Answer::Silence]).await.url.replace("127.0.0.1", "127.0.0.2");
    let (_, error) = read(&source(&gone, json!({}))).await;
    assert!(error.unwrap().contains("(after 3 attempts)"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_page_is_asked_for_ahead() {
    let server =
        Scripted::start(vec![page(0..2, json!(2)), page(2..4, json!(4)), page(4..5, Value::Null)]).await;
    let config = QdrantConfig {
        url: server.url.clone(),
        collection: "lessons".into(),
        api_key_env: None,
        points_filter: None,
        with_payload: Vec::new(),
        page_size: 2,
    };
    let opening = Opening::new(&source(&server.url, json!({})), quick());
    let asked = async |n: usize| {
        while server.asked().len() < n {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let Rows::Pages(mut pages) = config.open(&opening).unwrap().rows else { panic!("it has pages") };
    let mut turn = async |token: Option<Value>| {
        let (page, back) =
            tokio::task::spawn_blocking(move || (pages.page(token.as_ref()), pages)).await.unwrap();
        pages = back;
        page.unwrap()
    };
    let first = turn(None).await;
    // Nobody wants it yet.
    tokio::time::timeout(Duration::from_secs(20), asked(2)).await.expect("the second page is asked for");
    let second = turn(first.next).await;
    tokio::time::timeout(Duration::from_secs(20), asked(3)).await.expect("the third page is asked for");
    let third = turn(second.next).await;
    assert_eq!((third.rows.len(), third.next), (1, None));
    assert_eq!(server.asked().len(), 3, "each page is asked for once");
    assert_eq!(server.asked()[2]["offset"], 4);
}

#[test]
fn settings_that_cannot_be_are_refused_by_name() {
    let refused = |rest: Value| {
        let mut typed = json!({"type": "qdrant", "url": "http://h:6333", "collection": "c"});
        typed.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        serde_json::from_value::<SourceConfig>(typed).unwrap_err().to_string()
    };
    for (rest, expected) in [
        (json!({"url": "qdrant.example"}), "url"),
        (json!({"url": "http://u:p@h"}), "url"),
        (json!({"url": "http://h?api-key=1"}), "url"),
        (json!({"collection": " "}), "collection"),
        (json!({"collection": "a/b"}), "collection"),
        (json!({"collection": 7}), "collection"),
        (json!({"api_key_env": "s3cr3t-key"}), "api_key_env"),
        (json!({"page_size": 0}), "page_size"),
        (json!({"page_size": 1_000_000}), "page_size"),
        (json!({"points_filter": []}), "points_filter"),
        (json!({"with_payload": [""]}), "with_payload"),
        (json!({"limit": 3}), "limit"),
        (json!({"path": "x"}), "path"),
    ] {
        let error = refused(rest.clone());
        assert!(error.contains(expected), "{rest}: {error}");
        assert!(!error.contains("s3cr3t"), "{error}");
    }
    let typed =
        json!({"type": "qdrant", "url": "http://h:6333", "collection": "c", "points_filter": {"must": []}});
    let source: SourceConfig = serde_json::from_value(typed).unwrap();
    let kept = serde_json::to_string(&source).unwrap();
    assert_eq!(serde_json::from_str::<SourceConfig>(&kept).unwrap(), source);
}

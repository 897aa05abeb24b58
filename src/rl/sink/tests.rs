//! Sinks against real servers in this process, with checked signatures and with faults: whatever happens on the way,
//! an upload is there once and whole, and nothing is written over.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};

use self::flaky::{ACCESS_KEY, Flaky, SECRET_KEY, refusal};
use super::*;
use crate::config::rl_sinks::{FolderSink, HttpSink};
use crate::rl::outbox::hex;

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "../../../tests/support/flaky.rs"]
mod flaky;

const BUCKET: &str = "episodes";
/// Attempts after which a test gives up.
const MANY: usize = 200;

/// A sealed file with its key.
fn parcel(dir: &Path, content: &[u8], key: &str) -> Parcel {
    let sha256 = hex(ring::digest::digest(&ring::digest::SHA256, content).as_ref());
    let file = dir.join(format!("{sha256}.jsonl"));
    std::fs::write(&file, content).unwrap();
    let facts = KeyFacts {
        run_id: "run-1".into(),
        date: "2026-01-31".into(),
        time: "235959".into(),
        sha256: sha256.clone(),
        name: "archive".into(),
    };
    Parcel {
        id: uuid::Uuid::now_v7().to_string(),
        key: key.replace("{sha256}", &sha256),
        facts,
        bytes: content.len() as u64,
        file,
        may_be_there: false,
    }
}

fn line(i: usize) -> Vec<u8> {
    format!("{{\"episode_index\":{i},\"output\":\"नमस्ते {}\"}}\n", i * 7919).into_bytes()
}

/// Tries as the outbox does, without its waits.
async fn until_there(sink: &Sink, parcel: &mut Parcel) -> usize {
    for attempt in 1..=MANY {
        match sink.put(parcel).await {
            Ok(()) => return attempt,
            Err(Refusal::Passing { .. }) => parcel.may_be_there = true,
            Err(Refusal::Final(reason)) => panic!("{reason}"),
        }
    }
    panic!("not there after {MANY} attempts");
}

async fn refused(sink: &Sink, parcel: &Parcel) -> Refusal {
    sink.put(parcel).await.expect_err("must be refused")
}

fn assert_names(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

// ---- S3

fn s3_with(endpoint: &str, secret: &str) -> Sink {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .credentials_provider(Credentials::new(ACCESS_KEY, secret, None, None, "test"))
        .region(Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .force_path_style(true)
        .build();
    Sink::S3(s3::S3::with(aws_sdk_s3::Client::from_conf(config), BUCKET.into()))
}

struct Bucket {
    root: tempfile::TempDir,
    server: Flaky,
    sealed: tempfile::TempDir,
}

impl Bucket {
    async fn start(failing: u32) -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join(BUCKET)).unwrap();
        let server = Flaky::serve(flaky::s3(root.path()), failing, 7).await;
        Self { root, server, sealed: tempfile::tempdir().unwrap() }
    }

    fn sink(&self) -> Sink {
        s3_with(&self.server.endpoint, SECRET_KEY)
    }

    fn object(&self, key: &str) -> std::io::Result<Vec<u8>> {
        std::fs::read(self.root.path().join(BUCKET).join(key))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_arrive_once_whatever_fails() {
    let bucket = Bucket::start(200).await;
    let sink = bucket.sink();
    let mut attempts = 0;
    for i in 0..60 {
        let mut parcel = parcel(bucket.sealed.path(), &line(i), "rl/run-1/{sha256}.jsonl");
        attempts += until_there(&sink, &mut parcel).await;
        assert_eq!(bucket.object(&parcel.key).unwrap(), line(i));
    }
    assert!(
        bucket.server.failed() > 5 && attempts > 60,
        "{attempts} attempts, {} failures",
        bucket.server.failed()
    );
    let there = std::fs::read_dir(bucket.root.path().join(BUCKET).join("rl/run-1")).unwrap().count();
    assert_eq!(there, 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_objects_go_in_parts_and_leave_none_behind() {
    let bucket = Bucket::start(0).await;
    let sink = bucket.sink();
    let content: Vec<u8> =
        (0..17 * (1 << 20)).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut large = parcel(bucket.sealed.path(), &content, "{sha256}");
    sink.put(&large).await.unwrap();
    assert!(bucket.object(&large.key).unwrap() == content);
    assert!(sink.put(&large).await.is_ok(), "a repeat does no harm");
    std::fs::remove_file(bucket.root.path().join(BUCKET).join(&large.key)).unwrap();
    bucket.server.set_failing(200);
    until_there(&sink, &mut large).await;
    assert!(bucket.object(&large.key).unwrap() == content);
    // Nor does one that is refused at its end leave parts that somebody pays for.
    bucket.server.set_failing(0);
    let taken = parcel(bucket.sealed.path(), &content, "taken");
    std::fs::write(bucket.root.path().join(BUCKET).join("taken"), "another").unwrap();
    let parts = || {
        let names = std::fs::read_dir(bucket.root.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().contains(".part-")).count()
    };
    let before = parts();
    assert!(matches!(refused(&sink, &taken).await, Refusal::Final(_)));
    assert_eq!((parts(), bucket.object("taken").unwrap().len()), (before, 7));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_object_under_the_key_stays() {
    let bucket = Bucket::start(0).await;
    let first = parcel(bucket.sealed.path(), b"first\n", "runs/today.jsonl");
    bucket.sink().put(&first).await.unwrap();
    let second = parcel(bucket.sealed.path(), b"other\n", "runs/today.jsonl");
    let Refusal::Final(reason) = refused(&bucket.sink(), &second).await else {
        panic!("nothing changes that")
    };
    assert_names(&reason, &[BUCKET, "runs/today.jsonl", "another object", "key"]);
    assert_eq!(bucket.object("runs/today.jsonl").unwrap(), b"first\n");
    assert!(bucket.sink().put(&first).await.is_ok(), "the same content is there already");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_s3_refuses_says_what_to_do() {
    let bucket = Bucket::start(0).await;
    let parcel = parcel(bucket.sealed.path(), b"x\n", "{sha256}");
    let wrong = s3_with(&bucket.server.endpoint, "wrong");
    let Refusal::Final(reason) = refused(&wrong, &parcel).await else { panic!("wrong keys stay wrong") };
    assert_names(&reason, &["403", "SignatureDoesNotMatch", "credentials"]);
    for (status, code, is_final, parts) in [
        (404, "NoSuchBucket", true, &["make the bucket", BUCKET][..]),
        (403, "AccessDenied", true, &["credentials", BUCKET]),
        (301, "PermanentRedirect", true, &["region"]),
        (400, "ExpiredToken", false, &["expired", "renew"]),
        (403, "RequestTimeTooSkewed", false, &["clock"]),
        (503, "SlowDown", false, &["503"]),
        (409, "ConditionalRequestConflict", false, &["409"]),
        (400, "EntityTooLarge", true, &["EntityTooLarge"]),
    ] {
        let routes = Router::new().fallback(move || async move { refusal(status, code) });
        let server = Flaky::serve(routes, 0, 0).await;
        let refusal = refused(&s3_with(&server.endpoint, SECRET_KEY), &parcel).await;
        assert_eq!(matches!(refusal, Refusal::Final(_)), is_final, "{code}: {refusal}");
        assert_names(&refusal.to_string(), parts);
    }
    let nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let refusal = refused(&s3_with(&nobody, SECRET_KEY), &parcel).await;
    assert!(matches!(&refusal, Refusal::Passing { reason, .. } if reason.contains("no answer")), "{refusal}");
    std::fs::remove_file(&parcel.file).unwrap();
    let Refusal::Final(reason) = refused(&bucket.sink(), &parcel).await else { panic!("it is gone") };
    assert_names(&reason, &["sealed file", "backup"]);
}

// ---- HTTP

/// What a server was given: address or idempotency key to content.
type Stored = Arc<Mutex<BTreeMap<String, Bytes>>>;

async fn store(
    State(stored): State<Stored>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let sha256 = hex(ring::digest::digest(&ring::digest::SHA256, &body).as_ref());
    if header("content-length") != body.len().to_string() || header("idempotency-key") != sha256 {
        return StatusCode::BAD_REQUEST.into_response();
    }
    if header("content-type") != "application/x-ndjson" {
        return StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response();
    }
    let mut stored = stored.lock().unwrap();
    let (key, taken) = match method {
        Method::PUT if header("if-none-match") == "*" => {
            (uri.path().to_owned(), StatusCode::PRECONDITION_FAILED)
        }
        Method::POST => (sha256, StatusCode::CONFLICT),
        _ => return StatusCode::BAD_REQUEST.into_response(),
    };
    if stored.contains_key(&key) {
        return taken.into_response();
    }
    stored.insert(key, body);
    StatusCode::CREATED.into_response()
}

fn http_sink(yaml: &str) -> Sink {
    let sink: HttpSink = serde_yaml::from_str(yaml).unwrap();
    Sink::Http(http::Http::open(&sink).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_get_each_upload_once_whatever_fails() {
    let sealed = tempfile::tempdir().unwrap();
    for method in ["put", "post"] {
        let stored = Stored::default();
        let routes = Router::new().fallback(store).with_state(stored.clone());
        let server = Flaky::serve(routes, 200, 3).await;
        let path = if method == "put" { "in/{run_id}/{sha256}" } else { "batches" };
        let sink = http_sink(&format!("{{method: {method}, url: '{}/{path}'}}", server.endpoint));
        for i in 0..60 {
            until_there(&sink, &mut parcel(sealed.path(), &line(i), "shown")).await;
        }
        assert!(server.failed() > 5);
        let stored = stored.lock().unwrap();
        let mut contents: Vec<&[u8]> = stored.values().map(|bytes| &bytes[..]).collect();
        contents.sort_unstable();
        let mut lines: Vec<Vec<u8>> = (0..60).map(line).collect();
        lines.sort_unstable();
        assert_eq!(contents, lines, "{method}");
        assert!(method == "post" || stored.keys().all(|path| path.starts_with("/in/run-1/")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_address_refuses_says_what_to_do() {
    let sealed = tempfile::tempdir().unwrap();
    let mut parcel = parcel(sealed.path(), b"x\n", "shown");
    for (status, is_final, parts) in [
        (403, true, &["403", "headers_env", "signed anew"][..]),
        (404, true, &["404", "correct the address"]),
        (302, true, &["302"]),
        (413, true, &["413"]),
        (429, false, &["429"]),
        (502, false, &["502"]),
    ] {
        let answer = move || async move {
            (StatusCode::from_u16(status).unwrap(), [("retry-after", "7"), ("location", "/elsewhere")])
        };
        let server = Flaky::serve(Router::new().fallback(answer), 0, 0).await;
        let sink = http_sink(&format!("url: '{}/{{sha256}}?token=SECRET'", server.endpoint));
        let refusal = refused(&sink, &parcel).await;
        assert_eq!(matches!(refusal, Refusal::Final(_)), is_final, "{refusal}");
        assert_names(&refusal.to_string(), parts);
        assert!(!refusal.to_string().contains("SECRET"), "{refusal}");
        if let Refusal::Passing { wait, .. } = refusal {
            assert_eq!(wait, Some(Duration::from_secs(7)));
        }
    }
    // An address for one object, as a signed one is: what is there may be ours only if an earlier attempt got through.
    let server =
        Flaky::serve(Router::new().fallback(|| async { StatusCode::PRECONDITION_FAILED }), 0, 0).await;
    let sink = http_sink(&format!("url: '{}/one'", server.endpoint));
    let Refusal::Final(reason) = refused(&sink, &parcel).await else { panic!("it is not known to be there") };
    assert_names(&reason, &["412", "something is there"]);
    parcel.may_be_there = true;
    sink.put(&parcel).await.unwrap();
    let unset: HttpSink = serde_yaml::from_str("url_env: GURUKUL_TEST_NO_SUCH_VARIABLE").unwrap();
    let Err(Refusal::Final(reason)) = http::Http::open(&unset) else { panic!("it is not set") };
    assert_names(&reason, &["GURUKUL_TEST_NO_SUCH_VARIABLE", "set it"]);
}

// ---- folders

fn folder_sink(path: &Path) -> Sink {
    let sink = FolderSink { path: path.to_str().unwrap().into(), key: Default::default() };
    Sink::Folder(folder::Folder::open(&sink))
}

#[tokio::test]
async fn files_appear_whole_and_nothing_is_written_over() {
    let (nas, sealed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let sink = folder_sink(nas.path());
    let first = parcel(sealed.path(), b"first\n", "a/b/one.jsonl");
    // What an attempt that was cut left.
    std::fs::create_dir_all(nas.path().join("a/b")).unwrap();
    std::fs::write(nas.path().join(format!("a/b/.writing-{}", first.id)), "fir").unwrap();
    sink.put(&first).await.unwrap();
    sink.put(&first).await.unwrap();
    assert_eq!(std::fs::read(nas.path().join("a/b/one.jsonl")).unwrap(), b"first\n");
    assert_eq!(std::fs::read_dir(nas.path().join("a/b")).unwrap().count(), 1, "nothing half-written stays");
    for other in [&b"other\n"[..], b"longer than it\n"] {
        let other = parcel(sealed.path(), other, "a/b/one.jsonl");
        let Refusal::Final(reason) = refused(&sink, &other).await else { panic!("nothing changes that") };
        assert_names(&reason, &["one.jsonl", "something else", "move it away"]);
    }
    assert_eq!(std::fs::read(nas.path().join("a/b/one.jsonl")).unwrap(), b"first\n");
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_not_made() {
    let (nas, sealed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let parcel = parcel(sealed.path(), b"x\n", "{sha256}.jsonl");
    let root = nas.path().join("mounted");
    let refusal = refused(&folder_sink(&root), &parcel).await;
    assert!(
        matches!(&refusal, Refusal::Passing { reason, .. } if reason.contains("mount or make it")),
        "{refusal}"
    );
    assert!(!root.exists());
    std::fs::create_dir(&root).unwrap();
    // In the place of a folder on the way.
    let mut below = parcel.clone();
    std::fs::write(root.join("file"), "").unwrap();
    below.key = "file/x.jsonl".into();
    assert!(matches!(refused(&folder_sink(&root), &below).await, Refusal::Passing { .. }));
    folder_sink(&root).put(&parcel).await.unwrap();
}

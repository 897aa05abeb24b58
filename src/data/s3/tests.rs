//! Objects of a bucket from a real S3 server in this process, with checked signatures and with faults.

#[allow(dead_code, reason = "other tests use the rest of the stand-in")]
#[path = "../../../tests/support/s3.rs"]
mod server;

use std::io::Read as _;
use std::time::Duration;

use aws_sdk_s3::config::{Credentials, SharedCredentialsProvider};
use serde_json::json;

use self::server::{ACCESS_KEY, Fault, S3, SECRET_KEY};
use super::client::connect;
use super::*;
use crate::data::object::Patience;

fn opening(format: Format) -> Opening {
    Opening {
        runtime: tokio::runtime::Handle::current(),
        patience: Patience {
            backoff: Duration::from_millis(1),
            idle: Duration::from_secs(5),
            ..Patience::default()
        },
        stop: tokio_util::sync::CancellationToken::new(),
        format,
        fields: Vec::new(),
        pin: None,
    }
}

fn source(server: &S3, keys: serde_json::Value) -> S3Config {
    let mut all = json!({"bucket": "corpus", "endpoint_url": server.endpoint, "force_path_style": true});
    all.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    let config: S3Config = serde_json::from_value(all).unwrap();
    config.check().unwrap();
    config
}

/// As [`S3Config::open`] with keys that no environment holds.
async fn open(config: &S3Config, secret: &str, opening: &Opening) -> Rows {
    let credentials = Credentials::new(ACCESS_KEY, secret, None, None, "test");
    let access = config.access();
    let region = aws_sdk_s3::config::Region::from_static("us-east-1");
    let client = connect(&access, region, SharedCredentialsProvider::new(credentials)).await.unwrap();
    config.rows(client, access, opening)
}

/// Names and contents of all objects.
async fn take(server: &S3, keys: serde_json::Value) -> Result<Vec<(String, Vec<u8>)>, String> {
    take_as(server, keys, SECRET_KEY, Format::Auto).await
}

async fn take_as(
    server: &S3,
    keys: serde_json::Value,
    secret: &str,
    format: Format,
) -> Result<Vec<(String, Vec<u8>)>, String> {
    let opening = opening(format);
    let Rows::Files(objects) = open(&source(server, keys), secret, &opening).await else {
        unreachable!("a bucket has files")
    };
    let work = move || {
        objects
            .map(|object| {
                let mut object = object?;
                let length = object.stat()?.length;
                let mut bytes = Vec::new();
                object.read_from(0)?.read_to_end(&mut bytes).map_err(|error| error.to_string())?;
                assert_eq!(length, Some(bytes.len() as u64));
                Ok((object.shown().to_owned(), bytes))
            })
            .collect()
    };
    tokio::task::spawn_blocking(work).await.unwrap()
}

async fn refused(server: &S3, keys: serde_json::Value) -> String {
    take(server, keys).await.expect_err("cannot be had")
}

fn names(taken: &[(String, Vec<u8>)]) -> Vec<&str> {
    taken.iter().map(|(name, _)| name.as_str()).collect()
}

fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is missing in: {message}");
    }
}

/// Text that does not repeat early.
fn lines(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| format!("{{\"n\": {i}, \"text\": \"{}\"}}\n", i * 7_919).into_bytes()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_under_a_prefix_and_by_their_keys() {
    let server = S3::start().await;
    for (key, content) in
        [("hi/b.jsonl", "2"), ("hi/a.jsonl", "1"), ("hi/_SUCCESS", ""), ("ta/a b+ä.csv", "3"), ("plain", "4")]
    {
        server.put("corpus", key, content.as_bytes());
    }
    let taken = take(&server, json!({"prefix": "hi/"})).await.unwrap();
    assert_eq!(names(&taken), ["s3://corpus/hi/a.jsonl", "s3://corpus/hi/b.jsonl"]);
    assert_eq!(taken[0].1, b"1");
    let taken = take(&server, json!({})).await.unwrap();
    assert_eq!(names(&taken).len(), 3, "with format auto, what a format's extension has");
    let taken = take_as(&server, json!({}), SECRET_KEY, Format::Txt).await.unwrap();
    assert_eq!(names(&taken).len(), 5);
    let taken = take(&server, json!({"keys": ["ta/a b+ä.csv", "plain"]})).await.unwrap();
    assert_eq!(taken[0], ("s3://corpus/ta/a b+ä.csv".to_owned(), b"3".to_vec()));
    assert_eq!(taken[1].1, b"4");
    assert_names(
        &refused(&server, json!({"prefix": "bn/"})).await,
        &["s3://corpus/bn/", "no object", "prefix"],
    );
    let message = refused(&server, json!({"prefix": "pl"})).await;
    assert_names(&message, &["none of the 1 objects", "format"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_go_on_page_by_page() {
    let server = S3::start().await;
    for i in 0..1_203 {
        server.put("corpus", &format!("part-{i:05}.txt"), b"");
    }
    let taken = take(&server, json!({"prefix": "part-"})).await.unwrap();
    let expected: Vec<String> = (0..1_203).map(|i| format!("s3://corpus/part-{i:05}.txt")).collect();
    assert_eq!(names(&taken), expected);
    let lists = server.asked().iter().filter(|asked| asked.query.contains("list-type=2")).count();
    assert_eq!(lists, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_cut_goes_on_by_range() {
    let server = S3::start().await;
    let content = lines(5_000);
    server.put("corpus", "a.jsonl", &content);
    server.fault("a.jsonl", Fault::Cut { after: 20_000, times: 2 });
    let taken = take(&server, json!({"keys": ["a.jsonl"]})).await.unwrap();
    assert!(taken[0].1 == content);
    let asked = server.asked();
    let gets: Vec<_> = asked.iter().filter(|asked| asked.method == "GET").collect();
    let ranges: Vec<_> = gets.iter().map(|asked| asked.range.as_deref()).collect();
    assert_eq!(ranges, [None, Some("bytes=20000-"), Some("bytes=40000-")]);
    assert!(gets.iter().all(|asked| asked.if_match.is_some()), "each is of the version that was first seen");
    server.fault("a.jsonl", Fault::Cut { after: 0, times: 100 });
    let message = refused(&server, json!({"keys": ["a.jsonl"]})).await;
    assert_names(&message, &["after 0 of", "4 attempts"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_changes_in_between_is_an_error() {
    let server = S3::start().await;
    let content = lines(5_000);
    server.put("corpus", "a.jsonl", &content);
    let other = content.iter().map(|b| if *b == b'7' { b'8' } else { *b }).collect();
    server.fault("a.jsonl", Fault::Change { after: 20_000, to: other });
    let message = refused(&server, json!({"keys": ["a.jsonl"]})).await;
    assert_names(&message, &["changed while it was read"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_or_busy_store_is_waited_for() {
    let server = S3::start().await;
    let content = lines(2_000);
    server.put("corpus", "a.jsonl", &content);
    server.fault("a.jsonl", Fault::Refuse { status: 503, code: "SlowDown", times: 2 });
    server.fault("a.jsonl", Fault::Refuse { status: 500, code: "InternalError", times: 1 });
    server.fault("a.jsonl", Fault::Drip);
    assert!(take(&server, json!({"prefix": "a"})).await.unwrap()[0].1 == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_are_what_was_asked_for() {
    let server = S3::start().await;
    let content = lines(2_000);
    server.put("corpus", "a.parquet", &content);
    server.fault("a.parquet", Fault::Cut { after: 700, times: 1 });
    let opening = opening(Format::Auto);
    let config = source(&server, json!({"keys": ["a.parquet"]}));
    let Rows::Files(mut objects) = open(&config, SECRET_KEY, &opening).await else { unreachable!("files") };
    let read = move || {
        let mut object = objects.next().unwrap().unwrap();
        let middle = object.read_range(1_000..3_000)?;
        let mut rest = Vec::new();
        object.read_from(10_000)?.read_to_end(&mut rest).map_err(|error| error.to_string())?;
        Ok::<_, String>((middle, rest))
    };
    let (middle, rest) = tokio::task::spawn_blocking(read).await.unwrap().unwrap();
    assert!(middle == content[1_000..3_000] && rest == content[10_000..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_in_plain_words() {
    let server = S3::start().await;
    server.put("corpus", "a.jsonl", b"1");
    let message = refused(&server, json!({"bucket": "nowhere"})).await;
    assert_names(&message, &["s3://nowhere/", "no such bucket", "NoSuchBucket", &server.endpoint]);
    let message = refused(&server, json!({"keys": ["b.jsonl"]})).await;
    assert_names(&message, &["s3://corpus/b.jsonl", "no such object"]);
    let message = take_as(&server, json!({}), "wrong", Format::Auto).await.unwrap_err();
    assert_names(&message, &["secret does not fit", "AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"]);
    let cases: [(u16, &str, &[&str]); 6] = [
        (403, "ExpiredToken", &["expired", "AWS_SESSION_TOKEN"]),
        (403, "AccessDenied", &["denied", "s3:GetObject"]),
        (403, "InvalidAccessKeyId", &["AWS_ACCESS_KEY_ID"]),
        (301, "PermanentRedirect", &["another region", "region"]),
        (400, "AuthorizationHeaderMalformed", &["region"]),
        (403, "RequestTimeTooSkewed", &["clock"]),
    ];
    for (status, code, parts) in cases {
        // The answer to the HEAD has no code; the GET that follows tells the reason.
        let key = format!("{code}.jsonl");
        server.put("corpus", &key, b"1");
        server.fault(&key, Fault::Refuse { status, code, times: 99 });
        let message = refused(&server, json!({"keys": [key]})).await;
        assert_names(&message, parts);
        assert_names(&message, &[&format!("s3://corpus/{key}"), code]);
    }
    // Nobody listens at a port that was just given back.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let message = refused(&server, json!({"endpoint_url": format!("http://{free}")})).await;
    assert_names(&message, &["cannot be reached", "endpoint_url"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_run_out_in_the_middle_end_it_with_the_reason() {
    let server = S3::start().await;
    server.put("corpus", "a.jsonl", &lines(5_000));
    let opening = opening(Format::Auto);
    let config = source(&server, json!({"keys": ["a.jsonl"]}));
    let Rows::Files(mut objects) = open(&config, SECRET_KEY, &opening).await else { unreachable!("files") };
    server.fault("a.jsonl", Fault::Cut { after: 20_000, times: 1 });
    let read = move || {
        let mut object = objects.next().unwrap().unwrap();
        object.stat().unwrap();
        server.fault("a.jsonl", Fault::Refuse { status: 403, code: "ExpiredToken", times: 9 });
        let mut bytes = Vec::new();
        let message = object.read_from(0).unwrap().read_to_end(&mut bytes).unwrap_err().to_string();
        (bytes, message)
    };
    let (bytes, message) = tokio::task::spawn_blocking(read).await.unwrap();
    assert_eq!(bytes.len(), 20_000);
    assert_names(&message, &["s3://corpus/a.jsonl", "expired", "resume"]);
}

#[test]
fn settings_that_cannot_be_are_refused() {
    for (keys, part) in [
        (json!({}), "bucket is missing"),
        (json!({"bucket": "s3://corpus"}), "bucket"),
        (json!({"bucket": "corpus/hi"}), "bucket"),
        (json!({"bucket": "corpus", "prefix": "a", "keys": ["b"]}), "prefix or keys"),
        (json!({"bucket": "corpus", "keys": [""]}), "keys"),
        (json!({"bucket": "corpus", "region": "not a region"}), "region"),
        (json!({"bucket": "corpus", "endpoint_url": "127.0.0.1:9000"}), "endpoint_url"),
        (json!({"bucket": "corpus", "endpoint_url": "http://key:secret@host"}), "credentials"),
    ] {
        let config: S3Config = serde_json::from_value(keys.clone()).unwrap();
        let message = config.check().expect_err(&keys.to_string());
        assert!(message.contains(part) && !message.contains("secret"), "{keys}: {message}");
    }
    assert!(serde_json::from_value::<S3Config>(json!({"bucket": "a", "secret_key": "x"})).is_err());
}

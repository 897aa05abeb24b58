//! Sources from a server that answers by a script: cuts, refusals, changes, redirects and slowness, on a real
//! socket.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::super::object::Patience;
use super::*;

/// One answer.
#[derive(Clone)]
enum Answer {
    /// These bytes, then the end of the connection.
    Raw(Vec<u8>),
    /// The file, by ranges where they are asked for and the tag is this one; cut after so many bytes of body.
    File { etag: Option<&'static str>, ranges: bool, cut: Option<usize> },
    /// Nothing, for ever.
    Silence,
}

struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Answers one connection after another by the script; the last answer is repeated.
    async fn start(file: &str, script: Vec<Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let kept = requests.clone();
        let file = file.as_bytes().to_vec();
        let mut script = VecDeque::from(script);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let answer = if script.len() > 1 { script.pop_front() } else { script.front().cloned() };
                tokio::spawn(serve(socket, answer.unwrap(), file.clone(), kept.clone()));
            }
        });
        Self { address, requests }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

async fn serve(mut socket: TcpStream, answer: Answer, file: Vec<u8>, requests: Arc<Mutex<Vec<String>>>) {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && socket.read(&mut byte).await.is_ok_and(|n| n == 1) {
        request.push(byte[0]);
    }
    let request = String::from_utf8(request).unwrap().to_lowercase();
    requests.lock().unwrap().push(request.clone());
    let header = |name: &str| request.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    match answer {
        Answer::Raw(bytes) => {
            let _ = socket.write_all(&bytes).await;
        }
        Answer::Silence => std::future::pending().await,
        Answer::File { etag, ranges, cut } => {
            let start = header("range: bytes=").and_then(|r| r.trim_end_matches('-').parse::<usize>().ok());
            let same = header("if-range:").map(str::to_owned) == etag.map(str::to_lowercase);
            let start = start.filter(|_| ranges && same);
            let body = &file[start.unwrap_or(0)..];
            let mut head = match start {
                Some(start) => {
                    let (last, total) = (file.len() - 1, file.len());
                    format!("HTTP/1.1 206 Partial\r\ncontent-range: bytes {start}-{last}/{total}\r\n")
                }
                None => "HTTP/1.1 200 OK\r\n".to_owned(),
            };
            if let Some(etag) = etag {
                head += &format!("etag: {etag}\r\n");
            }
            head += &format!("content-length: {}\r\nconnection: close\r\n\r\n", body.len());
            let _ = socket.write_all(head.as_bytes()).await;
            let _ = socket.write_all(&body[..cut.unwrap_or(usize::MAX).min(body.len())]).await;
        }
    }
    let _ = socket.shutdown().await;
}

fn quick() -> Patience {
    Patience { backoff: Duration::from_millis(5), idle: Duration::from_millis(400), ..Patience::default() }
}

async fn fetch(url: &str) -> (Vec<Value>, Option<String>) {
    drain(SourceConfig::http(url).open_patiently("web", Cursor::default(), quick())).await
}

fn lines(n: usize) -> String {
    (0..n).map(|i| json!({"n": i, "text": "पाठ".repeat(10)}).to_string() + "\n").collect()
}

fn numbers(records: &[Value]) -> Vec<u64> {
    records.iter().map(|record| record["n"].as_u64().unwrap()).collect()
}

fn whole(etag: Option<&'static str>) -> Answer {
    Answer::File { etag, ranges: true, cut: None }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_is_read_to_its_end() {
    let server = Server::start(&lines(500), vec![whole(None)]).await;
    let (records, error) = fetch(&server.url("a.jsonl?x=secret")).await;
    assert_eq!((numbers(&records), error), ((0..500).collect(), None));
    assert_eq!(server.requests().len(), 1);
    assert!(server.requests()[0].contains("accept-encoding: identity"));
}

#[tokio::test]
async fn a_cut_body_goes_on_by_range() {
    let file = lines(500);
    let cut = |n| Answer::File { etag: Some("\"v1\""), ranges: true, cut: Some(n) };
    // The cut after 0 bytes is a failure in a row; each of the others brought something.
    let script = vec![cut(10_000), cut(0), cut(7001), cut(20_000), whole(Some("\"v1\""))];
    let server = Server::start(&file, script).await;
    let (records, error) = fetch(&server.url("a.jsonl")).await;
    assert_eq!((numbers(&records), error), ((0..500).collect(), None));
    let requests = server.requests();
    assert_eq!(requests.len(), 5);
    assert!(requests[0].contains("range: bytes=0-0"));
    assert!(requests[1].contains("range: bytes=10000-") && requests[1].contains("if-range: \"v1\""));
    assert!(requests[4].contains("range: bytes=37001-"), "{}", requests[4]);
}

#[tokio::test]
async fn without_ranges_it_starts_over_and_passes_over_what_it_had() {
    for etag in [None, Some("W/\"weak\""), Some("\"v1\"")] {
        let cut = |n| Answer::File { etag, ranges: false, cut: Some(n) };
        let script = vec![cut(9_999), cut(3), cut(30_000), Answer::File { etag, ranges: false, cut: None }];
        let server = Server::start(&lines(500), script).await;
        let (records, error) = fetch(&server.url("a.jsonl")).await;
        assert_eq!((numbers(&records), error), ((0..500).collect(), None), "{etag:?}");
        assert_eq!(server.requests().len(), 4);
    }
}

#[tokio::test]
async fn a_body_that_stays_cut_names_source_object_and_record() {
    let script = vec![Answer::File { etag: None, ranges: false, cut: Some(20_000) }];
    let server = Server::start(&lines(500), script).await;
    let (records, error) = fetch(&server.url("a.jsonl?key=hidden")).await;
    let error = error.expect("is cut");
    let taken = records.len();
    assert_eq!(numbers(&records), (0..taken as u64).collect::<Vec<_>>());
    assert!(taken > 100, "{taken}");
    for part in
        ["source web", &server.url("a.jsonl"), &format!("(after record {taken})"), "20000 of", "4 attempts"]
    {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains("hidden"), "{error}");
    assert_eq!(server.requests().len(), 4);
}

#[tokio::test]
async fn data_that_changes_in_between_is_an_error() {
    let file = lines(500);
    let other: String = file.replace("\"n\":0,", "\"n\":7,");
    let answer = |text: &str, etag: &str| {
        let length = text.len();
        let head = format!("HTTP/1.1 200 OK\r\netag: {etag}\r\ncontent-length: {length}\r\n\r\n");
        Answer::Raw([head.as_bytes(), text.as_bytes()].concat())
    };
    let cut = |etag| Answer::File { etag, ranges: true, cut: Some(10_000) };
    for second in
        [answer(&file, "\"v2\""), answer(&file[..file.len() - 1], "\"v1\""), answer(&other, "\"v1\"")]
    {
        let server = Server::start(&file, vec![cut(Some("\"v1\"")), second]).await;
        let (_, error) = fetch(&server.url("a.jsonl")).await;
        assert!(error.expect("changed").contains("was changed while it was read"));
    }
    // Without a tag and without a length the content itself tells.
    let open_end = |text: &str| Answer::Raw(format!("HTTP/1.1 200 OK\r\n\r\n{text}").into_bytes());
    let chunk = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2000\r\n";
    let chunked_cut = Answer::Raw([chunk.as_bytes(), &file.as_bytes()[..0x1000]].concat());
    let server = Server::start(&file, vec![chunked_cut.clone(), open_end(&other)]).await;
    let (_, error) = fetch(&server.url("a.jsonl")).await;
    assert!(error.expect("changed").contains("was changed while it was read"));
    let server = Server::start(&file, vec![chunked_cut, open_end(&file)]).await;
    let (records, error) = fetch(&server.url("a.jsonl")).await;
    assert_eq!((records.len(), error), (500, None));
}

#[tokio::test]
async fn passing_failures_are_tried_again_and_others_are_not() {
    let status =
        |line: &str| Answer::Raw(format!("HTTP/1.1 {line}\r\ncontent-length: 0\r\n\r\n").into_bytes());
    for line in ["503 Busy", "500 Oops", "429 Slow\r\nretry-after: 0", "408 Late"] {
        let script = vec![status(line), status(line), status(line), whole(None)];
        let server = Server::start(&lines(3), script).await;
        let (records, error) = fetch(&server.url("a.jsonl")).await;
        assert_eq!((records.len(), error), (3, None), "{line}");
    }
    for (line, expected, requests) in [
        ("503 Busy", "answered 503", 4),
        ("404 Gone", "correct the address", 1),
        ("403 No", "headers_env", 1),
        ("204 Nothing", "204", 1),
        ("302 Away\r\nlocation: /again", "redirects", 10),
        ("302 Away", "to nowhere", 1),
        ("302 Away\r\nlocation: ftp://127.0.0.1/x", "to nowhere", 1),
    ] {
        let server = Server::start("", vec![status(line)]).await;
        let (records, error) = fetch(&server.url("a.jsonl")).await;
        let error = error.expect(line);
        assert!(records.is_empty() && error.contains(expected), "{line}: {error}");
        assert_eq!(server.requests().len(), requests, "{line}");
    }
    // Nobody listens at a port that was just given back.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (_, error) = fetch(&format!("http://{free}/a.jsonl")).await;
    assert!(error.expect("refused").contains("4 attempts"));
}

#[tokio::test]
async fn a_silent_server_is_given_up() {
    let server = Server::start("", vec![Answer::Silence]).await;
    let begun = Instant::now();
    let (_, error) = fetch(&server.url("a.jsonl")).await;
    assert!(error.expect("silent").contains("timed out") && begun.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn a_dropped_stream_lets_go_of_a_silent_server() {
    let server = Server::start("", vec![Answer::Silence]).await;
    let begun = Instant::now();
    let runtime = tokio::task::spawn_blocking({
        let url = server.url("a.jsonl");
        move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let stream = runtime.block_on(async { SourceConfig::http(url).open("web", Cursor::default()) });
            std::thread::sleep(Duration::from_millis(200));
            drop(stream);
            // Waits for the reading thread.
            drop(runtime);
        }
    });
    tokio::time::timeout(Duration::from_secs(10), runtime).await.expect("the thread ends").unwrap();
    assert!(begun.elapsed() < Duration::from_secs(8));
    assert_eq!(server.requests().len(), 1, "the thread had asked");
}

#[tokio::test]
async fn truncated_gzip_names_the_offset() {
    let zipped = gzip(lines(500).as_bytes());
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", zipped.len() - 9);
    let body = [head.as_bytes(), &zipped[..zipped.len() - 9]].concat();
    let server = Server::start("", vec![Answer::Raw(body)]).await;
    let (_, error) = fetch(&server.url("a.jsonl.gz")).await;
    let error = error.expect("is cut");
    let offset = format!("it ends at byte {}", zipped.len() - 9);
    assert!(error.contains("a.jsonl.gz") && error.contains(&offset), "{error}");
}

#[tokio::test]
async fn secrets_come_from_the_environment_and_stay_at_their_host() {
    // PATH is set wherever tests run, and no test changes it.
    let secret = std::env::var("PATH").unwrap().to_lowercase();
    let target = Server::start(&lines(2), vec![whole(None)]).await;
    let away = format!("HTTP/1.1 302 F\r\nlocation: {}\r\ncontent-length: 0\r\n\r\n", target.url("b.jsonl"));
    let home = Server::start("", vec![Answer::Raw(away.into_bytes())]).await;
    let typed = json!({"type": "http", "url": home.url("a.jsonl"), "headers_env": {"X-Key": "PATH"}});
    let config: SourceConfig = serde_json::from_value(typed).unwrap();
    let (records, error) = drain(config.open_patiently("web", Cursor::default(), quick())).await;
    assert_eq!((records.len(), error), (2, None));
    assert!(home.requests()[0].contains(&format!("x-key: {secret}")));
    assert!(!target.requests()[0].contains("x-key"), "{}", target.requests()[0]);

    let typed = json!({"type": "http", "url": home.url("a"), "headers_env": {"X-Key": "GURUKUL_NOT_SET"}});
    let config: SourceConfig = serde_json::from_value(typed).unwrap();
    let (_, error) = drain(config.open("web", Cursor::default())).await;
    assert!(error.expect("is missing").contains("environment variable GURUKUL_NOT_SET"));
}

#[tokio::test]
async fn several_addresses_are_one_source() {
    let server = Server::start(&lines(40), vec![whole(None)]).await;
    let typed = json!({"type": "http", "urls": [server.url("a.jsonl"), server.url("b.jsonl")]});
    let config: SourceConfig = serde_json::from_value(typed).unwrap();
    let mut stream = config.open_patiently("web", Cursor::default(), quick());
    for _ in 0..50 {
        stream.next().await.unwrap().unwrap();
    }
    let mut stream = config.open_patiently("web", stream.cursor(), quick());
    let record = stream.next().await.unwrap().unwrap();
    assert_eq!(record.fields["n"], 10);
    assert_eq!(record.place.to_string(), format!("{}, line 11", server.url("b.jsonl")));
    let (rest, error) = drain(stream).await;
    assert_eq!((rest.len(), error), (29, None));
}

//! Tests of connections over real sockets: clients that are slow, silent, many, or do not read.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use axum::routing::{get, post};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::config::TlsFiles;

/// A server whose patience is short; stops when told.
struct Server {
    address: SocketAddr,
    /// Streams that nobody dropped yet.
    streams: Arc<AtomicUsize>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<io::Result<()>>,
}

/// Counts itself out.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn short() -> ServeSettings {
    ServeSettings {
        handshake: Duration::from_millis(500),
        patience: Patience {
            head: Duration::from_millis(500),
            idle: Duration::from_millis(1500),
            read: Duration::from_millis(600),
        },
        body: BodyPatience {
            idle: Duration::from_millis(400),
            least: Duration::from_millis(800),
            bytes_per_s: 1 << 20,
        },
        ..ServeSettings::default()
    }
}

impl Server {
    async fn start(settings: ServeSettings) -> Self {
        let streams = Arc::new(AtomicUsize::new(0));
        let counter = streams.clone();
        // As much as anybody reads.
        let endless = get(async move || {
            counter.fetch_add(1, Ordering::SeqCst);
            let counted = Counted(counter.clone());
            Body::from_stream(futures::stream::repeat_with(move || {
                let _ = &counted;
                Ok::<_, io::Error>(vec![b'x'; 16 << 10])
            }))
        });
        let trickle = get(async || {
            let parts = futures::stream::unfold(0, async |n| {
                tokio::time::sleep(Duration::from_millis(900)).await;
                (n < 3).then_some((Ok::<_, io::Error>("part "), n + 1))
            });
            Body::from_stream(Box::pin(parts))
        });
        let slow = get(async || {
            tokio::time::sleep(Duration::from_millis(1200)).await;
            "slow"
        });
        let length = post(async |body: Body| match axum::body::to_bytes(body, 1 << 20).await {
            Ok(bytes) => Ok(bytes.len().to_string()),
            Err(error) => Err(super::super::ApiError::body_failed(&error)),
        });
        let router = Router::new()
            .route("/", endless)
            .route("/fine", get(async || "fine"))
            .route("/slow", slow)
            .route("/trickle", trickle)
            .route("/length", length);
        let listener = bind("127.0.0.1:0".parse().expect("is an address")).expect("a port is free");
        let address = listener.local_addr().expect("is bound");
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(serve(listener, router, settings, async move {
            let _ = stopped.await;
        }));
        Self { address, streams, stop: Some(stop), task }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("the server listens")
    }

    /// Sends bytes on a connection of their own; what comes back until its end, and how long that took.
    async fn send(&self, bytes: &str) -> (String, Duration) {
        let mut stream = self.connect().await;
        stream.write_all(bytes.as_bytes()).await.expect("is taken");
        let begun = Instant::now();
        (read_all(&mut stream).await, begun.elapsed())
    }

    /// That somebody else is answered at once.
    async fn assert_answers(&self) {
        let (answer, took) = self.send("GET /fine HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("fine"), "{answer}");
        assert!(took < Duration::from_millis(400), "{took:?}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Until the server ends it; a reset is an end.
async fn read_all(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes)).await;
    let _ = read.expect("the server ends the connection");
    String::from_utf8_lossy(&bytes).into_owned()
}

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_come_is_given_up() {
    let server = Server::start(short()).await;
    for part in ["", "G", "GET /fine HTTP/1.1\r\nhost: a\r\n", "PRI * HTTP/2.0\r\n"] {
        let (answer, took) = server.send(part).await;
        assert!(!answer.contains("200"), "{part:?}: {answer}");
        assert!((400..1500).contains(&took.as_millis()), "{part:?}: {took:?}");
    }
    // Byte after byte is no better.
    let mut stream = server.connect().await;
    let begun = Instant::now();
    for byte in "GET /fine HTTP/1.1\r\nx-filler: ".bytes().chain(std::iter::repeat(b'x')) {
        if stream.write_all(&[byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_ends_and_the_next_head_has_its_time() {
    let server = Server::start(short()).await;
    let request = "GET /fine HTTP/1.1\r\nhost: a\r\n\r\n";
    let (answer, took) = server.send(request).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!((1300..3500).contains(&took.as_millis()), "{took:?}");
    let (_, took) = server.send(&format!("{request}GET /fi")).await;
    assert!(took < Duration::from_secs(4), "a second head that does not end: {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_too_long_is_refused() {
    let server = Server::start(ServeSettings::default()).await;
    let request = |bytes| format!("GET /fine HTTP/1.1\r\nhost: a\r\nx-filler: {}\r\n\r\n", "x".repeat(bytes));
    let (answer, _) = server.send(&request(HEAD_BYTES + 1000)).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let many: String = (0..200).map(|i| format!("x-{i}: y\r\n")).collect();
    let (answer, _) = server.send(&format!("GET /fine HTTP/1.1\r\nhost: a\r\n{many}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    server.assert_answers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_come_is_408_and_the_end() {
    let server = Server::start(short()).await;
    let head = "POST /length HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n";
    let (answer, took) = server.send(&format!("{head}abc")).await;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("\"body_timeout\""), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("connection: close"), "{answer}");
    assert!((300..1500).contains(&took.as_millis()), "{took:?}");
    // One byte now and then is no better.
    let mut stream = server.connect().await;
    stream.write_all(head.as_bytes()).await.expect("is taken");
    let (mut reading, mut writing) = stream.split();
    let trickle = async {
        while writing.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let mut answer = [0; 12];
    tokio::select! {
        read = reading.read_exact(&mut answer) => { read.expect("is answered"); }
        () = trickle => panic!("cut before there was an answer"),
    }
    assert_eq!(&answer, b"HTTP/1.1 408");
    let (answer, _) = server.send(&format!("{head}{}", "x".repeat(100))).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("100"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_is_cut_and_who_waits_is_not() {
    let server = Server::start(short()).await;
    let mut silent = server.connect().await;
    silent.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("is taken");
    let mut reader = server.connect().await;
    reader.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("is taken");
    // This one reads slowly but on and on, for longer than anybody may be silent.
    let mut buffer = vec![0; 256 << 10];
    for _ in 0..30 {
        assert!(reader.read(&mut buffer).await.expect("is not cut") > 0);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(server.streams.load(Ordering::SeqCst), 1, "only the reader's stream is left");
    // A server that takes its time between parts is no client's fault.
    let (answer, _) = server.send("GET /trickle HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert_eq!(answer.matches("part").count(), 3, "{answer}");
    drop(silent);
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("is short").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_stream_that_nobody_reads_is_cut() {
    let server = Server::start(short()).await;
    let mut stream = server.connect().await;
    // Ten bytes of an answer may be sent, and a ping keeps the connection itself awake.
    let settings = frame(4, 0, 0, &[0, 4, 0, 0, 0, 10]);
    let get = frame(1, 5, 1, &[0x82, 0x86, 0x84, 0x41, 1, b'a']);
    let hello = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &settings, &get].concat();
    stream.write_all(&hello).await.expect("is taken");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(server.streams.load(Ordering::SeqCst), 1, "the stream began");
    let begun = Instant::now();
    while stream.write_all(&frame(6, 0, 0, b"12345678")).await.is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(5), "it is not cut");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(server.streams.load(Ordering::SeqCst), 0, "its answer is dropped");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_without_a_request_make_room() {
    let patience = Patience { head: Duration::from_secs(60), ..Patience::default() };
    let server = Server::start(ServeSettings { max_connections: 4, patience, ..short() }).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(server.connect().await);
    }
    server.assert_answers().await;
    // A connection with a request stays, however many come.
    let mut busy = server.connect().await;
    busy.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.expect("is taken");
    tokio::time::sleep(Duration::from_millis(100)).await;
    for _ in 0..20 {
        silent.push(server.connect().await);
    }
    let answer = read_all(&mut busy).await;
    assert!(answer.ends_with("slow"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_slow_heads_disturb_nobody() {
    let patience = Patience { head: Duration::from_secs(3), ..Patience::default() };
    let server = Server::start(ServeSettings { patience, ..ServeSettings::default() }).await;
    let mut slow = Vec::new();
    for _ in 0..500 {
        let mut stream = server.connect().await;
        slow.push(tokio::spawn(async move {
            for byte in b"GET /fine HTTP/1.1\r\nhost: aaaaaaaaaaaaaaaaaaaaaaaaaa" {
                if stream.write_all(&[*byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }));
    }
    for _ in 0..50 {
        server.assert_answers().await;
    }
    // All are gone after their time, with a second to notice it: writing to them fails then.
    let all = futures::future::join_all(slow);
    tokio::time::timeout(Duration::from_secs(10), all).await.expect("they are cut");
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_lets_requests_end_and_nothing_else() {
    let mut server = Server::start(ServeSettings::default()).await;
    let mut idle = server.connect().await;
    idle.write_all(b"GET /fine HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("is taken");
    let mut busy = server.connect().await;
    busy.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("is taken");
    let silent = server.connect().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    server.stop.take().expect("runs").send(()).expect("listens");
    assert!(read_all(&mut idle).await.ends_with("fine"));
    assert!(read_all(&mut busy).await.ends_with("slow"));
    let ended = tokio::time::timeout(Duration::from_secs(2), &mut server.task).await;
    ended.expect("all is over").expect("does not panic").expect("the listener did not fail");
    drop(silent);
    assert!(TcpStream::connect(server.address).await.is_err(), "nobody listens any more");
}

/// A TLS client that trusts one certificate.
async fn shake(address: SocketAddr, cert: &str, alpn: &[u8]) -> io::Result<(Vec<u8>, String)> {
    use rustls::pki_types::pem::PemObject as _;
    let cert = rustls::pki_types::CertificateDer::from_pem_file(fixture(cert)).expect("is a certificate");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(cert).expect("can be trusted");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = config.expect("has versions").with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let name = rustls::pki_types::ServerName::try_from("localhost").expect("is a name");
    let stream = TcpStream::connect(address).await?;
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    let chosen = stream.get_ref().1.alpn_protocol().unwrap_or_default().to_vec();
    let mut answer = Vec::new();
    if alpn == b"http/1.1" {
        stream.write_all(b"GET /fine HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
        let _ = stream.read_to_end(&mut answer).await;
    }
    Ok((chosen, String::from_utf8_lossy(&answer).into_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_and_a_slow_handshake_holds_up_nobody() {
    let files = TlsFiles { cert: fixture("cert.pem"), key: fixture("key.pem") };
    let tls = Some(Arc::new(Tls::load(files).expect("the fixture can be used")));
    let server = Server::start(ServeSettings { tls, ..short() }).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(server.connect().await);
    }
    let begun = Instant::now();
    let (alpn, answer) = shake(server.address, "cert.pem", b"http/1.1").await.expect("is let in");
    assert!(begun.elapsed() < Duration::from_millis(450), "{:?}", begun.elapsed());
    assert_eq!(alpn, b"http/1.1");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("fine"), "{answer}");
    assert_eq!(shake(server.address, "cert.pem", b"h2").await.expect("is let in").0, b"h2");
    assert!(
        shake(server.address, "other_cert.pem", b"h2").await.is_err(),
        "another certificate is not trusted"
    );
    // Who does not shake hands, or speaks plainly, is cut.
    for stream in &mut silent {
        assert_eq!(read_all(stream).await, "");
    }
    let (plain, _) = server.send("GET /fine HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(!plain.contains("fine"), "{plain}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_read_anew_and_a_bad_one_changes_nothing() {
    let dir = tempfile::tempdir().expect("a folder can be made");
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let copy = |from: &str, to: &Path| std::fs::copy(fixture(from), to).expect("can be copied");
    copy("cert.pem", &cert);
    copy("key.pem", &key);
    let tls = Arc::new(Tls::load(TlsFiles { cert: cert.clone(), key: key.clone() }).expect("can be used"));
    let server = Server::start(ServeSettings { tls: Some(tls.clone()), ..short() }).await;
    assert!(shake(server.address, "cert.pem", b"h2").await.is_ok());
    copy("other_cert.pem", &cert);
    let error = format!("{:#}", tls.reload().expect_err("the key is another's"));
    assert!(error.contains("do not go together"), "{error}");
    assert!(shake(server.address, "cert.pem", b"h2").await.is_ok(), "the old one is still spoken");
    copy("other_key.pem", &key);
    tls.reload().expect("now they go together");
    assert!(shake(server.address, "other_cert.pem", b"h2").await.is_ok());
    assert!(shake(server.address, "cert.pem", b"h2").await.is_err());
}

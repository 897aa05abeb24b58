//! Requests that are none: fuzzed JSON, headers and framing, over real sockets. None may bring the server down, and
//! none is answered with a server's error.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Limits, Server};

/// Numbers that are the same in every run (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

const PATHS: [&str; 14] = [
    "/generate-lite",
    "/v1/completions",
    "/v1/chat/completions",
    "/adapter/train-lite",
    "/rl/collect",
    "/rl/train",
    "/v1/files",
    "/v1/fine_tuning/jobs",
    "/adapter/list",
    "/sources",
    "/health",
    "/adapter/status/x",
    "/nowhere",
    "/docs/",
];

/// A body that could have been good.
fn sound(numbers: &mut Numbers) -> Vec<u8> {
    let bodies = [
        json!({"prompt": "hello", "max_new_tokens": 1, "temperature": 0.5, "stop": ["a"], "stream": false}),
        json!({"model": "fixtures/llama", "prompt": ["a", "b"], "max_tokens": 1, "n": 1, "logprobs": 1}),
        json!({"model": "fixtures/llama", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        json!({"source": "local", "adapter_name": "a", "overrides": {"r": 4, "epochs": 1}}),
        json!({"prompt": "a", "output": "b", "run_id": "r", "meta": {"x": [1, 2.5, null, true]}}),
    ];
    serde_json::to_vec(numbers.of(&bodies)).expect("is JSON")
}

/// Bytes with a few of them changed, gone, doubled, or replaced by what parsers stumble over.
fn mangled(numbers: &mut Numbers, mut bytes: Vec<u8>) -> Vec<u8> {
    const STUMBLES: [&[u8]; 14] = [
        b"\x00",
        b"\xff\xfe",
        b"\"",
        b"{",
        b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
        b"1e999",
        b"-0",
        b"99999999999999999999999999",
        b"\\ud800",
        b"\r\n\r\n",
        b"null",
        "\u{202e}".as_bytes(),
        b"\":\"",
        b"NaN",
    ];
    for _ in 0..1 + numbers.below(6) {
        let at = numbers.below(bytes.len() + 1);
        match numbers.below(5) {
            0 if at < bytes.len() => bytes[at] = numbers.next() as u8,
            1 => bytes.truncate(at),
            2 => {
                let insert = *numbers.of(&STUMBLES);
                bytes.splice(at..at, insert.iter().copied());
            }
            3 if at < bytes.len() => drop(bytes.remove(at)),
            _ => {
                let doubled = bytes[at..bytes.len().min(at + 20)].to_vec();
                bytes.splice(at..at, doubled);
            }
        }
    }
    bytes
}

/// One request that is wrong somewhere: in its body, its headers or its framing.
fn request(numbers: &mut Numbers) -> Vec<u8> {
    let path = *numbers.of(&PATHS);
    let body = sound(numbers);
    let head = |framing: &str| {
        format!("POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\n{framing}\r\n\r\n")
            .into_bytes()
    };
    match numbers.below(6) {
        0 | 1 => {
            let body = mangled(numbers, body);
            [head(&format!("content-length: {}", body.len())), body].concat()
        }
        2 => {
            let head = head(&format!("content-length: {}", body.len()));
            [mangled(numbers, head), body].concat()
        }
        3 => {
            let chunks =
                [format!("{:x}\r\n", body.len()).into_bytes(), body, b"\r\n0\r\n\r\n".to_vec()].concat();
            [head("transfer-encoding: chunked"), mangled(numbers, chunks)].concat()
        }
        4 => {
            let framings = [
                "content-length: 5\r\ntransfer-encoding: chunked",
                "content-length: 5\r\ncontent-length: 6",
                "content-length: -1",
                "content-length: 99999999999999999999",
                "content-length: +5",
                "transfer-encoding: gzip, chunked",
                "transfer-encoding: xchunked",
                "expect: 100-continue\r\ncontent-length: 3",
                "content-encoding: gzip\r\ncontent-length: 3",
                " folded: x",
                "authorization: \u{1}",
                "x-request-id: \u{7f}",
                "last-event-id: 18446744073709551616",
            ];
            let framing = *numbers.of(&framings);
            [head(framing), body].concat()
        }
        _ => {
            let starts = [
                "GET / HTTP/1.0\r\n\r\n",
                "GET http://evil/ HTTP/1.1\r\n\r\n",
                "GET /../../etc/passwd HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET /%00 HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET /adapter/%ff HTTP/1.1\r\nhost: a\r\n\r\n",
                "CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
                "OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
                "TRACE / HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET / HTTP/9.9\r\n\r\n",
                "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x7f\x04\x00\x00\x00\x00\x00",
                "\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03",
                "GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
            ];
            let start = numbers.of(&starts).as_bytes().to_vec();
            mangled(numbers, start)
        }
    }
}

/// Sends one on a connection of its own and says what came back.
async fn send(address: &str, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.expect("the server listens");
    let exchange = async {
        // The server may have refused before it read all.
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = stream.take(64 << 10).read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    tokio::time::timeout(Duration::from_secs(60), exchange).await.expect("each connection ends")
}

async fn throw(count: usize, seed: u64) {
    let server = Server::start(Limits::default()).await;
    let address = server.base.trim_start_matches("http://").to_owned();
    let mut numbers = Numbers(seed);
    let mut answered = 0;
    let mut left = count;
    while left > 0 {
        let batch: Vec<Vec<u8>> = (0..left.min(32)).map(|_| request(&mut numbers)).collect();
        left -= batch.len();
        let answers = futures::future::join_all(batch.iter().map(|bytes| send(&address, bytes))).await;
        for (bytes, answer) in batch.iter().zip(answers) {
            let status = answer.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5));
            answered += usize::from(status.is_some());
            let status: u16 = status.and_then(|digits| digits.parse().ok()).unwrap_or(0);
            // 503 would be the queue of 32 being full of good requests, which 429 is for.
            assert!(status < 500, "{status} for {:?}: {answer}", String::from_utf8_lossy(bytes));
        }
    }
    assert!(answered > count / 2, "{answered} of {count} were answered at all");
    server.idle().await;
    assert_eq!(server.get("/health").await.0, 200);
    assert_eq!(server.post("/generate-lite", &json!({"prompt": "a", "max_new_tokens": 1})).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_malformed_requests_break_nothing() {
    throw(600, 0x9e37_79b9_7f4a_7c15).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "ten thousand requests: cargo test --release --test http malformed -- --ignored"]
async fn ten_thousand_malformed_requests_break_nothing() {
    throw(10_000, 0x2545_f491_4f6c_dd1d).await;
}

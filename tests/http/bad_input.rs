//! What the server refuses, how it says so, and that it goes on.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{ADAPTER, Limits, MODEL, Server};

const GENERATING: [&str; 3] = ["/generate-lite", "/v1/completions", "/v1/chat/completions"];

/// A request that each generating endpoint answers.
fn good(path: &str) -> Value {
    match path {
        "/generate-lite" => json!({"prompt": "Hello", "max_new_tokens": 2}),
        "/v1/completions" => json!({"model": MODEL, "prompt": "Hello", "max_tokens": 2}),
        _ => json!({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}),
    }
}

fn with(path: &str, field: &str, value: &Value) -> Value {
    let mut body = good(path);
    body[field] = value.clone();
    body
}

/// Expects an error and that its envelope is complete; returns status, code and param.
async fn refused(server: &Server, path: &str, body: &Value) -> (u16, String, String) {
    let (status, body) = server.post(path, body).await;
    assert!(status >= 400, "{path} took it: {body}");
    envelope(status, &body)
}

fn envelope(status: u16, body: &Value) -> (u16, String, String) {
    let error = body["error"].as_object().unwrap_or_else(|| panic!("no envelope: {body}"));
    let mut fields: Vec<_> = error.keys().map(String::as_str).collect();
    fields.sort_unstable();
    assert_eq!(fields, ["code", "message", "param", "type"]);
    let text = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
    assert!(!text("message").is_empty() && !text("type").is_empty());
    (status, text("code"), text("param"))
}

#[tokio::test(flavor = "multi_thread")]
async fn values_out_of_range_are_named() {
    let server = Server::start(Limits::default()).await;
    for path in GENERATING {
        assert_eq!(server.post(path, &good(path)).await.0, 200, "{path}");
        let length = if path == "/generate-lite" { "max_new_tokens" } else { "max_tokens" };
        for (field, value) in [
            ("temperature", json!(-1)),
            ("temperature", json!(1e9)),
            ("top_p", json!(2)),
            ("top_p", json!(0)),
            ("top_p", json!(-0.1)),
            ("top_k", json!(-1)),
            ("repetition_penalty", json!(0)),
            ("repetition_penalty", json!(11)),
            (length, json!(0)),
            (length, json!(-5)),
            (length, json!(1_000_000)),
            ("stop", json!("")),
            ("stop", json!(["a", ""])),
            ("stop", json!(vec!["x"; 17])),
        ] {
            let (status, code, param) = refused(&server, path, &with(path, field, &value)).await;
            assert_eq!(
                (status, code.as_str(), param.as_str()),
                (400, "invalid_value", field),
                "{path} {value}"
            );
        }
        for (field, value) in [("temperature", json!("hot")), (length, json!(1.5)), ("stream", json!("yes"))]
        {
            let (status, code, param) = refused(&server, path, &with(path, field, &value)).await;
            assert_eq!(
                (status, code.as_str(), param.as_str()),
                (400, "invalid_type", field),
                "{path} {value}"
            );
        }
        let (status, code, param) = refused(&server, path, &with(path, "temprature", &json!(1))).await;
        assert_eq!((status, code.as_str(), param.as_str()), (400, "unknown_parameter", "temprature"));
        let (status, code, _) = refused(&server, path, &json!({})).await;
        assert_eq!((status, code.as_str()), (400, "missing_parameter"));
        assert_eq!(server.post(path, &good(path)).await.0, 200, "{path} goes on");
    }
    for (field, value) in
        [("logprobs", json!(21)), ("logprobs", json!(-1)), ("prompt", json!("")), ("language", json!("xx"))]
    {
        let body = with("/generate-lite", field, &value);
        let (status, _, param) = refused(&server, "/generate-lite", &body).await;
        assert_eq!((status, param.as_str()), (400, field));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_no_good_json_are_explained() {
    let server = Server::start(Limits::default()).await;
    let send = async |body: Vec<u8>, content_type: &str| {
        let request = server.client.post(format!("{}/generate-lite", server.base)).body(body);
        let response = request.header("content-type", content_type).send().await.expect("the server answers");
        let status = response.status().as_u16();
        envelope(status, &response.json().await.expect("is JSON"))
    };
    let (status, code, _) = send(b"{\"prompt\": \"\xff\xfe\"}".to_vec(), "application/json").await;
    assert_eq!((status, code.as_str()), (400, "invalid_utf8"));
    for broken in
        ["", "{", "{\"prompt\": }", "{\"prompt\": \"a\"} x", "{\"prompt\": NaN}", "{\"prompt\":\"\\ud800\"}"]
    {
        let (status, code, _) = send(broken.into(), "application/json").await;
        assert_eq!((status, code.as_str()), (400, "invalid_json"), "{broken}");
    }
    for other in ["[]", "\"text\"", "null"] {
        let (status, code, _) = send(other.into(), "application/json").await;
        assert_eq!((status, code.as_str()), (400, "invalid_type"), "{other}");
    }
    let (status, code, _) = send(b"prompt=a".to_vec(), "application/x-www-form-urlencoded").await;
    assert_eq!((status, code.as_str()), (415, "unsupported_media_type"));
    let (status, code, _) = send(vec![b' '; 10 << 20], "application/json").await;
    assert_eq!((status, code.as_str()), (413, "body_too_large"));
    let streamed = futures::stream::iter((0..160).map(|_| Ok::<_, std::io::Error>(vec![b' '; 64 << 10])));
    let request = server.client.post(format!("{}/generate-lite", server.base));
    let request =
        request.header("content-type", "application/json").body(reqwest::Body::wrap_stream(streamed));
    let response = request.send().await.expect("the server answers");
    assert_eq!(response.status().as_u16(), 413, "also without a content-length");
    assert_eq!(server.post("/generate-lite", &good("/generate-lite")).await.0, 200, "the server goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_that_do_not_fit_are_refused() {
    let server = Server::start(Limits::default()).await;
    let long = "word ".repeat(2000);
    for path in GENERATING {
        let (field, value) = match path {
            "/v1/chat/completions" => ("messages", json!([{"role": "user", "content": long}])),
            _ => ("prompt", json!(long)),
        };
        let (status, code, param) = refused(&server, path, &with(path, field, &value)).await;
        assert_eq!((status, code.as_str(), param.as_str()), (400, "context_length_exceeded", field));
        let huge = "word ".repeat(60_000);
        let value = match path {
            "/v1/chat/completions" => json!([{"role": "user", "content": huge}]),
            _ => json!(huge),
        };
        let (status, code, param) = refused(&server, path, &with(path, field, &value)).await;
        assert_eq!((status, code.as_str(), param.as_str()), (413, "prompt_too_large", field));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_that_are_not_there_are_an_error_and_never_the_base() {
    let server = Server::start(Limits::default()).await;
    for field in ["adapter", "adapter_path"] {
        let body = with("/generate-lite", field, &json!("no-such-adapter"));
        let (status, code, param) = refused(&server, "/generate-lite", &body).await;
        assert_eq!((status, code.as_str(), param.as_str()), (404, "adapter_not_found", "adapter"));
        for name in ["../../etc/passwd", "adapters/../x", "/etc", "a/b", "UPPER", "a\u{0}b", ".hidden", "a b"]
        {
            let body = with("/generate-lite", field, &json!(name));
            let (status, code, _) = refused(&server, "/generate-lite", &body).await;
            assert_eq!((status, code.as_str()), (400, "invalid_adapter_name"), "{name:?}");
        }
    }
    for path in ["/v1/completions", "/v1/chat/completions"] {
        for name in ["no-such-adapter", "../../etc/passwd", "", "gpt-4o"] {
            let (status, code, param) = refused(&server, path, &with(path, "model", &json!(name))).await;
            assert_eq!(
                (status, code.as_str(), param.as_str()),
                (404, "model_not_found", "model"),
                "{name:?}"
            );
        }
    }
    for name in ["..%2f..%2fetc%2fpasswd", "%2e%2e%2fx", "UPPER", "a%00b", "%ff"] {
        for method in [reqwest::Method::GET, reqwest::Method::DELETE] {
            let url = format!("{}/adapter/{name}", server.base);
            let response = server.client.request(method, url).send().await.expect("answers");
            let status = response.status().as_u16();
            envelope(status, &response.json().await.expect("is JSON"));
            assert_eq!(status, 400, "{name}");
        }
    }
    assert!(server.data.path().join("adapters").join(ADAPTER).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_for_another_model_is_refused_with_the_reason() {
    let server = Server::start(Limits::default()).await;
    let folder = server.data.path().join("adapters/other");
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let from = crate::support::fixture("bloom/adapter").join(file);
        std::fs::copy(from, folder.join(file)).expect("the fixture is there");
    }
    let body = with("/generate-lite", "adapter", &json!("other"));
    let (status, code, param) = refused(&server, "/generate-lite", &body).await;
    assert_eq!((status, code.as_str(), param.as_str()), (422, "adapter_invalid", "adapter"));
    let body = with("/v1/completions", "model", &json!("other"));
    let (status, code, param) = refused(&server, "/v1/completions", &body).await;
    assert_eq!((status, code.as_str(), param.as_str()), (422, "adapter_invalid", "model"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_with_a_hint_and_the_rest_is_answered() {
    let server = Server::start(Limits { max_batch: 1, max_queue: 1 }).await;
    let ask =
        json!({"model": MODEL, "prompt": "Hello", "max_tokens": 400, "ignore_eos": true, "temperature": 0});
    let responses = futures::future::join_all((0..8).map(|_| server.send("/v1/completions", &ask))).await;
    let mut answered = 0;
    for response in responses {
        match response.status().as_u16() {
            200 => answered += 1,
            429 => {
                let hint = response.headers()["retry-after"].to_str().expect("is ASCII").to_owned();
                assert!(hint.parse::<u64>().expect("is seconds") >= 1);
                let (_, code, _) = envelope(429, &response.json().await.expect("is JSON"));
                assert_eq!(code, "queue_full");
            }
            status => panic!("unexpected {status}"),
        }
    }
    assert!((2..8).contains(&answered), "{answered} of 8 were answered, with room for two");
    server.idle().await;
    assert_eq!(server.post("/generate-lite", &good("/generate-lite")).await.0, 200, "the server goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_choices_than_the_server_holds_are_refused() {
    let server = Server::start(Limits { max_batch: 2, max_queue: 2 }).await;
    let (status, code, param) =
        refused(&server, "/v1/completions", &with("/v1/completions", "n", &json!(5))).await;
    assert_eq!((status, code.as_str(), param.as_str()), (422, "too_many_choices", "n"));
    let (status, body) = server.post("/v1/completions", &with("/v1/completions", "n", &json!(4))).await;
    assert_eq!(status, 200, "{body}");
}

/// Sends a request and reads until `until` has come, or not at all when it is empty.
async fn begin(server: &Server, path: &str, body: &Value, until: &str) -> TcpStream {
    let address = server.base.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.expect("the server listens");
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.expect("is open");
    stream.write_all(body.as_bytes()).await.expect("is open");
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(until) {
        let mut buffer = [0; 1024];
        let n = stream.read(&mut buffer).await.expect("is open");
        assert!(n > 0, "ended early: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..n]);
    }
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_vanish_free_their_slots() {
    let server = Server::start(Limits { max_batch: 1, max_queue: 32 }).await;
    let mut ask = json!({"model": MODEL, "prompt": "Hello", "max_tokens": 480, "ignore_eos": true, "n": 4});
    let whole = begin(&server, "/v1/completions", &ask, "").await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(whole);
    ask["stream"] = true.into();
    let streamed = begin(&server, "/v1/completions", &ask, "data: ").await;
    drop(streamed);
    server.idle().await;
    let stats = server.state.engine.stats();
    // Of four choices one after the other, at least those that had not begun when the client left.
    assert!(stats.cancelled >= 4, "{stats:?}");
    assert_eq!(server.post("/generate-lite", &good("/generate-lite")).await.0, 200, "the server goes on");
}

//! Spans to an OpenTelemetry collector: the real process beside a receiver that counts what arrives. Needs the feature
//! `otlp`.
#![cfg(all(unix, feature = "otlp"))]

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "support/program.rs"]
mod program;

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::routing::post;
use program::{Program, serve};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_a_span_at_the_collector_when_the_process_has_ended() {
    let received: Arc<Mutex<Vec<Bytes>>> = Arc::default();
    let keep = received.clone();
    let take = move |body: Bytes| {
        keep.lock().expect("no handler panics").push(body);
        std::future::ready(())
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let collector = format!("http://{}", listener.local_addr().unwrap());
    let server = axum::serve(listener, Router::new().route("/v1/traces", post(take)));
    tokio::spawn(server.into_future());
    let dir = tempfile::tempdir().unwrap();
    let mut command = serve(dir.path(), &[]);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector);
    let mut program = Program::start(command, "answers on ").await;
    for n in 0..3 {
        let request = program.client.post(format!("{}/generate-lite", program.base));
        let request = request.header("x-request-id", format!("traced-{n}"));
        let answer = request.json(&json!({"prompt": "a", "max_new_tokens": 2})).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 200);
    }
    program.signal("TERM");
    assert_eq!(program.ended().await.code(), Some(0), "{:#?}", program.lines());
    let received = received.lock().unwrap().concat();
    // Texts stand in the protobuf as they are.
    let count = |text: &str| received.windows(text.len()).filter(|window| *window == text.as_bytes()).count();
    for n in 0..3 {
        assert_eq!(count(&format!("traced-{n}")), 1, "request {n}: {:#?}", program.lines());
    }
    assert!(count("/generate-lite") >= 3 && count("request_id") >= 3);
    assert!(count("gurukul") >= 1, "the service has a name");
}

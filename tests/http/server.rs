//! Adapters, health, metrics, documentation, and what is true of every route.

use serde_json::json;

use crate::support::{ADAPTER, CONTEXT, Limits, MODEL, Server, copy_adapter};

#[tokio::test(flavor = "multi_thread")]
async fn adapters_are_listed_shown_and_deleted() {
    let server = Server::start(Limits::default()).await;
    let (status, body) = server.get("/adapter/list").await;
    assert_eq!(status, 200);
    assert_eq!(body["adapters"].as_array().expect("is a list").len(), 1);
    assert_eq!(body["adapters"][0]["name"], ADAPTER);
    assert_eq!(body["adapters"][0]["rank"], 4);
    let (status, body) = server.get(&format!("/adapter/{ADAPTER}")).await;
    assert_eq!((status, &body["name"]), (200, &json!(ADAPTER)));

    let delete = |name: &str| server.client.delete(format!("{}/adapter/{name}", server.base)).send();
    let gone = delete(ADAPTER).await.expect("the server answers");
    assert_eq!(gone.status().as_u16(), 200);
    assert!(!server.data.path().join("adapters").join(ADAPTER).exists());
    assert_eq!(server.get(&format!("/adapter/{ADAPTER}")).await.0, 404);
    assert_eq!(delete(ADAPTER).await.expect("the server answers").status().as_u16(), 404);

    copy_adapter(&server.data.path().join("adapters/new-one"));
    assert_eq!(server.get("/adapter/new-one").await.0, 200, "one that came while the server runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_the_model_and_the_load() {
    let server = Server::start(Limits::default()).await;
    let (status, body) = server.get("/health").await;
    assert_eq!((status, &body["status"]), (200, &json!("ok")));
    assert_eq!(server.get("/health/live").await, (200, json!({"status": "live"})));
    assert_eq!(server.get("/health/ready").await, (200, json!({"status": "ready", "reason": null})));
    assert_eq!(body["device"], "cpu");
    assert_eq!(body["model"]["id"], MODEL);
    assert_eq!(body["model"]["context_length"], CONTEXT);
    assert_eq!(body["model"]["parameters"], 133_440);
    assert!(body["memory"]["weight_bytes"].as_u64().expect("is a count") >= 4 * 133_000);
    assert_eq!(body["queue"], json!({"waiting": 0, "limit": 32}));
    assert_eq!(body["running"]["requests"], 0);
    assert!(body["kv_cache"]["capacity_tokens"].as_u64().expect("is a count") >= 512);
    assert_eq!(body["adapters"], json!([]));
    server.post("/generate-lite", &json!({"prompt": "a", "adapter": ADAPTER, "max_new_tokens": 2})).await;
    server.idle().await;
    let (_, body) = server.get("/health").await;
    assert_eq!(body["adapters"][0]["name"], ADAPTER);
    assert_eq!(body["running"]["finished"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_engine_shows_in_health_and_refuses_with_a_hint() {
    let server = Server::start(Limits::default()).await;
    let engine = server.state.engine.clone();
    tokio::task::spawn_blocking(move || engine.shutdown()).await.expect("the engine stops");
    let (status, body) = server.get("/health").await;
    assert_eq!((status, &body["status"]), (503, &json!("stopping")));
    assert_eq!(server.get("/health/live").await.0, 200);
    let (status, body) = server.get("/health/ready").await;
    assert_eq!((status, &body["status"]), (503, &json!("stopping")));
    let response = server.send("/generate-lite", &json!({"prompt": "a"})).await;
    assert_eq!(response.status().as_u16(), 503);
    assert!(response.headers().contains_key("retry-after"));
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_requests_and_tokens() {
    let server = Server::start(Limits::default()).await;
    server.post("/generate-lite", &json!({"prompt": "a", "max_new_tokens": 3})).await;
    server.get("/no-such-route-for-metrics").await;
    server.idle().await;
    let response = server.client.get(format!("{}/metrics", server.base)).send().await.expect("answers");
    assert!(response.headers()["content-type"].to_str().expect("is ASCII").starts_with("text/plain"));
    let text = response.text().await.expect("is text");
    let value = |start: &str| -> f64 {
        let line = text.lines().find(|line| line.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no {start} in {text}"));
        line.rsplit(' ').next().expect("has a value").parse().expect("is a number")
    };
    let answered = "gurukul_http_requests_total{route=\"/generate-lite\",method=\"POST\",status=\"200\"}";
    assert!(value(answered) >= 1.0);
    assert!(value("gurukul_generation_time_to_first_token_seconds_count") >= 1.0);
    assert!(value("gurukul_generation_duration_seconds_count") >= 1.0);
    assert!(value("gurukul_engine_generated_tokens_total") >= 1.0);
    assert!(value("gurukul_engine_steps_total") >= 1.0);
    assert!(value("gurukul_engine_busy_seconds_total") > 0.0);
    assert!(value("gurukul_engine_batch_sequences_count") >= 1.0);
    assert!(value("gurukul_generation_time_between_tokens_seconds_count") >= 1.0);
    assert!(value("gurukul_adapter_generated_tokens_total{adapter=\"(base)\"}") >= 3.0);
    assert!(value("gurukul_memory_planned_bytes{part=\"weights\"}") >= 4.0 * 133_000.0);
    assert!(value("process_start_time_seconds") > 1.7e9);
    assert!(value("gurukul_engine_kv_cache_capacity_tokens") >= 512.0);
    assert!(value("process_resident_memory_bytes") > 0.0);
    assert!(text.contains("route=\"none\",method=\"GET\",status=\"404\""), "{text}");
    assert!(!text.contains("no-such-route-for-metrics"), "a path that a client made up is no label");
}

#[tokio::test(flavor = "multi_thread")]
async fn documentation_comes_from_the_binary_alone() {
    let server = Server::start(Limits::default()).await;
    let (status, document) = server.get("/openapi.json").await;
    assert_eq!(status, 200);
    assert!(document["paths"]["/generate-lite"]["post"].is_object());
    let page = server.client.get(format!("{}/docs", server.base)).send().await.expect("follows to /docs/");
    assert_eq!(page.url().path(), "/docs/");
    let html = page.text().await.expect("is text");
    let assets = html.split(['"', '\'']).filter(|s| s.ends_with(".js") || s.ends_with(".css"));
    let mut seen = 0;
    for asset in assets {
        assert!(!asset.contains("//"), "{asset} is on another host");
        let url = format!("{}/docs/{}", server.base, asset.trim_start_matches("./"));
        let response = server.client.get(url).send().await.expect("the server answers");
        assert_eq!(response.status().as_u16(), 200, "{asset}");
        seen += 1;
    }
    assert!(seen >= 3, "{html}");
    let start = server.client.get(format!("{}/docs/swagger-initializer.js", server.base));
    let script = start.send().await.expect("answers").text().await.expect("is text");
    assert!(script.contains("/openapi.json"), "{script}");
    assert!(!script.contains("petstore"), "{script}");
    assert_eq!(server.get("/docs/no-such-file").await.0, 404);
    let (status, index) = server.get("/").await;
    assert_eq!((status, &index["model"]), (200, &json!(MODEL)));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_response_has_an_id_and_every_error_the_envelope() {
    let server = Server::start(Limits::default()).await;
    let request = server.client.get(format!("{}/health", server.base)).header("x-request-id", "mine-1");
    let response = request.send().await.expect("the server answers");
    assert_eq!(response.headers()["x-request-id"], "mine-1");

    let missing = server.client.get(format!("{}/nowhere", server.base)).send().await.expect("answers");
    assert!(missing.headers().contains_key("x-request-id"));
    assert_eq!(missing.status().as_u16(), 404);
    let body: serde_json::Value = missing.json().await.expect("is JSON");
    assert_eq!(body["error"]["code"], "not_found");

    let wrong = server.client.get(format!("{}/generate-lite", server.base)).send().await.expect("answers");
    assert_eq!(wrong.status().as_u16(), 405);
    assert_eq!(wrong.headers()["allow"], "POST");
    let body: serde_json::Value = wrong.json().await.expect("is JSON");
    assert_eq!(body["error"]["code"], "method_not_allowed");
}

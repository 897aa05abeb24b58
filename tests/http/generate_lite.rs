//! `/generate-lite`: what it gives.

use serde_json::{Value, json};

use crate::support::{ADAPTER, CONTEXT, Limits, MODEL, Server};

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_has_every_field_of_the_contract() {
    let server = Server::start(Limits::default()).await;
    let (status, body) =
        server.post("/generate-lite", &json!({"prompt": "Hello", "max_new_tokens": 8})).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["prompt"], "Hello");
    assert!(body["generated_text"].is_string() && body["raw_text"].is_string());
    assert_eq!(body["language"], Value::Null);
    assert_eq!((&body["adapter"], &body["adapter_generation"]), (&Value::Null, &Value::Null));
    assert!(["stop", "length"].contains(&body["finish_reason"].as_str().expect("is a text")));
    assert!(body["usage"]["prompt_tokens"].as_u64().expect("is a count") >= 1);
    let generated = body["usage"]["completion_tokens"].as_u64().expect("is a count");
    assert!((1..=8).contains(&generated));
    assert!(body["latency_s"].as_f64().expect("is a time") > 0.0);
    let parameters = &body["parameters"];
    assert_eq!(parameters["max_new_tokens"], 8);
    assert_eq!(parameters["temperature"], 0.7);
    assert_eq!(parameters["top_p"], 0.9);
    assert_eq!(parameters["top_k"], 50);
    assert_eq!(parameters["repetition_penalty"], 1.1);
    assert_eq!(parameters["do_sample"], true);
    assert!(parameters["seed"].is_i64());
    assert!(body.get("logprobs").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reported_seed_gives_the_same_answer_again() {
    let server = Server::start(Limits::default()).await;
    let ask = json!({"prompt": "Hello", "max_new_tokens": 24, "temperature": 1.5, "top_k": 0, "top_p": 1.0});
    let (_, first) = server.post("/generate-lite", &ask).await;
    let with_seed = |seed: &Value| {
        let mut ask = ask.clone();
        ask["seed"] = seed.clone();
        ask
    };
    let (_, again) = server.post("/generate-lite", &with_seed(&first["parameters"]["seed"])).await;
    assert_eq!(first["raw_text"], again["raw_text"]);
    let (_, negative) = server.post("/generate-lite", &with_seed(&json!(-7))).await;
    assert_eq!(negative["parameters"]["seed"], -7);
    let mut texts = std::collections::HashSet::new();
    for seed in 0..8 {
        let (_, body) = server.post("/generate-lite", &with_seed(&json!(seed))).await;
        texts.insert(body["raw_text"].to_string());
    }
    assert!(texts.len() > 1, "other seeds give other answers");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_sampling_the_answer_is_greedy() {
    let server = Server::start(Limits::default()).await;
    let base = json!({"prompt": "Hello", "max_new_tokens": 16});
    let with = |more: Value| {
        let mut ask = base.clone();
        ask.as_object_mut().expect("is an object").extend(more.as_object().expect("is one").clone());
        ask
    };
    let (_, by_flag) = server.post("/generate-lite", &with(json!({"do_sample": false, "seed": 1}))).await;
    let (_, by_temperature) =
        server.post("/generate-lite", &with(json!({"temperature": 0, "seed": 2}))).await;
    assert_eq!(by_flag["raw_text"], by_temperature["raw_text"]);
    for body in [by_flag, by_temperature] {
        assert_eq!(body["parameters"]["do_sample"], false);
        assert_eq!(body["parameters"]["temperature"], 0.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_change_the_answer_under_each_of_their_names() {
    let server = Server::start(Limits::default()).await;
    let ask = async |field: &str, name: &str| {
        let mut ask = json!({"prompt": "Hello", "max_new_tokens": 16, "do_sample": false});
        ask[field] = name.into();
        let (status, body) = server.post("/generate-lite", &ask).await;
        assert_eq!(status, 200, "{body}");
        body
    };
    let base = ask("adapter", "none").await;
    assert_eq!(base["adapter"], Value::Null);
    assert_eq!(base["raw_text"], ask("adapter_path", "").await["raw_text"]);
    let path = format!("adapters/{ADAPTER}");
    for (field, name) in [("adapter", ADAPTER), ("adapter_path", ADAPTER), ("adapter_path", path.as_str())] {
        let body = ask(field, name).await;
        assert_eq!((&body["adapter"], &body["adapter_generation"]), (&json!(ADAPTER), &json!(1)));
        assert_ne!(body["raw_text"], base["raw_text"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn base_model_must_be_the_loaded_one() {
    let server = Server::start(Limits::default()).await;
    let ask = |model: &str| json!({"prompt": "a", "max_new_tokens": 1, "base_model": model});
    assert_eq!(server.post("/generate-lite", &ask(MODEL)).await.0, 200);
    let (status, body) = server.post("/generate-lite", &ask("bigscience/bloomz-560m")).await;
    assert_eq!(status, 409);
    assert_eq!(body["error"]["param"], "base_model");
    assert!(body["error"]["message"].as_str().expect("is a text").contains(MODEL), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_language_comes_from_the_request_or_the_prompt() {
    let server = Server::start(Limits::default()).await;
    let ask = |prompt: &str, language: Value, clean: bool| {
        let sampling = json!({"seed": 3, "max_new_tokens": 40});
        let mut ask = json!({"prompt": prompt, "language": language, "clean": clean});
        ask.as_object_mut().expect("is one").extend(sampling.as_object().expect("is one").clone());
        ask
    };
    let (_, body) = server.post("/generate-lite", &ask("Hello", json!("hi"), true)).await;
    assert_eq!(body["language"], "hi");
    let prompt = "Translate English to Tamil: Good morning";
    let (_, body) = server.post("/generate-lite", &ask(prompt, Value::Null, true)).await;
    assert_eq!(body["language"], "ta");
    let (raw, cleaned) =
        (body["raw_text"].as_str().expect("is one"), body["generated_text"].as_str().expect("is one"));
    assert!(cleaned.len() <= raw.len());
    let (_, body) = server.post("/generate-lite", &ask(prompt, Value::Null, false)).await;
    assert_eq!(body["generated_text"], body["raw_text"], "clean=false keeps the text");
    assert_eq!(body["raw_text"], raw, "cleaning does not change what is generated");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_text_ends_the_answer_before_it() {
    let server = Server::start(Limits::default()).await;
    let mut ask = json!({"prompt": "Hello", "max_new_tokens": 40, "do_sample": false});
    let (_, whole) = server.post("/generate-lite", &ask).await;
    let text = whole["raw_text"].as_str().expect("is a text").to_owned();
    let stop: String = text.chars().skip(4).take(2).collect();
    assert_eq!(stop.chars().count(), 2, "the answer is too short for this test: {text:?}");
    for stops in [json!(stop), json!([stop, "never there \u{1f600}"])] {
        ask["stop"] = stops;
        let (_, body) = server.post("/generate-lite", &ask).await;
        let expected = &text[..text.find(&stop).expect("is there")];
        assert_eq!(body["raw_text"], expected);
        assert_eq!(body["finish_reason"], "stop");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_are_those_of_the_generated_tokens() {
    let server = Server::start(Limits::default()).await;
    let ask = json!({"prompt": "Hello", "max_new_tokens": 6, "do_sample": false, "repetition_penalty": 1.0, "logprobs": 3});
    let (_, body) = server.post("/generate-lite", &ask).await;
    let tokens = body["logprobs"].as_array().expect("is a list");
    assert_eq!(tokens.len() as u64, body["usage"]["completion_tokens"].as_u64().expect("is a count"));
    for token in tokens {
        assert!(token["logprob"].as_f64().expect("is a number") <= 0.0);
        let top = token["top"].as_array().expect("is a list");
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["token_id"], token["token_id"], "greedy takes the likeliest");
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_adds_up_to_the_whole_answer() {
    let server = Server::start(Limits::default()).await;
    let mut ask = json!({"prompt": "Hello", "max_new_tokens": 30, "seed": 5});
    let (_, whole) = server.post("/generate-lite", &ask).await;
    ask["stream"] = true.into();
    let lines = server.stream("/generate-lite", &ask).await;
    assert_eq!(lines.last().map(String::as_str), Some("[DONE]"));
    let events: Vec<Value> =
        lines[..lines.len() - 1].iter().map(|line| serde_json::from_str(line).expect("is JSON")).collect();
    let (result, tokens) = events.split_last().expect("has events");
    let text: String = tokens.iter().map(|event| event["text"].as_str().expect("is a text")).collect();
    assert_eq!(text, whole["raw_text"].as_str().expect("is a text"));
    for field in ["prompt", "generated_text", "raw_text", "finish_reason", "usage", "parameters"] {
        assert_eq!(result[field], whole[field], "{field}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_length_is_cut_to_the_context() {
    let server = Server::start(Limits::default()).await;
    let mut low = 1;
    let mut high = 4 * CONTEXT;
    // The longest prompt of this shape that leaves room for an answer.
    while low + 1 < high {
        let middle = (low + high) / 2;
        let ask = json!({"prompt": "a ".repeat(middle), "do_sample": false, "max_new_tokens": 1});
        if server.post("/generate-lite", &ask).await.0 == 200 { low = middle } else { high = middle }
    }
    let (status, body) =
        server.post("/generate-lite", &json!({"prompt": "a ".repeat(low), "do_sample": false})).await;
    assert_eq!(status, 200, "{body}");
    assert!(
        body["parameters"]["max_new_tokens"].as_u64().expect("is a count") < 100,
        "{}",
        body["parameters"]
    );
}

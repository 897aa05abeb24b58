//! The OpenAI endpoints: what they give, field by field, and against golden continuations.

use gurukul::model::tokenizer::Special;
use serde_json::{Value, json};

use crate::support::{ADAPTER, CONTEXT, Limits, MODEL, Server, fixture};

fn chunks(lines: &[String]) -> Vec<Value> {
    assert_eq!(lines.last().map(String::as_str), Some("[DONE]"));
    lines[..lines.len() - 1].iter().map(|line| serde_json::from_str(line).expect("is JSON")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_completions_parity_with_transformers() {
    let server = Server::start(Limits::default()).await;
    let text = std::fs::read_to_string(fixture("llama/greedy.json")).expect("the fixture is there");
    let golden: Vec<Value> = serde_json::from_str(&text).expect("is JSON");
    for (model, new) in [(MODEL, "new"), (ADAPTER, "new_adapter")] {
        let prompts: Vec<&Value> = golden.iter().map(|case| &case["prompt"]).collect();
        let ask = json!({"model": model, "prompt": prompts, "max_tokens": 12, "temperature": 0});
        let (status, body) = server.post("/v1/completions", &ask).await;
        assert_eq!(status, 200, "{body}");
        assert_eq!((&body["object"], &body["model"]), (&json!("text_completion"), &json!(model)));
        for (index, case) in golden.iter().enumerate() {
            let ids: Vec<u32> = serde_json::from_value(case[new].clone()).expect("are ids");
            let expected = server.state.tokenizer.decode(&ids, Special::Skip).expect("can be decoded");
            assert_eq!(body["choices"][index]["index"], index);
            assert_eq!(body["choices"][index]["text"], expected, "{model} {index}");
            assert_eq!(body["choices"][index]["finish_reason"], "length");
        }
        let prompt_tokens: usize = prompts.iter().map(|p| p.as_array().expect("is a list").len()).sum();
        let usage = json!({"prompt_tokens": prompt_tokens, "completion_tokens": 36, "total_tokens": prompt_tokens + 36});
        assert_eq!(body["usage"], usage);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_and_its_token_ids_are_one_prompt() {
    let server = Server::start(Limits::default()).await;
    let ids = server.state.tokenizer.encode("Hello", gurukul::model::tokenizer::AddSpecial::Yes);
    let ids = ids.expect("can be encoded");
    let ask = |prompt: Value| json!({"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0});
    let (_, by_text) = server.post("/v1/completions", &ask(json!("Hello"))).await;
    for prompt in [json!(["Hello"]), json!(ids), json!([ids])] {
        let (_, body) = server.post("/v1/completions", &ask(prompt)).await;
        assert_eq!(body["choices"], by_text["choices"]);
    }
    let (status, body) = server.post("/v1/completions", &ask(json!([999_999]))).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("prompt")));
}

#[tokio::test(flavor = "multi_thread")]
async fn n_answers_differ_and_come_again_with_their_seed() {
    let server = Server::start(Limits::default()).await;
    let ask =
        json!({"model": MODEL, "prompt": "Hello", "max_tokens": 12, "n": 4, "seed": 11, "temperature": 1.5});
    let (_, first) = server.post("/v1/completions", &ask).await;
    let (_, again) = server.post("/v1/completions", &ask).await;
    assert_eq!(first["choices"], again["choices"]);
    let texts: std::collections::HashSet<_> =
        first["choices"].as_array().expect("is a list").iter().map(|c| c["text"].to_string()).collect();
    assert!(texts.len() > 1, "{texts:?}");
    let mut one = ask.clone();
    one["n"] = 1.into();
    let (_, one) = server.post("/v1/completions", &one).await;
    assert_eq!(one["choices"][0], first["choices"][0], "the first of four is the only one of one");
}

#[tokio::test(flavor = "multi_thread")]
async fn completion_streams_add_up() {
    let server = Server::start(Limits::default()).await;
    let mut ask = json!({
        "model": MODEL, "prompt": ["Hello", "Bye"], "n": 2, "max_tokens": 10, "seed": 3, "logprobs": 2,
        "ignore_eos": true,
    });
    let (_, whole) = server.post("/v1/completions", &ask).await;
    ask["stream"] = true.into();
    ask["stream_options"] = json!({"include_usage": true});
    let chunks = chunks(&server.stream("/v1/completions", &ask).await);
    let (last, parts) = chunks.split_last().expect("has chunks");
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
    assert!(chunks.iter().all(|chunk| chunk["id"] == last["id"]));
    for index in 0..4 {
        let ours: Vec<&Value> =
            parts.iter().map(|c| &c["choices"][0]).filter(|choice| choice["index"] == index).collect();
        let text: String = ours.iter().map(|c| c["text"].as_str().expect("is a text")).collect();
        let expected = &whole["choices"][index];
        assert_eq!(text, expected["text"].as_str().expect("is a text"));
        assert_eq!(ours.last().expect("has an end")["finish_reason"], expected["finish_reason"]);
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let together: Vec<Value> = ours
                .iter()
                .filter_map(|c| c["logprobs"][list].as_array())
                .flat_map(|values| values.iter().cloned())
                .collect();
            assert_eq!(json!(together), expected["logprobs"][list], "{list}");
            assert_eq!(together.len(), 10, "one entry a token");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn echo_puts_the_prompt_before_the_answer() {
    let server = Server::start(Limits::default()).await;
    let mut ask = json!({"model": MODEL, "prompt": "Hello", "max_tokens": 5, "temperature": 0});
    let (_, plain) = server.post("/v1/completions", &ask).await;
    ask["echo"] = true.into();
    let (_, echoed) = server.post("/v1/completions", &ask).await;
    let expected = format!("Hello{}", plain["choices"][0]["text"].as_str().expect("is a text"));
    assert_eq!(echoed["choices"][0]["text"], expected);
    ask["stream"] = true.into();
    let parts = chunks(&server.stream("/v1/completions", &ask).await);
    let text: String = parts.iter().map(|c| c["choices"][0]["text"].as_str().expect("is a text")).collect();
    assert_eq!(text, expected);
    ask["logprobs"] = 1.into();
    let (status, body) = server.post("/v1/completions", &ask).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("echo")));
}

#[tokio::test(flavor = "multi_thread")]
async fn chats_are_answered_whole_and_in_parts() {
    let server = Server::start(Limits::default()).await;
    let mut ask = json!({
        "model": MODEL, "max_completion_tokens": 10, "seed": 4, "n": 2, "logprobs": true, "top_logprobs": 2,
        "ignore_eos": true,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        ],
    });
    let (status, whole) = server.post("/v1/chat/completions", &ask).await;
    assert_eq!(status, 200, "{whole}");
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][1]["message"]["role"], "assistant");
    assert_eq!(whole["usage"]["completion_tokens"], 20);
    ask["messages"][1]["content"] = "Hello".into();
    let (_, same) = server.post("/v1/chat/completions", &ask).await;
    assert_eq!(same["choices"], whole["choices"], "parts of a text are one text");

    ask["stream"] = true.into();
    ask["stream_options"] = json!({"include_usage": true});
    let chunks = chunks(&server.stream("/v1/chat/completions", &ask).await);
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk"));
    let (last, parts) = chunks.split_last().expect("has chunks");
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
    for index in 0..2 {
        let ours: Vec<&Value> =
            parts.iter().map(|c| &c["choices"][0]).filter(|choice| choice["index"] == index).collect();
        assert_eq!(ours[0]["delta"], json!({"role": "assistant", "content": ""}));
        let text: String = ours.iter().filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!(text, whole["choices"][index]["message"]["content"].as_str().expect("is a text"));
        let logprobs: Vec<Value> = ours
            .iter()
            .filter_map(|c| c["logprobs"]["content"].as_array())
            .flat_map(|values| values.iter().cloned())
            .collect();
        assert_eq!(json!(logprobs), whole["choices"][index]["logprobs"]["content"]);
        assert_eq!(logprobs.len(), 10);
        assert_eq!(logprobs[0]["top_logprobs"].as_array().expect("is a list").len(), 2);
        assert_eq!(ours.last().expect("has an end")["finish_reason"], "length");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_goes_on_to_the_end_of_the_context_by_default() {
    let server = Server::start(Limits::default()).await;
    let ask = json!({
        "model": MODEL, "temperature": 0, "ignore_eos": true,
        "messages": [{"role": "user", "content": "Hello"}],
    });
    let (_, body) = server.post("/v1/chat/completions", &ask).await;
    assert_eq!(body["usage"]["total_tokens"], CONTEXT, "{}", body["usage"]);
    assert_eq!(body["choices"][0]["finish_reason"], "length");
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_tokens_end_an_answer() {
    let server = Server::start(Limits::default()).await;
    let text = std::fs::read_to_string(fixture("llama/greedy.json")).expect("the fixture is there");
    let golden: Vec<Value> = serde_json::from_str(&text).expect("is JSON");
    let (prompt, third) = (&golden[1]["prompt"], &golden[1]["new"][2]);
    let ask = json!({
        "model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, "stop_token_ids": [third],
    });
    let (_, body) = server.post("/v1/completions", &ask).await;
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["usage"]["completion_tokens"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_the_base_and_the_adapters() {
    let server = Server::start(Limits::default()).await;
    let (_, body) = server.get("/v1/models").await;
    assert_eq!(body["object"], "list");
    let ids: Vec<_> = body["data"].as_array().expect("is a list").iter().map(|m| m["id"].clone()).collect();
    assert_eq!(ids, [json!(MODEL), json!(ADAPTER)]);
    assert_eq!(body["data"][1]["parent"], MODEL);
    assert_eq!(body["data"][0]["max_model_len"], CONTEXT);
    for id in [MODEL.replace('/', "%2F"), MODEL.to_owned(), ADAPTER.to_owned()] {
        let (status, body) = server.get(&format!("/v1/models/{id}")).await;
        assert_eq!(status, 200, "{id}: {body}");
        assert_eq!(body["object"], "model");
        assert!(body["created"].as_u64().expect("is a time") > 1_600_000_000);
    }
    let (status, body) = server.get("/v1/models/gpt-4o").await;
    assert_eq!((status, &body["error"]["code"]), (404, &json!("model_not_found")));
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_without_support_are_refused_by_name_unless_neutral() {
    let server = Server::start(Limits::default()).await;
    let chat = json!({"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]});
    let completion = json!({"model": MODEL, "max_tokens": 1, "prompt": "a"});
    for (path, base, field, neutral, meant) in [
        ("/v1/chat/completions", &chat, "tools", json!([]), json!([{"type": "function"}])),
        ("/v1/chat/completions", &chat, "tool_choice", json!("none"), json!("required")),
        (
            "/v1/chat/completions",
            &chat,
            "response_format",
            json!({"type": "text"}),
            json!({"type": "json_object"}),
        ),
        ("/v1/chat/completions", &chat, "logit_bias", json!({}), json!({"5": 3})),
        ("/v1/chat/completions", &chat, "presence_penalty", json!(0), json!(0.5)),
        ("/v1/chat/completions", &chat, "frequency_penalty", json!(0.0), json!(-0.5)),
        ("/v1/chat/completions", &chat, "modalities", json!(["text"]), json!(["text", "audio"])),
        ("/v1/chat/completions", &chat, "audio", Value::Null, json!({"voice": "a"})),
        ("/v1/chat/completions", &chat, "reasoning_effort", Value::Null, json!("high")),
        ("/v1/completions", &completion, "suffix", json!(""), json!("end")),
        ("/v1/completions", &completion, "best_of", json!(1), json!(2)),
        ("/v1/completions", &completion, "presence_penalty", json!(0), json!(1)),
        ("/v1/completions", &completion, "logit_bias", Value::Null, json!({"5": 3})),
    ] {
        let with = |value: &Value| {
            let mut body = base.clone();
            body[field] = value.clone();
            body
        };
        let (status, body) = server.post(path, &with(&neutral)).await;
        assert_eq!(status, 200, "{field}: {body}");
        let (status, body) = server.post(path, &with(&meant)).await;
        assert_eq!((status, &body["error"]["param"]), (400, &json!(field)), "{body}");
        assert_eq!(body["error"]["code"], "unsupported_parameter");
    }
    let mut accepted = chat.clone();
    for field in ["user", "service_tier", "safety_identifier", "prompt_cache_key"] {
        accepted[field] = "x".into();
    }
    accepted["metadata"] = json!({"a": "b"});
    accepted["store"] = false.into();
    assert_eq!(server.post("/v1/chat/completions", &accepted).await.0, 200);
}

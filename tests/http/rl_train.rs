//! `POST /rl/train`: what is accepted, with its plan, and everything that is refused, with the field.

use serde_json::{Value, json};

use crate::support::{ADAPTER, Limits, Server};

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_accepted_with_its_plan_and_is_a_job_like_any_other() {
    let server = Server::start(Limits::default()).await;
    let body = json!({
        "mode": "online", "loss": "importance_sampling", "adapter_name": "learnt", "start_from": ADAPTER,
        "prompts": ["say 3", {"prompt": "say 4", "reference": " 4", "language": "hi"}],
        "overrides": {"steps": 2, "group_size": 2, "max_new_tokens": 8},
    });
    let (status, accepted) = server.post("/rl/train", &body).await;
    assert_eq!(status, 202, "{accepted}");
    assert_eq!((&accepted["status"], &accepted["adapter_name"]), (&json!("pending"), &json!("learnt")));
    assert!(accepted["plan"]["training_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{accepted}");
    let id = accepted["job_id"].as_str().expect("is a text");
    let (status, told) = server.get(&format!("/adapter/status/{id}")).await;
    assert_eq!((status, &told["adapter_name"]), (200, &json!("learnt")), "{told}");
    assert_eq!(told["source"], "prompts of the request");
    let job = server.state.jobs.get(id).await.expect("is stored");
    assert_eq!((job.kind.as_str(), &job.spec["config"]["steps"]), ("rl", &json!(2)));
    assert_eq!(job.spec["config"]["loss"], "importance_sampling");
    assert_eq!(job.spec["prompts"]["list"][1]["language"], "hi");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_prompts_those_of_the_settings_are_answered() {
    let server = Server::start(Limits::default()).await;
    let (status, accepted) = server.post("/rl/train", &json!({"mode": "online"})).await;
    assert_eq!(status, 202, "{accepted}");
    assert!(accepted["adapter_name"].as_str().is_some_and(|name| name.starts_with("grpo-")), "{accepted}");
    let job =
        server.state.jobs.get(accepted["job_id"].as_str().expect("is a text")).await.expect("is stored");
    assert_eq!(job.spec["prompts"]["list"].as_array().map(Vec::len), Some(60));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_refused_with_the_field() {
    let server = Server::start(Limits::default()).await;
    let given = json!({"prompt": "p", "output": "o", "run_id": "given", "reward": 0.5});
    assert_eq!(server.post("/rl/collect", &given).await.0, 200);
    let long = "x".repeat(80);
    let cases: Vec<(Value, u16, &str, &str)> = vec![
        (json!({}), 400, "mode", "online or offline"),
        (json!({"mode": "sideways"}), 400, "mode", "online"),
        (json!({"mode": "online", "steps": 3}), 400, "steps", "steps"),
        (json!({"mode": "online", "loss": "dpo"}), 400, "loss", "offline"),
        (json!({"mode": "online", "loss": "ppo_clip", "overrides": {"loss": "dpo"}}), 400, "loss", "once"),
        (json!({"mode": "online", "run_id": "r"}), 400, "run_id", "offline"),
        (json!({"mode": "offline"}), 400, "run_id", "required"),
        (json!({"mode": "offline", "run_id": "../x"}), 400, "run_id", "a-z"),
        (json!({"mode": "offline", "run_id": "unheard"}), 400, "run_id", "no episode"),
        (json!({"mode": "offline", "run_id": "given"}), 400, "run_id", "collect with logprobs"),
        (json!({"mode": "online", "prompts": []}), 400, "prompts", "1 to"),
        (json!({"mode": "online", "prompts": ["a", " "]}), 400, "prompts[1]", "empty"),
        (json!({"mode": "online", "prompts": ["a"], "source": "s"}), 400, "prompts", "one of the two"),
        (json!({"mode": "online", "source": "unheard"}), 400, "source", "no source"),
        (json!({"mode": "online", "config_path": "../x.yaml"}), 400, "config_path", "inside"),
        (
            json!({"mode": "online", "config_path": "none.yaml"}),
            400,
            "config_path",
            "not in the configs folder",
        ),
        (json!({"mode": "online", "adapter_name": "../x"}), 400, "adapter_name", "a-z"),
        (json!({"mode": "online", "adapter_name": "list"}), 400, "adapter_name", "meaning"),
        (json!({"mode": "online", "adapter_name": long}), 400, "adapter_name", "64"),
        (json!({"mode": "online", "start_from": "../x"}), 400, "start_from", "a-z"),
        (json!({"mode": "online", "start_from": "nobody"}), 404, "start_from", "nobody"),
        (json!({"mode": "online", "overrides": {"top_k": 50}}), 400, "overrides.top_k", "take it out"),
        (json!({"mode": "online", "overrides": {"steps": 0}}), 400, "overrides.steps", "from 1"),
        (json!({"mode": "online", "overrides": {"log_run_id": "a/b"}}), 400, "overrides.log_run_id", "a-z"),
        (
            json!({"mode": "online", "overrides": {"max_seq_length": 100_000}}),
            400,
            "max_seq_length",
            "tokens",
        ),
        (
            json!({"mode": "online", "overrides": {"target_modules": ["x"]}}),
            400,
            "target_modules",
            "does not have",
        ),
        (json!({"resume_from": "nothing"}), 404, "resume_from", "no job"),
        (json!({"resume_from": "nothing", "mode": "online"}), 400, "mode", "resume_from"),
    ];
    for (body, wanted, param, words) in cases {
        let (status, answer) = server.post("/rl/train", &body).await;
        let error = &answer["error"];
        assert_eq!(status, wanted, "{body}: {answer}");
        let (of, message) =
            (error["param"].as_str().unwrap_or_default(), error["message"].as_str().unwrap_or_default());
        assert!(of == param || body["mode"] == "sideways", "{body}: {answer}");
        assert!(message.contains(words), "{body}: {answer}");
    }
}

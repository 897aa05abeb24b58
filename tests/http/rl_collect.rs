//! `/rl/collect`: both modes, what is in the log when the answer comes, jobs, and everything that is refused.

use std::collections::BTreeSet;

use gurukul::rl::Episode;
use gurukul::rl::log::episodes;
use serde_json::{Value, json};

use crate::support::{ADAPTER, CONTEXT, Limits, MODEL, Server};

fn log(server: &Server, run: &str) -> Vec<Episode> {
    let all = episodes(&server.data.path().join("rl_runs"), run).expect("can be read");
    all.collect::<Result<_, _>>().expect("every line is an episode")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_given_episode_is_logged_with_its_reward_or_a_computed_one() {
    let server = Server::start(Limits::default()).await;
    let body = json!({
        "prompt": "Translate to Hindi: water", "output": "पानी।", "run_id": "given-1", "env_name": "chat",
        "meta": {"reference": "पानी।", "user": "u-7", "latency_s": 0.25},
    });
    let (status, computed) = server.post("/rl/collect", &body).await;
    assert_eq!(status, 200, "{computed}");
    assert_eq!(computed["output_path"], "rl_runs/given-1.jsonl");
    assert_eq!((&computed["status"], &computed["upload"]), (&json!("completed"), &json!("none")));
    let body = json!({"prompt": "p", "output": "", "run_id": "given-1", "reward": -3.5});
    let (status, given) = server.post("/rl/collect", &body).await;
    assert_eq!((status, &given["rewards"]), (200, &json!([-3.5])));
    let log = log(&server, "given-1");
    assert_eq!(log.len(), 2);
    assert_eq!(
        (log[0].episode_id.as_str(), log[0].episode_index),
        (computed["episode_id"].as_str().unwrap(), 0)
    );
    assert_eq!((log[0].reward, log[0].latency_s), (computed["rewards"][0].as_f64(), Some(0.25)));
    assert_eq!((log[0].env_name.as_str(), log[0].meta.language.as_deref()), ("chat", Some("hi")));
    assert_eq!(log[0].meta.rewards["chrf"], 1.0);
    assert_eq!(log[0].meta.extra["user"], "u-7");
    assert_eq!((log[1].reward, log[1].meta.rewards.len(), log[1].episode_index), (Some(-3.5), 0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_generated_rewarded_and_logged() {
    let server = Server::start(Limits { max_batch: 4, max_queue: 2 }).await;
    let body = json!({
        "prompts": [{"prompt": "say 3", "reference": "three"}, "Translate to Tamil: water"], "episodes": 12, "run_id": "r", "max_new_tokens": 6,
        "seed": 7, "adapter": ADAPTER, "logprobs": true, "temperature": 1.0,
    });
    // More at once than the queue takes: they wait for their turn.
    let (status, collected) = server.post("/rl/collect", &body).await;
    assert_eq!(status, 200, "{collected}");
    let log = log(&server, "r");
    let ids: BTreeSet<&str> = log.iter().map(|episode| episode.episode_id.as_str()).collect();
    let told = collected["episode_ids"].as_array().expect("is a list");
    assert_eq!((log.len(), ids.len(), told.len()), (12, 12, 12));
    assert!(told.iter().all(|id| ids.contains(id.as_str().expect("is a text"))));
    let seeds: BTreeSet<u64> = log.iter().map(|e| e.meta.sampling.as_ref().expect("is kept").seed).collect();
    assert_eq!(seeds.len(), 12, "each has a seed of its own");
    for episode in &log {
        let meta = &episode.meta;
        assert_eq!((meta.adapter.as_deref(), meta.base_model.as_deref()), (Some(ADAPTER), Some(MODEL)));
        let (tokens, logprobs) = (meta.token_ids.as_ref().unwrap(), meta.logprobs.as_ref().unwrap());
        assert!(!tokens.is_empty() && tokens.len() == logprobs.len() && logprobs.iter().all(|l| *l <= 0.0));
        assert!(meta.prompt_token_ids.as_ref().is_some_and(|ids| !ids.is_empty()));
        assert!(episode.latency_s.is_some_and(|seconds| seconds > 0.0) && episode.reward.is_some());
    }
    let tamil = log.iter().filter(|episode| episode.meta.language.as_deref() == Some("ta")).count();
    assert_eq!(tamil, 6);
    let with_reference = log.iter().filter(|episode| episode.meta.rewards.contains_key("chrf")).count();
    assert_eq!(with_reference, 6);
    // The seed of one gives it again, by another way to the same model.
    let one = &log[0];
    let again = json!({
        "prompt": one.prompt, "seed": one.meta.sampling.as_ref().unwrap().seed, "max_new_tokens": 6, "temperature": 1.0,
        "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "adapter": ADAPTER,
    });
    let (_, answer) = server.post("/generate-lite", &again).await;
    assert_eq!(answer["raw_text"], one.output, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn others_are_answered_while_episodes_are_collected() {
    let server = Server::start(Limits { max_batch: 4, max_queue: 1 }).await;
    let body = json!({"prompts": ["say 3"], "episodes": 64, "max_new_tokens": 60, "run_id": "long"});
    let collecting = server.send("/rl/collect", &body);
    let asking = async {
        for _ in 0..20 {
            let (status, answer) =
                server.post("/generate-lite", &json!({"prompt": "a", "max_new_tokens": 2})).await;
            assert_eq!(status, 200, "{answer}");
        }
    };
    let (collected, ()) = tokio::join!(collecting, asking);
    assert_eq!(collected.status().as_u16(), 200);
    assert_eq!(log(&server, "long").len(), 64);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_episodes_are_a_job() {
    let server = Server::start(Limits::default()).await;
    let body = json!({"prompts": ["say 3"], "episodes": 65, "run_id": "many"});
    let (status, accepted) = server.post("/rl/collect", &body).await;
    assert_eq!((status, &accepted["status"]), (202, &json!("pending")), "{accepted}");
    let id = accepted["job_id"].as_str().expect("has an id");
    let (status, job) = server.get(&format!("/adapter/status/{id}")).await;
    assert_eq!((status, &job["kind"], &job["run_id"]), (200, &json!("collect"), &json!("many")));
    assert_eq!(job["adapter_name"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_collected_is_refused_by_field() {
    let server = Server::start(Limits::default()).await;
    let long = "word ".repeat(CONTEXT * 2);
    for (body, param) in [
        (json!({"episodes": 0}), "episodes"),
        (json!({"episodes": 1_000_000}), "episodes"),
        (json!({"episodes": -1}), "episodes"),
        (json!({"episodes": "ten"}), "episodes"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": " \n"}), "prompt"),
        (json!({"prompt": long}), "prompt"),
        (json!({"prompts": []}), "prompts"),
        (json!({"prompts": ["a", ""]}), "prompts[1]"),
        (json!({"prompts": ["a", 7]}), "prompts[1]"),
        (json!({"prompts": [{"prompt": "a", "text": "b"}]}), "prompts[0].text"),
        (json!({"prompts": [{"prompt": "a", "language": "xx"}]}), "prompts[0].language"),
        (json!({"prompts": ["a"], "prompt": "b"}), "prompt"),
        (json!({"prompt": "a", "run_id": "../x"}), "run_id"),
        (json!({"prompt": "a", "run_id": "a/b"}), "run_id"),
        (json!({"prompt": "a", "env_name": "A B"}), "env_name"),
        (json!({"prompt": "a", "language": "klingon"}), "language"),
        (json!({"prompt": "a", "temperature": -1}), "temperature"),
        (json!({"prompt": "a", "top_p": 0}), "top_p"),
        (json!({"prompt": "a", "top_k": -1}), "top_k"),
        (json!({"prompt": "a", "repetition_penalty": 0}), "repetition_penalty"),
        (json!({"prompt": "a", "max_new_tokens": 0}), "max_new_tokens"),
        (json!({"prompt": "a", "stop": ""}), "stop"),
        (json!({"prompt": "a", "reward": 1}), "reward"),
        (json!({"prompt": "a", "meta": {}}), "meta"),
        (json!({"prompt": "a", "upload": true}), "upload"),
        (json!({"prompt": "a", "upload": "nowhere"}), "upload"),
        (json!({"prompt": "a", "upload": 3}), "upload"),
        (json!({"prompt": "a", "epsiodes": 3}), "epsiodes"),
        (json!({"output": "o"}), "prompt"),
        (json!({"prompt": "", "output": "o"}), "prompt"),
        (json!({"prompt": "a", "output": "o", "reward": "high"}), "reward"),
        (json!({"prompt": "a", "output": "o", "run_id": ".."}), "run_id"),
        (json!({"prompt": "a", "output": "o", "episodes": 3}), "episodes"),
        (json!({"prompt": "a", "output": "o", "adapter": "x"}), "adapter"),
        (json!({"prompt": "a", "output": "o", "upload": "nowhere"}), "upload"),
        (json!({"prompt": "a", "output": "o", "meta": {"token_ids": [-1]}}), "meta.token_ids"),
        (json!({"prompt": "a", "output": "o", "meta": {"language": "xx"}}), "meta.language"),
    ] {
        let (status, answer) = server.post("/rl/collect", &body).await;
        let shown: String = body.to_string().chars().take(100).collect();
        assert_eq!(status, 400, "{shown}: {answer}");
        let found = answer["error"]["param"].as_str().unwrap_or_default();
        assert!(found.starts_with(param), "{shown}: {answer}");
    }
    let (status, answer) = server.post("/rl/collect", &json!({"prompt": "a", "adapter": "nobody"})).await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("adapter_not_found")));
    assert_eq!(std::fs::read_dir(server.data.path().join("rl_runs")).expect("is there").count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_json_cannot_say_are_refused() {
    let server = Server::start(Limits::default()).await;
    for body in [
        r#"{"prompt": "a", "output": "o", "reward": NaN}"#,
        r#"{"prompt": "a", "output": "o", "reward": Infinity}"#,
        r#"{"prompt": "a", "output": "o", "reward": 1e999}"#,
        r#"{"prompt": "\ud800", "output": "o"}"#,
        r#"{"prompt": "a", "output": "\udc00 o"}"#,
    ] {
        let request = server.client.post(format!("{}/rl/collect", server.base));
        let response =
            request.header("content-type", "application/json").body(body).send().await.expect("answers");
        let status = response.status().as_u16();
        let answer: Value = response.json().await.expect("is JSON");
        assert_eq!(status, 400, "{body}: {answer}");
        let field = if body.contains("reward") {
            "reward"
        } else if body.contains("ud800") {
            "prompt"
        } else {
            "output"
        };
        assert!(answer["error"]["message"].as_str().is_some_and(|m| m.contains(field)), "{body}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_episodes_and_syncs() {
    let server = Server::start(Limits::default()).await;
    let body = json!({"prompt": "p", "output": "o", "reward": 0.45});
    assert_eq!(server.post("/rl/collect", &body).await.0, 200);
    let response = server.client.get(format!("{}/metrics", server.base)).send().await.expect("answers");
    let text = response.text().await.expect("is text");
    for name in [
        "gurukul_rl_episodes_total{source=\"given\"}",
        "gurukul_rl_reward_bucket{le=\"0.5\"}",
        "gurukul_rl_log_episodes_total",
        "gurukul_rl_log_sync_seconds_bucket",
    ] {
        assert!(text.contains(name), "{name} is missing in {text}");
    }
}

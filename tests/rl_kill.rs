//! Jobs that learn from rewards under `kill -9`: the real program over HTTP, ended hard in the middle of a job and started
//! again. The job goes on by itself and ends with the same bytes as one that was left alone.

#[path = "support/program.rs"]
mod program;

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use self::program::Program;

/// Longer than any job here takes.
const LIMIT: Duration = Duration::from_secs(240);

async fn post(base: &str, path: &str, body: &Value) -> Value {
    let response =
        reqwest::Client::new().post(format!("{base}{path}")).json(body).send().await.expect("answers");
    let status = response.status();
    let text = response.text().await.expect("the body is complete");
    assert!(status.is_success(), "{status}: {text}");
    serde_json::from_str(&text).expect("is JSON")
}

async fn get(base: &str, path: &str) -> Value {
    let response = reqwest::get(format!("{base}{path}")).await.expect("answers");
    response.json().await.expect("is JSON")
}

/// Waits until a job's status is as wanted.
async fn wait_for(base: &str, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let wait = async {
        loop {
            let status = get(base, &format!("/adapter/status/{id}")).await;
            assert_ne!(status["status"], "failed", "{status}");
            if wanted(&status) {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("the job goes on")
}

fn online() -> Value {
    let prompts: Vec<Value> = (0..10)
        .map(|i| json!({"prompt": format!("say the word {i}"), "reference": format!(" the word {i}")}))
        .collect();
    json!({
        "mode": "online", "prompts": prompts, "adapter_name": "learnt",
        "overrides": {
            "steps": 12, "prompts_per_step": 2, "group_size": 4, "updates_per_batch": 2, "max_new_tokens": 12,
            "max_seq_length": 64, "learning_rate": 5e-3, "eval_steps": 4, "save_steps": 2
        }
    })
}

fn adapter(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("adapters/learnt/adapter_model.safetensors")).expect("the adapter is there")
}

fn workplace() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder can be made");
    std::fs::create_dir(dir.path().join("configs")).expect("a folder can be made");
    dir
}

#[tokio::test]
async fn an_online_job_that_was_killed_goes_on_to_the_same_bytes() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let alone = workplace();
    let program = Program::start(alone.path(), &[]).await;
    let id =
        post(&program.base, "/rl/train", &online()).await["job_id"].as_str().expect("is text").to_owned();
    wait_for(&program.base, &id, |status| status["status"] == "completed").await;
    drop(program);

    let killed = workplace();
    let mut program = Program::start(killed.path(), &[]).await;
    let id =
        post(&program.base, "/rl/train", &online()).await["job_id"].as_str().expect("is text").to_owned();
    for step in [3, 7] {
        wait_for(&program.base, &id, |status| {
            assert_ne!(status["status"], "completed", "it ended before it could be killed");
            status["metrics"]["step"].as_u64() >= Some(step)
        })
        .await;
        program = program.again().await;
    }
    let status = wait_for(&program.base, &id, |status| status["status"] == "completed").await;
    assert_eq!(status["metrics"]["step"], 12, "{status}");
    let log = get(&program.base, &format!("/adapter/logs/{id}?limit=1000")).await.to_string();
    assert_eq!(log.matches("going on after step").count(), 2, "{log}");
    let answer =
        json!({"prompt": "say the word 3", "adapter": "learnt", "do_sample": false, "max_new_tokens": 4});
    assert_eq!(post(&program.base, "/generate-lite", &answer).await["adapter"], "learnt");
    assert!(adapter(killed.path()) == adapter(alone.path()), "the same bytes as without the kills");
}

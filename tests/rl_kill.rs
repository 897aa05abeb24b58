//! Jobs that learn from rewards under `kill -9`: the real program over HTTP, ended hard in the middle of a job and started
//! again. The job goes on by itself and ends with the same bytes as one that was left alone.

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "support/program.rs"]
mod program;

use std::path::Path;

use serde_json::{Value, json};

use self::program::Program;

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

/// Starts the job; gives its id.
async fn begin(program: &Program) -> String {
    let (status, job) = program.post("/rl/train", &online()).await;
    assert_eq!(status, 202, "{job}");
    job["job_id"].as_str().expect("is text").to_owned()
}

#[tokio::test]
async fn an_online_job_that_was_killed_goes_on_to_the_same_bytes() {
    let alone = workplace();
    let program = Program::serving(alone.path(), &[]).await;
    let id = begin(&program).await;
    program.job(&id, |job| job["status"] == "completed").await;
    drop(program);

    let killed = workplace();
    let mut program = Program::serving(killed.path(), &[]).await;
    let id = begin(&program).await;
    for step in [3, 7] {
        let reached = |job: &Value| {
            assert_ne!(job["status"], "completed", "it ended before it could be killed");
            job["metrics"]["step"].as_u64() >= Some(step)
        };
        program.job(&id, reached).await;
        // kill -9
        drop(program);
        program = Program::serving(killed.path(), &[]).await;
    }
    let job = program.job(&id, |job| job["status"] == "completed").await;
    assert_eq!(job["metrics"]["step"], 12, "{job}");
    let (_, log) = program.get(&format!("/adapter/logs/{id}?limit=1000")).await;
    assert_eq!(log.to_string().matches("going on after step").count(), 2, "{log}");
    let prompt =
        json!({"prompt": "say the word 3", "adapter": "learnt", "do_sample": false, "max_new_tokens": 4});
    let (status, answer) = program.post("/generate-lite", &prompt).await;
    assert_eq!((status, &answer["adapter"]), (200, &json!("learnt")), "{answer}");
    assert!(adapter(killed.path()) == adapter(alone.path()), "the same bytes as without the kills");
}

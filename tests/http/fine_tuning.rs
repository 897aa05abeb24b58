//! `/v1/fine_tuning/jobs`: jobs as OpenAI's API shows them, and what it refuses.

use serde_json::{Value, json};

use crate::support::MODEL;
use crate::training::{reach, server, submit};

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_shown_as_openai_shows_it() {
    let server = server().await;
    let done = submit(&server, "hindi-v2", json!({"steps": 30})).await;
    reach(&server, &done, "completed").await;
    let runs = submit(&server, "hindi-v3", json!({"steps": 2, "end": "wait"})).await;
    reach(&server, &runs, "running").await;
    let (_, job) = server.get(&format!("/v1/fine_tuning/jobs/ftjob-{done}")).await;
    assert_eq!((&job["object"], &job["status"]), (&json!("fine_tuning.job"), &json!("succeeded")));
    assert_eq!((&job["fine_tuned_model"], &job["model"]), (&json!("hindi-v2"), &json!(MODEL)));
    assert_eq!((&job["trained_tokens"], &job["seed"]), (&json!(3000), &json!(7)));
    let hyperparameters = json!({"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": "auto"});
    assert_eq!(job["hyperparameters"], hyperparameters);
    assert!(job["finished_at"].is_u64() && job["error"].is_null());

    let (_, list) = server.get("/v1/fine_tuning/jobs?limit=1").await;
    assert_eq!((&list["data"][0]["id"], &list["has_more"]), (&json!(format!("ftjob-{runs}")), &json!(true)));
    let (_, list) = server.get(&format!("/v1/fine_tuning/jobs?after=ftjob-{runs}")).await;
    assert_eq!((&list["data"][0]["id"], &list["has_more"]), (&json!(format!("ftjob-{done}")), &json!(false)));

    let (mut after, mut seen) = (String::new(), Vec::new());
    loop {
        let (status, page) =
            server.get(&format!("/v1/fine_tuning/jobs/ftjob-{done}/events?limit=7{after}")).await;
        assert_eq!(status, 200, "{page}");
        let data = page["data"].as_array().expect("is a list").clone();
        after = format!("&after={}", data.last().expect("is not empty")["id"].as_str().expect("is text"));
        seen.extend(data);
        if page["has_more"] == false {
            break;
        }
    }
    let of = |kind: &str| seen.iter().filter(|event| event["type"] == kind).count();
    assert_eq!((of("metrics"), of("message")), (30, 30));
    let newest = seen.iter().find(|event| event["type"] == "metrics").expect("has figures");
    assert_eq!(
        (&newest["data"]["step"], &newest["message"]),
        (&json!(30), &json!("Step 30/30: training loss=3.7000"))
    );

    let (_, checkpoints) = server.get(&format!("/v1/fine_tuning/jobs/ftjob-{done}/checkpoints")).await;
    assert_eq!(checkpoints["data"][0]["fine_tuned_model_checkpoint"], "hindi-v2");
    assert_eq!(
        (&checkpoints["data"][0]["step_number"], &checkpoints["has_more"]),
        (&json!(30), &json!(false))
    );
    let (_, checkpoints) = server.get(&format!("/v1/fine_tuning/jobs/ftjob-{runs}/checkpoints")).await;
    assert_eq!(checkpoints["data"], json!([]));

    let (status, job) = server.post(&format!("/v1/fine_tuning/jobs/ftjob-{runs}/cancel"), &json!({})).await;
    assert_eq!((status, &job["status"], &job["fine_tuned_model"]), (200, &json!("running"), &Value::Null));
    reach(&server, &runs, "cancelled").await;
    let (status, body) = server.post(&format!("/v1/fine_tuning/jobs/ftjob-{runs}/cancel"), &json!({})).await;
    assert_eq!((status, &body["error"]["code"]), (409, &json!("job_state")));
    for path in ["", "/events", "/checkpoints"] {
        let (status, body) = server.get(&format!("/v1/fine_tuning/jobs/ftjob-nowhere{path}")).await;
        assert_eq!((status, &body["error"]["code"]), (404, &json!("job_not_found")), "{path}");
    }
    for query in ["limit=0", "limit=101", "after=ftevent-x", "x=1"] {
        let (status, _) = server.get(&format!("/v1/fine_tuning/jobs/ftjob-{done}/events?{query}")).await;
        assert_eq!(status, 400, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fine_tuning_requests_are_refused_by_field() {
    let server = server().await;
    let file = "file-0123456789abcdef0123456789abcdef";
    let good = json!({"model": MODEL, "training_file": file});
    for (more, status, code, param) in [
        (json!({}), 404, "file_not_found", "training_file"),
        (json!({"training_file": "../../etc/passwd"}), 404, "file_not_found", "training_file"),
        (json!({"model": "gpt-4o"}), 404, "model_not_found", "model"),
        (json!({"model": crate::support::ADAPTER}), 404, "model_not_found", "model"),
        (json!({"validation_file": file}), 400, "unsupported_parameter", "validation_file"),
        (json!({"method": {"type": "dpo"}}), 400, "unsupported_parameter", "method.type"),
        (json!({"hyperparameters": {"n_epochs": "three"}}), 400, "invalid_type", "hyperparameters.n_epochs"),
        (json!({"hyperparameters": {"lr": 3}}), 400, "unknown_parameter", "hyperparameters.lr"),
        (json!({"suffix": "x".repeat(65)}), 400, "invalid_value", "suffix"),
        (json!({"typo": 1}), 400, "unknown_parameter", "typo"),
    ] {
        let mut body = good.clone();
        body.as_object_mut().expect("is an object").extend(more.as_object().expect("is an object").clone());
        let (answered, answer) = server.post("/v1/fine_tuning/jobs", &body).await;
        assert_eq!((answered, &answer["error"]["code"]), (status, &json!(code)), "{more}: {answer}");
        assert_eq!(answer["error"]["param"], param, "{more}");
    }
}

//! Training jobs over HTTP: state, logs, events, ending and going on, and what is refused. The jobs here do what their
//! script says; real training is in `training_run`.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use gurukul::http::TRAIN_KIND;
use gurukul::jobs::{JobHandle, Level, NewJob, Outcome, Stop, Work};
use serde_json::{Value, json};

use crate::support::{Limits, Server};

const SOON: Duration = Duration::from_secs(30);

/// Work by its script: `steps`, `pause_ms` between them, and `end`: `complete`, `fail`, `panic` or `wait`.
pub(crate) fn scripted() -> Work {
    Arc::new(|handle| Box::pin(play(handle)))
}

async fn play(handle: JobHandle) -> Outcome {
    let script = handle.spec()["script"].clone();
    let steps = script["steps"].as_u64().unwrap_or(0);
    let mut stop = handle.stop();
    let stopped = |stop: Stop, step: u64| match stop {
        Stop::No => None,
        Stop::Cancel => Some(Outcome::Cancelled(format!("cancelled at step {step}"))),
        Stop::Pause => Some(Outcome::Paused),
    };
    for step in 1..=steps {
        if let Some(outcome) = stopped(*stop.borrow(), step) {
            return outcome;
        }
        let figures = json!({
            "step": step, "total_steps": steps, "epoch": 0.5, "loss": 4.0 - step as f64 / 100.0, "eval_loss": null,
            "learning_rate": 0.001, "grad_norm": 1.0, "samples": 8 * step, "tokens": 100 * step,
            "tokens_per_s": 50.0, "eta_s": 2.0, "skipped_steps": 0,
        });
        handle.log(Level::Info, format!("step {step}"));
        handle.progress(step, step as f64 / steps as f64, figures);
        handle.checkpointed(step);
        tokio::time::sleep(Duration::from_millis(script["pause_ms"].as_u64().unwrap_or(0))).await;
    }
    match script["end"].as_str().unwrap_or("complete") {
        "fail" => Outcome::Failed("the loss is not finite at step 3".into()),
        "panic" => panic!("as the script says"),
        "wait" => {
            let stop = *stop.wait_for(|stop| *stop != Stop::No).await.expect("the runner lives");
            stopped(stop, steps).expect("is a reason to end")
        }
        _ => Outcome::Completed { result: json!({"generation": 2}), message: "served".into() },
    }
}

/// A server whose jobs do what their script says.
pub(crate) async fn server() -> Server {
    let data = Arc::new(tempfile::tempdir().expect("a temporary folder can be made"));
    Server::start_in(Limits::default(), data, Some(scripted())).await
}

/// Puts a job into the line, as an accepted request does.
pub(crate) async fn submit(server: &Server, name: &str, script: Value) -> String {
    let config = json!({"seed": 7, "epochs": 2, "batch_size": 4, "gradient_accumulation_steps": 2});
    let spec = json!({"source_name": "phrasebook", "config": config, "script": script});
    let plan = json!({"training_bytes": 1024});
    let new = NewJob { kind: TRAIN_KIND, name: name.into(), spec, meta: Value::Null, plan, file: None };
    server.state.jobs.submit(new).await.expect("the job is accepted").id
}

/// The state of a job once it is this one.
pub(crate) async fn reach(server: &Server, id: &str, status: &str) -> Value {
    let wait = async {
        loop {
            let (code, body) = server.get(&format!("/adapter/status/{id}")).await;
            assert_eq!(code, 200, "{body}");
            if body["status"] == status {
                return body;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, wait).await.unwrap_or_else(|_| panic!("{id} does not become {status}"))
}

/// Waits until a job shows this step.
async fn steps_taken(server: &Server, id: &str, step: u64) {
    let wait = async {
        while server.get(&format!("/adapter/status/{id}")).await.1["metrics"]["step"] != step {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, wait).await.expect("the steps are taken");
}

/// An event of a stream.
#[derive(Debug)]
struct Event {
    name: String,
    id: Option<u64>,
    data: Value,
}

/// Events from after `last` on, until the stream ends or `enough` says so.
async fn follow(server: &Server, id: &str, last: Option<u64>, enough: impl Fn(&Event) -> bool) -> Vec<Event> {
    let mut request = server.client.get(format!("{}/adapter/events/{id}", server.base));
    if let Some(last) = last {
        request = request.header("last-event-id", last.to_string());
    }
    let response = request.send().await.expect("the server answers");
    assert_eq!(response.status().as_u16(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut parts = response.bytes_stream();
    let (mut text, mut events) = (String::new(), Vec::new());
    let read = async {
        while let Some(part) = parts.next().await {
            text.push_str(std::str::from_utf8(&part.expect("the stream ends cleanly")).expect("is text"));
            while let Some((frame, rest)) = text.split_once("\n\n") {
                let of = |name: &str| frame.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
                let event = of("data:").map(|data| Event {
                    name: of("event:").unwrap_or("message").to_owned(),
                    id: of("id:").map(|id| id.parse().expect("ids are steps")),
                    data: serde_json::from_str(data).expect("data is JSON"),
                });
                text = rest.to_owned();
                if let Some(event) = event {
                    let is_enough = enough(&event);
                    events.push(event);
                    if is_enough {
                        return;
                    }
                }
            }
        }
    };
    tokio::time::timeout(SOON, read).await.expect("the stream goes on");
    events
}

fn steps(events: &[Event]) -> Vec<u64> {
    events.iter().filter(|event| event.name == "progress").map(|event| event.id.expect("has an id")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_has_every_field_of_the_contract() {
    let server = server().await;
    let first = submit(&server, "hindi-v2", json!({"steps": 3, "end": "wait"})).await;
    let second = submit(&server, "hindi-v3", json!({"steps": 1})).await;
    let (_, waits) = server.get(&format!("/adapter/status/{second}")).await;
    assert_eq!(
        (&waits["status"], &waits["progress"], &waits["metrics"]),
        (&json!("pending"), &json!(0.0), &json!({}))
    );
    assert_eq!(
        (&waits["started_at"], &waits["completed_at"], &waits["error"]),
        (&Value::Null, &Value::Null, &Value::Null)
    );
    assert!(!waits["message"].as_str().expect("is text").is_empty());
    steps_taken(&server, &first, 3).await;
    let (status, cancelled) = server.post(&format!("/adapter/cancel/{first}"), &json!({})).await;
    assert_eq!((status, &cancelled["cancel_requested"]), (200, &json!(true)));
    let ended = reach(&server, &first, "cancelled").await;
    assert_eq!(ended["checkpoint_step"], 3);
    let done = reach(&server, &second, "completed").await;
    assert_eq!((&done["job_id"], &done["adapter_name"]), (&json!(second), &json!("hindi-v3")));
    assert_eq!(
        (&done["progress"], &done["message"], &done["error"]),
        (&json!(1.0), &json!("served"), &Value::Null)
    );
    assert_eq!((&done["adapter_generation"], &done["source"]), (&json!(2), &json!("phrasebook")));
    for field in ["created_at", "started_at", "completed_at"] {
        let time = done[field].as_str().unwrap_or_else(|| panic!("no {field}: {done}"));
        assert!(time.len() == 24 && time.ends_with('Z'), "{time}");
    }
    for field in [
        "step",
        "total_steps",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "samples",
        "tokens",
        "tokens_per_s",
        "eta_s",
    ] {
        assert!(done["metrics"][field].is_number(), "{field}: {done}");
    }
    assert_eq!(done["plan"]["training_bytes"], 1024);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_an_ended_job_are_told_from_any_step() {
    let server = server().await;
    let id = submit(&server, "a", json!({"steps": 600})).await;
    reach(&server, &id, "completed").await;
    let events = follow(&server, &id, None, |_| false).await;
    assert_eq!(steps(&events), (1..=600).collect::<Vec<_>>());
    let last = events.last().expect("has an end");
    assert_eq!((last.name.as_str(), &last.data["status"], last.id), ("complete", &json!("completed"), None));
    assert_eq!((&events[1].data["step"], &events[1].data["metrics"]["tokens"]), (&json!(2), &json!(200)));
    assert_eq!((&events[299].data["progress"], &events[0].data["job_id"]), (&json!(0.5), &json!(id)));
    let events = follow(&server, &id, Some(598), |_| false).await;
    assert_eq!(steps(&events), [599, 600]);
    let events = follow(&server, &id, Some(600), |_| false).await;
    assert_eq!((events.len(), events[0].name.as_str()), (1, "complete"));
    let request = server.client.get(format!("{}/adapter/events/{id}", server.base));
    let response = request.header("last-event-id", "x").send().await.expect("the server answers");
    assert_eq!(response.status().as_u16(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_comes_back_misses_no_step_and_sees_none_twice() {
    let server = server().await;
    let id = submit(&server, "a", json!({"steps": 120, "pause_ms": 5})).await;
    let mut seen: Vec<u64> = Vec::new();
    let mut ends = 0;
    while ends == 0 {
        let last = seen.last().copied();
        let until = last.unwrap_or(0) + 17;
        let events = follow(&server, &id, last, |event| event.id.is_some_and(|id| id >= until)).await;
        ends += events.iter().filter(|event| event.name == "complete").count();
        seen.extend(steps(&events));
    }
    assert_eq!(seen, (1..=120).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_job_shows_that_it_lives() {
    let server = server().await;
    let id = submit(&server, "a", json!({"steps": 2, "end": "wait"})).await;
    let mut beats = 0;
    let events =
        follow(&server, &id, None, |event| event.name == "heartbeat" && event.data["progress"] == 1.0).await;
    beats += events.iter().filter(|event| event.name == "heartbeat").count();
    assert!(beats >= 1 && steps(&events) == [1, 2], "{events:?}");
    assert_eq!(events.last().expect("has one").data["status"], "running");
    server.post(&format!("/adapter/cancel/{id}"), &json!({})).await;
    let events = follow(&server, &id, Some(2), |_| false).await;
    let last = events.last().expect("has an end");
    assert_eq!((last.name.as_str(), &last.data["status"]), ("complete", &json!("cancelled")));
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_say_why_and_can_be_resumed() {
    let server = server().await;
    let id = submit(&server, "a", json!({"steps": 2, "end": "fail"})).await;
    let failed = reach(&server, &id, "failed").await;
    assert_eq!(failed["error"], "the loss is not finite at step 3");
    assert!(failed["completed_at"].is_string());
    let events = follow(&server, &id, Some(2), |_| false).await;
    assert_eq!((events[0].name.as_str(), &events[0].data["error"]), ("error", &failed["error"]));
    let (status, body) = server.post(&format!("/adapter/resume/{id}"), &json!({})).await;
    assert_eq!((status, &body["status"], &body["error"]), (202, &json!("pending"), &Value::Null));
    assert!(body["message"].as_str().expect("is text").contains("step 2"), "{body}");
    reach(&server, &id, "failed").await;
    let (status, body) = server.post("/adapter/train-lite", &json!({"resume_from": id})).await;
    assert_eq!((status, &body["job_id"], &body["adapter_name"]), (202, &json!(id), &json!("a")));
    reach(&server, &id, "failed").await;
    let (_, health) = server.get("/health").await;
    assert_eq!(
        (&health["jobs"]["last_error"]["job_id"], &health["jobs"]["running"]),
        (&json!(id), &json!(0))
    );

    let bad = submit(&server, "b", json!({"end": "panic"})).await;
    let failed = reach(&server, &bad, "failed").await;
    assert!(failed["error"].as_str().expect("is text").contains("as the script says"), "{failed}");
    assert_eq!(server.get("/health").await.0, 200, "the server goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_in_a_state_is_a_conflict() {
    let server = server().await;
    let runs = submit(&server, "runs", json!({"end": "wait"})).await;
    let waits = submit(&server, "waits", json!({})).await;
    reach(&server, &runs, "running").await;
    let ask = async |what: &str, id: &str| {
        let (status, body) = server.post(&format!("/adapter/{what}/{id}"), &json!({})).await;
        (status, body["error"]["code"].as_str().unwrap_or_default().to_owned())
    };
    let conflict = (409, "job_state".to_owned());
    assert_eq!(ask("resume", &runs).await, conflict);
    assert_eq!(ask("resume", &waits).await, conflict);
    assert_eq!(ask("cancel", &waits).await.0, 200);
    assert_eq!(ask("cancel", &waits).await, conflict);
    assert_eq!(ask("cancel", &runs).await.0, 200);
    reach(&server, &runs, "cancelled").await;
    assert_eq!(ask("cancel", &runs).await, conflict);
    assert_eq!(ask("resume", &waits).await.0, 202);
    reach(&server, &waits, "completed").await;
    assert_eq!(ask("cancel", &waits).await, conflict);
    assert_eq!(ask("resume", &waits).await, conflict);
    // The name is free again, taken by another, and then not free for the first.
    submit(&server, "runs", json!({"end": "wait"})).await;
    assert_eq!(ask("resume", &runs).await, (409, "adapter_name_in_use".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_jobs_are_not_found_anywhere() {
    let server = server().await;
    for id in
        ["0190a000-0000-7000-8000-000000000000", "x", "..%2f..%2fetc", "a%27%20OR%201=1", "%00", "ftjob-x"]
    {
        for path in ["status", "logs", "events"] {
            let (status, body) = server.get(&format!("/adapter/{path}/{id}")).await;
            assert_eq!((status, &body["error"]["code"]), (404, &json!("job_not_found")), "{path}/{id}");
        }
        let (status, _) = server.get(&format!("/adapter/logs/{id}/tail")).await;
        assert_eq!(status, 404, "{id}");
        for path in ["cancel", "resume"] {
            let (status, body) = server.post(&format!("/adapter/{path}/{id}"), &json!({})).await;
            assert_eq!((status, &body["error"]["param"]), (404, &json!("job_id")), "{path}/{id}");
        }
    }
    assert_eq!(server.get("/adapter/status/%ff").await.0, 400);
    let (status, body) = server.post("/adapter/train-lite", &json!({"resume_from": "x"})).await;
    assert_eq!((status, &body["error"]["param"]), (404, &json!("resume_from")));
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_read_in_pages_and_from_their_end() {
    let server = server().await;
    let id = submit(&server, "a", json!({"steps": 250})).await;
    reach(&server, &id, "completed").await;
    let numbers = |body: &Value| -> Vec<u64> {
        let lines = body["logs"].as_array().unwrap_or_else(|| panic!("no lines: {body}"));
        lines.iter().map(|line| line["number"].as_u64().expect("is a number")).collect()
    };
    let (mut start, mut all) = (0, Vec::new());
    loop {
        let (status, body) = server.get(&format!("/adapter/logs/{id}?start={start}&limit=70")).await;
        assert_eq!((status, &body["total"], &body["dropped"]), (200, &json!(250), &json!(0)));
        if numbers(&body).is_empty() {
            assert_eq!(body["next"], 250);
            break;
        }
        all.extend(numbers(&body));
        start = body["next"].as_u64().expect("is a number");
    }
    assert_eq!(all, (0..250).collect::<Vec<_>>());
    let (_, body) = server.get(&format!("/adapter/logs/{id}")).await;
    assert_eq!((numbers(&body).len(), &body["logs"][4]["line"]), (100, &json!("step 5")));
    assert_eq!((&body["logs"][4]["level"], &body["status"]), (&json!("info"), &json!("completed")));
    let (_, body) = server.get(&format!("/adapter/logs/{id}/tail?n=3")).await;
    assert_eq!(numbers(&body), [247, 248, 249]);
    let (_, body) = server.get(&format!("/adapter/logs/{id}?start=9223372036854775807")).await;
    assert_eq!(numbers(&body), [] as [u64; 0]);
    for (query, param) in [
        ("?limit=0", "limit"),
        ("?limit=1001", "limit"),
        ("?limit=x", "limit"),
        ("?start=-1", "start"),
        ("?strat=1", "strat"),
        ("/tail?n=0", "n"),
        ("/tail?n=99999", "n"),
    ] {
        let (status, body) = server.get(&format!("/adapter/logs/{id}{query}")).await;
        assert_eq!((status, &body["error"]["param"]), (400, &json!(param)), "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_listed_newest_first() {
    let server = server().await;
    let mut ids = Vec::new();
    for name in ["a", "b", "c"] {
        ids.push(submit(&server, name, json!({})).await);
    }
    let waits = submit(&server, "d", json!({"end": "wait"})).await;
    reach(&server, &waits, "running").await;
    let listed = |body: &Value| -> Vec<String> {
        let jobs = body["jobs"].as_array().unwrap_or_else(|| panic!("no jobs: {body}"));
        jobs.iter().map(|job| job["job_id"].as_str().expect("is text").to_owned()).collect()
    };
    let (_, body) = server.get("/adapter/jobs").await;
    assert_eq!(listed(&body), [waits.clone(), ids[2].clone(), ids[1].clone(), ids[0].clone()]);
    let (_, body) = server.get("/adapter/jobs?status=completed&limit=2").await;
    assert_eq!(listed(&body), [ids[2].clone(), ids[1].clone()]);
    let (_, body) = server.get("/adapter/jobs?status=running").await;
    assert_eq!(listed(&body), [waits]);
    for (query, param) in [("status=done", "status"), ("limit=0", "limit"), ("page=2", "page")] {
        let (status, body) = server.get(&format!("/adapter/jobs?{query}")).await;
        assert_eq!((status, &body["error"]["param"]), (400, &json!(param)), "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_metrics_show_the_jobs() {
    let server = server().await;
    let id = submit(&server, "shown", json!({"steps": 5, "end": "wait"})).await;
    submit(&server, "waits", json!({})).await;
    steps_taken(&server, &id, 5).await;
    let (_, health) = server.get("/health").await;
    let expected = json!({"running": 1, "pending": 1, "limit": 1, "last_error": null, "store_error": null});
    assert_eq!(health["jobs"], expected);
    let metrics = async || {
        let response = server.client.get(format!("{}/metrics", server.base)).send().await.expect("answers");
        response.text().await.expect("is text")
    };
    let text = metrics().await;
    for line in [
        "gurukul_jobs{state=\"completed\"}",
        "gurukul_training_tokens_per_second{adapter=\"shown\"} 50",
        "gurukul_training_step{adapter=\"shown\"} 5",
        "gurukul_training_loss{adapter=\"shown\"} 3.95",
    ] {
        assert!(text.contains(line), "no {line} in {text}");
    }
    server.post(&format!("/adapter/cancel/{id}"), &json!({})).await;
    reach(&server, &id, "cancelled").await;
    let text = metrics().await;
    assert!(!text.contains("adapter=\"shown\""), "a job that has ended is no label any more: {text}");
    let (_, index) = server.get("/").await;
    assert_eq!(index["train"][0], "/adapter/train-lite");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_what_was_and_goes_on_with_what_ran() {
    let server = server().await;
    let done = submit(&server, "done", json!({"steps": 5})).await;
    reach(&server, &done, "completed").await;
    let runs = submit(&server, "runs", json!({"steps": 3, "end": "wait"})).await;
    let waits = submit(&server, "waits", json!({})).await;
    reach(&server, &runs, "running").await;
    let before = server.get(&format!("/adapter/status/{done}")).await;
    // Whoever follows is let go, so that the server can end.
    let (events, data) = {
        let follow = async { follow(&server, &runs, None, |event| event.id == Some(3)).await };
        let events = follow.await;
        (events, server.stop().await)
    };
    assert_eq!(steps(&events), [1, 2, 3]);

    let server = Server::start_in(Limits::default(), data, Some(scripted())).await;
    assert_eq!(server.get(&format!("/adapter/status/{done}")).await, before);
    let (_, log) = server.get(&format!("/adapter/logs/{done}")).await;
    assert_eq!(log["total"], 5);
    let wait = async {
        while server.get(&format!("/adapter/logs/{runs}")).await.1["total"] != 6 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, wait).await.expect("it runs again by itself");
    server.post(&format!("/adapter/cancel/{runs}"), &json!({})).await;
    reach(&server, &waits, "completed").await;
    let events = follow(&server, &runs, Some(1), |_| false).await;
    assert_eq!(steps(&events), [2, 3], "a step that was taken again is still one step");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_the_server_stops() {
    let server = server().await;
    let id = submit(&server, "a", json!({"steps": 1, "end": "wait"})).await;
    reach(&server, &id, "running").await;
    let jobs = server.state.jobs.clone();
    let (events, ()) = tokio::join!(follow(&server, &id, None, |_| false), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        jobs.shutdown(SOON).await;
    });
    assert!(events.iter().all(|event| event.name != "complete" && event.name != "error"), "{events:?}");
    assert_eq!(steps(&events), [1]);
    let (status, body) = server.post(&format!("/adapter/cancel/{id}"), &json!({})).await;
    assert_eq!((status, &body["error"]["code"]), (503, &json!("shutting_down")));
    let (status, body) = server.get(&format!("/adapter/status/{id}")).await;
    assert_eq!((status, &body["status"]), (200, &json!("running")), "it goes on with the next start");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_cannot_be_trained_are_refused_by_field() {
    let server = server().await;
    let configs = server.data.path().join("configs");
    std::fs::create_dir_all(&configs).expect("a folder can be made");
    let sources = "sources:\n  phrasebook:\n    type: local\n    path: /nowhere/phrasebook.jsonl\n";
    std::fs::write(configs.join("mcp_connectors.yml"), sources).expect("can be written");
    std::fs::write(server.data.path().join("outside.yaml"), "r: 4\n").expect("can be written");
    for (body, param) in [
        (json!({}), "source"),
        (json!({"source": "nowhere"}), "source"),
        (json!({"source": "../../etc/passwd"}), "source"),
        (json!({"source": "phrasebook", "max_sampels": 5}), "max_sampels"),
        (json!({"source": "phrasebook", "max_samples": -1}), "max_samples"),
        (json!({"source": "phrasebook", "max_samples": 0}), "max_samples"),
        (json!({"source": "phrasebook", "max_samples": 5, "overrides": {"max_samples": 6}}), "max_samples"),
        (json!({"source": 5}), "source"),
        (json!({"source": "phrasebook", "overrides": []}), "overrides"),
        (json!({"source": "phrasebook", "adapter_name": "Big Name"}), "adapter_name"),
        (json!({"source": "phrasebook", "adapter_name": "../x"}), "adapter_name"),
        (json!({"source": "phrasebook", "adapter_name": "list"}), "adapter_name"),
        (json!({"source": "phrasebook", "adapter_name": "train-lite"}), "adapter_name"),
        (json!({"source": "phrasebook", "adapter_name": "none"}), "adapter_name"),
        (json!({"source": "phrasebook", "resume_from": "x"}), "source"),
        (json!({"overrides": {}, "resume_from": "x"}), "overrides"),
    ] {
        let (status, answer) = server.post("/adapter/train-lite", &body).await;
        let (error, message) = (&answer["error"], answer["error"]["message"].as_str().unwrap_or_default());
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{body}: {answer}");
        assert!(!message.is_empty() && !message.contains("/etc/passwd is"), "{answer}");
    }
    // Fields whose names the settings give.
    for (body, part) in [
        (json!({"source": "phrasebook", "overrides": {"r": 0}}), "overrides.r "),
        (json!({"source": "phrasebook", "overrides": {"rr": 5}}), "rr"),
        (json!({"source": "phrasebook", "config_path": "../outside.yaml"}), "config_path"),
        (json!({"source": "phrasebook", "config_path": "/etc/passwd"}), "config_path"),
        (json!({"source": "phrasebook", "config_path": "nowhere.yaml"}), "config_path"),
        (json!({"source": "phrasebook", "mcp_config_path": "../outside.yaml"}), "mcp_config_path"),
    ] {
        let (status, answer) = server.post("/adapter/train-lite", &body).await;
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(status == 400 && message.contains(part), "{body}: {status} {answer}");
        assert!(!message.contains("root:"), "nothing of a file outside is told: {message}");
    }
    let (_, body) = server.get("/adapter/jobs").await;
    assert_eq!(body["jobs"], json!([]), "nothing was accepted");
    assert!(!server.data.path().join("jobs").exists(), "and nothing was made");
    assert_eq!(server.post("/generate-lite", &json!({"prompt": "a", "max_new_tokens": 1})).await.0, 200);
}

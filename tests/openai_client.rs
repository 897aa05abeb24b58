//! The official `openai` Python client against the server. Needs an interpreter that has the package, in
//! `GURUKUL_TEST_PYTHON`; the checks themselves are in `openai_client.py`.
#![expect(clippy::print_stderr, reason = "a test that skips says so, and one that fails shows why")]

#[expect(dead_code, reason = "the client brings its own requests")]
mod support;

use std::sync::Arc;

use gurukul::http::TRAIN_KIND;
use gurukul::jobs::{JobHandle, Level, NewJob, Outcome, Stop};
use serde_json::{Value, json};
use support::{ADAPTER, Limits, MODEL, Server};

/// A job of three steps; one with a name that begins with `wait` then waits for its end.
async fn three_steps(handle: JobHandle) -> Outcome {
    for step in 1..=3_u64 {
        handle.log(Level::Info, format!("step {step}"));
        let figures =
            json!({"step": step, "total_steps": 3, "loss": 2.0, "eval_loss": null, "tokens": 10 * step});
        handle.progress(step, step as f64 / 3.0, figures);
    }
    if handle.spec()["source_name"] == "wait" {
        let mut stop = handle.stop();
        // An error means that nobody can ask any more.
        let _ = stop.wait_for(|stop| *stop != Stop::No).await;
        return Outcome::Cancelled("as asked".into());
    }
    Outcome::Completed { result: json!({"generation": 1}), message: "served".into() }
}

async fn submit(server: &Server, name: &str, source: &str) -> String {
    let spec = json!({"source_name": source, "config": {"seed": 7, "epochs": 2}});
    let (name, meta) = (name.to_owned(), Value::Null);
    let new = NewJob { kind: TRAIN_KIND, name, spec, meta, plan: Value::Null, file: None };
    server.state.jobs.submit(new).await.expect("the job is accepted").id
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_client_drives_the_server() {
    let Some(python) = std::env::var_os("GURUKUL_TEST_PYTHON") else {
        eprintln!("skipped: GURUKUL_TEST_PYTHON names no interpreter with the openai package");
        return;
    };
    let data = Arc::new(tempfile::tempdir().expect("a temporary folder can be made"));
    let work = Arc::new(|handle| Box::pin(three_steps(handle)) as _);
    let server = Server::start_in(Limits::default(), data, Some(work)).await;
    // A job that has ended bears the name of an adapter that is there, as it does after training.
    let done = submit(&server, ADAPTER, "phrases").await;
    let runs = submit(&server, "waits", "wait").await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai_client.py");
    let mut command = std::process::Command::new(python);
    command.arg(script).args([&format!("{}/v1", server.base), MODEL, ADAPTER, &done, &runs]);
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.expect("does not panic").expect("the interpreter starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    eprintln!("{out}{err}");
    assert!(output.status.success(), "the client is not content");
    assert!(out.trim_end().ends_with("all checks passed"), "the script did not come to its end");
}

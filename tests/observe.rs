//! What the real process lets others see: the lines of its log with the ids that belong to them, and its metrics beside
//! what the dashboard and the documents name.
#![cfg(unix)]

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "support/program.rs"]
mod program;

use std::collections::BTreeSet;
use std::path::Path;

use program::{Program, serve, teachable};
use serde_json::{Value, json};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A server that has answered, trained, collected and refused; its adapter `taught` and the job that made it.
async fn used(folder: &Path, arguments: &[&str]) -> (Program, String) {
    teachable(folder, 1);
    let sinks = "sinks:\n  archive: {type: folder, path: archive}\n";
    std::fs::write(folder.join("configs/rl_config.yaml"), sinks).unwrap();
    let mut command = serve(folder, arguments);
    command.env("RUST_LOG", "info,gurukul=debug");
    let program = Program::start(command, "answers on ").await;
    let request = json!({"source": "rows", "max_samples": 10, "adapter_name": "taught"});
    let request = program
        .client
        .post(format!("{}/adapter/train-lite", program.base))
        .header("x-request-id", "train-1")
        .json(&request);
    let job: Value = request.send().await.unwrap().json().await.unwrap();
    let id = job["job_id"].as_str().unwrap_or_else(|| panic!("{job}")).to_owned();
    program.job(&id, |job| job["status"] == "completed").await;
    let request = json!({"prompt": "say 3", "adapter": "taught", "max_new_tokens": 8, "do_sample": false});
    let request = program
        .client
        .post(format!("{}/generate-lite", program.base))
        .header("x-request-id", "answer-1")
        .json(&request);
    assert_eq!(request.send().await.unwrap().status().as_u16(), 200);
    (program, id)
}

/// The value of a field on a line: of the event itself, or of the innermost span that has it.
fn field<'a>(line: &'a Value, name: &str) -> Option<&'a Value> {
    let spans = line["spans"].as_array().into_iter().flatten().rev();
    line.get(name).or_else(|| spans.filter_map(|span| span.get(name)).next())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_line_of_a_request_and_of_a_job_has_its_ids() {
    let dir = tempfile::tempdir().unwrap();
    let (program, job_id) = used(dir.path(), &["--log", "json"]).await;
    let (_, gone) = program.post("/adapter/cancel/0", &json!({})).await;
    assert!(gone["error"].is_object());
    program.signal("TERM");
    let mut program = program;
    assert_eq!(program.ended().await.code(), Some(0));
    let said = program.lines();
    // The welcome for a person is on stdout.
    let lines: Vec<Value> = said
        .iter()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    assert_eq!(said.iter().filter(|line| !line.starts_with('{')).count(), 1, "{said:#?}");
    for line in &lines {
        for key in ["timestamp", "level", "message", "target"] {
            assert!(line[key].is_string(), "{key} is missing in {line}");
        }
    }
    let line = |message: &str, is: &dyn Fn(&Value) -> bool| -> &Value {
        let found = lines.iter().find(|line| line["message"] == message && is(line));
        found.unwrap_or_else(|| panic!("no {message:?} in {said:#?}"))
    };
    let answered = line("answered", &|line| field(line, "request_id") == Some(&json!("answer-1")));
    assert_eq!(field(answered, "adapter"), Some(&json!("taught")));
    assert_eq!(field(answered, "generation"), Some(&json!(1)));
    assert_eq!(field(answered, "route"), Some(&json!("/generate-lite")));
    let accepted = line("job accepted", &|_| true);
    assert_eq!(field(accepted, "request_id"), Some(&json!("train-1")));
    assert_eq!(field(accepted, "job_id"), Some(&json!(job_id)));
    for message in ["job begins", "job ended", "adapter published"] {
        let of_job = line(message, &|_| true);
        assert_eq!(field(of_job, "job_id"), Some(&json!(job_id)), "{of_job}");
    }
    let published = line("adapter published", &|_| true);
    assert_eq!(field(published, "adapter"), Some(&json!("taught")));
    let of_loop = lines.iter().filter(|line| {
        line["message"].as_str().is_some_and(|text| text.starts_with("step ") || text.starts_with("plan: "))
    });
    let of_loop: Vec<&Value> = of_loop.collect();
    assert!(!of_loop.is_empty(), "the training loop logs: {said:#?}");
    for line in of_loop {
        assert_eq!(field(line, "job_id"), Some(&json!(job_id)), "{line}");
        assert_eq!(field(line, "adapter"), Some(&json!("taught")), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn as_text_the_ids_are_on_the_lines_too() {
    let dir = tempfile::tempdir().unwrap();
    let (mut program, job_id) = used(dir.path(), &[]).await;
    // Written once the answer has gone out.
    program.line("request_id=\"answer-1\"").await;
    let lines = program.lines();
    let find = |parts: &[&str]| {
        let found = lines.iter().any(|line| parts.iter().all(|part| line.contains(part)));
        assert!(found, "no line with {parts:?} in {lines:#?}");
    };
    find(&["answered", "request_id=\"answer-1\"", "adapter=\"taught\"", "generation=1"]);
    find(&["job ended", &format!("job_id=\"{job_id}\""), "adapter=\"taught\""]);
}

/// Names of metrics in a text: of ours, and those of the process.
fn names(text: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_name(c));
    let ours = |word: &&str| (word.starts_with("gurukul_") && word.len() > 8) || word.starts_with("process_");
    words.filter(ours).map(str::to_owned).collect()
}

/// A histogram's parts belong to its name.
fn base_name(name: &str, known: &BTreeSet<String>) -> String {
    let of = ["_bucket", "_sum", "_count"].iter().filter_map(|part| name.strip_suffix(part));
    of.map(str::to_owned).find(|base| known.contains(base)).unwrap_or_else(|| name.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_that_the_documents_and_the_dashboard_name_is_there() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("archive")).unwrap();
    let (program, _) = used(dir.path(), &[]).await;
    // More tokens than one, an episode with an upload, and a job that runs while the metrics are read.
    let episode = json!({"prompt": "p", "output": "an answer", "run_id": "r", "upload": "archive"});
    let (status, answer) = program.post("/rl/collect", &episode).await;
    assert_eq!(status, 200, "{answer}");
    let generated = json!({"prompt": "p", "episodes": 2, "run_id": "r", "max_new_tokens": 4});
    let (status, answer) = program.post("/rl/collect", &generated).await;
    assert_eq!(status, 200, "{answer}");
    let request =
        json!({"source": "rows", "max_samples": 60, "adapter_name": "more", "overrides": {"epochs": 1000}});
    let (_, job) = program.post("/adapter/train-lite", &request).await;
    let id = job["job_id"].as_str().unwrap_or_else(|| panic!("{job}")).to_owned();
    program.job(&id, |job| job["metrics"]["step"].as_u64() >= Some(1)).await;
    let metrics = program.client.get(format!("{}/metrics", program.base)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let types = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let shown: BTreeSet<String> = types.map(str::to_owned).collect();
    assert!(shown.len() > 50, "{shown:?}");
    for line in metrics.lines().filter(|line| line.starts_with("# TYPE ")) {
        let name = line.split(' ').nth(2).unwrap();
        assert!(metrics.contains(&format!("# HELP {name} ")), "{name} has no description");
    }

    let read = |path: &str| std::fs::read_to_string(repository().join(path)).unwrap();
    for path in ["docs/grafana_dashboard.json", "docs/OPERATIONS.md", "docs/RL_GUIDE.md", "README.md"] {
        for name in names(&read(path)) {
            assert!(shown.contains(&base_name(&name, &shown)), "{path} names {name}, which is not shown");
        }
    }
    let told = names(&read("docs/OPERATIONS.md"));
    let untold: Vec<&String> = shown.iter().filter(|name| !told.contains(*name)).collect();
    assert!(untold.is_empty(), "docs/OPERATIONS.md does not tell of {untold:?}");
}

#[test]
fn every_panel_of_the_dashboard_has_a_unit_and_a_description() {
    let text = std::fs::read_to_string(repository().join("docs/grafana_dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    assert!(dashboard["schemaVersion"].as_u64().is_some_and(|version| version >= 39));
    let panels = dashboard["panels"].as_array().unwrap();
    let rows: Vec<&str> =
        panels.iter().filter(|p| p["type"] == "row").map(|p| p["title"].as_str().unwrap()).collect();
    assert_eq!(rows, ["Traffic", "Latency", "Engine", "Memory", "Training", "RL and uploads"]);
    let mut ids = BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{} has another's id", panel["title"]);
        if panel["type"] == "row" {
            continue;
        }
        let title = panel["title"].as_str().unwrap();
        assert!(panel["description"].as_str().is_some_and(|text| text.len() > 20), "{title}");
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title} has no unit");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        assert!(!panel["targets"].as_array().unwrap().is_empty(), "{title}");
    }
}

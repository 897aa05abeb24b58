//! Sources as users meet them: `gurukul sources`, `GET /sources`, and jobs that are trained from pages of a Qdrant
//! collection and of an MCP server, killed in the middle, and go on at their page. The servers are real ones by their
//! makers' Python packages (`GURUKUL_TEST_PYTHON`); the model is a fixture.
#![cfg(unix)]
#![expect(clippy::print_stderr, reason = "a test that skips says so")]

#[expect(dead_code, reason = "a list of sources takes little of the server")]
mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Limits, Server};

const LIMIT: Duration = Duration::from_secs(300);

/// The binary in a folder, with nothing of this process's environment that it would read.
fn gurukul(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
    command.current_dir(folder);
    for (name, _) in std::env::vars() {
        if name.starts_with("GURUKUL_") || name.starts_with("HF_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.env("HF_HOME", folder.join("hf")).env("HF_HUB_OFFLINE", "1");
    command.env("GURUKUL_MODEL", support::fixture("llama")).env("GURUKUL_KV_CACHE", "16MiB");
    command
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    gurukul(folder).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Code, standard output and standard error.
fn said(folder: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = run(folder, arguments);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(!err.contains("panicked"), "{err}");
    (output.status.code(), out, err)
}

/// A folder with a connectors file.
fn workplace(connectors: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("configs")).unwrap();
    std::fs::write(dir.path().join("configs/mcp_connectors.yml"), connectors).unwrap();
    dir
}

const FILES: &str = "sources:
  good: {type: local, path: good.jsonl}
  words: {type: local, path: good.jsonl, fields: {prompt: q, completion: a}}
  bad: {type: local, path: bad.jsonl}
  half: {type: local, path: half.jsonl}
  empty: {type: local, path: empty.jsonl}
  missing: {type: local, path: nowhere}
  secret: {type: http, url: 'http://127.0.0.1:1/x.jsonl?key=s3cr3t', headers_env: {Authorization: NOT_SET}}
";

fn files() -> tempfile::TempDir {
    let dir = workplace(FILES);
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let rows: String =
        (0..300).map(|i| format!("{{\"prompt\": \"p{i}\", \"completion\": \"उत्तर {i}\"}}\n")).collect();
    write("good.jsonl", &rows);
    write("half.jsonl", &format!("{rows}no row\nno row\nno row\nno row\nno row\nno row\n"));
    write("bad.jsonl", "{\"a\": 1}\n{\"a\": 2}\n");
    write("empty.jsonl", "");
    dir
}

#[test]
fn sources_are_listed_with_kind_and_place_and_no_secret() {
    let dir = files();
    let (code, out, err) = said(dir.path(), &["sources", "list"]);
    assert_eq!(code, Some(0), "{err}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "bad      local  bad.jsonl");
    assert_eq!(lines[5], "secret   http   http://127.0.0.1:1/x.jsonl");
    assert_eq!(lines.len(), 7);
    let empty = workplace("sources: {}\n");
    let (code, out, _) = said(empty.path(), &["sources", "list"]);
    assert_eq!((code, out.as_str()), (Some(0), "no sources; name some in the connectors file\n"));
    // A file of another name, from anywhere.
    std::fs::write(empty.path().join("mine.yml"), FILES).unwrap();
    let (code, out, _) = said(empty.path(), &["sources", "list", "--connectors", "mine.yml"]);
    assert_eq!((code, out.lines().count()), (Some(0), 7));
}

#[test]
fn a_peek_shows_the_first_records() {
    let dir = files();
    let (code, out, err) = said(dir.path(), &["sources", "peek", "good"]);
    assert_eq!((code, out.lines().count()), (Some(0), 5), "{err}");
    assert_eq!(out.lines().next(), Some("{\"prompt\":\"p0\",\"completion\":\"उत्तर 0\"}"));
    let (code, out, _) = said(dir.path(), &["sources", "peek", "good", "-n", "2"]);
    assert_eq!((code, out.lines().count()), (Some(0), 2));
    let (code, out, _) = said(dir.path(), &["sources", "peek", "bad", "-n", "9"]);
    assert_eq!((code, out.lines().count()), (Some(0), 2));
    let (code, out, err) = said(dir.path(), &["sources", "peek", "missing"]);
    assert!(
        code == Some(1) && out.is_empty() && err.contains("source missing: ") && err.contains("nowhere"),
        "{err}"
    );
    let (code, _, err) = said(dir.path(), &["sources", "peek", "secret"]);
    assert!(code == Some(1) && err.contains("NOT_SET") && !err.contains("s3cr3t"), "{err}");
    let (code, _, err) = said(dir.path(), &["sources", "peek", "other"]);
    assert!(code == Some(2) && err.contains("'other'") && err.contains("bad, empty, good"), "{err}");
}

#[test]
fn a_check_says_what_is_found_and_what_is_wrong() {
    let dir = files();
    let (code, out, err) = said(dir.path(), &["sources", "check", "good"]);
    assert_eq!(code, Some(0), "{out}{err}");
    for part in [
        "source good (local): good.jsonl\n",
        "  good.jsonl, ",
        " bytes, version ",
        "first record after ",
        "300 records in ",
        "MB/s of text, and that is all\n",
        "0 of 300 rows cannot be used\n",
        "template prompt_completion\n",
        "can be trained from\n",
    ] {
        assert!(out.contains(part), "{part:?} is missing in:\n{out}");
    }
    for (name, found, wrong) in [
        ("words", "300 records", "it has prompt, completion; name them under fields in the source"),
        ("bad", "2 records", "name them under fields in the source"),
        ("half", "first record after", "more than max_bad_rows"),
        ("empty", "", "gives no records"),
        ("missing", "", "nowhere"),
        ("secret", "", "environment variable NOT_SET"),
    ] {
        let (code, out, err) = said(dir.path(), &["sources", "check", name]);
        assert!(code == Some(1) && (out + &err).contains(found) && err.contains(wrong), "{name}: {err}");
    }
    let (code, _, err) = said(dir.path(), &["sources", "check", "good", "--seconds", "never"]);
    assert!(code == Some(2) && err.contains("--seconds"), "{err}");
}

#[test]
fn a_connectors_file_that_cannot_be_is_refused_with_its_line_and_field() {
    let dir = files();
    let bomb: String = (0..9).fold("x0: &x0 [a, a, a, a, a, a, a, a, a, a]\n".into(), |text: String, i| {
        let ten = vec![format!("*x{i}"); 10].join(", ");
        text + &format!("x{}: &x{} [{ten}]\n", i + 1, i + 1)
    });
    let qdrant = "{type: qdrant, url: 'http://h', collection: c";
    for (text, parts) in [
        ("sources:\n  a: {type: local, path: x, paths: y}\n", &["sources.a", "paths", "line 2"][..]),
        (
            "sources:\n  a: {type: local, path: x}\n  b:\n    type: local\n    path: [x]\n",
            &["sources.b", "path", "line"],
        ),
        ("sources:\n  a: {type: carrier-pigeon}\n", &["sources.a", "carrier-pigeon", "qdrant", "line 2"]),
        ("sources:\n  a: {path: x}\n", &["sources.a", "type", "line 2"]),
        (&format!("sources:\n  a: {qdrant}, page_size: many}}\n"), &["sources.a", "page_size", "line 2"]),
        (&format!("sources:\n\n  a: {qdrant}, page_size: 0}}\n"), &["sources.a", "page_size", "line 3"]),
        (
            "sources:\n  a: {type: mcp, command: [x], tool: {name: t, rows: 1}}\n",
            &["sources.a", "rows", "line 2"],
        ),
        ("sources:\n  a: [\n", &["line"]),
        (&bomb, &["aliases", "line"]),
        (&format!("{bomb}sources:\n  a: {qdrant}, points_filter: {{must: *x9}}}}\n"), &["aliases", "line"]),
    ] {
        let file = dir.path().join("configs/mcp_connectors.yml");
        std::fs::write(&file, text).unwrap();
        let begun = Instant::now();
        for command in [&["check-config"][..], &["sources", "list"], &["train", "--source", "a"]] {
            let (code, out, err) = said(dir.path(), command);
            assert_eq!((code, out.as_str()), (Some(2), ""), "{command:?} {text}: {err}");
            for part in parts.iter().chain(&["mcp_connectors.yml"]) {
                assert!(err.contains(part), "{command:?}: {part:?} is missing in: {err}");
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "a bomb does not go off");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_lists_its_sources() {
    let server = Server::start(Limits::default()).await;
    let (status, body) = server.get("/sources").await;
    assert_eq!((status, body), (200, json!({"file": "mcp_connectors.yml", "sources": []})));
    let configs = server.data.path().join("configs");
    std::fs::create_dir_all(&configs).unwrap();
    std::fs::write(configs.join("mcp_connectors.yml"), FILES).unwrap();
    std::fs::write(configs.join("broken.yml"), "sources:\n  a: {type: local, path: x, paths: y}\n").unwrap();
    let (status, body) = server.get("/sources").await;
    assert_eq!(status, 200);
    let sources = body["sources"].as_array().unwrap();
    assert_eq!(sources.len(), 7);
    assert_eq!(sources[0], json!({"name": "bad", "kind": "local", "description": "bad.jsonl"}));
    assert!(!body.to_string().contains("s3cr3t"), "{body}");
    let (status, body) = server.get("/sources?mcp_config_path=broken.yml").await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("mcp_config_path")));
    let message = body["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("broken.yml") && message.contains("paths") && message.contains("line 2"),
        "{message}"
    );
    // The same at a job's request.
    let request = json!({"source": "a", "mcp_config_path": "broken.yml"});
    let (status, body) = server.post("/adapter/train-lite", &request).await;
    assert_eq!((status, body["error"]["message"].as_str()), (400, Some(message)));
    for wrong in
        ["/sources?mcp_config_path=../x.yml", "/sources?mcp_config_path=none.yml", "/sources?other=1"]
    {
        let (status, body) = server.get(wrong).await;
        assert_eq!(status, 400, "{wrong}: {body}");
    }
}

// ---- jobs from pages

const SETTINGS: &str = "r: 4\nlearning_rate: 0.003\nbatch_size: 2\ngradient_accumulation_steps: 2\nepochs: 1\n\
                        max_seq_length: 64\nsave_steps: 5\neval_share: 0\nlogging_steps: 1\nshuffle_buffer: 16\n";

fn python() -> Option<PathBuf> {
    let python = std::env::var_os("GURUKUL_TEST_PYTHON").map(PathBuf::from);
    if python.is_none() {
        eprintln!(
            "skipped: GURUKUL_TEST_PYTHON names no interpreter with the packages mcp and qdrant-client"
        );
    }
    python
}

fn rows() -> impl Iterator<Item = Value> {
    (0..200).map(|i| json!({"id": i, "prompt": format!("say {}", i % 5), "completion": format!(" the word {}", i % 5)}))
}

/// Ends a server with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn tensors(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("adapters/lessons/adapter_model.safetensors")).unwrap()
}

/// Trains once undisturbed and once with a kill in the middle: the adapters must be the same. `connectors` is given
/// the folder that it is for. Gives the folder of the killed one.
fn train_killed_and_resumed(connectors: impl Fn(&Path) -> String) -> tempfile::TempDir {
    let make = || {
        let dir = workplace("");
        let text = connectors(dir.path());
        std::fs::write(dir.path().join("configs/mcp_connectors.yml"), text).unwrap();
        std::fs::write(dir.path().join("configs/adapter_config.yaml"), SETTINGS).unwrap();
        dir
    };
    let alone = make();
    let (code, out, err) = said(alone.path(), &["train", "--source", "lessons", "--max-samples", "200"]);
    assert!(code == Some(0) && out.starts_with("adapter lessons generation 1: 50 steps"), "{out}{err}");

    let killed = make();
    let mut command = gurukul(killed.path());
    command.args(["train", "--source", "lessons", "--max-samples", "200"]).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut told = String::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let deadline = Instant::now() + LIMIT;
    while told.matches("checkpoint in").count() < 5 {
        assert!(Instant::now() < deadline, "it hangs: {told}");
        told += &(lines.next().unwrap_or_else(|| panic!("it ended: {told}")).unwrap() + "\n");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!killed.path().join("adapters/lessons").exists(), "it was in the middle");
    let id = told.lines().find_map(|line| line.strip_prefix("job ")).unwrap().split(':').next().unwrap();
    let (code, out, err) = said(killed.path(), &["train", "--resume", id]);
    assert!(code == Some(0) && err.contains("going on after step"), "{out}{err}");
    assert_eq!(tensors(killed.path()), tensors(alone.path()), "none twice, none missing");
    killed
}

#[test]
fn a_job_learns_from_a_qdrant_collection_and_goes_on_at_its_page() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (points, log) = (dir.path().join("points.jsonl"), dir.path().join("log"));
    let mut file = std::fs::File::create(&points).unwrap();
    rows().for_each(|row| writeln!(file, "{}", json!({"id": row["id"], "payload": row})).unwrap());
    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qdrant_server.py")).arg(points);
    command.arg("--log").arg(&log).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut server = Ends(command.spawn().unwrap());
    let mut port = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut port).unwrap();
    let port = port.trim();
    let connectors = format!(
        "sources:\n  lessons: {{type: qdrant, url: 'http://127.0.0.1:{port}', collection: lessons, page_size: 20}}\n"
    );
    let killed = train_killed_and_resumed(|_| connectors.clone());

    // Three readings; the last one did not begin at the beginning.
    let offsets = std::fs::read_to_string(&log).unwrap();
    let offsets: Vec<&str> = offsets.lines().collect();
    assert_eq!(offsets.iter().filter(|offset| **offset == "null").count(), 2, "{offsets:?}");
    let (code, out, err) = said(killed.path(), &["sources", "check", "lessons"]);
    assert!(code == Some(0) && out.contains("20 rows") && out.contains("200 records"), "{out}{err}");
    assert!(out.contains("collection lessons at http://127.0.0.1:"), "{out}");
}

#[test]
fn a_job_learns_from_a_tool_of_an_mcp_server_and_goes_on_at_its_page() {
    let Some(python) = python() else { return };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mcp_server.py");
    let connectors = |folder: &Path| {
        let command =
            json!([python, script, "--rows", "200", "--page", "20", "--log", folder.join("cursors")]);
        format!(
            "sources:\n  lessons:\n    type: mcp\n    command: {command}\n    tool: {{name: paged, cursor_argument: \
             cursor, cursor_path: page.next, rows_path: page.rows}}\n"
        )
    };
    let killed = train_killed_and_resumed(connectors);
    let cursors = std::fs::read_to_string(killed.path().join("cursors")).unwrap();
    assert_eq!(cursors.lines().filter(|cursor| *cursor == "None").count(), 1, "{cursors}");
    let (code, out, err) = said(killed.path(), &["sources", "check", "lessons"]);
    assert!(
        code == Some(0) && out.contains("tool paged, 20 rows") && out.contains("200 records"),
        "{out}{err}"
    );
    let (code, out, _) = said(killed.path(), &["sources", "peek", "lessons", "-n", "1"]);
    assert_eq!(code, Some(0));
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["prompt"], "What is lesson 0?");
}

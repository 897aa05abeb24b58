//! `scripts/smoke.sh` against the built binary, as other people's CI runs it, and against servers that are no server
//! of ours, refuse or are not there.
#![cfg(unix)]

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "support/program.rs"]
mod program;
#[path = "support/served.rs"]
mod served;
#[path = "support/tools.rs"]
mod tools;

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Command, Output};

use served::Served;
use tools::{has_tools, root};

fn smoke(arguments: &[&str], key: Option<&str>) -> Output {
    let mut command = Command::new("bash");
    command.arg(root().join("scripts/smoke.sh")).args(arguments).env_remove("GURUKUL_API_KEY");
    if let Some(key) = key {
        command.env("GURUKUL_API_KEY", key);
    }
    command.output().unwrap()
}

/// That it ended with this code and said each of these on stdout and stderr together.
fn assert_ended(output: &Output, code: i32, parts: &[&str]) {
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is missing in: {said}");
    }
}

/// A server that gives each request the same answer and keeps what was asked.
fn stub(answer: &'static str) -> (String, std::sync::mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, asked) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 4096];
            let n = stream.read(&mut head).unwrap();
            if sender.send(String::from_utf8_lossy(&head[..n]).into_owned()).is_err() {
                return;
            }
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    (url, asked)
}

#[test]
fn it_goes_through_on_a_server_and_leaves_it_as_it_was() {
    if !has_tools(&["bash", "curl", "jq"]) {
        return;
    }
    let server = Served::start();
    let output = smoke(&["--url", &format!("{}/", server.url)], None);
    let steps = [
        "ok    health: gurukul-demo on cpu",
        "ok    generate in hindi: स्कूल कहाँ है?",
        "ok    generate in tamil:",
        "ok    generate in bengali:",
        "ok    train: job",
        "ok    poll: 8 steps",
        "ok    generate in hindi with the adapter:",
        "ok    collect: 2 episodes",
        "ok    delete: smoke-",
    ];
    assert_ended(&output, 0, &steps);
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), steps.len(), "a line a step");
    let adapters = server.place().join("adapters");
    let left = std::fs::read_dir(adapters).map_or(0, |entries| {
        entries
            .filter(|e| e.as_ref().is_ok_and(|e| !e.file_name().to_string_lossy().starts_with('.')))
            .count()
    });
    assert_eq!(left, 0, "its adapter is gone");
    let log = std::fs::read_to_string(server.place().join("rl_runs/smoke.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 2);

    // What fails is named, and ends the run with 1.
    let output = smoke(&["--url", &server.url, "--source", "nowhere"], None);
    assert_ended(&output, 1, &["FAIL  train: POST /adapter/train-lite answered 400, not 202", "nowhere"]);
    let output = smoke(&["--url", &server.url, "--timeout", "0"], None);
    assert_ended(&output, 1, &["FAIL  poll: the job has not ended after 0 s", "--timeout"]);
}

#[test]
fn failures_have_their_codes() {
    if !has_tools(&["bash", "curl", "jq"]) {
        return;
    }
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nobody = format!("http://127.0.0.1:{port}");
    assert_ended(&smoke(&["--url", &nobody], None), 2, &["FAIL  health: no server at", &nobody]);
    for wrong in [&["--ulr", "x"][..], &["--url"], &["--timeout", "soon"]] {
        assert_ended(&smoke(wrong, None), 2, &["smoke.sh: --", "usage: scripts/smoke.sh"]);
    }

    let (url, asked) = stub("HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello");
    assert_ended(
        &smoke(&["--url", &url], Some("a-key")),
        1,
        &["FAIL  health: the answer is not as promised"],
    );
    let request = asked.recv().unwrap();
    assert!(request.contains("authorization: Bearer a-key\r\n"), "{request}");

    let (url, asked) = stub(
        "HTTP/1.1 401 Unauthorized\r\ncontent-length: 44\r\nconnection: close\r\n\r\n\
         {\"error\":{\"message\":\"this key is not known\"}}",
    );
    assert_ended(&smoke(&["--url", &url], None), 1, &["FAIL  health:", "401", "this key is not known"]);
    assert!(!asked.recv().unwrap().contains("authorization"));

    // A server that is busy is asked six times in all, when it says.
    let (url, asked) = stub(
        "HTTP/1.1 429 Too Many Requests\r\nretry-after: 0\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}",
    );
    assert_ended(&smoke(&["--url", &url], None), 1, &["FAIL  health:", "429"]);
    assert_eq!(asked.try_iter().count(), 6);
}

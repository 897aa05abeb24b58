//! Names and paths of requests stay inside their folders, whatever they are spelled like and whatever lies there.

use std::path::Path;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Limits, Server, copy_adapter};

/// What no answer may hold: the content of files outside.
const OUTSIDE: &str = "what-lies-outside";

/// Names that try to be more, as they stand in a JSON body.
fn hostile(outside: &Path) -> Vec<String> {
    let long = "x".repeat(5000);
    let absolute = outside.join("secret.yaml").display().to_string();
    let up = format!("../{}", "../".repeat(20)) + absolute.trim_start_matches('/');
    let mut names: Vec<String> = [
        "..",
        ".",
        "../secret.yaml",
        "..\\secret.yaml",
        "a/../../secret.yaml",
        "./../secret.yaml",
        "//etc/passwd",
        "/etc/passwd",
        "C:\\windows\\win.ini",
        "\\\\host\\share\\x",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
        "~root/.ssh/id_rsa",
        "secret.yaml\0.yaml",
        "\0",
        "%2e%2e%2fsecret.yaml",
        "..%2fsecret.yaml",
        "..%c0%afsecret.yaml",
        // Full-width, one-dot leader, division and fraction slashes, and what looks like a letter.
        "．．／secret.yaml",
        "\u{2024}\u{2024}/secret.yaml",
        "..\u{2215}secret.yaml",
        "..\u{2044}secret.yaml",
        "\u{430}dapter",
        "a\u{202e}b",
        "con",
        "nul",
        "aux.txt",
        "com1",
        "lpt9.yaml",
        "link-out",
        "link-out/secret.yaml",
        "$HOME",
        "`id`",
        "; ls",
        "-rf",
        " ",
        "",
    ]
    .map(str::to_owned)
    .into();
    names.extend([long, absolute, up]);
    names
}

/// The same as a part of an address.
fn encoded(name: &str) -> String {
    name.bytes().map(|b| format!("%{b:02X}")).collect()
}

fn assert_harmless(what: &str, status: u16, body: &str) {
    assert!(status < 500, "{what}: {status} {body}");
    assert!(!body.contains(OUTSIDE) && !body.contains("root:x:"), "{what}: {body}");
}

/// A server beside a folder with secrets, to which links lead from wherever names are looked for.
async fn server() -> (Server, tempfile::TempDir) {
    let outside = tempfile::tempdir().expect("a folder can be made");
    let secret = format!("sources:\n  {OUTSIDE}: {{type: local, path: /etc/passwd}}\n");
    std::fs::write(outside.path().join("secret.yaml"), &secret).expect("can be written");
    copy_adapter(outside.path());
    let server = Server::start(Limits::default()).await;
    let data = server.data.path();
    for folder in ["adapters", "configs", "files", "jobs", "rl_runs"] {
        std::fs::create_dir_all(data.join(folder)).expect("can be made");
        #[cfg(unix)]
        std::os::unix::fs::symlink(outside.path(), data.join(folder).join("link-out")).expect("can be made");
    }
    std::fs::write(data.join("secret.yaml"), &secret).expect("can be written");
    #[cfg(unix)]
    std::os::unix::fs::symlink(outside.path().join("secret.yaml"), data.join("configs/link.yaml"))
        .expect("can be made");
    (server, outside)
}

/// Status and body for an address as it stands: clients would tidy it up.
async fn raw(server: &Server, method: &str, path: &str) -> (u16, String) {
    let address = server.base.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.expect("the server listens");
    let request =
        format!("{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("is taken");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("is answered");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.get(9..12).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no status: {answer}")), answer)
}

/// All files below a folder with their contents.
fn content(folder: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).expect("is a folder");
    let mut all: Vec<_> = entries
        .map(|entry| {
            let path = entry.expect("can be read").path();
            let bytes = std::fs::read(&path).expect("is a file");
            (path, bytes)
        })
        .collect();
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn names_in_addresses_stay_names() {
    let (server, outside) = server().await;
    let before = content(outside.path());
    for name in hostile(outside.path()) {
        for (method, start, end) in [
            ("GET", "/adapter/", ""),
            ("DELETE", "/adapter/", ""),
            ("GET", "/v1/models/", ""),
            ("GET", "/adapter/status/", ""),
            ("GET", "/adapter/logs/", ""),
            ("GET", "/adapter/logs/", "/tail"),
            ("GET", "/adapter/events/", ""),
            ("POST", "/adapter/cancel/", ""),
            ("POST", "/adapter/resume/", ""),
            ("GET", "/v1/files/", ""),
            ("DELETE", "/v1/files/", ""),
            ("GET", "/v1/files/", "/content"),
            ("GET", "/v1/fine_tuning/jobs/", ""),
            ("POST", "/v1/fine_tuning/jobs/", "/cancel"),
            ("GET", "/v1/fine_tuning/jobs/", "/events"),
            ("GET", "/v1/fine_tuning/jobs/", "/checkpoints"),
            ("GET", "/rl/uploads/", ""),
            ("POST", "/rl/uploads/", "/retry"),
            ("GET", "/docs/", ""),
        ] {
            let what = format!("{method} {start}{name:?}{end}");
            let (status, body) = raw(&server, method, &format!("{start}{}{end}", encoded(&name))).await;
            assert_harmless(&what, status, &body);
            // A link under the name of an adapter is an adapter that cannot be used, and can be taken away.
            let is_link = name == "link-out" && start == "/adapter/";
            let is_index = ["/docs/", "/v1/files/"].contains(&start) && name.is_empty();
            assert!(status >= 400 || is_link || is_index, "{what}: {status} {body}");
        }
    }
    assert_eq!(content(outside.path()), before, "nothing outside changed");
    assert_eq!(server.get("/health").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_in_bodies_stay_names() {
    let (server, outside) = server().await;
    let before = content(outside.path());
    let generate = |name: &str| json!({"prompt": "a", "max_new_tokens": 1, "adapter": name});
    let train = |field: &str, name: &str| {
        let mut body = json!({"source": "local", "adapter_name": "fine"});
        body[field] = name.into();
        body
    };
    for name in hostile(outside.path()).into_iter().chain(["link.yaml".to_owned()]) {
        let name = name.as_str();
        let mut bodies: Vec<(&str, Value)> = vec![
            ("/generate-lite", generate(name)),
            ("/generate-lite", json!({"prompt": "a", "max_new_tokens": 1, "adapter_path": name})),
            ("/v1/completions", json!({"model": name, "prompt": "a", "max_tokens": 1})),
            (
                "/v1/chat/completions",
                json!({"model": name, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
            ),
            ("/v1/fine_tuning/jobs", json!({"model": "fixtures/llama", "training_file": name})),
            ("/rl/collect", json!({"prompt": "a", "output": "b", "run_id": name})),
            ("/rl/collect", json!({"prompt": "a", "output": "b", "config_path": name})),
            ("/rl/collect", json!({"prompt": "a", "episodes": 1, "adapter": name})),
            ("/rl/train", json!({"adapter_name": name})),
        ];
        let fields = ["source", "adapter_name", "config_path", "mcp_config_path", "resume_from"];
        bodies.extend(fields.map(|field| ("/adapter/train-lite", train(field, name))));
        for (path, body) in bodies {
            let what = format!("{path} {body}");
            let response = server.send(path, &body).await;
            let status = response.status().as_u16();
            let text = response.text().await.expect("is text");
            assert_harmless(&what, status, &text);
            let is_base = name.trim().is_empty() && path == "/generate-lite";
            // Good names of runs, whose logs are beside the link and not behind it.
            let is_default = ["", "link-out", "link.yaml"].contains(&name) && path == "/rl/collect";
            assert!(status >= 400 || is_base || is_default, "{what}: {status} {text}");
        }
        let url = format!("{}/sources?mcp_config_path={}", server.base, encoded(name));
        let response = server.client.get(url).send().await.expect("answers");
        let status = response.status().as_u16();
        let text = response.text().await.expect("is text");
        assert_harmless(&format!("/sources {name:?}"), status, &text);
        assert!(status >= 400, "/sources {name:?}: {text}");
    }
    assert_eq!(content(outside.path()), before, "nothing outside changed");
    let runs: Vec<_> = std::fs::read_dir(server.data.path().join("rl_runs")).expect("is there").collect();
    for entry in runs {
        let name = entry.expect("can be read").file_name().into_string().expect("is UTF-8");
        assert!(name.is_ascii() && !name.starts_with(".."), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_out_of_the_adapters_folder_is_no_adapter() {
    let (server, _outside) = server().await;
    if cfg!(not(unix)) {
        return;
    }
    let (status, body) = server.post("/generate-lite", &json!({"prompt": "a", "adapter": "link-out"})).await;
    assert_eq!((status, &body["error"]["code"]), (422, &json!("adapter_invalid")));
    assert!(
        body["error"]["message"].as_str().is_some_and(|m| m.contains("leaves the adapters folder")),
        "{body}"
    );
    let (_, body) = server.get("/sources?mcp_config_path=link.yaml").await;
    let message = body["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("leads out of the configs folder"), "{body}");
}

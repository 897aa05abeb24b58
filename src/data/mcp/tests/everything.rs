//! The servers of `@modelcontextprotocol`: server-everything over stdio and streamable HTTP, server-filesystem; and
//! HTTP servers that answer by a script.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::super::super::tests::drain;
use super::super::super::{Cursor, SourceConfig};
use super::{quick, read, source};

/// A server's script inside the folder that `GURUKUL_TEST_MCP` names.
fn script(name: &str) -> Option<String> {
    let Ok(folder) = std::env::var("GURUKUL_TEST_MCP") else {
        eprintln!("skipped: GURUKUL_TEST_MCP names no folder with the servers of @modelcontextprotocol");
        return None;
    };
    let script = format!("{folder}/node_modules/@modelcontextprotocol/{name}/dist/index.js");
    assert!(std::path::Path::new(&script).exists(), "{script} is not there; install it with npm");
    Some(script)
}

fn everything() -> Option<Vec<String>> {
    Some(vec!["node".into(), script("server-everything")?])
}

/// server-everything at an address of this machine; ends with the test.
struct Remote {
    child: Child,
    url: String,
}

impl Remote {
    fn start() -> Option<Self> {
        let script = script("server-everything")?;
        // It listens everywhere on a port that it is told; the preload has it take any port of loopback and say it.
        let preload = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/loopback.cjs");
        let mut command = Command::new("node");
        command.args(["--require", preload, &script, "streamableHttp"]).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let port = lines.map_while(Result::ok).find_map(|line| Some(line.strip_prefix("port ")?.to_owned()));
        Some(Self { child, url: format!("http://127.0.0.1:{}/mcp", port.expect("it says its port")) })
    }

    fn source(&self, rest: Value) -> SourceConfig {
        remote(&self.url, rest)
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn remote(url: &str, rest: Value) -> SourceConfig {
    let mut typed = json!({"type": "mcp", "url": url, "timeout_s": 20});
    typed.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
    serde_json::from_value(typed).unwrap()
}

/// What both transports must give.
async fn check_everything(source: impl Fn(Value) -> SourceConfig) {
    let resources = json!({"resources": [
        {"template": "demo://resource/dynamic/text/{id}", "values": {"id": {"from": 1, "to": 3}}},
        {"template": "demo://resource/dynamic/blob/{id}", "values": {"id": [7]}},
    ]});
    let (rows, error) = read(&source(resources)).await;
    assert_eq!((rows.len(), error), (4, None));
    assert!(
        rows[1]["text"].as_str().unwrap().starts_with("Resource 2: This is a plaintext resource"),
        "{}",
        rows[1]
    );
    assert!(
        rows[3]["text"].as_str().unwrap().starts_with("Resource 7: This is a base64 blob"),
        "{}",
        rows[3]
    );

    let (rows, error) = read(&source(json!({"resources": ["demo://resource/static/document/*"]}))).await;
    assert_eq!(error, None);
    assert!(rows.len() > 50, "the lines of its documents, of which there are {}", rows.len());

    let tool = json!({"name": "get-structured-content", "arguments": {"location": "Chicago"}});
    let (rows, error) = read(&source(json!({"tool": tool}))).await;
    let expected = json!({"temperature": 36, "conditions": "Light rain / drizzle", "humidity": 82});
    assert_eq!((rows, error), (vec![expected], None));

    let (_, error) =
        read(&source(json!({"tool": {"name": "echo", "arguments": {"message": "hello"}}}))).await;
    assert!(error.as_ref().unwrap().contains("is no JSON"), "{error:?}");
    let (_, error) = read(&source(json!({"tool": {"name": "get-structured-content"}}))).await;
    assert!(error.as_ref().unwrap().contains("tool get-structured-content"), "{error:?}");
    let (_, error) = read(&source(json!({"tool": {"name": "no-tool"}}))).await;
    assert!(error.as_ref().unwrap().contains("no such tool, but echo"), "{error:?}");
    let (_, error) = read(&source(json!({"resources": ["demo://resource/none"]}))).await;
    assert!(error.as_ref().unwrap().contains("demo://resource/none"), "{error:?}");
    let slow = json!({"tool": {"name": "trigger-long-running-operation", "arguments": {"duration": 60, "steps": 1}},
        "timeout_s": 1});
    let (_, error) = read(&source(slow)).await;
    assert!(error.as_ref().unwrap().contains("no answer came within 1 s"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn server_everything_is_read_over_stdio() {
    let Some(command) = everything() else { return };
    check_everything(|rest| source(&command, rest)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_everything_is_read_over_http() {
    let Some(server) = Remote::start() else { return };
    check_everything(|rest| server.source(rest)).await;
    let elsewhere = server.url.replace("/mcp", "/none");
    let (_, error) = read(&remote(&elsewhere, json!({"tool": {"name": "echo"}}))).await;
    let error = error.unwrap();
    assert!(error.contains("404") && error.contains("is url the address of an MCP server?"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn server_filesystem_gives_the_rows_of_a_file() {
    let Some(script) = script("server-filesystem") else { return };
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().canonicalize().unwrap();
    let rows: Vec<Value> = (0..200).map(|n| json!({"n": n, "text": "पाठ"})).collect();
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(folder.join("lessons.jsonl"), text).unwrap();
    let command = ["node".to_owned(), script, folder.to_str().unwrap().to_owned()];
    let file = folder.join("lessons.jsonl");
    let tool =
        |path: &str| json!({"name": "read_text_file", "rows_path": "content", "arguments": {"path": path}});
    let (found, error) = read(&source(&command, json!({"tool": tool(file.to_str().unwrap())}))).await;
    assert_eq!((found, error), (rows, None));
    let (_, error) = read(&source(&command, json!({"tool": tool("/etc/hostname")}))).await;
    assert!(error.as_ref().unwrap().contains("the tool failed: Access denied"), "{error:?}");
    let (_, error) = read(&source(&command, json!({"resources": ["file:///lessons.jsonl"]}))).await;
    assert!(error.as_ref().unwrap().contains("the server has no resources"), "{error:?}");
}

/// A server that answers every request alike; how often it was asked.
async fn alike(answer: &'static str) -> (String, std::sync::Arc<std::sync::atomic::AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/mcp", listener.local_addr().unwrap());
    let count = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = count.clone();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            tokio::spawn(async move {
                let mut request = [0; 4096];
                let _ = socket.read(&mut request).await;
                let _ = socket.write_all(answer.as_bytes()).await;
            });
        }
    });
    (url, count)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_mcp_server_or_refuses_is_said() {
    for (answer, attempts, expected) in [
        (
            "HTTP/1.1 429 No\r\nretry-after: 0\r\ncontent-length: 0\r\n\r\n",
            3,
            "answered 429 (after 3 attempts)",
        ),
        ("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", 3, "answered 503 (after 3 attempts)"),
        (
            "HTTP/1.1 401 No\r\nwww-authenticate: Bearer\r\ncontent-length: 0\r\n\r\n",
            1,
            "name the header under headers_env",
        ),
        ("HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n", 1, "name the header under headers_env"),
        ("HTTP/1.1 403 No\r\ncontent-length: 0\r\n\r\n", 1, "name the header under headers_env"),
        ("HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n", 1, "is url the address of an MCP server?"),
        ("HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>", 1, "correct url"),
    ] {
        let (url, count) = alike(answer).await;
        let source = remote(&url, json!({"tool": {"name": "rows"}}));
        let (_, error) = drain(source.open_patiently("notes", Cursor::default(), quick())).await;
        let error = error.expect(expected);
        assert!(error.contains(expected), "{answer}: {error}");
        assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), attempts, "{answer}: {error}");
    }
}

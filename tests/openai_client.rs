//! The official `openai` Python client against the server. Needs an interpreter that has the package, in
//! `GURUKUL_TEST_PYTHON`; the checks themselves are in `openai_client.py`.
#![expect(clippy::print_stderr, reason = "a test that skips says so, and one that fails shows why")]

#[expect(dead_code, reason = "the client brings its own requests")]
mod support;

use support::{ADAPTER, Limits, MODEL, Server};

#[tokio::test(flavor = "multi_thread")]
async fn the_official_client_drives_the_server() {
    let Some(python) = std::env::var_os("GURUKUL_TEST_PYTHON") else {
        eprintln!("skipped: GURUKUL_TEST_PYTHON names no interpreter with the openai package");
        return;
    };
    let server = Server::start(Limits::default()).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai_client.py");
    let mut command = std::process::Command::new(python);
    command.arg(script).args([&format!("{}/v1", server.base), MODEL, ADAPTER]);
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.expect("does not panic").expect("the interpreter starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    eprintln!("{out}{err}");
    assert!(output.status.success(), "the client is not content");
    assert!(out.trim_end().ends_with("all checks passed"), "the script did not come to its end");
}

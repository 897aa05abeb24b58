//! Every command of `docs/TUTORIAL.md`, as it stands there, against the built binary; only the address and the
//! binary's path are others.
#![expect(clippy::print_stderr, reason = "a test that skips says so")]
#![cfg(unix)]

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

/// The shell blocks of a Markdown text, one after the other.
fn commands(markdown: &str) -> String {
    let blocks = markdown.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_lesson_teaches_nepali() {
    for tool in ["bash", "curl", "jq"] {
        let found = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if found.is_err() {
            assert!(std::env::var_os("GURUKUL_TEST_PYTHON").is_none(), "{tool} must be there in CI");
            eprintln!("skipped: {tool} is not installed");
            return;
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let lesson = std::fs::read_to_string(root.join("docs/TUTORIAL.md")).unwrap();
    let script = commands(&lesson)
        .replace("cargo build --release\n", "")
        .replace("target/release/gurukul", env!("CARGO_BIN_EXE_gurukul"))
        .replace("8110", &port.to_string());
    assert!(script.contains("train-lite") && script.contains(" eval "), "the lesson has its commands");

    let place = tempfile::tempdir().unwrap();
    for folder in ["assets", "configs"] {
        std::os::unix::fs::symlink(root.join(folder), place.path().join(folder)).unwrap();
    }
    let output = Command::new("bash")
        // Job control lets `kill %1` work; the trap ends the server when a command fails.
        .args([
            "-c",
            &format!("set -emuo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{script}"),
        ])
        .current_dir(place.path())
        .env("GURUKUL_PORT", port.to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let log = std::fs::read_to_string(place.path().join("server.log")).unwrap_or_default();
    let all = format!("{said}\n{}\n{log}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{all}");

    // Of the two times that the base was asked for Nepali, before and after; and of Hindi.
    assert_eq!(said.matches("I do not know this language yet.").count(), 2, "{all}");
    assert!(said.matches("नदी कहाँ है?").count() >= 2, "{all}");
    // chrF over the held-out sentences, without the adapter and with it.
    let rows = said.lines().filter(|line| line.starts_with("nepali "));
    let scores: Vec<f64> = rows.filter_map(|row| row.split_whitespace().nth(4)?.parse().ok()).collect();
    assert!(matches!(scores[..], [without, with] if without < 15.0 && with >= 30.0), "{scores:?}: {all}");
}

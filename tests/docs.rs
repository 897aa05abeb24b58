//! Every command of README.md and of the guides in docs/, as it stands there, against the built binary in a scratch copy
//! of the repository. A block is marked ```sh; ```sh refused is one whose last command must fail, and ```sh no-run: with a
//! reason is not run. What names like JOB_ID stand for is in `PLACEHOLDERS`, what a page takes for granted in `GIVEN`.
//! `docs/TUTORIAL.md` has a test of its own, which looks at what its commands say.
#![cfg(unix)]

#[path = "support/tools.rs"]
mod tools;

use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use tools::{has_tools, root};

/// Seconds that the commands of a page may take together.
const PAGE_S: u32 = 240;

/// What stands for something that an answer gave, or that a reader has.
const PLACEHOLDERS: &[(&str, &str)] = &[
    ("JOB_ID", "$(newest adapter/jobs .jobs[0].job_id)"),
    ("TUNING_ID", "$(newest v1/fine_tuning/jobs .data[0].id)"),
    ("FILE_ID", "$(newest v1/files .data[0].id)"),
    ("UPLOAD_ID", "no-such-upload"),
    ("FOLDER_OR_HUB_ID", "assets/demo"),
    ("FOLDER", "assets/demo"),
];

/// What a page takes for granted: commands with no server running, before its own.
const GIVEN: &[(&str, &str)] = &[
    (
        "README.md",
        "gurukul train --source phrasebook --max-samples 16 --adapter my-hindi
         head -n 20 assets/phrasebook/heldout.jsonl > rows.jsonl",
    ),
    (
        "docs/OPERATIONS.md",
        "mkdir gurukul-data
         gurukul train --source phrasebook --max-samples 16 --adapter kept --data-dir gurukul-data",
    ),
    (
        "docs/RL_GUIDE.md",
        r#"gurukul train --source phrasebook --max-samples 16 --adapter hindi-v1
         printf '{"prompt": "Translate to Hindi: Good morning."}\n' > my_prompts.jsonl"#,
    ),
];

/// Lines that stand for what has happened already: this test is of a built binary, and the tests run.
const DONE: &[&str] = &["cargo run --release", "cargo test --release", "cargo build --release"];

/// Defines what the commands are run with. `$binary`, `$url` and `$port` are set before.
const PRELUDE: &str = r#"
set -euo pipefail
export GURUKUL_PORT=$port HF_HUB_OFFLINE=1 PATH=$PWD/bin:$PATH
mkdir bin data
head -n 40 assets/phrasebook/train.jsonl | jq -c '{prompt: ("Translate to Hindi: " + .en), completion: .hi}' > data/lessons.jsonl
ln -s "$binary" bin/gurukul
# An error of the server is a failure of the command. Not so in scripts, which look at the status themselves.
curl() { command curl --fail-with-body --max-time 120 "$@"; }
newest() { curl -s "$url/$1?limit=1" | jq -r "$2"; }
server=
up() {
    [ -z "$server" ] || return 0
    gurukul serve > server.log 2>&1 &
    server=$!
    for _ in $(seq 200); do ! curl -s "$url/health" > /dev/null 2>&1 || return 0; sleep 0.1; done
    cat server.log; return 1
}
down() {
    [ -n "$server" ] || return 0
    kill "$server"; wait "$server"; server=
}
trap 'kill ${server:-} 2> /dev/null || true' EXIT
"#;

#[derive(Debug, PartialEq)]
enum Kind {
    Run,
    Refused,
    NoRun(String),
}

#[derive(Debug)]
struct Block {
    line: usize,
    kind: Kind,
    text: String,
}

/// The shell blocks of a page.
fn blocks(page: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut inside = None;
    for (number, line) in page.lines().enumerate() {
        let fence = line.trim_start().strip_prefix("```");
        match (fence, inside) {
            (Some(_), Some(is_shell)) => {
                inside = None;
                let _: bool = is_shell;
            }
            (Some(info), None) => {
                let mut words = info.splitn(2, ' ');
                let is_shell = matches!(words.next(), Some("sh" | "bash" | "shell" | "console"));
                inside = Some(is_shell);
                if is_shell {
                    let kind = match words.next().unwrap_or_default().trim() {
                        "" => Kind::Run,
                        "refused" => Kind::Refused,
                        mark => match mark.strip_prefix("no-run:") {
                            Some(reason) => Kind::NoRun(reason.trim().to_owned()),
                            None => panic!("line {}: {mark:?} is no mark of a block", number + 1),
                        },
                    };
                    found.push(Block { line: number + 1, kind, text: String::new() });
                }
            }
            (None, Some(true)) => {
                let block = found.last_mut().expect("a block has begun");
                block.text += line;
                block.text.push('\n');
            }
            (None, _) => {}
        }
    }
    found
}

/// A page's commands as one script.
fn script(page: &str, given: &str, port: u16) -> String {
    let mut script = PRELUDE.to_owned() + given + "\n";
    for block in blocks(page) {
        if let Kind::NoRun(_) = block.kind {
            continue;
        }
        let mut text: String = block
            .text
            .lines()
            .filter(|line| !DONE.contains(line))
            .map(|line| line.replace("cargo run --release -- ", "gurukul ") + "\n")
            .collect();
        // The data folder is one process's: what needs no server runs without one.
        let state = if text.contains("8110") { "up" } else { "down" };
        for (placeholder, stands_for) in PLACEHOLDERS {
            text = text.replace(placeholder, stands_for);
        }
        text = text.replace("8110", &port.to_string());
        let _ = writeln!(script, "{state}\necho '== line {}'", block.line);
        if block.kind == Kind::Refused {
            let _ = writeln!(script, "if ( {text} ); then echo 'that was not refused'; exit 1; fi");
        } else {
            script += &text;
        }
    }
    script + "down\necho '== end'\n"
}

fn run(name: &str) {
    if !has_tools(&["bash", "curl", "jq"]) {
        return;
    }
    let page = std::fs::read_to_string(root().join(name)).unwrap();
    let given = GIVEN.iter().find(|(page, _)| *page == name).map_or("", |(_, given)| given);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let script = script(&page, given, port);
    let place = tempfile::tempdir().unwrap();
    for folder in ["assets", "docs", "scripts", "test_prompts", "tests"] {
        std::os::unix::fs::symlink(root().join(folder), place.path().join(folder)).unwrap();
    }
    copy(&root().join("configs"), &place.path().join("configs"));
    let mut command = Command::new("timeout");
    command.args([&PAGE_S.to_string(), "bash", "-c", &script]).current_dir(place.path());
    for (variable, _) in std::env::vars() {
        if variable.starts_with("GURUKUL_") || variable.starts_with("HF_") || variable == "RUST_LOG" {
            command.env_remove(variable);
        }
    }
    command.env("binary", env!("CARGO_BIN_EXE_gurukul")).env("port", port.to_string());
    let output = command.env("url", format!("http://127.0.0.1:{port}")).output().unwrap();
    let log = std::fs::read_to_string(place.path().join("server.log")).unwrap_or_default();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("== end"),
        "{name}: {:?}\n{said}\n{}\n-- server.log\n{log}",
        output.status.code(),
        String::from_utf8_lossy(&output.stderr),
    );
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn the_readme() {
    run("README.md");
}

#[test]
fn the_api_guide() {
    run("docs/API_USAGE_GUIDE.md");
}

#[test]
fn the_training_guide() {
    run("docs/TRAINING_GUIDE.md");
}

#[test]
fn the_streaming_guide() {
    run("docs/STREAMING_GUIDE.md");
}

#[test]
fn the_guide_to_reinforcement_learning() {
    run("docs/RL_GUIDE.md");
}

#[test]
fn the_page_on_operations() {
    run("docs/OPERATIONS.md");
}

#[test]
fn the_page_on_security() {
    run("docs/SECURITY.md");
}

/// The test of each page, or why it has none here.
#[test]
fn no_page_is_forgotten_and_what_is_not_run_says_why() {
    let own = std::fs::read_to_string(root().join("tests/docs.rs")).unwrap();
    for entry in std::fs::read_dir(root().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let elsewhere = ["TUTORIAL.md", "LOG.md"].contains(&name.as_str());
        if name.ends_with(".md") && !elsewhere {
            let text = std::fs::read_to_string(root().join("docs").join(&name)).unwrap();
            for block in blocks(&text) {
                if let Kind::NoRun(reason) = &block.kind {
                    assert!(reason.len() >= 10, "docs/{name}:{}: say why it is not run", block.line);
                }
            }
            assert!(own.contains(&format!("run(\"docs/{name}\");")), "docs/{name} has no test here");
        }
    }
}

#[test]
fn blocks_and_their_marks_are_found() {
    let page = "text\n```sh\na 1\nb\n```\n```json\n{}\n```\n```sh refused\nc\n```\n```sh no-run: needs a card\nd\n```\n";
    let found = blocks(page);
    let of = |n: usize| (found[n].line, &found[n].kind, found[n].text.as_str());
    assert_eq!(of(0), (2, &Kind::Run, "a 1\nb\n"));
    assert_eq!(of(1), (9, &Kind::Refused, "c\n"));
    assert_eq!(of(2), (12, &Kind::NoRun("needs a card".into()), "d\n"));
    assert_eq!(found.len(), 3);
    assert!(std::panic::catch_unwind(|| blocks("```sh later\nx\n```\n")).is_err());

    let script = script("```sh\ncargo run --release\n```\n```sh\ncurl localhost:8110/x/JOB_ID\n```\n", "", 7);
    assert!(
        !script.contains("cargo run") && script.contains("curl localhost:7/x/$(newest adapter/jobs"),
        "{script}"
    );
}

#[test]
fn a_command_that_fails_fails_its_page() {
    if !has_tools(&["bash", "curl", "jq"]) {
        return;
    }
    for (page, fails) in [
        ("```sh\ntrue\n```\n", false),
        ("```sh\nfalse\ntrue\n```\n", true),
        ("```sh refused\ntrue\nfalse\n```\n", false),
        ("```sh refused\ntrue\n```\n", true),
        ("```sh no-run: it would fail here\nfalse\n```\n", false),
    ] {
        let place = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(root().join("assets"), place.path().join("assets")).unwrap();
        let mut command = Command::new("bash");
        command.args(["-c", &script(page, "", 1)]).current_dir(place.path());
        command.env("binary", "/bin/true").env("port", "1").env("url", "http://127.0.0.1:1");
        assert_eq!(command.output().unwrap().status.success(), !fails, "{page}");
    }
}

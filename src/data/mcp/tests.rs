//! MCP servers as sources: our own by the Python SDK (`GURUKUL_TEST_PYTHON` with `mcp`), those that the protocol's
//! makers publish on npm (`GURUKUL_TEST_MCP`, a folder that they are installed in), over stdio and HTTP.
#![expect(clippy::print_stderr, reason = "a test that skips says so")]

mod everything;

use std::path::Path;
use std::time::Duration;

use futures::StreamExt as _;
use serde_json::{Value, json};

use super::super::object::Patience;
use super::super::tests::drain;
use super::super::{Cursor, SourceConfig};

pub(super) fn quick() -> Patience {
    Patience {
        connect: Duration::from_secs(5),
        idle: Duration::from_secs(5),
        retries: 2,
        backoff: Duration::from_millis(10),
    }
}

pub(super) fn source(command: &[String], rest: Value) -> SourceConfig {
    let mut typed = json!({"type": "mcp", "command": command, "timeout_s": 20});
    typed.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
    serde_json::from_value(typed).unwrap()
}

pub(super) async fn read(source: &SourceConfig) -> (Vec<Value>, Option<String>) {
    drain(source.open_patiently("notes", Cursor::default(), quick())).await
}

/// Our own server with some arguments; `None` where there is no Python for it.
fn ours(arguments: &[&str]) -> Option<Vec<String>> {
    let Ok(python) = std::env::var("GURUKUL_TEST_PYTHON") else {
        eprintln!("skipped: GURUKUL_TEST_PYTHON names no interpreter with the mcp package");
        return None;
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mcp_server.py");
    Some([python.as_str(), script].iter().chain(arguments).map(|&word| word.to_owned()).collect())
}

fn paged(tool: &str) -> Value {
    json!({"tool": {"name": tool, "cursor_argument": "cursor", "cursor_path": "page.next", "rows_path": "page.rows"}})
}

fn ids(rows: &[Value]) -> Vec<u64> {
    rows.iter().map(|row| row["id"].as_u64().unwrap()).collect()
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_gives_its_rows_page_by_page() {
    let Some(command) = ours(&["--rows", "25", "--page", "10"]) else { return };
    for tool in ["paged", "paged_text"] {
        let (rows, error) = read(&source(&command, paged(tool))).await;
        assert_eq!(error, None, "{tool}");
        assert_eq!(ids(&rows), (0..25).collect::<Vec<_>>(), "{tool}");
        assert_eq!(rows[3]["completion"], "Lesson 3 is पाठ 3.");
    }
    // Once, where nothing is said of a cursor.
    let once =
        json!({"tool": {"name": "paged", "rows_path": "page.rows", "arguments": {"cursor": "row-20"}}});
    let (rows, error) = read(&source(&command, once)).await;
    assert_eq!((ids(&rows), error), ((20..25).collect(), None));
    let (rows, error) = read(&source(&command, json!({"tool": {"name": "texts"}}))).await;
    assert_eq!((rows.len(), error), (25, None));
    let (rows, error) =
        read(&source(&command, json!({"tool": {"name": "lines"}, "max_bad_rows": 0.1}))).await;
    assert_eq!((rows.len(), error), (25, None), "the last line is a bad row");
    let (_, error) = read(&source(&command, json!({"tool": {"name": "lines"}}))).await;
    assert!(error.unwrap().contains("line 26 is no JSON object"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_goes_on_at_the_cursor_of_its_page() {
    let dir = tempfile::tempdir().unwrap();
    let starts = dir.path().join("starts");
    let Some(command) = ours(&["--rows", "25", "--page", "10", "--starts", starts.to_str().unwrap()]) else {
        return;
    };
    let source = source(&command, paged("paged"));
    for taken in [1, 10, 11, 24] {
        let mut stream = source.open_patiently("notes", Cursor::default(), quick());
        let mut seen = Vec::new();
        for _ in 0..taken {
            seen.push(stream.next().await.unwrap().unwrap().fields["id"].as_u64().unwrap());
        }
        let cursor = serde_json::to_string(&stream.cursor()).unwrap();
        drop(stream);
        let (rest, error) =
            drain(source.open_patiently("notes", serde_json::from_str(&cursor).unwrap(), quick())).await;
        seen.extend(ids(&rest));
        assert_eq!((seen, error), ((0..25).collect(), None), "{taken}");
    }
    assert_eq!(lines(&starts), 8, "a server for each reading");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_is_started_again_and_goes_on_at_its_page() {
    let dir = tempfile::tempdir().unwrap();
    let (starts, died) = (dir.path().join("starts"), dir.path().join("died"));
    let [starts_arg, died_arg] = [&starts, &died].map(|path| path.to_str().unwrap());
    let arguments =
        ["--rows", "25", "--page", "10", "--starts", starts_arg, "--die-at", "row-10", "--died", died_arg];
    let Some(command) = ours(&arguments) else { return };
    let (rows, error) = read(&source(&command, paged("paged"))).await;
    assert_eq!((ids(&rows), error), ((0..25).collect(), None), "none twice, none missing");
    assert!(died.exists());
    assert_eq!(lines(&starts), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_keeps_dying_ends_the_stream() {
    // The folder cannot hold the mark of its death, so it dies each time, and says why.
    let Some(command) =
        ours(&["--rows", "25", "--page", "10", "--die-at", "row-10", "--died", "/dev/null/x"])
    else {
        return;
    };
    let (rows, error) = read(&source(&command, paged("paged"))).await;
    let error = error.unwrap();
    assert_eq!(rows.len(), 10, "{error}");
    assert!(error.contains("tool paged"), "{error}");
    // One that is no server at all.
    let (_, error) = read(&source(&["false".into()], paged("paged"))).await;
    let error = error.unwrap();
    assert!(error.contains("the server ended") && error.contains("(3 attempts)"), "{error}");
    let noisy = ["sh".to_owned(), "-c".into(), "echo no such module >&2; exit 1".into()];
    let (_, error) = read(&source(&noisy, paged("paged"))).await;
    assert!(error.as_ref().unwrap().contains("no such module"), "{error:?}");
    let (_, error) = read(&source(&["gurukul-no-such-program".into()], paged("paged"))).await;
    let error = error.unwrap();
    assert!(error.contains("cannot be started") && error.contains("install it"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tool_does_wrong_is_said() {
    let Some(command) = ours(&[]) else { return };
    for (rest, expected) in [
        (json!({"tool": {"name": "refuses"}}), "the tool failed: the table is locked"),
        (json!({"tool": {"name": "breaks"}}), "the server failed: disk on fire (3 attempts)"),
        (json!({"tool": {"name": "prose"}}), "is no JSON: 'There are many rows.'"),
        (json!({"tool": {"name": "listed"}}), "no such tool, but paged, paged_text"),
        (paged("circle"), "leads to itself"),
        (paged("endless"), "page 999: 1000 pages in a row have no rows"),
        (
            json!({"tool": {"name": "paged", "rows_path": "page.lines"}}),
            "nothing at rows_path page.lines; it has page",
        ),
        (json!({"tool": {"name": "texts", "rows_path": "page"}}), "take rows_path out"),
        (json!({"tool": {"name": "paged", "rows_path": "page.rows.0.id"}}), "neither a list nor an object"),
        (json!({"tool": {"name": "stuck"}, "timeout_s": 1}), "no answer came within 1 s"),
        (json!({"tool": {"name": "big", "rows_path": "rows"}, "timeout_s": 3}), "no answer came within 3 s"),
        (json!({"resources": ["notes://none"]}), "Resource not found: notes://none"),
        (json!({"resources": ["other://*"]}), "none of its 4 resources fits other://*"),
    ] {
        let (_, error) = read(&source(&command, rest)).await;
        let error = error.expect(expected);
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tools_or_resources_says_so_in_plain_words() {
    let Some(command) = ours(&["--without", "tools"]) else { return };
    let (_, error) = read(&source(&command, paged("paged"))).await;
    let error = error.unwrap();
    assert!(error.contains("the server has no tools") && error.contains("-32601"), "{error}");
    let Some(command) = ours(&["--without", "resources"]) else { return };
    for uri in ["notes://all/table", "notes://*"] {
        let (_, error) = read(&source(&command, json!({"resources": [uri]}))).await;
        let error = error.unwrap();
        assert!(error.contains("the server has no resources") && error.contains("-32601"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn resources_are_files_in_their_formats() {
    let Some(command) = ours(&["--rows", "5"]) else { return };
    // Formats by media type (a table), by the name, and by the first character (an array, a blob).
    for (uri, first, rows) in [
        (
            "notes://all/lessons.jsonl",
            json!({"id": 0, "prompt": "What is lesson 0?", "completion": "Lesson 0 is पाठ 0."}),
            5,
        ),
        ("notes://all/table", json!({"prompt": "red", "completion": "लाल"}), 2),
        (
            "notes://all/array",
            json!({"id": 0, "prompt": "What is lesson 0?", "completion": "Lesson 0 is पाठ 0."}),
            3,
        ),
        ("notes://all/packed", json!({"text": "packed"}), 1),
    ] {
        let (found, error) = read(&source(&command, json!({"resources": [uri]}))).await;
        assert_eq!((found.len(), error), (rows, None), "{uri}");
        assert_eq!(found[0], first, "{uri}");
    }
    let (found, error) = read(&source(&command, json!({"resources": ["notes://all/*"]}))).await;
    assert_eq!((found.len(), error), (11, None));
    let template = json!({"resources": [
        {"template": "notes://row/{id}", "values": {"id": {"from": 1, "to": 3}}},
        {"template": "notes://row/{id}", "values": {"id": [0, "4"]}},
    ]});
    let (found, error) = read(&source(&command, template)).await;
    assert_eq!((ids(&found), error), (vec![1, 2, 3, 0, 4], None));
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_resources_goes_on_at_its_cursor() {
    let Some(command) = ours(&["--rows", "5"]) else { return };
    let source = source(&command, json!({"resources": ["notes://all/*"]}));
    let (all, _) = read(&source).await;
    for taken in [1, 5, 6, 10] {
        let mut stream = source.open_patiently("notes", Cursor::default(), quick());
        let mut seen = Vec::new();
        for _ in 0..taken {
            seen.push(Value::Object(stream.next().await.unwrap().unwrap().fields));
        }
        let cursor = serde_json::to_string(&stream.cursor()).unwrap();
        drop(stream);
        let (rest, error) =
            drain(source.open_patiently("notes", serde_json::from_str(&cursor).unwrap(), quick())).await;
        seen.extend(rest);
        assert_eq!((&seen, error), (&all, None), "{taken}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_gets_little_of_the_environment() {
    let Some(command) = ours(&[]) else { return };
    let rest = json!({"tool": {"name": "environment", "rows_path": "rows"}, "env_from": ["CARGO_PKG_NAME"]});
    let (rows, error) = read(&source(&command, rest)).await;
    assert_eq!(error, None);
    let names: Vec<&str> = rows[0].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(rows[0]["CARGO_PKG_NAME"], "gurukul");
    assert!(names.contains(&"PATH") && !names.contains(&"CARGO_PKG_VERSION"), "{names:?}");
    assert!(!names.iter().any(|name| name.starts_with("GURUKUL_")), "{names:?}");
    let rest = json!({"tool": {"name": "environment"}, "env_from": ["GURUKUL_NOT_SET"]});
    let (_, error) = read(&source(&command, rest)).await;
    assert!(error.unwrap().contains("environment variable GURUKUL_NOT_SET is not set"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_ends_with_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let starts = dir.path().join("starts");
    let Some(command) = ours(&["--starts", starts.to_str().unwrap()]) else { return };
    let mut stream = source(&command, paged("paged")).open_patiently("notes", Cursor::default(), quick());
    stream.next().await.unwrap().unwrap();
    let process = std::fs::read_to_string(&starts).unwrap();
    let process = Path::new("/proc").join(process.trim());
    if !Path::new("/proc/self").exists() {
        eprintln!("skipped: there is no /proc to look for the server in");
        return;
    }
    assert!(process.exists());
    drop(stream);
    let ended = async {
        while process.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended).await.expect("the server ends");
}

#[test]
fn settings_that_cannot_be_are_refused_by_name() {
    let tool = || json!({"name": "rows"});
    for (typed, expected) in [
        (json!({"tool": tool()}), "give command"),
        (json!({"command": ["x"], "url": "http://h/mcp", "tool": tool()}), "either command or url"),
        (json!({"command": [" "], "tool": tool()}), "command"),
        (json!({"command": "npx -y server", "tool": tool()}), "command"),
        (json!({"url": "h/mcp", "tool": tool()}), "url"),
        (json!({"url": "http://u:p@h/mcp", "tool": tool()}), "url"),
        (json!({"url": "http://h/mcp", "env_from": ["A"], "tool": tool()}), "env_from"),
        (json!({"command": ["x"], "headers_env": {"A": "B"}, "tool": tool()}), "headers_env"),
        (
            json!({"url": "http://h/mcp", "headers_env": {"Mcp-Session-Id": "B"}, "tool": tool()}),
            "headers_env",
        ),
        (json!({"command": ["x"], "env_from": ["A=s3cr3t"], "tool": tool()}), "env_from"),
        (json!({"command": ["x"]}), "give resources"),
        (json!({"command": ["x"], "tool": tool(), "resources": ["a:b"]}), "either resources or tool"),
        (json!({"command": ["x"], "tool": {"name": ""}}), "name"),
        (json!({"command": ["x"], "tool": {"name": "a", "cursor_argument": "c"}}), "cursor_path"),
        (json!({"command": ["x"], "tool": {"name": "a", "cursor_path": "c"}}), "cursor_argument"),
        (
            json!({"command": ["x"], "tool": {"name": "a", "cursor_argument": "c", "cursor_path": "d"}}),
            "rows_path",
        ),
        (
            json!({"command": ["x"], "tool": {"name": "a", "cursor_argument": "c", "cursor_path": "d", "rows_path": "e",
                "arguments": {"c": 1}}}),
            "arguments",
        ),
        (json!({"command": ["x"], "tool": {"name": "a", "argument": 1}}), "argument"),
        (json!({"command": ["x"], "resources": ["lessons.jsonl"]}), "is no URI"),
        (json!({"command": ["x"], "resources": ["a://{b}"]}), "template"),
        (json!({"command": ["x"], "resources": [{"template": "a://b", "values": {}}]}), "no {name}"),
        (json!({"command": ["x"], "resources": [{"template": "a://{b", "values": {}}]}), "no template"),
        (json!({"command": ["x"], "resources": [{"template": "a://{b}", "values": {}}]}), "nothing for {b}"),
        (
            json!({"command": ["x"], "resources": [{"template": "a://{b}", "values": {"b": []}}]}),
            "values of b",
        ),
        (
            json!({"command": ["x"], "resources": [{"template": "a://{b}", "values": {"b": [1], "c": [1]}}]}),
            "no {c}",
        ),
        (
            json!({"command": ["x"], "resources": [{"template": "a://{b}", "values": {"b": {"from": 0, "to": i64::MAX}}}]}),
            "more than 100000",
        ),
        (json!({"command": ["x"], "tool": tool(), "timeout_s": 0}), "timeout_s"),
        (json!({"command": ["x"], "tool": tool(), "env": {"A": "b"}}), "env"),
    ] {
        let mut typed = typed;
        typed["type"] = "mcp".into();
        let error = serde_json::from_value::<SourceConfig>(typed.clone()).expect_err(expected).to_string();
        assert!(error.contains(expected), "{typed}: {error}");
        assert!(!error.contains("s3cr3t"), "{error}");
    }
    let typed = json!({"type": "mcp", "command": ["npx", "-y", "x"], "env_from": ["A"], "resources": ["a://b",
        {"template": "c://{d}/{e}", "values": {"d": {"from": 1, "to": 2}, "e": ["x", 3]}}]});
    let source: SourceConfig = serde_json::from_value(typed).unwrap();
    let kept = serde_json::to_string(&source).unwrap();
    assert_eq!(serde_json::from_str::<SourceConfig>(&kept).unwrap(), source);
}

//! The connectors file: the shipped one, names, and files that are none.

use super::*;
use crate::data::Location;

fn load(text: &str) -> Result<Connectors, FieldError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(FILE_NAME), text).unwrap();
    Connectors::load(dir.path(), None)
}

#[test]
fn the_shipped_file_is_a_template_that_works() {
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/configs");
    let connectors = Connectors::load(Path::new(shipped), None).unwrap();
    assert_eq!(connectors.names().collect::<Vec<_>>(), ["local", "phrasebook-nepali"]);
    // Every key that is said is the default but for the path.
    assert_eq!(connectors.source("local").unwrap(), &SourceConfig::local("data"));

    // The examples in it can be used as they are, with the marks in front of their keys taken away.
    let text = std::fs::read_to_string(Path::new(shipped).join(FILE_NAME)).unwrap();
    let uncommented: String = text
        .lines()
        .map(|line| match line.strip_prefix("  #") {
            Some(rest) if !rest.starts_with(' ') || rest.starts_with("  ") => format!("  {rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let all = load(&uncommented).unwrap();
    assert_eq!(all.names().collect::<Vec<_>>(), ["local", "questions", "remote", "translations"]);
    assert_eq!(all.source("translations").unwrap().fields["target"], "translation.hi");
    let Location::Http { headers_env, .. } = &all.source("remote").unwrap().location else {
        panic!("remote is fetched");
    };
    assert_eq!(headers_env["Authorization"], "LESSONS_AUTHORIZATION");
    // Each key has its explanation above it.
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let is_comment = |line: &str| line.starts_with("# ");
    for key in ["sources:", "local:", "type:", "path:", "format:", "skip:", "max_bad_rows:"] {
        let at = lines.iter().position(|line| line.starts_with(key)).expect(key);
        assert!(is_comment(lines[at - 1]), "{key}");
    }
}

#[test]
fn sources_are_found_by_name() {
    let connectors =
        load("sources:\n  b: {type: local, path: x}\n  a.1: {type: http, url: 'http://h/x'}\n").unwrap();
    assert_eq!(connectors.names().collect::<Vec<_>>(), ["a.1", "b"]);
    assert_eq!(connectors.source("b").unwrap().kind(), "local");
    assert_eq!(connectors.source("a.1").unwrap().kind(), "http");
    let error = connectors.source("c\n").unwrap_err();
    assert_eq!(error.field, "source");
    assert!(error.message.contains("a.1, b") && error.message.contains("'c\\n'"), "{error}");
    for empty in ["", "# nothing\n", "sources:\n", "sources: {}\n"] {
        let error = load(empty).unwrap().source("x").unwrap_err();
        assert!(error.message.contains("mcp_connectors.yml in the configs folder has none yet"), "{error}");
    }
}

#[test]
fn without_the_usual_file_there_are_no_sources() {
    let dir = tempfile::tempdir().unwrap();
    let none = Connectors::load(dir.path(), None).unwrap();
    assert_eq!(none.names().count(), 0);
    for name in ["mcp_connectors.yml", "../x.yml", "/etc/passwd", "other.yml"] {
        let error = Connectors::load(dir.path(), Some(name)).unwrap_err();
        assert_eq!(error.field, "mcp_config_path", "{name}");
    }
    std::fs::write(dir.path().join("other.yml"), "sources:\n  a: {type: local, path: x}\n").unwrap();
    let folder = dir.path().file_name().unwrap().to_str().unwrap();
    for name in ["other.yml".to_owned(), format!("{folder}/other.yml")] {
        assert_eq!(Connectors::load(dir.path(), Some(&name)).unwrap().names().count(), 1, "{name}");
    }
}

#[test]
fn what_is_wrong_is_named_with_source_and_line() {
    for (text, expected) in [
        ("sources:\n  a: {type: local}\n", "path is missing"),
        ("sources:\n  a: {type: local, path: x, fields: {question: q}}\n", "question is unknown"),
        ("sources:\n  a:\n    type: local\n    file: x\n", "file"),
        ("sources:\n  a: {type: http, url: 'http://me:pw@h'}\n", "headers_env"),
        ("sources:\n  a: {type: nfs, path: x}\n", "nfs"),
        ("sources:\n  a b: {type: local, path: x}\n", "'a b' is no name"),
        ("sources:\n  '../a': {type: local, path: x}\n", "is no name"),
        ("sources:\n  a: {type: local, path: x}\n  a: {type: local, path: y}\n", "two entries are called a"),
        ("sources: [1]\n", "sources"),
        ("source:\n", "unknown field `source`"),
        ("\t", "cannot be used"),
    ] {
        let error = load(text).unwrap_err();
        assert_eq!(error.field, "mcp_config_path");
        assert!(error.message.contains(expected) && error.message.contains(FILE_NAME), "{text}: {error}");
    }
    // Names that stand for each other many times over.
    let bomb: String = (0..30).fold("x0: &x0 [a, a]\n".into(), |text, i| {
        let next = i + 1;
        text + &format!("x{next}: &x{next} [*x{i}, *x{i}, *x{i}, *x{i}, *x{i}, *x{i}]\n")
    });
    let in_source = format!("sources:\n  a:\n    type: local\n    path: x\n    fields:\n{}", {
        let rows: String = bomb.lines().map(|line| format!("      {line}\n")).collect();
        rows
    });
    for text in [bomb, in_source] {
        let begun = std::time::Instant::now();
        assert!(load(&text).is_err());
        assert!(begun.elapsed().as_secs() < 5);
    }
}

#[test]
fn a_source_comes_out_of_a_job_as_it_went_in() {
    let connectors =
        load("sources:\n  a: {type: http, urls: ['http://h/x', 'http://h/y'], skip: 2}\n").unwrap();
    let source = connectors.source("a").unwrap();
    let text = serde_json::to_string(source).unwrap();
    assert_eq!(&serde_json::from_str::<SourceConfig>(&text).unwrap(), source);
}

//! Tests of API keys: how they are written, found and refused, and that no message repeats one.

use super::*;

const KEY: &str = "s3cr3t-0123456789abcdef";

fn file(text: &str) -> Result<ApiKeys, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys.yaml");
    std::fs::write(&path, text).unwrap();
    let sources = KeySources::new(None, Some(path)).unwrap();
    sources.load().map_err(|error| format!("{error:#}"))
}

fn variable(text: &str) -> Result<ApiKeys, String> {
    let sources = KeySources::new(Some(text), None).and_then(|sources| sources.load());
    sources.map_err(|error| format!("{error:#}"))
}

#[test]
fn a_file_lists_keys_with_scopes_and_limits() {
    let hash = "sha256:9F86D081884C7D659A2FEAA0C55AD015A3BF4F1B2B0B822CD15D6C15B0F00A08";
    let keys = file(&format!(
        "keys:\n  - name: ci\n    key: {KEY}\n    scopes: [generate, rl]\n    requests_per_minute: 60\n    burst: 5\n    \
         max_concurrent: 2\n  - name: ops\n    key: \"{hash}\"\n    scopes: [admin]\n"
    ))
    .unwrap();
    assert_eq!(keys.find(KEY.as_bytes()), Some(0));
    // The hash is that of "test".
    assert_eq!(keys.find(b"test"), Some(1));
    assert_eq!(keys.find(hash.as_bytes()), None, "a hash is no key");
    assert_eq!(keys.find(b""), None);
    let ci = &keys.keys()[0];
    assert_eq!((ci.name(), ci.limits().burst, ci.limits().max_concurrent), ("ci", Some(5), Some(2)));
    assert!(ci.allows(Scope::Generate) && ci.allows(Scope::Rl));
    assert!(!ci.allows(Scope::Train) && !ci.allows(Scope::Admin));
    assert!(Scope::ALL.iter().all(|scope| keys.keys()[1].allows(*scope)), "admin implies all others");
}

#[test]
fn a_variable_lists_keys() {
    let keys =
        variable(&format!("{KEY}, ci:generate+train={KEY}2,\nops=c2VjcmV0c2VjcmV0c2VjcmV0==,")).unwrap();
    assert_eq!(keys.keys().iter().map(ApiKey::name).collect::<Vec<_>>(), ["key-1", "ci", "ops"]);
    assert_eq!(keys.keys()[1].scopes(), [Scope::Generate, Scope::Train]);
    assert!(keys.keys()[0].allows(Scope::Admin));
    assert_eq!(keys.find(b"c2VjcmV0c2VjcmV0c2VjcmV0=="), Some(2));
    let padded = variable("c2VjcmV0c2VjcmV0c2VjcmV0==").unwrap();
    assert_eq!(padded.find(b"c2VjcmV0c2VjcmV0c2VjcmV0=="), Some(0), "padding is no name");
    assert!(variable("").unwrap().is_empty() && variable(" , ").unwrap().is_empty());
}

#[test]
fn what_is_no_key_is_refused_with_the_remedy_and_not_repeated() {
    for (text, parts) in [
        ("short", &["entry 1", "16 to 256", "openssl"][..]),
        ("s3cr3t s3cr3t-0123456789abcde\u{fc}", &["entry 1"]),
        ("name:write=s3cr3t-0123456789abcdef", &["entry 1", "generate, train, rl or admin"]),
        ("n\u{e4}me=s3cr3t-0123456789abcdef", &["entry 1", "NAME=KEY"]),
        ("a=s3cr3t-0123456789abcdef,a=s3cr3t-0123456789abcdeg", &["two API keys are called a"]),
        ("a=s3cr3t-0123456789abcdef,b=s3cr3t-0123456789abcdef", &["a and b are the same"]),
        ("sha256:s3cr3t", &["64 hexadecimal digits", "sha256sum"]),
        ("sha256:+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1", &["64 hexadecimal"]),
    ] {
        let message = variable(text).unwrap_err();
        assert!(!message.contains("s3cr3t"), "{message}");
        for part in parts {
            assert!(message.contains(part), "{part:?} is missing in: {message}");
        }
    }
}

#[test]
fn a_file_that_cannot_be_used_is_named_with_the_line_and_no_key() {
    for (text, parts) in [
        ("keys:\n  - s3cr3t-0123456789abcdef\n", &["line 2"][..]),
        ("s3cr3t-0123456789abcdef: ci\n", &["unknown field", "expected `keys`"]),
        ("keys:\n  - name: a\n    s3cr3t-0123456789abcdef: 1\n", &["line", "requests_per_minute"]),
        ("keys:\n  - name: a\n    key: x\n    scopes: [s3cr3t-0123456789abcdef]\n", &["line 4", "generate"]),
        (
            "keys:\n  - name: a\n    key: x\n    scopes: [rl]\n    burst: s3cr3t-0123456789abcdef\n",
            &["line 5", "burst"],
        ),
        ("keys:\n  - name: a\n    key: s3cr3t\n    scopes: [rl]\n", &["the key a", "16 to 256"]),
        ("keys:\n  - name: s3cr3t/x\n    key: x\n    scopes: [rl]\n", &["entry 1", "name"]),
        ("keys:\n  - name: a\n    key: s3cr3t-0123456789abcdef\n    scopes: []\n", &["scopes is empty"]),
        (
            "keys:\n  - name: a\n    key: s3cr3t-0123456789abcdef\n    scopes: [rl]\n    burst: 0\n",
            &["burst", "at least 1"],
        ),
        ("keys: []\n", &["no entry"]),
        ("", &["api_keys.example.yaml"]),
        ("keys: \"s3cr3t\n", &["api_keys.example.yaml"]),
    ] {
        let message = file(text).unwrap_err();
        assert!(!message.contains("s3cr3t"), "{message}");
        for part in ["--api-keys-file", "keys.yaml"].iter().chain(parts) {
            assert!(message.contains(part), "{part:?} is missing in: {message}");
        }
    }
    let missing = KeySources::new(None, Some("/nowhere/keys.yaml".into())).unwrap().load().unwrap_err();
    assert!(format!("{missing:#}").contains("/nowhere/keys.yaml"), "{missing:#}");
}

#[test]
fn nothing_shows_a_key_or_its_hash() {
    let sources = KeySources::new(Some(&format!("ci={KEY}")), None).unwrap();
    let keys = sources.load().unwrap();
    let shown = format!("{sources:?} {keys:?}");
    assert!(shown.contains("ci") && !shown.contains("s3cr3t"), "{shown}");
    let hash = digest(&SHA256, KEY.as_bytes());
    let first_bytes = hash.as_ref()[..3].iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
    assert!(!shown.contains(&first_bytes), "{shown}");
}

#[test]
fn the_shipped_example_can_be_used() {
    let text = include_str!("../../configs/api_keys.example.yaml");
    let keys = file(text).unwrap();
    assert!(keys.keys().len() >= 2);
}

#[test]
fn what_a_message_quotes_is_hidden() {
    assert_eq!(hidden("unknown field `abc`, expected `keys`"), "unknown field `[hidden]`, expected `keys`");
    assert_eq!(hidden("a \"b c"), "a [hidden]");
    assert_eq!(hidden("at line 3"), "at line 3");
}

//! Tests of `rl_config.yaml`: what is delivered, what is refused and where.

use super::*;

fn refused(text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(FILE_NAME), text).unwrap();
    RlConfig::load(dir.path(), None).unwrap_err().to_string()
}

#[test]
fn the_delivered_file_says_the_defaults() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let delivered = RlConfig::load(&configs, None).unwrap();
    assert_eq!(delivered, RlConfig::default());
    assert_eq!(delivered.prompts.len(), 60);
    let languages: std::collections::BTreeSet<_> =
        delivered.prompts[..10].iter().map(|prompt| prompt.language.clone()).collect();
    assert_eq!(languages.len(), 10, "the first ten prompts are in ten languages");
    for prompt in &delivered.prompts {
        let said = prompt.language.as_deref().and_then(Language::parse);
        assert_eq!(crate::text::target_of_prompt(&prompt.prompt), said, "{}", prompt.prompt);
        assert!(prompt.reference.is_some());
    }
}

#[test]
fn every_setting_of_the_delivered_file_can_be_used() {
    // In the sections of this file, the marks go from the lines that hold a setting; what is left is prose.
    let is_key = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let key = |line: &str| line.split_once(':').map(|(key, _)| key.to_owned()).filter(|key| is_key(key));
    let mut section = String::new();
    let mut text = String::new();
    for line in DELIVERED.lines() {
        section = key(line).unwrap_or(section);
        let setting =
            line.starts_with("  ").then(|| line.trim_start().strip_prefix('#').and_then(key)).flatten();
        match setting {
            Some(_) if ["collect", "rewards", "log", "train"].contains(&section.as_str()) => {
                text += &line.replacen('#', "", 1);
            }
            _ => text += line,
        }
        text.push('\n');
    }
    let typed = parse(&text).unwrap();
    let config = resolve(typed).unwrap();
    let mut expected = RlConfig::default();
    expected.rewards.regex.pattern = config.rewards.regex.pattern.clone();
    expected.rewards.http.url = config.rewards.http.url.clone();
    assert_eq!(config, expected, "the file shows the defaults");
    // And every setting is in the file.
    let whole = serde_json::json!({
        "collect": config.collect, "rewards": config.rewards, "log": config.log, "train": config.train,
    });
    let mut stack = vec![&whole];
    while let Some(serde_json::Value::Object(map)) = stack.pop() {
        for (key, value) in map {
            assert!(text.contains(&format!("{key}:")), "{key} is not in the file");
            stack.push(value);
        }
    }
}

#[test]
fn a_section_may_be_empty() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join(FILE_NAME),
        "collect:\nrewards:\n  length:\n  http:\nlog:\nsinks:\ntrain:\n",
    )
    .unwrap();
    assert_eq!(RlConfig::load(dir.path(), None).unwrap(), RlConfig::default());
    std::fs::write(dir.path().join(FILE_NAME), "# nothing\n").unwrap();
    assert_eq!(RlConfig::load(dir.path(), None).unwrap(), RlConfig::default());
    assert!(RlConfig::load(dir.path(), Some("other.yaml")).unwrap_err().to_string().contains("other.yaml"));
}

#[test]
fn errors_name_the_setting() {
    for (text, place) in [
        ("collect: {group_size: 0}", "collect.group_size in rl_config.yaml"),
        ("collect: {temperature: .nan}", "collect.temperature"),
        ("collect: {top_p: 0}", "collect.top_p"),
        ("collect: {unheard_of: 1}", "unheard_of"),
        ("rewards: {length: {weight: -1}}", "rewards.length.weight"),
        ("rewards: {length: {weight: .inf}}", "rewards.length.weight"),
        ("rewards: {length: {min_graphemes: 9, max_graphemes: 3}}", "rewards.length.max_graphemes"),
        ("rewards: {regex: {weight: 1}}", "rewards.regex.pattern"),
        ("rewards: {regex: {weight: 1, pattern: '('}}", "rewards.regex.pattern"),
        ("rewards: {http: {weight: 1}}", "rewards.http.url"),
        ("rewards: {http: {weight: 1, url: 'file:///etc/passwd'}}", "rewards.http.url"),
        ("rewards: {http: {timeout_s: 0}}", "rewards.http.timeout_s"),
        (
            "rewards: {length: {weight: 0}, quality: {weight: 0}, diversity: {weight: 0}, language: {weight: 0}, \
             chrf: {weight: 0}}",
            "rewards in rl_config.yaml",
        ),
        ("log: {max_file: 1}", "max_file"),
        ("log: {max_file: '12 parsec'}", "log.max_file"),
        ("prompts: []", "prompts"),
        ("prompts: [{prompt: ' '}]", "prompts[0].prompt"),
        ("prompts: [{prompt: a, language: klingon}]", "prompts[0].language"),
        ("prompts: [{text: a}]", "text"),
    ] {
        let message = refused(text);
        assert!(message.contains(place), "{text}: {message}");
    }
}

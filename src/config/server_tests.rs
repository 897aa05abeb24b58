//! Tests of the server's settings: precedence, every error message, the shipped file.

use clap::Parser as _;

use super::*;

#[derive(clap::Parser)]
struct CommandLine {
    #[command(flatten)]
    flags: ServerFlags,
}

macro_rules! fixtures {
    () => {
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures")
    };
}
const KEYS: &str = concat!(fixtures!(), "/api_keys.yaml");
const CERT: &str = concat!(fixtures!(), "/tls/cert.pem");
const KEY: &str = concat!(fixtures!(), "/tls/key.pem");
/// What is null, and so said by nobody, while nobody names one.
const NAMED: [&str; 4] = ["model", "api_keys_file", "tls_cert", "tls_key"];

/// Resolves flags, variables and a `server.yaml` in a folder of its own.
fn resolve(flags: &[&str], variables: &[(&str, &str)], yaml: &str) -> anyhow::Result<Settings> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(FILE_NAME), yaml).unwrap();
    let mut line = vec!["gurukul", "--configs", dir.path().to_str().unwrap()];
    line.extend(flags);
    let flags = CommandLine::try_parse_from(line).map_err(|e| anyhow::anyhow!("{e}"))?.flags;
    let variables: std::collections::HashMap<String, String> =
        variables.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    Settings::resolve_with(&flags, &|name| variables.get(name).cloned())
}

fn error(flags: &[&str], variables: &[(&str, &str)], yaml: &str) -> String {
    format!("{:#}", resolve(flags, variables, yaml).expect_err("these settings are refused"))
}

fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is missing in: {message}");
    }
}

#[test]
fn defaults() {
    let settings = resolve(&[], &[], "").unwrap();
    assert_eq!((settings.host.to_string().as_str(), settings.port), ("127.0.0.1", 8110));
    assert_eq!(settings.model, None);
    assert_eq!(settings.adapters_dir, Path::new("./adapters"));
    assert_eq!((settings.max_body_bytes, settings.max_prompt_bytes), (1 << 20, 256 << 10));
    assert_eq!(
        (settings.max_parallel_jobs, settings.keep_jobs, settings.max_upload_bytes),
        (1, 1000, 64 << 20)
    );
    assert_eq!(settings.log, LogFormat::Text);
    let expected = EngineSettings {
        device: DeviceChoice::Auto,
        dtype: DtypeChoice::Auto,
        quantize: Quantization::None,
        kv_cache_bytes: None,
        max_batch: 8,
        max_queue: 64,
        prefill_chunk: 64,
        adapter_cache_bytes: 1 << 30,
        train_share: 0.5,
    };
    assert_eq!(settings.engine, expected);
}

#[test]
fn flags_before_environment_before_file() {
    let yaml = "max_batch: 2\nmax_queue: 2\nport: 2\nmodel: from-file\nlog: json\n";
    let variables = [("GURUKUL_MAX_BATCH", "3"), ("GURUKUL_MAX_QUEUE", "3"), ("GURUKUL_MODEL", "from-env")];
    let settings = resolve(&["--max-batch", "4"], &variables, yaml).unwrap();
    assert_eq!(settings.engine.max_batch, 4);
    assert_eq!(settings.engine.max_queue, 3);
    assert_eq!(settings.port, 2);
    assert_eq!(settings.model.as_deref(), Some("from-env"));
    assert_eq!(settings.log, LogFormat::Json);
    assert_eq!(settings.engine.prefill_chunk, 64);
}

#[test]
fn configs_folder_from_the_environment() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(FILE_NAME), "port: 9").unwrap();
    let at = dir.path().to_str().unwrap().to_owned();
    let lookup = |name: &str| (name == "GURUKUL_CONFIGS").then(|| at.clone());
    assert_eq!(Settings::resolve_with(&ServerFlags::default(), &lookup).unwrap().port, 9);
}

#[test]
fn an_empty_variable_says_nothing() {
    assert_eq!(resolve(&[], &[("GURUKUL_PORT", ""), ("GURUKUL_MODEL", " ")], "").unwrap().port, 8110);
}

#[test]
fn every_field_is_read_from_each_source() {
    let values = [
        ("host", "::1", "\"::1\""),
        ("port", "81", "81"),
        ("device", "cuda:3", "\"cuda:3\""),
        ("data_dir", "/", "\"/\""),
        ("model", "a/b", "\"a/b\""),
        ("dtype", "bf16", "\"bf16\""),
        ("quantize", "q4_k", "\"q4_k\""),
        ("kv_cache", "3MiB", "\"3MiB\""),
        ("max_batch", "5", "5"),
        ("max_queue", "6", "6"),
        ("prefill_chunk", "7", "7"),
        ("adapter_cache", "9MiB", "\"9MiB\""),
        ("train_share", "0.25", "0.25"),
        ("max_parallel_jobs", "8", "8"),
        ("keep_jobs", "11", "11"),
        ("adapter_quota", "13MiB", "\"13MiB\""),
        ("max_body", "2MiB", "\"2MiB\""),
        ("max_upload", "12MiB", "\"12MiB\""),
        ("max_prompt", "1MiB", "\"1MiB\""),
        ("grace", "14s", "\"14s\""),
        ("api_keys_file", KEYS, concat!("\"", fixtures!(), "/api_keys.yaml\"")),
        ("rate_limit", "60", "60"),
        ("max_concurrent", "13", "13"),
        ("max_connections", "14", "14"),
        ("request_timeout", "15", "15"),
        ("cors_origins", "https://a.example", "\"https://a.example\""),
        ("tls_cert", CERT, concat!("\"", fixtures!(), "/tls/cert.pem\"")),
        ("tls_key", KEY, concat!("\"", fixtures!(), "/tls/key.pem\"")),
        ("log", "json", "json"),
        ("insecure_no_auth", "true", "true"),
    ];
    let yaml: String = values.iter().map(|(name, value, _)| format!("{name}: \"{value}\"\n")).collect();
    // Numbers and booleans are no strings in YAML.
    let yaml = ["81", "5", "6", "7", "0.25", "8", "11", "60", "13", "14", "15", "true"]
        .iter()
        .fold(yaml, |y, v| y.replace(&format!("\"{v}\""), v));
    let variables: Vec<(String, &str)> =
        values.iter().map(|(name, value, _)| (format!("GURUKUL_{}", name.to_uppercase()), *value)).collect();
    let variables: Vec<(&str, &str)> = variables.iter().map(|(n, v)| (n.as_str(), *v)).collect();
    let flags: Vec<String> =
        values.iter().map(|(name, value, _)| format!("--{}={value}", name.replace('_', "-"))).collect();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let defaults = resolve(&[], &[], "").unwrap().to_yaml();
    for (what, settings) in [
        ("flags", resolve(&flags, &[], "")),
        ("environment", resolve(&[], &variables, "")),
        ("file", resolve(&[], &[], &yaml)),
    ] {
        let shown = settings.unwrap_or_else(|e| panic!("{what}: {e:#}")).to_yaml();
        for (name, _, value) in values {
            assert_names(&shown, &[&format!("{name}: {value}  # ")]);
            assert!(
                !defaults.contains(&format!("{name}: {value}  # ")),
                "{name} does not differ from its default"
            );
        }
        assert_eq!(shown.lines().count(), values.len());
        assert!(!shown.contains("# default"), "{what}: {shown}");
    }
}

#[test]
fn what_is_printed_is_a_settings_file() {
    let before =
        resolve(&["--max-batch", "4", "--kv-cache", "1GB", "--max-prompt", "1000"], &[], "").unwrap();
    let after = resolve(&[], &[], &before.to_yaml()).unwrap();
    assert_eq!(before.engine, after.engine);
    assert_eq!(after.max_prompt_bytes, 1000);
}

#[test]
fn the_shipped_file_changes_nothing_and_names_every_field() {
    let shipped =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/server.yaml")).unwrap();
    assert!(shipped.lines().all(|l| l.is_empty() || l.starts_with('#')), "every line is a comment");
    let defaults = resolve(&[], &[], "").unwrap();
    assert_eq!(resolve(&[], &[], &shipped).unwrap().to_yaml(), defaults.to_yaml());
    // With the marks before the keys removed, the file says what the defaults say.
    let uncommented: String = shipped
        .lines()
        .filter_map(|l| l.strip_prefix('#'))
        .filter(|l| l.split_once(": ").is_some_and(|(key, _)| defaults.lines.iter().any(|d| d.0 == key)))
        .map(|l| format!("{l}\n"))
        .collect();
    let spoken = resolve(&[], &[], &uncommented).unwrap();
    assert_eq!(spoken.engine, defaults.engine);
    let without_origin = |s: &Settings| s.lines.iter().map(|l| (l.0, l.1.clone())).collect::<Vec<_>>();
    assert_eq!(without_origin(&spoken), without_origin(&defaults));
    for (name, _, origin) in spoken.lines.iter().filter(|l| !NAMED.contains(&l.0)) {
        assert!(matches!(origin, Origin::File(_)), "configs/server.yaml has no line for {name}");
    }
    for name in NAMED {
        assert!(
            shipped.contains(&format!("\n#{name}: null\n")),
            "configs/server.yaml has no line for {name}"
        );
    }
}

#[test]
fn unknown_key_names_key_and_file() {
    assert_names(&error(&[], &[], "max_bacth: 3\n"), &["max_bacth", "server.yaml", "max_batch"]);
    assert_names(&error(&[], &[], "configs: x\n"), &["configs", "server.yaml"]);
}

#[test]
fn broken_yaml_names_the_file() {
    assert_names(&error(&[], &[], "port: [\n"), &["server.yaml"]);
    assert_names(&error(&[], &[], "port: many\n"), &["server.yaml", "port"]);
    assert_names(&error(&[], &[], "adapter_cache: 3 apples\n"), &["server.yaml", "adapter_cache", "apples"]);
}

#[test]
fn values_out_of_range_name_place_and_range() {
    for (flags, parts) in [
        (["--max-batch", "0"], ["--max-batch", "1 to 1024"]),
        (["--max-batch", "1025"], ["--max-batch", "1 to 1024"]),
        (["--max-queue", "65537"], ["--max-queue", "0 to 65536"]),
        (["--prefill-chunk", "0"], ["--prefill-chunk", "1 to 65536"]),
        (["--adapter-cache", "1"], ["--adapter-cache", "1KiB to 16TiB"]),
        (["--kv-cache", "1"], ["--kv-cache", "64KiB to 16TiB"]),
        (["--train-share", "0"], ["--train-share", "0.05 to 0.95"]),
        (["--train-share", "NaN"], ["--train-share", "0.05 to 0.95"]),
        (["--max-parallel-jobs", "17"], ["--max-parallel-jobs", "1 to 16"]),
        (["--keep-jobs", "0"], ["--keep-jobs", "1 to 1000000"]),
        (["--adapter-quota", "1"], ["--adapter-quota", "1KiB to 1024TiB"]),
        (["--adapter-quota", "some"], ["--adapter-quota", "512MiB"]),
        (["--grace", "2days"], ["--grace", "0s to 1day"]),
        (["--grace", "soon"], ["--grace", "1m30s"]),
        (["--max-upload", "1"], ["--max-upload", "1KiB to 16GiB"]),
        (["--max-body", "2GiB"], ["--max-body", "1KiB to 1GiB"]),
        (["--max-prompt", "2MiB"], ["--max-prompt", "--max-body"]),
        (["--max-prompt", "0"], ["--max-prompt", "1 to 1MiB"]),
        (["--rate-limit", "1000001"], ["--rate-limit", "0 to 1000000"]),
        (["--max-concurrent", "65537"], ["--max-concurrent", "0 to 65536"]),
        (["--max-connections", "0"], ["--max-connections", "1 to 1000000"]),
        (["--request-timeout", "0"], ["--request-timeout", "1 to 86400"]),
        (["--cors-origins", "a.example"], ["--cors-origins", "https://example.org"]),
        (["--tls-cert", CERT], ["--tls-cert", "--tls-key"]),
        (["--tls-key", KEY], ["--tls-key", "--tls-cert"]),
        (["--api-keys-file", "/nowhere.yaml"], ["--api-keys-file /nowhere.yaml", "correct the path"]),
        (["--port", "65536"], ["--port", "0..=65535"]),
        (["--device", "gpu"], ["--device", "cuda:N"]),
        (["--device", "cuda:x"], ["--device", "cuda:N"]),
        (["--dtype", "f64"], ["--dtype", "bf16"]),
        (["--quantize", "q5"], ["--quantize", "q4_k"]),
        (["--host", "example.org"], ["--host", "no IP address"]),
        (["--kv-cache", "lots"], ["--kv-cache", "512MiB"]),
        (["--log", "xml"], ["--log", "json"]),
        (["--model", ""], ["--model", "hub id"]),
        (["--data-dir", "/nowhere/at/all"], ["--data-dir", "/nowhere/at/all"]),
        (["--configs", "/nowhere/at/all"], ["--configs", "cannot be used multiple times"]),
    ] {
        assert_names(&error(&flags, &[], ""), &parts);
    }
    assert_names(&error(&[], &[("GURUKUL_MAX_BATCH", "0")], ""), &["GURUKUL_MAX_BATCH", "1 to 1024"]);
    assert_names(&error(&[], &[("GURUKUL_MAX_BATCH", "many")], ""), &["GURUKUL_MAX_BATCH", "many"]);
    assert_names(&error(&[], &[], "max_batch: 0"), &["max_batch in ", "server.yaml", "1 to 1024"]);
    assert_names(&error(&[], &[], "log: xml"), &["log", "server.yaml", "json"]);
}

#[test]
fn a_configs_folder_that_is_not_there() {
    let flags = ServerFlags { configs: Some("/nowhere/at/all".into()), ..ServerFlags::default() };
    let message = Settings::resolve_with(&flags, &|_| None).unwrap_err().to_string();
    assert_names(&message, &["--configs", "/nowhere/at/all"]);
}

#[test]
fn a_smaller_body_lowers_the_default_prompt() {
    let settings = resolve(&["--max-body", "64KiB"], &[], "").unwrap();
    assert_eq!(settings.max_prompt_bytes, 64 << 10);
}

#[test]
fn hosts() {
    for (text, host) in
        [("localhost", "127.0.0.1"), ("127.8.9.1", "127.8.9.1"), ("::1", "::1"), ("[::1]", "::1")]
    {
        assert_eq!(resolve(&["--host", text], &[], "").unwrap().host.to_string(), host);
    }
    for host in ["0.0.0.0", "192.168.1.4", "::"] {
        assert_names(&error(&["--host", host], &[], ""), &["--host", "API keys", "--insecure-no-auth"]);
        let open = resolve(&["--host", host, "--insecure-no-auth"], &[], "").unwrap();
        assert_eq!(open.host.to_string(), host);
    }
    assert!(resolve(&["--host", "0.0.0.0"], &[("GURUKUL_INSECURE_NO_AUTH", "true")], "").is_ok());
    assert!(
        resolve(&["--host", "0.0.0.0", "--insecure-no-auth=false"], &[], "insecure_no_auth: true").is_err()
    );
    assert_names(
        &error(&[], &[("GURUKUL_INSECURE_NO_AUTH", "perhaps")], ""),
        &["GURUKUL_INSECURE_NO_AUTH", "perhaps"],
    );
}

#[test]
fn keys_open_other_addresses() {
    let key = [("GURUKUL_API_KEYS", "ci=0123456789abcdef")];
    let settings = resolve(&["--host", "0.0.0.0"], &key, "").unwrap();
    assert_eq!(settings.security.keys.keys()[0].name(), "ci");
    assert!(!settings.to_yaml().contains("0123456789abcdef"));
    let both = resolve(&["--host", "0.0.0.0", "--api-keys", KEYS], &key, "").unwrap();
    assert_eq!(both.security.describe(), "# API keys: 2\n#   ci: admin\n#   reader: generate");
    assert_names(
        &error(&[], &[("GURUKUL_API_KEYS", "a,b")], ""),
        &["GURUKUL_API_KEYS", "entry 1", "openssl"],
    );
    // A variable without keys opens nothing.
    assert!(resolve(&["--host", "0.0.0.0"], &[("GURUKUL_API_KEYS", " ")], "").is_err());
}

#[test]
fn certificates_are_looked_at_when_settings_are() {
    let other = concat!(fixtures!(), "/tls/other_key.pem");
    assert!(resolve(&["--tls-cert", CERT, "--tls-key", KEY], &[], "").unwrap().security.tls.is_some());
    assert_names(
        &error(&["--tls-cert", CERT, "--tls-key", other], &[], ""),
        &["other_key.pem", "go together"],
    );
    let open = resolve(&["--cors-origins", "*"], &[], "").unwrap();
    assert_names(&open.security.describe(), &["No API keys", "Warning", "cors_origins"]);
}

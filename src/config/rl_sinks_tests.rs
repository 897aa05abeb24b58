//! Tests of the section `sinks`: what it can say, each refusal, names, keys.

use super::*;

const THREE: &str = "
archive: {type: s3, bucket: my-episodes, region: eu-central-1, endpoint_url: 'http://127.0.0.1:9000', force_path_style: true}
inbox: {type: http, url_env: INBOX_URL, headers_env: {Authorization: INBOX_TOKEN}}
nas: {type: folder, path: /mnt/nas, key: '{name}/{date}/{time}-{sha256}.jsonl'}
";

fn sinks(yaml: &str) -> Result<SinksConfig, String> {
    let sinks: SinksConfig = serde_yaml::from_str(yaml).map_err(|error| error.to_string())?;
    sinks.check().map_err(|error| error.to_string())?;
    Ok(sinks)
}

fn facts() -> KeyFacts {
    KeyFacts {
        run_id: "run-1".into(),
        date: "2026-01-31".into(),
        time: "235959".into(),
        sha256: "ab".repeat(32),
        name: "nas".into(),
    }
}

#[test]
fn sinks_are_found_by_their_names() {
    let three = sinks(THREE).unwrap();
    assert_eq!(three.names().collect::<Vec<_>>(), ["archive", "inbox", "nas"]);
    let to = three.destination(Some("archive")).unwrap();
    assert_eq!((to.sink.kind(), to.is_ad_hoc), ("s3", false));
    assert_eq!(to.sink.key(&facts()), format!("rl/run-1/{}.jsonl", "ab".repeat(32)));
    let to = three.destination(Some("nas")).unwrap();
    assert_eq!(to.sink.key(&facts()), format!("nas/2026-01-31/235959-{}.jsonl", "ab".repeat(32)));
    let several = three.destination(None).unwrap_err();
    assert_eq!(several.field, "sink");
    assert!(several.message.contains("archive, inbox, nas") && several.message.contains("default_sink"));
    for unknown in ["tape", "../nas", ""] {
        let error = three.destination(Some(unknown)).unwrap_err().to_string();
        assert!(
            error.contains("no sink of rl_config.yaml") && error.contains("archive, inbox, nas"),
            "{error}"
        );
    }
    let three = three.with_default(Some("inbox".into()));
    three.check().unwrap();
    assert_eq!(three.destination(None).unwrap().name, "inbox");
    let wrong = three.with_default(Some("tape".into())).check().unwrap_err();
    assert_eq!(wrong.field, "default_sink");
    let only = sinks("nas: {type: folder, path: /mnt}").unwrap();
    assert_eq!(only.destination(None).unwrap().name, "nas");
    let none = SinksConfig::default().destination(None).unwrap_err().to_string();
    assert!(none.contains("no sinks"), "{none}");
}

#[test]
fn a_bucket_of_the_command_line_is_where_the_configured_one_is() {
    let three = sinks(THREE).unwrap();
    for bucket in ["my-episodes", "another"] {
        let to = three.s3_destination(bucket, Some("runs/{run_id}.jsonl")).unwrap();
        assert_eq!((to.name.as_str(), to.is_ad_hoc), (format!("s3://{bucket}").as_str(), true));
        assert_eq!(to.sink.key(&facts()), "runs/run-1.jsonl");
        let SinkConfig::S3(sink) = to.sink else { panic!("is a bucket") };
        assert_eq!(sink.endpoint_url.as_deref(), Some("http://127.0.0.1:9000"));
        assert!(sink.force_path_style && sink.region.as_deref() == Some("eu-central-1"));
    }
    let alone = SinksConfig::default().s3_destination("my-episodes", None).unwrap();
    let SinkConfig::S3(sink) = alone.sink else { panic!("is a bucket") };
    assert_eq!((sink.region, sink.endpoint_url, sink.key), (None, None, KeyTemplate::default()));
    for (bucket, key, flag) in
        [("No Bucket", None, "--s3-bucket"), ("a/b", None, "--s3-bucket"), ("abc", Some("../x"), "--s3-key")]
    {
        assert_eq!(three.s3_destination(bucket, key).unwrap_err().field, flag);
    }
}

#[test]
fn what_cannot_be_a_sink_is_refused_by_name() {
    for (yaml, parts) in [
        ("a: {type: tape}", &["tape", "s3"][..]),
        ("a: {type: folder, path: /x, color: red}", &["color"]),
        ("a: {type: folder, path: /x}\na: {type: folder, path: /y}", &["two entries are called a"]),
        ("'a b': {type: folder, path: /x}", &["sinks.a b", "letters"]),
        ("a: {type: folder, path: ' '}", &["sinks.a", "path"]),
        ("a: {type: folder}", &["path"]),
        ("a: {type: folder, path: /x, key: 'x.jsonl'}", &["sinks.a", "{sha256}", "second upload"]),
        ("a: {type: folder, path: /x, key: '../{sha256}'}", &["key", "'..'"]),
        ("a: {type: folder, path: /x, key: '/etc/{sha256}'}", &["key"]),
        ("a: {type: folder, path: /x, key: 'a//{sha256}'}", &["key"]),
        ("a: {type: folder, path: /x, key: '{sha256}-{color}'}", &["placeholder", "{run_id}"]),
        ("a: {type: s3, bucket: 'My_Bucket'}", &["sinks.a", "bucket"]),
        ("a: {type: s3, bucket: abc, region: 'eu central'}", &["region"]),
        ("a: {type: s3, bucket: abc, endpoint_url: '127.0.0.1'}", &["endpoint_url"]),
        ("a: {type: s3, bucket: abc, access_key: SECRET}", &["access_key"]),
        ("a: {type: http}", &["url", "url_env"]),
        ("a: {type: http, url: 'http://h/{sha256}', url_env: X}", &["either"]),
        ("a: {type: http, url: 'http://h/x'}", &["{sha256}", "url_env"]),
        ("a: {type: http, method: post, url: 'ftp://h/x'}", &["http"]),
        ("a: {type: http, method: post, url: 'http://h/{x}'}", &["placeholder"]),
        ("a: {type: http, url: 'http://me:SECRET@h/{sha256}'}", &["headers_env"]),
        ("a: {type: http, url_env: 'https://h/?sig=SECRET'}", &["url_env", "variable"]),
        (
            "a: {type: http, url_env: X, headers_env: {If-None-Match: Y}}",
            &["If-None-Match", "program itself"],
        ),
        ("a: {type: http, url_env: X, headers_env: {Authorization: 'Bearer SECRET'}}", &["Authorization"]),
        ("a: {type: http, method: patch, url_env: X}", &["patch", "put"]),
    ] {
        let error = sinks(yaml).expect_err(yaml);
        for part in parts {
            assert!(error.contains(part), "{part:?} is missing for {yaml}: {error}");
        }
        assert!(!error.contains("SECRET") || yaml.contains("access_key"), "{error}");
    }
    for good in [
        "a: {type: http, method: post, url: 'https://h/batches'}",
        "a: {type: http, url: 'https://h/{run_id}/{sha256}.jsonl'}",
        "{}",
    ] {
        sinks(good).unwrap_or_else(|error| panic!("{good}: {error}"));
    }
}

#[test]
fn sinks_come_back_as_they_were_stored() {
    let three = sinks(THREE).unwrap();
    for name in ["archive", "inbox", "nas"] {
        let sink = three.sink(name).unwrap();
        let stored = serde_json::to_value(sink).unwrap();
        assert_eq!(serde_json::from_value::<SinkConfig>(stored).unwrap(), *sink);
    }
}

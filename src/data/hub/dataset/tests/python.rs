//! The same data sets by the Python package `datasets`, pointed at the same stand-in of a hub: the same files and the
//! same rows. `GURUKUL_TORCH_PYTHON` names a Python that has it.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;

use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{Value, json};

use super::*;
use crate::data::tests::drain;
use crate::data::{Cursor, SourceConfig};

/// Rows of a text and a number.
fn parquet(rows: &[(&str, i64)]) -> Vec<u8> {
    let schema =
        parse_message_type("message m { required binary text (STRING); required int64 n; }").unwrap();
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(Vec::new(), Arc::new(schema), properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    while let Some(mut column) = group.next_column().unwrap() {
        match column.untyped() {
            ColumnWriter::ByteArrayColumnWriter(texts) => {
                let values: Vec<ByteArray> = rows.iter().map(|(text, _)| (*text).into()).collect();
                texts.write_batch(&values, None, None).unwrap();
            }
            ColumnWriter::Int64ColumnWriter(numbers) => {
                let values: Vec<i64> = rows.iter().map(|(_, n)| *n).collect();
                numbers.write_batch(&values, None, None).unwrap();
            }
            _ => unreachable!("the schema has no other column"),
        }
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.into_inner().unwrap()
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

/// The data sets of the stand-in, and what is asked of each: keys as here, and as there where they differ.
fn cases(hub: &FakeHub) -> Vec<Value> {
    let (a, b, c) = (parquet(&[("एक", 1), ("दो", 2)]), parquet(&[("तीन", 3)]), parquet(&[("नौ", 9)]));
    hub.commit(
        "org/sharded",
        "main",
        &[
            ("README.md", b"---\nlicense: mit\n---\n# x\n"),
            ("data/train-00000-of-00002.parquet", &a),
            ("data/train-00001-of-00002.parquet", &b),
            ("data/test-00000-of-00001.parquet", &c),
            ("notes.txt", b"not data\n"),
        ],
    );
    let readme = b"---\nconfigs:\n- config_name: hi\n  data_files:\n  - split: train\n    path: hi/train-*\n  - split: \
                   test\n    path: hi/test.jsonl\n- config_name: ta\n  data_files: [ta/b.jsonl, ta/a.jsonl]\n  default: \
                   true\n- config_name: te\n  data_dir: te\n---\n";
    let line = |n: i64| format!("{{\"text\": \"वाक्य {n}\", \"n\": {n}}}\n");
    let lines = |from: i64, to: i64| (from..to).map(line).collect::<String>();
    hub.commit(
        "org/configs",
        "main",
        &[
            ("README.md", readme),
            ("hi/train-0.jsonl", lines(0, 3).as_bytes()),
            ("hi/train-1.jsonl.gz", &gzip(&lines(3, 6))),
            ("hi/test.jsonl", lines(9, 10).as_bytes()),
            ("ta/a.jsonl", lines(10, 12).as_bytes()),
            ("ta/b.jsonl", lines(12, 13).as_bytes()),
            ("te/train/x.jsonl", lines(20, 22).as_bytes()),
            ("te/dev/x.jsonl", lines(30, 31).as_bytes()),
        ],
    );
    hub.commit(
        "org/words",
        "main",
        &[
            ("train.csv", b"text,note\na,x\nb,y\n"),
            ("my-dev-1.csv", b"text,note\nc,z\n"),
            ("test_data.csv", b"text,note\nd,w\n"),
            ("dataset_infos.json", b"{}"),
            (".hidden.csv", b"text,note\nno,no\n"),
        ],
    );
    hub.commit(
        "org/plain",
        "main",
        &[
            ("b/more.jsonl", lines(2, 3).as_bytes()),
            ("a.jsonl", lines(0, 2).as_bytes()),
            ("__pycache__/x.jsonl", lines(7, 8).as_bytes()),
            ("config.json", b"{}"),
        ],
    );
    hub.commit("org/plain", "old", &[("z.jsonl", lines(50, 51).as_bytes())]);
    vec![
        json!({"repo": "org/sharded", "split": "train"}),
        json!({"repo": "org/sharded", "split": "test"}),
        json!({"repo": "org/configs", "config": "hi", "split": "train"}),
        json!({"repo": "org/configs", "config": "hi", "split": "test"}),
        json!({"repo": "org/configs", "split": "train"}),
        json!({"repo": "org/configs", "config": "te", "split": "train"}),
        json!({"repo": "org/configs", "config": "te", "split": "validation"}),
        json!({"repo": "org/configs", "config": "none", "split": "train"}),
        json!({"repo": "org/configs", "config": "hi", "split": "none"}),
        json!({"repo": "org/words", "split": "train"}),
        json!({"repo": "org/words", "split": "validation"}),
        json!({"repo": "org/words", "split": "test"}),
        json!({"repo": "org/plain", "split": "train"}),
        json!({"repo": "org/plain", "split": "train", "revision": "old"}),
        json!({"repo": "org/plain", "split": "train", "data_dir": "b"}),
        json!({"repo": "org/configs", "split": "train", "data_files": ["ta/*.jsonl", "hi/test.jsonl"]}),
        json!({"repo": "org/configs", "split": "train", "data_files": "nothing.jsonl"}),
        json!({"repo": "org/nowhere", "split": "train"}),
    ]
}

/// Files and rows as this program has them.
async fn ours(hub: &FakeHub, case: &Value) -> Result<(Vec<String>, Vec<Value>), String> {
    let taken = take(hub, case.clone()).await?;
    let mut rows = Vec::new();
    for (name, bytes) in &taken.files {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name.rsplit('/').next().unwrap());
        std::fs::write(&path, bytes).unwrap();
        let stream = SourceConfig::local(path.to_str().unwrap()).open("copy", Cursor::default());
        let (records, error) = drain(stream).await;
        assert_eq!(error, None, "{name}");
        rows.extend(records);
    }
    Ok((taken.names().into_iter().map(str::to_owned).collect(), rows))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_package_finds_the_same() {
    let Some(python) = std::env::var_os("GURUKUL_TORCH_PYTHON") else {
        tracing::info!("skipped: GURUKUL_TORCH_PYTHON names no Python with datasets");
        return;
    };
    let hub = FakeHub::start().await;
    let cases = cases(&hub);
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/datasets_check.py"));
    command.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", home.path()).env_remove("HF_TOKEN");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let asked: String = cases
        .iter()
        .map(|case| {
            let mut case = case.as_object().unwrap().clone();
            if let Some(config) = case.remove("config") {
                case.insert("name".into(), config);
            }
            Value::Object(case).to_string() + "\n"
        })
        .collect();
    let run = move || {
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(asked.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let answers: Vec<Value> =
        output.stdout.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    assert_eq!(answers.len(), cases.len(), "{said}");
    let mut refused = 0;
    for (case, theirs) in cases.iter().zip(&answers) {
        match ours(&hub, case).await {
            Ok((files, rows)) => {
                assert_eq!(json!(files), theirs["files"], "{case}: {theirs}");
                assert_eq!(json!(rows), theirs["rows"], "{case}");
            }
            Err(message) => {
                refused += 1;
                assert!(theirs["error"].is_string(), "{case}: {message}, but {theirs}");
            }
        }
    }
    assert_eq!(refused, 4);
}

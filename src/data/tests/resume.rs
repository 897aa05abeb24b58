//! Going on at a cursor: for every format and compression, what comes before it and what comes behind it are the
//! records of a reading without an interruption, and the cursors are the same; what was changed since is refused.

use super::*;

/// The records, and the cursor behind each.
async fn with_cursors(mut stream: RecordStream) -> Vec<(Value, Cursor)> {
    let mut all = Vec::new();
    while let Some(record) = stream.next().await {
        let record = record.unwrap();
        all.push((json!([record.fields, record.place.to_string()]), stream.cursor()));
    }
    all
}

/// As it comes out of a checkpoint.
fn stored(cursor: &Cursor) -> Cursor {
    let text = serde_json::to_string(cursor).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Goes on at each of some records, and compares with what came without an interruption.
async fn assert_resumes(config: &SourceConfig, every: usize) -> usize {
    let whole = with_cursors(config.open("s", Cursor::default())).await;
    for at in (0..whole.len()).step_by(every.max(1)) {
        let rest = with_cursors(config.open("s", stored(&whole[at].1))).await;
        assert!(rest == whole[at + 1..], "after record {at} of {}", whole.len());
    }
    whole.len()
}

/// Text that compresses badly, so that gzip and zstd make several blocks of it.
fn noise(seed: u64, length: usize) -> String {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..length).map(|_| char::from(b'a' + (next() % 26) as u8)).collect()
}

fn rows(count: u64, length: usize) -> Vec<Value> {
    (0..count).map(|n| json!({"n": n, "text": noise(n, length)})).collect()
}

fn written(format: &str, rows: &[Value]) -> String {
    let lines = |end: &str| rows.iter().map(|row| format!("{row}{end}")).collect::<String>();
    match format {
        "jsonl" => lines("\n"),
        "json" => serde_json::to_string_pretty(rows).unwrap(),
        "paragraphs" => lines("\nand more\n\n"),
        "txt" => lines("\r\n"),
        _ => {
            let separator = if format == "csv" { "," } else { "\t" };
            let cell = |row: &Value| match format {
                "csv" => format!("{},\"{},\n{}\"\n", row["n"], row["text"].as_str().unwrap(), "x"),
                _ => format!("{}\t{}\n", row["n"], row["text"].as_str().unwrap()),
            };
            format!("n{separator}text\n") + &rows.iter().map(cell).collect::<String>()
        }
    }
}

/// As several members or frames, as parallel compressors write them.
fn in_pieces(bytes: &[u8], pack: fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    bytes.chunks(bytes.len() / 3 + 1).flat_map(pack).collect()
}

#[tokio::test]
async fn every_format_and_compression_goes_on_where_it_stopped() {
    let rows = rows(60, 200);
    for format in ["jsonl", "json", "csv", "tsv", "txt", "paragraphs"] {
        let text = written(format, &rows);
        let text = text.as_bytes();
        for (kind, bytes) in [
            ("plain", text.to_vec()),
            ("with a mark", [b"\xef\xbb\xbf", text].concat()),
            ("gzip", gzip(text)),
            ("zstd", zstd(text)),
            ("gzip members", in_pieces(text, gzip)),
            ("zstd frames", in_pieces(text, zstd)),
        ] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("a"), &bytes).unwrap();
            std::fs::write(dir.path().join("b"), &bytes).unwrap();
            let config = config(dir.path(), json!({"format": format}));
            assert_eq!(assert_resumes(&config, 17).await, 120, "{format} {kind}");
        }
    }
}

#[tokio::test]
async fn large_gzip_files_go_on_at_a_point_inside() {
    // Several mebibytes, so that there are points between the blocks; also over several members.
    let text = written("jsonl", &rows(300, 20_000));
    for (name, bytes) in [
        ("a.jsonl.gz", gzip(text.as_bytes())),
        ("b.jsonl.gz", in_pieces(text.as_bytes(), gzip)),
        ("c.jsonl.zst", in_pieces(text.as_bytes(), zstd)),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, &bytes).unwrap();
        let config = config(&path, json!({}));
        assert_eq!(assert_resumes(&config, 37).await, 300, "{name}");
        let whole = with_cursors(config.open("s", Cursor::default())).await;
        let late = serde_json::to_value(&whole[290].1).unwrap();
        let point = &late["at"]["mark"]["place"]["rows"]["spot"]["point"];
        let (input, output) = (point["input"].as_u64().unwrap(), point["output"].as_u64().unwrap());
        assert!(output > 3_000_000 && input > 1_000_000, "{name}: {input} {output}");
        assert!(late.to_string().len() < 80_000, "{name}: a cursor is small");
        // What lies before the point is not read again.
        let mut damaged = bytes.clone();
        damaged[1000..input as usize - 1000].fill(0);
        let time = std::fs::metadata(&path).unwrap().modified().unwrap();
        std::fs::write(&path, damaged).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        let rest = with_cursors(config.open("s", stored(&whole[290].1))).await;
        assert!(rest == whole[291..], "{name}");
        assert!(drain(config.open("s", Cursor::default())).await.1.is_some(), "{name}");
    }
}

#[tokio::test]
async fn counts_go_on_as_well() {
    let dir = tempfile::tempdir().unwrap();
    for file in 0..3 {
        let row = |i| json!({"n": file * 50 + i, "text": if i % 5 == 0 { "no" } else { "enough" }});
        let lines: String = (0..50).map(|i| format!("{}\n", row(i))).collect();
        std::fs::write(dir.path().join(format!("{file}.jsonl")), lines + "bad\n").unwrap();
    }
    let rest = json!({"skip": 7, "max_bad_rows": 0.1, "filter": {"min_chars": 3}});
    let config = config(dir.path(), rest);
    assert_eq!(assert_resumes(&config, 1).await, 113);
    let mut stream = config.open("s", Cursor::default());
    for number in 0..60 {
        stream.next().await.unwrap().unwrap();
        if number == 10 {
            stream.refuse("no".into()).unwrap();
        }
    }
    let (cursor, rows) = (stream.cursor(), stream.rows().clone());
    let mut second = config.open("s", stored(&cursor));
    assert_eq!(
        (second.rows().rows, second.rows().bad, second.rows().filtered),
        (rows.rows, rows.bad, rows.filtered)
    );
    assert_eq!(second.cursor(), cursor, "before anything is taken");
    while let Some(record) = second.next().await {
        record.unwrap();
    }
    let rows = second.rows();
    assert_eq!((rows.rows, rows.bad, rows.filtered), (153, 4, 30));
}

#[tokio::test]
async fn what_was_changed_since_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let text = |count: u64| written("jsonl", &rows(count, 20));
    std::fs::write(at("a.jsonl"), text(10)).unwrap();
    std::fs::write(at("b.jsonl"), text(10)).unwrap();
    let config = config(dir.path(), json!({}));
    let cursor = with_cursors(config.open("s", Cursor::default())).await[14].1.clone();
    // Nothing is changed, and the first file is not looked into.
    std::fs::write(at("a.jsonl"), "").unwrap();
    assert_eq!(drain(config.open("s", cursor.clone())).await.0.len(), 5);
    std::fs::write(at("b.jsonl"), text(9)).unwrap();
    let (_, error) = drain(config.open("s", cursor.clone())).await;
    let error = error.unwrap();
    assert!(error.contains("b.jsonl was changed since") && error.contains("bytes, it had"), "{error}");
    std::fs::remove_file(at("b.jsonl")).unwrap();
    let (_, error) = drain(config.open("s", cursor.clone())).await;
    assert!(error.unwrap().contains("was changed since"));
    std::fs::write(at("aa.jsonl"), text(10)).unwrap();
    let (_, error) = drain(config.open("s", cursor)).await;
    let error = error.unwrap();
    assert!(error.contains("aa.jsonl stands where") && error.contains("start anew"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_rows_go_on_anywhere(
        lines in prop::collection::vec("[a-zक-ह{}\",:0-9\\[\\] \t]{0,12}", 0..8),
        good in prop::collection::vec(any::<(u8, String)>(), 1..8),
        crlf in any::<bool>(), packed in 0_u8..3, ended in any::<bool>(),
    ) {
        let rows: Vec<String> = good.iter().map(|(n, s)| json!({"n": n, "s": s}).to_string()).collect();
        let end = if crlf { "\r\n" } else { "\n" };
        let mixed = [lines, rows.clone()].concat().join(end) + if ended { end } else { "" };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for (format, text) in [
            ("jsonl", mixed.clone()),
            ("txt", mixed.clone()),
            ("paragraphs", mixed.clone()),
            ("csv", format!("a,b{end}{mixed}")),
            ("tsv", format!("a\tb{end}{mixed}")),
            ("json", format!("[{}]", rows.join(","))),
        ] {
            let bytes = match packed {
                0 => text.into_bytes(),
                1 => gzip(text.as_bytes()),
                _ => zstd(text.as_bytes()),
            };
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("a"), bytes).unwrap();
            let config = config(&dir.path().join("a"), json!({"format": format, "max_bad_rows": 1}));
            runtime.block_on(assert_resumes(&config, 1));
        }
    }
}

//! Parquet files that the library's own writer made: values of every kind, columns that are left out, cursors, and
//! damage.

use std::sync::Arc;

use ::parquet::basic::Compression;
use ::parquet::column::writer::ColumnWriter;
use ::parquet::data_type::ByteArray;
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;

use super::*;

/// Values of one column of one row group, with the definition levels of a column that may be empty.
enum Column {
    Text(Vec<Option<String>>),
    Number(Vec<i64>),
    Float(Vec<f64>),
    /// A list of texts a row.
    Texts(Vec<Vec<String>>),
}

fn file(schema: &str, groups: &[Vec<Column>], compression: Compression) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties =
        WriterProperties::builder().set_compression(compression).set_data_page_size_limit(2000).build();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
    for group in groups {
        let mut rows = writer.next_row_group().unwrap();
        for column in group {
            let mut open = rows.next_column().unwrap().unwrap();
            match (open.untyped(), column) {
                (ColumnWriter::ByteArrayColumnWriter(typed), Column::Text(values)) => {
                    let levels: Vec<i16> = values.iter().map(|value| i16::from(value.is_some())).collect();
                    let values: Vec<ByteArray> = values
                        .iter()
                        .flatten()
                        .map(|text| ByteArray::from(text.as_bytes().to_vec()))
                        .collect();
                    typed.write_batch(&values, Some(&levels), None).unwrap();
                }
                (ColumnWriter::Int64ColumnWriter(typed), Column::Number(values)) => {
                    typed.write_batch(values, None, None).unwrap();
                }
                (ColumnWriter::DoubleColumnWriter(typed), Column::Float(values)) => {
                    typed.write_batch(values, None, None).unwrap();
                }
                (ColumnWriter::ByteArrayColumnWriter(typed), Column::Texts(lists)) => {
                    let (mut values, mut defined, mut repeated) = (Vec::new(), Vec::new(), Vec::new());
                    for list in lists {
                        if list.is_empty() {
                            defined.push(1);
                            repeated.push(0);
                        }
                        for (at, text) in list.iter().enumerate() {
                            values.push(ByteArray::from(text.as_bytes().to_vec()));
                            defined.push(3);
                            repeated.push(i16::from(at > 0));
                        }
                    }
                    typed.write_batch(&values, Some(&defined), Some(&repeated)).unwrap();
                }
                _ => panic!("the schema says something else"),
            }
            open.close().unwrap();
        }
        rows.close().unwrap();
    }
    writer.into_inner().unwrap()
}

const SCHEMA: &str = "message schema {
    optional binary text (UTF8);
    required int64 n;
    required double weight;
    optional group tags (LIST) { repeated group list { optional binary element (UTF8); } }
}";

fn group(from: i64, rows: i64) -> Vec<Column> {
    let numbers = || from..from + rows;
    let text = |n: i64| (n % 7 != 3).then(|| format!("पाठ {n} {}", "text ".repeat(n as usize % 30)));
    vec![
        Column::Text(numbers().map(text).collect()),
        Column::Number(numbers().collect()),
        Column::Float(numbers().map(|n| n as f64 / 2.0).collect()),
        Column::Texts(numbers().map(|n| (0..n % 3).map(|tag| format!("t{tag}")).collect()).collect()),
    ]
}

fn expected(n: i64) -> Value {
    let text = (n % 7 != 3).then(|| format!("पाठ {n} {}", "text ".repeat(n as usize % 30)));
    let tags: Vec<String> = (0..n % 3).map(|tag| format!("t{tag}")).collect();
    json!({"text": text, "n": n, "weight": n as f64 / 2.0, "tags": tags})
}

fn three_groups(compression: Compression) -> Vec<u8> {
    file(SCHEMA, &[group(0, 100), group(100, 3), group(103, 250)], compression)
}

#[tokio::test]
async fn rows_come_with_all_their_values() {
    let all: Vec<Value> = (0..353).map(expected).collect();
    for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(Default::default())]
    {
        let bytes = three_groups(compression);
        // By its name, by its beginning, and by its format.
        for (name, rest) in
            [("a.parquet", json!({})), ("a", json!({})), ("b.bin", json!({"format": "parquet"}))]
        {
            let (records, error) = read(name, &bytes, rest).await;
            assert_eq!(error, None, "{name} {compression}");
            assert!(records == all, "{name} {compression}");
        }
    }
    let empty = file(SCHEMA, &[], Compression::SNAPPY);
    assert_eq!(read("a.parquet", &empty, json!({})).await, (vec![], None));
}

#[tokio::test]
async fn only_named_columns_are_read() {
    let bytes = three_groups(Compression::SNAPPY);
    for (rest, kept) in [
        (json!({"fields": {"text": "text"}}), vec!["text"]),
        (json!({"fields": {"text": "tags.0"}}), vec!["tags"]),
        (
            json!({"fields": {"text": "text"}, "filter": {"field": "tags.0", "min_chars": 1}}),
            vec!["text", "tags"],
        ),
        (json!({"fields": {"prompt": "text", "completion": "n"}}), vec!["text", "n"]),
        // Not everything is named, or what is named is not there.
        (json!({"fields": {"prompt": "text"}}), vec!["text", "n", "weight", "tags"]),
        (json!({"fields": {"text": "body"}}), vec!["text", "n", "weight", "tags"]),
    ] {
        let mut rest_of = rest.clone();
        rest_of["max_bad_rows"] = json!(1);
        let (records, error) = read("a.parquet", &bytes, rest_of).await;
        assert_eq!(error, None);
        let names: Vec<&String> = records[0].as_object().unwrap().keys().collect();
        assert_eq!(names, kept, "{rest}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    std::fs::write(&path, &bytes).unwrap();
    let (records, _) = drain(config(&path, json!({"fields": {"text": "text"}})).open_whole("s")).await;
    assert_eq!(records[5], expected(5));
}

#[tokio::test]
async fn it_goes_on_at_any_row() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.parquet"), three_groups(Compression::SNAPPY)).unwrap();
    std::fs::write(dir.path().join("b.parquet"), three_groups(Compression::UNCOMPRESSED)).unwrap();
    for rest in [json!({}), json!({"fields": {"text": "text"}})] {
        let config = config(dir.path(), rest);
        let mut stream = config.open("s", Cursor::default());
        let mut whole = Vec::new();
        while let Some(record) = stream.next().await {
            whole.push((record.unwrap(), stream.cursor()));
        }
        assert_eq!(whole.len(), 706);
        assert!(whole[100].0.place.to_string().ends_with("a.parquet, row 101"), "{}", whole[100].0.place);
        for at in [0, 1, 50, 98, 99, 100, 102, 103, 200, 351, 352, 353, 460, 704, 705] {
            let text = serde_json::to_string(&whole[at].1).unwrap();
            let mut second = config.open("s", serde_json::from_str(&text).unwrap());
            let mut rest = Vec::new();
            while let Some(record) = second.next().await {
                rest.push((record.unwrap(), second.cursor()));
            }
            assert!(rest == whole[at + 1..], "after {at}");
        }
    }
}

#[tokio::test]
async fn damage_is_named() {
    let bytes = three_groups(Compression::SNAPPY);
    let with = |at: usize, value: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    let end = bytes.len();
    for (bytes, expected) in [
        (bytes[..end - 1].to_vec(), "does not end as one: it is cut off"),
        (bytes[..1000].to_vec(), "does not end as one"),
        (b"PAR1".to_vec(), "too short"),
        (vec![b'x'; 100], "neither begins nor ends as one"),
        (with(end - 8, &[0xff, 0xff, 0xff, 0x7f]), "the Parquet footer is damaged"),
        (with(end - 8, &[9, 0, 0, 0]), "the Parquet footer is damaged"),
        (with(end - 200, &[0xff; 60]), "a.parquet"),
        (with(4, &[0xff; 40]), "row 1: row group 1 of the Parquet file is damaged"),
    ] {
        let (_, error) = read("a.parquet", &bytes, json!({})).await;
        let error = error.unwrap_or_else(|| panic!("taken for sound: {expected}"));
        assert!(error.contains(expected) && error.starts_with("source lessons: "), "{expected}: {error}");
    }
    let no_text = "message schema { optional binary text (UTF8); required int64 n; required double w; \
                   optional group tags (LIST) { repeated group list { optional binary element (UTF8); } } }";
    let plain = file(no_text, &[group(0, 10)], Compression::UNCOMPRESSED);
    let at = plain.windows(3).position(|three| three == "पाठ".as_bytes()[..3].to_vec()).unwrap();
    let mut damaged = plain;
    damaged[at] = 0xff;
    let (_, error) = read("a.parquet", &damaged, json!({})).await;
    let error = error.unwrap();
    assert!(error.contains("row 1: no UTF-8 at byte 1 in column text"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_damage_makes_it_hang(at in 0_usize..10_000, value in any::<u8>(), cut in 0_usize..3) {
        let mut bytes = three_groups(Compression::SNAPPY);
        let at = at % bytes.len();
        bytes[at] = value;
        if cut == 0 {
            bytes.truncate(at);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (records, error) = runtime.block_on(read("a.parquet", &bytes, json!({"max_bad_rows": 1})));
        prop_assert!(records.len() <= 353 || error.is_some());
    }
}

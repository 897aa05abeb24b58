//! What streaming training data costs: decoding by format, and a large file over loopback HTTP: time to the first
//! record, time to go on in the middle, and memory. `cargo bench --bench sources -- [MB]` makes files of so many
//! megabytes of text each (64 where nothing is said) in a temporary folder and prints a table. Rates are by processor
//! time, so that what else the machine does matters little; the HTTP server is part of the process and of its figures.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt as _;
use gurukul::data::{Cursor, Format, RecordStream, SourceConfig, decoding};
use parquet::basic::{Compression, ZstdLevel};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio_util::io::ReaderStream;

/// Rows of a Parquet row group.
const GROUP_ROWS: usize = 20_000;

#[expect(clippy::print_stdout, reason = "a benchmark reports on stdout")]
fn say(line: std::fmt::Arguments) {
    println!("{line}");
}

/// Texts of some hundred bytes in two scripts, no two alike, without end.
fn texts() -> impl Iterator<Item = String> {
    let words: Vec<&str> =
        "यह एक छोटा वाक्य है जो सीखने के लिए लिखा गया the water of the river is cold and clear \
                            \"quoted\" while a new lesson begins in the school पानी नदी पाठशाला किताब"
            .split(' ')
            .collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::from_fn(move || {
        let mut text = String::new();
        for _ in 0..60 + state % 60 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            text.push_str(words[(state % words.len() as u64) as usize]);
            text.push(' ');
        }
        Some(text)
    })
}

/// Writes rows of so many bytes of text; how many they are.
fn write_rows(
    bytes: u64,
    mut to: impl Write,
    mut row: impl FnMut(&mut dyn Write, u64, &str) -> std::io::Result<()>,
) -> u64 {
    let (mut written, mut rows) = (0, 0);
    for text in texts() {
        if written >= bytes {
            break;
        }
        row(&mut to, rows, &text).expect("the disk has room");
        written += text.len() as u64;
        rows += 1;
    }
    to.flush().expect("the disk has room");
    rows
}

fn jsonl_row(to: &mut dyn Write, number: u64, text: &str) -> std::io::Result<()> {
    writeln!(to, "{}", json!({"n": number, "text": text}))
}

fn write_parquet(bytes: u64, to: File) -> u64 {
    let schema =
        "message schema { required int64 n; optional binary text (UTF8); optional binary url (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).expect("a schema"));
    let compression = Compression::ZSTD(ZstdLevel::try_new(1).expect("a level"));
    let properties = WriterProperties::builder().set_compression(compression).set_dictionary_enabled(false);
    let mut writer =
        SerializedFileWriter::new(to, schema, Arc::new(properties.build())).expect("a file to write");
    let (mut written, mut rows) = (0, 0_u64);
    let mut texts = texts();
    while written < bytes {
        let mut group: Vec<String> = Vec::new();
        while group.len() < GROUP_ROWS && written < bytes {
            let text = texts.next().expect("texts have no end");
            written += text.len() as u64;
            group.push(text);
        }
        let mut open = writer.next_row_group().expect("a row group");
        let text = |text: &String| ByteArray::from(text.as_bytes().to_vec());
        let url = |at: usize| ByteArray::from(format!("https://example.org/{at}").into_bytes());
        let mut at = 0;
        while let Some(mut column) = open.next_column().expect("a column") {
            let levels = vec![1; group.len()];
            match column.untyped() {
                ColumnWriter::Int64ColumnWriter(column) => {
                    let numbers: Vec<i64> = (0..group.len()).map(|n| rows as i64 + n as i64).collect();
                    column.write_batch(&numbers, None, None).expect("a batch");
                }
                ColumnWriter::ByteArrayColumnWriter(column) => {
                    let values: Vec<ByteArray> = match at {
                        1 => group.iter().map(text).collect(),
                        _ => (0..group.len()).map(url).collect(),
                    };
                    column.write_batch(&values, Some(&levels), None).expect("a batch");
                }
                _ => unreachable!("the schema has no other columns"),
            }
            column.close().expect("a column");
            at += 1;
        }
        open.close().expect("a row group");
        rows += group.len() as u64;
    }
    writer.close().expect("a footer");
    rows
}

/// A file of each format with so many bytes of text, and its rows.
fn write_files(folder: &Path, bytes: u64) -> Vec<(&'static str, PathBuf, u64)> {
    let create = |name: &str| BufWriter::new(File::create(folder.join(name)).expect("a file in the folder"));
    let mut files = Vec::new();
    let mut add = |name: &'static str, rows: u64| files.push((name, folder.join(name), rows));
    add("a.jsonl", write_rows(bytes, create("a.jsonl"), jsonl_row));
    let gz = flate2::write::GzEncoder::new(create("a.jsonl.gz"), flate2::Compression::new(6));
    add("a.jsonl.gz", write_rows(bytes, gz, jsonl_row));
    let zst = zstd::Encoder::new(create("a.jsonl.zst"), 3).expect("an encoder").auto_finish();
    add("a.jsonl.zst", write_rows(bytes, zst, jsonl_row));
    let mut json = create("a.json");
    json.write_all(b"[").expect("the disk has room");
    let rows = write_rows(bytes, &mut json, |to, number, text| {
        let comma = if number == 0 { "" } else { "," };
        write!(to, "{comma}\n{}", json!({"n": number, "text": text}))
    });
    json.write_all(b"]").and_then(|()| json.flush()).expect("the disk has room");
    add("a.json", rows);
    let csv = |to: &mut dyn Write, number: u64, text: &str| {
        let names = if number == 0 { "n,text\n" } else { "" };
        writeln!(to, "{names}{number},\"{}\"", text.replace('"', "\"\""))
    };
    add("a.csv", write_rows(bytes, create("a.csv"), csv));
    add("a.txt", write_rows(bytes, create("a.txt"), |to, _, text| writeln!(to, "{text}")));
    add(
        "a.parquet",
        write_parquet(bytes, File::create(folder.join("a.parquet")).expect("a file in the folder")),
    );
    files
}

/// A field of `/proc/self/status` in KiB.
fn memory_kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Processor time of all threads so far. The kernel counts in hundredths of a second.
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    Duration::from_millis(10 * (ticks(11) + ticks(12)))
}

/// Takes records, at most so many; how many there were.
async fn take(stream: &mut RecordStream, most: u64) -> u64 {
    let mut taken = 0;
    while taken < most {
        match stream.next().await {
            None => break,
            Some(record) => {
                record.expect("the file is sound");
                taken += 1;
            }
        }
    }
    taken
}

fn source(typed: serde_json::Value) -> SourceConfig {
    serde_json::from_value(typed).expect("the settings of a source")
}

/// Bytes of text a second of processor time that decoding alone takes, without a source around it.
fn decode_alone(name: &str, path: &Path, rows: u64, bytes: u64) -> f64 {
    let before = processor_time();
    let decoded = decoding::decode(Format::Auto, name, File::open(path).expect("the file is there"));
    assert_eq!((decoded.records, decoded.broken), (rows, None), "{name}");
    bytes as f64 / 1e6 / (processor_time() - before).as_secs_f64().max(0.001)
}

async fn decode(name: &str, path: &Path, rows: u64, bytes: u64) {
    let config = source(json!({"type": "local", "path": path, "fields": {"text": "text"}}));
    let (begun, before) = (Instant::now(), processor_time());
    let mut stream = config.open("bench", Cursor::default());
    assert_eq!(take(&mut stream, u64::MAX).await, rows, "{name}");
    let (wall, processor) = (begun.elapsed(), processor_time() - before);
    let rate = |time: Duration| bytes as f64 / 1e6 / time.as_secs_f64().max(0.001);
    let size = std::fs::metadata(path).map_or(0, |meta| meta.len());
    let alone = match name {
        // It is read by ranges, which needs a source.
        "a.parquet" => "-".to_owned(),
        _ => format!("{:.0}", decode_alone(name, path, rows, bytes)),
    };
    say(format_args!(
        "{name:<12} {:>9.1} {rows:>9} {alone:>12} {:>12.0} {:>12.0}",
        size as f64 / 1e6,
        rate(processor),
        rate(wall)
    ));
}

/// A file, whole or from a byte on, as a hub or an object store gives it.
async fn serve(
    State(folder): State<Arc<PathBuf>>,
    UrlPath(name): UrlPath<String>,
    headers: HeaderMap,
) -> Response {
    let Ok(mut file) = tokio::fs::File::open(folder.join(&name)).await else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let length = file.metadata().await.map_or(0, |meta| meta.len());
    let range = headers.get(header::RANGE).and_then(|range| range.to_str().ok()?.strip_prefix("bytes="));
    let range = range.and_then(|range| {
        let (from, to) = range.split_once('-')?;
        let to = to.parse::<u64>().unwrap_or(length - 1).min(length - 1);
        Some((from.parse::<u64>().ok()?, to))
    });
    let tag = (header::ETAG, format!("\"{length}\""));
    let (from, to) = range.unwrap_or((0, length - 1));
    if file.seek(std::io::SeekFrom::Start(from)).await.is_err() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    let count = to + 1 - from;
    let body = Body::from_stream(ReaderStream::with_capacity(file.take(count), 64 << 10));
    let size = (header::CONTENT_LENGTH, count.to_string());
    match range {
        None => ([tag, size], body).into_response(),
        Some(_) => {
            let range = (header::CONTENT_RANGE, format!("bytes {from}-{to}/{length}"));
            (StatusCode::PARTIAL_CONTENT, [tag, size, range], body).into_response()
        }
    }
}

/// The most that the process takes while this lives, sampled.
struct Peak {
    most_kib: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Peak {
    fn watch() -> Self {
        let (most_kib, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (kept, stopped) = (most_kib.clone(), stop.clone());
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                kept.fetch_max(memory_kib("VmRSS"), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Self { most_kib, stop }
    }

    fn mib(&self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        self.most_kib.load(Ordering::Relaxed) as f64 / 1024.0
    }
}

async fn stream(name: &str, address: std::net::SocketAddr, rows: u64, bytes: u64) {
    let config = source(json!({
        "type": "http", "url": format!("http://{address}/{name}"), "fields": {"text": "text"},
    }));
    let idle = memory_kib("VmRSS") as f64 / 1024.0;
    let peak = Peak::watch();
    let begun = Instant::now();
    let mut stream = config.open("bench", Cursor::default());
    take(&mut stream, 1).await;
    let first = begun.elapsed();
    let half = rows / 2;
    take(&mut stream, half - 1).await;
    let cursor = serde_json::to_string(&stream.cursor()).expect("a cursor as JSON");
    let at_half = memory_kib("VmRSS") as f64 / 1024.0;
    let next = stream.next().await.expect("a record").expect("the file is sound");
    let rest = take(&mut stream, u64::MAX).await;
    let wall = begun.elapsed();
    assert_eq!(half + 1 + rest, rows, "{name}");
    let most = peak.mib();
    drop(stream);
    let begun = Instant::now();
    let mut again = config.open("bench", serde_json::from_str(&cursor).expect("a cursor"));
    let record = again.next().await.expect("a record").expect("the file is sound");
    let resumed = begun.elapsed();
    assert!(record == next, "{name}: goes on at the next record");
    assert_eq!(take(&mut again, u64::MAX).await, rest, "{name}: none twice, none lost");
    say(format_args!(
        "{name:<12} {:>9.0} {:>9.3} {:>9.3} {:>9.1} {:>9.1} {:>9.1}",
        bytes as f64 / 1e6 / wall.as_secs_f64(),
        first.as_secs_f64(),
        resumed.as_secs_f64(),
        idle,
        at_half - idle,
        most - idle
    ));
}

#[tokio::main]
async fn main() {
    let megabytes: u64 = std::env::args().skip(1).find_map(|text| text.parse().ok()).unwrap_or(64);
    let bytes = megabytes * 1_000_000;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files = write_files(folder.path(), bytes);
    let router = axum::Router::new().route("/{name}", axum::routing::get(serve));
    let router = router.with_state(Arc::new(folder.path().to_owned()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, router).await });

    say(format_args!(
        "{megabytes} MB of text over loopback HTTP; memory in MiB, above idle at half and at most"
    ));
    say(format_args!(
        "{:<12} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "file", "MB/s", "first s", "resume s", "idle", "at half", "at most"
    ));
    for name in ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"] {
        let rows = files.iter().find(|(of, ..)| *of == name).map_or(0, |(_, _, rows)| *rows);
        stream(name, address, rows, bytes).await;
    }
    say(format_args!(
        "\ndecoding local files; MB of text a second: the decoder alone, as a source's stream by processor time, and by the \
         clock"
    ));
    say(format_args!(
        "{:<12} {:>9} {:>9} {:>12} {:>12} {:>12}",
        "file", "MB", "rows", "decoder", "stream", "clock"
    ));
    for (name, path, rows) in &files {
        decode(name, path, *rows, bytes).await;
    }
}

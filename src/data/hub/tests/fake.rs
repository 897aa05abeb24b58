//! A server that plays a hub, and one on another port that plays its content delivery network. It answers as
//! huggingface.co does (redirects, ETags, ranges, error headers), and each file can be given a fault.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;

use super::super::{Hub, HubSettings};

pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(super) const TOKEN: &str = "hf_secret";

/// What goes wrong with a file.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    /// The connection ends after this many bytes of an answer, for so many answers.
    Cut { after: usize, times: usize },
    /// A range gets the whole file.
    IgnoresRange,
    /// A range gets another range.
    OtherRange,
    /// `HEAD` is fine, `GET` is answered with 403 and a page.
    Forbidden,
    /// As `Forbidden`, with status 200 and no length.
    PageInstead,
    /// `HEAD` promises this many bytes more (or fewer) than come.
    WrongSize(i64),
    /// One byte differs.
    Corrupt,
    /// So many answers are this status first.
    Fails { status: u16, times: usize },
}

/// What a server was asked.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) cdn: bool,
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) token: bool,
    pub(super) range_start: Option<usize>,
    /// Whether the answer must not be compressed.
    pub(super) identity: bool,
}

#[derive(Default)]
pub(super) struct Script {
    pub(super) files: BTreeMap<String, Vec<u8>>,
    pub(super) faults: HashMap<String, Fault>,
    /// Answers to the listing: status and `X-Error-Code`.
    pub(super) listing_error: Option<(u16, &'static str)>,
    pub(super) asked: Vec<Asked>,
}

/// Both servers, and a hub client with a cache of its own.
pub(super) struct Fake {
    pub(super) script: Arc<Mutex<Script>>,
    pub(super) endpoint: String,
    pub(super) cache: tempfile::TempDir,
}

#[derive(Clone)]
struct Server {
    script: Arc<Mutex<Script>>,
    /// Where large files are; `None` on the network itself.
    cdn: Option<SocketAddr>,
}

/// Bytes that do not repeat early.
pub(super) fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(length)
    .collect()
}

/// Large files are those that end so; on the real hub they are stored apart.
fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".bin")
}

pub(super) fn etag(name: &str, content: &[u8]) -> String {
    let (algorithm, prefix) = if is_large(name) {
        (&ring::digest::SHA256, String::new())
    } else {
        (&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, format!("blob {}\0", content.len()))
    };
    let hash = ring::digest::digest(algorithm, &[prefix.as_bytes(), content].concat());
    hash.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

impl Fake {
    /// A hub with a complete single-file model, `org/name`.
    pub(super) async fn start() -> Self {
        let mut files = BTreeMap::new();
        for (name, content) in [
            ("config.json", b"{\"model_type\":\"llama\"}".to_vec()),
            ("tokenizer.json", b"{}".to_vec()),
            ("tokenizer_config.json", b"{\"a\":1}".to_vec()),
            ("generation_config.json", b"{\"b\":2}".to_vec()),
            ("special_tokens_map.json", b"".to_vec()),
            ("chat_template.jinja", b"{{ messages }}".to_vec()),
            ("model.safetensors", noise(300_000)),
            ("pytorch_model.bin", noise(10)),
            ("README.md", b"# read me".to_vec()),
            ("onnx/model.safetensors", noise(11)),
        ] {
            files.insert(name.to_owned(), content);
        }
        let script = Arc::new(Mutex::new(Script { files, ..Script::default() }));
        let cdn = serve(Server { script: script.clone(), cdn: None }).await;
        let hub = serve(Server { script: script.clone(), cdn: Some(cdn) }).await;
        Self { script, endpoint: format!("http://{hub}"), cache: tempfile::tempdir().unwrap() }
    }

    pub(super) fn settings(&self) -> HubSettings {
        HubSettings {
            endpoint: self.endpoint.clone(),
            token: Some(TOKEN.into()),
            cache_dir: self.cache.path().join("hub"),
            offline: false,
            backoff: Duration::from_millis(1),
        }
    }

    pub(super) fn hub(&self) -> Hub {
        Hub::new(self.settings()).unwrap()
    }

    pub(super) fn fault(&self, name: &str, fault: Fault) {
        self.script.lock().unwrap().faults.insert(name.into(), fault);
    }

    pub(super) fn put(&self, name: &str, content: &[u8]) {
        self.script.lock().unwrap().files.insert(name.into(), content.to_vec());
    }

    pub(super) fn remove(&self, name: &str) {
        self.script.lock().unwrap().files.remove(name);
    }

    pub(super) fn content(&self, name: &str) -> Vec<u8> {
        self.script.lock().unwrap().files[name].clone()
    }

    /// Where a file's content is in the cache.
    pub(super) fn blob(&self, name: &str) -> std::path::PathBuf {
        self.cache.path().join("hub/models--org--name/blobs").join(etag(name, &self.content(name)))
    }

    /// Where the file's download is until it is through.
    pub(super) fn partial(&self, name: &str) -> std::path::PathBuf {
        self.blob(name).with_extension("incomplete")
    }

    /// Requests since the last call.
    pub(super) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.script.lock().unwrap().asked)
    }

    /// Every file of the model is in the folder, as the hub has it.
    pub(super) fn assert_complete(&self, folder: &Path, names: &[&str]) {
        for name in names {
            assert!(std::fs::read(folder.join(name)).unwrap() == self.content(name), "{name} differs");
        }
    }
}

async fn serve(server: Server) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = axum::Router::new().fallback(answer).with_state(server);
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

async fn answer(State(server): State<Server>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let headers = request.headers();
    let token = headers.get(header::AUTHORIZATION).is_some_and(|v| v == &format!("Bearer {TOKEN}"));
    let range_start = headers.get(header::RANGE).map(|value| {
        value.to_str().unwrap().strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap()
    });
    let identity = headers.get(header::ACCEPT_ENCODING).is_some_and(|v| v == "identity");
    let method = request.method().clone();
    let mut script = server.script.lock().unwrap();
    let cdn = server.cdn.is_none();
    script.asked.push(Asked {
        cdn,
        method: method.clone(),
        path: path.clone(),
        token,
        range_start,
        identity,
    });
    if let Some(file) = path.strip_prefix("/cdn/") {
        return content(&mut script, file, range_start, HeaderMap::new(), &method);
    }
    if path.contains("/org/old/") || path.starts_with("/org/old") {
        let target = path.replacen("/org/old/", "/org/name/", 1);
        return (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, target)]).into_response();
    }
    if path.contains("/org/circle/") {
        return (StatusCode::FOUND, [(header::LOCATION, path)]).into_response();
    }
    if let Some(revision) = path.strip_prefix("/api/models/org/name/revision/") {
        if let Some(Fault::Fails { status, times }) = script.faults.get_mut("listing")
            && *times > 0
        {
            *times -= 1;
            return (StatusCode::from_u16(*status).unwrap(), [("Retry-After", "0")]).into_response();
        }
        if let Some((status, code)) = script.listing_error {
            return (StatusCode::from_u16(status).unwrap(), [("X-Error-Code", code)]).into_response();
        }
        if !["main", "refs%2Fpr%2F1", COMMIT].contains(&revision) {
            return (StatusCode::NOT_FOUND, [("X-Error-Code", "RevisionNotFound")]).into_response();
        }
        let siblings: Vec<_> =
            script.files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        return axum::Json(serde_json::json!({
            "id": "org/name", "modelId": "org/name", "sha": COMMIT, "private": false, "siblings": siblings,
            "tags": [], "downloads": 1, "likes": 0, "createdAt": "2024-01-01T00:00:00.000Z",
        }))
        .into_response();
    }
    // The Python package, since version 2, asks for sizes and hashes of all files at once.
    if path == format!("/api/models/org/name/tree/{COMMIT}") {
        let entries: Vec<_> = script
            .files
            .iter()
            .map(|(name, bytes)| {
                let (size, hash) = (bytes.len(), etag(name, bytes));
                if is_large(name) {
                    let lfs = serde_json::json!({ "oid": hash, "size": size, "pointerSize": 130 });
                    serde_json::json!({ "type": "file", "path": name, "size": size, "oid": COMMIT, "lfs": lfs })
                } else {
                    serde_json::json!({ "type": "file", "path": name, "size": size, "oid": hash })
                }
            })
            .collect();
        return axum::Json(entries).into_response();
    }
    // The Python package may ask by the branch's name; this client always asks by the commit.
    let file =
        ["main", COMMIT].into_iter().find_map(|r| path.strip_prefix(&format!("/org/name/resolve/{r}/")));
    let Some(file) = file.map(str::to_owned) else {
        return (StatusCode::NOT_FOUND, [("X-Error-Code", "RepoNotFound")]).into_response();
    };
    let Some(bytes) = script.files.get(&file).cloned() else {
        return (StatusCode::NOT_FOUND, [("X-Error-Code", "EntryNotFound")]).into_response();
    };
    let promised = match script.faults.get(&file) {
        Some(Fault::WrongSize(more)) => (bytes.len() as i64 + more) as usize,
        _ => bytes.len(),
    };
    let mut headers = HeaderMap::new();
    headers.insert("X-Repo-Commit", COMMIT.parse().unwrap());
    let etag = format!("\"{}\"", etag(&file, &bytes));
    if is_large(&file) {
        headers.insert("X-Linked-ETag", etag.parse().unwrap());
        headers.insert("X-Linked-Size", promised.into());
        let target = format!("http://{}/cdn/{file}", server.cdn.unwrap());
        headers.insert(header::LOCATION, target.parse().unwrap());
        return (StatusCode::FOUND, headers).into_response();
    }
    headers.insert(header::ETAG, etag.parse().unwrap());
    if method == Method::HEAD {
        headers.insert(header::CONTENT_LENGTH, promised.into());
        return (StatusCode::OK, headers).into_response();
    }
    content(&mut script, &file, range_start, headers, &method)
}

/// The bytes of a file, with what is wrong with them.
fn content(
    script: &mut Script,
    file: &str,
    range_start: Option<usize>,
    mut headers: HeaderMap,
    method: &Method,
) -> Response {
    let mut bytes = script.files[file].clone();
    let mut start = range_start;
    let mut cut = None;
    match script.faults.get_mut(file) {
        Some(Fault::Cut { after, times }) if *times > 0 && *method == Method::GET => {
            *times -= 1;
            cut = Some(*after);
        }
        Some(Fault::IgnoresRange) => start = None,
        Some(Fault::OtherRange) => start = start.map(|s| s + 1),
        Some(Fault::Forbidden) => return (StatusCode::FORBIDDEN, "no").into_response(),
        Some(Fault::PageInstead) => {
            let page = futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"<html>"))]);
            return Body::from_stream(page).into_response();
        }
        Some(Fault::Corrupt) => bytes[3] ^= 1,
        Some(Fault::Fails { status, times }) if *times > 0 => {
            *times -= 1;
            return (StatusCode::from_u16(*status).unwrap(), [("Retry-After", "0")]).into_response();
        }
        _ => {}
    }
    headers.insert(header::ACCEPT_RANGES, "bytes".parse().unwrap());
    let status = match start {
        None => StatusCode::OK,
        Some(start) if start >= bytes.len() => return StatusCode::RANGE_NOT_SATISFIABLE.into_response(),
        Some(start) => {
            let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
            headers.insert(header::CONTENT_RANGE, range.parse().unwrap());
            bytes.drain(..start);
            StatusCode::PARTIAL_CONTENT
        }
    };
    headers.insert(header::CONTENT_LENGTH, bytes.len().into());
    let body = match cut {
        None => Body::from(bytes),
        Some(after) => {
            bytes.truncate(after);
            let parts = futures::stream::iter([Ok(Bytes::from(bytes))]).chain(futures::stream::once(async {
                // Long enough for what came before to reach the client on its own.
                tokio::time::sleep(Duration::from_millis(20)).await;
                Err(std::io::Error::other("cut"))
            }));
            Body::from_stream(parts)
        }
    };
    (status, headers, body).into_response()
}

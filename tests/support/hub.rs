//! A server that plays a hub with data sets, and one on another port that plays its content delivery network. It answers
//! as huggingface.co does (commits, listings by page, redirects, ETags, ranges, error headers), each file can be given a
//! fault, and the Python packages `datasets` and `huggingface_hub` can be pointed at it. Knows nothing of this crate.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;
use serde_json::{Value, json};

/// What opens a private data set.
pub(crate) const TOKEN: &str = "hf_secret";

/// What goes wrong with a file.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Of so many answers with bytes the connection ends after this many of them.
    Cut { after: usize, times: usize },
    /// So many answers are this status first, with a `Retry-After`.
    Fails { status: u16, retry_after: &'static str, times: usize },
    /// Bytes come a few at a time.
    Drip,
    /// Every answer says that the whole is this much longer.
    WrongLength(u64),
    /// A range gets the whole file.
    IgnoresRange,
    /// Where the hub sends to, each address is good for so many answers and gives 403 then.
    Expires { answers: usize },
    /// Where the hub sends to, every address gives 403.
    Withheld,
}

/// What a server was asked.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) cdn: bool,
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) token: bool,
}

#[derive(Default)]
struct Repo {
    /// Branches and tags to commits.
    refs: BTreeMap<String, String>,
    commits: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    private: bool,
    gated: bool,
}

#[derive(Default)]
struct Script {
    repos: BTreeMap<String, Repo>,
    faults: HashMap<String, Fault>,
    asked: Vec<Asked>,
    /// Entries of a listing's page.
    page: usize,
    /// Addresses that were given out, and how often each was used.
    signed: Vec<usize>,
}

/// Both servers; they end with their runtime.
pub(crate) struct FakeHub {
    /// `http://127.0.0.1:PORT`
    pub(crate) endpoint: String,
    script: Arc<Mutex<Script>>,
}

#[derive(Clone)]
struct Server {
    script: Arc<Mutex<Script>>,
    /// Where large files are; `None` there.
    cdn: Option<SocketAddr>,
}

impl FakeHub {
    /// With no data set yet.
    pub(crate) async fn start() -> Self {
        let script = Arc::new(Mutex::new(Script { page: 1000, ..Script::default() }));
        let cdn = serve(Server { script: script.clone(), cdn: None }).await;
        let hub = serve(Server { script: script.clone(), cdn: Some(cdn) }).await;
        Self { endpoint: format!("http://{hub}"), script }
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().expect("no test panics in it")
    }

    /// Gives a data set a new commit with these files alone, and moves the branch to it.
    pub(crate) fn commit(&self, repo: &str, branch: &str, files: &[(&str, &[u8])]) -> String {
        let mut script = self.script();
        let number = script.repos.values().map(|repo| repo.commits.len()).sum::<usize>();
        let commit = format!("{:040x}", 0xabcd_0000_u64 + number as u64);
        let repo = script.repos.entry(repo.to_owned()).or_default();
        let files = files.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec())).collect();
        repo.commits.insert(commit.clone(), files);
        repo.refs.insert(branch.to_owned(), commit.clone());
        commit
    }

    /// Shows a data set to those alone who have the token.
    pub(crate) fn hide(&self, repo: &str) {
        self.script().repos.get_mut(repo).expect("is there").private = true;
    }

    /// Shows a data set to all, and its files to those alone who have the token.
    pub(crate) fn gate(&self, repo: &str) {
        self.script().repos.get_mut(repo).expect("is there").gated = true;
    }

    /// Gives every file of this path a fault.
    pub(crate) fn fault(&self, path: &str, fault: Fault) {
        self.script().faults.insert(path.to_owned(), fault);
    }

    /// Bounds the pages of listings.
    pub(crate) fn page(&self, entries: usize) {
        self.script().page = entries;
    }

    /// Requests since the last call.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.script().asked)
    }
}

async fn serve(server: Server) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let address = listener.local_addr().expect("is bound");
    let router = axum::Router::new().fallback(answer).with_state(server);
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

fn refuse(status: u16, code: &'static str) -> Response {
    let status = StatusCode::from_u16(status).expect("is a status");
    (status, [("X-Error-Code", code), ("X-Error-Message", code)], code).into_response()
}

/// Large files are those that end so; on the real hub they are stored apart.
fn is_large(name: &str) -> bool {
    [".parquet", ".gz", ".zst", ".bin"].iter().any(|end| name.ends_with(end))
}

fn hash(name: &str, content: &[u8]) -> String {
    let (algorithm, prefix) = if is_large(name) {
        (&ring::digest::SHA256, String::new())
    } else {
        (&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, format!("blob {}\0", content.len()))
    };
    let hash = ring::digest::digest(algorithm, &[prefix.as_bytes(), content].concat());
    hash.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

async fn answer(State(server): State<Server>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap_or_default();
    let path = percent_decoded(parts.uri.path());
    let query = parts.uri.query().unwrap_or_default().to_owned();
    let token = parts.headers.get(header::AUTHORIZATION).is_some_and(|v| v == &format!("Bearer {TOKEN}"));
    let range = parts.headers.get(header::RANGE).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let mut script = server.script.lock().expect("no test panics in it");
    let cdn = server.cdn.is_none();
    script.asked.push(Asked { cdn, path: path.clone(), range: range.clone(), token });
    let asked =
        Question { path: &path, query: &query, range: range.as_deref(), token, method: &parts.method };
    match server.cdn {
        None => from_network(&mut script, &asked),
        Some(cdn) => from_hub(&mut script, &asked, &parts.headers, &body, cdn),
    }
}

struct Question<'a> {
    path: &'a str,
    query: &'a str,
    range: Option<&'a str>,
    token: bool,
    method: &'a Method,
}

fn percent_decoded(path: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = (first == b'%').then(|| tail.get(..2)).flatten();
        let byte = code.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8(bytes).expect("is UTF-8")
}

fn from_hub(
    script: &mut Script,
    asked: &Question<'_>,
    headers: &HeaderMap,
    body: &Bytes,
    cdn: SocketAddr,
) -> Response {
    let api = asked.path.strip_prefix("/api/datasets/");
    let Some(rest) = api.or(asked.path.strip_prefix("/datasets/")) else {
        return refuse(404, "RepoNotFound");
    };
    let found = script.repos.iter().find(|(name, _)| {
        rest.strip_prefix(name.as_str()).is_some_and(|tail| tail.is_empty() || tail.starts_with('/'))
    });
    let Some((name, repo)) = found.filter(|(_, repo)| !repo.private || asked.token) else {
        return refuse(401, "RepoNotFound");
    };
    let name = name.clone();
    let tail = rest[name.len()..].trim_start_matches('/');
    let (kind, tail) =
        tail.split_once('/').unwrap_or((if tail.is_empty() { "revision" } else { tail }, "main"));
    // A revision may hold slashes.
    let revisions: BTreeSet<&str> = repo.refs.keys().chain(repo.commits.keys()).map(String::as_str).collect();
    let revision = revisions
        .iter()
        .rev()
        .find(|r| tail.strip_prefix(**r).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')));
    let Some(revision) = revision else { return refuse(404, "RevisionNotFound") };
    let path = tail[revision.len()..].trim_start_matches('/').to_owned();
    let commit = repo.refs.get(*revision).cloned().unwrap_or_else(|| (*revision).to_owned());
    let files = &repo.commits[&commit];
    match (api.is_some(), kind) {
        (true, "revision") => {
            let siblings: Vec<Value> = files.keys().map(|name| json!({ "rfilename": name })).collect();
            axum::Json(json!({
                "id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": [],
                "downloads": 1, "likes": 0, "disabled": false, "gated": repo.gated,
                "createdAt": "2024-01-01T00:00:00.000Z", "lastModified": "2024-01-01T00:00:00.000Z",
            }))
            .into_response()
        }
        (true, "tree") => {
            let entries = tree(files, &path, asked.query.to_lowercase().contains("recursive=true"));
            if entries.is_empty() && !path.is_empty() {
                return refuse(404, "EntryNotFound");
            }
            page(&entries, asked, headers, script.page)
        }
        (true, "paths-info") => {
            let wanted = wanted_paths(headers, body);
            let all = tree(files, "", true);
            let found = all.iter().filter(|entry| wanted.iter().any(|path| entry["path"] == path.as_str()));
            axum::Json(found.collect::<Vec<_>>()).into_response()
        }
        (false, "resolve") => {
            let Some(bytes) = files.get(&path) else { return refuse(404, "EntryNotFound") };
            if repo.gated && !asked.token && path != "README.md" {
                return refuse(401, "GatedRepo");
            }
            let bytes = bytes.clone();
            resolve(script, asked, &name, &commit, &path, bytes, cdn)
        }
        _ => refuse(404, "EntryNotFound"),
    }
}

fn wanted_paths(headers: &HeaderMap, body: &Bytes) -> Vec<String> {
    let is_json =
        headers.get(header::CONTENT_TYPE).is_some_and(|v| v.as_bytes().starts_with(b"application/json"));
    if is_json {
        let body: Value = serde_json::from_slice(body).expect("is JSON");
        return serde_json::from_value(body["paths"].clone()).unwrap_or_default();
    }
    let text = String::from_utf8_lossy(body).replace('+', " ");
    text.split('&').filter_map(|pair| pair.strip_prefix("paths=")).map(percent_decoded).collect()
}

/// The entries of a folder, or of all below it.
fn tree(files: &BTreeMap<String, Vec<u8>>, folder: &str, recursive: bool) -> Vec<Value> {
    let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
    let mut folders = BTreeSet::new();
    let mut entries = Vec::new();
    for (path, bytes) in files {
        let Some(inner) = path.strip_prefix(&prefix) else { continue };
        for (at, _) in inner.match_indices('/').take(if recursive { usize::MAX } else { 1 }) {
            folders.insert(format!("{prefix}{}", &inner[..at]));
        }
        if recursive || !inner.contains('/') {
            let (size, oid) = (bytes.len(), hash(path, bytes));
            let lfs = is_large(path).then(|| json!({ "oid": oid, "size": size, "pointerSize": 130 }));
            let oid = if lfs.is_some() { "0".repeat(40) } else { oid };
            let mut entry = json!({ "type": "file", "path": path, "size": size, "oid": oid });
            if let Some(lfs) = lfs {
                entry["lfs"] = lfs;
            }
            entries.push(entry);
        }
    }
    let folder =
        |path: String| json!({ "type": "directory", "path": path, "size": 0, "oid": "0".repeat(40) });
    folders.into_iter().map(folder).chain(entries).collect()
}

fn page(entries: &[Value], asked: &Question<'_>, headers: &HeaderMap, size: usize) -> Response {
    let cursor = asked.query.split('&').find_map(|pair| pair.strip_prefix("cursor="));
    let start: usize = cursor.and_then(|text| text.parse().ok()).unwrap_or(0);
    let end = entries.len().min(start + size);
    let mut answer = axum::Json(&entries[start..end]).into_response();
    if end < entries.len() {
        let host = headers[header::HOST].to_str().expect("is text");
        let rest: Vec<&str> = asked.query.split('&').filter(|pair| !pair.starts_with("cursor=")).collect();
        let path = asked.path.replace("refs/convert/parquet", "refs%2Fconvert%2Fparquet");
        let link = format!("<http://{host}{path}?{}&cursor={end}>; rel=\"next\"", rest.join("&"));
        answer.headers_mut().insert(header::LINK, link.parse().expect("is a header"));
    }
    answer
}

fn resolve(
    script: &mut Script,
    asked: &Question<'_>,
    name: &str,
    commit: &str,
    path: &str,
    bytes: Vec<u8>,
    cdn: SocketAddr,
) -> Response {
    let mut headers = HeaderMap::new();
    let etag = format!("\"{}\"", hash(path, &bytes));
    headers.insert("X-Repo-Commit", commit.parse().expect("is a header"));
    if is_large(path) {
        headers.insert("X-Linked-ETag", etag.parse().expect("is a header"));
        headers.insert("X-Linked-Size", bytes.len().into());
        script.signed.push(0);
        let target = format!("http://{cdn}/{name}/{commit}/{path}?signature={}", script.signed.len() - 1);
        headers.insert(header::LOCATION, target.replace(' ', "%20").parse().expect("is a header"));
        return (StatusCode::FOUND, headers).into_response();
    }
    headers.insert(header::ETAG, etag.parse().expect("is a header"));
    if *asked.method == Method::HEAD {
        headers.insert(header::CONTENT_LENGTH, bytes.len().into());
        return (StatusCode::OK, headers).into_response();
    }
    content(script, asked, path, bytes, headers)
}

fn from_network(script: &mut Script, asked: &Question<'_>) -> Response {
    let signature: usize = asked.query.trim_start_matches("signature=").parse().expect("is signed");
    script.signed[signature] += 1;
    let path = asked.path.trim_start_matches('/');
    let mut parts = path.splitn(4, '/');
    let (Some(org), Some(name), Some(commit), Some(file)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return StatusCode::NOT_FOUND.into_response();
    };
    match script.faults.get(file) {
        Some(Fault::Expires { answers }) if script.signed[signature] > *answers => {
            return StatusCode::FORBIDDEN.into_response();
        }
        Some(Fault::Withheld) => return StatusCode::FORBIDDEN.into_response(),
        _ => {}
    }
    let bytes = script.repos[&format!("{org}/{name}")].commits[commit][file].clone();
    content(script, asked, file, bytes, HeaderMap::new())
}

/// The bytes of a file, with what is wrong with them.
fn content(
    script: &mut Script,
    asked: &Question<'_>,
    path: &str,
    bytes: Vec<u8>,
    mut headers: HeaderMap,
) -> Response {
    let mut range = asked.range;
    let (mut cut, mut drip, mut total) = (None, false, bytes.len() as u64);
    match script.faults.get_mut(path) {
        Some(Fault::Cut { after, times }) if *times > 0 => {
            *times -= 1;
            cut = Some(*after);
        }
        Some(Fault::Fails { status, retry_after, times }) if *times > 0 => {
            *times -= 1;
            let status = StatusCode::from_u16(*status).expect("is a status");
            return (status, [(header::RETRY_AFTER, *retry_after)]).into_response();
        }
        Some(Fault::Drip) => drip = true,
        Some(Fault::WrongLength(more)) => total += *more,
        Some(Fault::IgnoresRange) => range = None,
        _ => {}
    }
    headers.insert(header::ACCEPT_RANGES, "bytes".parse().expect("is a header"));
    let bounds = range.and_then(|text| text.strip_prefix("bytes=")?.split_once('-')).map(|(start, last)| {
        let start: usize = start.parse().expect("is a number");
        let end = last.parse().map_or(bytes.len(), |last: usize| bytes.len().min(last + 1));
        (start, end)
    });
    let (status, part) = match bounds {
        None => (StatusCode::OK, bytes.as_slice()),
        Some((start, end)) if start >= end => return StatusCode::RANGE_NOT_SATISFIABLE.into_response(),
        Some((start, end)) => {
            let range = format!("bytes {start}-{}/{total}", end - 1);
            headers.insert(header::CONTENT_RANGE, range.parse().expect("is a header"));
            (StatusCode::PARTIAL_CONTENT, &bytes[start..end])
        }
    };
    let length = if status == StatusCode::OK { total } else { part.len() as u64 };
    headers.insert(header::CONTENT_LENGTH, length.into());
    let step = if drip { 997 } else { part.len().max(1) };
    let part = &part[..cut.unwrap_or(part.len()).min(part.len())];
    let mut pieces: Vec<Result<Bytes, std::io::Error>> =
        part.chunks(step).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    if (part.len() as u64) < length {
        pieces.push(Err(std::io::Error::other("cut")));
    }
    let wait = Duration::from_millis(if drip || cut.is_some() { 5 } else { 0 });
    let body = futures::stream::iter(pieces).then(move |piece| async move {
        // Long enough for what came before to reach the client on its own.
        tokio::time::sleep(wait).await;
        piece
    });
    (status, headers, Body::from_stream(body)).into_response()
}

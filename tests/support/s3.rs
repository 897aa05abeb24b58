//! A real S3 server (`s3s-fs`) in this process, with checked signatures, behind a layer that puts faults into its
//! answers. Knows nothing of this crate.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tower::ServiceExt as _;

/// The one key that the server knows.
pub(crate) const ACCESS_KEY: &str = "AKGURUKULTEST";
/// Its secret.
pub(crate) const SECRET_KEY: &str = "not-a-secret-of-anybody";

/// What goes wrong with the answers to requests whose path ends so.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Of so many answers to `GET` the connection ends after this many bytes of the body.
    Cut { after: usize, times: usize },
    /// So many answers are this status and code instead; `HEAD` gets the status alone.
    Refuse { status: u16, code: &'static str, times: usize },
    /// Bytes come a few at a time.
    Drip,
    /// The first answer ends after this many bytes, and by then the object is another one.
    Change { after: usize, to: Vec<u8> },
}

/// What the server was asked.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) range: Option<String>,
    pub(crate) if_match: Option<String>,
}

#[derive(Default)]
struct Script {
    faults: Vec<(String, Fault)>,
    asked: Vec<Asked>,
}

/// The server; it ends with its runtime.
pub(crate) struct S3 {
    /// `http://127.0.0.1:PORT`
    pub(crate) endpoint: String,
    root: tempfile::TempDir,
    script: Arc<Mutex<Script>>,
}

#[derive(Clone)]
struct Layer {
    service: S3Service,
    script: Arc<Mutex<Script>>,
    root: Arc<Path>,
}

impl S3 {
    /// With no bucket yet.
    pub(crate) async fn start() -> Self {
        let root = tempfile::tempdir().expect("a temporary folder can be made");
        let mut builder =
            S3ServiceBuilder::new(s3s_fs::FileSystem::new(root.path()).expect("the folder is there"));
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let script = Arc::new(Mutex::new(Script::default()));
        let layer = Layer { service: builder.build(), script: script.clone(), root: root.path().into() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let endpoint = format!("http://{}", listener.local_addr().expect("is bound"));
        let router = axum::Router::new().fallback(answer).with_state(layer);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { endpoint, root, script }
    }

    /// Puts an object into a bucket, which is made where it is not there.
    pub(crate) fn put(&self, bucket: &str, key: &str, content: &[u8]) {
        let path = self.root.path().join(bucket).join(key);
        std::fs::create_dir_all(path.parent().expect("is in a bucket")).expect("a folder can be made");
        std::fs::write(path, content).expect("can be written");
    }

    pub(crate) fn fault(&self, path_end: &str, fault: Fault) {
        self.script.lock().expect("no test panics in it").faults.push((path_end.to_owned(), fault));
    }

    /// Requests since the last call.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.script.lock().expect("no test panics in it").asked)
    }
}

async fn answer(State(layer): State<Layer>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let text = |headers: &HeaderMap, name| {
        headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
    };
    let (method, headers) = (request.method().clone(), request.headers());
    let asked = Asked {
        method: method.to_string(),
        path: path.clone(),
        query: request.uri().query().unwrap_or_default().to_owned(),
        range: text(headers, header::RANGE),
        if_match: text(headers, header::IF_MATCH),
    };
    let if_match = asked.if_match.clone();
    let fault = {
        let mut script = layer.script.lock().expect("no test panics in it");
        script.asked.push(asked);
        take(&mut script.faults, &path, method.as_str())
    };
    if let Some(Fault::Refuse { status, code, .. }) = fault {
        return refuse(status, code);
    }
    let result = layer.service.clone().oneshot(request).await;
    let response = match result {
        Ok(response) => response.map(Body::new).into_response(),
        Err(error) => return refuse(500, &format!("{error:?}")),
    };
    // The server below does not know the header.
    if let Some(wanted) = if_match
        && text(response.headers(), header::ETAG).is_some_and(|found| found != wanted)
    {
        return refuse(412, "PreconditionFailed");
    }
    match fault {
        Some(Fault::Cut { after, .. }) => cut(response, after),
        Some(Fault::Change { after, to }) => {
            let (parts, body) = response.into_parts();
            let whole = axum::body::to_bytes(body, usize::MAX).await.expect("is read");
            std::fs::write(layer.root.join(path.trim_start_matches('/')), to).expect("can be written");
            cut(Response::from_parts(parts, Body::from(whole)), after)
        }
        Some(Fault::Drip) => {
            let (parts, body) = response.into_parts();
            let drops = body.into_data_stream().flat_map(|chunk| {
                let chunk = chunk.expect("is read");
                let drops: Vec<Bytes> = chunk.chunks(701).map(Bytes::copy_from_slice).collect();
                futures::stream::iter(drops)
            });
            let drops = drops.then(async |bytes| {
                tokio::time::sleep(Duration::from_millis(1)).await;
                Ok::<_, std::io::Error>(bytes)
            });
            Response::from_parts(parts, Body::from_stream(drops))
        }
        _ => response,
    }
}

/// The fault that is due for a path, counted down.
fn take(faults: &mut Vec<(String, Fault)>, path: &str, method: &str) -> Option<Fault> {
    let at = faults.iter().position(|(end, fault)| {
        path.ends_with(end.as_str()) && (method == "GET" || matches!(fault, Fault::Refuse { .. }))
    })?;
    let fault = faults[at].1.clone();
    match &mut faults[at].1 {
        Fault::Drip => {}
        Fault::Cut { times, .. } | Fault::Refuse { times, .. } if *times > 1 => *times -= 1,
        _ => drop(faults.remove(at)),
    }
    Some(fault)
}

fn refuse(status: u16, code: &str) -> Response {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code><Message>as the test wants it</Message>\
         </Error>"
    );
    let status = StatusCode::from_u16(status).expect("is a status");
    (status, [(header::CONTENT_TYPE, "application/xml")], body).into_response()
}

/// The same answer, with all its headers, that ends early.
fn cut(response: Response, after: usize) -> Response {
    let (parts, body) = response.into_parts();
    let begin = body.into_data_stream().scan(after, |left, chunk| {
        let chunk = chunk.expect("is read");
        let taken = chunk.slice(..chunk.len().min(*left));
        *left -= taken.len();
        futures::future::ready((!taken.is_empty()).then_some(Ok(taken)))
    });
    let end = futures::stream::once(async {
        // Long enough for what came before to reach the client on its own.
        tokio::time::sleep(Duration::from_millis(20)).await;
        Err(std::io::Error::other("cut"))
    });
    Response::from_parts(parts, Body::from_stream(begin.chain(end)))
}

//! Servers of this process that fail as real ones do: refusals, connections that end before a request was taken, and
//! after. Also an S3 server (`s3s-fs`) with checked signatures to put behind. Knows nothing of this crate.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tower::{Service, ServiceExt as _};

/// The one key that the S3 server knows.
pub(crate) const ACCESS_KEY: &str = "AKGURUKULTEST";
/// Its secret.
pub(crate) const SECRET_KEY: &str = "not-a-secret-of-anybody";

/// A server that fails; it ends with its runtime.
pub(crate) struct Flaky {
    /// `http://127.0.0.1:PORT`
    pub(crate) endpoint: String,
    dice: Arc<Dice>,
}

/// Throws for each request.
struct Dice {
    /// Of a thousand requests.
    failing: AtomicU32,
    failed: AtomicU64,
    state: AtomicU64,
}

/// Marks an answer that is not to be given.
#[derive(Clone)]
struct Cut;

impl Flaky {
    /// Serves the routes; of a thousand requests `failing` fail, in an order that follows from the seed.
    pub(crate) async fn serve(routes: Router, failing: u32, seed: u64) -> Self {
        let dice = Dice { failing: failing.into(), failed: AtomicU64::new(0), state: seed.into() };
        let dice = Arc::new(dice);
        let routes = routes.layer(axum::middleware::from_fn_with_state(dice.clone(), fail));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let endpoint = format!("http://{}", listener.local_addr().expect("is bound"));
        tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let service = TowerToHyperService::new(Cuts(routes.clone()));
                tokio::spawn(async move {
                    let builder = Builder::new(TokioExecutor::new());
                    // Ends with an error where a connection is cut, as it should.
                    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { endpoint, dice }
    }

    /// From now on so many of a thousand fail.
    pub(crate) fn set_failing(&self, failing: u32) {
        self.dice.failing.store(failing, Ordering::SeqCst);
    }

    /// Requests that failed so far.
    pub(crate) fn failed(&self) -> u64 {
        self.dice.failed.load(Ordering::SeqCst)
    }
}

impl Dice {
    /// SplitMix64.
    fn throw(&self) -> u64 {
        let mut z = self.state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

async fn fail(State(dice): State<Arc<Dice>>, request: Request, next: Next) -> Response {
    let thrown = dice.throw();
    if thrown % 1000 >= u64::from(dice.failing.load(Ordering::SeqCst)) {
        return next.run(request).await;
    }
    dice.failed.fetch_add(1, Ordering::SeqCst);
    let mut cut = StatusCode::OK.into_response();
    cut.extensions_mut().insert(Cut);
    match (thrown / 1000) % 4 {
        0 => refusal(500, "InternalError"),
        1 => refusal(503, "SlowDown"),
        2 => cut,
        _ => {
            let response = next.run(request).await;
            // What was asked for is done, and nobody is told.
            let _ = axum::body::to_bytes(response.into_body(), usize::MAX).await;
            cut
        }
    }
}

/// An answer as S3 gives it.
pub(crate) fn refusal(status: u16, code: &str) -> Response {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code><Message>as the test wants it</Message>\
         </Error>"
    );
    let status = StatusCode::from_u16(status).expect("is a status");
    (status, [(header::CONTENT_TYPE, "application/xml")], body).into_response()
}

/// The routes, with an error where an answer is not to be given: then the connection ends.
#[derive(Clone)]
struct Cuts(Router);

impl<R> Service<R> for Cuts
where
    Router: Service<R, Response = Response, Error = Infallible>,
    <Router as Service<R>>::Future: Send + 'static,
{
    type Response = Response;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Response>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        <Router as Service<R>>::poll_ready(&mut self.0, context).map_err(|never| match never {})
    }

    fn call(&mut self, request: R) -> Self::Future {
        let answer = <Router as Service<R>>::call(&mut self.0, request);
        Box::pin(async move {
            let response = answer.await.unwrap_or_else(|never| match never {});
            match response.extensions().get::<Cut>() {
                Some(Cut) => Err(io::Error::other("cut")),
                None => Ok(response),
            }
        })
    }
}

/// An S3 server over a folder, whose folders are its buckets.
pub(crate) fn s3(root: &Path) -> Router {
    let files = s3s_fs::FileSystem::new(root).expect("the folder is there");
    let mut builder = S3ServiceBuilder::new(files);
    builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
    Router::new().fallback(answer).with_state(builder.build())
}

async fn answer(State(service): State<S3Service>, request: Request) -> Response {
    match service.oneshot(request).await {
        Ok(response) => response.map(Body::new),
        Err(error) => refusal(500, &format!("{error:?}")),
    }
}

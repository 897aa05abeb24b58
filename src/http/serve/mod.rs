//! The accept loop: connections with a bound on their number and on every time that a client can make the server
//! wait: for a TLS handshake, a request's head, its body, the reading of its answer, the next request. It must not
//! know any route.
//!
//! HTTP/1.1 and HTTP/2 come from hyper; what hyper has no limit for is watched by [`activity`].

mod activity;
mod answer;
mod body;
mod tls;
mod watched;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Request, StatusCode, Version, header};
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::either::Either;

use crate::metrics;
use activity::{Activity, Connections, Verdict};
use answer::Answer;
use body::TimedBody;
use watched::Watched;

pub use activity::Patience;
pub use body::BodyPatience;
pub(super) use body::TooSlow;
pub use tls::Tls;

/// Wait after an accept that failed for want of something, most often of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often somebody who waits for a slot looks for a connection that can go.
const ROOM_TURN: Duration = Duration::from_millis(100);

/// Bytes of a request's head that HTTP/1.1 takes, and that are read at once of a body.
const HEAD_BYTES: usize = 64 << 10;
/// Bytes of a request's head that HTTP/2 takes.
const HEADER_LIST_BYTES: u32 = 32 << 10;
/// Requests that one HTTP/2 connection may have under way.
const STREAMS: u32 = 128;
/// Bytes of an answer that one HTTP/2 stream may hold while its client does not read.
const SEND_BUFFER_BYTES: usize = 64 << 10;
/// After this long an HTTP/2 client that says nothing is asked whether it is there, and has as long to answer.
const PING: Duration = Duration::from_secs(20);

/// Bytes of an answer that the system holds for one connection while its client does not read. Left to itself it takes
/// megabytes, and tells of a slow client's reading only once in a megabyte.
const SOCKET_SEND_BYTES: u32 = 256 << 10;
/// Connections that may wait in the system's queue.
const BACKLOG: u32 = 1024;

/// What connections may do.
#[derive(Debug, Clone)]
pub struct ServeSettings {
    /// Connections at once. When there are as many, the one that was quiet longest goes for the next.
    pub max_connections: usize,
    /// Time for a TLS handshake.
    pub handshake: Duration,
    /// Time for a request's head, for reading an answer, and between requests.
    pub patience: Patience,
    /// Time for a request's body.
    pub body: BodyPatience,
    /// Speak TLS with this certificate.
    pub tls: Option<Arc<Tls>>,
}

impl Default for ServeSettings {
    fn default() -> Self {
        Self {
            max_connections: 2048,
            handshake: Duration::from_secs(10),
            patience: Patience::default(),
            body: BodyPatience::default(),
            tls: None,
        }
    }
}

/// Listens.
///
/// # Errors
/// The address cannot be listened on.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // As the standard library does: a server can be started again at once.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    // Accepted connections have what their listener has.
    socket.set_send_buffer_size(SOCKET_SEND_BYTES)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// What all connections share.
struct Shared {
    settings: ServeSettings,
    builder: Builder<TokioExecutor>,
    connections: Connections,
    slots: Arc<Semaphore>,
    router: Router,
}

/// Answers connections until `stop` is through; then accepts no more, and returns once every request that runs has
/// its answer. Dropped, it cuts what still runs.
///
/// # Errors
/// The listener is none any more. Whatever else accepting meets passes.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    settings: ServeSettings,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let shared = Arc::new(Shared {
        builder: builder(),
        connections: Connections::default(),
        slots: Arc::new(Semaphore::new(settings.max_connections.min(Semaphore::MAX_PERMITS))),
        router,
        settings,
    });
    let (stopping, stopped) = watch::channel(());
    let mut open = JoinSet::new();
    let mut stop = pin!(stop);
    loop {
        let (stream, peer, slot) = tokio::select! {
            biased;
            () = &mut stop => break,
            next = next(&listener, &shared) => next?,
        };
        open.spawn(connection(stream, peer, slot, shared.clone(), stopped.clone()));
        while let Some(ended) = open.try_join_next() {
            tell(ended);
        }
    }
    drop((listener, stopped));
    // An error means that no connection is left to tell.
    let _ = stopping.send(());
    while let Some(ended) = open.join_next().await {
        tell(ended);
    }
    Ok(())
}

/// hyper's own limits. Its time for a head would run between requests as well, so [`activity`] has that.
fn builder() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(HEAD_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEADER_LIST_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    builder
}

fn tell(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection ended in a panic");
    }
}

/// The next connection, once there is a slot for it.
async fn next(
    listener: &TcpListener,
    shared: &Shared,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return Ok((stream, peer, room(shared).await)),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(error),
            Err(error) if is_of_the_client(&error) => {
                tracing::debug!(%error, "a client left before it was accepted");
            }
            Err(error) => {
                tracing::error!(
                    %error,
                    "no connection can be accepted; where too many files are open, raise `ulimit -n` or lower \
                     --max-connections"
                );
                shared.connections.evict_quietest();
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// A slot. While there is none, connections without a request go, those that were quiet longest first; when all have
/// one, clients wait in the system's queue.
async fn room(shared: &Shared) -> OwnedSemaphorePermit {
    if let Ok(slot) = shared.slots.clone().try_acquire_owned() {
        return slot;
    }
    loop {
        shared.connections.evict_quietest();
        let slot = shared.slots.clone().acquire_owned();
        if let Ok(slot) = tokio::time::timeout(ROOM_TURN, slot).await {
            return slot.expect("a semaphore of connections that was closed is a bug");
        }
    }
}

/// One connection, from its handshake to its end.
async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    _slot: OwnedSemaphorePermit,
    shared: Arc<Shared>,
    mut stopped: watch::Receiver<()>,
) {
    // A token is a small packet, which must not wait for the next.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "TCP_NODELAY cannot be set");
    }
    let settings = &shared.settings;
    let (activity, _entry) = shared.connections.enter();
    let io = Watched::new(stream, activity.clone());
    let io = match &settings.tls {
        None => Either::Left(io),
        Some(tls) => tokio::select! {
            _ = stopped.changed() => return,
            () = activity.evicted() => return,
            shaken = tokio::time::timeout(settings.handshake, tls.acceptor().accept(io)) => match shaken {
                Ok(Ok(io)) => {
                    activity.shaken();
                    Either::Right(io)
                }
                Ok(Err(error)) => {
                    metrics::connection_ended("handshake_failed");
                    tracing::debug!(%peer, %error, "a TLS handshake failed");
                    return;
                }
                Err(_) => {
                    metrics::connection_ended("handshake_timeout");
                    tracing::debug!(%peer, "a TLS handshake took too long");
                    return;
                }
            },
        },
    };
    let service = service_fn(|request| answer(request, &shared, &activity));
    let serving = shared.builder.serve_connection(TokioIo::new(io), service);
    let mut serving = pin!(serving);
    let mut stopping = false;
    loop {
        tokio::select! {
            ended = serving.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%peer, %error, "a connection ended early");
                }
                return;
            }
            _ = stopped.changed(), if !stopping => {
                stopping = true;
                serving.as_mut().graceful_shutdown();
            }
            verdict = activity.verdict(&settings.patience) => match verdict {
                Verdict::Close(reason) => {
                    metrics::connection_ended(reason);
                    serving.as_mut().graceful_shutdown();
                }
                Verdict::Cut(reason) => {
                    metrics::connection_ended(reason);
                    tracing::debug!(%peer, reason, "a connection was cut");
                    return;
                }
            },
        }
    }
}

/// One request: the clock runs for its body, and the connection is busy until its answer went out.
fn answer(
    request: Request<Incoming>,
    shared: &Arc<Shared>,
    activity: &Arc<Activity>,
) -> impl Future<Output = Result<axum::http::Response<Answer>, std::convert::Infallible>> + use<> {
    let under_way = activity.enter_request(request.version());
    let version = request.version();
    let body = shared.settings.body;
    let request = request.map(|incoming| Body::new(TimedBody::new(incoming, body)));
    let answer = TowerToHyperService::new(shared.router.clone()).call(request);
    async move {
        let Ok(mut response) = answer.await;
        // The rest of the body may come yet, so no other request can follow on this connection.
        if response.status() == StatusCode::REQUEST_TIMEOUT && version < Version::HTTP_2 {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response.map(|body| Answer::new(body, under_way)))
    }
}

#[cfg(test)]
mod tests;

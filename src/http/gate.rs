//! What stands before the routes for as long as the process lives: it answers from the moment that the port is taken,
//! says why nothing else is to be had while the model is loaded and while the server stops, and counts what is being
//! answered. It must not know what any route does.

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::Router;
use axum::extract::Request;
use axum::response::Response;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use tokio::sync::watch;

use super::error::ApiError;
use super::held::held;
use super::{health, middleware};

/// What the process is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The model is being downloaded or loaded.
    Loading,
    /// Requests are answered.
    Serving,
    /// No request is taken any more; those that run may end.
    Stopping,
}

/// The phase of the process, for whoever has to tell it. A cheap clone; all clones see the same.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    phase: watch::Sender<Phase>,
    started: Instant,
}

impl Lifecycle {
    /// A process that begins in `phase`.
    pub fn new(phase: Phase) -> Self {
        Self { phase: watch::Sender::new(phase), started: Instant::now() }
    }

    /// What the process is at now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// When it began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Nothing comes after [`Phase::Stopping`]: a model that is through too late serves nobody.
    fn enter(&self, next: Phase) {
        self.phase.send_if_modified(|phase| {
            let changes = *phase != Phase::Stopping && *phase != next;
            if changes {
                *phase = next;
            }
            changes
        });
    }
}

/// Stands before the routes. A cheap clone.
#[derive(Clone)]
pub struct Gate {
    lifecycle: Lifecycle,
    /// The real routes, once there are any.
    open: Arc<OnceLock<Router>>,
    /// What is answered without them.
    closed: Router,
    /// Requests that are being answered, but for those that only look at the server.
    in_flight: watch::Sender<usize>,
}

impl Gate {
    /// A gate with nothing behind it yet.
    pub fn loading() -> Self {
        let lifecycle = Lifecycle::new(Phase::Loading);
        let refuse = {
            let lifecycle = lifecycle.clone();
            move || std::future::ready(refusal(lifecycle.phase()))
        };
        let closed = health::without_a_model()
            .fallback(refuse.clone())
            .method_not_allowed_fallback(refuse)
            .layer(axum::middleware::from_fn(middleware::around))
            .with_state(lifecycle.clone());
        Self { lifecycle, open: Arc::default(), closed, in_flight: watch::Sender::new(0) }
    }

    /// The phase, for the routes that tell it.
    pub fn lifecycle(&self) -> Lifecycle {
        self.lifecycle.clone()
    }

    /// From now on requests go to these routes.
    pub fn open(&self, routes: Router) {
        // Opened twice, it keeps its first routes.
        let _ = self.open.set(routes);
        self.lifecycle.enter(Phase::Serving);
    }

    /// From now on requests are refused, but for those that look at the server. Those that run go on.
    pub fn close(&self) {
        self.lifecycle.enter(Phase::Stopping);
    }

    /// Waits until nothing is being answered.
    pub async fn drained(&self) {
        // Never an error: this handle keeps the sender alive.
        let _ = self.in_flight.subscribe().wait_for(|requests| *requests == 0).await;
    }

    /// The service: all that arrives goes through the gate.
    pub fn router(self) -> Router {
        Router::new().fallback(move |request: Request| self.clone().answer(request))
    }

    async fn answer(self, request: Request) -> Response {
        let looks = looks_at_the_server(request.uri().path());
        // Counted before the phase is read: who waits for the last request then either sees this one or it is refused.
        let entered = (!looks).then(|| Entered::new(self.in_flight.clone()));
        let routes = match (self.lifecycle.phase(), self.open.get()) {
            (Phase::Serving, Some(open)) => open.clone(),
            (Phase::Stopping, Some(open)) if looks => open.clone(),
            _ => self.closed,
        };
        let answered: Result<Response, Infallible> = TowerToHyperService::new(routes).call(request).await;
        let Ok(response) = answered;
        match entered {
            Some(entered) => response.map(|body| held(body, entered)),
            None => response,
        }
    }
}

/// Health and metrics are for whoever watches, also while the server stops.
fn looks_at_the_server(path: &str) -> bool {
    path == "/health" || path.starts_with("/health/") || path == "/metrics"
}

/// Why no route is asked.
fn refusal(phase: Phase) -> ApiError {
    match phase {
        Phase::Stopping => ApiError::unavailable(
            "shutting_down",
            "the server is stopping and takes no more requests; try again when it is back".into(),
        ),
        // Between the two, the routes are there in a moment.
        Phase::Loading | Phase::Serving => ApiError::unavailable(
            "model_loading",
            "the model is still being loaded; GET /health/ready tells when requests are answered".into(),
        ),
    }
}

/// A request that is being answered, until this is dropped.
struct Entered(watch::Sender<usize>);

impl Entered {
    fn new(count: watch::Sender<usize>) -> Self {
        count.send_modify(|requests| *requests += 1);
        Self(count)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.send_modify(|requests| *requests -= 1);
    }
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, HttpBody as _};
    use axum::routing::get;
    use tower::ServiceExt as _;

    use super::*;

    async fn ask(gate: &Gate, path: &str) -> Response {
        let request = Request::get(path).body(Body::empty()).expect("is a request");
        gate.clone().router().oneshot(request).await.expect("is infallible")
    }

    async fn code(response: Response) -> (u16, String) {
        let status = response.status().as_u16();
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.expect("the body ends");
        let body: serde_json::Value = serde_json::from_slice(&bytes).expect("is JSON");
        let said = body["error"]["code"].as_str().or(body["status"].as_str());
        (status, said.unwrap_or_default().to_owned())
    }

    fn routes() -> Router {
        let json = async || axum::Json(serde_json::json!({"status": "routed"}));
        Router::new().route("/work", get(json)).route("/metrics", get(json)).route("/health/ready", get(json))
    }

    #[tokio::test]
    async fn each_phase_has_its_answers() {
        let gate = Gate::loading();
        let loading = ask(&gate, "/work").await;
        assert!(
            loading.headers().contains_key("retry-after") && loading.headers().contains_key("x-request-id")
        );
        assert_eq!(code(loading).await, (503, "model_loading".into()));
        assert_eq!(code(ask(&gate, "/nowhere").await).await, (503, "model_loading".into()));
        assert_eq!(code(ask(&gate, "/health/live").await).await, (200, "live".into()));
        assert_eq!(code(ask(&gate, "/health").await).await, (503, "loading".into()));
        let ready = ask(&gate, "/health/ready").await;
        assert!(ready.headers().contains_key("retry-after"));
        assert_eq!(code(ready).await, (503, "loading".into()));

        gate.open(routes());
        assert_eq!(code(ask(&gate, "/work").await).await, (200, "routed".into()));

        gate.close();
        assert_eq!(code(ask(&gate, "/work").await).await, (503, "shutting_down".into()));
        assert_eq!(code(ask(&gate, "/health/ready").await).await, (200, "routed".into()), "asks the routes");
        gate.open(routes());
        assert_eq!(gate.lifecycle().phase(), Phase::Stopping, "it does not come back");
    }

    #[tokio::test]
    async fn a_gate_that_closes_while_loading_says_so() {
        let gate = Gate::loading();
        gate.close();
        assert_eq!(code(ask(&gate, "/work").await).await, (503, "shutting_down".into()));
        assert_eq!(code(ask(&gate, "/health/ready").await).await, (503, "stopping".into()));
        assert_eq!(code(ask(&gate, "/health/live").await).await, (200, "live".into()));
    }

    #[tokio::test]
    async fn it_is_drained_when_the_last_body_is_gone() {
        let gate = Gate::loading();
        gate.open(routes());
        let response = ask(&gate, "/work").await;
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(50), gate.drained()).await;
        assert!(waiting.is_err(), "the answer is not sent yet");
        let looking = ask(&gate, "/metrics").await;
        assert_eq!(response.body().size_hint().exact(), Some(19), "a body of known length stays one");
        drop(response);
        gate.drained().await;
        drop(looking);
    }
}

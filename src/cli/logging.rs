//! What becomes of log lines and spans: lines to stderr, as text or JSON, and with the feature `otlp` spans to an
//! OpenTelemetry collector. It must not know what is logged.

use std::io;

use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::config::LogFormat;

/// The variable that names the collector, as OpenTelemetry has it.
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// The library that speaks to MCP servers. What it logs of a failed request has the whole address, and a key may stand in
/// its query; sources say themselves what went wrong, without it.
const UNLOGGED: &str = "rmcp";

/// Ends logging when it is dropped: what was not sent yet is sent.
pub(super) struct Logging {
    #[cfg(feature = "otlp")]
    _spans: Option<otlp::Spans>,
}

/// Log lines go to stderr; stdout belongs to answers. `RUST_LOG` chooses what is logged, else level info, but of the
/// [library](UNLOGGED) that repeats secrets nothing ever is.
///
/// # Errors
/// A collector's address that cannot be used. The chain holds [`crate::app::CannotStart`].
pub(super) fn start(format: LogFormat) -> anyhow::Result<Logging> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let known = filter_fn(|metadata| metadata.target().split("::").next() != Some(UNLOGGED));
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    #[cfg_attr(not(feature = "otlp"), expect(unused_mut, reason = "the feature adds one"))]
    let mut layers: Vec<Box<dyn Layer<Registry> + Send + Sync>> = vec![match format {
        LogFormat::Text => lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    }];
    let wanted = std::env::var_os(ENDPOINT).is_some_and(|endpoint| !endpoint.is_empty());
    #[cfg(feature = "otlp")]
    let logging = {
        use anyhow::Context as _;

        use crate::app::CannotStart;

        let spans = wanted.then(otlp::Spans::start).transpose().context(ENDPOINT).context(CannotStart)?;
        layers.extend(spans.as_ref().map(otlp::Spans::layer));
        Logging { _spans: spans }
    };
    #[cfg(not(feature = "otlp"))]
    let logging = Logging {};
    // What is not logged is not sent either.
    tracing_subscriber::registry().with(layers).with(filter).with(known).init();
    if wanted && cfg!(not(feature = "otlp")) {
        tracing::warn!("{ENDPOINT} is set, but this build has no feature otlp: no spans are sent");
    }
    Ok(logging)
}

#[cfg(feature = "otlp")]
mod otlp {
    //! Spans to a collector.

    use std::time::Duration;

    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_otlp::SpanExporter;
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::filter::filter_fn;
    use tracing_subscriber::{Layer, Registry};

    const NAME: &str = env!("CARGO_PKG_NAME");
    /// How long the last spans may take on their way.
    const LAST_SPANS: Duration = Duration::from_secs(5);

    /// What sends spans, in batches and on a thread of its own, as OpenTelemetry's variables say.
    pub(super) struct Spans(SdkTracerProvider);

    impl Spans {
        pub(super) fn start() -> anyhow::Result<Self> {
            // The exporter's client takes whatever provider of cryptography there is.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let exporter = SpanExporter::builder().with_http().build()?;
            let mut resource = Resource::builder();
            if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
                resource = resource.with_service_name(NAME);
            }
            let provider = SdkTracerProvider::builder();
            Ok(Self(provider.with_resource(resource.build()).with_batch_exporter(exporter).build()))
        }

        pub(super) fn layer(&self) -> Box<dyn Layer<Registry> + Send + Sync> {
            let layer = tracing_opentelemetry::layer().with_tracer(self.0.tracer(NAME));
            // Ours alone: the exporter's own requests would otherwise make spans of their own.
            layer.with_filter(filter_fn(|metadata| metadata.target().starts_with(NAME))).boxed()
        }
    }

    impl Drop for Spans {
        fn drop(&mut self) {
            if let Err(error) = self.0.shutdown_with_timeout(LAST_SPANS) {
                tracing::warn!(%error, "the last spans could not be sent");
            }
        }
    }
}

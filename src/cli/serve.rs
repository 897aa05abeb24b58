//! `gurukul serve`: runs the application until a signal ends it.

use std::pin::pin;
use std::time::Duration;

use crate::app::{self, Front};
use crate::config::Settings;
use crate::engine::EngineHandle;

pub(super) fn run(settings: &Settings) -> anyhow::Result<()> {
    let runtime = super::runtime()?;
    let mut engine = None;
    let outcome = runtime.block_on(serve(settings, &mut engine));
    // Connections that outlived the grace period end here, and with them their requests: the engine then has
    // nothing left to wait for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let Some(engine) = engine {
        engine.shutdown();
    }
    outcome
}

/// Gives the engine out as soon as there is one: it ends after the runtime.
async fn serve(settings: &Settings, engine: &mut Option<EngineHandle>) -> anyhow::Result<()> {
    let mut stop = pin!(app::stop_signal()?);
    let front = Front::open(settings).await?;
    let app = tokio::select! {
        app = front.load(settings) => app?,
        _ = &mut stop => {
            tracing::info!("asked to stop while the model was being loaded; nothing was begun");
            return Ok(());
        }
    };
    *engine = Some(app.engine());
    super::print(&welcome(app.url(), settings.model.is_none()))?;
    app.run(stop).await
}

/// Where the server is; with the demo model, also three requests to paste.
fn welcome(url: &str, demo: bool) -> String {
    let mut text = format!("gurukul answers on {url} (docs: {url}/docs/)\n");
    if demo {
        let json = "-H 'content-type: application/json' -d";
        text += &format!(
            "This is the demo model, a toy that translates short sentences into ten Indian languages; --model takes \
             another.\nThree requests to try:\n\
             curl -s {url}/generate-lite {json} '{{\"prompt\": \"Translate to Hindi: Where is the \
             school?\", \"do_sample\": false}}'\n\
             curl -s {url}/generate-lite {json} '{{\"prompt\": \"தமிழில் மொழிபெயர்க்கவும்: I need \
             water.\", \"do_sample\": false}}'\n\
             curl -s {url}/v1/chat/completions {json} '{{\"model\": \"gurukul-demo\", \
             \"temperature\": 0, \"messages\": [{{\"role\": \"user\", \"content\": \"Translate to Urdu: Good \
             morning.\"}}]}}'\n"
        );
    }
    text
}

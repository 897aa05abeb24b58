//! `gurukul serve`: runs the application until a signal ends it.

use std::time::Duration;

use crate::app;
use crate::config::Settings;

pub(super) fn run(settings: &Settings) -> anyhow::Result<()> {
    let runtime = super::runtime()?;
    let app = runtime.block_on(app::App::build(settings))?;
    let engine = app.engine();
    super::print(&welcome(&app.url(), settings.model.is_none()))?;
    let outcome = runtime.block_on(async { app.run(app::stop_signal()?).await });
    // Connections that outlived the grace period end here, and with them their requests: the engine then has
    // nothing left to wait for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    engine.shutdown();
    outcome
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

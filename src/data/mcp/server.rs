//! One MCP server, started or reached when it is first asked something, and again when it dies. Each request has a
//! limit of time and the patience of the source. Knows nothing of what is asked.

use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::Url;
use rmcp::ServiceExt as _;
use rmcp::model::{ClientCapabilities, ClientConfig, ErrorCode, Implementation};
use rmcp::service::{ClientInitializeError, Peer, RoleClient, RunningService, ServiceError};
use rmcp::transport::streamable_http_client::{StreamableHttpClientTransportConfig, StreamableHttpError};
use rmcp::transport::{StreamableHttpClientTransport, TokioChildProcess};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{ChildStderr, Command};
use tokio_util::sync::CancellationToken;

use super::super::http::headers;
use super::super::object::Opening;
use super::super::retry::{Failure, Retries};
use super::super::web::{client, with_causes};
use super::McpConfig;

/// What a server that is started gets of our environment: where programs, homes and temporary files are, and the
/// language. No secrets of ours.
const PASSED_ON: [&str; 20] = [
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LOGNAME",
    "PATH",
    "SHELL",
    "TERM",
    "TMPDIR",
    "TZ",
    "USER",
    // What programs on Windows do not start without.
    "APPDATA",
    "COMSPEC",
    "LOCALAPPDATA",
    "PATHEXT",
    "SYSTEMDRIVE",
    "SYSTEMROOT",
    "TEMP",
    "TMP",
    "USERPROFILE",
];

/// Lines of a server's standard error that messages may cite.
const KEPT_LINES: usize = 3;
/// Bytes of such a line that are logged.
const MAX_LINE_BYTES: u64 = 4096;

/// A server, with or without a connection.
pub(super) struct Server {
    config: McpConfig,
    opening: Opening,
    shown: String,
    limit: Duration,
    connection: Option<Connection>,
}

struct Connection {
    service: RunningService<RoleClient, ClientConfig>,
    stderr: Lines,
}

impl Server {
    pub(super) fn new(config: &McpConfig, opening: &Opening) -> Self {
        let shown = config.server_name();
        let limit = Duration::from_secs(config.timeout_s);
        Self { config: config.clone(), opening: opening.clone(), shown, limit, connection: None }
    }

    /// The program or the address, as messages name it.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    /// Asks something, starting or reaching the server where it must. `what` names what is asked, as in
    /// "tool list_rows", and `method` what the server must know for it.
    pub(super) fn ask<T>(
        &mut self,
        what: &str,
        method: &str,
        request: impl AsyncFn(&Peer<RoleClient>) -> Result<T, ServiceError>,
    ) -> Result<T, String> {
        let opening = self.opening.clone();
        let shown = format!("MCP server {}, {what}", self.shown);
        let asked = async {
            let mut retries = Retries::new(opening.patience);
            loop {
                match self.attempt(method, &request).await {
                    Ok(answer) => return Ok(answer),
                    Err(failure) => retries.wait(failure, &shown).await?,
                }
            }
        };
        opening.wait(asked).map_err(|reason| format!("{shown}: {reason}"))
    }

    async fn attempt<T>(
        &mut self,
        method: &str,
        request: &impl AsyncFn(&Peer<RoleClient>) -> Result<T, ServiceError>,
    ) -> Result<T, Failure> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(&self.config, &self.opening, self.limit).await?,
        };
        match tokio::time::timeout(self.limit, request(connection.service.peer())).await {
            Ok(Ok(answer)) => {
                self.connection = Some(connection);
                Ok(answer)
            }
            Ok(Err(error)) => {
                if self.config.url.is_none() && connection.service.peer().is_transport_closed() {
                    connection.stderr.settle().await;
                }
                let failure = of_service(&error, method, &connection.stderr);
                // One that answers, if only with an error, lives; one that is dead or stuck is started anew.
                if matches!(error, ServiceError::McpError(_)) {
                    self.connection = Some(connection);
                }
                Err(failure)
            }
            Err(_) => Err(Failure::passing(no_answer(self.limit))),
        }
    }
}

fn no_answer(limit: Duration) -> String {
    format!("no answer came within {} s; raise timeout_s if it needs longer", limit.as_secs_f64())
}

async fn connect(config: &McpConfig, opening: &Opening, limit: Duration) -> Result<Connection, Failure> {
    let own = Implementation::new("gurukul", env!("CARGO_PKG_VERSION"));
    // Nothing is offered to the server: no files, no sampling, nobody to be asked.
    let own = ClientConfig::new(ClientCapabilities::default(), own);
    let stderr = Lines::default();
    let service = match &config.url {
        Some(url) => {
            let transport = remote(config, url, opening)?;
            tokio::time::timeout(limit, own.serve(transport)).await
        }
        None => {
            let transport = child(config, &stderr)?;
            tokio::time::timeout(limit, own.serve(transport)).await
        }
    };
    match service {
        Ok(Ok(service)) => Ok(Connection { service, stderr }),
        Ok(Err(error)) => {
            if config.url.is_none() {
                stderr.settle().await;
            }
            Err(of_start(error, &stderr))
        }
        Err(_) => Err(Failure::passing(no_answer(limit))),
    }
}

/// The transport to a server at an address.
fn remote(
    config: &McpConfig,
    url: &str,
    opening: &Opening,
) -> Result<StreamableHttpClientTransport<reqwest::Client>, Failure> {
    let address = Url::parse(url).map_err(|error| Failure::Final(format!("url: {error}")))?;
    let client = client(&address, opening.patience).map_err(Failure::Final)?;
    let sent = headers(&config.headers_env).map_err(Failure::Final)?;
    let sent: HashMap<_, _> = sent.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    let settings = StreamableHttpClientTransportConfig::with_uri(url).custom_headers(sent);
    Ok(StreamableHttpClientTransport::with_client(client, settings))
}

/// Starts a server and the transport to it.
fn child(config: &McpConfig, stderr: &Lines) -> Result<TokioChildProcess, Failure> {
    let [program, arguments @ ..] = config.command.as_slice() else {
        return Err(Failure::Final("command is empty".into()));
    };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().kill_on_drop(true);
    for name in PASSED_ON {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    for name in &config.env_from {
        let value = std::env::var_os(name).ok_or_else(|| {
            Failure::Final(format!("env_from: the environment variable {name} is not set; set it"))
        })?;
        command.env(name, value);
    }
    let (transport, errors) =
        TokioChildProcess::builder(command).stderr(Stdio::piped()).spawn().map_err(|error| {
            Failure::Final(format!(
                "command: {program} cannot be started ({error}); install it or correct its path"
            ))
        })?;
    if let Some(errors) = errors {
        tokio::spawn(stderr.clone().keep(program.clone(), errors));
    }
    Ok(transport)
}

/// The last lines that a server wrote to its standard error.
#[derive(Clone, Default)]
struct Lines {
    last: Arc<Mutex<VecDeque<String>>>,
    ended: CancellationToken,
}

impl Lines {
    /// Logs lines and keeps the last ones until there are no more.
    async fn keep(self, program: String, errors: ChildStderr) {
        let _ended = self.ended.clone().drop_guard();
        let mut reader = BufReader::new(errors);
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let text: String =
                String::from_utf8_lossy(&line).trim().chars().filter(|c| !c.is_control()).collect();
            if text.is_empty() {
                continue;
            }
            tracing::info!(program, "MCP server: {text}");
            let mut lines = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            lines.push_back(text);
            if lines.len() > KEPT_LINES {
                lines.pop_front();
            }
        }
    }

    /// Waits for the last words of a server that has ended, which come another way than its answers.
    async fn settle(&self) {
        let _ = tokio::time::timeout(Duration::from_millis(500), self.ended.cancelled()).await;
    }

    /// For the end of a message.
    fn said(&self) -> String {
        let lines = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match lines.is_empty() {
            true => String::new(),
            false => format!(
                "; its last words: {}",
                lines.iter().map(String::as_str).collect::<Vec<_>>().join(" / ")
            ),
        }
    }
}

/// Sorts what went wrong at the start.
fn of_start(error: ClientInitializeError, stderr: &Lines) -> Failure {
    match error {
        ClientInitializeError::ConnectionClosed(_) => {
            Failure::passing(format!("the server ended before it answered{}", stderr.said()))
        }
        ClientInitializeError::TransportError { error, .. } => of_transport(error.error.as_ref(), stderr),
        ClientInitializeError::JsonRpcError(error) => {
            Failure::Final(format!("the server refuses to begin: {}", plain(&error.message)))
        }
        other => Failure::Final(format!("this is no MCP server: {}", plain(&other.to_string()))),
    }
}

/// Sorts what went wrong with a request.
fn of_service(error: &ServiceError, method: &str, stderr: &Lines) -> Failure {
    match error {
        ServiceError::McpError(error) => {
            let said = plain(&error.message);
            match error.code {
                ErrorCode::METHOD_NOT_FOUND => Failure::Final(no_method(method, &said)),
                // The one code that says nothing about the request.
                ErrorCode::INTERNAL_ERROR => Failure::passing(format!("the server failed: {said}")),
                ErrorCode(code) => Failure::Final(format!("the server refuses: {said} ({code})")),
            }
        }
        ServiceError::TransportSend(error) => of_transport(error.error.as_ref(), stderr),
        ServiceError::TransportClosed | ServiceError::Cancelled { .. } => {
            Failure::passing(format!("the server ended{}", stderr.said()))
        }
        ServiceError::Timeout { timeout } => Failure::passing(no_answer(*timeout)),
        ServiceError::UnexpectedResponse => Failure::Final(
            "the answer is not what was asked for; is this server's protocol a later one?".into(),
        ),
        other => Failure::Final(plain(&other.to_string())),
    }
}

fn no_method(method: &str, said: &str) -> String {
    let (has, other) = match method.starts_with("tools/") {
        true => ("tools", "resources"),
        false => ("resources", "tool"),
    };
    format!(
        "the server has no {has}: it does not know {method} ({said}, -32601); use {other} or another server"
    )
}

/// Sorts what went wrong on the way.
fn of_transport(error: &(dyn Error + Send + Sync + 'static), stderr: &Lines) -> Failure {
    const REFUSED: &str =
        "put what it asks for into an environment variable and name the header under headers_env";
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        cause = error.source();
        let Some(error) = error.downcast_ref::<StreamableHttpError<reqwest::Error>>() else { continue };
        return match error {
            StreamableHttpError::HttpStatus(status) => Failure::after(
                format!("the server answered {}", status.status),
                status.retry_after.as_deref(),
            ),
            StreamableHttpError::AuthRequired(_) => {
                Failure::Final(format!("the server answered 401; {REFUSED}"))
            }
            StreamableHttpError::InsufficientScope(_) => {
                Failure::Final(format!("the server answered 403; {REFUSED}"))
            }
            StreamableHttpError::UnexpectedContentType(_) => {
                Failure::Final("this is no MCP server: it answers with something else; correct url".into())
            }
            StreamableHttpError::ResponseBodyTooLarge { max_size } => Failure::Final(format!(
                "an answer has more than {} MB; ask for smaller pages or resources",
                max_size >> 20
            )),
            StreamableHttpError::UnexpectedServerResponse(said) => refused_or(plain(said), REFUSED),
            StreamableHttpError::Client(error) => match error.status() {
                Some(status) if status.is_client_error() => refused_or(format!("HTTP {status}"), REFUSED),
                _ => Failure::passing(with_causes("the connection failed".into(), error)),
            },
            other => Failure::passing(plain(&other.to_string())),
        };
    }
    Failure::passing(format!("{}{}", plain(&error.to_string()), stderr.said()))
}

/// An answer outside of the protocol, by what it says.
fn refused_or(said: String, remedy: &str) -> Failure {
    let remedy = match said.contains("401") || said.contains("403") {
        true => remedy,
        false => "is url the address of an MCP server?",
    };
    Failure::Final(format!("the server answered {said}; {remedy}"))
}

/// Text of a stranger, fit for a message.
pub(super) fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

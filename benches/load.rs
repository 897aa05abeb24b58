//! The built server under many clients, on the demo model: `cargo bench --bench load [-- connections|overhead [SECONDS]]`.
//! `connections`: a thousand connections of which 64 generate, while memory and `/health` are watched. `overhead`: what
//! keys, limits and metrics cost. Clients share the machine with the server. Knows the HTTP interface alone.

#[cfg(unix)]
fn main() -> anyhow::Result<()> {
    unix::main()
}

#[cfg(not(unix))]
fn main() {}

#[cfg(unix)]
mod unix {
    use std::collections::BTreeMap;
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::process::CommandExt as _;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    use anyhow::{Context as _, ensure};
    use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufStream};
    use tokio::net::TcpStream;

    const KEY: &str = "a-key-for-the-benchmark";
    /// Connections, and those of them that generate.
    const CONNECTIONS: usize = 1000;
    const GENERATING: usize = 64;
    /// Time between two requests of the others.
    const PAUSE: Duration = Duration::from_secs(2);
    /// Clients and rounds of `overhead`.
    const CLIENTS: usize = 8;
    const ROUNDS: usize = 41;
    const GENERATE: &str =
        r#"{"prompt": "Translate to Hindi: Where is the school?", "max_new_tokens": 32, "do_sample": false}"#;

    #[expect(clippy::print_stdout, reason = "a benchmark reports on stdout")]
    fn say(line: std::fmt::Arguments) {
        println!("{line}");
    }

    pub(super) fn main() -> anyhow::Result<()> {
        // Client and server have a descriptor for each connection.
        if std::env::var_os("LOAD_LIMIT_RAISED").is_none() {
            let script = "ulimit -n 8192; exec \"$0\" \"$@\"";
            let mut again = Command::new("sh");
            again.args(["-c", script]).arg(std::env::current_exe()?).args(std::env::args_os().skip(1));
            return Err(again.env("LOAD_LIMIT_RAISED", "1").exec()).context("sh");
        }
        let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
        let subject = arguments.first().map_or("all", String::as_str);
        let seconds = arguments.get(1).map(|text| text.parse()).transpose()?;
        ensure!(["all", "connections", "overhead"].contains(&subject), "no subject {subject}");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        if subject != "overhead" {
            runtime.block_on(connections(Duration::from_secs(seconds.unwrap_or(60))))?;
        }
        if subject != "connections" {
            runtime.block_on(overhead(Duration::from_secs(seconds.unwrap_or(1))))?;
            records();
        }
        Ok(())
    }

    /// The built binary with a data folder of its own; killed when dropped.
    struct Server {
        child: Child,
        address: String,
        _data: tempfile::TempDir,
    }

    impl Server {
        fn start(arguments: &[&str], environment: &[(&str, &str)]) -> anyhow::Result<Self> {
            let data = tempfile::tempdir()?;
            let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
            let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
            command.args(["serve", "--port", "0", "--data-dir"]).arg(data.path());
            command.arg("--configs").arg(configs).args(arguments);
            command.env("RUST_LOG", "warn").envs(environment.iter().copied());
            let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
            let mut lines = BufReader::new(child.stdout.take().context("is piped")?).lines();
            let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
                let (_, rest) = line.split_once("answers on http://")?;
                Some(rest.split(' ').next()?.to_owned())
            });
            let server = Self { child, address: address.context("the server ended")?, _data: data };
            std::thread::spawn(move || lines.for_each(drop));
            Ok(server)
        }

        /// A number of `/proc/PID/FILE`.
        fn proc(&self, file: &str) -> String {
            std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap_or_default()
        }

        fn resident_mib(&self) -> f64 {
            let status = self.proc("status");
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0 kB");
            line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(f64::NAN) / 1024.0
        }

        /// The kernel counts in hundredths of a second.
        fn processor_s(&self) -> f64 {
            let stat = self.proc("stat");
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
            let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
            (ticks(11) + ticks(12)) / 100.0
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// One connection that is kept.
    struct Connection(BufStream<TcpStream>);

    impl Connection {
        async fn open(address: &str) -> anyhow::Result<Self> {
            Ok(Self(BufStream::new(TcpStream::connect(address).await?)))
        }

        /// Status and body of a request.
        async fn ask(&mut self, path: &str, body: Option<&str>) -> anyhow::Result<(u16, Vec<u8>)> {
            let method = if body.is_some() { "POST" } else { "GET" };
            let body = body.unwrap_or_default();
            let request = format!(
                "{method} {path} HTTP/1.1\r\nhost: gurukul\r\nauthorization: Bearer {KEY}\r\n\
                 content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            self.0.write_all(request.as_bytes()).await?;
            self.0.flush().await?;
            let (mut status, mut length) = (None, 0);
            loop {
                let mut line = String::new();
                ensure!(self.0.read_line(&mut line).await? > 0, "the connection was closed");
                let line = line.trim_end().to_ascii_lowercase();
                if line.is_empty() {
                    break;
                } else if let Some(value) = line.strip_prefix("content-length:") {
                    length = value.trim().parse()?;
                } else if status.is_none() {
                    status = line.split(' ').nth(1).and_then(|text| text.parse().ok());
                }
            }
            let mut answer = vec![0; length];
            self.0.read_exact(&mut answer).await?;
            Ok((status.context("no status")?, answer))
        }
    }

    fn percentile(values: &mut [f64], share: f64) -> f64 {
        values.sort_by(f64::total_cmp);
        values
            .get(((values.len() as f64 * share) as usize).min(values.len().saturating_sub(1)))
            .copied()
            .unwrap_or(f64::NAN)
    }

    /// What the clients saw.
    #[derive(Default)]
    struct Seen {
        /// Answers by request and status; 0 is a connection that failed.
        statuses: BTreeMap<(&'static str, u16), u64>,
        health_ms: Vec<f64>,
    }

    async fn client(address: String, generates: bool, number: usize, end: Instant, seen: Arc<Mutex<Seen>>) {
        let (path, body) = if generates { ("/generate-lite", Some(GENERATE)) } else { ("/health", None) };
        let mut connection = None;
        if !generates {
            // Not all at once.
            tokio::time::sleep(PAUSE.mul_f64(number as f64 / CONNECTIONS as f64)).await;
        }
        while Instant::now() < end {
            if connection.is_none() {
                connection = Connection::open(&address).await.ok();
            }
            let begun = Instant::now();
            let answer = match &mut connection {
                Some(open) => open.ask(path, body).await,
                None => Err(anyhow::anyhow!("not connected")),
            };
            let status = answer.map_or(0, |(status, _)| status);
            {
                let mut seen = seen.lock().expect("no client panics in it");
                *seen.statuses.entry((path, status)).or_default() += 1;
                if !generates {
                    seen.health_ms.push(begun.elapsed().as_secs_f64() * 1e3);
                }
            }
            if status == 0 {
                connection = None;
            }
            if !generates || status != 200 {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    async fn connections(time: Duration) -> anyhow::Result<()> {
        let server = Server::start(&["--rate-limit", "1000000"], &[("GURUKUL_API_KEYS", KEY)])?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let end = Instant::now() + time;
        let clients: Vec<_> = (0..CONNECTIONS)
            .map(|n| tokio::spawn(client(server.address.clone(), n < GENERATING, n, end, seen.clone())))
            .collect();
        let mut resident = Vec::new();
        while Instant::now() < end {
            tokio::time::sleep(Duration::from_secs(1)).await;
            resident.push(server.resident_mib());
        }
        for client in clients {
            client.await?;
        }
        let mut seen = std::mem::take(&mut *seen.lock().expect("no client panics in it"));
        say(format_args!(
            "{CONNECTIONS} connections, {GENERATING} of them generating, for {} s",
            time.as_secs()
        ));
        for ((path, status), count) in &seen.statuses {
            say(format_args!("{path:<16} {status:>4} {count:>8}"));
        }
        let health = &mut seen.health_ms;
        say(format_args!(
            "/health ms: median {:.2}, p99 {:.2}, longest {:.2}",
            percentile(health, 0.5),
            percentile(health, 0.99),
            percentile(health, 1.0)
        ));
        let settled = resident.get(9).copied().unwrap_or(f64::NAN);
        let most = resident.iter().skip(10).copied().fold(f64::NAN, f64::max);
        let last = resident.last().copied().unwrap_or(f64::NAN);
        say(format_args!(
            "resident MiB: {settled:.1} after 10 s, {most:.1} at most after that ({:+.1} %), {last:.1} at the end",
            (most / settled - 1.0) * 100.0
        ));
        Ok(())
    }

    /// Tokens a second (requests, where nothing is generated), and processor seconds of the server for a thousand of them.
    async fn round(
        server: &Server,
        time: Duration,
        body: Option<&'static str>,
    ) -> anyhow::Result<(f64, f64)> {
        let path = if body.is_some() { "/generate-lite" } else { "/v1/models" };
        let (begun, before) = (Instant::now(), server.processor_s());
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let address = server.address.clone();
                tokio::spawn(async move {
                    let mut connection = Connection::open(&address).await?;
                    let mut tokens = 0;
                    while begun.elapsed() < time {
                        let (status, answer) = connection.ask(path, body).await?;
                        ensure!(status == 200, "{status}");
                        let answer: serde_json::Value = serde_json::from_slice(&answer)?;
                        tokens += answer["usage"]["completion_tokens"].as_u64().unwrap_or(1);
                    }
                    anyhow::Ok(tokens)
                })
            })
            .collect();
        let mut tokens = 0;
        for client in clients {
            tokens += client.await??;
        }
        let tokens = tokens as f64;
        let processor = server.processor_s() - before;
        Ok((tokens / begun.elapsed().as_secs_f64(), processor / tokens * 1000.0))
    }

    async fn overhead(time: Duration) -> anyhow::Result<()> {
        let open = Server::start(&[], &[])?;
        let limits = ["--rate-limit", "1000000", "--max-concurrent", "1000"];
        let guarded = Server::start(&limits, &[("GURUKUL_API_KEYS", KEY)])?;
        for (what, body) in [("tokens", Some(GENERATE)), ("requests for /v1/models", None)] {
            let [mut plain, mut with, mut rates, mut costs] = [const { Vec::new() }; 4];
            for number in 0..=ROUNDS {
                // In turns, so that what else the machine does falls on both.
                let first_is_open = number % 2 == 0;
                let order = if first_is_open { [&open, &guarded] } else { [&guarded, &open] };
                let first = round(order[0], time, body).await?;
                let second = round(order[1], time, body).await?;
                let (without_key, with_key) = if first_is_open { (first, second) } else { (second, first) };
                // The first pair warms up.
                if number > 0 {
                    plain.push(without_key.1);
                    with.push(with_key.1);
                    rates.push(with_key.0 / without_key.0);
                    costs.push(with_key.1 / without_key.1);
                }
            }
            say(format_args!(
                "\n{CLIENTS} clients, {ROUNDS} pairs; processor s for 1000 {what}: {:.3} open, {:.3} with a key and limits",
                percentile(&mut plain, 0.5),
                percentile(&mut with, 0.5)
            ));
            for (figure, values) in [("rate", &mut rates), ("processor time", &mut costs)] {
                say(format_args!(
                    "{figure} with a key and limits, of that without: median {:.3}, quartiles {:.3} and {:.3}",
                    percentile(values, 0.5),
                    percentile(values, 0.25),
                    percentile(values, 0.75)
                ));
            }
        }
        Ok(())
    }

    /// What recording costs: for each token, and for each request.
    fn records() {
        use gurukul::metrics;
        const TIMES: u32 = 200_000;
        let handle = metrics::install().expect("nothing else records here");
        let took = |record: &dyn Fn()| {
            let begun = Instant::now();
            (0..TIMES).for_each(|_| record());
            let took = begun.elapsed() / TIMES;
            // Histograms grow until they are read.
            handle.run_upkeep();
            took
        };
        let token = took(&|| {
            metrics::step(1, 0.001);
            metrics::token_gap(0.001);
        });
        let request = took(&|| {
            let _in_flight = metrics::InFlight::enter();
            metrics::key_request("bench", "admitted");
            metrics::answer_finished(0.001, 0.002, 0.003);
            metrics::tokens(Some("lessons"), 10, 10);
            metrics::http_answered("/generate-lite", "POST", 200, 0.01);
        });
        say(format_args!(
            "recording: {token:?} for a token that is alone in its step, {request:?} for a request"
        ));
    }
}

//! The real program as a process of its own: started in a folder, watched line by line, signalled, ended. It must not
//! know what any test checks.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longer than anything here takes.
pub(crate) const SOON: Duration = Duration::from_secs(120);

/// The tiny Llama of the fixtures.
pub(crate) fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama")
}

/// The program in a folder, with nothing of this process's environment that it would read.
pub(crate) fn gurukul(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
    command.current_dir(folder).stdin(Stdio::null());
    for (name, _) in std::env::vars() {
        if ["GURUKUL_", "HF_", "OTEL_", "RUST_LOG"].iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command.env("HF_HOME", folder.join("hf"));
    command
}

/// `gurukul serve` on a free port over the fixture, on the CPU.
pub(crate) fn serve(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = gurukul(folder);
    command.args(["serve", "--port", "0", "--device", "cpu", "--dtype", "f32", "--kv-cache", "64MiB"]);
    command.arg("--model").arg(llama()).args(arguments);
    command
}

/// A process under watch; killed when it is dropped.
pub(crate) struct Program {
    child: Child,
    /// What it said so far, stdout and stderr together, in no order between the two.
    said: Arc<Mutex<Vec<String>>>,
    pub(crate) base: String,
    pub(crate) client: reqwest::Client,
}

impl Program {
    /// Starts it and waits for the line that has `mark`, after which the address stands.
    pub(crate) async fn start(mut command: Command, mark: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let said = Arc::new(Mutex::new(Vec::new()));
        let streams: [Box<dyn std::io::Read + Send>; 2] = [
            Box::new(child.stdout.take().expect("is piped")),
            Box::new(child.stderr.take().expect("is piped")),
        ];
        for stream in streams {
            let said = said.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    said.lock().expect("no reader panics").push(line);
                }
            });
        }
        let mut program = Self { child, said, base: String::new(), client: reqwest::Client::new() };
        let line = program.line(mark).await;
        let rest = line.split_once(mark).expect("the line has it").1;
        let end = rest.find([' ', ';', '"']).unwrap_or(rest.len());
        program.base = rest[..end].to_owned();
        program
    }

    /// The same, for a server that answers.
    pub(crate) async fn serving(folder: &Path, arguments: &[&str]) -> Self {
        Self::start(serve(folder, arguments), "answers on ").await
    }

    /// All that it said so far.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.said.lock().expect("no reader panics").clone()
    }

    /// Waits for a line with `part`.
    pub(crate) async fn line(&mut self, part: &str) -> String {
        let end = Instant::now() + SOON;
        loop {
            if let Some(line) = self.lines().into_iter().find(|line| line.contains(part)) {
                return line;
            }
            if let Some(status) = self.child.try_wait().expect("the process is ours") {
                // Its last lines may still be on their way.
                tokio::time::sleep(Duration::from_millis(200)).await;
                if let Some(line) = self.lines().into_iter().find(|line| line.contains(part)) {
                    return line;
                }
                panic!("it ended with {status} without {part:?}: {:#?}", self.lines());
            }
            assert!(Instant::now() < end, "no {part:?} in {:#?}", self.lines());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Sends a signal by its name, as `TERM`.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let end = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.try_wait().expect("the process is ours") {
                return status;
            }
            assert!(Instant::now() < end, "it does not end: {:#?}", self.lines());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Status and JSON of a GET.
    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.client.get(format!("{}{path}", self.base)).send().await.expect("it answers");
        (response.status().as_u16(), response.json().await.expect("is JSON"))
    }

    /// Status and JSON of a POST.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.send(path, body).await;
        (response.status().as_u16(), response.json().await.expect("is JSON"))
    }

    pub(crate) async fn send(&self, path: &str, body: &Value) -> reqwest::Response {
        self.client.post(format!("{}{path}", self.base)).json(body).send().await.expect("it answers")
    }

    /// Waits until a job is what `is` wants it to be.
    pub(crate) async fn job(&self, id: &str, is: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + SOON;
        loop {
            let (_, job) = self.get(&format!("/adapter/status/{id}")).await;
            if is(&job) {
                return job;
            }
            assert!(job["status"] != "failed" && Instant::now() < end, "{job}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Program {
    /// `kill -9`
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Settings and rows for training jobs in a folder: the source `rows`, a job of `epochs` passes over 60 rows.
pub(crate) fn teachable(folder: &Path, epochs: u32) {
    let configs = folder.join("configs");
    std::fs::create_dir_all(&configs).expect("can be made");
    let rows: String = (0..60)
        .map(|i| format!("{{\"prompt\": \"say {}\", \"completion\": \" the word {}\"}}\n", i % 5, i % 5))
        .collect();
    let write = |path: PathBuf, text: &str| std::fs::write(path, text).expect("can be written");
    write(folder.join("rows.jsonl"), &rows);
    write(configs.join("mcp_connectors.yml"), "sources:\n  rows: {type: local, path: rows.jsonl}\n");
    let settings = format!(
        "r: 4\nbatch_size: 2\nepochs: {epochs}\nmax_seq_length: 64\nsave_steps: 20\nlogging_steps: 50\n"
    );
    write(configs.join("adapter_config.yaml"), &settings);
}

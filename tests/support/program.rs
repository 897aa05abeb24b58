//! The real program as a server over a fixture model, for tests that end it hard and start it again. Its configs are in
//! `configs` of its folder. It must not know what any test checks.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Longer than a start takes.
const START: Duration = Duration::from_secs(120);

/// The program, with its folder.
pub(crate) struct Program {
    dir: PathBuf,
    environment: Vec<(String, String)>,
    child: Child,
    /// `http://127.0.0.1:PORT`
    pub(crate) base: String,
}

impl Program {
    /// Starts it and waits until it answers.
    pub(crate) async fn start(dir: &Path, environment: &[(&str, &str)]) -> Self {
        let owned = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Self::start_in(dir.to_owned(), owned.collect()).await
    }

    async fn start_in(dir: PathBuf, environment: Vec<(String, String)>) -> Self {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama");
        let log =
            std::fs::File::options().create(true).append(true).open(dir.join("log")).expect("can be made");
        let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
        command.args(["serve", "--port", "0", "--device", "cpu", "--dtype", "f32", "--kv-cache", "64MiB"]);
        command.arg("--model").arg(model).arg("--data-dir").arg(&dir);
        command.arg("--configs").arg(dir.join("configs"));
        command.env_remove("AWS_SESSION_TOKEN").env_remove("AWS_PROFILE").env("RUST_LOG", "warn");
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().expect("the program starts");
        let stdout = child.stdout.take().expect("is piped");
        let mut program = Self { dir, environment, child, base: String::new() };
        let welcome = tokio::task::spawn_blocking(move || {
            let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
            let address = lines.find_map(|line| {
                let (_, rest) = line.split_once("answers on ")?;
                Some(rest.split(' ').next()?.to_owned())
            });
            // Whatever else it says is not to fill the pipe.
            std::thread::spawn(move || lines.for_each(drop));
            address
        });
        let base =
            tokio::time::timeout(START, welcome).await.expect("the program answers").expect("does not panic");
        let said = || std::fs::read_to_string(program.dir.join("log")).unwrap_or_default();
        program.base = base.unwrap_or_else(|| panic!("the program ended: {}", said()));
        program
    }

    /// `kill -9`, and a start in the same folder.
    pub(crate) async fn again(mut self) -> Self {
        let (dir, environment) = (self.dir.clone(), std::mem::take(&mut self.environment));
        drop(self);
        Self::start_in(dir, environment).await
    }
}

impl Drop for Program {
    /// `kill -9`
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

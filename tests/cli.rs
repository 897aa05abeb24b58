//! The binary as its users meet it: exit codes, messages, precedence of settings. No model is needed here.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The binary in an empty folder, with nothing of this process's environment that it would read.
fn gurukul(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
    command.current_dir(folder);
    for (name, _) in std::env::vars() {
        if name.starts_with("GURUKUL_") || name.starts_with("HF_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    // Nothing may be asked or found outside the folder.
    command.env("HF_HOME", folder.join("hf")).env("HF_HUB_OFFLINE", "1");
    command
}

fn assert_refused(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(output.stdout.is_empty(), "errors belong on stderr");
    for part in parts {
        assert!(stderr.contains(part), "{part:?} is missing in: {stderr}");
    }
    assert!(!stderr.contains("panicked") && stderr.lines().count() < 10, "{stderr}");
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity").join(name)
}

#[test]
fn without_a_model_the_demo_model_answers() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["generate", "Translate to Hindi: Where is the school?", "--temperature", "0"];
    let output = gurukul(dir.path()).args(arguments).output().unwrap();
    let answer = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && answer.contains("स्कूल कहाँ है?"),
        "{answer}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(dir.path().join("models").is_dir(), "its files are in the data folder");
}

#[test]
fn what_cannot_be_is_refused_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    for (arguments, parts) in [
        (&["--model", "./nowhere"][..], &["./nowhere", "existing folder"][..]),
        (&["--model", "org/name"], &["org/name", "HF_HUB_OFFLINE"]),
        (&["--max-batch", "0"], &["--max-batch", "1 to 1024"]),
        (&["--port", "70000"], &["--port", "65535"]),
        (&["--kv-cache", "lots"], &["--kv-cache", "512MiB"]),
        (&["--host", "0.0.0.0"], &["--host", "API keys", "--insecure-no-auth"]),
        (&["--max-bacth", "1"], &["--max-bacth"]),
        (&["serv"], &["serv"]),
        (&["generate"], &["<PROMPT>"]),
        (&["generate", "x", "--model", "m", "--temperature", "-1"], &["--temperature", "between 0"]),
        (&["generate", "x", "--model", "m", "--top-p", "2"], &["--top-p", "at most 1"]),
        (&["generate", "x", "--model", "m", "--max-new-tokens", "0"], &["--max-new-tokens"]),
    ] {
        assert_refused(&gurukul(dir.path()).args(arguments).output().unwrap(), parts);
    }
}

#[test]
fn a_settings_file_with_an_unknown_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("configs")).unwrap();
    std::fs::write(dir.path().join("configs/server.yaml"), "prot: 3\n").unwrap();
    assert_refused(&gurukul(dir.path()).output().unwrap(), &["prot", "configs/server.yaml", "port"]);
}

#[test]
fn a_port_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let model = fixture("llama");
    let output = gurukul(dir.path()).arg("--model").arg(model).args(["--port", &port]).output().unwrap();
    assert_refused(&output, &[&port, "another program listens there", "--port"]);
}

#[test]
fn check_config_shows_values_and_where_they_come_from() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("configs")).unwrap();
    std::fs::write(dir.path().join("configs/server.yaml"), "port: 1\nmax_batch: 1\nmax_queue: 1\n").unwrap();
    let mut command = gurukul(dir.path());
    command.env("GURUKUL_MAX_BATCH", "2").env("GURUKUL_MAX_QUEUE", "2");
    let output = command.args(["check-config", "--max-queue", "3"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stdout = String::from_utf8(output.stdout).unwrap();
    for line in [
        "host: \"127.0.0.1\"  # default",
        "port: 1  # configs/server.yaml",
        "max_batch: 2  # GURUKUL_MAX_BATCH",
        "max_queue: 3  # flag",
    ] {
        assert!(stdout.lines().any(|l| l == line), "{line:?} is missing in:\n{stdout}");
    }
}

#[test]
fn check_config_reads_the_files_for_training() {
    let dir = tempfile::tempdir().unwrap();
    let configs = dir.path().join("configs");
    std::fs::create_dir(&configs).unwrap();
    let check = || gurukul(dir.path()).arg("check-config").output().unwrap();
    let stdout = String::from_utf8(check().stdout).unwrap();
    assert!(stdout.contains("mcp_connectors.yml: can be used; it has no sources"), "{stdout}");
    for name in ["adapter_config.yaml", "mcp_connectors.yml"] {
        std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(name), configs.join(name))
            .unwrap();
    }
    let output = check();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("# configs/adapter_config.yaml: can be used"), "{stdout}");
    assert!(stdout.contains("#   local (local): data"), "{stdout}");
    std::fs::write(configs.join("mcp_connectors.yml"), "sources:\n  a: {type: local}\n").unwrap();
    assert_refused(&check(), &["configs/mcp_connectors.yml", "path is missing"]);
    std::fs::write(configs.join("adapter_config.yaml"), "r: 0\n").unwrap();
    assert_refused(&check(), &["configs/adapter_config.yaml", "r in adapter_config.yaml is 0", "1 to 1024"]);
}

#[test]
fn help_names_every_setting() {
    let dir = tempfile::tempdir().unwrap();
    let shipped =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/server.yaml")).unwrap();
    let keys = shipped.lines().filter_map(|l| l.strip_prefix('#')?.split_once(": ")).map(|(key, _)| key);
    let keys: Vec<&str> = keys.filter(|k| k.chars().all(|c| c.is_ascii_lowercase() || c == '_')).collect();
    assert!(keys.len() >= 16, "{keys:?}");
    for arguments in [&["--help"][..], &["serve", "--help"], &["generate", "--help"]] {
        let output = gurukul(dir.path()).args(arguments).output().unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        for key in &keys {
            let flag = format!("--{}", key.replace('_', "-"));
            assert!(stdout.contains(&flag), "{arguments:?} does not name {flag}");
        }
    }
}

// ---- what follows from the description of the command line

/// The output of a tool of this machine that reads `input`, or `None` where the machine does not have it.
fn piped(tool: &str, arguments: &[&str], input: &str) -> Option<Output> {
    let mut command = Command::new(tool);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().ok()?;
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Some(child.wait_with_output().unwrap())
}

#[test]
fn shells_complete_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    // Settings that cannot be used are no hindrance.
    std::fs::create_dir(dir.path().join("configs")).unwrap();
    std::fs::write(dir.path().join("configs/server.yaml"), "prot: 3\n").unwrap();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = gurukul(dir.path()).args(["completions", shell]).output().unwrap();
        assert!(output.status.success(), "{shell}: {}", String::from_utf8_lossy(&output.stderr));
        let script = String::from_utf8(output.stdout).unwrap();
        for word in ["check-config", "adapter-cache", "min-pass"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
        if let Some(checked) = piped(shell, &["-n"], &script).filter(|_| shell != "powershell") {
            assert!(checked.status.success(), "{shell}: {}", String::from_utf8_lossy(&checked.stderr));
        }
    }
    // The script does in bash what it is for.
    let script = gurukul(dir.path()).args(["completions", "bash"]).output().unwrap().stdout;
    let ask =
        "\nCOMP_WORDS=(gurukul che); COMP_CWORD=1; _gurukul gurukul che gurukul; echo \"${COMPREPLY[*]}\"\n";
    if let Some(asked) = piped("bash", &[], &(String::from_utf8(script).unwrap() + ask)) {
        assert_eq!(String::from_utf8_lossy(&asked.stdout), "check-config\n");
    }
    assert_refused(&gurukul(dir.path()).args(["completions", "csh"]).output().unwrap(), &["csh", "bash"]);
}

#[test]
fn the_manual_has_a_page_for_each_sub_command() {
    let dir = tempfile::tempdir().unwrap();
    let output = gurukul(dir.path()).arg("man").output().unwrap();
    let main = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && main.contains(".TH gurukul 1"), "{main}");

    let output = gurukul(dir.path()).args(["man", "--out", "share/man1"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let folder = dir.path().join("share/man1");
    let written = std::fs::read_to_string(folder.join("gurukul.1")).unwrap();
    assert!(written.contains(".TH gurukul 1") && written.contains("gurukul\\-episodes(1)"), "{written}");
    let help = String::from_utf8(gurukul(dir.path()).arg("--help").output().unwrap().stdout).unwrap();
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let commands = commands.lines().take_while(|line| !line.is_empty());
    let names: Vec<&str> = commands.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.len() >= 13, "{names:?}");
    for name in names.into_iter().filter(|name| *name != "help") {
        let page = std::fs::read_to_string(folder.join(format!("gurukul-{name}.1"))).unwrap();
        assert!(page.contains(".SH NAME") && page.contains(".SH OPTIONS"), "{name}: {page}");
        if let Some(checked) = piped("groff", &["-man", "-Kutf8", "-Tutf8", "-ww", "-z"], &page) {
            let said = String::from_utf8_lossy(&checked.stderr);
            assert!(checked.status.success() && said.is_empty(), "{name}: {said}");
        }
    }
    assert!(folder.join("gurukul-episodes-export.1").is_file(), "those of a sub-command's own too");

    let output =
        gurukul(dir.path()).args(["man", "--out", "configs/x"]).current_dir("/proc").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "a folder that cannot be made");
    assert!(String::from_utf8_lossy(&output.stderr).contains("--out configs/x"));
}

// ---- whether a server is ready

#[test]
fn health_tells_by_its_exit_code_whether_a_server_is_ready() {
    let dir = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    // One answer to each question, in this order.
    let answers = ["200 OK", "200 OK", "503 Service Unavailable", "404 Not Found"];
    let server = std::thread::spawn(move || {
        answers.map(|status| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = [0; 1024];
            let n = stream.read(&mut head).unwrap();
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&head[..n]).split(' ').nth(1).unwrap().to_owned()
        })
    });
    let ask = |arguments: &[&str]| {
        let output = gurukul(dir.path()).arg("health").args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let url = format!("http://127.0.0.1:{port}");
    assert_eq!(ask(&["--port", &port]), (Some(0), "ready\n".to_owned()));
    assert_eq!(ask(&["--url", &url]), (Some(0), "ready\n".to_owned()));
    let (code, said) = ask(&["--url", &url]);
    assert!(code == Some(1) && said.contains("503") && said.contains("not ready"), "{code:?} {said}");
    assert_eq!(ask(&["--url", &url]).0, Some(1), "is no server of ours");
    assert_eq!(server.join().unwrap(), ["/health/ready"; 4]);

    let (code, said) = ask(&["--url", &url]);
    assert!(code == Some(1) && said.contains(&url), "nobody is there any more: {code:?} {said}");
    assert_eq!(ask(&["--url", "not an address"]).0, Some(2));
}

// ---- with a model

/// A copy of a fixture model without one of its files, or with one of them changed.
fn damaged(dir: &Path, file: &str, change: impl Fn(Vec<u8>) -> Option<Vec<u8>>) -> PathBuf {
    let folder = dir.join("model");
    std::fs::create_dir(&folder).unwrap();
    for name in ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"] {
        let bytes = std::fs::read(fixture("llama").join(name)).unwrap();
        let bytes = if name == file { change(bytes) } else { Some(bytes) };
        if let Some(bytes) = bytes {
            std::fs::write(folder.join(name), bytes).unwrap();
        }
    }
    folder
}

#[test]
fn a_damaged_model_is_refused() {
    for (file, change, parts) in [
        ("config.json", (|_| None) as fn(Vec<u8>) -> Option<Vec<u8>>, &["config.json"][..]),
        ("config.json", |_| Some(b"{\"model_type\": \"mamba\"}".to_vec()), &["mamba", "llama"]),
        ("config.json", |b| Some(b[..b.len() / 2].to_vec()), &["config.json"]),
        ("tokenizer.json", |_| None, &["tokenizer.json"]),
        ("tokenizer.json", |_| Some(b"{}".to_vec()), &["tokenizer.json"]),
        ("model.safetensors", |_| None, &["model.safetensors"]),
        ("model.safetensors", |b| Some(b[..b.len() - 9].to_vec()), &["model.safetensors"]),
        ("model.safetensors", |_| Some(Vec::new()), &["model.safetensors"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let folder = damaged(dir.path(), file, change);
        for command in [&["serve", "--port", "0"][..], &["check-config"], &["generate", "x"]] {
            let output = gurukul(dir.path()).args(command).arg("--model").arg(&folder).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{command:?}: {stderr}");
            for part in parts {
                assert!(stderr.contains(part), "{command:?}: {part:?} is missing in: {stderr}");
            }
            assert!(!stderr.contains("panicked"), "{stderr}");
        }
    }
}

#[test]
fn check_config_tells_what_the_folder_holds() {
    let dir = tempfile::tempdir().unwrap();
    let output =
        gurukul(dir.path()).arg("check-config").arg("--model").arg(fixture("llama")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("\nfamily: llama\n") && stdout.contains("\nparameters: "), "{stdout}");
}

fn generate(dir: &Path, arguments: &[&str]) -> Output {
    gurukul(dir).arg("generate").args(arguments).arg("--model").arg(fixture("llama")).output().unwrap()
}

#[test]
fn generate_streams_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let answer = |arguments: &[&str]| {
        let output = generate(dir.path(), arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let greedy = answer(&["hello world", "--temperature", "0", "--max-new-tokens", "20"]);
    assert!(greedy.ends_with('\n') && greedy.trim().len() > 1, "{greedy:?}");
    assert_eq!(greedy, answer(&["hello world", "--temperature", "0", "--max-new-tokens", "20"]));
    let seeded = ["hello world", "--temperature", "2", "--seed", "5", "--max-new-tokens", "20"];
    assert_eq!(answer(&seeded), answer(&seeded));
    answer(&["hello world", "--chat", "--max-new-tokens", "5"]);
    let adapters = dir.path().join("adapters/mine");
    std::fs::create_dir_all(&adapters).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(fixture("llama/adapter").join(file), adapters.join(file)).unwrap();
    }
    let adapted =
        answer(&["hello world", "--temperature", "0", "--max-new-tokens", "20", "--adapter", "mine"]);
    assert_ne!(greedy, adapted);
}

#[test]
fn generate_refuses_what_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    for (arguments, parts) in [
        (&["hello", "--adapter", "nobody"][..], &["--adapter", "nobody"][..]),
        (&["hello", "--adapter", "../etc"], &["--adapter", "../etc"]),
        (&["hello", "--max-new-tokens", "1000000"], &["max_new_tokens", "1000000"]),
    ] {
        let output = generate(dir.path(), arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(parts.iter().all(|part| stderr.contains(part)), "{stderr}");
    }
}

#[cfg(unix)]
mod processes {
    //! Processes that are talked to while they run.

    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    use std::net::TcpStream;
    use std::process::{Child, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// A running `gurukul serve`, killed when a test fails.
    struct Served {
        child: Child,
        address: String,
    }

    impl Drop for Served {
        fn drop(&mut self) {
            let _ = self.child.kill();
        }
    }

    fn serve(dir: &Path) -> Served {
        let mut command = gurukul(dir);
        command.args(["serve", "--port", "0", "--model"]).arg(fixture("llama"));
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mark = "listening on http://";
        let mut seen = String::new();
        let address = loop {
            let line = lines.next().unwrap_or_else(|| panic!("it ended: {seen}")).unwrap();
            if let Some(start) = line.find(mark) {
                let rest = &line[start + mark.len()..];
                break rest.split_whitespace().next().unwrap().to_owned();
            }
            seen += &line;
        };
        // Somebody has to read on, or the pipe fills.
        std::thread::spawn(move || lines.for_each(drop));
        Served { child, address }
    }

    fn request(address: &str, head: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let length = body.len();
        write!(
            stream,
            "{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }

    fn wait(served: &mut Served) -> std::process::ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(status) = served.child.try_wait().unwrap() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("it does not end");
    }

    fn signal(served: &Served, name: &str) {
        let id = served.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    #[test]
    fn serve_lets_running_requests_end_after_sigterm() {
        let dir = tempfile::tempdir().unwrap();
        let mut served = serve(dir.path());
        let mut health = String::new();
        request(&served.address, "GET /health", "").read_to_string(&mut health).unwrap();
        assert!(health.starts_with("HTTP/1.1 200"), "{health}");
        let body = r#"{"prompt": "hello", "max_new_tokens": 400, "do_sample": false, "stream": true}"#;
        let mut stream = request(&served.address, "POST /generate-lite", body);
        let mut first = [0; 16];
        stream.read_exact(&mut first).unwrap();
        signal(&served, "TERM");
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("finish_reason"), "the answer came to its end: {rest}");
        assert!(wait(&mut served).success());
        assert!(TcpStream::connect(&served.address).is_err(), "nobody listens any more");
    }

    #[test]
    fn serve_ends_at_once_when_idle() {
        for name in ["TERM", "INT"] {
            let dir = tempfile::tempdir().unwrap();
            let mut served = serve(dir.path());
            let start = Instant::now();
            signal(&served, name);
            assert!(wait(&mut served).success());
            assert!(start.elapsed() < Duration::from_secs(10));
        }
    }

    #[test]
    fn generate_ends_quietly_when_nobody_reads() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = gurukul(dir.path());
        command.args(["generate", "hello", "--temperature", "0", "--max-new-tokens", "400", "--model"]);
        command.arg(fixture("llama")).env("RUST_LOG", "off");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{:?}", output.status);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    }
}

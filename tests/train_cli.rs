//! `gurukul train` as its users meet it: a job from a configs folder to an adapter, Ctrl-C, `kill -9`, a disk that
//! takes no more, and that going on afterwards ends with the same bytes.
#![cfg(unix)]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const TENSORS: &str = "adapter_model.safetensors";
const LIMIT: Duration = Duration::from_secs(300);

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama")
}

/// A folder with a configs folder and rows to learn from.
fn workplace() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("configs")).unwrap();
    std::fs::create_dir(dir.path().join("other")).unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let rows: String = (0..60)
        .map(|i| format!("{{\"prompt\": \"say {}\", \"completion\": \" the word {}\"}}\n", i % 5, i % 5))
        .collect();
    write("rows.jsonl", &rows);
    write("configs/mcp_connectors.yml", "sources:\n  Rows:\n    type: local\n    path: rows.jsonl\n");
    let settings = "r: 4\nlearning_rate: 0.003\nbatch_size: 2\ngradient_accumulation_steps: 2\nepochs: 4\n\
                    max_seq_length: 64\nsave_steps: 5\neval_steps: 10\nlogging_steps: 1\nlora_dropout: 0.1\n";
    write("configs/adapter_config.yaml", settings);
    write("other/settings.yaml", &format!("{settings}max_steps: 2\n"));
    dir
}

fn gurukul(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
    clean(&mut command, folder);
    command
}

fn clean(command: &mut Command, folder: &Path) {
    command.current_dir(folder);
    for (name, _) in std::env::vars() {
        if name.starts_with("GURUKUL_") || name.starts_with("HF_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.env("HF_HOME", folder.join("hf")).env("HF_HUB_OFFLINE", "1").env("GURUKUL_MODEL", llama());
    command.env("GURUKUL_KV_CACHE", "16MiB");
}

fn train(folder: &Path, arguments: &[&str]) -> Output {
    gurukul(folder).arg("train").args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The id that the first line tells.
fn job_id(stderr: &str) -> String {
    let line = stderr.lines().find_map(|line| line.strip_prefix("job ")).expect("the job's id is told");
    line.split(':').next().unwrap().to_owned()
}

fn bytes(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("adapters/rows").join(TENSORS)).unwrap()
}

/// Starts a job and waits until it has told `mark` so many times; gives what it told until then.
fn start_until(
    folder: &Path,
    arguments: &[&str],
    mark: &str,
    times: usize,
) -> (Child, String, mpsc::Receiver<String>) {
    let mut command = gurukul(folder);
    let mut child = command.arg("train").args(arguments).stderr(Stdio::piped()).spawn().unwrap();
    let (tell, told) = mpsc::channel();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(tell.send(line))));
    let (mut seen, mut left) = (String::new(), times);
    while left > 0 {
        let line = told.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("it ended or hangs: {seen}"));
        left -= usize::from(line.contains(mark));
        seen += &line;
        seen.push('\n');
    }
    (child, seen, told)
}

fn wait(child: &mut Child) -> std::process::ExitStatus {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    panic!("it does not end");
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn a_job_from_files_to_an_adapter_and_through_interruptions() {
    let alone = workplace();
    let output = train(alone.path(), &["--source", "Rows"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let (told, said) = (stderr(&output), String::from_utf8_lossy(&output.stdout).into_owned());
    assert!(
        said.starts_with("adapter rows generation 1: 60 steps, loss ") && said.contains("evaluation loss"),
        "{said}"
    );
    for part in ["plan: ", "source Rows: ", "step 1/", "checkpoint in ", "adapters/rows"] {
        assert!(told.contains(part), "{part:?} is missing in: {told}");
    }
    let expected = bytes(alone.path());

    // Ctrl-C: a checkpoint, and how to go on.
    let folder = workplace();
    let (mut child, seen, told) = start_until(folder.path(), &["--source", "Rows"], "step 7/", 1);
    signal(&child, "INT");
    assert!(wait(&mut child).success());
    let rest: Vec<String> = told.iter().collect();
    let id = job_id(&seen);
    assert!(rest.iter().any(|line| line.contains(&format!("gurukul train --resume {id}"))), "{rest:#?}");
    assert!(!folder.path().join("adapters/rows").exists());

    // Killed three times at whatever it was doing.
    for steps in [3, 6, 11] {
        let (mut child, ..) = start_until(folder.path(), &["--resume", &id], "loss", steps);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let output = train(folder.path(), &["--resume", &id]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("going on after step"));
    assert_eq!(bytes(folder.path()), expected, "the same adapter as that of the job that was left alone");

    // Once more, though it is at its end: the same adapter is published again.
    let output = train(folder.path(), &["--resume", &id]);
    assert!(
        String::from_utf8_lossy(&output.stdout).starts_with("adapter rows generation 2"),
        "{}",
        stderr(&output)
    );
    assert_eq!(bytes(folder.path()), expected);
}

#[test]
fn flags_come_before_the_file_and_a_file_may_lie_anywhere() {
    let dir = workplace();
    let arguments =
        ["--source", "Rows", "--config", "other/settings.yaml", "--adapter", "mine", "--set", "r=2"];
    let output = train(dir.path(), &arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    let config = std::fs::read_to_string(dir.path().join("adapters/mine/adapter_config.json")).unwrap();
    assert!(config.contains("\"r\": 2"), "{config}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("2 steps"));
}

#[test]
fn what_cannot_be_is_refused_before_training() {
    let dir = workplace();
    for (arguments, part) in [
        (&["--source", "nothing"][..], "Rows"),
        (&["--source", "Rows", "--set", "r=0"], "r "),
        (&["--source", "Rows", "--set", "target_modules=[c_attn]"], "q_proj"),
        (&["--source", "Rows", "--set", "nonsense=1"], "nonsense"),
        (&["--source", "Rows", "--set", "r"], "key=value"),
        (&["--source", "Rows", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (&["--source", "Rows", "--adapter", "../up"], "--adapter"),
        (&["--resume", "nobody"], "nobody"),
        (&["--resume", "../configs"], "--resume"),
        (&[], "--source"),
    ] {
        let output = train(dir.path(), arguments);
        let told = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {told}");
        assert!(told.contains(part) && !told.contains("panicked"), "{arguments:?}: {told}");
    }
    assert!(!dir.path().join("jobs").exists(), "no job is left over");
}

#[test]
fn a_disk_that_takes_no_more_fails_the_job_and_leaves_the_checkpoint_before() {
    let dir = workplace();
    let (mut child, seen, told) = start_until(dir.path(), &["--source", "Rows"], "checkpoint in", 1);
    signal(&child, "INT");
    assert!(wait(&mut child).success());
    drop(told);
    let id = job_id(&seen);
    let checkpoints = || {
        let mut names: Vec<_> = std::fs::read_dir(dir.path().join("jobs").join(&id))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    };
    let before = checkpoints();
    // Files may grow to 8 blocks of 1024 bytes, which a checkpoint's are larger than; the limit is an error and no
    // signal.
    let mut limited = Command::new("bash");
    clean(&mut limited, dir.path());
    let script =
        format!("trap '' XFSZ; ulimit -f 8; exec {} train --resume {id}", env!("CARGO_BIN_EXE_gurukul"));
    let output = limited.args(["-c", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("could not be written"), "{}", stderr(&output));
    assert_eq!(checkpoints(), before, "nothing half-written, nothing lost");
    let output = train(dir.path(), &["--resume", &id]);
    assert!(output.status.success(), "{}", stderr(&output));
}

//! `gurukul plan`, and the memory table of docs/TRAINING_GUIDE.md, which is what it computes. The shapes under
//! `tests/fixtures/shapes` are the fields of public models' `config.json` that decide about memory.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

const MODELS: [&str; 7] = [
    "SmolLM2-135M",
    "Qwen2.5-0.5B",
    "bloomz-560m",
    "Qwen3-0.6B",
    "Llama-3.2-1B",
    "Qwen2.5-1.5B",
    "Qwen2.5-3B",
];

/// Rank, longest sequence and batch of the table's columns.
const JOBS: [(u32, u32, u32); 4] = [(8, 256, 8), (16, 512, 8), (16, 1024, 4), (64, 512, 8)];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn plan(model: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gurukul"));
    for (name, _) in std::env::vars() {
        if name.starts_with("GURUKUL_") {
            command.env_remove(name);
        }
    }
    let folder = format!("tests/fixtures/shapes/{model}");
    command.current_dir(root()).args(["plan", "--model", &folder]).args(arguments).output().unwrap()
}

fn planned(model: &str, arguments: &[&str]) -> Value {
    let output = plan(model, arguments);
    assert!(output.status.success(), "{model}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn mib(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap().div_ceil(1 << 20)
}

fn table() -> String {
    let mut text = String::from("| model | quantize | weights |");
    for (r, seq, b) in JOBS {
        text += &format!(" r {r}, seq {seq}, b {b} |");
    }
    text += "\n| --- | --- | ---: |";
    text += &" ---: |".repeat(JOBS.len());
    text.push('\n');
    for model in MODELS {
        for quantize in ["none", "q8_0", "q4_k"] {
            let mut row = String::new();
            let mut weights = 0;
            for (r, seq, b) in JOBS {
                let settings = [("r", r), ("max_seq_length", seq), ("batch_size", b)];
                let settings: Vec<String> =
                    settings.iter().map(|(key, value)| format!("{key}={value}")).collect();
                let mut arguments = vec!["--device", "cuda", "--memory", "80GiB", "--quantize", quantize];
                arguments.extend(["--set", "checkpointing=recompute"]);
                arguments.extend(settings.iter().flat_map(|setting| ["--set", setting.as_str()]));
                let report = planned(model, &arguments);
                weights = mib(&report, "weight_bytes");
                row += &format!(" {} |", mib(&report, "training_bytes"));
            }
            text += &format!("| {model} | {quantize} | {weights} |{row}\n");
        }
    }
    text
}

#[test]
fn the_table_of_the_guide_is_what_the_planner_computes() {
    let guide = std::fs::read_to_string(root().join("docs/TRAINING_GUIDE.md")).unwrap();
    let (_, rest) = guide.split_once("<!-- memory table: written by tests/plan.rs -->\n").unwrap();
    let (written, _) = rest.split_once("<!-- end of the memory table -->").unwrap();
    let table = table();
    assert_eq!(written.trim(), table.trim(), "docs/TRAINING_GUIDE.md: the table is now\n{table}");
}

#[test]
fn it_plans_for_cards_and_processors_that_are_not_there() {
    let card = planned("Qwen2.5-0.5B", &["--device", "cuda", "--memory", "6GiB", "--set", "r=16"]);
    assert_eq!(card["device"], "cuda");
    // 24 layers of 14,909,440 parameters in linear layers, and the vocabulary once, in 16 bits.
    assert_eq!(card["weight_bytes"], 2 * (24 * 14_909_440_u64 + 151_936 * 896));
    let sum = ["weight_bytes", "kv_cache_bytes", "training_bytes"].map(|field| card[field].as_u64().unwrap());
    assert_eq!(card["total_bytes"].as_u64().unwrap(), sum.iter().sum::<u64>());

    // Activations are as wide again on a processor, and kernels have scratch memory on each thread.
    let cpu = |threads| {
        planned(
            "Qwen2.5-0.5B",
            &["--device", "cpu", "--memory", "6GiB", "--set", "r=16", "--threads", threads],
        )
    };
    assert_eq!(cpu("2")["plan"]["tokens_per_pass"], 256);
    let job = |report: &Value| report["training_bytes"].as_u64().unwrap();
    assert!(job(&cpu("64")) >= job(&cpu("2")));
    let smaller = planned("Qwen2.5-0.5B", &["--device", "cuda", "--memory", "6GiB", "--set", "r=4"]);
    assert!(job(&smaller) < job(&card));
}

#[test]
fn what_does_not_fit_says_what_would() {
    let refused = |arguments: &[&str], code: i32, parts: &[&str]| {
        let output = plan("Qwen2.5-3B", arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        for part in parts {
            assert!(said.contains(part), "{part:?} is missing in: {said}");
        }
    };
    refused(&["--device", "cuda", "--memory", "4GiB"], 1, &["--quantize q8_0"]);
    let long = ["--device", "cuda", "--memory", "8GiB", "--set", "max_seq_length=16384"];
    refused(&long, 1, &["it would fit with", "max_seq_length"]);
    refused(&["--memory", "lots"], 2, &["lots"]);
    refused(&["--memory", "8GiB", "--set", "r=0"], 2, &["r", "1 to 1024"]);
    refused(&["--memory", "8GiB", "--set", "target_modules=[c_attn]"], 2, &["target_modules", "c_attn"]);
    let output = plan("no-such-model", &["--memory", "8GiB"]);
    assert_eq!(output.status.code(), Some(2));
}

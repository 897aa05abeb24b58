//! Which files are a split, by names and by READMEs; the expected answers are those of the Python package `datasets`.

use super::super::card::{SplitFiles, of_readme, of_yaml};
use super::super::patterns::{Module, by_names, is_of, join, module, resolve};
use super::super::plan::{Plan, Wanted, plan};
use super::assert_names;

fn split(name: &str, patterns: &[&str]) -> SplitFiles {
    SplitFiles { split: name.into(), patterns: patterns.iter().map(|p| (*p).to_owned()).collect() }
}

/// Splits with their files, by names alone.
fn splits(files: &[&str]) -> Vec<(String, Vec<String>)> {
    let found = by_names("", files).unwrap();
    let of = |split: &SplitFiles| {
        let mut chosen: Vec<String> = Vec::new();
        for pattern in &split.patterns {
            chosen.extend(resolve(pattern, files).unwrap().iter().map(|file| (*file).to_owned()));
        }
        chosen.sort();
        chosen.dedup();
        (split.split.clone(), chosen)
    };
    found.iter().map(of).collect()
}

fn expect(files: &[&str], wanted: &[(&str, &[&str])]) {
    let wanted: Vec<(String, Vec<String>)> = wanted
        .iter()
        .map(|(split, files)| ((*split).to_owned(), files.iter().map(|f| (*f).to_owned()).collect()))
        .collect();
    assert_eq!(splits(files), wanted, "{files:?}");
}

#[test]
fn names_tell_the_splits() {
    expect(&["README.md", "dataset.csv"], &[("train", &["dataset.csv"])]);
    expect(&["test.csv", "train.csv"], &[("train", &["train.csv"]), ("test", &["test.csv"])]);
    expect(
        &["data/test.csv", "data/train.csv"],
        &[("train", &["data/train.csv"]), ("test", &["data/test.csv"])],
    );
    expect(
        &["my-train-1.csv", "my_dev_file.csv", "train_0.csv", "train_1.csv", "train2.csv"],
        &[
            ("train", &["my-train-1.csv", "train2.csv", "train_0.csv", "train_1.csv"]),
            ("validation", &["my_dev_file.csv"]),
        ],
    );
    expect(
        &["a/training/x.csv", "a/eval/y.csv"],
        &[("train", &["a/training/x.csv"]), ("test", &["a/eval/y.csv"])],
    );
    expect(
        &["data/train/shard_0.csv", "data/val-1/shard_0.csv", "other.csv"],
        &[("train", &["data/train/shard_0.csv"]), ("validation", &["data/val-1/shard_0.csv"])],
    );
    // A word within another word is none.
    expect(
        &["contest.csv", "devices.csv", "trained.csv"],
        &[("train", &["contest.csv", "devices.csv", "trained.csv"])],
    );
    let shards = [
        "data/random-00000-of-00002.parquet",
        "data/random-00001-of-00002.parquet",
        "data/test-00000-of-00001-abc123.parquet",
        "data/train-00000-of-00001.parquet",
        "train/more.csv",
    ];
    expect(&shards, &[("train", &[shards[3]]), ("test", &[shards[2]]), ("random", &[shards[0], shards[1]])]);
    assert_names(&by_names("", &["data/a-b-00000-of-00001.csv"]).unwrap_err(), &["'a-b'", "data_files"]);
    expect(&["README.md", ".gitattributes"], &[]);
    assert_eq!(by_names("hi", &["ta/train.csv", "hi/x.csv"]).unwrap(), [split("train", &["hi/**"])]);
}

#[test]
fn hidden_and_other_files_are_passed_over() {
    let files = [
        ".git/a.csv",
        "__pycache__/a.csv",
        "a.csv",
        "dataset_infos.json",
        "x/.b.csv",
        "x/README.md",
        "x/config.json",
    ];
    assert_eq!(resolve("**", &files).unwrap(), ["a.csv"]);
    assert_eq!(resolve("**/*", &files).unwrap(), ["a.csv"]);
    assert_eq!(resolve(".git/*", &files).unwrap(), [".git/a.csv"]);
    assert_eq!(resolve("__*/*", &files).unwrap(), ["__pycache__/a.csv"]);
    assert_eq!(resolve("x/.*", &files).unwrap(), ["x/.b.csv"]);
    assert_eq!(resolve("dataset_infos.json", &files).unwrap(), ["dataset_infos.json"]);
    let files = ["a/b/c.csv", "a/c.csv", "c.csv", "d[1].csv"];
    assert_eq!(resolve("*.csv", &files).unwrap(), ["c.csv", "d[1].csv"]);
    assert_eq!(resolve("**/*.csv", &files).unwrap(), files);
    assert_eq!(resolve("a/*.csv", &files).unwrap(), ["a/c.csv"]);
    assert_eq!(resolve("a/**", &files).unwrap(), ["a/b/c.csv", "a/c.csv"]);
    assert_eq!(resolve("?.csv", &files).unwrap(), ["c.csv"]);
    assert_names(&resolve("[a.csv", &files).unwrap_err(), &["[a.csv", "no pattern"]);
    assert_eq!(join("/a/", "./b"), "a/b");
}

#[test]
fn most_files_say_what_reads_them() {
    assert_eq!(module(&["a.csv", "b.csv", "c.json"]), Some(Module::Csv));
    assert_eq!(module(&["a.csv", "b.parquet"]), Some(Module::Parquet));
    assert_eq!(module(&["a.json", "b.jsonl.gz"]), Some(Module::Json));
    assert_eq!(module(&["a.tar", "b.tar", "c.txt"]), Some(Module::Other));
    assert_eq!(module(&["a", "b.xyz"]), None);
    assert_eq!(module(&["a.xyz", "b.xyz", "c.txt"]), Some(Module::Text));
    assert!(
        is_of("x/a.JSONL.zst", Module::Json) && is_of("a.tsv", Module::Csv) && !is_of("a.txt", Module::Json)
    );
}

fn wanted<'a>(config: Option<&'a str>, split: &'a str) -> Wanted<'a> {
    Wanted { config, split, data_files: &[], data_dir: None, by_extension: true }
}

#[test]
fn readmes_name_files_in_each_way() {
    let configs =
        |yaml: &str| of_readme(format!("---\r\n{yaml}\n---\n# Title\n---\n").as_bytes()).unwrap().unwrap();
    let one = configs("license: mit\nconfigs:\n- config_name: 2023\n  data_files: data/*.csv\n");
    assert_eq!(
        (one[0].name.as_str(), one[0].data_files.as_deref()),
        ("2023", Some(&[split("train", &["data/*.csv"])][..]))
    );
    let list = configs(
        "configs:\n- config_name: a\n  data_files: [x.csv, y.csv]\n  default: true\n- config_name: b\n",
    );
    assert_eq!(list[0].data_files.as_deref(), Some(&[split("train", &["x.csv", "y.csv"])][..]));
    assert!(list[0].default && list[1].data_files.is_none());
    assert_eq!(plan(&list, &wanted(None, "train")), Ok(Plan::Patterns(vec!["x.csv".into(), "y.csv".into()])));
    assert_eq!(plan(&list, &wanted(Some("b"), "train")), Ok(Plan::Names(String::new())));
    let by_split = configs(
        "configs:\n- config_name: default\n  data_dir: d\n  data_files:\n  - split: train\n    path: [a, b]\n  - split: t.x\n    path: c\n- config_name: other",
    );
    assert_eq!(plan(&by_split, &wanted(None, "t.x")), Ok(Plan::Patterns(vec!["d/c".into()])));
    let two = configs("configs:\n- config_name: a\n  default: true\n- config_name: default\n");
    assert_names(&plan(&two, &wanted(None, "train")).unwrap_err(), &["config is missing", "a, default"]);
    assert_names(&plan(&[], &wanted(Some("hi"), "train")).unwrap_err(), &["no 'hi'", "default"]);
    for none in ["# no head", "---\nconfigs: []\n---\n", "---\nlicense: mit\n---", "---\nnever closed", ""] {
        assert_eq!(of_readme(none.as_bytes()), Ok(None), "{none}");
    }
}

#[test]
fn readmes_that_cannot_be_are_refused() {
    for (yaml, part) in [
        ("configs: x", "list"),
        ("configs:\n- data_files: x", "config_name"),
        ("configs:\n- config_name: [a]", "config_name"),
        ("configs:\n- config_name: a\n  data_files: 3", "data_files"),
        ("configs:\n- config_name: a\n  data_files: {train: x}", "data_files"),
        ("configs:\n- config_name: a\n  data_files:\n  - split: train", "split and path"),
        ("configs:\n- config_name: a\n  data_files:\n  - {split: a-b, path: x}", "split and path"),
        ("configs:\n- config_name: a\n  data_files:\n  - {split: a, path: x, more: y}", "nothing else"),
        (
            "configs:\n- config_name: a\n  data_files:\n  - {split: a, path: x}\n  - {split: a, path: y}",
            "twice",
        ),
        ("configs: [", ""),
        ("a: !tag b", ""),
    ] {
        let message = of_yaml(yaml.as_bytes()).expect_err(yaml);
        assert!(message.contains(part), "{yaml}: {message}");
    }
}

#[test]
fn readmes_that_grow_when_read_are_refused() {
    let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
    for level in 1..12 {
        let inner = vec![format!("*a{}", level - 1); 10].join(",");
        bomb += &format!("a{level}: &a{level} [{inner}]\n");
    }
    assert!(of_yaml(bomb.as_bytes()).is_err());
    let wide = format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 20), vec!["*a"; 10_000].join(","));
    assert_names(&of_yaml(wide.as_bytes()).unwrap_err(), &["too much"]);
    let deep = "[".repeat(200_000);
    assert!(of_yaml(deep.as_bytes()).is_err());
    let long = format!("a: {}", "x".repeat(5 << 20));
    assert_names(&of_yaml(long.as_bytes()).unwrap_err(), &["bytes"]);
    let many: String = (0..2_000).map(|i| format!("- config_name: c{i}\n  data_files: d{i}/*\n")).collect();
    assert_eq!(of_yaml(format!("configs:\n{many}").as_bytes()).unwrap().unwrap().len(), 2_000);
}

#[test]
fn only_the_folders_that_matter_are_listed() {
    let folders = |patterns: &[&str]| {
        let plan = Plan::Patterns(patterns.iter().map(|p| (*p).to_owned()).collect());
        plan.folders().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(folders(&["20231101.hi/train-*"]), ["20231101.hi"]);
    assert_eq!(folders(&["a/b/*.csv", "a/*.csv", "ab/x.csv"]), ["a", "ab"]);
    assert_eq!(folders(&["a/b/*.csv", "*.csv"]), [""]);
    assert_eq!(folders(&["data/**/x-[0-9].csv"]), ["data"]);
}

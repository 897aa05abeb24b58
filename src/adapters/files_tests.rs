//! Tests of [`super`]: links, broken folders, deletions.

use super::super::place::recover;
use super::*;

const CONFIG_TEXT: &str = r#"{"peft_type":"LORA","r":1,"lora_alpha":2,"target_modules":["q_proj"],
    "base_model_name_or_path":"some/base"}"#;

fn sites() -> Vec<Site> {
    vec![Site { name: "model.layers.0.q_proj".into(), in_features: 2, out_features: 2 }]
}

fn tensors(value: f32) -> Vec<u8> {
    let header = r#"{"base_model.model.model.layers.0.q_proj.lora_A.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"base_model.model.model.layers.0.q_proj.lora_B.weight":{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend([value; 4].iter().flat_map(|v| v.to_le_bytes()));
    bytes
}

fn write(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join(CONFIG), CONFIG_TEXT).unwrap();
    fs::write(folder.join(TENSORS), tensors(1.0)).unwrap();
}

fn reason(result: Result<impl Sized, AdapterError>) -> String {
    match result {
        Err(AdapterError::Invalid { reason, .. }) => reason,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("must be refused"),
    }
}

#[test]
fn a_whole_adapter_is_read_with_its_stamp() {
    let root = tempfile::tempdir().unwrap();
    write(&root.path().join("a"));
    let located = locate(root.path(), "a").unwrap();
    let (stamp, loaded) = located.load("a", &sites()).unwrap();
    assert_eq!(loaded.weights.sites.len(), 1);
    assert_eq!(loaded.weights.sites[0].scale, 2.0);
    assert_eq!(located.stamp("a").unwrap(), stamp);

    fs::write(root.path().join("a").join(TENSORS), tensors(2.0)).unwrap();
    let later = SystemTime::now() + std::time::Duration::from_secs(5);
    File::options()
        .append(true)
        .open(root.path().join("a").join(TENSORS))
        .unwrap()
        .set_modified(later)
        .unwrap();
    assert_ne!(located.stamp("a").unwrap(), stamp, "written again");

    let other = root.path().join("other");
    fs::write(&other, CONFIG_TEXT).unwrap();
    let stamp = located.stamp("a").unwrap();
    let modified = fs::metadata(root.path().join("a").join(CONFIG)).unwrap().modified().unwrap();
    File::options().append(true).open(&other).unwrap().set_modified(modified).unwrap();
    fs::rename(&other, root.path().join("a").join(CONFIG)).unwrap();
    assert_ne!(located.stamp("a").unwrap(), stamp, "another file of the same size and time");
}

#[test]
fn what_is_missing_or_broken_is_told() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    assert!(matches!(locate(root.path(), "none"), Err(AdapterError::NotFound { .. })));
    assert!(matches!(locate(&at("no-root"), "none"), Err(AdapterError::NotFound { .. })));

    fs::write(at("file"), "").unwrap();
    assert_eq!(reason(locate(root.path(), "file")), "it is not a folder");
    fs::create_dir(at("empty")).unwrap();
    assert!(reason(locate(root.path(), "empty")).contains("no adapter_config.json"));
    write(&at("half"));
    fs::remove_file(at("half").join(TENSORS)).unwrap();
    assert_eq!(reason(locate(root.path(), "half")), "it has no adapter_model.safetensors");
    fs::write(at("half").join("adapter_model.bin"), "").unwrap();
    assert!(reason(locate(root.path(), "half")).contains("safe_serialization=True"));
    fs::create_dir(at("half").join(TENSORS)).unwrap();
    assert!(reason(locate(root.path(), "half")).contains("not a regular file"));

    write(&at("cut"));
    fs::write(at("cut").join(TENSORS), &tensors(1.0)[..40]).unwrap();
    assert!(
        reason(locate(root.path(), "cut").unwrap().load("cut", &sites())).contains("truncated or corrupt")
    );
    write(&at("nan"));
    fs::write(at("nan").join(TENSORS), tensors(f32::NAN)).unwrap();
    assert!(reason(locate(root.path(), "nan").unwrap().load("nan", &sites())).contains("NaN at element 0"));
    write(&at("long"));
    fs::write(at("long").join(CONFIG), " ".repeat(2 << 20)).unwrap();
    let long = locate(root.path(), "long").unwrap().load("long", &sites());
    assert!(matches!(long, Err(AdapterError::Io { kind: io::ErrorKind::FileTooLarge, .. })));
}

#[cfg(unix)]
#[test]
fn links_are_followed_only_inside() {
    use std::os::unix::fs::symlink;
    let outside = tempfile::tempdir().unwrap();
    write(&outside.path().join("stolen"));
    let base = tempfile::tempdir().unwrap();
    let root = base.path().join("adapters");
    write(&root.join("real"));

    symlink(root.join("real"), root.join("alias")).unwrap();
    assert!(locate(&root, "alias").is_ok());
    symlink("real", root.join("relative")).unwrap();
    assert!(locate(&root, "relative").is_ok());

    symlink(outside.path().join("stolen"), root.join("away")).unwrap();
    assert!(reason(locate(&root, "away")).contains("it is a link that leaves the adapters folder"));
    symlink("../..", root.join("up")).unwrap();
    assert!(reason(locate(&root, "up")).contains("leaves the adapters folder"));
    symlink("nowhere", root.join("dangling")).unwrap();
    assert_eq!(reason(locate(&root, "dangling")), "it is a link to nothing");
    symlink("loop", root.join("loop")).unwrap();
    assert!(locate(&root, "loop").is_err());

    fs::create_dir(root.join("mixed")).unwrap();
    fs::copy(root.join("real").join(CONFIG), root.join("mixed").join(CONFIG)).unwrap();
    symlink(outside.path().join("stolen").join(TENSORS), root.join("mixed").join(TENSORS)).unwrap();
    assert!(reason(locate(&root, "mixed")).contains("adapter_model.safetensors is a link that leaves"));

    // The folder of adapters may itself be reached by a link.
    symlink(&root, base.path().join("link")).unwrap();
    assert!(locate(&base.path().join("link"), "real").is_ok());

    // Deleting a link leaves what it points to.
    remove(&root, "away").unwrap();
    assert!(!exists(&root, "away").unwrap() && outside.path().join("stolen").join(CONFIG).exists());
    remove(&root, "alias").unwrap();
    assert!(locate(&root, "real").is_ok());
}

#[test]
fn the_list_shows_the_broken_beside_the_good() {
    let root = tempfile::tempdir().unwrap();
    assert!(describe_all(&root.path().join("none"), &sites()).unwrap().is_empty());
    write(&root.path().join("good"));
    fs::write(root.path().join("good").join(MANIFEST), r#"{"training_job":"job-7","metrics":{"loss":0.5}}"#)
        .unwrap();
    write(&root.path().join("bad"));
    fs::write(root.path().join("bad").join(CONFIG), "{").unwrap();
    write(&root.path().join("other"));
    fs::write(root.path().join("other").join(CONFIG), CONFIG_TEXT.replace("q_proj", "w1")).unwrap();
    write(&root.path().join("Upper Case"));
    write(&root.path().join(".hidden"));
    fs::write(root.path().join("readme.txt"), "").unwrap();
    write(&root.path().join("notes"));
    fs::write(root.path().join("notes").join(MANIFEST), "{").unwrap();

    let all: Vec<AdapterInfo> =
        describe_all(root.path(), &sites()).unwrap().into_iter().map(|(i, _)| i).collect();
    let names: Vec<&str> = all.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["Upper Case", "bad", "good", "notes", "other"]);
    assert!(all[0].error.as_ref().unwrap().contains("no adapter name"));
    assert!(all[1].error.as_ref().unwrap().contains("not a JSON object"));
    let good = &all[2];
    assert_eq!((good.error.as_deref(), good.rank, good.alpha), (None, Some(1), Some(2.0)));
    assert_eq!(good.target_modules, ["q_proj"]);
    assert_eq!(good.base_model.as_deref(), Some("some/base"));
    assert_eq!(good.bytes, tensors(1.0).len() as u64);
    assert_eq!(good.training_job.as_deref(), Some("job-7"));
    assert_eq!(good.metrics, Some(serde_json::json!({"loss": 0.5})));
    let created = good.created_at.as_deref().unwrap();
    assert!(humantime::parse_rfc3339(created).is_ok() && created.ends_with('Z'), "{created}");
    assert_eq!(all[3].error, None);
    assert!(all[4].error.as_ref().unwrap().contains("`target_modules`"));
    assert_eq!(all[4].rank, Some(1), "what can be read is shown");
}

#[test]
fn deletion_is_whole_and_its_remains_are_cleared() {
    let root = tempfile::tempdir().unwrap();
    write(&root.path().join("a"));
    remove(root.path(), "a").unwrap();
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    assert!(matches!(remove(root.path(), "a"), Err(AdapterError::NotFound { .. })));

    write(&root.path().join(".removed-a-0"));
    write(&root.path().join("b"));
    recover(root.path());
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    recover(&root.path().join("none"));
}

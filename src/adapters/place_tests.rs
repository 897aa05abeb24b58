//! Tests of [`super`]: every state of the folder that a crash can leave, and disks that refuse.

use std::path::PathBuf;

use super::*;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A folder that holds one word.
    fn make(&self, name: &str, word: &str) {
        fs::create_dir_all(self.path(name)).unwrap();
        fs::write(self.path(name).join("word"), word).unwrap();
    }

    fn put(&self, name: &str, word: &str) -> io::Result<()> {
        put(self.0.path(), name, |folder| fs::write(folder.join("word"), word), |rename| rename())
    }

    /// Names and words of all that is there, hidden or not.
    fn all(&self) -> Vec<(String, String)> {
        let mut all: Vec<_> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let word = fs::read_to_string(entry.path().join("word")).unwrap_or_default();
                (entry.file_name().to_string_lossy().into_owned(), word)
            })
            .collect();
        all.sort();
        all
    }

    fn assert_only(&self, expected: &[(&str, &str)]) {
        let all = self.all();
        let found: Vec<(&str, &str)> = all.iter().map(|(n, w)| (n.as_str(), w.as_str())).collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn a_new_one_takes_a_free_name_and_a_taken_one() {
    let f = Folder::new();
    f.put("a", "one").unwrap();
    f.assert_only(&[("a", "one")]);
    f.put("a", "two").unwrap();
    f.put("b", "three").unwrap();
    f.assert_only(&[("a", "two"), ("b", "three")]);
    // A folder of adapters that nobody made yet.
    let inner = f.path("deep/adapters");
    put(&inner, "c", |folder| fs::write(folder.join("word"), ""), |rename| rename()).unwrap();
    assert!(inner.join("c/word").exists());
}

/// The folder as it is after each single operation of `put`, and what the next start makes of it.
#[test]
fn a_crash_leaves_the_old_or_the_new() {
    type Words<'a> = &'a [(&'a str, &'a str)];
    let states: &[(Words<'_>, Words<'_>)] = &[
        // Replacing: writing, written, staged, the old moved away, the new there, the old half removed.
        (&[("a", "old"), (".writing-a-1", "n")], &[("a", "old")]),
        (&[("a", "old"), (".writing-a-1", "new")], &[("a", "old")]),
        (&[("a", "old"), (".staged-a", "new")], &[("a", "old")]),
        (&[(".removed-a-1", "old"), (".staged-a", "new")], &[("a", "new")]),
        (&[(".removed-a-1", "old"), ("a", "new")], &[("a", "new")]),
        (&[(".removed-a-1", ""), ("a", "new")], &[("a", "new")]),
        // A new name: writing, staged, there.
        (&[(".writing-a-1", "n")], &[]),
        (&[(".staged-a", "new")], &[("a", "new")]),
        (&[("a", "new")], &[("a", "new")]),
        // An interrupted one of an earlier crash beside it, and another name's.
        (&[("a", "old"), (".staged-a", "new"), (".staged-b", "b")], &[("a", "old"), ("b", "b")]),
        // No adapter can have this name.
        (&[(".staged-..", "x"), (".staged-A", "x")], &[]),
    ];
    for (before, after) in states {
        let f = Folder::new();
        before.iter().for_each(|(name, word)| f.make(name, word));
        recover(f.0.path());
        f.assert_only(after);
        recover(f.0.path());
        f.assert_only(after);
        // The job that was killed goes on and puts its adapter there again.
        f.put("a", "again").unwrap();
        assert_eq!(f.all()[0], ("a".into(), "again".into()));
    }
}

#[test]
fn a_failure_leaves_what_was_there() {
    let f = Folder::new();
    f.put("a", "old").unwrap();
    let full = || io::Error::from(io::ErrorKind::StorageFull);
    let write = |folder: &Path| {
        fs::write(folder.join("word"), "ne")?;
        Err(full())
    };
    let error = put(f.0.path(), "a", write, |rename| rename()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    f.assert_only(&[("a", "old")]);

    // A file where the folder of adapters should be.
    let other = Folder::new();
    fs::write(other.path("file"), "").unwrap();
    assert!(put(&other.path("file"), "a", |_| Ok(()), |rename| rename()).is_err());

    // Nobody may rename: the new one waits, the old one is there, and the next start clears up.
    let error = put(f.0.path(), "a", |_| Ok(()), |_| Err(full())).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    recover(f.0.path());
    f.assert_only(&[("a", "old")]);
}

#[cfg(unix)]
#[test]
fn what_another_process_is_writing_is_left_alone() {
    let f = Folder::new();
    f.make(".writing-a-1", "n");
    let held = lock(f.0.path()).unwrap();
    recover(f.0.path());
    f.assert_only(&[(".writing-a-1", "n")]);
    drop(held);
    recover(f.0.path());
    f.assert_only(&[]);
}

#[cfg(unix)]
#[test]
fn a_link_is_replaced_and_its_target_stays() {
    let f = Folder::new();
    let outside = Folder::new();
    outside.make("theirs", "kept");
    std::os::unix::fs::symlink(outside.path("theirs"), f.path("a")).unwrap();
    f.put("a", "new").unwrap();
    f.assert_only(&[("a", "new")]);
    outside.assert_only(&[("theirs", "kept")]);
}

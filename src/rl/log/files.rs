//! The files of the log: their names, and the repair of a file whose writer was killed. Knows lines and no episodes.
//!
//! ```text
//! rl_runs/
//!   RUN.jsonl       written to; its lines come after those of
//!   RUN~1.jsonl     put aside, never changed again; 1 is the oldest, RUN~2.jsonl came next
//!   RUN.torn        pieces of lines that a killed process left, cut off by the repair
//! ```
//!
//! No run's id has a `~`, so no run's file is another run's part.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use crate::adapters::sync_folder;
use crate::rl::episode::check_run_id;

/// Bytes that are looked through at a time.
const BLOCK: usize = 64 << 10;

/// Which file of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// Put aside as the n-th.
    Aside(u64),
    /// Written to.
    Current,
}

/// Where a part is. `run` must have passed [`check_run_id`].
pub(super) fn path(dir: &Path, run: &str, part: Part) -> PathBuf {
    dir.join(match part {
        Part::Current => format!("{run}.jsonl"),
        Part::Aside(n) => format!("{run}~{n}.jsonl"),
    })
}

/// Run and part of a file's name; `None` of a name that is none of ours.
fn parse(name: &str) -> Option<(&str, Part)> {
    let stem = name.strip_suffix(".jsonl")?;
    let (run, part) = match stem.split_once('~') {
        None => (stem, Part::Current),
        Some((run, n)) => (run, Part::Aside(n.parse().ok().filter(|number: &u64| number.to_string() == n)?)),
    };
    check_run_id(run).is_ok().then_some((run, part))
}

/// Every run with its parts, those of a run in the order of their lines; the runs by name.
pub(super) fn list(dir: &Path) -> io::Result<Vec<(String, Part)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let name = entry?.file_name();
        if let Some((run, part)) = name.to_str().and_then(parse) {
            found.push((run.to_owned(), part));
        }
    }
    found.sort();
    Ok(found)
}

/// Makes a file end with a whole line. A piece of a line goes to `RUN.torn`; a whole line that lacks its end gets it.
/// Returns the bytes that were cut off.
pub(super) fn repair(dir: &Path, run: &str, part: Part) -> io::Result<u64> {
    let path = path(dir, run, part);
    let mut file = match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    let whole = end_of_last_line(&mut file, length)?;
    if whole == length {
        return Ok(0);
    }
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(whole))?;
    file.read_to_end(&mut tail)?;
    if serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&tail).is_ok() {
        file.write_all(b"\n")?;
        file.sync_all()?;
        return Ok(0);
    }
    let torn = dir.join(format!("{run}.torn"));
    let mut kept = OpenOptions::new().create(true).append(true).open(&torn)?;
    tail.push(b'\n');
    kept.write_all(&tail)?;
    kept.sync_all()?;
    sync_folder(dir)?;
    file.set_len(whole)?;
    file.sync_all()?;
    tracing::warn!(
        file = %path.display(), bytes = length - whole, kept = %torn.display(),
        "the log ended in the middle of a line, as a killed process leaves it; the piece was put aside"
    );
    Ok(length - whole)
}

/// Where the last line break ends; 0 without one.
fn end_of_last_line(file: &mut File, length: u64) -> io::Result<u64> {
    let mut end = length;
    let mut block = vec![0; BLOCK];
    while end > 0 {
        let size = usize::try_from(end).map_or(BLOCK, |end| end.min(BLOCK));
        let start = end - size as u64;
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut block[..size])?;
        if let Some(at) = block[..size].iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// The last line of a file that ends with a whole one; `None` of an empty file.
pub(super) fn last_line(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let Some(before_break) = length.checked_sub(1) else { return Ok(None) };
    let start = end_of_last_line(&mut file, before_break)?;
    let mut line = Vec::new();
    file.seek(SeekFrom::Start(start))?;
    file.take(before_break - start).read_to_end(&mut line)?;
    Ok(Some(line))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (run, part) in [
            ("a", Part::Current),
            ("a", Part::Aside(12)),
            ("a.1", Part::Current),
            ("a.jsonl", Part::Aside(1)),
        ] {
            let path = path(Path::new("d"), run, part);
            assert_eq!(parse(path.file_name().unwrap().to_str().unwrap()), Some((run, part)));
        }
        for other in
            ["a.json", "~1.jsonl", "a~x.jsonl", "a~01.jsonl", "a~1~2.jsonl", ".a.jsonl", "A.jsonl", "a.torn"]
        {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn parts_come_in_the_order_of_their_lines() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(list(&dir.path().join("nowhere")).unwrap(), []);
        for name in ["a~10.jsonl", "a.jsonl", "b.jsonl", "a~9.jsonl", "a.torn", "x.txt"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let of = |run: &str, part| (run.to_owned(), part);
        let expected = [
            of("a", Part::Aside(9)),
            of("a", Part::Aside(10)),
            of("a", Part::Current),
            of("b", Part::Current),
        ];
        assert_eq!(list(dir.path()).unwrap(), expected);
    }

    fn repaired(content: &[u8]) -> (u64, Vec<u8>, Option<Vec<u8>>) {
        let dir = tempfile::tempdir().unwrap();
        let file = path(dir.path(), "r", Part::Current);
        fs::write(&file, content).unwrap();
        let cut = repair(dir.path(), "r", Part::Current).unwrap();
        assert_eq!(repair(dir.path(), "r", Part::Current).unwrap(), 0, "once is enough");
        (cut, fs::read(file).unwrap(), fs::read(dir.path().join("r.torn")).ok())
    }

    #[test]
    fn a_torn_line_is_put_aside_and_a_whole_one_stays() {
        assert_eq!(repaired(b""), (0, vec![], None));
        assert_eq!(repaired(b"{}\n{\"a\":1}\n"), (0, b"{}\n{\"a\":1}\n".to_vec(), None));
        assert_eq!(repaired(b"{}\n{\"a\":"), (5, b"{}\n".to_vec(), Some(b"{\"a\":\n".to_vec())));
        assert_eq!(repaired(b"{\"a\":"), (5, vec![], Some(b"{\"a\":\n".to_vec())));
        assert_eq!(repaired(b"{}\n{\"a\":1}"), (0, b"{}\n{\"a\":1}\n".to_vec(), None));
        // What a file system may leave after a power cut.
        assert_eq!(repaired(b"{}\n\0\0\0").1, b"{}\n");
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(repair(dir.path(), "none", Part::Current).unwrap(), 0);
    }

    #[test]
    fn the_last_line_is_found_however_long() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        for (content, last) in [
            (String::new(), None),
            ("a\n".into(), Some("a".to_owned())),
            ("a\nbc\n".into(), Some("bc".into())),
            (format!("a\n{}\n", "x".repeat(3 * BLOCK)), Some("x".repeat(3 * BLOCK))),
        ] {
            fs::write(&file, content).unwrap();
            assert_eq!(last_line(&file).unwrap(), last.map(String::into_bytes));
        }
    }

    proptest! {
        #[test]
        fn whole_lines_are_never_lost(lines in prop::collection::vec("[a-zक-ह]{0,12}", 0..6), cut in 0usize..400) {
            let line = |text: &String| serde_json::json!({ "text": text }).to_string() + "\n";
            let whole: Vec<String> = lines.iter().map(line).collect();
            let all = whole.concat().into_bytes();
            let cut = cut.min(all.len());
            let (_, kept, torn) = repaired(&all[..cut]);
            // A line counts as whole as soon as its JSON is.
            let mut expected = Vec::new();
            for line in &whole {
                if expected.len() + line.len() - 1 > cut {
                    break;
                }
                expected.extend_from_slice(line.as_bytes());
            }
            prop_assert_eq!(&kept, &expected);
            prop_assert_eq!(torn.is_some(), cut > expected.len());
        }
    }
}

//! What may stand in a file that is uploaded for fine-tuning: a JSON object a line, with `messages` or with `prompt`
//! and `completion`. Takes the file in whatever pieces it comes and keeps at most one line.

use serde_json::{Map, Value};

/// Longest line.
const MAX_LINE_BYTES: usize = 8 << 20;
/// Who speaks in a conversation.
const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

/// Reads a file while it comes.
#[derive(Debug, Default)]
pub(super) struct TrainingFile {
    /// The line that is not complete.
    rest: Vec<u8>,
    /// Complete lines so far.
    lines: u64,
    /// Examples so far; empty lines are none.
    examples: u64,
    /// What all examples have, by the first.
    kind: Option<Kind>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Messages,
    Prompt,
}

impl TrainingFile {
    /// Takes the next piece.
    ///
    /// # Errors
    /// The line's number and what is wrong with it.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while let Some(end) = bytes.iter().position(|b| *b == b'\n') {
            let (line, rest) = bytes.split_at(end);
            bytes = &rest[1..];
            if self.rest.is_empty() {
                self.line(line)?;
            } else {
                let mut whole = std::mem::take(&mut self.rest);
                whole.extend_from_slice(line);
                self.line(&whole)?;
            }
        }
        self.rest.extend_from_slice(bytes);
        if self.rest.len() > MAX_LINE_BYTES {
            return Err(format!("line {} is longer than {MAX_LINE_BYTES} bytes", self.lines + 1));
        }
        Ok(())
    }

    /// The number of examples.
    ///
    /// # Errors
    /// As [`TrainingFile::feed`]; a file without an example.
    pub(super) fn end(mut self) -> Result<u64, String> {
        let rest = std::mem::take(&mut self.rest);
        if !rest.is_empty() {
            self.line(&rest)?;
        }
        if self.examples == 0 {
            return Err("there is no example in it; put one JSON object on each line".into());
        }
        Ok(self.examples)
    }

    fn line(&mut self, line: &[u8]) -> Result<(), String> {
        self.lines += 1;
        let number = self.lines;
        let line = if number == 1 { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line) } else { line };
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        let kind = example(line).map_err(|message| format!("line {number}: {message}"))?;
        if *self.kind.get_or_insert(kind) != kind {
            return Err(format!(
                "line {number}: all lines must be of one kind, either with messages or with prompt and completion"
            ));
        }
        self.examples += 1;
        Ok(())
    }
}

fn example(line: &[u8]) -> Result<Kind, String> {
    let text = std::str::from_utf8(line).map_err(|_| "is not UTF-8")?;
    let value: Value = serde_json::from_str(text).map_err(|error| format!("is not valid JSON: {error}"))?;
    let Value::Object(fields) = value else { return Err("must be a JSON object".into()) };
    if let Some(messages) = fields.get("messages") {
        only(&fields, &["messages"])?;
        self::messages(messages)?;
        return Ok(Kind::Messages);
    }
    only(&fields, &["prompt", "completion"])?;
    for name in ["prompt", "completion"] {
        match fields.get(name) {
            Some(Value::String(_)) => {}
            Some(_) => return Err(format!("{name} must be a text")),
            None => return Err(format!("{name} is missing; give messages, or prompt and completion")),
        }
    }
    if fields["completion"].as_str().is_some_and(str::is_empty) {
        return Err("completion is empty, so there is nothing to learn".into());
    }
    Ok(Kind::Prompt)
}

fn messages(messages: &Value) -> Result<(), String> {
    let list = messages.as_array().filter(|list| !list.is_empty());
    let list = list.ok_or("messages must be a list with at least one message")?;
    let mut teaches = false;
    for (i, message) in list.iter().enumerate() {
        let at = |what: &str| format!("messages[{i}] {what}");
        let fields = message.as_object().ok_or_else(|| at("must be an object"))?;
        only(fields, &["role", "content", "name"]).map_err(|message| format!("messages[{i}]: {message}"))?;
        let role = fields.get("role").and_then(Value::as_str).unwrap_or_default();
        if !ROLES.contains(&role) {
            return Err(at(&format!("needs a role: {}", ROLES.join(", "))));
        }
        let content = fields.get("content").and_then(Value::as_str);
        let content = content.ok_or_else(|| at("needs a content that is a text"))?;
        teaches |= role == "assistant" && !content.is_empty();
    }
    if teaches {
        Ok(())
    } else {
        Err("no message of the assistant has a text, so there is nothing to learn".into())
    }
}

/// What is not known here would be ignored, which nobody wants who wrote it.
fn only(fields: &Map<String, Value>, known: &[&str]) -> Result<(), String> {
    match fields.keys().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let name: String = name.chars().take(80).collect();
            Err(format!("{name:?} is not known here; known: {}", known.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CHAT: &str =
        r#"{"messages":[{"role":"user","content":"नमस्ते"},{"role":"assistant","content":"Hello"}]}"#;
    const PAIR: &str = r#"{"prompt":"a","completion":"b"}"#;

    fn read(text: &[u8], piece: usize) -> Result<u64, String> {
        let mut file = TrainingFile::default();
        for bytes in text.chunks(piece.max(1)) {
            file.feed(bytes)?;
        }
        file.end()
    }

    #[test]
    fn examples_are_counted() {
        assert_eq!(read(format!("{CHAT}\n{CHAT}").as_bytes(), 1000), Ok(2));
        assert_eq!(read(format!("\u{feff}{PAIR}\r\n\n{PAIR}\n\n").as_bytes(), 1000), Ok(2));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (line, part) in [
            ("{", "JSON"),
            ("[]", "object"),
            ("{}", "prompt is missing"),
            (r#"{"prompt":"a"}"#, "completion is missing"),
            (r#"{"prompt":"a","completion":5}"#, "completion must be a text"),
            (r#"{"prompt":"a","completion":""}"#, "nothing to learn"),
            (r#"{"prompt":"a","completion":"b","weight":2}"#, "\"weight\""),
            (r#"{"messages":[]}"#, "at least one"),
            (r#"{"messages":{}}"#, "must be a list"),
            (r#"{"messages":[5]}"#, "messages[0] must be an object"),
            (r#"{"messages":[{"role":"user","content":"a"}]}"#, "nothing to learn"),
            (r#"{"messages":[{"role":"robot","content":"a"}]}"#, "messages[0] needs a role"),
            (r#"{"messages":[{"role":"assistant","content":null}]}"#, "needs a content"),
            (r#"{"messages":[{"role":"assistant","content":"a","weight":0}]}"#, "\"weight\""),
            (r#"{"messages":[{"role":"assistant","content":"a"}],"tools":[]}"#, "\"tools\""),
            (CHAT, "of one kind"),
        ] {
            let error = read(format!("{PAIR}\n\n{line}\n{PAIR}").as_bytes(), 7).expect_err(line);
            assert!(error.starts_with("line 3") && error.contains(part), "{line}: {error}");
        }
        assert!(read(b"", 1).expect_err("has none").contains("no example"));
        assert!(read(b"\n \n", 1).expect_err("has none").contains("no example"));
        let error = read(b"{\"prompt\":\"\xff\",\"completion\":\"b\"}", 5).expect_err("is no text");
        assert!(error.contains("line 1") && error.contains("UTF-8"), "{error}");
    }

    #[test]
    fn a_line_has_an_end() {
        let error = read(&vec![b'x'; MAX_LINE_BYTES + 1], 1 << 16).expect_err("is too long");
        assert!(error.starts_with("line 1 is longer"), "{error}");
    }

    proptest! {
        #[test]
        fn the_pieces_make_no_difference(lines in 0..5_usize, piece in 1..40_usize, bad in any::<bool>()) {
            let text = format!("{CHAT}\n").repeat(lines) + if bad { "{" } else { "" };
            prop_assert_eq!(read(text.as_bytes(), piece), read(text.as_bytes(), usize::MAX));
        }
    }
}

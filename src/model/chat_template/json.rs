//! JSON as Python's `json.dumps` writes it, which is how chat templates expect it: spaces behind separators,
//! characters as they are. Knows nothing of templates but their values.

use std::io;

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)` with the options
/// that are given.
///
/// At most `limit_bytes` are written: a small value may hold the same list so often that its text would fill
/// the memory. For the same reason nothing is nested more than [`MAX_DEPTH`] deep.
pub(super) fn dumps(value: &Value, options: &Kwargs, limit_bytes: usize) -> Result<String, Error> {
    let ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let indent =
        options.get::<Option<Value>>("indent")?.map(|indent| indent_of(&indent)).transpose()?.flatten();
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.clone(), key.clone()],
        Some(_) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators must be a pair of texts",
            ));
        }
        None => [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()],
    };
    let layout = Python { item, key, indent, ensure_ascii, depth: 0, empty: true };
    if sort_keys {
        // The text is bounded, and with it the tree that is made of it.
        let plain = write(value, Python::compact(), limit_bytes)?;
        let mut tree: serde_json::Value = serde_json::from_str(&plain).map_err(failed)?;
        tree.sort_all_objects();
        return write(&tree, layout, limit_bytes);
    }
    write(value, layout, limit_bytes)
}

/// Arrays and objects within one another.
const MAX_DEPTH: usize = 100;

fn failed(error: serde_json::Error) -> Error {
    // The writer and the layout fail for one reason only: the value is too large.
    let kind = if error.is_io() { ErrorKind::OutOfFuel } else { ErrorKind::BadSerialization };
    Error::new(kind, error.to_string())
}

fn write(value: &impl Serialize, layout: Python, limit_bytes: usize) -> Result<String, Error> {
    let mut out = Bounded { text: Vec::new(), limit_bytes };
    value.serialize(&mut Serializer::with_formatter(&mut out, layout)).map_err(failed)?;
    String::from_utf8(out.text).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// A text that grows to its limit and no further.
struct Bounded {
    text: Vec<u8>,
    limit_bytes: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > self.limit_bytes {
            return Err(io::Error::other("tojson: the value is too large"));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Python takes a number of spaces or the text itself; `None` and `False` mean one line.
fn indent_of(indent: &Value) -> Result<Option<String>, Error> {
    if indent.is_none() || indent.is_undefined() {
        return Ok(None);
    }
    if let Some(text) = indent.as_str() {
        return Ok(Some(text.to_owned()));
    }
    let spaces = usize::try_from(indent.clone())?;
    if spaces > 64 {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: indent must be at most 64"));
    }
    Ok(Some(" ".repeat(spaces)))
}

/// Separators and line breaks as Python sets them.
struct Python {
    item: String,
    key: String,
    indent: Option<String>,
    ensure_ascii: bool,
    depth: usize,
    /// Nothing was written yet in the array or object that was opened last.
    empty: bool,
}

impl Python {
    fn compact() -> Self {
        let [item, key] = [",", ":"].map(str::to_owned);
        Self { item, key, indent: None, ensure_ascii: false, depth: 0, empty: true }
    }

    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(io::Error::other("tojson: the value is nested too deeply"));
        }
        self.empty = true;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.break_line(writer)?;
        }
        self.empty = false;
        writer.write_all(bracket)
    }

    fn before_item<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.break_line(writer)
    }

    fn break_line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        writer.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| writer.write_all(indent.as_bytes()))
    }
}

impl Formatter for Python {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.before_item(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.before_item(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, text: &str) -> io::Result<()> {
        if !self.ensure_ascii {
            return writer.write_all(text.as_bytes());
        }
        for c in text.chars() {
            if c.is_ascii() {
                write!(writer, "{c}")?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        match escape {
            CharEscape::Quote => writer.write_all(b"\\\""),
            CharEscape::ReverseSolidus | CharEscape::Solidus => writer.write_all(b"\\\\"),
            CharEscape::Backspace => writer.write_all(b"\\b"),
            CharEscape::FormFeed => writer.write_all(b"\\f"),
            CharEscape::LineFeed => writer.write_all(b"\\n"),
            CharEscape::CarriageReturn => writer.write_all(b"\\r"),
            CharEscape::Tab => writer.write_all(b"\\t"),
            CharEscape::AsciiControl(byte) => write!(writer, "\\u{byte:04x}"),
        }
    }
}

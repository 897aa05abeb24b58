//! The results of a tool of an MCP server as rows: called once, or page by page with the cursor that each result
//! gives for the next. Knows nothing of what the rows are for.

use rmcp::model::{CallToolRequestParams, CallToolResult, PaginatedRequestParams};
use serde_json::{Map, Value};

use super::super::object::{Page, Pages};
use super::super::value_at;
use super::ToolConfig;
use super::server::{Server, plain};

/// Pages of the list of tools; more are a circle.
const MAX_LIST_PAGES: usize = 1000;
/// Tools that a message names.
const MAX_NAMED: usize = 20;

/// A tool, page by page.
pub(super) struct ToolPages {
    tool: ToolConfig,
    server: Server,
    what: String,
    /// Whether the server is known to have it.
    known: bool,
}

impl ToolPages {
    pub(super) fn new(tool: ToolConfig, server: Server) -> Self {
        let what = format!("tool {}", tool.name);
        Self { tool, server, what, known: false }
    }

    /// That the server has the tool, which not every server says in words when it is called.
    fn look(&mut self) -> Result<(), String> {
        let mut names = Vec::new();
        let mut cursor: Option<String> = None;
        for _ in 0..MAX_LIST_PAGES {
            let asked = PaginatedRequestParams::default().with_cursor(cursor.clone());
            let page = self
                .server
                .ask(&self.what, "tools/list", async |peer| peer.list_tools(Some(asked.clone())).await)?;
            names.extend(page.tools.into_iter().map(|tool| tool.name.into_owned()));
            if names.contains(&self.tool.name) {
                self.known = true;
                return Ok(());
            }
            match page.next_cursor.filter(|next| !next.is_empty()) {
                Some(next) if Some(&next) != cursor.as_ref() => cursor = Some(next),
                _ => break,
            }
        }
        let more = names.len().saturating_sub(MAX_NAMED);
        names.truncate(MAX_NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let names = plain(&names.join(", "));
        Err(self.error(&format!("the server has no such tool, but {names}{more}; correct tool.name")))
    }

    fn error(&self, why: &str) -> String {
        format!("MCP server {}, {}: {why}", self.server.shown(), self.what)
    }
}

impl Pages for ToolPages {
    fn page(&mut self, token: Option<&Value>) -> Result<Page, String> {
        if !self.known {
            self.look()?;
        }
        let mut arguments = self.tool.arguments.clone();
        if let (Some(argument), Some(token)) = (&self.tool.cursor_argument, token) {
            arguments.insert(argument.clone(), token.clone());
        }
        let asked = CallToolRequestParams::new(self.tool.name.clone()).with_arguments(arguments);
        let result =
            self.server.ask(&self.what, "tools/call", async |peer| peer.call_tool(asked.clone()).await)?;
        let at_page = match token {
            Some(token) => format!("{}, page {}", self.what, short(token)),
            None => self.what.clone(),
        };
        let (rows, next) = taken(&self.tool, result)
            .map_err(|why| format!("MCP server {}, {at_page}: {why}", self.server.shown()))?;
        if next.is_some() && next.as_ref() == token {
            return Err(self.error(&format!(
                "the cursor {} leads to itself; correct cursor_path or cursor_argument",
                short(token.unwrap_or(&Value::Null))
            )));
        }
        Ok(Page { shown: at_page, rows, next })
    }
}

/// A cursor in a message.
fn short(cursor: &Value) -> String {
    let text = cursor.as_str().map_or_else(|| cursor.to_string(), str::to_owned);
    let text = plain(&text);
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Rows, each of which may be unusable.
type Taken = Vec<Result<Map<String, Value>, String>>;

/// The rows of a result, and the cursor of the next page.
fn taken(tool: &ToolConfig, result: CallToolResult) -> Result<(Taken, Option<Value>), String> {
    let texts = || result.content.iter().filter_map(|block| block.as_text()).map(|block| block.text.as_str());
    if result.is_error == Some(true) {
        let said = plain(&texts().collect::<Vec<_>>().join(" "));
        return Err(format!(
            "the tool failed: {}",
            if said.is_empty() { "it does not say why" } else { &said }
        ));
    }
    if let Some(value) = result.structured_content.as_ref().filter(|value| !value.is_null()) {
        return page_of(tool, value);
    }
    let mut texts = texts();
    let (Some(first), second) = (texts.next(), texts.next()) else {
        return Err("the result has neither structured content nor text; this tool gives no rows".into());
    };
    let Some(second) = second else {
        return match serde_json::from_str::<Value>(first) {
            Ok(value @ (Value::Object(_) | Value::Array(_))) => page_of(tool, &value),
            _ if tool.rows_path.is_some() => {
                Err("the result's text is no JSON, so nothing is at rows_path; take rows_path out".into())
            }
            _ => Ok((lines(first)?, None)),
        };
    };
    // Several texts are what some servers make of a list: a row each. A cursor would be in none of them.
    if tool.cursor_path.is_some() || tool.rows_path.is_some() {
        return Err("the result has several texts, so nothing is at rows_path; take rows_path out".into());
    }
    let mut rows = Vec::new();
    for text in [first, second].into_iter().chain(texts) {
        rows.extend(lines(text)?);
    }
    Ok((rows, None))
}

fn page_of(tool: &ToolConfig, value: &Value) -> Result<(Taken, Option<Value>), String> {
    let found = match &tool.rows_path {
        None => value,
        Some(path) => step_to(value, path).ok_or_else(|| {
            let names = match value {
                Value::Object(fields) => plain(&fields.keys().cloned().collect::<Vec<_>>().join(", ")),
                _ => "no fields".into(),
            };
            format!("the result has nothing at rows_path {path}; it has {names}")
        })?,
    };
    let next = tool.cursor_path.as_ref().and_then(|path| step_to(value, path));
    let next = match next {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) if text.is_empty() => None,
        Some(next @ (Value::String(_) | Value::Number(_))) => Some(next.clone()),
        Some(_) => return Err("the cursor is neither a text nor a number; correct cursor_path".into()),
    };
    Ok((rows_of(found)?, next))
}

fn step_to<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    value_at(value.as_object()?, path)
}

/// A list gives its elements, an object is one row, a text holds either of them or an object a line.
fn rows_of(value: &Value) -> Result<Taken, String> {
    match value {
        Value::Array(items) => Ok(items.iter().map(row_of).collect()),
        Value::Object(fields) => Ok(vec![Ok(fields.clone())]),
        Value::String(text) => lines(text),
        _ => Err("the rows are neither a list nor an object; correct rows_path".into()),
    }
}

/// A text in a list is the field `text`, as a line of a text file is.
fn row_of(item: &Value) -> Result<Map<String, Value>, String> {
    match item {
        Value::Object(fields) => Ok(fields.clone()),
        Value::String(text) => Ok(Map::from_iter([("text".to_owned(), Value::from(text.as_str()))])),
        _ => Err("the element is neither an object nor a text".into()),
    }
}

/// The rows of a text: JSON as a whole, or an object a line.
fn lines(text: &str) -> Result<Taken, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    if let Ok(value @ (Value::Array(_) | Value::Object(_))) = serde_json::from_str::<Value>(text) {
        return rows_of(&value);
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let rows: Taken = lines
        .map(|(at, line)| {
            serde_json::from_str::<Map<String, Value>>(line)
                .map_err(|_| format!("line {} is no JSON object", at + 1))
        })
        .collect();
    // One bad line among good ones is a bad row; when none is good, it is no data at all.
    match rows.iter().any(Result::is_ok) {
        true => Ok(rows),
        false => Err(format!(
            "the result's text is no JSON: '{}'; this tool gives no rows",
            text.chars().filter(|c| !c.is_control()).take(80).collect::<String>()
        )),
    }
}

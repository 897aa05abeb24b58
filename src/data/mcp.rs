//! A Model Context Protocol server as a source: its resources as files, or one of its tools called page by page.
//! Which server, resources and tool is the configuration's matter alone. Knows nothing of the records inside.

mod resource;
mod server;
#[cfg(test)]
mod tests;
mod tool;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::resource::Resources;
use self::server::Server;
use self::tool::ToolPages;
use super::http::{check_header, check_url, check_variable};
use super::object::{Opened, Opening, Rows};

/// Seconds that a server has for an answer, and to start; a first `npx` downloads what it starts.
const TIMEOUT_S: u64 = 60;
const MAX_TIMEOUT_S: u64 = 3600;
/// Resources that templates may stand for.
const MAX_EXPANDED: u64 = 100_000;

/// The keys of `type: mcp`: one of `command` and `url`, one of `resources` and `tool`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct McpConfig {
    /// Program and arguments of a server that is started and spoken to over its standard input and output.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Names of environment variables that are passed on to it, besides PATH, HOME and the like.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env_from: Vec<String>,
    /// Address of a server that speaks streamable HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Names of headers to names of the environment variables that hold their values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers_env: BTreeMap<String, String>,
    /// Resources that are read one after another.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resources: Vec<ResourceChoice>,
    /// A tool whose results are rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool: Option<ToolConfig>,
    /// Seconds that the server has for each answer, and to start.
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

fn default_timeout_s() -> u64 {
    TIMEOUT_S
}

/// Which resources to read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a resource is a URI, a pattern with *, or template and values")]
pub enum ResourceChoice {
    /// One by its URI; with `*`, those of the server's list that fit.
    Uri(String),
    /// As many as there are values.
    Template(Template),
}

/// A URI with `{name}` in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// As in `notes://{year}/{chapter}`.
    pub template: String,
    /// What each name stands for.
    pub values: BTreeMap<String, Values>,
}

/// What a name in a template stands for, one after another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "values are a list of texts and numbers, or from and to")]
pub enum Values {
    /// These.
    List(Vec<Word>),
    /// All whole numbers of a range.
    Range(Range),
}

/// Both ends are in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// First number.
    pub from: i64,
    /// Last number.
    pub to: i64,
}

/// A text or a number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a value is a text or a whole number")]
pub enum Word {
    /// As in `[1, 2]`.
    Number(i64),
    /// As in `[first, second]`.
    Text(String),
}

/// A tool whose results are rows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolConfig {
    /// Its name.
    pub name: String,
    /// What it is called with.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub arguments: Map<String, Value>,
    /// The argument that takes the cursor of the page before; without it there is one call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor_argument: Option<String>,
    /// Where the cursor stands in a result, as in `page.next`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor_path: Option<String>,
    /// Where the rows stand in a result, as in `page.rows`; the result itself where it is left away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_path: Option<String>,
}

impl McpConfig {
    pub(super) fn check(&self) -> Result<(), String> {
        match (self.command.is_empty(), &self.url) {
            (true, None) => return Err("give command, a server to start, or url, a server to reach".into()),
            (false, Some(_)) => return Err("give either command or url, not both".into()),
            (true, Some(url)) => check_url(url).map_err(|why| format!("url: {why}"))?,
            (false, None) if self.command[0].trim().is_empty() => {
                return Err("command: the first word must be a program, as in [npx, -y, some-server]".into());
            }
            (false, None) => {}
        }
        if self.url.is_some() && !self.env_from.is_empty() {
            return Err("env_from is for command; a server at a url takes headers_env".into());
        }
        if self.url.is_none() && !self.headers_env.is_empty() {
            return Err("headers_env is for url; a server that is started takes env_from".into());
        }
        self.env_from.iter().try_for_each(|variable| check_variable("env_from", variable, "NOTES_TOKEN"))?;
        self.headers_env.iter().try_for_each(|(header, variable)| check_header(header, variable))?;
        if self.headers_env.keys().any(|header| header.to_ascii_lowercase().starts_with("mcp-")) {
            return Err("headers_env: headers that begin with mcp- are set by the program itself".into());
        }
        if !(1..=MAX_TIMEOUT_S).contains(&self.timeout_s) {
            return Err(format!("timeout_s must be from 1 to {MAX_TIMEOUT_S}, not {}", self.timeout_s));
        }
        match (&self.tool, self.resources.is_empty()) {
            (None, true) => Err("give resources, a list of URIs, or tool, with the name of a tool".into()),
            (Some(_), false) => Err("give either resources or tool; make two sources for both".into()),
            (Some(tool), true) => tool.check(),
            (None, false) => {
                let mut left = MAX_EXPANDED;
                self.resources.iter().try_for_each(|choice| choice.check(&mut left))
            }
        }
    }

    pub(super) fn open(&self, opening: &Opening) -> Result<Opened, String> {
        let server = Server::new(self, opening);
        let rows = match &self.tool {
            Some(tool) => Rows::Pages(Box::new(ToolPages::new(tool.clone(), server))),
            None => Rows::Files(Box::new(Resources::new(self.resources.clone(), server))),
        };
        Ok(Opened { rows, pin: None })
    }
}

impl ToolConfig {
    fn check(&self) -> Result<(), String> {
        if self.name.trim().is_empty() {
            return Err("tool: name is missing; name a tool of the server".into());
        }
        let empty = |text: &Option<String>| text.as_ref().is_some_and(|text| text.is_empty());
        if empty(&self.cursor_argument) || empty(&self.cursor_path) || empty(&self.rows_path) {
            return Err(
                "tool: cursor_argument, cursor_path and rows_path name something or are left away".into()
            );
        }
        match (&self.cursor_argument, &self.cursor_path) {
            (Some(_), None) => {
                Err("tool: cursor_argument needs cursor_path, where a result has the cursor of the next page"
                    .into())
            }
            (None, Some(_)) => {
                Err("tool: cursor_path needs cursor_argument, the argument that takes the cursor".into())
            }
            (Some(argument), Some(_)) if self.arguments.contains_key(argument) => Err(format!(
                "tool: {argument} is in arguments, yet takes the cursor; take it out of arguments"
            )),
            (Some(_), Some(_)) if self.rows_path.is_none() => {
                Err("tool: cursor_path needs rows_path, where a result has the rows beside the cursor".into())
            }
            _ => Ok(()),
        }
    }
}

impl ResourceChoice {
    /// The URI, pattern or template.
    pub(super) fn uri(&self) -> &str {
        match self {
            Self::Uri(uri) => uri,
            Self::Template(template) => &template.template,
        }
    }

    /// Takes what it stands for off what is left.
    fn check(&self, left: &mut u64) -> Result<(), String> {
        let template = match self {
            Self::Uri(uri) if uri.contains(['{', '}']) => {
                return Err(format!("resources: '{uri}' is a template; write it as template, with values"));
            }
            Self::Uri(uri) if uri == "*" => return Ok(()),
            Self::Uri(uri) => return check_uri(uri),
            Self::Template(template) => template,
        };
        check_uri(&template.template)?;
        let names = names(&template.template)?;
        if let Some(name) = names.iter().find(|name| !template.values.contains_key(**name)) {
            return Err(format!("resources: values has nothing for {{{name}}} of {}", template.template));
        }
        if let Some(name) = template.values.keys().find(|name| !names.contains(name.as_str())) {
            return Err(format!("resources: {} has no {{{name}}}; take it out of values", template.template));
        }
        let mut count: u64 = 1;
        for (name, values) in &template.values {
            let n = match values {
                Values::List(list) => list.len() as u64,
                Values::Range(Range { from, to }) => {
                    (i128::from(*to) - i128::from(*from) + 1).clamp(0, i128::from(u64::MAX)) as u64
                }
            };
            if n == 0 {
                return Err(format!("resources: values of {name} are none; list some, or give from and to"));
            }
            count = count.saturating_mul(n);
        }
        *left = left.checked_sub(count).ok_or_else(|| {
            format!(
                "resources: the templates stand for more than {MAX_EXPANDED} resources; take fewer values"
            )
        })?;
        Ok(())
    }
}

fn check_uri(uri: &str) -> Result<(), String> {
    let scheme = uri.split_once(':').map(|(scheme, _)| scheme);
    let is_scheme = scheme.is_some_and(|scheme| {
        scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    });
    if !is_scheme || uri.len() > 4096 || uri.contains(char::is_whitespace) {
        let shown: String = uri.chars().take(80).collect();
        return Err(format!(
            "resources: '{}' is no URI; write one as in notes://all/lessons.jsonl",
            shown.escape_debug()
        ));
    }
    Ok(())
}

/// The names in a template, whose braces must close.
fn names(template: &str) -> Result<BTreeSet<&str>, String> {
    let mut names = BTreeSet::new();
    for (text, name) in parts(template) {
        let fits =
            |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        match name {
            Some(name) if fits(name) && !text.contains('}') => drop(names.insert(name)),
            None if !text.contains(['{', '}']) => {}
            _ => {
                return Err(format!(
                    "resources: '{template}' is no template; write {{name}}, with letters, digits and _"
                ));
            }
        }
    }
    if names.is_empty() {
        return Err(format!("resources: '{template}' has no {{name}} in it; write it as a plain URI"));
    }
    Ok(names)
}

/// Text and the name after it, by turns; the last text has none.
fn parts(template: &str) -> Vec<(&str, Option<&str>)> {
    let mut parts = Vec::new();
    let mut rest = template;
    while let Some((text, after)) = rest.split_once('{')
        && let Some((name, after)) = after.split_once('}')
    {
        parts.push((text, Some(name)));
        rest = after;
    }
    parts.push((rest, None));
    parts
}

//! What a source comes down to before anything of it is decoded: its first files with their sizes and versions, or
//! its first page. For people who want to know what they would train on.

use super::object::{Opening, Patience, Rows};
use super::{Location, SourceConfig, SourceError};

/// What a source comes down to.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The first ones, in the order in which they are read.
    pub parts: Vec<Part>,
    /// Whether there are more.
    pub more: bool,
}

/// A file or a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Of the file or the page, without a secret.
    pub name: String,
    /// Of the file, where it is known.
    pub bytes: Option<u64>,
    /// What tells this version of the file from another, where the place that it comes from says.
    pub version: Option<String>,
    /// Of the page.
    pub rows: Option<usize>,
}

impl SourceConfig {
    /// Looks at the first `most` files, or the first page. Must be called inside the asynchronous runtime.
    ///
    /// # Errors
    /// The source cannot be opened, or a file or the page cannot be had.
    pub async fn resolve(&self, name: &str, most: usize) -> Result<Resolved, SourceError> {
        let (config, opening) = (self.clone(), Opening::new(self, Patience::default()));
        let stop = opening.stop.clone().drop_guard();
        let resolved = tokio::task::spawn_blocking(move || config.resolve_with(&opening, most)).await;
        drop(stop);
        let resolved = resolved.unwrap_or_else(|error| Err(error.to_string()));
        resolved.map_err(|message| SourceError { source_name: name.to_owned(), message })
    }

    fn resolve_with(&self, opening: &Opening, most: usize) -> Result<Resolved, String> {
        match &self.location {
            Location::Mix(mix) => {
                let mut all = Resolved { parts: Vec::new(), more: false };
                for source in mix.parts() {
                    let resolved = source.resolve_as_part(opening, most)?;
                    all.parts.extend(resolved.parts);
                    all.more |= resolved.more;
                }
                all.more |= all.parts.len() > most;
                all.parts.truncate(most);
                return Ok(all);
            }
            Location::Fallback(list) => {
                let mut failures = Vec::new();
                for source in list.parts() {
                    match source.resolve_as_part(opening, most) {
                        Ok(resolved) => return Ok(resolved),
                        Err(failure) => failures.push(failure),
                    }
                }
                return Err(format!("none of its sources works: {}", failures.join("; ")));
            }
            _ => {}
        }
        let objects = match self.location.open(opening)?.rows {
            Rows::Files(objects) => objects,
            Rows::Pages(mut pages) => {
                let page = pages.page(None)?;
                let rows = Some(page.rows.len());
                let part = Part { name: page.shown, bytes: None, version: None, rows };
                return Ok(Resolved { parts: vec![part], more: page.next.is_some() });
            }
        };
        let mut resolved = Resolved { parts: Vec::new(), more: false };
        for object in objects {
            if resolved.parts.len() == most {
                resolved.more = true;
                break;
            }
            let mut object = object?;
            let name = object.shown().to_owned();
            let stat = object.stat().map_err(|why| format!("{name}: {why}"))?;
            resolved.parts.push(Part { name, bytes: stat.length, version: stat.version, rows: None });
        }
        Ok(resolved)
    }

    fn resolve_as_part(&self, whole: &Opening, most: usize) -> Result<Resolved, String> {
        let opening = Opening { format: self.format, fields: self.needed(), ..whole.clone() };
        self.resolve_with(&opening, most)
    }
}

//! What a source comes down to before anything of it is decoded: its first files with their sizes and versions, or
//! its first page. For people who want to know what they would train on.

use super::object::{Opening, Patience, Rows};
use super::{Location, SourceConfig, SourceError};

/// What a source comes down to.
#[derive(Debug, Clone, PartialEq)]
pub struct Survey {
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
    /// Looks at the first `most` files, or the first page; of a mix, at those of each source, of a fallback, at those of
    /// the first source that can be opened. Must be called inside the asynchronous runtime.
    ///
    /// # Errors
    /// The source cannot be opened, or a file or the page cannot be had.
    pub async fn survey(&self, name: &str, most: usize) -> Result<Survey, SourceError> {
        let (config, opening) = (self.clone(), Opening::new(self, Patience::default()));
        let stop = opening.stop.clone().drop_guard();
        let survey = tokio::task::spawn_blocking(move || config.survey_with(&opening, most)).await;
        drop(stop);
        let survey = survey.unwrap_or_else(|error| Err(error.to_string()));
        survey.map_err(|message| SourceError { source_name: name.to_owned(), message })
    }

    fn survey_with(&self, opening: &Opening, most: usize) -> Result<Survey, String> {
        let parts = self.location.parts();
        if !parts.is_empty() {
            return combined(&self.location, &parts, opening, most);
        }
        let objects = match self.location.open(opening)?.rows {
            Rows::Files(objects) => objects,
            Rows::Pages(mut pages) => {
                let page = pages.page(None)?;
                let rows = Some(page.rows.len());
                let part = Part { name: page.shown, bytes: None, version: None, rows };
                return Ok(Survey { parts: vec![part], more: page.next.is_some() });
            }
        };
        let mut survey = Survey { parts: Vec::new(), more: false };
        for object in objects {
            if survey.parts.len() == most {
                survey.more = true;
                break;
            }
            let mut object = object?;
            let name = object.shown().to_owned();
            let stat = object.stat().map_err(|why| format!("{name}: {why}"))?;
            survey.parts.push(Part { name, bytes: stat.length, version: stat.version, rows: None });
        }
        Ok(survey)
    }
}

fn combined(
    whole: &Location,
    parts: &[(&str, &SourceConfig)],
    opening: &Opening,
    most: usize,
) -> Result<Survey, String> {
    let mut all = Survey { parts: Vec::new(), more: false };
    let mut failures = Vec::new();
    for (name, part) in parts {
        let opening = Opening { format: part.format, ..opening.clone() };
        match (part.survey_with(&opening, most), whole) {
            (Ok(survey), Location::Fallback(_)) => return Ok(survey),
            (Ok(survey), _) => {
                all.more |= survey.more;
                let named = |part: Part| Part { name: format!("{name}: {}", part.name), ..part };
                all.parts.extend(survey.parts.into_iter().map(named));
            }
            (Err(why), Location::Fallback(_)) => failures.push(format!("{name}: {why}")),
            (Err(why), _) => return Err(format!("{name}: {why}")),
        }
    }
    if failures.is_empty() { Ok(all) } else { Err(failures.join("; ")) }
}

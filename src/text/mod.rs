//! Pure functions on text: the scripts and names of the languages served, the target of a translation prompt,
//! and the cleaning of answers. Nothing here knows of models, tokens or requests.

pub mod clean;
pub mod language;
pub mod prompt;
pub mod script;

pub use clean::{MAX_CHARS, clean};
pub use language::{Language, UnknownLanguage};
pub use prompt::target_of_prompt;
pub use script::Script;

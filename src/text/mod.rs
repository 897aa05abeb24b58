//! Pure functions on text: the scripts and names of the languages served, the target of a translation prompt, the
//! cleaning of answers, which language a text is in, and how alike two texts are. Nothing here knows of models,
//! tokens or requests.

pub mod chrf;
pub mod clean;
pub mod identify;
pub mod language;
pub mod prompt;
pub mod script;

pub use clean::{MAX_CHARS, clean};
pub use identify::{Identified, Verdict, Voice, identify, is_in, judge};
pub use language::{Language, UnknownLanguage};
pub use prompt::target_of_prompt;
pub use script::Script;

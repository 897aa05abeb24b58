//! Request fields of the endpoints about episodes that JSON lets be of several types. Hand-written visitors, as in
//! `fields`: their errors keep the path to the wrong element.

use std::fmt;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};
use utoipa::openapi::schema::{Object, ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::config::rl::PromptConfig;

/// A prompt: a text, or an object with what is known of a good answer.
#[derive(Debug)]
pub(super) struct PromptField(pub(super) PromptConfig);

impl<'de> Deserialize<'de> for PromptField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptVisitor;
        impl<'de> Visitor<'de> for PromptVisitor {
            type Value = PromptField;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an object with prompt, language and reference")
            }
            fn visit_str<E>(self, text: &str) -> Result<PromptField, E> {
                Ok(PromptField(PromptConfig::new(text.to_owned())))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<PromptField, A::Error> {
                PromptConfig::deserialize(MapAccessDeserializer::new(map)).map(PromptField)
            }
        }
        deserializer.deserialize_any(PromptVisitor)
    }
}

impl PartialSchema for PromptField {
    fn schema() -> RefOr<Schema> {
        let object = ObjectBuilder::new()
            .property("prompt", String::schema())
            .property("language", String::schema())
            .property("reference", String::schema())
            .required("prompt")
            .build();
        OneOfBuilder::new().item(String::schema()).item(object).into()
    }
}

impl ToSchema for PromptField {}

/// Whether episodes are uploaded: `true`, `false`, or the name of a sink.
#[derive(Debug)]
pub(super) enum Upload {
    /// To the sink that the settings have for it, or not at all.
    Flag(bool),
    /// To this one.
    Sink(String),
}

impl<'de> Deserialize<'de> for Upload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct UploadVisitor;
        impl Visitor<'_> for UploadVisitor {
            type Value = Upload;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or the name of a sink")
            }
            fn visit_bool<E>(self, flag: bool) -> Result<Upload, E> {
                Ok(Upload::Flag(flag))
            }
            fn visit_str<E>(self, name: &str) -> Result<Upload, E> {
                Ok(Upload::Sink(name.to_owned()))
            }
        }
        deserializer.deserialize_any(UploadVisitor)
    }
}

impl PartialSchema for Upload {
    fn schema() -> RefOr<Schema> {
        let null = Object::with_type(Type::Null);
        OneOfBuilder::new().item(null).item(bool::schema()).item(String::schema()).into()
    }
}

impl ToSchema for Upload {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_a_text_or_an_object() {
        let of = |json: &str| serde_json::from_str::<PromptField>(json).map(|field| field.0);
        assert_eq!(of(r#""a""#).expect("is one"), PromptConfig::new("a".into()));
        let known = of(r#"{"prompt": "a", "language": "ta", "reference": "b"}"#).expect("is one");
        assert_eq!((known.language.as_deref(), known.reference.as_deref()), (Some("ta"), Some("b")));
        for wrong in ["7", "[]", "null", r#"{"language": "ta"}"#, r#"{"prompt": "a", "text": "b"}"#] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_upload_is_a_flag_or_a_name() {
        let of = |json: &str| serde_json::from_str::<Upload>(json);
        assert!(matches!(of("true"), Ok(Upload::Flag(true))));
        assert!(matches!(of(r#""nas""#), Ok(Upload::Sink(name)) if name == "nas"));
        assert!(of("3").is_err() && of("[]").is_err());
    }
}

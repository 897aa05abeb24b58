//! Request fields that more than one endpoint has, and those that JSON lets be of several types. Hand-written
//! visitors instead of untagged enums: their errors keep the path to the wrong element.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Deserializer, SeqAccess, Visitor};
use utoipa::openapi::schema::{ArrayBuilder, Object, OneOfBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::error::ApiError;
use crate::engine::Sampling;

/// Most stop texts in one request.
pub(super) const MAX_STOPS: usize = 16;
/// Most alternatives reported at one position.
pub(super) const MAX_TOP_LOGPROBS: i64 = 20;

/// A string, or a list of `T`.
#[derive(Debug, Clone)]
pub(super) enum OneOrMany<T> {
    /// `"..."`
    One(String),
    /// `[...]`
    Many(Vec<T>),
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrManyVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrManyVisitor<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list")
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(OneOrMany::One(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(OneOrMany::Many)
            }
        }

        deserializer.deserialize_any(OneOrManyVisitor(PhantomData))
    }
}

/// Schema of a field that is a text or a list of `items`, or null. A generic type cannot have one by itself.
pub(super) fn one_or_many_schema(items: RefOr<Schema>) -> Schema {
    let list = ArrayBuilder::new().items(items).build();
    let null = Object::with_type(Type::Null);
    OneOfBuilder::new().item(null).item(String::schema()).item(list).into()
}

/// Schema of `stop`.
pub(super) fn stops_schema() -> Schema {
    one_or_many_schema(String::schema())
}

/// The prompt of `/v1/completions`: a text, token ids, or a list of either.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Prompts {
    /// One answer, or `n`, to each text.
    Texts(Vec<String>),
    /// One answer, or `n`, to each list of token ids.
    Tokens(Vec<Vec<u32>>),
}

enum PromptItem {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

impl<'de> Deserialize<'de> for PromptItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;

        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = PromptItem;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }

            fn visit_str<E>(self, text: &str) -> Result<PromptItem, E> {
                Ok(PromptItem::Text(text.to_owned()))
            }

            fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<PromptItem, E> {
                let wrong = |_| E::invalid_value(serde::de::Unexpected::Unsigned(id), &"a token id");
                u32::try_from(id).map(PromptItem::Token).map_err(wrong)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, ids: A) -> Result<PromptItem, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(ids)).map(PromptItem::Tokens)
            }
        }

        deserializer.deserialize_any(ItemVisitor)
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let items = match OneOrMany::<PromptItem>::deserialize(deserializer)? {
            OneOrMany::One(text) => return Ok(Self::Texts(vec![text])),
            OneOrMany::Many(items) => items,
        };
        let mut texts = Vec::new();
        let mut ids = Vec::new();
        let mut lists = Vec::new();
        for item in items {
            match item {
                PromptItem::Text(text) => texts.push(text),
                PromptItem::Token(id) => ids.push(id),
                PromptItem::Tokens(list) => lists.push(list),
            }
        }
        match (texts.is_empty(), ids.is_empty(), lists.is_empty()) {
            (false, true, true) => Ok(Self::Texts(texts)),
            (true, false, true) => Ok(Self::Tokens(vec![ids])),
            (true, true, false) => Ok(Self::Tokens(lists)),
            (true, true, true) => Err(serde::de::Error::custom("the list must not be empty")),
            _ => Err(serde::de::Error::custom("texts, token ids and lists of token ids cannot be mixed")),
        }
    }
}

impl PartialSchema for Prompts {
    fn schema() -> RefOr<Schema> {
        let list = |items: RefOr<Schema>| ArrayBuilder::new().items(items).build();
        let id = || RefOr::T(Schema::Object(Object::with_type(Type::Integer)));
        OneOfBuilder::new()
            .item(String::schema())
            .item(list(String::schema()))
            .item(list(id()))
            .item(list(RefOr::T(Schema::Array(list(id())))))
            .into()
    }
}

impl ToSchema for Prompts {
    fn name() -> Cow<'static, str> {
        Cow::Borrowed("Prompts")
    }
}

/// Sampling as a request says it, before its ranges are known to hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct SamplingFields {
    /// 0 is greedy.
    pub(super) temperature: f64,
    /// 1 keeps all tokens.
    pub(super) top_p: f64,
    /// 0 keeps all tokens.
    pub(super) top_k: i64,
    /// 0 drops none.
    pub(super) min_p: f64,
    /// 1 changes nothing.
    pub(super) repetition_penalty: f64,
    /// Chosen by the server when absent.
    pub(super) seed: Option<i64>,
}

impl SamplingFields {
    /// Checks the ranges and chooses a seed where there is none.
    pub(super) fn resolve(self) -> Result<Sampling, ApiError> {
        let top_k =
            usize::try_from(self.top_k).map_err(|_| ApiError::invalid("top_k", "must be 0 (off) or more"))?;
        let sampling = Sampling {
            temperature: self.temperature as f32,
            top_k,
            top_p: self.top_p as f32,
            min_p: self.min_p as f32,
            repetition_penalty: self.repetition_penalty as f32,
            seed: self.seed.unwrap_or_else(random_seed) as u64,
            stream: 0,
        };
        sampling.validate()?;
        Ok(sampling)
    }
}

/// A seed that survives a client whose numbers are doubles: below 2^53.
fn random_seed() -> i64 {
    (uuid::Uuid::new_v4().as_u128() & ((1 << 53) - 1)) as i64
}

/// A count from `range`, or 400 naming the field.
pub(super) fn in_range(
    field: &str,
    value: i64,
    range: std::ops::RangeInclusive<i64>,
) -> Result<usize, ApiError> {
    if !range.contains(&value) {
        let message = format!("must be between {} and {}", range.start(), range.end());
        return Err(ApiError::invalid(field, message));
    }
    usize::try_from(value).map_err(|_| ApiError::invalid(field, "must not be negative"))
}

/// Stop texts: none, one or several, none of them empty.
pub(super) fn stops(stop: Option<OneOrMany<String>>) -> Result<Vec<String>, ApiError> {
    let stops = match stop {
        None => Vec::new(),
        Some(OneOrMany::One(text)) => vec![text],
        Some(OneOrMany::Many(texts)) => texts,
    };
    if stops.len() > MAX_STOPS {
        return Err(ApiError::invalid("stop", format!("must hold at most {MAX_STOPS} texts")));
    }
    if stops.iter().any(String::is_empty) {
        return Err(ApiError::invalid("stop", "must not hold an empty text"));
    }
    Ok(stops)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(json: &str) -> Result<Prompts, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn a_prompt_has_four_shapes() {
        assert_eq!(prompts(r#""a""#).expect("is one"), Prompts::Texts(vec!["a".into()]));
        assert_eq!(prompts(r#"["a","b"]"#).expect("is one"), Prompts::Texts(vec!["a".into(), "b".into()]));
        assert_eq!(prompts("[1,2]").expect("is one"), Prompts::Tokens(vec![vec![1, 2]]));
        assert_eq!(prompts("[[1],[2,3]]").expect("is one"), Prompts::Tokens(vec![vec![1], vec![2, 3]]));
        for wrong in ["[]", r#"["a",1]"#, "[1,[2]]", "[-1]", "[4294967296]", "[1.5]", "{}", "null", "7"] {
            assert!(prompts(wrong).is_err(), "{wrong} must be refused");
        }
    }

    #[test]
    fn stops_are_few_and_not_empty() {
        let many = |n: usize| Some(OneOrMany::Many(vec!["x".to_owned(); n]));
        assert_eq!(stops(None).expect("is fine").len(), 0);
        assert_eq!(stops(Some(OneOrMany::One("x".into()))).expect("is fine"), ["x"]);
        assert_eq!(stops(many(MAX_STOPS)).expect("is fine").len(), MAX_STOPS);
        assert!(stops(many(MAX_STOPS + 1)).is_err());
        assert!(stops(Some(OneOrMany::One(String::new()))).is_err());
    }

    #[test]
    fn ranges_are_checked_and_named() {
        let good = SamplingFields {
            temperature: 0.7,
            top_p: 0.9,
            top_k: 50,
            min_p: 0.0,
            repetition_penalty: 1.1,
            seed: None,
        };
        assert!(good.resolve().is_ok());
        for (bad, field) in [
            (SamplingFields { temperature: -1.0, ..good }, "temperature"),
            (SamplingFields { top_p: 2.0, ..good }, "top_p"),
            (SamplingFields { top_p: 1e-60, ..good }, "top_p"),
            (SamplingFields { top_k: -2, ..good }, "top_k"),
            (SamplingFields { min_p: 1.0, ..good }, "min_p"),
            (SamplingFields { repetition_penalty: 0.0, ..good }, "repetition_penalty"),
        ] {
            let error = bad.resolve().expect_err("is out of range").body().error;
            assert_eq!(error.param.as_deref(), Some(field));
            assert!(error.message.starts_with(field), "{}", error.message);
        }
        assert!(in_range("max_new_tokens", 1_000_000, 1..=512).is_err());
        assert!(in_range("max_new_tokens", 0, 1..=512).is_err());
        assert_eq!(in_range("max_new_tokens", 512, 1..=512).expect("is inside"), 512);
    }

    #[test]
    fn a_chosen_seed_is_exact_in_a_double() {
        for _ in 0..100 {
            let seed = random_seed();
            assert_eq!(seed as f64 as i64, seed);
        }
    }
}

//! Reading YAML that may want to be more than it seems: how far aliases expand is bounded before anything is kept.
//! Knows nothing of what the files mean.

use std::fmt;

use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, VariantAccess,
    Visitor,
};

/// Values that a file may hold once its aliases are followed.
const MAX_VALUES: u64 = 100_000;
/// Bytes of text that they may have.
const MAX_TEXT_BYTES: u64 = 4 << 20;

/// Reads a value; an empty file is one that has none of it.
///
/// # Errors
/// The text is no such value, with the line and column where it is not; or it expands to too much.
pub(super) fn read<T: DeserializeOwned>(text: &str) -> Result<T, serde_yaml::Error> {
    let mut room = Room { values: MAX_VALUES, bytes: MAX_TEXT_BYTES };
    room.deserialize(serde_yaml::Deserializer::from_str(text)).map_err(worded)?;
    serde_yaml::from_str(text)
}

/// The library has a bound of its own on aliases in aliases, and only says that it is exceeded.
fn worded(error: serde_yaml::Error) -> serde_yaml::Error {
    match error.to_string().contains("repetition limit") {
        true => Error::custom("its aliases expand to too much; write it without aliases (*name)"),
        false => error,
    }
}

/// What may still come. Values are counted as they pass and not kept.
struct Room {
    values: u64,
    bytes: u64,
}

impl Room {
    fn take<E: Error>(&mut self, bytes: usize) -> Result<(), E> {
        let values = self.values.checked_sub(1);
        let bytes = self.bytes.checked_sub(bytes as u64);
        let (Some(values), Some(bytes)) = (values, bytes) else {
            return Err(E::custom(format!(
                "holds more than {MAX_VALUES} values or {} MB of text once its aliases are followed; write it \
                 without aliases (*name)",
                MAX_TEXT_BYTES >> 20
            )));
        };
        (self.values, self.bytes) = (values, bytes);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for &mut Room {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Room {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.take(0)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_i128<E: Error>(self, _: i128) -> Result<(), E> {
        self.take(0)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_u128<E: Error>(self, _: u128) -> Result<(), E> {
        self.take(0)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.take(text.len())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.take(0)
    }

    fn visit_none<E: Error>(self) -> Result<(), E> {
        self.take(0)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        self.take(0)?;
        while list.next_element_seed(&mut *self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.take(0)?;
        while map.next_key_seed(&mut *self)?.is_some() {
            map.next_value_seed(&mut *self)?;
        }
        Ok(())
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<(), A::Error> {
        let ((), content) = tagged.variant_seed(&mut *self)?;
        content.newtype_variant_seed(self)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn files_are_read_as_they_are() {
        for text in
            ["", "a: 1\nb: [x, 2.5, true, null, -3]\n", "- &a {b: c}\n- *a\n", "a: 18446744073709551615\n"]
        {
            assert_eq!(read::<Value>(text).unwrap(), serde_yaml::from_str::<Value>(text).unwrap(), "{text}");
        }
        let error = read::<Value>("a: 1\nb: [x\n").unwrap_err().to_string();
        assert!(error.contains("line"), "{error}");
    }

    #[test]
    fn aliases_that_expand_without_end_are_refused() {
        // Few aliases, each of much.
        let text = format!("a: &a {}\nb: [{}]\n", "x".repeat(500_000), "*a, ".repeat(20));
        let error = read::<Value>(&text).unwrap_err().to_string();
        assert!(error.contains("4 MB") && error.contains("line"), "{error}");
        // Many aliases of aliases.
        let mut text = "x0: &x0 [a, a, a, a, a, a, a, a, a, a]\n".to_owned();
        for i in 0..6 {
            text += &format!("x{}: &x{} [{}]\n", i + 1, i + 1, vec![format!("*x{i}"); 10].join(", "));
        }
        let error = read::<Value>(&text).unwrap_err().to_string();
        assert!(error.contains("write it without aliases"), "{error}");
        // What is written out is not meant.
        let text = format!("a: [{}]\n", "x, ".repeat(50_000));
        assert!(read::<Value>(&text).is_ok());
    }
}

//! Values of Parquet columns as JSON.

use std::collections::VecDeque;

use parquet::basic::{ConvertedType, LogicalType};
use parquet::column::reader::ColumnReader;
use parquet::data_type::ByteArray;
use parquet::errors::Result;
use parquet::record::{Field, Row};
use parquet::schema::types::ColumnDescPtr;
use serde_json::{Map, Number, Value};

/// A column with at most one value a row.
pub(super) struct Flat {
    reader: ColumnReader,
    descr: ColumnDescPtr,
    is_text: bool,
    /// Values, and those that cannot be used.
    ready: VecDeque<std::result::Result<Value, String>>,
}

impl Flat {
    pub(super) fn new(reader: ColumnReader, descr: ColumnDescPtr) -> Self {
        let is_text =
            matches!(descr.converted_type(), ConvertedType::UTF8 | ConvertedType::ENUM | ConvertedType::JSON)
                || matches!(
                    descr.logical_type_ref(),
                    Some(LogicalType::String | LogicalType::Enum | LogicalType::Json)
                );
        Self { reader, descr, is_text, ready: VecDeque::new() }
    }

    pub(super) fn pass(&mut self, rows: usize) -> Result<()> {
        macro_rules! pass {
            ($($kind:ident),+) => {
                match &mut self.reader { $(ColumnReader::$kind(reader) => reader.skip_records(rows),)+ }
            };
        }
        pass!(
            BoolColumnReader,
            Int32ColumnReader,
            Int64ColumnReader,
            Int96ColumnReader,
            FloatColumnReader,
            DoubleColumnReader,
            ByteArrayColumnReader,
            FixedLenByteArrayColumnReader
        )?;
        Ok(())
    }

    /// The next row's value; `wanted` rows are decoded where none is ready.
    pub(super) fn next(&mut self, wanted: usize) -> Result<Option<std::result::Result<Value, String>>> {
        if self.ready.is_empty() {
            self.fill(wanted)?;
        }
        Ok(self.ready.pop_front())
    }

    fn fill(&mut self, wanted: usize) -> Result<()> {
        let (descr, is_text, ready) = (&self.descr, self.is_text, &mut self.ready);
        let most = descr.max_def_level();
        macro_rules! fill {
            ($reader:expr, $convert:expr) => {{
                let (mut levels, mut values) = (Vec::new(), Vec::new());
                let (rows, _, _) = $reader.read_records(wanted, Some(&mut levels), None, &mut values)?;
                let mut values = values.into_iter();
                for row in 0..rows {
                    // A column that is never empty has no levels.
                    let is_there = most == 0 || levels.get(row) == Some(&most);
                    let value = if is_there { values.next() } else { None };
                    ready.push_back(value.map_or(Ok(Value::Null), $convert));
                }
            }};
        }
        match &mut self.reader {
            ColumnReader::BoolColumnReader(reader) => fill!(reader, |v: bool| Ok(Value::from(v))),
            ColumnReader::Int32ColumnReader(reader) => {
                fill!(reader, |v| Ok(value(Field::convert_int32(descr, v))));
            }
            ColumnReader::Int64ColumnReader(reader) => {
                fill!(reader, |v| Ok(value(Field::convert_int64(descr, v))));
            }
            ColumnReader::Int96ColumnReader(reader) => {
                fill!(reader, |v| Ok(value(Field::convert_int96(descr, v))));
            }
            ColumnReader::FloatColumnReader(reader) => fill!(reader, |v| Ok(value(Field::Float(v)))),
            ColumnReader::DoubleColumnReader(reader) => fill!(reader, |v| Ok(value(Field::Double(v)))),
            ColumnReader::ByteArrayColumnReader(reader) => {
                fill!(reader, |v: ByteArray| match is_text {
                    true => text(v.data()),
                    false => bytes(descr, v),
                });
            }
            ColumnReader::FixedLenByteArrayColumnReader(reader) => {
                fill!(reader, |v| bytes(descr, ByteArray::from(v)));
            }
        }
        Ok(())
    }
}

fn text(bytes: &[u8]) -> std::result::Result<Value, String> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(Value::from(text)),
        Err(error) => Err(format!("no UTF-8 at byte {}", error.valid_up_to() + 1)),
    }
}

fn bytes(descr: &ColumnDescPtr, array: ByteArray) -> std::result::Result<Value, String> {
    Field::convert_byte_array(descr, array).map(value).map_err(|error| error.to_string())
}

/// A value as JSON: dates, times and decimals as text; bytes that are no text as null, which nobody takes for one.
pub(super) fn value(field: Field) -> Value {
    let float = |number: f64| Number::from_f64(number).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(v) => v.into(),
        Field::Byte(v) => v.into(),
        Field::Short(v) => v.into(),
        Field::Int(v) => v.into(),
        Field::Long(v) => v.into(),
        Field::UByte(v) => v.into(),
        Field::UShort(v) => v.into(),
        Field::UInt(v) => v.into(),
        Field::ULong(v) => v.into(),
        Field::Float16(v) => float(v.into()),
        Field::Float(v) => float(v.into()),
        Field::Double(v) => float(v),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(row) => Value::Object(object(row)),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        Field::MapInternal(map) => {
            let entries = map.entries().iter().cloned().map(|(key, of_key)| {
                let key = match value(key) {
                    Value::String(key) => key,
                    other => other.to_string(),
                };
                (key, value(of_key))
            });
            Value::Object(entries.collect())
        }
        Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => field.to_string().into(),
    }
}

fn object(row: Row) -> Map<String, Value> {
    row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect()
}

//! Parquet: the footer, then one row group after another, column by column and page by page, so that no more than
//! the pages at hand and a piece of each column lie in memory. Only the columns that somebody needs are read.

mod chunks;
mod values;

use std::ops::ControlFlow;
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader as _, RowGroupReader};
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::schema::types::{SchemaDescriptor, Type};
use serde_json::{Map, Value};

use self::chunks::Chunks;
use self::values::{Flat, value};
use super::{Broken, Found};
use crate::data::Row;
use crate::data::object::Object;

/// The first bytes, and the last.
pub(super) const MAGIC: &[u8] = b"PAR1";

/// Bytes of values that are decoded of a column at once, about.
const BATCH_BYTES: u64 = 1 << 20;
/// Rows at once, at most.
const BATCH_ROWS: u64 = 1024;

/// Where reading goes on: a row group, and how many of its rows were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::data) struct Start {
    pub(in crate::data) group: usize,
    pub(in crate::data) row: u64,
}

/// Takes each row as it is found, with where the next one begins; breaking ends the decoding.
pub(in crate::data) type Sink<'a> = dyn FnMut(Row, Found, Start) -> ControlFlow<()> + 'a;

/// Gives every row from `start` on. `columns` names those that are read, or parts of them such as `translation.en`;
/// where it names none that there is, all are. `memory` bounds the pieces of columns at hand, in bytes.
pub(in crate::data) fn decode(
    object: Box<dyn Object>,
    length: u64,
    columns: &[String],
    start: Start,
    memory: u64,
    sink: &mut Sink,
) -> Result<ControlFlow<()>, Broken> {
    let chunks = Chunks::new(object, length, memory);
    chunks.check_ends().map_err(Broken::of)?;
    let file = SerializedFileReader::new(chunks.clone()).map_err(|error| {
        let why = words(error);
        Broken::of(match chunks.failure() {
            Some(failure) => failure,
            None => format!("the Parquet footer is damaged ({why}); bring the file again"),
        })
    })?;
    let metadata = file.metadata();
    let root = metadata.file_metadata().schema_descr().root_schema();
    let fields = projected(root, columns);
    let mut before: u64 =
        metadata.row_groups().iter().take(start.group).map(|group| group.num_rows().max(0) as u64).sum();
    for group in start.group..metadata.num_row_groups() {
        let from = if group == start.group { start.row } else { 0 };
        let flow = decode_group(&file, &chunks, group, &fields, from, before, sink)?;
        if flow.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        before += metadata.row_group(group).num_rows().max(0) as u64;
    }
    Ok(ControlFlow::Continue(()))
}

/// The words of an error, without the prefix of its kind.
fn words(error: ParquetError) -> String {
    match error {
        ParquetError::General(text) | ParquetError::EOF(text) | ParquetError::NYI(text) => text,
        ParquetError::External(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// The fields of the schema that are needed.
fn projected(root: &Type, columns: &[String]) -> Vec<Arc<Type>> {
    let is_needed =
        |name: &str| columns.iter().any(|path| path == name || path.split('.').next() == Some(name));
    let needed: Vec<Arc<Type>> =
        root.get_fields().iter().filter(|field| is_needed(field.name())).cloned().collect();
    // With nothing to go by, the record's own fields are the best that an error can name.
    if needed.is_empty() { root.get_fields().to_vec() } else { needed }
}

fn decode_group(
    file: &SerializedFileReader<Chunks>,
    chunks: &Chunks,
    index: usize,
    fields: &[Arc<Type>],
    from: u64,
    before: u64,
    sink: &mut Sink,
) -> Result<ControlFlow<()>, Broken> {
    let broken = |row: u64, error: ParquetError| {
        let why = words(error);
        let row = Row::Row(before + row + 1);
        match chunks.failure() {
            Some(failure) => Broken::at(row, failure),
            None => Broken::at(
                row,
                format!(
                    "row group {} of the Parquet file is damaged ({why}); bring the file again",
                    index + 1
                ),
            ),
        }
    };
    let group = file.get_row_group(index).map_err(|error| broken(from, error))?;
    let rows = group.metadata().num_rows().max(0) as u64;
    let mut columns = Columns::open(group.as_ref(), chunks, fields).map_err(|error| broken(from, error))?;
    columns.pass(from).map_err(|error| broken(from, error))?;
    for row in from..rows {
        let found = columns.next(rows - row).map_err(|error| broken(row, error))?;
        let next = match row + 1 {
            end if end == rows => Start { group: index + 1, row: 0 },
            row => Start { group: index, row },
        };
        if sink(Row::Row(before + row + 1), found, next).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// The needed columns of one row group.
struct Columns {
    /// In the schema's order; `None` for one that is nested.
    fields: Vec<(String, Option<Flat>)>,
    /// Rows of the nested ones.
    nested: Option<ReaderIter>,
    batch_rows: usize,
}

impl Columns {
    fn open(group: &dyn RowGroupReader, chunks: &Chunks, wanted: &[Arc<Type>]) -> Result<Self, ParquetError> {
        let metadata = group.metadata();
        let mut fields = Vec::new();
        let mut nested = Vec::new();
        let mut bytes = 0;
        let mut ranges = Vec::new();
        for field in wanted {
            let is_of_field = |leaf: &usize| metadata.column(*leaf).column_path().parts()[0] == field.name();
            let leaves: Vec<usize> = (0..metadata.num_columns()).filter(is_of_field).collect();
            for &leaf in &leaves {
                let column = metadata.column(leaf);
                bytes += column.uncompressed_size().max(0) as u64;
                // A damaged footer must not make the program panic, as `byte_range` does at a negative number.
                let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
                let start = u64::try_from(start).map_err(|_| damaged())?;
                let length = u64::try_from(column.compressed_size()).map_err(|_| damaged())?;
                ranges.push(start..start.checked_add(length).ok_or_else(damaged)?);
            }
            let is_flat = leaves.len() == 1 && field.is_primitive() && {
                metadata.column(leaves[0]).column_descr().max_rep_level() == 0
            };
            if is_flat {
                fields.push((field.name().to_owned(), Some(leaves[0])));
            } else {
                fields.push((field.name().to_owned(), None));
                nested.push(field.clone());
            }
        }
        chunks.expect(ranges).map_err(ParquetError::General)?;
        let rows = metadata.num_rows().max(1) as u64;
        let batch_rows = (BATCH_BYTES / (bytes / rows).max(1)).clamp(1, BATCH_ROWS) as usize;
        let nested = match nested.is_empty() {
            true => None,
            false => {
                let schema = Type::group_type_builder("schema").with_fields(nested).build()?;
                let schema = Arc::new(SchemaDescriptor::new(Arc::new(schema)));
                Some(TreeBuilder::new().with_batch_size(batch_rows).as_iter(schema, group)?)
            }
        };
        let open = |(name, leaf): (String, Option<usize>)| -> Result<_, ParquetError> {
            let Some(leaf) = leaf else { return Ok((name, None)) };
            let descr = metadata.column(leaf).column_descr_ptr();
            Ok((name, Some(Flat::new(group.get_column_reader(leaf)?, descr))))
        };
        let fields = fields.into_iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { fields, nested, batch_rows })
    }

    /// Passes over rows.
    fn pass(&mut self, rows: u64) -> Result<(), ParquetError> {
        if rows == 0 {
            return Ok(());
        }
        for flat in self.fields.iter_mut().filter_map(|(_, flat)| flat.as_mut()) {
            flat.pass(rows as usize)?;
        }
        if let Some(nested) = &mut self.nested {
            nested.nth(rows as usize - 1).transpose()?;
        }
        Ok(())
    }

    /// The next row, of which so many are left.
    fn next(&mut self, left: u64) -> Result<Found, ParquetError> {
        let wanted = self.batch_rows.min(left as usize);
        let mut nested = match &mut self.nested {
            Some(rows) => {
                let row = rows.next().transpose()?.ok_or_else(|| ends_early("the nested columns"))?;
                row.into_columns().into_iter()
            }
            None => Vec::new().into_iter(),
        };
        let mut record = Map::with_capacity(self.fields.len());
        let mut bad = None;
        for (name, flat) in &mut self.fields {
            let value = match flat {
                Some(flat) => match flat.next(wanted)?.ok_or_else(|| ends_early(name))? {
                    Ok(value) => value,
                    Err(reason) => {
                        bad = Some(format!("{reason} in column {name}"));
                        Value::Null
                    }
                },
                None => nested.next().map_or(Value::Null, |(_, field)| value(field)),
            };
            record.insert(name.clone(), value);
        }
        Ok(bad.map_or_else(|| Found::Record(record), Found::Bad))
    }
}

fn damaged() -> ParquetError {
    ParquetError::General("a column's place is no number of bytes".into())
}

fn ends_early(column: &str) -> ParquetError {
    ParquetError::General(format!("{column} has fewer rows than the row group"))
}

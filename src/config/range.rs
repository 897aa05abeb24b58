//! Numbers that must lie in a range. Knows no setting.

use std::fmt;
use std::ops::{Bound, RangeBounds};

use super::adapter::FieldError;

/// The value, when it lies in the range; what is no number lies in none. `field` is the place that an error names.
///
/// # Errors
/// It lies outside: the place, the value and the range.
pub(super) fn within<T: Copy + PartialOrd + fmt::Display>(
    field: &str,
    value: T,
    range: impl RangeBounds<T>,
) -> Result<T, FieldError> {
    if range.contains(&value) {
        return Ok(value);
    }
    let low = match range.start_bound() {
        Bound::Included(low) => format!("from {low}"),
        Bound::Excluded(low) => format!("above {low}"),
        Bound::Unbounded => "any".into(),
    };
    let high = match range.end_bound() {
        Bound::Included(high) => format!(" to {high}"),
        Bound::Excluded(high) => format!(" to below {high}"),
        Bound::Unbounded => String::new(),
    };
    Err(FieldError { field: field.to_owned(), message: format!("is {value}; use a number {low}{high}") })
}

//! y = x·Wᵀ for all rows of a batch in one pass over W, with each row's adapter added in the same pass.
//!
//! The weight is cut into bands of rows; a thread unpacks a band to f32 (when it is not f32 already), multiplies
//! all activations with it, and adds the adapters' part of the same columns while they are hot.

use std::cell::RefCell;
use std::ops::Range;

use super::activation::multiply;
use super::dot::{TILE_N, dots};
use super::dot_packed::packed_dots;
use super::unpack::Rows;
use super::{Shared, multiversion, parallel, parallel_rows};

/// What one adapter adds to some rows of the batch.
pub(crate) struct LowRank<'a> {
    /// Rows of the batch.
    pub(crate) rows: Range<usize>,
    /// `[r, k]`.
    pub(crate) a: &'a [f32],
    /// `[r, n]`: B transposed, times the scale.
    pub(crate) b: &'a [f32],
    /// DoRA: `[n]`, what the sum of base and low-rank part is multiplied with.
    pub(crate) column_scale: Option<&'a [f32]>,
}

/// A product to compute.
pub(crate) struct Product<'a> {
    /// `[m, k]`.
    pub(crate) x: &'a [f32],
    pub(crate) m: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
    /// `[n, k]`.
    pub(crate) weight: Rows<'a>,
    /// `[n]`, added last.
    pub(crate) bias: Option<&'a [f32]>,
    /// At most one entry covers a row.
    pub(crate) low_rank: &'a [LowRank<'a>],
}

thread_local! {
    /// One unpacked band, kept from call to call.
    static BAND: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Product<'_> {
    /// `[m, n]`, row-major.
    #[expect(unsafe_code, reason = "threads write disjoint columns of one buffer")]
    pub(crate) fn compute(&self) -> Vec<f32> {
        let (m, k, n) = (self.m, self.k, self.n);
        assert_eq!(self.x.len(), m * k, "activations have the weight's columns");
        assert_eq!(self.weight.count(k), n, "the weight has the rows that it says");
        let mut y = vec![0f32; m * n];
        // A few rows are multiplied from the first cache as the band streams by; many rows want a band that is
        // worth unpacking once and fits the second cache.
        let band = if m <= 8 { TILE_N } else { (65_536 / k.max(1)).clamp(TILE_N, 64) / TILE_N * TILE_N };
        let projections = self.project();
        let out = Shared::new(&mut y);
        parallel(n.div_ceil(band), m * k * n, |bands| {
            let columns = bands.start * band..(bands.end * band).min(n);
            // SAFETY: column ranges of different threads are disjoint, and element (i, j) is written by the thread
            // that has column j alone; the sizes are asserted above.
            let in_registers = unsafe {
                packed_dots(
                    self.weight,
                    columns.clone(),
                    (m, k),
                    self.x.as_ptr(),
                    out.pointer(columns.start),
                    n,
                )
            };
            for first in columns.clone().step_by(band).filter(|_| !in_registers) {
                let count = band.min(columns.end - first);
                // SAFETY: as above.
                self.with_band(first, count, |w| unsafe {
                    dots(m, count, k, self.x.as_ptr(), w.as_ptr(), out.pointer(first), n);
                });
            }
            for row in 0..m {
                // SAFETY: the columns of this thread, as above.
                let y = unsafe { out.part(row * n + columns.start..row * n + columns.end) };
                for (term, projected) in self.low_rank.iter().zip(&projections) {
                    if term.rows.contains(&row) {
                        let rank = term.a.len() / k;
                        let at = (row - term.rows.start) * rank;
                        add_low_rank(y, &projected[at..at + rank], term.b, n, columns.start);
                        if let Some(scale) = term.column_scale {
                            multiply(y, &scale[columns.clone()]);
                        }
                    }
                }
                if let Some(bias) = self.bias {
                    add(y, &bias[columns.clone()]);
                }
            }
        });
        y
    }

    /// x·Aᵀ for each adapter's rows: `[rows, r]` each.
    fn project(&self) -> Vec<Vec<f32>> {
        let of = |term: &LowRank| {
            let rank = term.a.len() / self.k;
            assert!(
                term.rows.end <= self.m && term.b.len() == rank * self.n,
                "an adapter's shapes fit the layer"
            );
            thin(&self.x[term.rows.start * self.k..term.rows.end * self.k], term.a, self.k)
        };
        self.low_rank.iter().map(of).collect()
    }

    fn with_band(&self, first: usize, count: usize, f: impl FnOnce(&[f32])) {
        if let Some(all) = self.weight.as_f32() {
            return f(&all[first * self.k..(first + count) * self.k]);
        }
        BAND.with_borrow_mut(|band| {
            if band.len() < count * self.k {
                band.resize(count * self.k, 0.0);
            }
            for (i, row) in band.chunks_exact_mut(self.k).take(count).enumerate() {
                self.weight.unpack(first + i, self.k, row);
            }
            f(&band[..count * self.k]);
        });
    }
}

/// x·aᵀ for a few rows `a` `[r, k]`: `[rows, r]`.
#[expect(unsafe_code, reason = "calls the tile kernel; threads write disjoint rows")]
pub(crate) fn thin(x: &[f32], a: &[f32], k: usize) -> Vec<f32> {
    let (rows, rank) = (x.len() / k, a.len() / k);
    let mut y = vec![0f32; rows * rank];
    let out = Shared::new(&mut y);
    parallel_rows(rows, rows * rank * k, |part| {
        let x = &x[part.start * k..part.end * k];
        // SAFETY: `part` rows of x, `rank` rows of a, and this thread's rows of the output.
        unsafe {
            let y = out.part(part.start * rank..part.end * rank).as_mut_ptr();
            dots(part.len(), rank, k, x.as_ptr(), a.as_ptr(), y, rank);
        }
    });
    y
}

multiversion! {
    fn add_low_rank(y: &mut [f32], projected: &[f32], b: &[f32], n: usize, first: usize) {
        for (r, &p) in projected.iter().enumerate() {
            let row = &b[r * n + first..r * n + first + y.len()];
            for (y, &b) in y.iter_mut().zip(row) {
                *y = p.mul_add(b, *y);
            }
        }
    }
}

multiversion! {
    fn add(y: &mut [f32], bias: &[f32]) {
        for (y, &b) in y.iter_mut().zip(bias) {
            *y += b;
        }
    }
}

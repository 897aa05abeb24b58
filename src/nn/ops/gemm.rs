//! Matrix products of many rows, for training: packed panels and one register tile, after Goto and van de Geijn
//! (2008). Serving's few rows have kernels of their own (`dot`, `dot_packed`).
//!
//! Every element is one chain of fused multiply-adds over blocks of [`BLOCK`] terms, whatever the shape of the
//! rest: the same bits on every instruction set and with any number of rows or threads.

mod tile;

use std::cell::RefCell;
use std::ops::Range;

use self::tile::{Left, TILE_M, TILE_N, tile};
use super::unpack::Rows;
use super::{Shared, parallel_rows};

/// Terms that are added up before the sum goes to memory: a panel of weights then fits the first cache.
const BLOCK: usize = 192;
/// Multiply-adds that take about as long as packing one element.
const PACKING: usize = 24;
/// Elements up to which a left operand is packed at once.
const WHOLE_LEFT: usize = 1 << 20;

/// A matrix whose element (i, p) lies at `i * row + p * step`.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row: usize,
    pub(crate) step: usize,
}

impl<'a> Strided<'a> {
    /// A matrix with rows of `width` elements.
    pub(crate) fn rows(data: &'a [f32], width: usize) -> Self {
        Self { data, row: width, step: 1 }
    }

    /// The transpose of a matrix with rows of `width` elements.
    pub(crate) fn transposed(data: &'a [f32], width: usize) -> Self {
        Self { data, row: 1, step: width }
    }

    fn end(&self, m: usize, k: usize) -> usize {
        if m == 0 || k == 0 { 0 } else { (m - 1) * self.row + (k - 1) * self.step + 1 }
    }
}

/// c[i, j] (+)= Σ_p a[i, p] · b[p, j] on this thread, nothing packed: for small matrices. `b` has rows of `b_row`
/// elements, `c` of `c_row`.
#[expect(unsafe_code, reason = "calls the tile kernel on checked slices")]
pub(crate) fn small(
    (m, n, k): (usize, usize, usize),
    a: Strided<'_>,
    (b, b_row): (&[f32], usize),
    (c, c_row): (&mut [f32], usize),
    add: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.end(m, k) <= a.data.len(), "the left operand has {m} x {k} elements");
    assert!(k == 0 || (k - 1) * b_row + n <= b.len(), "the right operand has {k} x {n} elements");
    assert!((m - 1) * c_row + n <= c.len(), "the result has {m} x {n} elements");
    for i in (0..m).step_by(TILE_M) {
        for j in (0..n).step_by(TILE_N) {
            // SAFETY: the tile lies inside the matrices by the assertions above.
            unsafe {
                let a = Left { at: a.data.as_ptr().add(i * a.row), row: a.row, step: a.step };
                let size = (TILE_M.min(m - i), TILE_N.min(n - j), k);
                tile(
                    size,
                    a,
                    b.as_ptr().wrapping_add(j),
                    b_row,
                    c.as_mut_ptr().add(i * c_row + j),
                    c_row,
                    add,
                );
            }
        }
    }
}

/// A low-rank term of a product: `left` `[m, r]` times `right` `[r, n]`, added in the same pass.
#[derive(Clone, Copy)]
pub(crate) struct LowRankTerm<'a> {
    pub(crate) left: &'a [f32],
    pub(crate) right: &'a [f32],
    pub(crate) rank: usize,
}

thread_local! {
    /// The packed left operand, kept from call to call.
    static LEFT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// A packed block of the right operand that all threads read.
    static RIGHT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// A packed panel of the right operand, and rows on their way there.
    static PANEL: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

fn at_least(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if buffer.len() < length {
        // Not `resize`: what is in it is not worth copying.
        *buffer = vec![0f32; length];
    }
    &mut buffer[..length]
}

/// The passes of a trainer, for the scratch memory that kernels keep from call to call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TrainScratch {
    /// Rows of a pass.
    pub(crate) tokens: usize,
    /// The largest number of columns or rows of a linear layer.
    pub(crate) widest: usize,
    pub(crate) rank: usize,
    /// Rows of the longest sequence.
    pub(crate) longest: usize,
    pub(crate) head_dim: usize,
    pub(crate) threads: usize,
}

impl TrainScratch {
    /// Bytes of all of it.
    pub(crate) fn bytes(&self) -> u64 {
        let depth = self.widest + self.rank;
        let left = (self.tokens.div_ceil(TILE_M) * TILE_M * depth).max(WHOLE_LEFT);
        let right = BLOCK * self.widest.div_ceil(TILE_N) * TILE_N;
        let each = 2 * TILE_N * depth + super::attend_rows::scratch_elements(self.longest, self.head_dim);
        4 * (left + right + self.threads * each) as u64
    }
}

/// y = x·Wᵀ + low rank + bias: `x` `[m, k]`, `w` `[n, k]`; gives `[m, n]`.
#[expect(unsafe_code, reason = "threads write disjoint columns; calls the tile kernel")]
pub(crate) fn x_wt(
    x: &[f32],
    w: Rows<'_>,
    k: usize,
    term: Option<LowRankTerm<'_>>,
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.count(k));
    let rank = term.map_or(0, |t| t.rank);
    let depth = k + rank;
    check_term(term, m, n);
    let mut y = vec![0f32; m * n];
    let out = Shared::new(&mut y);
    with_packed_left(x, k, k, term.map(|t| t.left), rank, m, |left| {
        parallel_rows(n.div_ceil(TILE_N), m * n * depth, |panels| {
            PANEL.with_borrow_mut(|(panel, rows)| {
                let panel = at_least(panel, depth * TILE_N);
                for j in panels.map(|p| p * TILE_N) {
                    let columns = j..(j + TILE_N).min(n);
                    pack_transposed(w, k, columns.clone(), rows, panel);
                    if let Some(term) = term {
                        pack_rows(term.right, n, columns.clone(), &mut panel[k * TILE_N..]);
                    }
                    for from in (0..depth).step_by(BLOCK) {
                        let terms = BLOCK.min(depth - from);
                        // SAFETY: packed panels of `depth` terms each; columns `columns` of this thread alone.
                        unsafe {
                            let b = panel.as_ptr().add(from * TILE_N);
                            over_rows(left, depth, from, terms, m, b, &out, n, columns.clone(), from > 0);
                        }
                    }
                    if let Some(bias) = bias {
                        for i in 0..m {
                            // SAFETY: as above.
                            let row = unsafe { out.part(i * n + columns.start..i * n + columns.end) };
                            row.iter_mut().zip(&bias[columns.clone()]).for_each(|(y, b)| *y += b);
                        }
                    }
                }
            });
        });
    });
    y
}

/// y = x·W + low rank: `x` `[m, n]`, `w` `[n, k]`; gives `[m, k]`. w is packed a block of rows at a time, and so is
/// a wide x, of which no second copy is made.
#[expect(unsafe_code, reason = "threads write disjoint parts; calls the tile kernel")]
pub(crate) fn x_w(x: &[f32], w: Rows<'_>, k: usize, term: Option<LowRankTerm<'_>>) -> Vec<f32> {
    let n = w.count(k);
    let m = x.len() / n.max(1);
    let rank = term.map_or(0, |t| t.rank);
    check_term(term, m, k);
    let mut y = vec![0f32; m * k];
    let out = Shared::new(&mut y);
    let panels = k.div_ceil(TILE_N);
    // `left` is packed with `depth` terms a row, of which those from `from` on meet the block.
    let block =
        |left: &[f32], (depth, from): (usize, usize), right: BlockRows<'_>, terms: usize, add: bool| {
            RIGHT.with_borrow_mut(|packed| {
                let packed = at_least(packed, BLOCK * panels * TILE_N);
                pack_block(right, k, terms, packed);
                let packed = &*packed;
                parallel_rows(panels, m * k * terms, |some| {
                    for panel in some {
                        let columns = panel * TILE_N..((panel + 1) * TILE_N).min(k);
                        // SAFETY: a packed panel of `terms` rows; columns `columns` of this thread alone.
                        unsafe {
                            let b = packed.as_ptr().add(panel * terms * TILE_N);
                            over_rows(left, depth, from, terms, m, b, &out, k, columns, add);
                        }
                    }
                });
            });
        };
    let blocks = |n: usize| (0..n).step_by(BLOCK).map(move |from| (from, BLOCK.min(n - from)));
    if m * n <= WHOLE_LEFT {
        with_packed_left(x, n, n, None, 0, m, |left| {
            for (from, terms) in blocks(n) {
                block(left, (n, from), BlockRows::Weight(w, from), terms, from > 0);
            }
        });
    } else {
        for (from, terms) in blocks(n) {
            with_packed_left(&x[from..], n, terms, None, 0, m, |left| {
                block(left, (terms, 0), BlockRows::Weight(w, from), terms, from > 0);
            });
        }
    }
    if let Some(term) = term {
        for (from, terms) in blocks(rank) {
            with_packed_left(&term.left[from..], rank, terms, None, 0, m, |left| {
                block(left, (terms, 0), BlockRows::Dense(&term.right[from * k..]), terms, true);
            });
        }
    }
    y
}

/// Where the rows of a block of the right operand come from.
#[derive(Clone, Copy)]
enum BlockRows<'a> {
    /// A weight, from this row on.
    Weight(Rows<'a>, usize),
    /// Rows as they lie.
    Dense(&'a [f32]),
}

/// Packs `terms` rows of `k` columns into panels: `[panel][row][column]`.
#[expect(unsafe_code, reason = "threads write disjoint rows")]
fn pack_block(from: BlockRows<'_>, k: usize, terms: usize, packed: &mut [f32]) {
    let to = Shared::new(packed);
    parallel_rows(terms, terms * k * PACKING, |some| {
        PANEL.with_borrow_mut(|(_, row)| {
            for p in some {
                let source: &[f32] = match from {
                    BlockRows::Dense(all) => &all[p * k..(p + 1) * k],
                    BlockRows::Weight(w, first) => match w.as_f32() {
                        Some(all) => &all[(first + p) * k..(first + p + 1) * k],
                        None => {
                            let row = at_least(row, k);
                            w.unpack(first + p, k, row);
                            row
                        }
                    },
                };
                for (panel, part) in source.chunks(TILE_N).enumerate() {
                    let at = (panel * terms + p) * TILE_N;
                    // SAFETY: row p of each panel, which this thread has alone.
                    unsafe { to.part(at..at + part.len()) }.copy_from_slice(part);
                }
            }
        });
    });
}

/// aᵀ·b over all rows: `a` `[t, m]` with few columns, `b` `[t, n]`; gives `[m, n]`.
#[expect(unsafe_code, reason = "threads write disjoint columns; calls the tile kernel")]
pub(crate) fn at_b(a: &[f32], b: &[f32], m: usize, n: usize) -> Vec<f32> {
    let t = a.len() / m.max(1);
    assert_eq!(b.len(), t * n, "both operands have {t} rows");
    let mut y = vec![0f32; m * n];
    let out = Shared::new(&mut y);
    parallel_rows(n.div_ceil(TILE_N), m * n * t, |panels| {
        for j in panels.map(|p| p * TILE_N) {
            let width = TILE_N.min(n - j);
            for i in (0..m).step_by(TILE_M) {
                let rows = TILE_M.min(m - i);
                for from in (0..t).step_by(BLOCK) {
                    let terms = BLOCK.min(t - from);
                    // SAFETY: `terms` rows of a and b from row `from`, inside by the assertion; this thread has
                    // the columns of its panels alone.
                    unsafe {
                        let a = Left { at: a.as_ptr().add(from * m + i), row: 1, step: m };
                        let c = out.pointer(i * n + j);
                        tile((rows, width, terms), a, b.as_ptr().add(from * n + j), n, c, n, from > 0);
                    }
                }
            }
        }
    });
    y
}

fn check_term(term: Option<LowRankTerm<'_>>, m: usize, n: usize) {
    if let Some(t) = term {
        assert!(
            t.left.len() == m * t.rank && t.right.len() == t.rank * n,
            "the low-rank term fits the product"
        );
    }
}

/// Packs `k` columns of x, whose rows begin every `row` elements, with the columns of `more` behind them, into
/// panels of `TILE_M` rows: `[panel][column][row]`.
#[expect(unsafe_code, reason = "threads write disjoint panels")]
fn with_packed_left(
    x: &[f32],
    row: usize,
    k: usize,
    more: Option<&[f32]>,
    rank: usize,
    m: usize,
    f: impl FnOnce(&[f32]),
) {
    let depth = k + rank;
    LEFT.with_borrow_mut(|left| {
        let left = at_least(left, m.div_ceil(TILE_M) * TILE_M * depth);
        let out = Shared::new(left);
        parallel_rows(m.div_ceil(TILE_M), m * depth * PACKING, |panels| {
            for panel in panels {
                // SAFETY: each thread has its own panels.
                let to = unsafe { out.part(panel * TILE_M * depth..(panel + 1) * TILE_M * depth) };
                let rows = panel * TILE_M..((panel + 1) * TILE_M).min(m);
                if rows.len() < TILE_M {
                    to.fill(0.0);
                }
                interleave(&x[rows.start * row..], (rows.len(), row, k), &mut to[..k * TILE_M]);
                if let Some(more) = more {
                    interleave(&more[rows.start * rank..], (rows.len(), rank, rank), &mut to[k * TILE_M..]);
                }
            }
        });
        f(left);
    });
}

fn interleave(x: &[f32], (rows, row, width): (usize, usize, usize), to: &mut [f32]) {
    for from in (0..width).step_by(16) {
        let count = 16.min(width - from);
        for i in 0..rows {
            for (p, &value) in x[i * row + from..i * row + from + count].iter().enumerate() {
                to[(from + p) * TILE_M + i] = value;
            }
        }
    }
}

/// Packs rows `columns` of w, transposed, into one panel: `[column of w][row of w]`.
fn pack_transposed(w: Rows<'_>, k: usize, columns: Range<usize>, rows: &mut Vec<f32>, panel: &mut [f32]) {
    let count = columns.len();
    let source: &[f32] = match w.as_f32() {
        Some(all) => &all[columns.start * k..columns.end * k],
        None => {
            let rows = at_least(rows, TILE_N * k);
            for (row, to) in columns.zip(rows.chunks_exact_mut(k)) {
                w.unpack(row, k, to);
            }
            &rows[..count * k]
        }
    };
    for from in (0..k).step_by(16) {
        let width = 16.min(k - from);
        for (j, row) in source.chunks_exact(k).enumerate() {
            for (p, &value) in row[from..from + width].iter().enumerate() {
                panel[(from + p) * TILE_N + j] = value;
            }
        }
    }
}

/// Copies columns of a matrix with rows of `width` elements into one panel.
fn pack_rows(matrix: &[f32], width: usize, columns: Range<usize>, panel: &mut [f32]) {
    for (row, to) in matrix.chunks_exact(width).zip(panel.chunks_exact_mut(TILE_N)) {
        to[..columns.len()].copy_from_slice(&row[columns.clone()]);
    }
}

/// One packed panel of the right operand against all rows of the packed left one.
///
/// # Safety
/// `left` holds panels of `depth` terms for `m` rows; `b` holds `terms` rows of [`TILE_N`]; no other thread may
/// touch the `columns` of `out`, which has rows of `width` elements.
#[expect(unsafe_code, reason = "calls the tile kernel")]
#[expect(clippy::too_many_arguments, reason = "the parts of one inner loop")]
unsafe fn over_rows(
    left: &[f32],
    depth: usize,
    from: usize,
    terms: usize,
    m: usize,
    b: *const f32,
    out: &Shared<f32>,
    width: usize,
    columns: Range<usize>,
    add: bool,
) {
    for i in (0..m).step_by(TILE_M) {
        // SAFETY: the caller's promise; a panel begins every TILE_M * depth elements.
        unsafe {
            let a = Left { at: left.as_ptr().add(i * depth + from * TILE_M), row: 1, step: TILE_M };
            let size = (TILE_M.min(m - i), columns.len(), terms);
            tile(size, a, b, TILE_N, out.pointer(i * width + columns.start), width, add);
        }
    }
}

#[cfg(test)]
mod tests;

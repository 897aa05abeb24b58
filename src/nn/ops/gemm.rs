//! Matrix products of many rows, for training: packed panels and one register tile, after Goto and van de Geijn
//! (2008). Serving's few rows have kernels of their own (`dot`, `dot_packed`).
//!
//! Every element is one chain of fused multiply-adds over blocks of [`BLOCK`] terms, whatever the shape of the
//! rest: the same bits on every instruction set and with any number of rows or threads.

mod pack;
mod tile;

use std::cell::RefCell;
use std::ops::Range;

use self::pack::{STRIP, transpose};
use self::tile::{Left, TILE_M, TILE_N, tile};
use super::unpack::Rows;
use super::{Shared, parallel_rows};

/// Terms that are added up before the sum goes to memory: a panel of weights then fits the first cache.
const BLOCK: usize = 192;
/// Multiply-adds that take about as long as packing one element.
const PACKING: usize = 12;
/// Rows of a product that are added up before its columns are left, where both operands are read as they lie.
const STRIPE: usize = 16;
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
    if buffer.len() < length + 15 {
        // Not `resize`: what is in it is not worth copying.
        *buffer = vec![0f32; length + 15];
    }
    let from = buffer.as_ptr().align_offset(64);
    &mut buffer[from..from + length]
}

/// A matrix of `elements` that `f` writes, every one.
#[expect(unsafe_code, reason = "no zeros are written first: that took a thirtieth of a step")]
fn written(elements: usize, f: impl FnOnce(&Shared<f32>)) -> Vec<f32> {
    let mut y = Vec::with_capacity(elements);
    f(&Shared::unwritten(&mut y));
    // SAFETY: the capacity is there, and `f` has written it all.
    unsafe { y.set_len(elements) };
    y
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
    assert!(depth > 0, "a product has terms");
    written(m * n, |out| {
        with_packed_left(x, (k, k), term.map(|t| t.left), rank, m, |left| {
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
                                over_rows(left, depth, from, terms, m, b, out, n, columns.clone(), from > 0);
                            }
                        }
                        if let Some(bias) = bias {
                            for i in 0..m {
                                // SAFETY: as above, and written by now.
                                let row = unsafe { out.part(i * n + columns.start..i * n + columns.end) };
                                row.iter_mut().zip(&bias[columns.clone()]).for_each(|(y, b)| *y += b);
                            }
                        }
                    }
                });
            });
        });
    })
}

/// y = x·W + low rank: `x` `[m, n]`, `w` `[n, k]`; gives `[m, k]`. w is packed a block of rows at a time, and so is
/// a wide x, of which no second copy is made.
pub(crate) fn x_w(x: &[f32], w: Rows<'_>, k: usize, term: Option<LowRankTerm<'_>>) -> Vec<f32> {
    let n = w.count(k);
    let m = x.len() / n.max(1);
    let rank = term.map_or(0, |t| t.rank);
    check_term(term, m, k);
    assert!(n > 0, "a product has terms");
    let blocks = |n: usize| (0..n).step_by(BLOCK).map(move |from| (from, BLOCK.min(n - from)));
    written(m * k, |out| {
        if m * n <= WHOLE_LEFT {
            with_packed_left(x, (n, n), None, 0, m, |left| {
                for (from, terms) in blocks(n) {
                    over_block(left, (n, from), BlockRows::Weight(w, from), (m, k, terms), out, from > 0);
                }
            });
        } else {
            for (from, terms) in blocks(n) {
                with_packed_left(&x[from..], (n, terms), None, 0, m, |left| {
                    over_block(left, (terms, 0), BlockRows::Weight(w, from), (m, k, terms), out, from > 0);
                });
            }
        }
        if let Some(term) = term {
            for (from, terms) in blocks(rank) {
                with_packed_left(&term.left[from..], (rank, terms), None, 0, m, |left| {
                    let right = BlockRows::Dense(&term.right[from * k..]);
                    over_block(left, (terms, 0), right, (m, k, terms), out, true);
                });
            }
        }
    })
}

/// Packs `terms` rows of the right operand and multiplies them with all `m` rows of the left one, which is packed
/// with `depth` terms a row, of which those from `from` on meet the block.
#[expect(unsafe_code, reason = "threads write disjoint columns; calls the tile kernel")]
fn over_block(
    left: &[f32],
    (depth, from): (usize, usize),
    right: BlockRows<'_>,
    (m, n, terms): (usize, usize, usize),
    out: &Shared<f32>,
    add: bool,
) {
    let panels = n.div_ceil(TILE_N);
    RIGHT.with_borrow_mut(|packed| {
        let packed = at_least(packed, BLOCK * panels * TILE_N);
        pack_block(right, n, terms, packed);
        let packed = &*packed;
        parallel_rows(panels, m * n * terms, |some| {
            for panel in some {
                let columns = panel * TILE_N..((panel + 1) * TILE_N).min(n);
                // SAFETY: a packed panel of `terms` rows; columns `columns` of this thread alone.
                unsafe {
                    let b = packed.as_ptr().add(panel * terms * TILE_N);
                    over_rows(left, depth, from, terms, m, b, out, n, columns, add);
                }
            }
        });
    });
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
    parallel_rows(terms.div_ceil(STRIP), terms * k * PACKING, |some| {
        PANEL.with_borrow_mut(|(_, unpacked)| {
            for first in some.map(|strip| strip * STRIP) {
                let rows = first..(first + STRIP).min(terms);
                let source: &[f32] = match from {
                    BlockRows::Dense(all) => &all[rows.start * k..rows.end * k],
                    BlockRows::Weight(w, above) => {
                        strip(w, k, above + rows.start..above + rows.end, unpacked)
                    }
                };
                for j in (0..k).step_by(TILE_N) {
                    let at = (j * terms) + rows.start * TILE_N;
                    // SAFETY: rows `rows` of each panel, which this thread has alone.
                    let to = unsafe { to.part(at..at + rows.len() * TILE_N) };
                    pack_rows(source, k, j..(j + TILE_N).min(k), to);
                }
            }
        });
    });
}

/// Rows of a weight of `k` columns, as they lie or unpacked.
fn strip<'a>(w: Rows<'a>, k: usize, rows: Range<usize>, unpacked: &'a mut Vec<f32>) -> &'a [f32] {
    match w.as_f32() {
        Some(all) => &all[rows.start * k..rows.end * k],
        None => {
            let to = at_least(unpacked, rows.len() * k);
            rows.zip(to.chunks_exact_mut(k)).for_each(|(row, to)| w.unpack(row, k, to));
            to
        }
    }
}

/// aᵀ·b over all rows: `a` `[t, m]`, `b` `[t, n]`; gives `[m, n]`.
pub(crate) fn at_b(a: &[f32], b: &[f32], m: usize, n: usize) -> Vec<f32> {
    let t = a.len() / m.max(1);
    assert!(t > 0 && b.len() == t * n, "both operands have {t} rows, at least one");
    written(m * n, |out| {
        if m <= 2 * TILE_M {
            at_b_narrow(a, b, (t, m, n), out);
        } else {
            for from in (0..t).step_by(BLOCK) {
                let terms = BLOCK.min(t - from);
                with_packed_columns(&a[from * m..(from + terms) * m], m, |left| {
                    let right = BlockRows::Dense(&b[from * n..]);
                    over_block(left, (terms, 0), right, (m, n, terms), out, from > 0);
                });
            }
        }
    })
}

/// [`at_b`] with few columns of a, such as a low-rank term has: b goes by once, as it lies.
#[expect(unsafe_code, reason = "threads write disjoint columns; calls the tile kernel")]
fn at_b_narrow(a: &[f32], b: &[f32], (t, m, n): (usize, usize, usize), out: &Shared<f32>) {
    // Few wide parts: a row of b goes by in long runs.
    let panels = n.div_ceil(TILE_N);
    let each = panels.div_ceil(4);
    parallel_rows(panels.div_ceil(each), m * n * t, |parts| {
        let panels = parts.start * each..(parts.end * each).min(panels);
        for from in (0..t).step_by(STRIPE) {
            let terms = STRIPE.min(t - from);
            for j in panels.clone().map(|p| p * TILE_N) {
                let width = TILE_N.min(n - j);
                for i in (0..m).step_by(TILE_M) {
                    let rows = TILE_M.min(m - i);
                    // SAFETY: `terms` rows of a and b from row `from`, inside by the assertion of `at_b`; this
                    // thread has the columns of its panels alone.
                    unsafe {
                        let a = Left { at: a.as_ptr().add(from * m + i), row: 1, step: m };
                        let c = out.pointer(i * n + j);
                        tile((rows, width, terms), a, b.as_ptr().add(from * n + j), n, c, n, from > 0);
                    }
                }
            }
        }
    });
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
    (row, k): (usize, usize),
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
                let (of_x, of_more) = to.split_at_mut(k * TILE_M);
                transpose((rows.len(), k), (&x[rows.start * row..], row), (of_x, TILE_M));
                if let Some(more) = more {
                    transpose((rows.len(), rank), (&more[rows.start * rank..], rank), (of_more, TILE_M));
                }
            }
        });
        f(left);
    });
}

/// Packs the columns of `a` `[terms, m]` into panels of `TILE_M`: `[panel][row][column]`.
#[expect(unsafe_code, reason = "threads write disjoint panels")]
fn with_packed_columns(a: &[f32], m: usize, f: impl FnOnce(&[f32])) {
    let terms = a.len() / m;
    LEFT.with_borrow_mut(|left| {
        let left = at_least(left, m.div_ceil(TILE_M) * TILE_M * terms);
        let out = Shared::new(left);
        parallel_rows(m.div_ceil(TILE_M), m * terms * PACKING, |panels| {
            for panel in panels {
                // SAFETY: each thread has its own panels.
                let to = unsafe { out.part(panel * TILE_M * terms..(panel + 1) * TILE_M * terms) };
                let columns = panel * TILE_M..((panel + 1) * TILE_M).min(m);
                for (row, to) in a.chunks_exact(m).zip(to.chunks_exact_mut(TILE_M)) {
                    to[..columns.len()].copy_from_slice(&row[columns.clone()]);
                }
            }
        });
        f(left);
    });
}

/// Packs rows `columns` of w, transposed, into one panel: `[column of w][row of w]`.
fn pack_transposed(w: Rows<'_>, k: usize, columns: Range<usize>, rows: &mut Vec<f32>, panel: &mut [f32]) {
    let count = columns.len();
    let source = strip(w, k, columns, rows);
    for first in (0..count).step_by(STRIP) {
        let size = (STRIP.min(count - first), k);
        transpose(size, (&source[first * k..], k), (&mut panel[first..], TILE_N));
    }
}

/// Copies columns of a matrix with rows of `width` elements into one panel.
fn pack_rows(matrix: &[f32], width: usize, columns: Range<usize>, panel: &mut [f32]) {
    for (row, to) in matrix.chunks_exact(width).zip(panel.chunks_exact_mut(TILE_N)) {
        match row[columns.start..].first_chunk::<TILE_N>() {
            // A copy of known length takes no call.
            Some(whole) if columns.len() == TILE_N => to.copy_from_slice(whole),
            _ => to[..columns.len()].copy_from_slice(&row[columns.clone()]),
        }
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

//! Causal attention among the rows of a batch, forward and backward, without a cache: training's attention. As
//! in FlashAttention (Dao et al. 2022), what is kept from the forward pass is one number a row and head, and
//! scores are computed again, a block of queries at a time.

use std::cell::RefCell;
use std::ops::Range;

use super::gemm::{Strided, small};
use super::math::{exp, lane_sum};
use super::{Shared, multiversion, parallel_rows};

/// Queries in a block.
const BLOCK: usize = 48;

/// Shapes of one layer's attention.
pub(crate) struct AttendRows<'a> {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    /// One a head, or none.
    pub(crate) slopes: &'a [f32],
    pub(crate) window: Option<usize>,
    /// Rows of each sequence.
    pub(crate) sequences: &'a [Range<usize>],
}

/// Gradients by queries `[rows, heads, D]`, keys and values `[rows, kv_heads, D]`.
pub(crate) struct Gradients {
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

/// What the forward pass gave, for the backward pass.
#[derive(Clone, Copy)]
pub(crate) struct Forward<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    /// `[rows, heads, D]`.
    pub(crate) mixed: &'a [f32],
    /// `[rows, heads]`.
    pub(crate) log_sums: &'a [f32],
}

#[derive(Default)]
struct Scratch {
    buffers: [Vec<f32>; 12],
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Scratch {
    fn get<const N: usize>(&mut self, lengths: [usize; N]) -> [&mut [f32]; N] {
        let mut buffers = self.buffers.iter_mut();
        lengths.map(|length| {
            let buffer = buffers.next().expect("no task needs more buffers");
            if buffer.len() < length {
                buffer.resize(length, 0.0);
            }
            &mut buffer[..length]
        })
    }
}

/// Elements of scratch memory that one thread keeps for sequences of at most `length` rows.
pub(crate) fn scratch_elements(length: usize, head_dim: usize) -> usize {
    10 * length * head_dim + 2 * BLOCK * length
}

impl AttendRows<'_> {
    fn work(&self) -> usize {
        self.sequences.iter().map(|s| s.len() * s.len()).sum::<usize>() * self.heads * self.head_dim
    }

    /// Softmax(q·kᵀ + bias)·v as `[rows, heads, D]`, and the logarithm of each row's and head's sum of
    /// exponentials `[rows, heads]`.
    #[expect(unsafe_code, reason = "threads write disjoint heads")]
    pub(crate) fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (heads, d) = (self.heads, self.head_dim);
        let rows = q.len() / (heads * d);
        let (mut mixed, mut log_sums) = (vec![0f32; q.len()], vec![0f32; rows * heads]);
        let (to_mixed, to_sums) = (Shared::new(&mut mixed), Shared::new(&mut log_sums));
        parallel_rows(self.sequences.len() * heads, 2 * self.work(), |tasks| {
            SCRATCH.with_borrow_mut(|scratch| {
                for task in tasks {
                    let (rows, head) = (&self.sequences[task / heads], task % heads);
                    let (length, kv_head) = (rows.len(), head * self.kv_heads / heads);
                    let [query, key, value, y, scores] =
                        scratch.get([length * d, length * d, length * d, BLOCK * d, BLOCK * length]);
                    gather(q, rows, heads, head, d, query);
                    gather_transposed(k, rows, self.kv_heads, kv_head, d, key);
                    gather(v, rows, self.kv_heads, kv_head, d, value);
                    for first in (0..length).step_by(BLOCK) {
                        let block = first..(first + BLOCK).min(length);
                        let (count, seen) = (block.len(), self.seen(&block));
                        let left = Strided::rows(&query[first * d..], d);
                        small(
                            (count, seen.len(), d),
                            left,
                            (&key[seen.start..], length),
                            (scores, seen.len()),
                            false,
                        );
                        for (i, s) in scores.chunks_exact_mut(seen.len()).take(count).enumerate() {
                            let at = first + i;
                            let visible = self.visible(at, &seen);
                            let sum = softmax(s, visible, self.scale, self.slope(head));
                            let to = (rows.start + at) * heads + head;
                            // SAFETY: this row and head are in this task alone.
                            let slot = unsafe { to_sums.part(to..to + 1) };
                            slot[0] = sum;
                        }
                        let left = Strided::rows(scores, seen.len());
                        small((count, d, seen.len()), left, (&value[seen.start * d..], d), (y, d), false);
                        for (i, y) in y.chunks_exact(d).take(count).enumerate() {
                            let to = ((rows.start + first + i) * heads + head) * d;
                            // SAFETY: as above.
                            unsafe { to_mixed.part(to..to + d) }.copy_from_slice(y);
                        }
                    }
                }
            });
        });
        (mixed, log_sums)
    }

    /// Gradients by q, k and v, from the gradient by what [`AttendRows::forward`] gave.
    #[expect(unsafe_code, reason = "threads write disjoint heads")]
    pub(crate) fn backward(&self, forward: Forward<'_>, gradient: &[f32]) -> Gradients {
        let (heads, kv_heads, d) = (self.heads, self.kv_heads, self.head_dim);
        let group = heads / kv_heads;
        let mut all = Gradients {
            q: vec![0f32; forward.q.len()],
            k: vec![0f32; forward.k.len()],
            v: vec![0f32; forward.v.len()],
        };
        let (to_q, to_k, to_v) = (Shared::new(&mut all.q), Shared::new(&mut all.k), Shared::new(&mut all.v));
        // A task is a key/value head of a sequence, so that one thread adds up what its group of heads gives.
        parallel_rows(self.sequences.len() * kv_heads, 5 * self.work(), |tasks| {
            SCRATCH.with_borrow_mut(|scratch| {
                for task in tasks {
                    let (rows, kv_head) = (&self.sequences[task / kv_heads], task % kv_heads);
                    let length = rows.len();
                    let n = length * d;
                    let [query, key, key_t, value_t, dy, dq, dk, dv, p, dp] =
                        scratch.get([n, n, n, n, n, n, n, n, BLOCK * length, BLOCK * length]);
                    gather(forward.k, rows, kv_heads, kv_head, d, key);
                    gather_transposed(forward.k, rows, kv_heads, kv_head, d, key_t);
                    gather_transposed(forward.v, rows, kv_heads, kv_head, d, value_t);
                    dk.fill(0.0);
                    dv.fill(0.0);
                    for head in kv_head * group..(kv_head + 1) * group {
                        gather(forward.q, rows, heads, head, d, query);
                        gather(gradient, rows, heads, head, d, dy);
                        for first in (0..length).step_by(BLOCK) {
                            let block = first..(first + BLOCK).min(length);
                            let (count, seen) = (block.len(), self.seen(&block));
                            let width = seen.len();
                            let queries = &query[first * d..block.end * d];
                            let dys = &dy[first * d..block.end * d];
                            let (left, right) = (Strided::rows(queries, d), &key_t[seen.start..]);
                            small((count, width, d), left, (right, length), (p, width), false);
                            let (left, right) = (Strided::rows(dys, d), &value_t[seen.start..]);
                            small((count, width, d), left, (right, length), (dp, width), false);
                            for i in 0..count {
                                let at = first + i;
                                let from = (rows.start + at) * heads + head;
                                let y = &forward.mixed[from * d..(from + 1) * d];
                                softmax_gradient(
                                    &mut p[i * width..(i + 1) * width],
                                    &mut dp[i * width..(i + 1) * width],
                                    self.visible(at, &seen),
                                    (self.scale, self.slope(head), forward.log_sums[from]),
                                    (y, &dys[i * d..(i + 1) * d]),
                                );
                            }
                            let key = &key[seen.start * d..];
                            let left = Strided::rows(dp, width);
                            small((count, d, width), left, (key, d), (&mut dq[first * d..], d), false);
                            let left = Strided::transposed(dp, width);
                            let to = &mut dk[seen.start * d..];
                            small((width, d, count), left, (queries, d), (to, d), true);
                            let left = Strided::transposed(p, width);
                            small((width, d, count), left, (dys, d), (&mut dv[seen.start * d..], d), true);
                        }
                        // SAFETY: these rows and heads are in this task alone.
                        unsafe { scatter(dq, rows, heads, head, d, &to_q) };
                    }
                    // SAFETY: as above.
                    unsafe {
                        scatter(dk, rows, kv_heads, kv_head, d, &to_k);
                        scatter(dv, rows, kv_heads, kv_head, d, &to_v);
                    }
                }
            });
        });
        all
    }

    fn slope(&self, head: usize) -> f32 {
        self.slopes.get(head).copied().unwrap_or(0.0)
    }

    /// Positions that any query of the block sees.
    fn seen(&self, block: &Range<usize>) -> Range<usize> {
        self.window.map_or(0, |w| (block.start + 1).saturating_sub(w))..block.end
    }

    /// Positions that the query at `at` sees, counted from the first of `seen`.
    fn visible(&self, at: usize, seen: &Range<usize>) -> Range<usize> {
        self.window.map_or(0, |w| (at + 1).saturating_sub(w)).max(seen.start) - seen.start
            ..at + 1 - seen.start
    }
}

/// One head's rows of a sequence, `[rows, d]`.
fn gather(x: &[f32], rows: &Range<usize>, heads: usize, head: usize, d: usize, to: &mut [f32]) {
    for (row, to) in rows.clone().zip(to.chunks_exact_mut(d)) {
        let from = (row * heads + head) * d;
        to.copy_from_slice(&x[from..from + d]);
    }
}

/// The same as `[d, rows]`.
fn gather_transposed(x: &[f32], rows: &Range<usize>, heads: usize, head: usize, d: usize, to: &mut [f32]) {
    let length = rows.len();
    for (at, row) in rows.clone().enumerate() {
        let from = (row * heads + head) * d;
        for (e, &value) in x[from..from + d].iter().enumerate() {
            to[e * length + at] = value;
        }
    }
}

/// The way back from [`gather`].
///
/// # Safety
/// No other thread may touch this head of these rows.
#[expect(unsafe_code, reason = "threads write disjoint heads")]
unsafe fn scatter(from: &[f32], rows: &Range<usize>, heads: usize, head: usize, d: usize, to: &Shared<f32>) {
    for (row, from) in rows.clone().zip(from.chunks_exact(d)) {
        let at = (row * heads + head) * d;
        // SAFETY: the caller's promise.
        unsafe { to.part(at..at + d) }.copy_from_slice(from);
    }
}

multiversion! {
    /// Turns scores into probabilities, zero outside `visible`; gives the logarithm of the sum of exponentials.
    fn softmax(s: &mut [f32], visible: Range<usize>, scale: f32, slope: f32) -> f32 {
        s[..visible.start].fill(0.0);
        s[visible.end..].fill(0.0);
        let s = &mut s[visible];
        let newest = s.len() as f32 - 1.0;
        let mut most = [f32::NEG_INFINITY; 16];
        for (j, s) in s.iter_mut().enumerate() {
            *s = s.mul_add(scale, slope * (j as f32 - newest));
        }
        for part in s.chunks(16) {
            for (m, &s) in most.iter_mut().zip(part) {
                *m = if s > *m { s } else { *m };
            }
        }
        let most = most.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        for s in s.iter_mut() {
            *s = exp(*s - most);
        }
        let sum = lane_sum(s.len(), |j, acc| acc + s[j]);
        let inverse = 1.0 / sum;
        for s in s.iter_mut() {
            *s *= inverse;
        }
        most + sum.ln()
    }
}

multiversion! {
    /// From a row's scores and the gradient by its probabilities: `p` becomes the probabilities, `dp` the
    /// gradient by the product of query and key; both zero outside `visible`.
    fn softmax_gradient(
        p: &mut [f32],
        dp: &mut [f32],
        visible: Range<usize>,
        scale_slope_sum: (f32, f32, f32),
        y_dy: (&[f32], &[f32]),
    ) {
        let ((scale, slope, log_sum), (y, dy)) = (scale_slope_sum, y_dy);
        for all in [&mut *p, &mut *dp] {
            all[..visible.start].fill(0.0);
            all[visible.end..].fill(0.0);
        }
        let (p, dp) = (&mut p[visible.clone()], &mut dp[visible]);
        let newest = p.len() as f32 - 1.0;
        // Σ_j p_j dp_j, which is also y · dy.
        let along = lane_sum(y.len(), |e, acc| y[e].mul_add(dy[e], acc));
        for (j, (p, dp)) in p.iter_mut().zip(dp.iter_mut()).enumerate() {
            let score = p.mul_add(scale, slope * (j as f32 - newest));
            *p = exp(score - log_sum);
            *dp = *p * (*dp - along) * scale;
        }
    }
}

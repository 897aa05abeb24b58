//! Causal attention over the paged cache on the CPU.
//!
//! A task is up to four (row, head) pairs that share a key/value head. For each page the scores of 16 positions
//! are computed at once (keys lie transposed in their page), then the softmax of each pair, then the weighted sum
//! of values. Every pair has its own range of positions and its own order of summation by absolute position, so
//! neither the pairs it shares a task with nor the chunk that its row came in change a bit.

use std::cell::RefCell;
use std::ops::Range;

use super::math::{exp, tree_sum};
use super::{Shared, multiversion, parallel};
use crate::nn::attention::AttentionSpec;
use crate::nn::kv_cache::{PAGE_TOKENS, SequenceSpan};

/// Pairs in one task.
const PAIRS: usize = 4;

/// Shapes and memory of one layer's attention.
pub(crate) struct Attend<'a> {
    /// `[rows, heads, head_dim]`.
    pub(crate) q: &'a [f32],
    /// `[pages, kv_heads, head_dim, PAGE_TOKENS]`.
    pub(crate) keys: &'a [f32],
    /// `[pages, kv_heads, PAGE_TOKENS, head_dim]`.
    pub(crate) values: &'a [f32],
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) spec: &'a AttentionSpec,
    pub(crate) window: Option<usize>,
}

struct Task<'a> {
    span: &'a SequenceSpan,
    kv_head: usize,
    /// Pair p is row `p / group` of the span, head `p % group` of the key/value head's group.
    pairs: Range<usize>,
}

thread_local! {
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Attend<'_> {
    /// `[rows, heads * head_dim]`.
    #[expect(unsafe_code, reason = "threads write disjoint heads of one buffer")]
    pub(crate) fn compute(&self, spans: &[SequenceSpan]) -> Vec<f32> {
        let group = self.heads / self.kv_heads;
        let mut tasks = Vec::new();
        let mut work = 0;
        for span in spans {
            let pairs = span.rows.len() * group;
            work += 2 * pairs * self.kv_heads * self.head_dim * (span.start + span.rows.len());
            for kv_head in 0..self.kv_heads {
                for first in (0..pairs).step_by(PAIRS) {
                    tasks.push(Task { span, kv_head, pairs: first..(first + PAIRS).min(pairs) });
                }
            }
        }
        let mut y = vec![0f32; self.q.len()];
        let out = Shared::new(&mut y);
        parallel(tasks.len(), work, |range| {
            for task in &tasks[range] {
                // SAFETY: a (row, head) pair is in one task, and a task is run by one thread.
                self.run(task, |at| unsafe { out.part(at..at + self.head_dim) });
            }
        });
        y
    }

    fn run<'y>(&self, task: &Task, out: impl Fn(usize) -> &'y mut [f32]) {
        let (d, group) = (self.head_dim, self.heads / self.kv_heads);
        let count = task.pairs.len();
        let mut q: [&[f32]; PAIRS] = [&[]; PAIRS];
        let mut seen: [Range<usize>; PAIRS] = Default::default();
        let mut slope = [0f32; PAIRS];
        let mut at = [0usize; PAIRS];
        for (i, pair) in task.pairs.clone().enumerate() {
            let (row, head) = (pair / group, task.kv_head * group + pair % group);
            at[i] = ((task.span.rows.start + row) * self.heads + head) * d;
            q[i] = &self.q[at[i]..at[i] + d];
            let position = task.span.start + row;
            seen[i] = self.window.map_or(0, |w| (position + 1).saturating_sub(w))..position + 1;
            slope[i] = self.spec.alibi_slopes.as_ref().map_or(0.0, |s| s[head]);
        }
        let seen = &seen[..count];
        let first_page = seen.iter().map(|s| s.start).min().unwrap_or(0) / PAGE_TOKENS;
        let end = seen.iter().map(|s| s.end).max().unwrap_or(0);
        let pages = &task.span.pages[first_page..end.div_ceil(PAGE_TOKENS)];
        let first = first_page * PAGE_TOKENS;
        let length = pages.len() * PAGE_TOKENS;
        let key_page = |page: u32| {
            let from = (page as usize * self.kv_heads + task.kv_head) * d * PAGE_TOKENS;
            &self.keys[from..from + d * PAGE_TOKENS]
        };
        let value_page = |page: u32| {
            let from = (page as usize * self.kv_heads + task.kv_head) * d * PAGE_TOKENS;
            &self.values[from..from + d * PAGE_TOKENS]
        };
        SCORES.with_borrow_mut(|scores| {
            if scores.len() < count * length {
                scores.resize(count * length, 0.0);
            }
            for (p, &page) in pages.iter().enumerate() {
                let mut tile = [[0f32; PAGE_TOKENS]; PAIRS];
                match count {
                    1 => scores_1(q[0], key_page(page), &mut tile),
                    2 => scores_2([q[0], q[1]], key_page(page), &mut tile),
                    3 => scores_3([q[0], q[1], q[2]], key_page(page), &mut tile),
                    _ => scores_4(q, key_page(page), &mut tile),
                }
                for (i, tile) in tile.iter().take(count).enumerate() {
                    let from = i * length + p * PAGE_TOKENS;
                    scores[from..from + PAGE_TOKENS].copy_from_slice(tile);
                }
            }
            for i in 0..count {
                let row = &mut scores[i * length..(i + 1) * length];
                let visible = seen[i].start - first..seen[i].end - first;
                softmax(row, visible.clone(), self.spec.scale as f32, slope[i]);
                let y = out(at[i]);
                for (p, &page) in pages.iter().enumerate() {
                    let inside = visible.start.max(p * PAGE_TOKENS)..visible.end.min((p + 1) * PAGE_TOKENS);
                    if inside.is_empty() {
                        continue;
                    }
                    // Positions outside are skipped, not multiplied by zero: what lies there is another
                    // sequence's past, and might not be finite.
                    let from = (inside.start - p * PAGE_TOKENS) * d;
                    add_weighted(y, &row[inside], &value_page(page)[from..]);
                }
            }
        });
    }
}

macro_rules! scores {
    ($name:ident, $pairs:literal, $q:ident: $ty:ty => $each:expr) => {
        multiversion! {
            fn $name($q: $ty, page: &[f32], tile: &mut [[f32; PAGE_TOKENS]; PAIRS]) {
                let rows: [&[f32]; $pairs] = $each;
                let mut acc = [[0f32; PAGE_TOKENS]; $pairs];
                for (d, keys) in page.chunks_exact(PAGE_TOKENS).enumerate() {
                    for r in 0..$pairs {
                        let q = rows[r][d];
                        for l in 0..PAGE_TOKENS {
                            acc[r][l] = q.mul_add(keys[l], acc[r][l]);
                        }
                    }
                }
                tile[..$pairs].copy_from_slice(&acc);
            }
        }
    };
}
scores!(scores_1, 1, q: &[f32] => [q]);
scores!(scores_2, 2, q: [&[f32]; 2] => q);
scores!(scores_3, 3, q: [&[f32]; 3] => q);
scores!(scores_4, 4, q: [&[f32]; 4] => q);

multiversion! {
    /// Softmax over `visible` of scale * score + slope * (position - newest position); zero elsewhere.
    fn softmax(row: &mut [f32], visible: Range<usize>, scale: f32, slope: f32) {
        let newest = visible.end as f32 - 1.0;
        for (j, s) in row.iter_mut().enumerate() {
            let biased = s.mul_add(scale, slope * (j as f32 - newest));
            *s = if j >= visible.start && j < visible.end { biased } else { f32::NEG_INFINITY };
        }
        let mut most = [f32::NEG_INFINITY; 16];
        for part in row.chunks_exact(16) {
            for l in 0..16 {
                most[l] = if part[l] > most[l] { part[l] } else { most[l] };
            }
        }
        let most = most.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let mut sums = [0f32; 16];
        for part in row.chunks_exact_mut(16) {
            for l in 0..16 {
                let e = exp(part[l] - most);
                part[l] = e;
                sums[l] += e;
            }
        }
        let inverse = 1.0 / tree_sum(sums);
        for s in row.iter_mut() {
            *s *= inverse;
        }
    }
}

multiversion! {
    /// y += Σ weights[j] * values[j], with rows of `y.len()` elements.
    fn add_weighted(y: &mut [f32], weights: &[f32], values: &[f32]) {
        let d = y.len();
        for (&w, values) in weights.iter().zip(values.chunks_exact(d)) {
            for (y, &v) in y.iter_mut().zip(values) {
                *y = w.mul_add(v, *y);
            }
        }
    }
}

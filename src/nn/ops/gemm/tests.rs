//! Products against sums in f64, and every instruction set against the portable code, bit for bit.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::tile::portable;
#[cfg(target_arch = "x86_64")]
use super::tile::x86;
use super::*;

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn exact(
    m: usize,
    n: usize,
    k: usize,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> Vec<f64> {
    let at = |i: usize, j: usize| (0..k).map(|p| a(i, p) as f64 * b(p, j) as f64).sum();
    (0..m * n).map(|e| at(e / n, e % n)).collect()
}

fn close(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (at, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((*f as f64 - e).abs() < 3e-5, "{what}: element {at} is {f}, not {e}");
    }
}

const SHAPES: [(usize, usize, usize, usize); 6] =
    [(1, 1, 1, 1), (12, 32, 192, 8), (13, 33, 193, 3), (40, 100, 577, 4), (5, 70, 30, 16), (300, 65, 210, 2)];

#[test]
fn products_are_right_with_and_without_a_low_rank_term() {
    for (m, n, k, r) in SHAPES {
        let (x, w) = (noise(m * k, 1), noise(n * k, 2));
        let (left, right) = (noise(m * r, 3), noise(r * n, 4));
        let bias = noise(n, 5);
        let base = exact(m, n, k, |i, p| x[i * k + p], |p, j| w[j * k + p]);
        let low = exact(m, n, r, |i, p| left[i * r + p], |p, j| right[p * n + j]);
        close(&x_wt(&x, Rows::F32(&w), k, None, None), &base, "x·Wᵀ");
        let all: Vec<f64> = (0..m * n).map(|e| base[e] + low[e] + bias[e % n] as f64).collect();
        let term = LowRankTerm { left: &left, right: &right, rank: r };
        close(&x_wt(&x, Rows::F32(&w), k, Some(term), Some(&bias)), &all, "with low rank and bias");

        let dy = noise(m * n, 6);
        let right = noise(r * k, 7);
        let base = exact(m, k, n, |i, p| dy[i * n + p], |p, j| w[p * k + j]);
        let low = exact(m, k, r, |i, p| left[i * r + p], |p, j| right[p * k + j]);
        close(&x_w(&dy, Rows::F32(&w), k, None), &base, "x·W");
        let all: Vec<f64> = base.iter().zip(&low).map(|(b, l)| b + l).collect();
        let term = LowRankTerm { left: &left, right: &right, rank: r };
        close(&x_w(&dy, Rows::F32(&w), k, Some(term)), &all, "x·W with low rank");

        let h = noise(m * r, 8);
        let gradient = exact(r, k, m, |i, p| h[p * r + i], |p, j| x[p * k + j]);
        close(&at_b(&h, &x, r, k), &gradient, "aᵀ·b of few columns");
        let gradient = exact(n, k, m, |i, p| dy[p * n + i], |p, j| x[p * k + j]);
        close(&at_b(&dy, &x, n, k), &gradient, "aᵀ·b");
    }
}

#[test]
fn quantized_weights_give_the_product_with_their_dequantized_rows() {
    let (m, n, k) = (37, 64, 256);
    let (x, dy) = (noise(m * k, 1), noise(m * n, 3));
    let dense = Tensor::from_vec(noise(n * k, 2), (n, k), &Device::Cpu).unwrap();
    for format in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q6K] {
        let blocks = QTensor::quantize(&dense, format).unwrap();
        let wide: Vec<f32> = {
            let bytes = blocks.data().unwrap();
            let rows = Rows::Blocks { bytes: &bytes, format };
            let mut wide = vec![0f32; n * k];
            wide.chunks_exact_mut(k).enumerate().for_each(|(i, row)| rows.unpack(i, k, row));
            wide
        };
        let bytes = blocks.data().unwrap();
        let rows = Rows::Blocks { bytes: &bytes, format };
        assert_eq!(x_wt(&x, rows, k, None, None), x_wt(&x, Rows::F32(&wide), k, None, None), "{format:?}");
        assert_eq!(x_w(&dy, rows, k, None), x_w(&dy, Rows::F32(&wide), k, None), "{format:?}");
    }
}

#[test]
fn strided_operands_are_read_as_they_lie() {
    let (m, n, k) = (17, 40, 50);
    let (a, b) = (noise(m * k, 1), noise(k * n, 2));
    let expected = exact(m, n, k, |i, p| a[i * k + p], |p, j| b[p * n + j]);
    let mut c = vec![1f32; m * n];
    small((m, n, k), Strided::rows(&a, k), (&b, n), (&mut c, n), false);
    close(&c, &expected, "rows");
    small((m, n, k), Strided::rows(&a, k), (&b, n), (&mut c, n), true);
    close(&c, &expected.iter().map(|e| 2.0 * e).collect::<Vec<_>>(), "added");
    let mut turned = vec![0f32; k * m];
    (0..m * k).for_each(|e| turned[(e % k) * m + e / k] = a[e]);
    small((m, n, k), Strided::transposed(&turned, m), (&b, n), (&mut c, n), false);
    close(&c, &expected, "transposed");
}

#[test]
fn strips_are_transposed_whatever_their_size_and_touch_nothing_else() {
    for rows in 1..=STRIP {
        for width in [1, 3, 7, 8, 9, 15, 16, 17, 40] {
            for to_row in [rows, 12.max(rows), TILE_N] {
                let x = noise(rows * (width + 3), 1);
                let mut to = vec![7f32; width * to_row];
                pack::transpose((rows, width), (&x, width + 3), (&mut to, to_row));
                for (at, found) in to.iter().enumerate() {
                    let (p, i) = (at / to_row, at % to_row);
                    let expected = if i < rows { x[i * (width + 3) + p] } else { 7.0 };
                    assert_eq!(*found, expected, "{rows} x {width} into rows of {to_row}, at ({p}, {i})");
                }
            }
        }
    }
}

type Kernel = unsafe fn((usize, usize, usize), Left, *const f32, usize, *mut f32, usize, bool);

#[test]
#[expect(unsafe_code, reason = "calls the kernels directly")]
fn every_instruction_set_gives_the_same_bits() {
    let mut kernels: Vec<(&str, Kernel)> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            kernels.push(("avx2", x86::avx2));
        }
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
            kernels.push(("avx512", x86::avx512));
        }
    }
    for m in 1..=TILE_M {
        for n in [1, 7, 8, 9, 15, 16, 17, 24, 31, 32] {
            let k = 21;
            let (a, b) = (noise(m * k, 1), noise(k * n, 2));
            let run = |kernel: Kernel, add: bool| {
                let mut c = noise(m * n, 3);
                let left = Left { at: a.as_ptr(), row: k, step: 1 };
                // SAFETY: the slices have the sizes that `tile` asks for.
                unsafe { kernel((m, n, k), left, b.as_ptr(), n, c.as_mut_ptr(), n, add) };
                c
            };
            for add in [false, true] {
                for (name, kernel) in &kernels {
                    assert_eq!(run(*kernel, add), run(portable, add), "{name}, {m} x {n}, add {add}");
                }
            }
        }
    }
}

#[test]
fn a_wide_left_operand_is_packed_in_parts_with_the_same_bits() {
    let (m, n, k) = (3, WHOLE_LEFT / 3 + 200, 5);
    let (x, w) = (noise(m * n, 1), noise(n * k, 2));
    let together = x_w(&x, Rows::F32(&w), k, None);
    for i in 0..m {
        let alone = x_w(&x[i * n..(i + 1) * n], Rows::F32(&w), k, None);
        assert_eq!(alone, together[i * k..(i + 1) * k], "row {i}");
    }
}

/// A row's result does not depend on how many rows share the product.
#[test]
fn a_row_does_not_depend_on_its_batch() {
    let (m, n, k) = (25, 50, 400);
    let (x, w) = (noise(m * k, 1), noise(n * k, 2));
    let together = x_wt(&x, Rows::F32(&w), k, None, None);
    for i in 0..m {
        let alone = x_wt(&x[i * k..(i + 1) * k], Rows::F32(&w), k, None, None);
        assert_eq!(alone, together[i * n..(i + 1) * n], "row {i}");
    }
}

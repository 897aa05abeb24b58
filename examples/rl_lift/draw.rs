//! A curve of rewards as a small SVG that can be read on a light and on a dark page. Knows nothing of training.

use std::fmt::Write as _;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 40.0;

/// Rewards from 0 to 1 over steps: of sampled answers as a thin line, of held-out prompts with points.
pub(crate) fn svg(sampled: &[(u64, f64)], held_out: &[(u64, f64)]) -> String {
    let last = sampled.iter().chain(held_out).map(|(step, _)| *step).max().unwrap_or(1).max(1);
    let x = |step: u64| LEFT + step as f64 / last as f64 * (WIDTH - LEFT - RIGHT);
    let y = |reward: f64| HEIGHT - BOTTOM - reward.clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM);
    let line = |points: &[(u64, f64)]| {
        let points: Vec<String> = points.iter().map(|&(s, r)| format!("{:.1},{:.1}", x(s), y(r))).collect();
        points.join(" ")
    };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"Mean reward over steps\">\n<style>text{{font:12px sans-serif;fill:#57606a}}\
         .g{{stroke:#8c959f;stroke-opacity:.35}}.s{{fill:none;stroke:#8c959f;stroke-width:1.2}}\
         .h{{fill:none;stroke:#1f77d0;stroke-width:2.5}}.p{{fill:#1f77d0}}\
         @media(prefers-color-scheme:dark){{text{{fill:#b1bac4}}.h{{stroke:#58a6ff}}.p{{fill:#58a6ff}}}}</style>\n"
    );
    let mut put = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    for tick in 0..=5 {
        let reward = f64::from(tick) / 5.0;
        let (at, to) = (y(reward), WIDTH - RIGHT);
        put(format!("<line class=\"g\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{to}\" y2=\"{at:.1}\"/>"));
        put(format!(
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{reward:.1}</text>",
            LEFT - 8.0,
            at + 4.0
        ));
    }
    for tick in 0..=6 {
        let step = last * tick / 6;
        put(format!(
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{step}</text>",
            x(step),
            HEIGHT - 22.0
        ));
    }
    put(format!("<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">step</text>", WIDTH / 2.0, HEIGHT - 6.0));
    put(format!(
        "<text x=\"{LEFT}\" y=\"18\">mean reward: sampled answers (thin), held-out prompts (bold)</text>"
    ));
    put(format!("<polyline class=\"s\" points=\"{}\"/>", line(sampled)));
    put(format!("<polyline class=\"h\" points=\"{}\"/>", line(held_out)));
    let mut points = String::new();
    for &(step, reward) in held_out {
        let _ =
            write!(points, "<circle class=\"p\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\"/>", x(step), y(reward));
    }
    put(points);
    out.push_str("</svg>\n");
    out
}

//! What episodes add up to, and how that is shown in a terminal. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use unicode_segmentation::UnicodeSegmentation as _;

use crate::rl::Episode;

/// Columns of the histogram, each a tenth of the range of rewards.
const BINS: usize = 10;
/// Characters of the longest bar.
const BAR: usize = 40;

/// A sum and how many were summed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        (self.sum, self.count) = (self.sum + value, self.count + 1);
    }

    fn get(self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// Sums over some episodes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    episodes: u64,
    reward: Mean,
    parts: BTreeMap<String, Mean>,
    graphemes: Mean,
    bins: [u64; BINS],
    /// Rewards that clients gave beyond 0 to 1.
    outside: u64,
}

impl Tally {
    fn add(&mut self, episode: &Episode) {
        self.episodes += 1;
        self.graphemes.add(episode.output.trim().graphemes(true).count() as f64);
        for (part, value) in &episode.meta.rewards {
            self.parts.entry(part.clone()).or_default().add(*value);
        }
        let Some(reward) = episode.reward else { return };
        self.reward.add(reward);
        match (0.0..=1.0).contains(&reward) {
            true => self.bins[((reward * BINS as f64) as usize).min(BINS - 1)] += 1,
            false => self.outside += 1,
        }
    }

    pub(crate) fn episodes(&self) -> u64 {
        self.episodes
    }

    pub(crate) fn mean_reward(&self) -> Option<f64> {
        self.reward.get()
    }

    /// How many episodes earned how much, as bars.
    pub(crate) fn histogram(&self) -> String {
        let most = self.bins.iter().copied().max().unwrap_or(0).max(1);
        let mut text = String::from("reward     episodes\n");
        for (bin, count) in self.bins.iter().enumerate() {
            let (low, high) = (bin as f64 / BINS as f64, (bin + 1) as f64 / BINS as f64);
            // What is there shows, however little.
            let bar = "█".repeat((*count as usize * BAR).div_ceil(most as usize));
            let _ = writeln!(text, "{low:.1} - {high:.1}  {count:>8}  {bar}");
        }
        let none = self.episodes - self.reward.count;
        for (name, count) in [("outside", self.outside), ("none", none)] {
            if count > 0 {
                let _ = writeln!(text, "{name:<9}  {count:>8}");
            }
        }
        text
    }
}

/// Tallies by a key, and of all.
#[derive(Debug, Clone, Default)]
pub(crate) struct Summary {
    by_key: BTreeMap<String, Tally>,
    total: Tally,
}

impl Summary {
    pub(crate) fn add(&mut self, key: String, episode: &Episode) {
        self.by_key.entry(key).or_default().add(episode);
        self.total.add(episode);
    }

    pub(crate) fn total(&self) -> &Tally {
        &self.total
    }

    /// One line a key, and one for all where there are several: episodes, mean reward, mean of each part, mean length
    /// in grapheme clusters.
    pub(crate) fn table(&self, key: &str) -> String {
        let parts: Vec<&String> = self.total.parts.keys().collect();
        let width =
            self.by_key.keys().map(|key| key.chars().count()).chain([key.len(), 5]).max().unwrap_or(5);
        let mut text = format!("{key:<width$}  episodes  reward");
        for part in &parts {
            let _ = write!(text, "  {part:>6}");
        }
        text.push_str("  length\n");
        let all = (self.by_key.len() > 1).then_some(("all", &self.total));
        for (key, tally) in self.by_key.iter().map(|(key, tally)| (key.as_str(), tally)).chain(all) {
            let _ = write!(text, "{key:<width$}  {:>8}  {:>6}", tally.episodes, shown(tally.reward.get(), 3));
            for part in &parts {
                let mean = tally.parts.get(*part).and_then(|mean| mean.get());
                let width = part.len().max(6);
                let _ = write!(text, "  {:>width$}", shown(mean, 3));
            }
            let _ = writeln!(text, "  {:>6}", shown(tally.graphemes.get(), 1));
        }
        text
    }
}

fn shown(mean: Option<f64>, digits: usize) -> String {
    mean.map_or_else(|| "-".to_owned(), |mean| format!("{mean:.digits$}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rl::collect::new_episode;
    use crate::rl::episode::{EpisodeMeta, EpisodeSource};

    fn episode(reward: Option<f64>, parts: &[(&str, f64)], output: &str) -> Episode {
        let rewards = parts.iter().map(|(part, value)| ((*part).to_owned(), *value)).collect();
        let meta = EpisodeMeta { rewards, ..EpisodeMeta::new(EpisodeSource::Given) };
        Episode { reward, ..new_episode("id".into(), "env", "p", output, meta) }
    }

    #[test]
    fn means_are_over_what_is_there() {
        let mut summary = Summary::default();
        summary.add("hi".into(), &episode(Some(1.0), &[("length", 1.0), ("exact_match", 0.0)], "नमस्ते"));
        summary.add("hi".into(), &episode(None, &[], ""));
        summary.add("ta".into(), &episode(Some(0.5), &[("length", 0.5)], "abcd"));
        let expected = "\
language  episodes  reward  exact_match  length  length
hi               2   1.000        0.000   1.000     1.5
ta               1   0.500            -   0.500     4.0
all              3   0.750        0.000   0.750     2.3
";
        assert_eq!(summary.table("language"), expected);
    }

    #[test]
    fn the_histogram_shows_every_episode() {
        let mut summary = Summary::default();
        for reward in [Some(0.0), Some(0.05), Some(0.95), Some(1.0), Some(1.0), Some(-3.0), None] {
            summary.add("a".into(), &episode(reward, &[], "x"));
        }
        let text = summary.total().histogram();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], format!("0.0 - 0.1         2  {}", "█".repeat(27)));
        assert_eq!(lines[10], format!("0.9 - 1.0         3  {}", "█".repeat(BAR)));
        assert_eq!(lines[11..], ["outside           1", "none              1"]);
    }
}

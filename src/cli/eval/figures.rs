//! What an evaluation adds up, and how it is shown. Pure.

use serde_json::{Value, json};

use super::rows::Row;
use crate::text::chrf::Chrf;
use crate::text::{Language, is_in};
use crate::train::evaluation::Sums;

/// Sums over rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Tally {
    /// Of the completions' loss.
    pub(super) sums: Sums,
    chrf: Chrf,
    rows: usize,
    /// Answers that are the completion, but for white space around them.
    exact: usize,
    /// Rows that say which language they are in.
    with_language: usize,
    /// Of these, answers in that language, as far as that can be told.
    in_language: usize,
}

impl Tally {
    /// Adds what was answered to a row.
    pub(super) fn add_answer(&mut self, row: &Row, answer: &str) {
        self.chrf.add(&Chrf::of(answer, &row.completion));
        self.rows += 1;
        self.exact += usize::from(answer.trim() == row.completion.trim());
        if let Some(language) = row.language {
            self.with_language += 1;
            self.in_language += usize::from(is_in(answer, language));
        }
    }

    /// Adds another group's.
    pub(super) fn add(&mut self, other: &Self) {
        self.sums.add(&other.sums);
        self.chrf.add(&other.chrf);
        self.rows += other.rows;
        self.exact += other.exact;
        self.with_language += other.with_language;
        self.in_language += other.in_language;
    }

    fn exact_match(&self) -> f64 {
        self.exact as f64 / self.rows as f64
    }

    /// `None` where no row says its language.
    fn language_correct(&self) -> Option<f64> {
        (self.with_language > 0).then(|| self.in_language as f64 / self.with_language as f64)
    }

    /// As JSON: `loss` in nats a token, `chrf` 0 to 100, shares 0 to 1.
    pub(super) fn figures(&self) -> Value {
        json!({
            "rows": self.rows,
            "tokens": self.sums.tokens,
            "completion_tokens": self.sums.weight_sum,
            "loss": self.sums.loss(),
            "perplexity": self.sums.perplexity(),
            "chrf": self.chrf.score(),
            "exact_match": self.exact_match(),
            "language_correct": self.language_correct(),
        })
    }
}

/// An empty tally for each language that the rows have, in the order of the languages; rows that name none come last.
pub(super) fn by_language(rows: &[Row]) -> Vec<(Option<Language>, Tally)> {
    let has = |language: &Option<Language>| rows.iter().any(|row| row.language == *language);
    let all = Language::all().map(Some).chain([None]);
    all.filter(has).map(|language| (language, Tally::default())).collect()
}

/// One line a language, and one for all where there are several.
pub(super) fn table(tallies: &[(Option<Language>, Tally)], total: &Tally) -> String {
    let mut text = format!(
        "{:<10} {:>6} {:>8} {:>11} {:>6} {:>7} {:>9}\n",
        "language", "rows", "loss", "perplexity", "chrF", "exact", "language"
    );
    let mut line = |name: &str, tally: &Tally| {
        let share = |share: f64| format!("{:.1}%", share * 100.0);
        text += &format!(
            "{name:<10} {:>6} {:>8.4} {:>11.3} {:>6.2} {:>7} {:>9}\n",
            tally.rows,
            tally.sums.loss(),
            tally.sums.perplexity(),
            tally.chrf.score(),
            share(tally.exact_match()),
            tally.language_correct().map_or("-".to_owned(), share),
        );
    };
    for (language, tally) in tallies {
        line(language.map_or("-", Language::english_name), tally);
    }
    if tallies.len() > 1 {
        line("all", total);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(completion: &str, language: Option<Language>) -> Row {
        Row { prompt: "p".into(), completion: completion.into(), language, line: 1 }
    }

    #[test]
    fn answers_are_counted() {
        let rows = [
            row(" আমি ভাত খাই।", Some(Language::Bengali)),
            row("জল", Some(Language::Bengali)),
            row("six", None),
        ];
        let mut tallies = by_language(&rows);
        assert_eq!(tallies.iter().map(|(of, _)| *of).collect::<Vec<_>>(), [Some(Language::Bengali), None]);
        tallies[0].1.add_answer(&rows[0], "আমি ভাত খাই।\n");
        tallies[0].1.add_answer(&rows[1], "water");
        tallies[1].1.add_answer(&rows[2], "six");
        for (_, tally) in &mut tallies {
            tally.sums = Sums { loss_sum: 1.0, weight_sum: 2.0, samples: 1, tokens: 4 };
        }
        let bengali = tallies[0].1.figures();
        assert_eq!((&bengali["rows"], &bengali["exact_match"]), (&json!(2), &json!(0.5)));
        assert_eq!((&bengali["language_correct"], &bengali["loss"]), (&json!(0.5), &json!(0.5)));
        assert_eq!(tallies[1].1.figures()["language_correct"], Value::Null);
        let mut total = Tally::default();
        tallies.iter().for_each(|(_, tally)| total.add(tally));
        let all = total.figures();
        assert_eq!((&all["rows"], &all["completion_tokens"]), (&json!(3), &json!(4.0)));
        assert!((all["exact_match"].as_f64().unwrap() - 2.0 / 3.0).abs() < 1e-12);

        let text = table(&tallies, &total);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[1][..4], ["bengali", "2", "0.5000", "1.649"]);
        assert_eq!((lines[1][5], lines[1][6]), ("50.0%", "50.0%"));
        assert_eq!((lines[2][0], lines[2][6]), ("-", "-"));
        assert_eq!((lines[3][0], lines[3][5]), ("all", "66.7%"));
        assert_eq!(table(&tallies[..1], &total).lines().count(), 2, "one language needs no sum");
    }
}

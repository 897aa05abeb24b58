//! Tests of the rewards as a whole: ranges, weights, and any text at all.

use proptest::prelude::*;

use super::*;

fn rewarder(yaml: &str) -> Rewarder {
    Rewarder::new(&serde_yaml::from_str(yaml).unwrap()).unwrap()
}

fn rewards(rewarder: &Rewarder, group: &[Sample<'_>]) -> Vec<Result<Reward, RewardError>> {
    futures::executor::block_on(rewarder.group(group))
}

fn sample<'a>(output: &'a str, reference: Option<&'a str>) -> Sample<'a> {
    Sample {
        prompt: "Translate to Hindi: water",
        output,
        language: Some(Language::Hindi),
        reference,
        finished: true,
    }
}

#[test]
fn the_total_is_the_weighted_mean_of_what_applies() {
    let rewarder = rewarder(
        "{length: {min_graphemes: 4}, quality: {weight: 3}, diversity: {weight: 0}, language: {weight: 0}}",
    );
    let rewards = rewards(&rewarder, &[sample("पानी", None), sample("पानी।", Some("पानी।"))]);
    let first = rewards[0].as_ref().unwrap();
    assert_eq!(first.parts, BTreeMap::from([("length".into(), 0.5), ("quality".into(), 0.5)]));
    assert_eq!(first.total, 0.5);
    let second = rewards[1].as_ref().unwrap();
    assert_eq!(second.parts["chrf"], 1.0);
    assert_eq!(second.total, (0.75 + 3.0 + 2.0) / 6.0);
}

#[test]
fn no_part_is_an_error_and_no_zero() {
    let rewarder = rewarder(
        "{length: {weight: 0}, quality: {weight: 0}, diversity: {weight: 0}, language: {weight: 0}}",
    );
    assert_eq!(rewards(&rewarder, &[sample("पानी", None)]), [Err(RewardError::NoPart)]);
    assert_eq!(rewards(&rewarder, &[]), []);
}

#[test]
fn patterns_and_matches_are_all_or_nothing() {
    let rewarder = rewarder(
        r"{length: {weight: 0}, quality: {weight: 0}, diversity: {weight: 0}, language: {weight: 0},
           chrf: {weight: 0}, exact_match: {weight: 1}, regex: {weight: 1, pattern: '।\s*$'}}",
    );
    let totals: Vec<f64> =
        rewards(&rewarder, &[sample("पानी।\n", Some("पानी।")), sample("पानी", Some("पानी।"))])
            .into_iter()
            .map(|reward| reward.unwrap().total)
            .collect();
    assert_eq!(totals, [1.0, 0.0]);
}

proptest! {
    #[test]
    fn every_part_is_a_share_whatever_the_text(
        prompt in any::<String>(), outputs in prop::collection::vec(any::<String>(), 0..5),
        reference in prop::option::of(any::<String>()), finished: bool, language in 0usize..13,
    ) {
        let language = Language::all().nth(language);
        let rewarder = rewarder(r"{exact_match: {weight: 1}, regex: {weight: 1, pattern: '\w+'}}");
        let group: Vec<Sample<'_>> = outputs
            .iter()
            .map(|output| Sample { prompt: &prompt, output, language, reference: reference.as_deref(), finished })
            .collect();
        let rewards = rewards(&rewarder, &group);
        prop_assert_eq!(rewards.len(), group.len());
        for reward in rewards {
            let reward = reward.unwrap();
            prop_assert!((0.0..=1.0).contains(&reward.total), "{:?}", reward);
            prop_assert!(reward.parts.values().all(|part| (0.0..=1.0).contains(part)), "{:?}", reward);
            prop_assert_eq!(reward.parts.contains_key("language"), language.is_some());
            prop_assert_eq!(reward.parts.contains_key("chrf"), reference.is_some());
        }
    }

    #[test]
    fn text_of_the_scripts_is_a_share_too(output in "[ \\.।\u{93c}-\u{94f}क-ह\u{9be}ক-হا-ے\u{fffd}à¤Ã\u{200d}a-c]{0,60}") {
        let rewarder = rewarder("{}");
        let reward = rewards(&rewarder, &[sample(&output, None)]).remove(0).unwrap();
        prop_assert!(reward.parts.values().all(|part| (0.0..=1.0).contains(part)), "{:?}", reward);
    }

    #[test]
    fn one_more_damaged_place_never_earns_more(output in "[क-ह ]{1,40}") {
        let rewarder = rewarder("{}");
        let damaged = format!("\u{fffd}{output}");
        let of = |output: &str| rewards(&rewarder, &[sample(output, None)]).remove(0).unwrap().parts["quality"];
        prop_assert!(of(&damaged) <= of(&output));
    }
}

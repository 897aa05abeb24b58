//! Records to tokens, with every style of tokenizer in the fixtures: what precedes an answer is what serving makes
//! of the prompt, and what is learnt is the answer.

use std::path::Path;

use serde_json::json;

use super::*;
use crate::data::{Place, Row};
use crate::model::tokenizer::Special;
use crate::text::prompt::target_of_prompt;

const STYLES: [&str; 5] = ["bloom", "gpt2", "llama3", "qwen2", "spm"];

fn bytes_of(style: &str, file: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/tokenizers");
    std::fs::read(folder.join(style).join(file)).unwrap()
}

fn tokenizer_with(style: &str, chat_template: Option<&str>) -> Arc<Tokenizer> {
    let (tokenizer, config) = (bytes_of(style, "tokenizer.json"), bytes_of(style, "tokenizer_config.json"));
    Arc::new(Tokenizer::from_parts(&tokenizer, Some(&config), chat_template).unwrap())
}

fn tokenizer(style: &str) -> Arc<Tokenizer> {
    tokenizer_with(style, None)
}

fn source(rest: Value) -> SourceConfig {
    let mut typed = json!({"type": "local", "path": "x"});
    typed.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
    serde_json::from_value(typed).unwrap()
}

fn record(fields: Value) -> Record {
    let place = Place { object: "a.jsonl".into(), row: Row::Line(1) };
    Record { fields: fields.as_object().unwrap().clone(), place }
}

fn shape(tokenizer: &Tokenizer) -> Shape {
    Shape { max_tokens: 10_000, completion_only: true, eos: tokenizer.eos_token_id().into_iter().collect() }
}

fn examples(template: Template, tokenizer: &Arc<Tokenizer>) -> Examples {
    let config = source(json!({"source_language": "en", "target_language": "hi"}));
    Examples::new(&config, template, tokenizer.clone(), shape(tokenizer)).unwrap()
}

fn made(examples: &Examples, fields: Value) -> TrainSequence {
    match examples.make(&record(fields)).unwrap() {
        Made::Example { sequence, cut: false } => sequence,
        other => panic!("{other:?}"),
    }
}

/// The tokens that are learnt, in runs.
fn learnt(sequence: &TrainSequence) -> Vec<Vec<u32>> {
    assert_eq!(sequence.tokens.len(), sequence.weights.len());
    assert_eq!(sequence.weights[0], 0.0);
    let mut runs: Vec<Vec<u32>> = Vec::new();
    let mut before = false;
    for (&token, &weight) in sequence.tokens.iter().zip(&sequence.weights) {
        assert!(weight == 0.0 || weight == 1.0);
        if weight == 1.0 && !before {
            runs.push(Vec::new());
        }
        if weight == 1.0 {
            runs.last_mut().unwrap().push(token);
        }
        before = weight == 1.0;
    }
    runs
}

#[test]
fn a_prompt_has_the_tokens_that_serving_gives_it() {
    for style in STYLES {
        let tokenizer = tokenizer(style);
        let eos = tokenizer.eos_token_id().unwrap();
        let examples = examples(Template::PromptCompletion, &tokenizer);
        for (prompt, completion) in [
            ("Translate to Hindi: water", " पानी"),
            ("What is 2+2?\n", "It is 4."),
            ("Answer:", "yes"),
            ("half a wo", "rd and more"),
            ("पा", "नी"),
            ("ends in space ", " and begins with one"),
            ("क्", "या"),
        ] {
            let sequence = made(&examples, json!({"prompt": prompt, "completion": completion}));
            let served = tokenizer.encode(prompt, AddSpecial::Yes).unwrap();
            assert!(sequence.tokens.starts_with(&served), "{style}: {prompt:?} + {completion:?}");
            let runs = learnt(&sequence);
            assert_eq!(runs.len(), 1, "{style}");
            assert_eq!(sequence.tokens.len(), served.len() + runs[0].len());
            assert_eq!(runs[0].last(), Some(&eos));
            assert_eq!(runs[0].iter().filter(|&&token| token == eos).count(), 1);
            // Read together they say what the record says.
            let text = tokenizer.decode(&sequence.tokens, Special::Skip).unwrap();
            let without_space = |text: &str| text.replace(' ', "");
            assert_eq!(without_space(&text), without_space(&format!("{prompt}{completion}")), "{style}");
        }
    }
}

#[test]
fn prompts_are_learnt_too_when_that_is_asked() {
    let tokenizer = tokenizer("spm");
    let shape = Shape { completion_only: false, ..shape(&tokenizer) };
    let all =
        Examples::new(&source(json!({})), Template::PromptCompletion, tokenizer.clone(), shape).unwrap();
    let sequence = made(&all, json!({"prompt": "a b", "completion": " c"}));
    assert_eq!(learnt(&sequence), [sequence.tokens[1..].to_vec()]);
    let only =
        made(&examples(Template::PromptCompletion, &tokenizer), json!({"prompt": "a b", "completion": " c"}));
    assert_eq!(only.tokens, sequence.tokens);
    assert!(only.weights.iter().sum::<f32>() < sequence.weights.iter().sum());
}

#[test]
fn plain_text_is_learnt_whole_and_ended_once() {
    for style in STYLES {
        let tokenizer = tokenizer(style);
        let eos = tokenizer.eos_token_id().unwrap();
        let examples = examples(Template::Text, &tokenizer);
        let served = tokenizer.encode("एक दिन.", AddSpecial::Yes).unwrap();
        let sequence = made(&examples, json!({"text": "एक दिन."}));
        assert_eq!(sequence.tokens, [served, vec![eos]].concat(), "{style}");
        assert_eq!(learnt(&sequence), [sequence.tokens[1..].to_vec()], "{style}");
        let ended = made(&examples, json!({"text": "एक दिन.</s>"}));
        assert_eq!(ended, sequence, "{style}: the text ends itself");
    }
    // A model without such a token.
    let tokenizer = tokenizer("spm");
    let shape = Shape { eos: Vec::new(), ..shape(&tokenizer) };
    let examples = Examples::new(&source(json!({})), Template::Text, tokenizer.clone(), shape).unwrap();
    assert_eq!(
        made(&examples, json!({"text": "ab"})).tokens,
        tokenizer.encode("ab", AddSpecial::Yes).unwrap()
    );
}

fn talk() -> Value {
    json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": [{"type": "text", "text": "In "}, {"type": "text", "text": "Hindi?"}]},
        {"role": "assistant", "content": "चार।"},
        {"role": "user", "content": "Thanks"},
    ])
}

#[test]
fn of_a_chat_the_assistants_turns_are_learnt() {
    for style in STYLES {
        let tokenizer = tokenizer(style);
        let examples = examples(Template::Chat, &tokenizer);
        let sequence = made(&examples, json!({"messages": talk()}));
        let said: Vec<String> =
            learnt(&sequence).iter().map(|run| tokenizer.decode(run, Special::Keep).unwrap()).collect();
        assert_eq!(said, ["Four.</s>", "चार।</s>"], "{style}");
        // Both prompts are those of POST /v1/chat/completions.
        let messages = conversation(&talk()).unwrap();
        for turn in [2, 4] {
            let template = tokenizer.chat_template().unwrap();
            let prompt = template.render(&messages[..turn], GenerationPrompt::Add).unwrap();
            let served = tokenizer.encode(&prompt, AddSpecial::No).unwrap();
            assert!(sequence.tokens.starts_with(&served), "{style}");
            assert_eq!(sequence.weights[served.len() - 1..=served.len()], [0.0, 1.0], "{style}");
        }
    }
}

#[test]
fn a_chat_template_without_an_end_gets_one() {
    let plain = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}\
                 {% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
    for style in STYLES {
        let tokenizer = tokenizer_with(style, Some(plain));
        let sequence = made(&examples(Template::Chat, &tokenizer), json!({"messages": talk()}));
        let runs = learnt(&sequence);
        assert_eq!(runs.len(), 2, "{style}");
        let text = tokenizer.decode(&runs[1], Special::Keep).unwrap();
        assert!(text.trim_start().starts_with("चार।") && text.ends_with("</s>"), "{style}: {text:?}");
        let first = tokenizer.decode(&runs[0], Special::Keep).unwrap();
        assert_eq!(first.trim(), "Four.", "{style}");
    }
}

#[test]
fn chat_templates_that_rewrite_are_refused() {
    let rewrites = "{% for m in messages %}{{ m.role }}:{% if loop.last and m.role == 'assistant' %}\
                    {{ '[last]' }}{% endif %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}{{ 'assistant:[last]' }}{% endif %}";
    let other_start = "{% for m in messages %}{{ m.content }}</s>{% endfor %}\
                       {% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";
    let raises = "{{ raise_exception('only saints') }}";
    for (template, expected) in [
        (rewrites, "a message 3 that the model's chat template writes otherwise when more messages follow"),
        (other_start, "a message 3 that the model's chat template does not begin as it asks"),
        (raises, "only saints"),
    ] {
        let tokenizer = tokenizer_with("spm", Some(template));
        let error = examples(Template::Chat, &tokenizer).make(&record(json!({"messages": talk()})));
        let error = error.unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    // With a single answer there is nothing to rewrite.
    let tokenizer = tokenizer_with("spm", Some(rewrites));
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    made(&examples(Template::Chat, &tokenizer), json!({"messages": messages}));
}

#[test]
fn messages_that_are_none_are_named() {
    let tokenizer = tokenizer("spm");
    let examples = examples(Template::Chat, &tokenizer);
    for (messages, expected) in [
        (json!("hello"), "no list"),
        (json!([]), "no list"),
        (json!([{"content": "a"}]), "message 1 without a role"),
        (
            json!([{"role": "user", "content": "a"}, {"role": "assistant"}]),
            "message 2 whose content is no text",
        ),
        (json!([{"role": "user", "content": [{"type": "image"}]}]), "message 1 whose content is no text"),
        (json!([{"role": "user", "content": "a"}]), "without a turn of the assistant"),
    ] {
        let error = examples.make(&record(json!({"messages": messages}))).unwrap_err();
        assert!(error.contains(expected), "{messages}: {error}");
    }
    let bare = Tokenizer::from_parts(&bytes_of("spm", "tokenizer.json"), None, None).unwrap();
    let error = Examples::new(&source(json!({})), Template::Chat, Arc::new(bare), shape(&tokenizer));
    assert_eq!(error.err().expect("has no chat template").field, "template");
}

#[test]
fn translations_ask_as_people_do() {
    let tokenizer = tokenizer("bloom");
    for (rest, expected) in [
        (json!({"target_language": "hi"}), "Translate to Hindi: "),
        (
            json!({"target_language": "Tamil", "source_language": "eng_Latn"}),
            "Translate from English to Tamil: ",
        ),
        (json!({"fields": {"source": "t.en", "target": "t.bn"}}), "Translate from English to Bengali: "),
        (json!({"target_language": " French "}), "Translate to French: "),
    ] {
        let config = source(rest);
        let examples =
            Examples::new(&config, Template::Translation, tokenizer.clone(), shape(&tokenizer)).unwrap();
        let fields = json!({"source": "water", "target": "पानी", "t": {"en": "water", "bn": "पानी"}});
        let sequence = made(&examples, fields);
        let prompt = format!("{expected}water");
        let served = tokenizer.encode(&prompt, AddSpecial::Yes).unwrap();
        assert!(sequence.tokens.starts_with(&served), "{prompt}");
        assert_eq!(tokenizer.decode(&learnt(&sequence)[0], Special::Skip).unwrap(), " पानी");
        let name = expected.trim_end_matches(": ").rsplit(' ').next().unwrap();
        assert_eq!(target_of_prompt(&prompt), Language::parse(name), "serving reads the same language");
    }
    let error =
        Examples::new(&source(json!({})), Template::Translation, tokenizer.clone(), shape(&tokenizer));
    assert_eq!(error.err().expect("names no language").field, "target_language");
}

#[test]
fn the_fields_decide_the_template() {
    let decide = |rest: Value, fields: Value| decide(&source(rest), &record(fields));
    let none = json!({});
    for (rest, fields, expected) in [
        (&none, json!({"messages": [], "prompt": "a", "completion": "b", "text": "c"}), Template::Chat),
        (&none, json!({"prompt": "a", "completion": "b", "text": "c"}), Template::PromptCompletion),
        (&none, json!({"instruction": "a", "output": "b", "text": "c"}), Template::PromptCompletion),
        (&none, json!({"question": "a", "answer": "b"}), Template::PromptCompletion),
        (&none, json!({"input": "a", "response": "b"}), Template::PromptCompletion),
        (&none, json!({"source": "a", "target": "b", "text": "c"}), Template::Translation),
        (&none, json!({"prompt": "a", "text": "c"}), Template::Text),
        (&none, json!({"prompt": "a", "completion": null, "text": "c"}), Template::Text),
        (
            &json!({"fields": {"text": "body"}}),
            json!({"prompt": "a", "completion": "b", "body": "c"}),
            Template::Text,
        ),
        (&json!({"fields": {"prompt": "q"}}), json!({"q": "a", "answer": "b"}), Template::PromptCompletion),
        (
            &json!({"fields": {"source": "t.en", "target": "t.hi"}}),
            json!({"t": {"en": "a", "hi": "b"}}),
            Template::Translation,
        ),
    ] {
        assert_eq!(decide(rest.clone(), fields.clone()), Ok(expected), "{rest} {fields}");
    }
    let error = decide(none, json!({"title": "a", "body": "b"})).unwrap_err();
    assert!(error.contains("it has title, body") && error.contains("fields"), "{error}");
}

#[test]
fn missing_and_odd_fields_are_named() {
    let tokenizer = tokenizer("spm");
    let examples_of = |rest: Value| {
        Examples::new(&source(rest), Template::PromptCompletion, tokenizer.clone(), shape(&tokenizer))
            .unwrap()
    };
    let usual = examples_of(json!({}));
    let mapped = examples_of(json!({"fields": {"prompt": "q.text", "completion": "a"}}));
    for (examples, fields, expected) in [
        (
            &usual,
            json!({"prompt": "a"}),
            "has no field completion (nor output, response, answer); it has prompt;",
        ),
        (&usual, json!({}), "has no field prompt (nor instruction, question, input); it has none;"),
        (&usual, json!({"prompt": "a", "completion": null}), "has no field completion"),
        (&usual, json!({"prompt": "a", "completion": ["b"]}), "has a completion that is no text"),
        (&usual, json!({"prompt": "a", "completion": " \n"}), "has an empty completion"),
        (&usual, json!({"prompt": "", "completion": "b"}), "has an empty prompt"),
        (
            &mapped,
            json!({"q": "x", "prompt": "p", "a": "b"}),
            "has no field q.text, which the source names as its prompt",
        ),
    ] {
        let error = examples.make(&record(fields.clone())).unwrap_err();
        assert!(error.contains(expected), "{fields}: {error}");
    }
    let sequence = made(&mapped, json!({"q": {"text": "6*7="}, "a": 42}));
    let same = made(&usual, json!({"prompt": "6*7=", "completion": "42"}));
    assert_eq!(sequence, same);
    assert_eq!(
        made(&usual, json!({"instruction": "6*7=", "input": "", "output": true})).tokens,
        made(&usual, json!({"prompt": "6*7=", "completion": "true"})).tokens
    );
    assert_eq!(
        made(&usual, json!({"instruction": "Sum up.", "input": "It rains.", "output": "Rain"})),
        made(&usual, json!({"prompt": "Sum up.\nIt rains.", "completion": "Rain"}))
    );
    let many: serde_json::Map<String, Value> = (0..500).map(|i| (format!("field{i}"), json!(1))).collect();
    let error = usual.make(&record(Value::Object(many))).unwrap_err();
    assert!(error.len() < 600, "{error}");
}

#[test]
fn long_examples_keep_their_start() {
    let tokenizer = tokenizer("spm");
    let whole = made(
        &examples(Template::PromptCompletion, &tokenizer),
        json!({"prompt": "one two three", "completion": " four five six"}),
    );
    let prompt = whole.weights.iter().position(|&w| w == 1.0).unwrap();
    for max_tokens in 2..whole.tokens.len() + 2 {
        let shape = Shape { max_tokens, ..shape(&tokenizer) };
        let examples =
            Examples::new(&source(json!({})), Template::PromptCompletion, tokenizer.clone(), shape).unwrap();
        let made = examples.make(&record(json!({"prompt": "one two three", "completion": " four five six"})));
        match made.unwrap() {
            Made::Skipped => assert!(max_tokens <= prompt),
            Made::Example { sequence, cut } => {
                let kept = max_tokens.min(whole.tokens.len());
                assert!(max_tokens > prompt);
                assert_eq!(cut, max_tokens < whole.tokens.len());
                assert_eq!(sequence.tokens, whole.tokens[..kept]);
                assert_eq!(sequence.weights, whole.weights[..kept]);
            }
        }
    }
}

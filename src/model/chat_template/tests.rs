//! Chat templates: what hub templates use, what they may not do, and Jinja itself as the reference where Python
//! has it.

use std::io::Write as _;
use std::process::{Command, Stdio};

use super::*;

fn conversation() -> Vec<Message> {
    let turn = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    vec![
        turn("system", "Be brief."),
        turn("user", "  <b>नमस्ते</b> & \"you\"\n"),
        turn("assistant", "<think>hm</think>\n\nYes."),
        turn("user", "2+2?"),
    ]
}

fn template(source: &str) -> Result<ChatTemplate, ChatTemplateError> {
    ChatTemplate::new(source, [("bos_token", "<s>"), ("eos_token", "</s>")])
}

fn render(source: &str) -> Result<String, ChatTemplateError> {
    template(source)?.render(&conversation(), GenerationPrompt::Add)
}

/// Templates with the parts that those on the hub are made of.
const TEMPLATES: [&str; 22] = [
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]\
     {% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "{%- for message in messages %}\n    {%- set content = message.content.strip() %}\n    {{- content.split('\\n')[0] ~ '|' }}\n{%- endfor %}\n",
    "{% if messages[0]['role'] == 'system' %}\n  {% set loop_messages = messages[1:] %}\n  {% set system = messages[0].content %}\n{% endif %}\n{% for m in loop_messages %}\n    {{ loop.index0 }} {{ loop.first }} {{ loop.last }} {{ m.role.upper() }}\n{% endfor %}\n{{ system }}\n",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.n }} {{ ns.found }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index0 == 3 %}{% break %}{% endif %}{{ m.role }},{% endfor %}",
    "{% for m in messages[::-1] %}{{ m.role[0] }}{{ m.content.startswith('<think>') }}{{ m.content.endswith('?') }} {% endfor %}",
    "{{ messages | tojson }}",
    "{{ messages[1] | tojson(indent=2) }}",
    "{{ messages[:1] | tojson(indent=4) }}|{{ [] | tojson(indent=2) }}|{{ {} | tojson }}|{{ [1, 2.5, none, true, {'k': []}] | tojson }}",
    "{{ {'b': 1, 'a': 'ß😀\\t'} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}",
    "{{ tools is none }} {{ tools is defined }} {{ documents }} {{ nothing is defined }} [{{ nothing }}] {{ true }} {{ none }}",
    "{% if not tools %}no tools{% endif %}{% if tools is not none and tools %}tools{% endif %}",
    "{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}|{{ messages[2].content.rstrip('.') }}|{{ 'a,b'.replace(',', ';') }}",
    "{% macro turn(m, last=false) %}<{{ m.role }}{{ '!' if last else '' }}>{% endmacro %}{% for m in messages %}{{ turn(m, loop.last) }}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[0].get('name', 'x') }}{{ 'role' in messages[0] }}",
    "{{ messages | length }}{{ messages | map(attribute='role') | join(',') }}{{ (messages | selectattr('role', 'equalto', 'user') | list) | length }}",
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 1) %}{{ raise_exception('no') }}{% endif %}{{ m.role }}{% endfor %}",
    "{# a comment #}\n  {% if true %}\n  kept\n  {% endif %}\nend\n",
    "{{- 'a' -}}   {{- 'b' }} {%- if messages[0].content is string and messages is iterable and messages[0] is mapping %} yes{% endif %}\n\n",
    "{{ '%s and %s' | format('a', 'b') }} {{ 'title case'.title() }} {{ 'X'.lower() }} {{ messages[-1].role }} {{ range(3) | list | length }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{%- generation -%} {{ m.role }} {%- endgeneration -%} {% endfor %}",
];

/// Renders each template with Jinja as transformers sets it up; reads and writes JSON.
const REFERENCE: &str = r#"
import json, sys, jinja2, jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)
    def _body(self, caller):
        return caller()
def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)
env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
    x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
env.globals["raise_exception"] = raise_exception
given = json.load(sys.stdin)
json.dump([env.from_string(t).render(messages=given["messages"], tools=None, documents=None, add_generation_prompt=True,
    bos_token="<s>", eos_token="</s>") for t in given["templates"]], sys.stdout)
"#;

#[test]
#[expect(clippy::print_stdout, reason = "a test that skips says so")]
fn renders_as_jinja_does() {
    let given = serde_json::json!({"messages": conversation(), "templates": TEMPLATES});
    let python = Command::new("python3")
        .args(["-c", REFERENCE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let output = python.and_then(|mut child| {
        child.stdin.take().expect("stdin is piped").write_all(given.to_string().as_bytes())?;
        child.wait_with_output()
    });
    let expected: Vec<String> = match output {
        Ok(output) if output.status.success() => serde_json::from_slice(&output.stdout).unwrap(),
        Ok(output) if !String::from_utf8_lossy(&output.stderr).contains("No module named 'jinja2'") => {
            panic!("{}", String::from_utf8_lossy(&output.stderr))
        }
        _ => {
            println!("skipped: python3 with jinja2 is not there");
            return;
        }
    };
    for (source, expected) in TEMPLATES.iter().zip(expected) {
        assert_eq!(render(source).unwrap(), expected, "{source}");
    }
}

#[test]
fn renders_without_python_too() {
    assert_eq!(render(TEMPLATES[5]).unwrap(), "system,assistant,");
    assert_eq!(render(TEMPLATES[4]).unwrap(), "2 True");
    assert_eq!(
        render(TEMPLATES[8]).unwrap(),
        "{\n  \"role\": \"user\",\n  \"content\": \"  <b>नमस्ते</b> & \\\"you\\\"\\n\"\n}"
    );
    assert_eq!(render(TEMPLATES[11]).unwrap(), "True True None False [] True None");
    let omit = template("{% if add_generation_prompt %}x{% endif %}").unwrap();
    assert_eq!(omit.render(&conversation(), GenerationPrompt::Omit).unwrap(), "");
    assert_eq!(omit.render(&[], GenerationPrompt::Add).unwrap(), "x");
}

#[test]
fn a_template_refuses_in_its_own_words() {
    let roles = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}\
                 {% endif %}{{ m.content }}{% endfor %}";
    let error = template(roles).unwrap().render(&conversation(), GenerationPrompt::Add).unwrap_err();
    assert_eq!(error, ChatTemplateError::Refused("System role not supported".into()));
    assert_eq!(error.to_string(), "System role not supported");
    let nested = "{% macro no() %}{{ raise_exception('inside') }}{% endmacro %}{{ no() }}";
    assert_eq!(render(nested), Err(ChatTemplateError::Refused("inside".into())));
}

#[test]
fn malformed_templates_fail_when_they_are_loaded() {
    for (source, reason) in [
        ("{% for m in messages %}", "end of block"),
        ("line\n{{ messages | }}", "line 2"),
        ("{% nonsense %}", "nonsense"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{{ no_such_function() }}", "no_such_function"),
        ("{{ messages[0].content.no_such_method() }}", "no_such_method"),
    ] {
        match template(source).err() {
            Some(ChatTemplateError::Malformed(message)) => {
                assert!(message.contains(reason), "{source}: {message}");
            }
            other => panic!("{source}: {other:?}"),
        }
    }
}

#[test]
fn a_hostile_template_is_stopped() {
    let long = "{% for a in range(10000) %}{% for b in range(10000) %}x{% endfor %}{% endfor %}";
    assert_eq!(render(long), Err(ChatTemplateError::TooMuchWork));
    let doubling = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}\
                    {% endfor %}{{ ns.s }}";
    assert_eq!(render(doubling), Err(ChatTemplateError::TooMuchWork));
    let recursive = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    assert!(matches!(render(recursive), Err(ChatTemplateError::Failed(_) | ChatTemplateError::TooMuchWork)));
    let nested = "{% set ns = namespace(v=['x']) %}{% for i in range(40) %}{% set ns.v = [ns.v, ns.v] %}{% endfor %}\
                  {{ ns.v | tojson }}";
    assert!(render(nested).is_err());
    let deep = "{% set ns = namespace(v=[]) %}{% for i in range(500) %}{% for j in range(30) %}{% set ns.v = [ns.v] %}\
                {% endfor %}{% endfor %}";
    assert!(render(&format!("{deep}{{{{ ns.v | tojson }}}}")).is_err());
    assert_eq!(render(deep).unwrap(), "");
}

#[test]
fn long_conversations_are_within_the_bounds() {
    let chat = template(TEMPLATES[0]).unwrap();
    let messages: Vec<Message> = (0..2000)
        .map(|n| Message { role: ["user", "assistant"][n % 2].into(), content: "word ".repeat(1000) })
        .collect();
    let rendered = chat.render(&messages, GenerationPrompt::Add).unwrap();
    assert!(rendered.len() > 10_000_000);
}

#[test]
fn other_failures_keep_their_message() {
    match render("{{ messages[0].content + 5 }}") {
        Err(ChatTemplateError::Failed(message)) => assert!(message.contains("line 1"), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_date_is_written_as_strftime_writes_it() {
    let date = render("{{ strftime_now('%Y-%m-%d') }}").unwrap();
    let shape: String = date.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00");
    assert_eq!(render("{{ strftime_now('%d %b %Y') }}").unwrap().len(), 11);
}

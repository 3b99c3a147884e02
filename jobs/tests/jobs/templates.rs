//! Chat templates as models bring them, and the other text files of a model directory.

use jobs::{Message, Preparer, Prompt, Row, SamplingOptions};
use serde_json::json;

use crate::model::{BOS, END, EOS, EOT, HELLO, START, VOCAB, World, chat_line, tokenizer_json};

/// The template of Llama-3.3-Nemotron-Super-49B-v1.
const NEMOTRON: &str = r#"{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}{{- system_message }}{{- "<|eot_id|>" }}{%- for message in messages %}{%- if message['role'] == 'assistant' and '</think>' in message['content'] %}{%- set content = message['content'].split('</think>')[-1].lstrip() %}{%- else %}{%- set content = message['content'] %}{%- endif %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + content | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"#;

/// The prompt of these messages under a template, as text with its special tokens.
fn prompt(template: &str, messages: &[(&str, &str)]) -> Result<String, String> {
    let world = World::new();
    world.file("chat_template.jinja", template);
    let messages = messages.iter().map(|(role, content)| Message::new(*role, *content)).collect();
    let mut preparer = world.options.clone();
    preparer.max_context_tokens = 1_000_000;
    let preparer = Preparer::new(world.text(), preparer).unwrap();
    let row = preparer.prompt(Prompt::Chat(messages), SamplingOptions::default());
    let row = row.map_err(|error| error.message)?;
    let tokenizer = world.text().tokenizer().unwrap().clone();
    let bytes = row.request.prompt.iter().flat_map(|&token| tokenizer.token_bytes(token).unwrap().to_vec());
    Ok(String::from_utf8(bytes.collect()).unwrap())
}

#[test]
fn nemotron_always_has_a_system_message_and_forgets_earlier_thoughts() {
    let header = |role| format!("<|start_header_id|>{role}<|end_header_id|>\n\n");
    let (system, user, assistant) = (header("system"), header("user"), header("assistant"));
    assert_eq!(
        prompt(NEMOTRON, &[("user", " Hi\n")]).unwrap(),
        format!("<|begin_of_text|>{system}<|eot_id|>{user}Hi<|eot_id|>{assistant}")
    );
    let chat = [
        ("system", "detailed thinking on"),
        ("user", "1+1?"),
        ("assistant", "<think>hm</think>\n\n2"),
        ("user", "sure?"),
    ];
    assert_eq!(
        prompt(NEMOTRON, &chat).unwrap(),
        format!(
            "<|begin_of_text|>{system}detailed thinking on<|eot_id|>{user}1+1?<|eot_id|>{assistant}2<|eot_id|>\
             {user}sure?<|eot_id|>{assistant}"
        )
    );
}

#[test]
fn a_chat_begins_with_the_one_token_its_template_writes() {
    let row = World::new().chat(json!({}));
    let user = [START, 117, 115, 101, 114, END, HELLO, EOT];
    assert_eq!(row.request.prompt[0], BOS);
    assert_eq!(row.request.prompt[1..9], user);
}

#[test]
fn templates_find_what_transformers_offers_them() {
    let prompt = |template: &str| prompt(template, &[("user", "<é>")]).unwrap();
    assert_eq!(
        prompt("{% if tools is not none %}tools{% endif %}{{ messages | tojson }}"),
        r#"[{"role": "user", "content": "<é>"}]"#
    );
    assert_eq!(prompt("{{ strftime_now('%d %b %Y') }} {{ eos_token }}"), "01 Mar 2026 <|eot_id|>");
    assert_eq!(
        prompt(
            "{% for m in messages %}\n{% generation %}\n{{ m.content }}\n{%- endgeneration %}\n{% endfor %}\n"
        ),
        "<é>"
    );
    assert_eq!(
        prompt("{{ messages[0].get('name', 'nobody') }} {{ messages[0].role.upper() }}"),
        "nobody USER"
    );
}

#[test]
fn constructs_that_well_known_templates_use() {
    let prompt = |template: &str| prompt(template, &[("system", "s"), ("user", "u")]).unwrap();
    let date = "{%- if not date_string is defined %}{%- if strftime_now is defined %}\
        {%- set date_string = strftime_now(\"%d %b %Y\") %}{%- else %}{%- set date_string = \"26 Jul 2024\" %}\
        {%- endif %}{%- endif %}{{- \"Today Date: \" + date_string }}";
    assert_eq!(prompt(date), "Today Date: 01 Mar 2026"); // Llama 3.1
    let last_user = "{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}\
        {%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}\
        {%- if ns.multi_step and message.role == \"user\" and message.content is string \
        and not(message.content.startswith('<tool>')) %}{%- set ns.multi_step = false %}{%- set ns.last = index %}\
        {%- endif %}{%- endfor %}{{- ns.last }}";
    assert_eq!(prompt(last_user), "1"); // Qwen 3
    let first = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}default{% endif %}\
        {{'<' + message['role'] + '>\\n'}}{% endfor %}";
    assert_eq!(prompt(first), "<system>\n<user>\n"); // SmolLM2
    let macros = "{%- macro say(m) -%}{{ m.role|title }}: {{ m['content'] }}{%- endmacro -%}\
        {%- for m in messages if m.role != 'system' -%}{{ say(m) }}{%- if not loop.last %}{% break %}{% endif -%}{%- endfor -%}";
    assert_eq!(prompt(macros), "User: u"); // Those with tools
}

#[test]
fn what_a_template_raises_is_the_rows_error() {
    let template = "{{ raise_exception('only ' ~ messages | length ~ ' message') }}";
    assert_eq!(prompt(template, &[("user", "x")]).unwrap_err(), "messages: chat template: only 1 message");
    let broken = prompt("{{ messages[0].content.upper(1) }}", &[("user", "x")]).unwrap_err();
    assert_eq!(broken, "messages: chat template: too many arguments (in chat_template:1)");
}

#[test]
fn the_jinja_file_wins_over_the_config_and_a_named_list_means_its_default() {
    let world = World::new();
    let named = |name: &str, template: &str| json!({"name": name, "template": template});
    let world =
        world.tokenizer_config(json!({"chat_template": [named("tool_use", "T"), named("default", "D")]}));
    assert_eq!(world.chat(json!({})).request.prompt, [68]);
    world.file("chat_template.jinja", "F");
    assert_eq!(world.chat(json!({})).request.prompt, [70]);
}

#[test]
fn templates_that_cannot_be_used_are_errors_before_the_job() {
    let message = |config: serde_json::Value| {
        let world = World::new().tokenizer_config(config);
        let error = world.try_text().err().unwrap().to_string();
        error.replace(&world.path().display().to_string(), "MODEL")
    };
    assert_eq!(
        message(
            json!({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]})
        ),
        "MODEL/tokenizer_config.json: chat_template has no entry named default, only tool_use, rag"
    );
    assert_eq!(
        message(json!({"chat_template": 3})),
        "MODEL/tokenizer_config.json: chat_template: expected a string or a named list, found 3"
    );
    assert_eq!(
        message(json!({"chat_template": [{"name": "default"}]})),
        r#"MODEL/tokenizer_config.json: chat_template[0]: expected name and template, found {"name":"default"}"#
    );
    assert_eq!(
        message(json!({"chat_template": "a\n{% if %}"})),
        "MODEL/tokenizer_config.json: syntax error: unexpected end of block (in chat_template:2)"
    );
}

#[test]
fn a_template_names_the_tokens_of_either_file() {
    let world = World::new().tokenizer_config(json!({
        "bos_token": null,
        "eos_token": {"content": "<|eot_id|>"},
        "chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}",
    }));
    world.file(
        "special_tokens_map.json",
        r#"{"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}"#,
    );
    assert_eq!(world.chat(json!({})).request.prompt, [BOS, 124, EOT, 124]);
}

#[test]
fn the_ends_of_sequences_are_gathered_from_all_files() {
    let world = World::new();
    assert_eq!(world.text().eos_token_ids(), [EOS, EOT]);
    world.file("generation_config.json", r#"{"eos_token_id": [65, 266]}"#);
    assert_eq!(world.text().eos_token_ids(), [65, EOS, EOT]);
    assert_eq!(world.chat(json!({})).request.sampling.stop_token_ids, [65, EOS, EOT]);
    let row = world.chat(json!({"ignore_eos": true, "stop_token_ids": [66]}));
    assert_eq!(row.request.sampling.stop_token_ids, [66]);
}

#[test]
fn what_the_model_asks_for_and_does_not_get_is_a_warning() {
    let world = World::new();
    world.file("generation_config.json", r#"{"num_beams": 4, "no_repeat_ngram_size": 3}"#);
    assert_eq!(
        world.text().warnings(),
        ["generation_config.json asks for no_repeat_ngram_size 3, num_beams 4, which is not honoured"]
    );
}

#[test]
fn a_template_without_an_end_is_stopped_and_a_chat_of_thousands_of_messages_is_not() {
    let endless = "{% for i in range(100000) %}{% for j in range(100000) %}{{ j }}{% endfor %}{% endfor %}";
    let in_macro = format!("{{% macro m() %}}{endless}{{% endmacro %}}{{{{ m() }}}}");
    for template in [endless, &in_macro] {
        let message = prompt(template, &[("user", "x")]).unwrap_err();
        let (before, after) = message.split_once(" after ").unwrap();
        assert_eq!(before, "messages: chat template: stopped");
        assert!(after.ends_with(" steps without an end; does it loop over too much?"), "{after}");
    }

    let chat = [("user", "why?"), ("assistant", "<think>hm</think>because")].repeat(5_000);
    assert_eq!(prompt(NEMOTRON, &chat).unwrap().matches("because").count(), 5_000);
    let looking_back = "{% for m in messages %}{% for n in messages %}{% endfor %}{% endfor %}x";
    assert_eq!(prompt(looking_back, &chat[..1_000]).unwrap(), "x");
}

#[test]
fn an_indent_beyond_all_use_is_the_rows_error() {
    let message = |indent: &str| {
        let template = format!("{{{{ messages | tojson(indent={indent}) }}}}");
        prompt(&template, &[("user", "x")]).map_err(|message| {
            let rest = message.strip_prefix("messages: chat template: invalid operation: ").unwrap();
            rest.strip_suffix(" (in chat_template:1)").unwrap().to_owned()
        })
    };
    for indent in ["10000000000000000000", "99999999999", "17", "-1"] {
        let expected = format!("tojson: expected an indent from 0 to 16, found {indent}");
        assert_eq!(message(indent).unwrap_err(), expected);
    }
    let text = message("' ' * 17").unwrap_err();
    assert_eq!(text, "tojson: expected an indent from 0 to 16, found a text of 17");
    let whole = message("16").unwrap();
    assert!(whole.starts_with(&format!("[\n{}{{", " ".repeat(16))), "{whole}");
}

#[test]
fn ends_of_sequences_beyond_the_vocabulary_never_reach_a_stage() {
    let world = World::new();
    world.file("generation_config.json", r#"{"eos_token_id": [65, 270]}"#);
    let error = world.try_text().err().unwrap().to_string();
    assert_eq!(
        error.replace(&world.path().display().to_string(), "MODEL"),
        "MODEL/generation_config.json: eos_token_id: expected token ids below 270, found 270"
    );

    let world = World::new().tokenizer_config(json!({"eos_token": "<|beyond|>"}));
    let mut tokenizer = tokenizer_json();
    let mut beyond = tokenizer["added_tokens"][0].clone();
    beyond["id"] = VOCAB.into();
    beyond["content"] = "<|beyond|>".into();
    tokenizer["added_tokens"].as_array_mut().unwrap().push(beyond);
    world.file("tokenizer.json", tokenizer.to_string());
    assert_eq!(world.text().eos_token_ids(), [EOS]);
    assert_eq!(
        world.text().warnings(),
        [
            "tokenizer.json has 271 tokens, the model knows 270",
            "the tokenizer's eos_token has id 270 and ends no sequence, the model knows 270 tokens",
        ]
    );
}

#[test]
fn generation_settings_of_another_type_are_errors_and_whole_floats_are_integers() {
    let world = World::new();
    world.file("generation_config.json", r#"{"do_sample": "no"}"#);
    let error = world.try_text().err().unwrap().to_string();
    assert!(error.ends_with("do_sample: expected true or false, found \"no\""), "{error}");
    world.file("generation_config.json", r#"{"do_sample": null, "top_k": 50.0}"#);
    assert_eq!(world.text().sampling().top_k, Some(50));
    world.file("generation_config.json", r#"{"top_k": 50.5}"#);
    let error = world.try_text().err().unwrap().to_string();
    assert!(error.ends_with("top_k: expected an integer, found 50.5"), "{error}");
}

#[test]
fn a_beginning_that_only_the_tokenizer_knows_is_not_doubled() {
    let world =
        World::new().tokenizer_config(json!({"chat_template": "<|begin_of_text|>{{ messages[0].content }}"}));
    let prompt = |text: &str| world.completion(json!({"prompt": text})).request.prompt.clone();
    assert_eq!(prompt("hello"), [BOS, HELLO]);
    assert_eq!(prompt("<|begin_of_text|>hello"), [BOS, HELLO]);
    // Another special token may well stand twice.
    assert_eq!(prompt("<|eot_id|><|eot_id|>"), [BOS, EOT, EOT]);
    assert_eq!(world.chat(json!({})).request.prompt, [BOS, HELLO]);
}

#[test]
fn a_chat_without_a_template_is_refused() {
    let world = World::new().tokenizer_config(json!({}));
    let name = world.text().name().to_owned();
    assert!(!world.text().has_chat_template());
    assert_eq!(
        world.refusal(&chat_line("a", json!({}))),
        format!("no_chat_template messages | messages: the model {name} has no chat template")
    );
    let world = world.user("{{ q }}");
    let error = Preparer::new(world.text(), world.options.clone()).err().unwrap();
    assert_eq!(
        error.to_string(),
        format!("[prompt] user needs a chat template, and the model {name} has none")
    );
}

#[test]
fn plain_rows_become_messages() {
    let mut world = World::new().user("{{ q | upper }}?\n");
    world.options.prompt.as_mut().unwrap().system = Some("be {{ mood | default('kind') }}".to_owned());
    let row = world.request(r#"{"q": "hello"}"#);
    let text = world.text().tokenizer().unwrap().decode(&row.request.prompt).unwrap();
    assert_eq!(text, "systembe kinduserHELLO?assistant");
}

#[test]
fn a_prompt_of_the_command_line_goes_the_way_of_a_row() {
    let world = World::new();
    let sampling = SamplingOptions { max_tokens: Some(3), ..SamplingOptions::default() };
    let row = world.preparer().prompt(Prompt::Chat(vec![Message::new("user", "hello")]), sampling).unwrap();
    let Row::Request(same) = world.rows(chat_line("a", json!({"max_tokens": 3}))).remove(0) else { panic!() };
    assert_eq!(row.request.prompt, same.request.prompt);
    assert_eq!(row.request.sampling, same.request.sampling);
}

//! From what a row asks to what the pipeline computes: the prompt in tokens, the sampling settled.

use std::sync::Arc;

use scheduler::{Generated, Request, RequestKey, Sampling, TokenId};

use crate::body::Body;
use crate::error::{Error, Result, RowError};
use crate::grade::Grader;
use crate::key::{KeyMaker, LineKind};
use crate::model_text::ModelText;
use crate::plain_row::{PromptOptions, PromptTemplates};
use crate::prepared::{Message, PreparedRow, Prompt, Reply};
use crate::sampling::SamplingOptions;
use crate::settings::Settings;

/// What a job says about all its rows.
#[derive(Debug, Clone)]
pub struct RowOptions {
    /// Identity of the model's content, which two copies of a model share.
    pub model_identity: String,
    /// `[prompt]`: the rows are plain and these templates make messages of them.
    pub prompt: Option<PromptOptions>,
    /// `[grade]`: the rows bring their right answers along.
    pub grader: Option<Grader>,
    /// `[sampling]`.
    pub sampling: SamplingOptions,
    /// `[job] seed`.
    pub seed: u64,
    /// Tokens of prompt and answer together.
    pub max_context_tokens: u32,
}

/// Turns what rows ask into requests, by one model and one job's settings.
pub struct Preparer {
    text: Arc<ModelText>,
    prompt: Option<PromptOptions>,
    templates: Option<PromptTemplates>,
    grader: Option<Grader>,
    /// What holds where a body is silent.
    defaults: SamplingOptions,
    seed: u64,
    max_context_tokens: u32,
    /// Everything but the row that an answer depends on.
    identity: [String; 4],
}

impl Preparer {
    /// Checks the job's settings against the model's text files.
    pub fn new(text: Arc<ModelText>, options: RowOptions) -> Result<Preparer> {
        let lacks =
            |key: &str, needed| Err(Error::ModelLacks { key: key.into(), needed, model: text.name().into() });
        if options.prompt.is_some() && text.tokenizer().is_none() {
            return lacks("[prompt] user", "a tokenizer.json");
        }
        if options.prompt.is_some() && !text.has_chat_template() {
            return lacks("[prompt] user", "a chat template");
        }
        if options.sampling.stop.as_ref().is_some_and(|stop| !stop.is_empty()) && text.tokenizer().is_none() {
            return lacks("[sampling] stop", "a tokenizer.json");
        }
        let setting = |(name, message)| Error::Setting { key: format!("[sampling] {name}"), message };
        options.sampling.check().map_err(setting)?;
        let stop_token_ids = options.sampling.stop_token_ids.as_deref().unwrap_or_default();
        check_tokens(&text, stop_token_ids).map_err(|message| setting(("stop_token_ids", message)))?;

        let defaults = options.sampling.or(text.sampling());
        let templates = options.prompt.as_ref().map(PromptTemplates::new).transpose()?;
        let prompt = options.prompt.as_ref().map(|prompt| (&prompt.system, &prompt.user));
        let json = |value: Result<String, serde_json::Error>| value.expect("plain data is JSON");
        let identity = [
            options.model_identity,
            json(serde_json::to_string(&prompt)),
            json(serde_json::to_string(&(&defaults, text.eos_token_ids()))),
            options.seed.to_string(),
        ];
        let max_context_tokens = options.max_context_tokens;
        let RowOptions { prompt, seed, grader, .. } = options;
        Ok(Preparer { text, prompt, templates, grader, defaults, seed, max_context_tokens, identity })
    }

    /// A request that comes from no file: a prompt, and sampling that counts as a body's.
    pub fn prompt(&self, prompt: Prompt, sampling: SamplingOptions) -> Result<PreparedRow, RowError> {
        let content = match &prompt {
            Prompt::Chat(messages) => {
                messages.iter().map(|m| format!("{:?}{:?}", m.role, m.content)).collect()
            }
            Prompt::Text(text) => text.clone(),
            Prompt::Tokens(tokens) => format!("{tokens:?}"),
        };
        let key = self.key_maker().only(LineKind::Plain, "", content.as_bytes());
        let (request, reply) = self.prepare(Body::of(prompt, sampling), key)?;
        Ok(PreparedRow {
            index: 0,
            line: 1,
            custom_id: "prompt".to_owned(),
            request,
            so_far: Generated::default(),
            reply,
            truth: None,
        })
    }

    /// What answers depend on beside their rows and how numbers are computed, to be remembered with them.
    pub fn settings(&self) -> Settings {
        let sampling = serde_json::to_value(&self.defaults).expect("plain data is JSON");
        let sampling = sampling.as_object().expect("a struct is an object").clone();
        let settings = Settings::default()
            .with("model", self.identity[0].as_str())
            .with("model's end-of-sequence tokens", self.text.eos_token_ids())
            .with("model.max_context_tokens", self.max_context_tokens)
            .with("prompt.system", self.prompt.as_ref().and_then(|prompt| prompt.system.clone()))
            .with("prompt.user", self.prompt.as_ref().map(|prompt| prompt.user.clone()))
            .with("grade.kind", self.grader.map(Grader::name))
            .with("job.seed", self.seed);
        let named = |settings: Settings, (name, value): (String, serde_json::Value)| match name.as_str() {
            "n" => settings.with("grade.runs", value),
            name => settings.with(&format!("sampling.{name}"), value),
        };
        let settings = sampling.into_iter().fold(settings, named);
        Settings { identity: self.identity.to_vec(), ..settings }
    }

    pub(crate) fn key_maker(&self) -> KeyMaker {
        KeyMaker::new(&self.identity.each_ref().map(String::as_str))
    }

    /// The job's templates, where its rows are plain.
    pub(crate) fn templates(&self) -> Option<&PromptTemplates> {
        self.templates.as_ref()
    }

    /// How the job's rows are graded, if they are.
    pub(crate) fn grader(&self) -> Option<Grader> {
        self.grader
    }

    pub(crate) fn prepare(&self, body: Body, key: RequestKey) -> Result<(Arc<Request>, Reply), RowError> {
        let asked = body.sampling.clone().or(&self.defaults);
        asked.check().map_err(|(name, message)| RowError::of(name, "invalid_value", message))?;
        if asked.stop.as_ref().is_some_and(|stop| !stop.is_empty()) && self.text.tokenizer().is_none() {
            return Err(RowError::of("stop", "unsupported_parameter", self.no_tokenizer()));
        }
        let stop_token_ids = asked.stop_token_ids.as_deref().unwrap_or_default();
        check_tokens(&self.text, stop_token_ids)
            .map_err(|message| RowError::of("stop_token_ids", "invalid_token_id", message))?;
        let biased: Vec<TokenId> = asked.logit_bias.iter().flatten().map(|(&token, _)| token).collect();
        check_tokens(&self.text, &biased)
            .map_err(|message| RowError::of("logit_bias", "invalid_token_id", message))?;
        self.check_guide(&body, &asked)?;
        let prompt = self.tokens(&body.prompt)?;
        let max_tokens = self.room(&body, prompt.len(), asked.max_tokens)?;
        let choices = asked.n.unwrap_or(1);
        let sampling = self.sampling(asked, &body, max_tokens);
        let reply = Reply {
            endpoint: body.endpoint,
            model: body.model.unwrap_or_else(|| self.text.name().to_owned()),
            echo: body.echo.then(|| self.echo(body.prompt)),
            token_ids: body.token_ids,
            choices,
        };
        Ok((Arc::new(Request { key, prompt, sampling: Arc::new(sampling), sample: 0 }), reply))
    }

    /// A guide must be one that can be followed, and ends the answer where it says.
    fn check_guide(&self, body: &Body, asked: &SamplingOptions) -> Result<(), RowError> {
        let Some((name, guide)) = &body.guide else { return Ok(()) };
        let without = |param: &'static str, expected: &str, found: String| {
            let message = format!("expected {expected} beside {name}, found {found}");
            Err(RowError::of(param, "invalid_value", message))
        };
        if asked.ignore_eos == Some(true) {
            return without("ignore_eos", "false", "true".to_owned());
        }
        if let Some(min @ 1..) = asked.min_tokens {
            return without("min_tokens", "0", min.to_string());
        }
        let guides = self.text.guides();
        let guides =
            guides.ok_or_else(|| RowError::of(*name, "unsupported_parameter", self.no_tokenizer()))?;
        guides.check(guide).map_err(|message| RowError::of(*name, "invalid_guide", message))
    }

    fn tokens(&self, prompt: &Prompt) -> Result<Vec<TokenId>, RowError> {
        let name = param(prompt);
        let tokens = match prompt {
            Prompt::Chat(messages) => self.encode(name, &self.render(messages)?, true)?,
            Prompt::Text(text) => self.encode(name, text, false)?,
            Prompt::Tokens(tokens) => tokens.clone(),
        };
        check_tokens(&self.text, &tokens)
            .map_err(|message| RowError::of(name, "invalid_token_id", message))?;
        if tokens.is_empty() {
            return Err(RowError::of(name, "invalid_value", "expected at least one token, found none"));
        }
        Ok(tokens)
    }

    fn render(&self, messages: &[Message]) -> Result<String, RowError> {
        let rendered = self.text.render_chat(messages).ok_or_else(|| {
            let message = format!("the model {} has no chat template", self.text.name());
            RowError::of("messages", "no_chat_template", message)
        })?;
        rendered.map_err(|message| {
            RowError::of("messages", "template_error", format!("chat template: {message}"))
        })
    }

    fn encode(&self, name: &str, text: &str, is_chat: bool) -> Result<Vec<TokenId>, RowError> {
        let tokenizer = self.text.tokenizer();
        let tokenizer = tokenizer.ok_or_else(|| RowError::of(name, "no_tokenizer", self.no_tokenizer()))?;
        self.text
            .encode(tokenizer, text, is_chat)
            .map_err(|message| RowError::of(name, "tokenizer_error", message))
    }

    fn no_tokenizer(&self) -> String {
        format!("the model {} has no tokenizer.json and takes token ids only", self.text.name())
    }

    /// Tokens that may be generated: as many as are asked for and the context leaves.
    fn room(&self, body: &Body, prompt_tokens: usize, asked: Option<u32>) -> Result<u32, RowError> {
        let context = self.max_context_tokens as usize;
        let least = usize::from(asked != Some(0));
        if prompt_tokens + least > context {
            let message = format!("{prompt_tokens} tokens leave no room in the context of {context}");
            return Err(RowError::of(param(&body.prompt), "context_length_exceeded", message));
        }
        let left = u32::try_from(context - prompt_tokens).expect("no more than the context");
        Ok(asked.map_or(left, |asked| asked.min(left)))
    }

    fn sampling(&self, asked: SamplingOptions, body: &Body, max_tokens: u32) -> Sampling {
        let mut stop_token_ids = asked.stop_token_ids.unwrap_or_default();
        if !asked.ignore_eos.unwrap_or(false) {
            stop_token_ids.extend_from_slice(self.text.eos_token_ids());
        }
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        Sampling {
            // OpenAI's defaults: the model's own distribution, whole.
            temperature: asked.temperature.unwrap_or(1.0) as f32,
            // With 0 the set would be empty; OpenAI's clients mean the most likely token alone.
            top_p: (asked.top_p.unwrap_or(1.0) as f32).max(f32::MIN_POSITIVE),
            top_k: asked.top_k.unwrap_or(0).clamp(0, u32::MAX.into()) as u32,
            min_p: asked.min_p.unwrap_or(0.0) as f32,
            repetition_penalty: asked.repetition_penalty.unwrap_or(1.0) as f32,
            frequency_penalty: asked.frequency_penalty.unwrap_or(0.0) as f32,
            presence_penalty: asked.presence_penalty.unwrap_or(0.0) as f32,
            logit_bias: (asked.logit_bias.into_iter().flatten())
                .map(|(token, bias)| (token, bias as f32))
                .collect(),
            guide: body.guide.as_ref().map(|(_, guide)| guide.clone()),
            seed: asked.seed.unwrap_or(self.seed),
            max_tokens,
            min_tokens: asked.min_tokens.unwrap_or(0),
            stop_token_ids,
            stop: asked.stop.unwrap_or_default(),
            logprobs: body.logprobs,
            prompt_logprobs: body.echo && body.logprobs.is_some(),
        }
    }

    /// The prompt as text, for an answer that repeats it.
    fn echo(&self, prompt: Prompt) -> String {
        match (prompt, self.text.tokenizer()) {
            (Prompt::Text(text), _) => text,
            (Prompt::Tokens(tokens), Some(tokenizer)) => tokenizer.decode(&tokens).unwrap_or_default(),
            (Prompt::Tokens(_), None) | (Prompt::Chat(_), _) => String::new(),
        }
    }
}

/// The parameter that a prompt comes from.
fn param(prompt: &Prompt) -> &'static str {
    match prompt {
        Prompt::Chat(_) => "messages",
        Prompt::Text(_) | Prompt::Tokens(_) => "prompt",
    }
}

fn check_tokens(text: &ModelText, tokens: &[TokenId]) -> Result<(), String> {
    let size = text.vocab_size();
    match tokens.iter().find(|&&token| token as usize >= size) {
        Some(token) => Err(format!("expected token ids below {size}, found {token}")),
        None => Ok(()),
    }
}

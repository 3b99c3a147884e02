//! Everything textual of a model directory: tokenizer, chat template, defaults for sampling, and the
//! tokens that end a sequence.

use std::path::Path;
use std::sync::Arc;

use scheduler::TokenId;
use serde_json::Value;

use crate::chat_template::{self, ChatTemplate, SPECIAL_TOKENS};
use crate::error::{Error, Result};
use crate::generation_config::{GenerationConfig, read_object};
use crate::guides::Guides;
use crate::prepared::Message;
use crate::sampling::SamplingOptions;
use crate::tokenizer::Tokenizer;

/// What the caller knows about a model that its text files do not say.
#[derive(Debug, Clone)]
pub struct ModelTextOptions {
    /// Number of tokens the model knows: the rows of its embedding.
    pub vocab_size: usize,
    /// `eos_token_id` of `config.json`, one or several.
    pub eos_token_ids: Vec<TokenId>,
    /// The moment `strftime_now` of a chat template speaks of, in Unix seconds, read as UTC. One
    /// moment for a whole job, so that a row's prompt does not depend on when its turn comes; a job
    /// that goes on tomorrow with a template that writes the date should be given the first day's.
    pub unix_seconds: u64,
}

/// The textual side of a model directory.
pub struct ModelText {
    name: String,
    tokenizer: Option<Arc<Tokenizer>>,
    guides: Option<Arc<Guides>>,
    chat_template: Option<ChatTemplate>,
    sampling: SamplingOptions,
    eos_token_ids: Vec<TokenId>,
    bos_token_id: Option<TokenId>,
    vocab_size: usize,
    warnings: Vec<String>,
}

impl ModelText {
    /// Reads the text files of a model directory; all of them may be missing.
    pub fn open(dir: &Path, options: &ModelTextOptions) -> Result<ModelText> {
        let tokenizer = Tokenizer::open(dir)?.map(Arc::new);
        let tokenizer_config =
            Value::Object(read_object(&dir.join("tokenizer_config.json"))?.unwrap_or_default());
        let special_tokens = special_tokens(dir, &tokenizer_config)?;
        let chat_template =
            open_chat_template(dir, &tokenizer_config, &special_tokens, options.unix_seconds)?;
        let generation = GenerationConfig::open(dir)?;
        let id_of = |name: &str| {
            let (_, content) = special_tokens.iter().find(|(other, _)| *other == name)?;
            tokenizer.as_ref()?.token_id(content)
        };
        let vocab_size = options.vocab_size;
        check_eos_tokens(dir, &generation, vocab_size)?;
        let mut warnings = warnings(&generation, tokenizer.as_deref(), vocab_size);
        let mut eos_token_ids = options.eos_token_ids.clone();
        eos_token_ids.extend(&generation.eos_token_ids);
        match id_of("eos_token") {
            Some(id) if id as usize >= vocab_size => warnings.push(format!(
                "the tokenizer's eos_token has id {id} and ends no sequence, the model knows {vocab_size} tokens"
            )),
            id => eos_token_ids.extend(id),
        }
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        let guides = (tokenizer.as_ref())
            .map(|tokenizer| Guides::new(Arc::clone(tokenizer), vocab_size, eos_token_ids.clone()));
        Ok(ModelText {
            name: name_of(dir),
            guides: guides.map(Arc::new),
            bos_token_id: id_of("bos_token"),
            tokenizer,
            chat_template,
            sampling: generation.sampling,
            eos_token_ids,
            vocab_size,
            warnings,
        })
    }

    /// The directory's name, by which the model calls itself where a request gives none.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The tokenizer; a model without one takes and returns token ids.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.tokenizer.as_ref()
    }

    /// What follows the guides of rows; a model without a tokenizer can't.
    pub fn guides(&self) -> Option<&Arc<Guides>> {
        self.guides.as_ref()
    }

    /// Whether messages can be made into a prompt.
    pub fn has_chat_template(&self) -> bool {
        self.chat_template.is_some()
    }

    /// What `generation_config.json` says about sampling.
    pub fn sampling(&self) -> &SamplingOptions {
        &self.sampling
    }

    /// Tokens that end a sequence: those of `config.json`, `generation_config.json` and
    /// `tokenizer_config.json` together, in rising order.
    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.eos_token_ids
    }

    /// Number of tokens the model knows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// What its user should know before the job starts.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The prompt the chat template makes of these messages; `None` without a template.
    pub(crate) fn render_chat(&self, messages: &[Message]) -> Option<Result<String, String>> {
        self.chat_template.as_ref().map(|template| template.render(messages))
    }

    /// Token ids of a text that begins a sequence, with one beginning-of-sequence token at most: a
    /// text may carry the token its tokenizer adds, whether or not a file names it `bos_token`.
    pub(crate) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        is_chat: bool,
    ) -> Result<Vec<TokenId>, String> {
        let mut tokens = tokenizer.encode(text, !is_chat)?;
        if let [first, second, ..] = tokens.as_slice()
            && first == second
            && [self.bos_token_id, tokenizer.leading_token()].contains(&Some(*first))
        {
            tokens.remove(0);
        }
        Ok(tokens)
    }
}

fn open_chat_template(
    dir: &Path,
    tokenizer_config: &Value,
    special_tokens: &[(&'static str, String)],
    unix_seconds: u64,
) -> Result<Option<ChatTemplate>> {
    let Some((path, source)) = chat_template::find_source(dir, tokenizer_config)? else { return Ok(None) };
    let template = ChatTemplate::new(&source, special_tokens.to_vec(), unix_seconds);
    template.map(Some).map_err(|message| Error::malformed(&path, message))
}

/// Special tokens by their names: those of `tokenizer_config.json`, and where it is silent those of
/// `special_tokens_map.json`.
fn special_tokens(dir: &Path, tokenizer_config: &Value) -> Result<Vec<(&'static str, String)>> {
    let map = Value::Object(read_object(&dir.join("special_tokens_map.json"))?.unwrap_or_default());
    let content = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
    let token = |name: &'static str| {
        let content = content(&tokenizer_config[name]).or_else(|| content(&map[name]))?;
        Some((name, content))
    };
    Ok(SPECIAL_TOKENS.into_iter().filter_map(token).collect())
}

/// Every token that ends a sequence must be one the model can choose: stages look its logit up.
fn check_eos_tokens(dir: &Path, generation: &GenerationConfig, vocab_size: usize) -> Result<()> {
    match generation.eos_token_ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => {
            let message = format!("eos_token_id: expected token ids below {vocab_size}, found {id}");
            Err(Error::malformed(&dir.join("generation_config.json"), message))
        }
        None => Ok(()),
    }
}

fn warnings(generation: &GenerationConfig, tokenizer: Option<&Tokenizer>, vocab_size: usize) -> Vec<String> {
    let mut warnings = Vec::new();
    if !generation.not_honoured.is_empty() {
        warnings.push(format!(
            "generation_config.json asks for {}, which is not honoured",
            generation.not_honoured.join(", ")
        ));
    }
    if let Some(tokenizer) = tokenizer
        && tokenizer.vocab_size() > vocab_size
    {
        let known = tokenizer.vocab_size();
        warnings.push(format!("tokenizer.json has {known} tokens, the model knows {vocab_size}"));
    }
    warnings
}

/// The last part of a path, also of one such as `.`.
fn name_of(dir: &Path) -> String {
    let resolved = dir.canonicalize();
    let dir = resolved.as_deref().unwrap_or(dir);
    dir.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

//! Text to token ids: `tokenizer.json` as the model directory has it.
//!
//! Truncation and padding are switched off after the file is loaded: a file that carries a truncation
//! stanza would otherwise cut long prompts without a word. How ids become text again lives in
//! [`crate::detokenizer`]; this module only knows how each single token is spelled.

use std::collections::HashSet;
use std::path::Path;

use scheduler::TokenId;

use crate::error::{Error, Result};
use crate::spelling::Spelling;

/// A model's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: HashSet<TokenId>,
    spelling: Spelling,
    leading: Option<TokenId>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model directory; `None` where it has none.
    pub fn open(dir: &Path) -> Result<Option<Tokenizer>> {
        let path = dir.join("tokenizer.json");
        match std::fs::read(&path) {
            Ok(bytes) => {
                Tokenizer::from_json(&bytes).map(Some).map_err(|message| Error::malformed(&path, message))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::read(&path, error)),
        }
    }

    /// Reads a tokenizer from the bytes of a `tokenizer.json`.
    pub fn from_json(bytes: &[u8]) -> Result<Tokenizer, String> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        inner.with_padding(None);
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let spelling = Spelling::of(&inner)?;
        let leading = leading(&inner);
        Ok(Tokenizer { inner, special, spelling, leading })
    }

    /// Token ids of a text. Special tokens written in the text are recognised in either case;
    /// `add_special_tokens` lets the tokenizer add its own, such as a beginning-of-sequence token.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, String> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of a run of tokens that stands alone, special tokens left out.
    pub fn decode(&self, tokens: &[TokenId]) -> Result<String, String> {
        self.inner.decode(tokens, true).map_err(|error| error.to_string())
    }

    /// The id of a token given by its content, such as `<|eot_id|>`.
    pub fn token_id(&self, content: &str) -> Option<TokenId> {
        self.inner.token_to_id(content)
    }

    /// The bytes that the token with this id stands for; `None` for an id outside the vocabulary.
    pub fn token_bytes(&self, id: TokenId) -> Option<&[u8]> {
        self.spelling.bytes(id)
    }

    /// The token that the tokenizer puts in front of a text, where it does.
    pub(crate) fn leading_token(&self) -> Option<TokenId> {
        self.leading
    }

    /// Whether this token is left out of texts.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.special.contains(&id)
    }

    /// One more than the highest token id.
    pub fn vocab_size(&self) -> usize {
        self.spelling.len()
    }

    /// Whether a text is the concatenation of its tokens' bytes; otherwise only the tokenizer's own
    /// decoder knows the text of several tokens.
    pub(crate) fn spells_by_bytes(&self) -> bool {
        self.spelling.is_exact()
    }
}

/// The token put in front of a text, told by what it does: post-processors take many forms.
fn leading(inner: &tokenizers::Tokenizer) -> Option<TokenId> {
    let ids = |add_special_tokens| Some(inner.encode_fast("a", add_special_tokens).ok()?.get_ids().to_vec());
    let (bare, whole) = (ids(false)?, ids(true)?);
    let first = *whole.first()?;
    // A text without tokens cannot tell what is in front of it from what is behind.
    (first != *bare.first()?).then_some(first)
}
